"""A worker's part of a session: it measures windows of prompts, and hands over plain numbers.

A study does not travel, only where it stands: its module, and the content of its config.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from tempo.errors import WorkerError
from tempo.harness.config import StudyConfig
from tempo.harness.execute import Failure, Task, code_fingerprint
from tempo.harness.plan import Plan
from tempo.harness.runs import Prompt
from tempo.harness.store import Store
from tempo.harness.study import Study
from tempo.harness.watch import measure
from tempo.identity import maker_sha256
from tempo.records import plain
from tempo.workers import Setup
from tempo.workers.work import load, packed, parts_of


class Windows:
    """The work of a session's workers: each unit is a window, and is measured as a whole."""

    def __init__(self, setup: Setup) -> None:
        self.lm, self.chat, self.budget = load(setup), setup["chat"], setup["budget"]
        self.plans = {record["name"]: plan_of(record) for record in setup["plans"]}
        self.made_by = made_by(self.lm, list(self.plans.values()))
        self.models: dict[Any, Any] = {}  # copies in other dtypes

    def do(self, unit: Any) -> Any:
        """What each task of a window gives, in the order in which they end."""
        tasks = [self._task(*of_task) for of_task in unit]
        runs: Counter[int] = Counter()

        def ran(task: Task, number: int) -> None:
            runs[_place(tasks, task)] += number

        everything = measure(self.lm, [tasks], lambda task: True, ran, self.budget, self.models)
        given = []
        for task, outcome, sets in everything:
            place = _place(tasks, task)
            record: dict[str, Any] = {"task": place, "runs": runs[place], "sets": sets}
            try:
                record["case"] = plain(outcome) if not isinstance(outcome, Failure) else None
            except (TypeError, ValueError) as error:
                outcome = Failure(f"its case cannot be kept: {' '.join(str(error).split())}")
            if isinstance(outcome, Failure):
                record["failure"] = outcome.why
            if isinstance(task.prompt.store, CarriedStore):
                record["files"] = packed(task.prompt.store.contents)
            given.append(record)
        return given

    def _task(self, name: str, text: str, category: str, manifest: Any) -> Task:
        plan = self.plans[name]
        store = None if manifest is None else CarriedStore(Path(plan.folder), manifest)
        captures = plan.study.captures
        prompt = Prompt(text, category, plan.config, self.lm, store, captures, self.chat)
        return Task(plan, prompt)


def _place(tasks: Sequence[Task], task: Task) -> int:
    """Where in its window a task stands, watched or not."""
    key = task.plan.name, task.prompt.text
    return next(i for i, t in enumerate(tasks) if (t.plan.name, t.prompt.text) == key)


class CarriedStore(Store):
    """Raw results that are carried to the session, which alone writes to its results folder."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        super().__init__(folder, manifest)
        object.__setattr__(self, "contents", {})
        self.contents: dict[str, bytes]

    def _write(self, name: str, fill: Callable[[BinaryIO], Any]) -> Path:
        buffer = BytesIO()
        fill(buffer)
        self.contents[name] = buffer.getvalue()
        self.written[name] = hashlib.sha256(self.contents[name]).hexdigest()
        return self.folder / name


def made_by(lm: Any, plans: Sequence[Plan]) -> dict[str, str]:
    """By name, what cases depend on beside config and prompt: the model, software, each study."""
    maker, found = maker_sha256(lm), parts_of(lm)
    for plan in plans:
        found[f"code of study {plan.study.name}"] = code_fingerprint(maker, plan.module)
    return found


def record_of(plan: Plan) -> dict[str, Any]:
    """All of a plan that a worker needs to measure its prompts."""
    assert plan.study.measurement is not None
    return {
        "name": plan.name,
        "module": str(plan.module.resolve()),
        "called": plan.study.measurement.__module__,
        "study": plan.study.name,
        "config": plan.config.model_dump(mode="json"),
    }


def plan_of(record: Mapping[str, Any]) -> Plan:
    """The plan of a record, without prompts. Raises WorkerError if its study is not there."""
    module = Path(record["module"])
    studies = [s for s in vars(_imported(record["called"], module)).values() if _is(record, s)]
    if not studies:
        raise WorkerError(f"there is no study {record['study']!r} in {module}")
    return Plan(studies[0], record["name"], StudyConfig(**record["config"]), module, ())


def _is(record: Mapping[str, Any], found: Any) -> bool:
    return isinstance(found, Study) and found.name == record["study"]


def _imported(name: str, path: Path) -> Any:
    """The module of a file, under the name that pytest gave it in the session."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None or not path.exists():
            raise WorkerError(f"there is no study at {path}: hosts must see the same folders")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
