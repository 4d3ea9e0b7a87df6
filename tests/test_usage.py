"""Wrong usage is exit code 2 of `tempo` and 4 of pytest, in one line; streams that are gone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tempo.cli import app
from tempo.harness.starter import new
from tests.cli_inputs import wrong_lines, wrong_options

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
FULL = Path("/dev/full")  # a device that takes nothing


def test_every_wrong_command_line_is_exit_code_2_and_one_message(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = wrong_lines(tmp_path)
    assert len(lines) > 80
    for line in lines:
        result = CliRunner().invoke(app, list(line))
        assert result.exit_code == 2, line
        assert isinstance(result.exception, SystemExit), line
        assert result.stderr.startswith("Error: "), line
        assert result.stdout == "", line


def test_what_is_right_is_not_exit_code_2(tmp_path):
    line = ["generate", "hi", "--model", "tiny", "--max-steps", "1"]
    assert CliRunner().invoke(app, line).exit_code == 0
    failing = CliRunner().invoke(app, [*line, "--save", "/proc/none"])
    assert failing.exit_code == 1


@pytest.mark.parametrize("options", wrong_options(Path(".")), ids=" ".join)
def test_a_wrong_option_of_pytest_is_exit_code_4_and_no_traceback(pytester, options):
    new("mine", pytester.path)
    wrong_lines(pytester.path)  # writes the files that the options name
    model = () if "--model" in options else ("--model", "tiny")
    done = pytester.runpytest_inprocess("-p", "no:cacheprovider", *model, *options, "test_mine.py")
    said = done.stdout.str() + done.stderr.str()
    assert done.ret == pytest.ExitCode.USAGE_ERROR, said
    assert "Traceback" not in said
    assert "INTERNALERROR" not in said


def tempo_process(*arguments, **streams):
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "tempo", *arguments]
    return subprocess.Popen(command, env=ENVIRONMENT, text=True, **streams)


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [("models",), ("models", "--json"), ("--version",)])
def test_a_full_disk_is_one_line_and_exit_code_1(arguments):
    with FULL.open("w") as full:
        process = tempo_process(*arguments, stdout=full, stderr=subprocess.PIPE)
        _, said = process.communicate(timeout=120)
    assert said == "Error: cannot write to standard output: No space left on device\n"
    assert process.returncode == 1


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_an_error_that_nobody_can_be_told_keeps_its_exit_code():
    with FULL.open("w") as full:
        process = tempo_process("generat", stdout=full, stderr=full)
        assert process.wait(timeout=120) == 2


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-", "| true"])
def test_closed_streams_end_quietly(redirection):
    line = f"{sys.executable} -m tempo models {redirection}"
    done = subprocess.run(
        ["sh", "-c", line], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.stderr == ""
    assert done.returncode == 0


def test_an_interrupt_from_the_keyboard_is_exit_code_130_without_a_traceback(tmp_path):
    process = tempo_process(
        *("generate", "hi", "--model", "tiny", "--max-steps", "400", "--threshold", "0.001"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    time.sleep(6)  # by then it imports torch or generates
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert out == ""
