"""Measure prompts: collect the runs that are asked for, compute them together, hand back traces."""

from __future__ import annotations

import ast
import copy
import hashlib
import importlib.util
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

import tempo
from tempo.cache import Prompts
from tempo.capture import memory_budget, rows_that_fit
from tempo.errors import TempoError
from tempo.harness.checks import requests
from tempo.harness.plan import Plan
from tempo.harness.runs import Prompt, RunRequest
from tempo.harness.texts import ReadRequest, Texts
from tempo.models import DTYPES, LanguageModel, wrap_model
from tempo.run import Run
from tempo.spec import RunSpec
from tempo.trace import Trace

# What tells a run from others: dtype, batch, and its spec without what it captures.
Identity = tuple[str | None, str, str]
# Prompts whose traces are in memory at once: enough runs to fill the batches, few enough for a
# laptop. Most of a trace is distributions over the vocabulary, so a model with a large one gets
# fewer.
PROMPTS_AT_ONCE = 16
FEWEST_AT_ONCE = 4
VOCABULARY_AT_ONCE = 1_000_000  # entries of one distribution of each of these prompts
# Runs under way at once: as many as fill a pass where each has one token.
ROWS = 128
# One part in so many of the memory is for what passes over prompts gave.
PROMPTS_SHARE = 8


@dataclass(frozen=True)
class Task:
    """One prompt of one plan."""

    plan: Plan
    prompt: Prompt

    def key(self, fingerprint: str) -> str:
        """A name for all that the case depends on: config, prompt, model, code and versions."""
        own = self.prompt.store is not None
        config = self.plan.config.model_dump(mode="json", exclude={"suite"})
        parts = [config, self.prompt.text, self.prompt.chat, own, fingerprint]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Failure:
    """Why a prompt could not be measured, in one line."""

    why: str


@dataclass
class _Open:
    """A measurement under way."""

    task: Task
    steps: Any
    wanted: Sequence[tuple[Identity, RunRequest]] = ()
    texts: ReadRequest | None = None  # it asked for texts, and for no run
    alone: bool = False  # it asked for one run, not for a list
    outcome: Any = None
    done: bool = False

    def advance(self, answer: Sequence[Trace] | Tensor | None) -> None:
        """Run the measurement to its next request, or to its end; its errors become the outcome."""
        study = self.task.plan.study
        try:
            given = answer[0] if self.alone and answer is not None else answer
            asked = next(self.steps) if given is None else self.steps.send(given)
            self.alone = isinstance(asked, RunRequest)
            found = requests(study, asked, self.steps)
            self.texts = found if isinstance(found, ReadRequest) else None
            runs = [] if isinstance(found, ReadRequest) else found
            self.wanted = [(_identity(request), request) for request in runs]
        except StopIteration as stop:
            self.finish(stop.value)
        except Exception as error:
            self.finish(failure_of(error))

    def take(self, traces: Mapping[Identity, Trace | Failure]) -> None:
        """Go on with the traces of all runs that were asked for; a failed one is the outcome."""
        found = [traces[identity] for identity, _ in self.wanted]
        failed = next((trace for trace in found if isinstance(trace, Failure)), None)
        if failed:
            self.finish(failed)
        else:
            self.advance([trace for trace in found if isinstance(trace, Trace)])

    def finish(self, outcome: Any) -> None:
        self.outcome, self.done = outcome, True


def failure_of(error: Exception) -> Failure:
    """An error in a line; if nobody raised it on purpose, with the file and line it came from."""
    if isinstance(error, TempoError):
        return Failure(str(error))
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(frame.filename).name}, line {frame.lineno}"
    return Failure(f"{type(error).__name__}: {error} ({where})")


def execute(
    lm: LanguageModel,
    windows: Sequence[Sequence[Task]],
    is_wanted: Callable[[Task], bool],
    budget: int | None = None,
    models: dict[str | None, LanguageModel] | None = None,
) -> Iterator[tuple[Task, Any]]:
    """(task, case or Failure) of every task as it ends, a window of prompts at a time.

    windows: the tasks that are measured together, see `windows_of`.
    is_wanted: whether a task's case is needed. A window that has none of them is left out; any
    other is measured whole, whatever failed before, so that its cases do not depend on that.
    budget: bytes that the runs under way may take; None means a share of the free memory.
    models: where copies of the model in other dtypes are kept for a later call.

    Free runs that several studies share are computed once. Forced runs are batched by mode: as
    every study replays the same sets in each mode it compares, the modes' batches have the same
    shapes in the same order, and a difference between them is no rounding of another batch shape.
    Texts are read for all that wait for some, before any further run.
    """
    models = {} if models is None else models
    models[None] = lm
    # once, so that batches of equal runs have equal shapes
    budget = memory_budget(budget, lm.device)
    for_prompts = budget // PROMPTS_SHARE
    budget -= for_prompts
    for window in windows:
        if not any(map(is_wanted, window)):
            continue
        under_way = []
        for task in window:
            if task.plan.study.measurement:
                under_way.append(_Open(task, task.plan.study.measurement(task.prompt)))
        for each in under_way:
            each.advance(None)
        texts, prompts = Texts(lm), Prompts(for_prompts)
        while under_way:
            for each in [each for each in under_way if each.done]:
                under_way.remove(each)
                yield each.task, each.outcome
            if any(each.texts for each in under_way):
                _read_all(texts, [each for each in under_way if each.texts])
                continue
            _run_all(models, under_way, budget, prompts)


def _run_all(
    models: dict[str | None, LanguageModel],
    under_way: Iterable[_Open],
    budget: int,
    prompts: Prompts,
) -> None:
    """Make all runs that these measurements wait for; each goes on as soon as it has its own.

    A trace is let go once nobody waits for it: those of a window would not fit the memory at once.
    """
    waiting = list(under_way)
    traces: dict[Identity, Trace | Failure] = {}
    wanted = [pair for each in waiting for pair in each.wanted]
    for of_batch in _traces_by_batch(models, wanted, budget, prompts):
        traces |= of_batch
        of_batch.clear()  # else it would hold them until the next batch is there
        ready = [each for each in waiting if all(name in traces for name, _ in each.wanted)]
        waiting = [each for each in waiting if not any(each is other for other in ready)]
        for each in ready:
            each.take(traces)
        still_wanted = {name for each in waiting for name, _ in each.wanted}
        traces = {name: traces[name] for name in traces if name in still_wanted}


def _read_all(texts: Texts, reading: Sequence[_Open]) -> None:
    """Read what these measurements want to be read, and let each go on."""
    try:
        logits = texts.read([each.texts for each in reading if each.texts])
    except Exception as error:
        for each in reading:
            each.finish(failure_of(error))
        return
    for each, of_texts in zip(reading, logits, strict=True):
        each.advance(of_texts)


def prompts_at_once(lm: LanguageModel) -> int:
    """How many prompts are measured together."""
    return max(FEWEST_AT_ONCE, min(PROMPTS_AT_ONCE, VOCABULARY_AT_ONCE // lm.vocab_size))


def windows_of(tasks: Sequence[Task], at_once: int) -> Iterator[list[Task]]:
    """Tasks in groups of a few prompts, all studies of a prompt together.

    A window is the unit of batching: the cases of one are equal to the bit only if all of its tasks
    are measured together.
    """
    by_prompt: dict[str, list[Task]] = {}
    for task in tasks:
        by_prompt.setdefault(task.prompt.text, []).append(task)
    prompts = list(by_prompt)
    for i in range(0, len(prompts), at_once):
        yield [task for prompt in prompts[i : i + at_once] for task in by_prompt[prompt]]


def _identity(request: RunRequest) -> Identity:
    return request.dtype, request.batch, request.spec.key(with_capture=False)


def _traces_by_batch(
    models: dict[str | None, LanguageModel],
    wanted: Sequence[tuple[Identity, RunRequest]],
    budget: int,
    prompts: Prompts,
) -> Iterator[dict[Identity, Trace | Failure]]:
    """Nothing at first, then batch by batch a trace for each distinct run.

    A trace captures all that any of its askers wants. Prompts are read first, for all batches: else
    only the first mode's would hold them.
    """
    yield {}
    merged: dict[Identity, RunRequest] = {}
    for identity, request in wanted:
        known = merged.setdefault(identity, request)
        capture = set(known.spec.capture) | set(request.spec.capture)
        merged[identity] = request._replace(spec=known.spec.but(capture=capture))
    batches: dict[tuple[Any, ...], list[Identity]] = {}
    for identity, request in merged.items():
        batches.setdefault(_batch(request), []).append(identity)
    plain = [request.spec for _, request in wanted if request.dtype is None]
    _read_prompts(models[None], plain, budget, prompts)
    for (dtype, *_), identities in batches.items():
        asked = {each: merged[each].spec for each in identities}
        traces: dict[Identity, Trace | Failure]
        try:
            of_model = None if dtype else prompts
            traces = _run_batch(_in_dtype(models, dtype), asked, budget, of_model)
        except Exception as error:  # of one batch: others are computed
            traces = dict.fromkeys(asked, failure_of(error))
        yield traces


def _read_prompts(
    lm: LanguageModel, specs: Iterable[RunSpec], budget: int, prompts: Prompts
) -> None:
    """Forward the prompts of these runs that were not yet."""
    greedy = {"threshold": 1.0, "max_width": 1, "max_steps": 1}
    texts = dict.fromkeys(spec.prompt for spec in specs if "kv" not in spec.capture)
    asked = [RunSpec(prompt=text, **greedy) for text in texts]
    with suppress(Exception):  # whatever is wrong with a run, its own batch says it
        for _ in tempo.stream(lm, asked, max_rows=ROWS, memory_budget=budget, prompts=prompts):
            pass


def _run_batch(
    lm: LanguageModel, asked: dict[Identity, RunSpec], budget: int, prompts: Prompts | None
) -> dict[Identity, Trace | Failure]:
    """A trace for each of these runs. One that is refused takes no other run along."""
    identities, traces = list(asked), {}
    try:
        specs = list(asked.values())
        limits: Any = {"max_rows": ROWS, "memory_budget": budget, "prompts": prompts}
        for index, trace in tempo.stream(lm, specs, **limits):
            traces[identities[index]] = trace
    except Exception as error:
        left = {each: spec for each, spec in asked.items() if each not in traces}
        refused = {each: why for each, spec in left.items() if (why := _refusal(lm, spec, budget))}
        if not refused:  # it is nothing about a single run: results stay
            return traces | dict.fromkeys(left, failure_of(error))
        others = {each: spec for each, spec in left.items() if each not in refused}
        traces |= refused | (_run_batch(lm, others, budget, prompts) if others else {})
    return traces


def _refusal(lm: LanguageModel, spec: RunSpec, budget: int) -> Failure | None:
    """Why this run cannot be made, whatever shares its batch; None if it can."""
    try:
        num_prompt = Run(lm, 0, spec).num_prompt
        rows_that_fit(lm, [spec], [num_prompt], 1, budget, None)
    except TempoError as error:
        return failure_of(error)
    return None


def _batch(request: RunRequest) -> tuple[Any, ...]:
    """What runs must have in common to share a batch."""
    spec = request.spec
    if request.batch or not spec.replay:
        return request.dtype, request.batch
    mode = (
        spec.visibility,
        spec.positions,
        spec.weighting,
        spec.weighting_layers,
        spec.isolated_layers,
        spec.isolated_mass,
    )
    return request.dtype, mode


def _in_dtype(models: dict[str | None, LanguageModel], dtype: str | None) -> LanguageModel:
    """The session's model, or a copy of it in another dtype."""
    if dtype not in models:
        lm = models[None]
        model = copy.deepcopy(lm.model)
        # not model.to(dtype), which would round the rotary tables as well
        for parameter in model.parameters():
            parameter.data = parameter.data.to(DTYPES[str(dtype)])
        models[dtype] = wrap_model(model, lm.tokenizer, f"{lm.name} {dtype}")
    return models[dtype]


def code_fingerprint(maker: str, module: Path) -> str:
    """A hash of all but config and prompt that a case depends on: model, versions, and the code.

    maker: the model and software, `tempo.identity.maker_sha256`. The code is the harness's
    measuring part and the study's module with all that it imports.
    """
    digest = hashlib.sha256(maker.encode())
    here = Path(__file__).parent
    measuring = [here / name for name in ("execute.py", "runs.py", "study.py", "texts.py")]
    for source in [*measuring, *imported_files(module)]:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def imported_files(module: Path) -> list[Path]:
    """The module and, through its imports, all files that are neither installed nor tempo's."""
    own = Path(__file__).resolve().parent.parent
    found: dict[Path, None] = {}
    waiting = [module.resolve()]
    while waiting:
        path = waiting.pop()
        if path in found or path.is_relative_to(own) or path.suffix != ".py":
            continue
        if is_installed(path):
            continue
        found[path] = None
        waiting += _imports(path)
    return sorted(found)


def is_installed(path: Path) -> bool:
    """Whether a file or folder is part of Python or of a package, in whatever environment."""
    roots = (Path(prefix).resolve() for prefix in (sys.prefix, sys.base_prefix))
    packages = {"site-packages", "dist-packages"} & set(path.parts)
    return bool(packages) or any(path.is_relative_to(root) for root in roots)


def _imports(path: Path) -> list[Path]:
    """The files that a file's import statements name, wherever they stand."""
    files: list[Path] = []
    for level, stem, inner in _import_statements(path.read_text(encoding="utf-8")):
        names = (stem, *(f"{stem}.{name}".strip(".") for name in inner))
        if level:
            folder = path.parents[level - 1]
            files += [each for name in names for each in _files_below(folder, name)]
        else:
            files += [each for name in names for each in _module_files(name)]
    return [file.resolve() for file in files if file.is_file()]


@cache
def _import_statements(source: str) -> list[tuple[int, str, tuple[str, ...]]]:
    """(dots before it, module, what is taken from it) of each import. Many studies share a file."""
    found: list[tuple[int, str, tuple[str, ...]]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(0, alias.name, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inner = tuple(alias.name for alias in node.names)
            found.append((node.level, node.module or "", inner))
    return found


def _module_files(name: str) -> list[Path]:
    """The file of a module, loaded or not, and those of the packages that it lies in."""
    found = []
    parts = name.split(".")
    for names in (".".join(parts[: i + 1]) for i in range(len(parts))):
        if file := getattr(sys.modules.get(names), "__file__", None):
            found.append(Path(file))
    try:  # importing the first part alone runs nothing
        spec = importlib.util.find_spec(parts[0])
    except (ImportError, ValueError):
        return found
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        found += _files_below(Path(folder).parent, name)
    return [*found, Path(spec.origin)] if spec and spec.has_location and spec.origin else found


def _files_below(folder: Path, name: str) -> list[Path]:
    """Where a module of this name would lie in a folder, and the packages on the way."""
    parts = name.split(".") if name else []
    packages = [folder.joinpath(*parts[: i + 1], "__init__.py") for i in range(len(parts))]
    return [folder / "__init__.py", *packages, folder.joinpath(*parts).with_suffix(".py")]
