"""A session whose windows are measured by workers: what they are told, and what they give."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tempo.capture import gib, memory_budget
from tempo.errors import TempoError, WorkerError
from tempo.harness.execute import Failure, Task, is_installed
from tempo.harness.measuring import made_by, record_of
from tempo.harness.plan import Plan
from tempo.harness.watch import Measured
from tempo.models import LanguageModel
from tempo.workers import Answer, Executor, Setup
from tempo.workers.work import model_setup, unpacked


def setup_of(
    lm: LanguageModel, plans: Sequence[Plan], results: Path, chat: bool, number: int | None
) -> dict[str, Any]:
    """What every worker of a session is told.

    number: how many workers share this machine; None if they may be anywhere.
    """
    owner = str(results.resolve())
    setup = {
        "work": "tempo.harness.measuring:Windows",
        "owner": owner,
        **model_setup(lm),
        "chat": chat,
        "plans": [record_of(plan) for plan in plans],
        "paths": _own_paths(),
        "made_by": made_by(lm, plans),
    }
    # The same for the same work, so that a session that is started again finds what was answered.
    setup["name"] = hashlib.sha256(json.dumps(setup, sort_keys=True).encode()).hexdigest()[:16]
    return setup | {"budget": worker_budget(lm, number)}


def worker_budget(lm: LanguageModel, number: int | None) -> int:
    """Bytes that the runs of each worker may take, once all have loaded their weights."""
    return memory_budget(None, lm.device, lm.weight_bytes, number or 1)


def described(executor: Executor, lm: LanguageModel) -> list[str]:
    """What is said of the workers before they begin: threads and memory of each."""
    threads, number = torch.get_num_threads(), executor.number
    share = gib(worker_budget(lm, number))
    each = f"{threads} threads" if threads > 1 else "1 thread"
    who = "workers" if number is None else "1 worker" if number == 1 else f"{number} workers"
    lines = [f"{who} with {each} each, {gib(lm.weight_bytes)} of weights, {share} for runs"]
    if threads * (number or 1) > (cores := os.cpu_count() or 1):
        lines.append(
            f"{threads * (number or 1)} threads share {cores} cores and wait for each other: set "
            "OMP_NUM_THREADS=1 (another number rounds otherwise, so cases are measured again)"
        )
    return lines


def _own_paths() -> list[str]:
    """Where studies are imported from: the places that are not installed."""
    found = [Path(path).resolve() for path in sys.path]
    return [str(path) for path in found if path.is_dir() and not is_installed(path)]


def measure_elsewhere(
    executor: Executor,
    setup: Setup,
    windows: Sequence[Sequence[Task]],
    is_wanted: Callable[[Task], bool],
    ran: Callable[[Task, int], None],
) -> Measured:
    """As `measure`, by workers; the cases are the same to the bit.

    Raises WorkerError if there can be no workers, or if what they give is not whole.
    """
    # of all windows, so that one keeps its number when a session goes on where it was
    units = [[_of_task(task) for task in window] for window in windows]
    missing = set(range(len(windows)))

    def wanted(index: int) -> bool:
        return any(map(is_wanted, windows[index]))

    for index, answer in executor.run(setup, units, wanted):
        window = windows[index]
        missing.remove(index)
        for place, record in enumerate(_records(answer, window)):
            task = window[record.get("task", place)]
            ran(task, record["runs"])
            yield task, _outcome(task, record), record["sets"]
    if lost := sum(map(wanted, missing)):
        raise WorkerError(f"{lost} of {len(windows)} windows were never answered; run again")


def _of_task(task: Task) -> list[Any]:
    store = task.prompt.store
    manifest = None if store is None else json.loads(json.dumps(store.manifest))
    return [task.plan.name, task.prompt.text, task.prompt.category, manifest]


def _records(answer: Answer, window: Sequence[Task]) -> Sequence[Mapping[str, Any]]:
    """What an answer says of each task of a window, in the order in which they ended."""
    if why := answer.get("failed"):
        return [{"failure": why, "runs": 0, "sets": {}} for _ in window]
    records = answer["given"]
    found = sorted(record["task"] for record in records)
    if found != list(range(len(window))):
        raise WorkerError(
            f"{answer['worker']} gave cases {found} of a window with {len(window)}; expected each "
            "once; run again, and it is measured again"
        )
    return records


def _outcome(task: Task, record: Mapping[str, Any]) -> Any:
    """The case as JSON, or the failure; its raw results are written."""
    try:
        for name, content in unpacked(record.get("files", {})).items():
            if task.prompt.store is not None:
                task.prompt.store.put(name, content)
    except TempoError as error:
        return Failure(str(error))
    return Failure(record["failure"]) if "failure" in record else record["case"]
