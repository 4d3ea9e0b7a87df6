"""Every fault against every check: no fault passes all checks, and no check passes all faults.

The resulting table is committed. `TEMPO_WRITE_TABLES=1 pytest tests/test_negative_controls.py`
writes it again.
"""

import difflib
import os
from pathlib import Path

import pytest

import tempo
from tests.checks import Violation
from tests.exactness import CHECKS, FIXED_CASES
from tests.faults import FAULTS
from tests.tiny_models import llama

pytestmark = pytest.mark.usefixtures("one_thread")

TABLE = Path(__file__).parents[1] / "reports" / "published" / "faults.md"
WRITE = "TEMPO_WRITE_TABLES"
# VIOLATED: the check fails. REFUSED: tempo itself raises an error. PASSED: the check holds.
VIOLATED, REFUSED, PASSED = "x", "e", ""


def outcome(check, plant=None):
    """How the check comes out over the fixed cases: VIOLATED, REFUSED or PASSED.

    Any other exception is an error of this test.
    """
    for case in FIXED_CASES:
        with pytest.MonkeyPatch.context() as patch:
            if plant is not None:
                plant(patch)
            try:
                check.holds(check.model() if check.model else llama(), case)
            except Violation:
                return VIOLATED
            except tempo.TempoError:
                return REFUSED
    return PASSED


@pytest.fixture(scope="module")
def matrix():
    """{fault: {check: outcome}}."""
    found = {}
    for fault, plant in FAULTS.items():
        found[fault] = {name: outcome(check, plant) for name, check in CHECKS.items()}
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_the_fault_is_caught(fault, matrix):
    assert any(matrix[fault].values())


@pytest.mark.parametrize("name", CHECKS)
def test_the_check_can_fail(name, matrix):
    assert any(row[name] for row in matrix.values())


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.usefixtures("matrix")
def test_the_check_passes_once_all_faults_are_gone(name):
    assert outcome(CHECKS[name]) == PASSED


def table(matrix):
    """A Markdown page: faults by row, checks by number, and a sentence on each of them."""
    numbers = range(1, len(CHECKS) + 1)
    size = f"{len(FAULTS)} faults, {len(CHECKS)} checks, {len(FIXED_CASES)} cases each"
    lines = [
        "# Faults planted in the engine, and the checks that catch them",
        "",
        f"Made by `tests/test_negative_controls.py`: {size}. "
        f"{VIOLATED}: the check fails. {REFUSED}: tempo itself refuses to go on. "
        "Empty: the fault does not reach what is checked.",
        "",
        "| fault | caught by | " + " | ".join(map(str, numbers)) + " |",
        "|---|--:|" + ":-:|" * len(CHECKS),
    ]
    for fault, row in matrix.items():
        caught = sum(map(bool, row.values()))
        lines.append(f"| {fault} | {caught} | " + " | ".join(row[name] for name in CHECKS) + " |")
    lines += ["", "## Faults", ""]
    lines += [f"- **{fault}**: {first_line(plant)}" for fault, plant in FAULTS.items()]
    lines += ["", "## Checks", ""]
    for number, (name, check) in zip(numbers, CHECKS.items(), strict=True):
        triggered = sum(bool(row[name]) for row in matrix.values())
        lines.append(f"{number}. **{name}** (fails for {triggered}): {first_line(check.holds)}")
    return "\n".join(lines) + "\n"


def first_line(function):
    """The first line of its docstring."""
    return function.__doc__.partition("\n")[0]


def test_the_committed_table_is_what_was_found(matrix):
    found = table(matrix)
    if os.environ.get(WRITE):
        TABLE.write_text(found, encoding="utf-8")
    committed = TABLE.read_text(encoding="utf-8") if TABLE.is_file() else ""
    changes = "\n".join(
        difflib.unified_diff(
            committed.splitlines(), found.splitlines(), "committed", "found", lineterm="", n=0
        )
    )
    command = f"{WRITE}=1 pytest tests/{Path(__file__).name}"
    assert committed == found, (
        f"{TABLE.name} is out of date; run `{command}` and commit it:\n{changes}"
    )
