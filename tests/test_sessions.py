"""Sessions beside and after one another: a finished report stays, and nobody measures twice."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tempo.harness.watch
from benchmarks import writing
from benchmarks.injector import KILLED, Plan, forked, operations
from tempo import files
from tempo.records import read_jsonl

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="runs sessions in processes that it forks"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.set_num_threads(1)
    return writing.Sessions(tmp_path_factory.mktemp("sessions") / "made")


@pytest.fixture
def finished(made, tmp_path):
    """A folder with the results and the page of a finished session."""
    writing.shutil.copytree(made.before, tmp_path / "root")
    return tmp_path / "root"


def run(made, root, *more, first=lambda: None):
    """How a session ended; first: what is done in its process before it begins."""

    def act():
        first()
        return writing.session(made.study, root, *map(str, more))

    return forked(act, root.parent / "nowhere", Plan(), root.parent / "log.txt")


def everything(root):
    return {name: (root / name).read_bytes() for name in writing.names_in(root)}


# --- a finished report stays


def interrupted_while_measuring():
    def execute(*args):
        raise KeyboardInterrupt

    tempo.harness.watch.execute = execute


def interrupted_between_tests():
    from tempo.harness.items import ClaimItem

    def runtest(self):
        raise KeyboardInterrupt

    ClaimItem.runtest = runtest


WRONG = {
    "a typo in --model": (["--model", "smolm2-135m"], None, 4, "did you mean 'smollm2-135m'"),
    "nothing selected": (["-k", "nosuchtest"], None, 5, "1 deselected"),
    "--html": (["--html", "FILE/x.html"], None, 4, "cannot write to the folder FILE"),
    "--junitxml": (["--junitxml", "FILE/x.xml"], None, 4, "choose another with --junitxml"),
    "--summary": (["--summary", "FILE/x.md"], None, 4, "choose another with --summary"),
    "--findings": (["--findings", "FILE/x.html"], None, 4, "choose another with --findings"),
    "Ctrl-C": ([], interrupted_while_measuring, 2, "KeyboardInterrupt"),
    "Ctrl-C, late": ([], interrupted_between_tests, 2, "findings.html was left as it is"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_finished_page_stays_until_the_new_one_is_whole(made, finished, wrong):
    """Case 7: a typo or Ctrl-C made an empty page of it, an unwritable file a traceback."""
    more, first, code, said = WRONG[wrong]
    in_the_way = finished.parent / "file"
    in_the_way.write_text("in the way")
    page = (finished / "reports/findings.html").read_bytes()
    more = [text.replace("FILE", str(in_the_way)) for text in more]
    ended = run(made, finished, *more, first=first or (lambda: None))
    assert ended.code == code, ended.output
    assert said.replace("FILE", str(in_the_way)) in ended.output
    assert "Traceback" not in ended.output
    assert "INTERNALERROR" not in ended.output
    assert (finished / "reports/findings.html").read_bytes() == page
    assert run(made, finished).code == 0  # and what was measured is no trouble to the next one
    assert (finished / "reports/findings.html").read_bytes() != page


def test_what_another_plugin_raises_at_the_end_takes_no_report_along(made, finished):
    class Failing:
        def pytest_sessionfinish(self):
            raise OSError(28, "No space left on device")

    def first():
        real = writing.pytest.main
        writing.pytest.main = lambda command: real(command, plugins=[Failing()])

    page = (finished / "reports/findings.html").read_bytes()
    ended = run(made, finished, first=first)
    assert "No space left" in ended.output
    assert (finished / "reports/findings.html").read_bytes() != page


def test_a_summary_file_of_the_job_that_cannot_be_written_is_said_before(made, finished):
    before = everything(finished)

    def first():
        real = writing.pytest.main

        def in_a_job(command):
            os.environ["GITHUB_STEP_SUMMARY"] = str(finished)
            return real(command)

        writing.pytest.main = in_a_job

    ended = run(made, finished, first=first)
    assert ended.code == 4
    assert "which the variable GITHUB_STEP_SUMMARY names: Is a directory" in ended.output
    assert everything(finished) == before


# --- two at once


def test_a_second_session_in_one_folder_is_refused_and_told_whose_it_is(made, finished):
    """Case 13: two sessions measured and wrote everything twice."""
    before = everything(finished)
    with files.locked(finished / "results", "-"):
        ended = run(made, finished)
    assert ended.code == 4
    lines = [line for line in ended.output.splitlines() if "is in use by process" in line]
    assert len(lines) == 1
    assert f"process {os.getpid()} on " in lines[0]
    assert "wait for it, or choose another with --results" in lines[0]
    assert everything(finished) == before


def test_the_folder_is_free_again_after_a_session_however_it_ended(made, finished):
    for first in (interrupted_while_measuring, interrupted_between_tests, lambda: None):
        run(made, finished, first=first)
        assert not list(finished.rglob(files.LOCK))
    assert run(made, finished).code == 0


def under_xdist(made, root, *more):
    """(exit code, output) of pytest with pytest-xdist, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--model", "tiny"]
    command += ["--suite", "prompts.txt", "--results", root / "results", *more]
    done = subprocess.run(
        [*map(str, command), "--findings", str(root / "findings.html")],
        cwd=made.study,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "CI"} | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_under_xdist_studies_are_refused_in_one_line_and_other_tests_run(made, tmp_path):
    """Case 13: `-n 2` measured everything twice, wrote no report, and exited 0."""
    (made.study / "test_other.py").write_text("def test_other():\n    pass\n")
    try:
        code, output = under_xdist(made, tmp_path, "-n", 2)
    finally:
        (made.study / "test_other.py").unlink()
    assert code == 4
    assert output.count("tempo measures once for all tests of a session") == 1
    assert "leave out -n, or say -n 0, to run the studies (sober)" in output
    assert "1 passed" in output
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == []


def test_with_xdist_there_but_not_asked_for_all_works(made, tmp_path):
    code, output = under_xdist(made, tmp_path, "-n", 0)
    assert code == 0, output
    assert (tmp_path / "findings.html").exists()


# --- a resumed session


def killed_in_its_window(made, root):
    """A session that was killed when a part of its only window was on disk."""
    log = root.parent / "log.txt"

    def act():
        return writing.session(made.study, root)

    writing.shutil.copytree(made.before, root)
    seen = operations(act, root, log)
    at = [i for i, pair in enumerate(seen) if pair == ("write", "cases.jsonl")][1]
    writing.shutil.rmtree(root)
    writing.shutil.copytree(made.before, root)
    assert forked(act, root, Plan(at), log).code == KILLED
    assert 2 < len(writing.cases(root)) < 6


def test_a_resumed_session_equals_an_uninterrupted_one_to_the_bit(made, tmp_path):
    killed_in_its_window(made, tmp_path / "root")
    assert run(made, tmp_path / "root").code == 0
    assert writing.cases(tmp_path / "root") == writing.cases(made.after)
    # the case that was there is measured with the others again, and kept once
    records = read_jsonl(tmp_path / "root/results/sober/cases.jsonl").records
    numbers = [record["case"] for record in records if record["prompt"] == "Der Hund"]
    assert len(numbers) == 1


def test_the_window_is_what_makes_it_equal(made, tmp_path):
    """Measured without the one that was there already, the others differ in their last bits."""

    def first():
        tempo.harness.evidence._measured_together = lambda keys, stored, on_disk: {
            key for key in keys if key not in on_disk
        }

    killed_in_its_window(made, tmp_path / "root")
    assert run(made, tmp_path / "root", first=first).code == 0
    assert writing.cases(tmp_path / "root") != writing.cases(made.after)


def test_what_an_earlier_session_measured_is_not_measured_again(made, finished):
    ended = run(made, finished)
    said = re.search(r"(\d+) of 6 prompt cases are on disk already", ended.output)
    assert said is not None
    assert int(said[1]) == len(writing.cases(made.before))
