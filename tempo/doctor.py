"""What `tempo doctor` finds: how this machine is set up, and what is damaged in a folder.

A repair deletes nothing. Damaged lines and files are set aside beside those that are kept.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from tempo import files
from tempo.errors import MemoryBudgetError, ModelError, ResultsError, TempoError, TraceError
from tempo.parsing import CHECKSUM, parse_json, read_bytes, unseal
from tempo.records import reason

if TYPE_CHECKING:
    from tempo.models import LanguageModel

ASIDE = ".damaged"  # what the name of a file ends in that holds what was set aside
BUSY = 0.5  # of the cores: a load above this before tempo has begun makes it slow
ENOUGH_MEMORY, ENOUGH_DISK = 2e9, 3e9  # bytes: what the default model takes, and its conversion
# What `memory_plan` plans: the longest prompts of the suites here, and rows as sessions batch them.
PLANNED_PROMPT, PLANNED_STEPS, PLANNED_ROWS, PLANNED_WORKERS = 400, 10, 128, (1, 2, 4, 8)
# How what a file held comes back, by the file's name.
BACK = {
    "cases.jsonl": "run pytest on the studies: these prompts are measured again, the others kept",
    "findings.jsonl": "run pytest on the studies: the claims are judged again from kept cases",
    "report.json": "run pytest on the studies: the report is drawn again from kept cases",
    "trace.json": "run the generation again",
}


@dataclass(frozen=True)
class Damage:
    """What is wrong with one file: a message for each damaged part, and how to get them back."""

    path: Path
    parts: tuple[str, ...]
    back: str


def look(folder: str | Path) -> list[Damage]:
    """What is damaged in a folder of results, of stored traces, or of one trace.

    Raises:
        TraceError: if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TraceError(f"there is no folder {folder}; name one of results or of traces")
    found = []
    for path in _records(folder):
        parts = tuple(message for _, message in _damaged(path))
        if parts:
            back = BACK.get(path.name, "make it again")
            found.append(Damage(path, parts, back))
    return found


def repair(folder: str | Path) -> list[Damage]:
    """What was damaged in a folder and is now set aside; all that is whole stays as it was.

    Damaged lines of a file go into `<name>.damaged`, which grows with each repair. A file that is
    no list of records, and the folder of a damaged trace, gets that name itself.

    Raises:
        TraceError: if there is no such folder.
        ResultsError: if something cannot be written; then nothing of that file was changed.
    """
    found = look(folder)
    if not found:
        return []
    at = Path(folder)
    try:
        with files.locked(folder, "wait for it"):  # lines that a session adds meanwhile would go
            for at in (damage.path for damage in found):
                _set_aside(at)
    except ResultsError:
        raise
    except OSError as error:
        raise ResultsError(
            f"cannot repair {at}: {files.reason(error)}; nothing of it was changed"
        ) from None
    return found


def _records(folder: Path) -> Iterator[Path]:
    """The files of a folder and its subfolders that tempo wrote as records, and nobody else."""
    for pattern in ("*.jsonl", "*.json", "*/*.jsonl", "*/*.json"):
        for path in sorted(folder.glob(pattern)):
            if not path.is_file() or path.name.startswith(".") or ASIDE in path.parent.name:
                continue
            if path.name in BACK or (path.suffix == ".json" and _has_checksum(path)):
                yield path


def _has_checksum(path: Path) -> bool:
    try:
        return f'"{CHECKSUM}"'.encode() in read_bytes(path)
    except (OSError, ValueError):
        return False


def _damaged(path: Path) -> Iterator[tuple[int, str]]:
    """(line, message) of each damaged part; line 0 if it is the whole file."""
    if path.name == "trace.json":
        from tempo.trace import load_trace

        try:
            load_trace(path.parent)
        except TempoError as error:
            yield 0, str(error)
        return
    try:
        content = read_bytes(path)
    except (OSError, ValueError) as error:
        yield 0, f"{path} cannot be read: {reason(error)}"
        return
    if path.suffix != ".jsonl":
        try:
            unseal(parse_json(content))
        except ValueError as error:
            yield 0, f"{path}: {error}"
        return
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            if line.strip():
                unseal(parse_json(line))
        except ValueError as error:
            yield number, f"{path} line {number}: {error}"


def _set_aside(path: Path) -> None:
    lines = {number for number, _ in _damaged(path)}
    if lines == {0}:
        whole = path.parent if path.name == "trace.json" else path
        files.move(whole, _free(whole.with_name(whole.name + ASIDE)))
        return
    every = list(enumerate(path.read_bytes().split(b"\n"), start=1))
    kept = b"".join(line + b"\n" for number, line in every if number not in lines and line.strip())
    damaged = b"".join(line + b"\n" for number, line in every if number in lines)
    files.append(path.with_name(path.name + ASIDE), damaged)
    files.write(path, kept)


def _free(path: Path) -> Path:
    """The path, or the first with a number that nothing lies at."""
    number, free = 2, path
    while free.exists():
        free, number = path.with_name(f"{path.name}-{number}"), number + 1
    return free


def describe(cache_dir: Path | None = None) -> list[str]:
    """What is installed, which models are here and whole, and what would be slow or refused.

    A line that needs something done begins with an exclamation mark.
    """
    import psutil
    import torch

    from tempo.wheels import KNOWN_MODELS, check_cached

    names = ("torch", "transformers", "numpy", "pytest")
    lines = [", ".join(f"{name} {_version(name)}" for name in names)]
    for known in KNOWN_MODELS.values():
        if not known.wheels:
            lines.append(f"model {known.name}: built in")
            continue
        if not known.is_present(cache_dir):
            lines.append(f"model {known.name}: not here; {known.size_bytes / 1e6:.0f} MB to load")
            continue
        try:
            check_cached(known, cache_dir)
            lines.append(f"model {known.name}: here and whole")
        except ModelError as error:
            lines.append(f"! model {known.name}: {error}")
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    policy = os.environ.get("OMP_WAIT_POLICY", "not set")
    lines.append(f"{threads} threads on {cores} cores, load {load:.1f}; OMP_WAIT_POLICY {policy}")
    if load > BUSY * cores and threads > 1 and policy.upper() != "PASSIVE":
        lines.append(
            "! other programs use the cores, and threads that spin while they wait make it many "
            "times slower: set OMP_WAIT_POLICY=PASSIVE"
        )
    memory = psutil.virtual_memory().available
    if memory < ENOUGH_MEMORY:
        lines.append(f"! {memory / 1e9:.1f} GB of memory are free; the default model takes 2 GB")
    root = next(k.folder(cache_dir).parent for k in KNOWN_MODELS.values() if k.wheels)
    place = next(path for path in (root, *root.parents) if path.exists())
    if not os.access(place, os.W_OK):
        lines.append(f"! {root} cannot be written; set TEMPO_CACHE to a folder of your own")
    if (free := psutil.disk_usage(str(place)).free) < ENOUGH_DISK:
        lines.append(f"! {free / 1e9:.1f} GB are free in {place}; a model takes up to 3 GB there")
    return lines


def memory_plan(lm: LanguageModel) -> list[str]:
    """What a model, its runs and several workers take of this machine's memory, in lines.

    The bytes of runs are upper bounds, as `rows_that_fit` counts them.
    """
    import psutil

    from tempo.capture import gib, memory_budget, needed_bytes, rows_that_fit
    from tempo.spec import RunSpec

    weights, free = lm.weight_bytes, psutil.virtual_memory().available
    num_prompt = min(PLANNED_PROMPT, lm.context_length - PLANNED_STEPS)
    specs = {
        "nothing captured": RunSpec(prompt=(0,), max_steps=PLANNED_STEPS),
        "attention and logits": RunSpec(
            prompt=(0,), max_steps=PLANNED_STEPS, capture=("attention", "logits")
        ),
    }
    lines = [
        f"{lm!r}: {gib(weights)} of weights, {gib(free)} of memory are free",
        f"planned: prompts of {num_prompt} tokens, {PLANNED_STEPS} steps, threshold 0.1",
        f"with fewer than {PLANNED_ROWS} rows a session's batches are others, and round otherwise",
    ]
    for what, spec in specs.items():
        one = sum(needed_bytes(lm, [spec], [num_prompt]).values())
        many = [spec] * PLANNED_ROWS, [num_prompt] * PLANNED_ROWS
        every = sum(needed_bytes(lm, *many, PLANNED_ROWS).values())
        row = (every - one) // (PLANNED_ROWS - 1)
        lines.append(f"{what}: the first run up to {gib(one)}, each further row {gib(row)}")
        for workers in PLANNED_WORKERS:
            said = "1 worker" if workers == 1 else f"{workers} workers"
            try:
                budget = memory_budget(None, lm.device, weights, workers)
                rows = rows_that_fit(lm, *many, PLANNED_ROWS, budget)
                lines.append(f"  {said}: {rows} of {PLANNED_ROWS} rows in {gib(budget)} for each")
            except MemoryBudgetError as error:
                lines.append(f"! {said}: {error}")
    return lines


def _version(name: str) -> str:
    try:
        return version(name)
    except ImportError:
        return "missing"
