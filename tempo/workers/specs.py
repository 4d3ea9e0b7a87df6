"""`tempo.stream` by workers: a unit is a chunk of specs, and the answer their traces as files."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tempo import files
from tempo.capture import memory_budget, rows_that_fit
from tempo.engine import stream
from tempo.models import LanguageModel
from tempo.run import Run
from tempo.spec import RunSpec
from tempo.store import TraceStore
from tempo.trace import Trace, load_trace
from tempo.workers import Setup, executor
from tempo.workers.work import load, model_setup, packed, parts_of, raised, unpacked

Found = Iterator[tuple[int, Trace]]


class Specs:
    """The work of a stream's workers."""

    def __init__(self, setup: Setup) -> None:
        self.lm = load(setup)
        self.made_by = parts_of(self.lm)
        self.limits = {"max_rows": setup["max_rows"], "memory_budget": setup["budget"]}

    def do(self, unit: Any) -> Any:
        """[place in the chunk, trace] of each spec, in the order in which their runs end."""
        specs = [RunSpec(**record) for record in unit]
        found = stream(self.lm, specs, **self.limits)
        return [[place, packed(_contents(trace))] for place, trace in found]


def _place() -> Path:
    return Path(tempfile.gettempdir()) / "tempo-trace"


def _contents(trace: Trace) -> dict[str, bytes]:
    """The files that a trace is saved as."""
    with files.staging(_place()) as folder:
        trace.save(folder)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def _trace(contents: dict[str, bytes]) -> Trace:
    with files.staging(_place()) as folder:
        for name, content in contents.items():
            files.write(folder / Path(name).name, content)
        return load_trace(folder)


def stream_from(
    lm: LanguageModel,
    runs: Sequence[Run],
    workers: int | str,
    max_rows: int,
    budget: int | None,
    shelf: TraceStore | None,
) -> Found:
    """(index, trace) of each run, chunk by chunk as they come.

    runs: as they wait, long prompts first. They say what is asked, and are not computed here.
    shelf: where each trace is kept.
    """
    hired = executor(workers)
    number = hired.number or 1
    given = None if budget is None else budget // number
    share = memory_budget(given, lm.device, lm.weight_bytes, number)
    specs, prompts = [run.spec for run in runs], [run.num_prompt for run in runs]
    rows_that_fit(lm, specs, prompts, max_rows, share)  # refused before anything is computed
    setup = {
        "work": "tempo.workers.specs:Specs",
        "name": uuid.uuid4().hex[:16],  # its own: what is to be found again is in the store
        "owner": "",
        **model_setup(lm),
        "max_rows": max_rows,
        "budget": share,
        "made_by": parts_of(lm),
    }
    chunks = [runs[start : start + max_rows] for start in range(0, len(runs), max_rows)]
    units = [[run.spec.model_dump(mode="json") for run in chunk] for chunk in chunks]
    for number, answer in hired.run(setup, units, lambda index: True):
        if "failed" in answer:
            raise raised(answer)
        for place, contents in answer["given"]:
            trace = _trace(unpacked(contents))
            if shelf:
                shelf.put(trace)
            yield chunks[number][place].index, trace
