"""Look on at a measurement: which runs it is given, and which sets they chose.

It takes no part in it. What a case depends on is in other modules, so that no case is measured
again when this one changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from tempo.harness.execute import Task, execute
from tempo.models import LanguageModel
from tempo.trace import Trace

Saw = Callable[[list[Trace]], None]
Sets = dict[str, list[list[str]]]  # of each visibility, the members' texts of each set
Ran = Callable[[Task, int], None]  # told of each number of runs that a task was given
Measured = Iterator[tuple[Task, Any, Sets]]  # of each task: case or Failure, and its sets


def measure(
    lm: LanguageModel,
    windows: Sequence[Sequence[Task]],
    is_wanted: Callable[[Task], bool],
    ran: Ran,
    budget: int | None = None,
    models: dict[str | None, LanguageModel] | None = None,
) -> Measured:
    """What `execute` gives, and of each task the sets of its free runs.

    ran: called with a task and the number of runs, each time that it is given some.
    """
    sets: dict[int, Sets] = {}  # by the watched task's measurement, which each has of its own

    def watching(task: Task) -> Task:
        mine: Sets = {}

        def saw(traces: list[Trace]) -> None:
            for trace in traces:
                _keep_sets(mine, task, trace)
            ran(task, len(traces))

        seen = watched(task, saw)
        sets[id(seen)] = mine
        return seen

    # a list, since what is watched must not go while its number stands for it
    seen = [list(map(watching, window)) for window in windows]
    for task, outcome in execute(lm, seen, is_wanted, budget, models):
        yield task, outcome, sets[id(task)]


def _keep_sets(known: Sets, task: Task, trace: Trace) -> None:
    """Keep the sets of a task's first free run on its own prompt, of each visibility."""
    spec = trace.spec
    own = spec.prompt == task.prompt.given
    if own and spec.replay is None and spec.positions == "shared":
        known.setdefault(spec.visibility, [list(step.texts) for step in trace.steps])


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
