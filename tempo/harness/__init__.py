"""Studies as pytest tests: what to import to write one.

A study is measured once for all of its claims, and each claim is a test function. `tempo new NAME`
writes a study to begin with; `docs/tutorial.md` walks through it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tempo.harness.config import Space, StudyConfig
    from tempo.harness.plan import Plan
    from tempo.harness.runs import Prompt, RunRequest, run, wide_steps
    from tempo.harness.store import Store
    from tempo.harness.study import ClaimTest, Family, Margin, Planned, Steps, Study, average
    from tempo.harness.texts import ReadRequest, read

# Loaded when first asked for: pytest imports this package in every run, and most have no study.
_HOMES = {
    "Space": "config",
    "StudyConfig": "config",
    "Plan": "plan",
    "Prompt": "runs",
    "RunRequest": "runs",
    "run": "runs",
    "wide_steps": "runs",
    "Store": "store",
    "ClaimTest": "study",
    "Family": "study",
    "Margin": "study",
    "Planned": "study",
    "Steps": "study",
    "Study": "study",
    "average": "study",
    "ReadRequest": "texts",
    "read": "texts",
}

__all__ = [
    "ClaimTest",
    "Family",
    "Margin",
    "Plan",
    "Planned",
    "Prompt",
    "ReadRequest",
    "RunRequest",
    "Space",
    "Steps",
    "Store",
    "Study",
    "StudyConfig",
    "average",
    "read",
    "run",
    "wide_steps",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"tempo.harness.{_HOMES[name]}"), name)
