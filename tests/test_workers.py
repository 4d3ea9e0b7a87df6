"""Workers: every unit is answered once, whoever is killed; and what is not the same is refused."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tempo.errors import SpecError, WorkerError
from tempo.workers import executor, folder
from tempo.workers.folder import FolderWorkers, kill, start
from tempo.workers.work import difference, is_sound, raised
from tests import worker_toys
from tests.worker_toys import begun, setup

ROOT = Path(__file__).resolve().parent.parent
UNITS = [{"number": number} for number in range(7)]
DOUBLED = {number: 2 * number for number in range(7)}
pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills processes by signals")


def always(index):
    return True


def answers(found):
    return {index: answer.get("given", answer.get("failed")) for index, answer in found}


def wait_until(true, seconds=30.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def driver(place, workers, number):
    command = [sys.executable, "-m", "tests.worker_toys", place, workers, number]
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.fixture
def hired(tmp_path):
    """A function that starts `tempo work` on a folder; all that it started are ended."""
    begun = []

    def hire(place):
        command = [sys.executable, "-m", "tempo", "work", str(place), "--wait", "60"]
        begun.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL))
        return begun[-1]

    yield hire
    for process in begun:
        kill(process, 5.0)


# --- local processes


@pytest.mark.parametrize("number", [1, 3])
def test_each_unit_is_done_once(tmp_path, number):
    found = list(executor(number).run(setup(tmp_path), UNITS, always))
    assert answers(found) == DOUBLED
    numbers, processes = begun(tmp_path)
    assert sorted(numbers) == list(range(7))
    assert len(set(processes)) <= number


def test_a_unit_whose_worker_is_killed_is_done_again_by_another(tmp_path):
    killing = [unit | {"kills": unit["number"] in (0, 3, 6)} for unit in UNITS]
    found = list(executor(2).run(setup(tmp_path), killing, always))
    assert answers(found) == DOUBLED
    numbers, processes = begun(tmp_path)
    assert sorted(numbers) == [0, 0, 1, 2, 3, 3, 4, 5, 6, 6]
    for number in (0, 3, 6):
        first, again = [p for n, p in zip(numbers, processes, strict=True) if n == number]
        assert first != again


def test_a_unit_that_kills_every_worker_is_answered_by_saying_so(tmp_path):
    deadly = [unit | {"kills": 99 * (unit["number"] == 1)} for unit in UNITS[:3]]
    found = answers(executor(1).run(setup(tmp_path), deadly, always))
    assert found.pop(1).startswith("its worker was killed 3 times (process ")
    assert found == {0: 0, 2: 4}
    assert begun(tmp_path)[0].count(1) == 3


def test_an_error_of_the_work_crosses_once(tmp_path):
    wrong = [{"number": 0, "wrong": True}, {"number": 1}]
    found = dict(executor(1).run(setup(tmp_path), wrong, always))
    assert begun(tmp_path)[0] == [0, 1]
    error = raised(found[0])
    assert isinstance(error, SpecError)
    assert str(error) == "this one cannot be done"


def test_workers_that_cannot_begin_are_no_endless_loop(tmp_path):
    with pytest.raises(WorkerError, match="3 workers ended before .*: no room for the model"):
        list(executor(1).run(setup(tmp_path, stillborn=True), UNITS, always))


def test_a_worker_that_is_not_the_same_is_refused_by_name(tmp_path):
    needed = setup(tmp_path, made_by={"number of threads": "2"})
    with pytest.raises(WorkerError, match=r"number of threads is 1, .*session 2; .*THREADS=2"):
        list(executor(2).run(needed, UNITS, always))
    for threads in (1, 2):  # a local worker gets the session's number
        place = tmp_path / str(threads)
        place.mkdir()
        made = {"number of threads": str(threads)}
        needed = setup(place, made_by=made, threads=threads, threads_of_worker=True)
        assert answers(executor(1).run(needed, UNITS[:2], always)) == {0: 0, 1: 2}


def test_an_answer_of_a_worker_that_is_not_the_same_does_not_count(tmp_path):
    needed = setup(tmp_path)
    made = {"made_by": needed["made_by"], "given": 1}
    assert is_sound(needed, made)
    assert not is_sound(needed, made | {"made_by": {"number of threads": "2"}})
    assert not is_sound(needed, {"made_by": needed["made_by"]})
    assert not is_sound(needed, None)
    assert difference({"a": "1"}, {"a": "1"}) == ""
    assert "its b is 2, and that of the session none" in difference(
        {"a": "1"}, {"a": "1", "b": "2"}
    )


def test_what_is_not_wanted_any_more_is_left_out(tmp_path):
    wanted = [True] * 7
    found = {}
    for index, answer in executor(1).run(setup(tmp_path), UNITS, wanted.__getitem__):
        found[index] = answer["given"]
        wanted[4:] = [False] * 3
    assert found.keys() >= {0, 1, 2, 3}
    assert len(found) < 7


def test_nothing_is_left_running_when_the_rest_is_not_asked_for(tmp_path):
    run = executor(2).run(setup(tmp_path), [u | {"seconds": 0.2} for u in UNITS], always)
    next(run)
    run.close()
    assert not any(map(psutil.pid_exists, begun(tmp_path)[1]))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_running_when_the_driver_is_ended(tmp_path, how):
    with driver(tmp_path, 2, 60) as process:
        assert process.stdout.readline()
        process.send_signal(how)
    processes = set(begun(tmp_path)[1])
    assert processes
    wait_until(lambda: not any(map(psutil.pid_exists, processes)), 5)


@pytest.mark.parametrize("wrong", [0, -1, True, "", "no such folder", "ray:", "ray:x", 1.5])
def test_what_names_no_workers_is_refused(wrong):
    with pytest.raises(SpecError, match="expected a number of processes, an existing folder"):
        executor(wrong)


# --- a folder


def test_workers_take_units_of_two_drivers_in_one_folder(tmp_path, hired):
    shared = tmp_path / "shared"
    places = [tmp_path / "a", tmp_path / "b"]
    for place in (shared, *places):
        place.mkdir()
    hired(shared), hired(shared)
    runs = []
    for place in places:
        needed = setup(place, name=f"sweep-{place.name}", owner=place.name)
        runs.append(FolderWorkers(shared).run(needed, UNITS))
    found = [dict([next(run)]) for run in runs]  # both are under way
    for run, known in zip(runs, found, strict=True):
        known |= dict(run)
        assert answers(known.items()) == DOUBLED
    assert list(shared.iterdir()) == []
    assert [sorted(begun(place)[0]) for place in places] == [list(range(7))] * 2


def test_a_driver_that_is_killed_and_started_again_finds_what_was_answered(tmp_path, hired):
    shared = tmp_path
    units = [{"number": i, "seconds": 0.3} for i in range(6)]
    with driver(shared, shared, 6) as process:
        hired(shared)
        assert process.stdout.readline() == "0\n"
        process.kill()
    wait_until(lambda: len(begun(shared)[0]) == 6)  # workers go on meanwhile
    again = FolderWorkers(shared).run(setup(shared), units, lambda index: index > 0)
    assert answers(again) == {i: 2 * i for i in range(1, 6)}
    assert sorted(begun(shared)[0]) == list(range(6))  # none of them twice


def test_a_worker_with_another_number_of_threads_is_refused_and_the_others_go_on(tmp_path, hired):
    said = []
    needed = setup(tmp_path, threads_of_worker=True)
    workers = FolderWorkers(tmp_path, said.append)
    command = [sys.executable, "-m", "tempo", "work", str(tmp_path), "--wait", "60"]
    two = os.environ | {"OMP_NUM_THREADS": "2"}
    wrong = subprocess.Popen(command, cwd=ROOT, env=two, stdout=subprocess.DEVNULL)
    joined = []

    def join(sweep):
        if said and not joined:
            joined.append(start(sweep, "right", "stay", env=os.environ | {"OMP_NUM_THREADS": "1"}))

    try:
        run = workers.run(needed, UNITS, tick=join)
        assert answers(run) == DOUBLED
    finally:
        kill(wrong, 5.0)
        for process in joined:
            kill(process)
    assert len(said) == 1
    assert "number of threads is 2, and that of the session 1" in said[0]


def test_a_lost_unit_and_a_damaged_answer_are_noticed_and_made_again(tmp_path):
    """The negative control of everything above: what goes missing is missed."""
    sabotaged, workers = [], []

    def tick(sweep):
        units = sorted((sweep / "units").iterdir())
        if not sabotaged and len(units) == 7:
            units[2].unlink()
            (sweep / "answers" / units[4].name).write_text('{"given": 3}')
            sabotaged.append(sweep)
        elif sabotaged and not workers:
            workers.append(start(sweep, "worker", "stay"))

    try:
        found = FolderWorkers(tmp_path).run(setup(tmp_path), UNITS, tick=tick)
        assert answers(found) == DOUBLED
    finally:
        for process in workers:
            kill(process)
    assert sabotaged


def test_what_a_killed_session_left_is_removed_by_the_next_one_of_its_owner(tmp_path):
    for name, owner in (("old", "toy"), ("other", "somebody")):
        folder._write(tmp_path / name / "setup.json", setup(tmp_path, name=name, owner=owner))
    assert list(FolderWorkers(tmp_path).run(setup(tmp_path), [])) == []
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    with folder.files.locked(tmp_path / "other", "it lives"):
        somebody = setup(tmp_path, owner="somebody")
        assert list(FolderWorkers(tmp_path).run(somebody, [])) == []
        assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_the_toys_are_of_this_folder():
    assert Path(worker_toys.__file__).parent == ROOT / "tests"
