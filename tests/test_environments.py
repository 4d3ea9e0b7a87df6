"""A study wherever it is run: in read-only folders, beside other plugins, under foreign styles."""

import ctypes
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import tempo
from tempo.records import read_findings
from tests.studies import CONFIG, PROMPTS, STUDY

ROOT = Path(__file__).resolve().parent.parent
ARGUMENTS = ("--model", "tiny", "--suite", "prompts.txt", "-p", "no:cacheprovider")
# More than the study's own tests, so that an order can be another one.
OTHERS = "def test_other():\n    pass\n\n\ndef test_another():\n    pass\n"


def write_study(folder):
    folder.joinpath("entropy.yaml").write_text(CONFIG, encoding="utf-8")
    folder.joinpath("prompts.txt").write_text(PROMPTS, encoding="utf-8")
    folder.joinpath("test_entropy.py").write_text(STUDY, encoding="utf-8")
    folder.joinpath("test_other.py").write_text(OTHERS, encoding="utf-8")


@pytest.fixture
def study(pytester, monkeypatch):
    """Runs the study in this process, beside what a conftest.py does."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    write_study(pytester.path)

    def run(*arguments, conftest=""):
        pytester.path.joinpath("conftest.py").write_text(conftest, encoding="utf-8")
        return pytester.runpytest_inprocess(*ARGUMENTS, *arguments)

    run.path = pytester.path
    return run


def findings_in(folder):
    return read_findings(folder / "results/findings.jsonl").findings


# --- other plugins and settings of pytest


@pytest.mark.parametrize("family", ["xunit1", "xunit2", "legacy"])
def test_a_finding_is_in_the_junit_record_of_any_family(study, family):
    """Case 32: of another family than xunit1 there was a traceback."""
    result = study("-o", f"junit_family={family}", "--junitxml", "j.xml")
    assert result.ret == 0
    properties = {each.get("name") for each in ET.parse(study.path / "j.xml").iter("property")}
    assert {"verdict", "finding", "estimate"} <= properties


def test_without_pytest_html_all_works(study):
    assert study("-p", "no:html").ret == 0
    assert (study.path / "reports/findings.html").exists()


def test_without_pytest_html_its_option_is_unknown_and_no_traceback(study):
    result = study("-p", "no:html", "--html", "x.html")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "Traceback" not in result.stdout.str() + result.stderr.str()


def test_xdist_that_is_named_but_has_no_workers_changes_nothing(study):
    assert study("-p", "xdist", "-n", "0").ret == 0
    assert len(findings_in(study.path)) == 1


# What pytest-randomly does: tests and modules in another order, and seeds before each test.
SHUFFLED = """
import random

import numpy as np


def pytest_collection_modifyitems(items):
    items.reverse()


def pytest_runtest_setup(item):
    random.seed(7)
    np.random.seed(7)
"""


def test_another_order_of_tests_gives_the_same_findings(study):
    found = []
    for conftest in ("", SHUFFLED):
        assert study(conftest=conftest).ret == 0
        found += findings_in(study.path)
        shutil.rmtree(study.path / "results")
    first, second = (finding.record() for finding in found)
    assert first == second


# What pytest-rerunfailures does: a test that failed is run again.
AGAIN = """
import pytest
from _pytest.runner import runtestprotocol


def pytest_runtest_protocol(item, nextitem):
    hook = item.ihook
    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for again in (True, True, False):
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        if again and any(report.failed for report in reports):
            continue
        for report in reports:
            hook.pytest_runtest_logreport(report=report)
        break
    hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True
"""


VIOLATED = STUDY.replace(
    'more_than=0.05, because="a twentieth of a nat", planned=EFFECT', "always=True"
)
for kept in ("case.gap", "case.again"):
    VIOLATED = VIOLATED.replace(f"return {kept}", "return False")


def test_a_claim_that_is_run_again_is_told_once(study):
    """Under pytest-rerunfailures its properties stood there three times, and its notices."""
    (study.path / "test_entropy.py").write_text(VIOLATED, encoding="utf-8")
    result = study("--junitxml", "j.xml", conftest=AGAIN)
    assert result.ret == 1
    result.assert_outcomes(passed=3, failed=1)
    out = result.stdout.str()
    assert out.count("seen for the first time") == 1 and "more)" not in out
    names = [each.get("name") for each in ET.parse(study.path / "j.xml").iter("property")]
    assert names.count("finding") == 1 and len(names) == len(set(names))


# What pytest-timeout does with its signal: a test may take so long, and what is measured before
# the tests is none.
TIMED = """
import signal

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    signal.setitimer(signal.ITIMER_REAL, 20.0)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the signal is one of POSIX systems")
def test_a_limit_to_each_test_is_none_to_what_is_measured_before(study):
    assert study(conftest=TIMED).ret == 0


# --- folders that cannot be written


def no_override():
    """In a process that root starts: rights of files count for it, as they do for everybody."""
    drop_from_bounding_set, override, search = 24, 1, 2
    if sys.platform == "linux":
        for right in (override, search):
            ctypes.CDLL(None).prctl(drop_from_bounding_set, right, 0, 0, 0)


def as_a_user(arguments, folder, **environment):
    """(exit code, output) of Python in a process for which rights of files count."""
    known = {k: v for k, v in os.environ.items() if k not in ("CI", "GITHUB_STEP_SUMMARY")}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=folder,
        env=known | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | environment,
        capture_output=True,
        text=True,
        preexec_fn=no_override,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def read_only(tmp_path):
    """A checkout of the study in which nothing can be written."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    write_study(folder)
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)


posix = pytest.mark.skipif(os.name != "posix", reason="rights as POSIX systems have them")


@posix
def test_a_read_only_checkout_is_told_before_the_run(read_only):
    """Case 32: a traceback at the end."""
    code, output = as_a_user(["pytest", *ARGUMENTS], read_only)
    assert code == pytest.ExitCode.USAGE_ERROR
    said = "cannot write to the folder results: Permission denied; choose another with --results"
    assert output.count(said) == 1
    assert "Traceback" not in output and "measuring" not in output


@posix
def test_from_a_read_only_checkout_it_runs_into_other_folders(read_only, tmp_path):
    more = ("--results", tmp_path / "r", "--findings", tmp_path / "f.html")
    code, output = as_a_user(["pytest", *ARGUMENTS, *more], read_only)
    assert code == 0, output
    assert (tmp_path / "f.html").exists()
    assert sorted(path.name for path in read_only.iterdir()) == [
        "entropy.yaml",
        "prompts.txt",
        "test_entropy.py",
        "test_other.py",
    ]


@posix
def test_without_a_home_that_can_be_written_it_runs(tmp_path):
    """Case 32: caches of matplotlib and of models stand in the home folder."""
    home, folder = tmp_path / "home", tmp_path / "study"
    home.mkdir(mode=0o555)
    folder.mkdir()
    write_study(folder)
    nowhere = dict.fromkeys(("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR", "HF_HOME"), "")
    code, output = as_a_user(["pytest", *ARGUMENTS], folder, HOME=str(home), **nowhere)
    assert code == 0, output
    assert (folder / "reports/findings.html").exists()
    assert list(home.iterdir()) == []


@posix
def test_a_model_that_needs_a_cache_where_none_can_be_made_says_so_in_one_line(tmp_path):
    home = tmp_path / "home"
    home.mkdir(mode=0o555)
    arguments = ["tempo", "generate", "hi", "--max-steps", "1"]
    code, output = as_a_user(arguments, tmp_path, HOME=str(home), XDG_CACHE_HOME="", TEMPO_CACHE="")
    assert code == 1
    assert "Traceback" not in output
    last = output.splitlines()[-1]
    assert last.startswith("Error: ") and "set TEMPO_CACHE to a folder" in last


@posix
def test_save_into_the_current_folder_is_checked_before_the_run(tmp_path):
    """Case 32: `--save .` was a traceback after the run."""
    line = ["tempo", "generate", "hi", "--model", "tiny", "--max-steps", "1", "--save", "."]
    empty, full = tmp_path / "empty", tmp_path / "full"
    for folder in (empty, full):
        folder.mkdir()
    (full / "mine.txt").write_text("mine", encoding="utf-8")
    assert as_a_user(line, empty)[0] == 0
    assert tempo.load_trace(empty).spec.prompt == "hi"
    code, output = as_a_user(line, full)
    assert (code, len(output.splitlines())) == (1, 1)
    assert "exists and is not a saved trace; choose another folder" in output
    for path in empty.iterdir():
        path.unlink()
    empty.chmod(0o555)
    code, output = as_a_user(line, empty)
    empty.chmod(0o755)
    assert (code, len(output.splitlines())) == (1, 1)
    assert "Permission denied; choose another with --save" in output


# --- a foreign style

DRAWN = """
import hashlib

import matplotlib

from tempo.reporting.figures import bars

made = bars({"a_b": [1.0, 2.0]}, ["x", "$y$"], "x", "y", "Title", "Caption")
print(matplotlib.rcParams["text.usetex"], hashlib.sha256(made.svg.encode()).hexdigest(), end=" ")
print(hashlib.sha256(made.png).hexdigest())
"""
FOREIGN = """
text.usetex: True
font.family: serif
figure.facecolor: black
axes.facecolor: black
text.color: white
lines.linewidth: 9
savefig.dpi: 30
savefig.bbox: tight
svg.fonttype: path
axes.prop_cycle: cycler('color', ['w'])
"""


def test_pictures_are_the_same_to_the_byte_under_a_foreign_matplotlibrc(tmp_path):
    """Case 32; also astropy #7715: `text.usetex` breaks figures where there is no LaTeX."""
    (tmp_path / "draw.py").write_text(DRAWN, encoding="utf-8")
    (tmp_path / "matplotlibrc").write_text(FOREIGN, encoding="utf-8")
    made = []
    for style in ({}, {"MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}):
        done = subprocess.run(
            [sys.executable, tmp_path / "draw.py"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | style,
            capture_output=True,
            text=True,
            check=True,
        )
        made.append(done.stdout.split())
    plain, styled = made
    assert (plain[0], styled[0]) == ("False", "True")  # it was there
    assert plain[1:] == styled[1:]
