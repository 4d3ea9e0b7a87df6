"""Two workers on a Ray of this machine; `make ray` installs it in an environment of its own."""

import psutil
import pytest
import ray

import tempo
from tempo.errors import SpecError, WorkerError
from tempo.workers import executor
from tempo.workers.work import raised
from tests.test_workers import DOUBLED, UNITS, always, answers, wait_until
from tests.test_workers_sessions import folder, records, session  # noqa: F401 -- a fixture
from tests.test_workers_stream import but_for_time, specs
from tests.worker_study import FIRST, LAST, MIDDLE
from tests.worker_toys import begun, setup

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cluster():
    """A Ray that is running already, as on a cluster: tempo joins it and leaves it running."""
    executor("ray:1")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_a_session_gives_what_one_process_gives_though_workers_are_killed(folder):  # noqa: F811
    for prompt in (FIRST, MIDDLE, LAST):
        (folder / "kill" / prompt.replace(" ", "-")).touch()
    done = session(folder, "ray", "--workers", "ray:2")
    assert done.returncode == 0, done.stdout
    assert list((folder / "kill").iterdir()) == []
    assert records(folder, "ray") == records(folder, "alone")


def test_a_stream_gives_what_one_process_gives(cluster, tiny):
    alone = dict(tempo.stream(tiny, specs()))
    for index, trace in tempo.stream(tiny, specs(), workers="ray:1"):
        assert but_for_time(trace, alone.pop(index)) == []
    assert alone == {}


def test_a_unit_whose_worker_is_killed_is_done_again_and_an_error_crosses_once(cluster, tmp_path):
    units = [unit | {"kills": int(unit["number"] == 3)} for unit in UNITS]
    units[2] |= {"wrong": True}
    units[5] |= {"kills": 99}
    found = dict(executor("ray:2").run(setup(tmp_path), units, always))
    error = raised(found.pop(2))
    assert isinstance(error, SpecError)
    assert found.pop(5)["failed"].startswith("its worker was killed 3 times")
    assert answers(found.items()) == {n: DOUBLED[n] for n in DOUBLED if n not in (2, 5)}
    assert sorted(begun(tmp_path)[0]) == [0, 1, 2, 3, 3, 4, 5, 5, 5, 6]


def test_a_worker_that_is_not_the_same_is_refused_by_name(cluster, tmp_path):
    needed = setup(tmp_path, made_by={"number of threads": "2"})
    with pytest.raises(WorkerError, match="its number of threads is 1, and that of the session 2"):
        list(executor("ray:2").run(needed, UNITS, always))
    with pytest.raises(WorkerError, match="3 workers ended before they had loaded their model"):
        list(executor("ray:1").run(setup(tmp_path, stillborn=True), UNITS, always))


def test_nothing_is_left_running_when_the_rest_is_not_asked_for(cluster, tmp_path):
    run = executor("ray:2").run(setup(tmp_path), [u | {"seconds": 0.2} for u in UNITS], always)
    next(run)
    run.close()
    assert ray.is_initialized()
    wait_until(lambda: not any(map(psutil.pid_exists, begun(tmp_path)[1])))
