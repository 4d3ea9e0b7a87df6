"""Look on at a measurement: which runs it is given. It takes no part in it.

What a case depends on is in other modules, so that no case is measured again when this one changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from tempo.harness.execute import Task
from tempo.trace import Trace

Saw = Callable[[list[Trace]], None]


def watched(task: Task, saw: Saw) -> Task:
    """The same task, whose measurement tells `saw` which traces it is given, each time it is."""
    measurement = task.plan.study.measurement
    if measurement is None:
        return task
    study = copy.copy(task.plan.study)
    study.measurement = lambda prompt: _Watched(measurement(prompt), saw)  # type: ignore[assignment]
    return replace(task, plan=replace(task.plan, study=study))


class _Watched:
    """A measurement under way, as whoever advances it sees it."""

    def __init__(self, steps: Any, saw: Saw) -> None:
        self.steps, self.saw = steps, saw

    def __next__(self) -> Any:
        return next(self.steps)

    def send(self, given: Any) -> Any:
        if not isinstance(given, Tensor):  # the logits of texts
            self.saw([given] if isinstance(given, Trace) else list(given))
        return self.steps.send(given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.steps, name)  # where in the source it stands
