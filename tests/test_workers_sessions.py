"""Sessions with workers: cases, findings and raw results are those of one process, to the bit."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tempo.harness import elsewhere
from tempo.harness.execute import is_installed
from tempo.records import read_jsonl
from tempo.workers import local
from tempo.workers.folder import kill
from tests.worker_study import FIRST, LAST, MIDDLE, PROMPTS, write

ROOT = Path(__file__).resolve().parent.parent
COMMAND = ["-q", "-p", "no:cacheprovider", "--model", "tiny", "--suite", "prompts.txt"]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(os.name != "posix", reason="kills processes by signals"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the study, and the results of a session without workers."""
    folder = tmp_path_factory.mktemp("study")
    write(folder)
    done = session(folder, "alone")
    assert done.returncode == 0, done.stdout
    return folder


def process(folder, name, *more, **settings):
    results = ["--results", f"results-{name}", "--findings", f"report-{name}/findings.html"]
    command = [sys.executable, "-m", "pytest", *COMMAND, *results, *more, "test_entropy.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | settings
    return subprocess.Popen(list(map(str, command)), cwd=folder, env=environment, **settings)


def session(folder, name, *more):
    """A session in a process of its own, as pytest ended."""
    with process(folder, name, *more) as running:
        said, _ = running.communicate(timeout=240)
    return subprocess.CompletedProcess(running.args, running.returncode, said, "")


def records(folder, name):
    """All that a session left: cases by their key, findings, and the hashes of raw results."""
    results = folder / f"results-{name}"
    cases = read_jsonl(results / "entropy" / "cases.jsonl").records
    raw = [path for path in results.glob("entropy/[!.]*") if path.suffix in (".npz", ".json")]
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in raw}
    assert {"source.npz", "sets.json"} <= hashes.keys()
    assert len(cases) == len(PROMPTS) + 1
    return (
        {case["key"]: case for case in cases},
        (results / "findings.jsonl").read_bytes(),
        {name: digest for name, digest in hashes.items() if name != "report.json"},
    )


def hire(folder, number):
    command = [sys.executable, "-m", "tempo", "work", str(folder), "--wait", "200"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": ROOT}
    return [subprocess.Popen(command, env=environment, **quiet) for _ in range(number)]


@pytest.mark.parametrize(("number", "killed"), [(1, ()), (2, (FIRST, MIDDLE, LAST)), (4, ())])
def test_any_number_of_workers_gives_what_one_process_gives(folder, number, killed):
    """Killed at the first, a middle and the last window, each of which is measured again whole."""
    for prompt in killed:
        (folder / "kill" / prompt.replace(" ", "-")).touch()
    done = session(folder, number, "--workers", number)
    assert done.returncode == 0, done.stdout
    assert "measured 41 prompt cases" in done.stdout
    assert ", with 123 runs" in done.stdout
    assert list((folder / "kill").iterdir()) == []
    assert records(folder, number) == records(folder, "alone")


def test_a_folder_gives_the_same_though_driver_and_worker_are_killed(folder):
    shared = folder / "shared"
    shared.mkdir()
    (folder / "kill" / MIDDLE.replace(" ", "-")).touch()
    options = ("--workers", shared)
    workers = hire(shared, 1)
    try:
        with process(folder, "folder", *options, stdout=subprocess.DEVNULL) as running:
            cases = folder / "results-folder" / "entropy" / "cases.jsonl"
            end = time.monotonic() + 200
            while not cases.exists():
                assert time.monotonic() < end, "nothing was measured"
                time.sleep(0.01)
            running.kill()
        other = process(folder, "other", *options)  # two drivers in one folder
        done = session(folder, "folder", *options)
        with other:
            said, _ = other.communicate(timeout=240)
    finally:
        for worker in workers:
            kill(worker, 5.0)
    assert (done.returncode, other.returncode) == (0, 0), done.stdout + said
    assert list((folder / "kill").iterdir()) == []
    assert records(folder, "folder") == records(folder, "alone")
    assert records(folder, "other") == records(folder, "alone")
    assert list(shared.iterdir()) == []


def test_other_weights_are_refused_by_name(tiny, folder, monkeypatch):
    """The negative control of equal bits: a worker that would give other ones gives none."""
    made = elsewhere.made_by
    name = "weights or settings of the model"
    monkeypatch.setattr(elsewhere, "made_by", lambda *args: made(*args) | {name: "others"})
    setup = elsewhere.setup_of(tiny, [], folder, False, 1)
    with pytest.raises(local.WorkerError, match=f"its {name} is [0-9a-f]+, .* others"):
        list(local.LocalWorkers(1).run(setup, [[]], lambda index: True))


def test_a_window_that_is_lost_or_not_whole_is_noticed(tiny):
    class Losing:
        number = 1

        def __init__(self, answers):
            self.answers = answers

        def run(self, setup, units, is_wanted):
            yield from self.answers

    class Task:
        class prompt:
            store, text, category = None, "a", "b"

        class plan:
            name = "plan"

    windows = [[Task(), Task()], [Task()]]

    def measured(*answers):
        return list(
            elsewhere.measure_elsewhere(
                Losing(answers), {}, windows, lambda task: True, lambda task, number: None
            )
        )

    case = {"runs": 1, "sets": {}, "case": None}
    whole = {"worker": "w", "given": [case | {"task": 1}, case | {"task": 0}]}
    assert len(measured((0, whole), (1, {"failed": "killed"}))) == 3
    with pytest.raises(local.WorkerError, match="1 of 2 windows were never answered"):
        measured((0, whole))
    with pytest.raises(local.WorkerError, match=r"w gave cases \[0\] of a window with 2"):
        measured((0, whole | {"given": [case | {"task": 0}]}))


def test_a_failure_is_told_once_and_takes_no_other_case_along(folder):
    failing = (folder / "test_entropy.py").read_text()
    line = f'    if prompt.text == "{FIRST}":\n        raise ValueError("no")\n'
    own = folder / "failing"
    own.mkdir()
    write(own)
    (own / "test_entropy.py").write_text(
        failing.replace(
            "    source = yield run(prompt)\n", f"{line}    source = yield run(prompt)\n"
        )
    )
    done = session(own, "failing", "--workers", 1)
    assert done.returncode == 1
    assert f"on '{FIRST}', ValueError: no (test_entropy.py, line" in done.stdout
    cases = read_jsonl(own / "results-failing" / "entropy" / "cases.jsonl").records
    assert FIRST not in {case["prompt"] for case in cases}
    assert len(cases) >= 15


def test_what_names_no_workers_is_refused_before_a_model_is_loaded(folder):
    done = session(folder, "wrong", "--workers", "nowhere", "--model", "none")
    assert done.returncode == 4
    assert "workers is 'nowhere'; expected a number of processes, an existing" in done.stdout


def test_the_set_up_is_json_and_names_no_code(tiny, folder):
    setup = elsewhere.setup_of(tiny, [], folder, False, None)
    assert json.loads(json.dumps(setup)) == setup


def test_packages_are_installed_wherever_they_lie():
    """Else the code of a study would depend on what a process happens to have imported."""
    assert is_installed(Path("/elsewhere/lib/python3.11/site-packages/numpy/__init__.py"))
    assert is_installed(Path(os.__file__).resolve())
    assert not is_installed(ROOT / "tests" / "studies.py")
