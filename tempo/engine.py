"""The decode loop: many runs at once, every new token of every run in one packed forward pass.

Shapes: T packed tokens, R cache rows, w widest set of a pass, N slots, L layers, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tempo.attention import PassContext, Recording, installed
from tempo.cache import SlotCache
from tempo.capture import Spool, check_budget, raw_keys, rows_that_fit
from tempo.errors import ModelError, SpecError
from tempo.models import LanguageModel
from tempo.run import Prefix, Run
from tempo.spec import RunSpec
from tempo.store import TraceStore
from tempo.trace import Trace

# Runs that share a forward pass. On a CPU more rows add little speed and more memory; traces do not depend on it
# beyond rounding.
MAX_ROWS = 16
# New tokens in one forward pass, beyond which a pass is made in parts: bounds the memory that the logits take.
MAX_NEW_TOKENS = 1024


def generate(
    lm: LanguageModel,
    prompt: str | Sequence[int],
    *,
    memory_budget: int | None = None,
    spool: str | Path | None = None,
    store: str | Path | None = None,
    **settings: Any,
) -> Trace:
    """The trace of one TEMPO run; `settings` are those of `RunSpec`, `spool` and `store` as in `stream`.

    Raises SpecError for settings that cannot be run, MemoryBudgetError if what it would record exceeds
    `memory_budget` bytes (default: half of the free memory), ModelError if the logits are not finite, TraceError if
    `spool` or `store` cannot be written.
    """
    if isinstance(prompt, RunSpec):
        raise SpecError(
            "generate takes a prompt and settings; a RunSpec is run by generate_batch(lm, [spec])[0]"
        )
    settings["prompt"] = prompt
    return generate_batch(
        lm, [RunSpec(**settings)], memory_budget=memory_budget, spool=spool, store=store
    )[0]


def generate_batch(
    lm: LanguageModel,
    specs: Sequence[RunSpec],
    *,
    max_rows: int = MAX_ROWS,
    memory_budget: int | None = None,
    spool: str | Path | None = None,
    store: str | Path | None = None,
) -> list[Trace]:
    """The traces of `specs`, in their order, computed together. Same errors as `generate`, `spool` and `store` as in `stream`."""
    specs = _checked(specs, max_rows)
    check_budget(lm, specs, [len(lm.encode(spec.prompt)) for spec in specs], memory_budget, spool)
    traces = dict(
        stream(lm, specs, max_rows=max_rows, memory_budget=memory_budget, spool=spool, store=store)
    )
    return [traces[index] for index in range(len(specs))]


def stream(
    lm: LanguageModel,
    specs: Sequence[RunSpec],
    *,
    max_rows: int = MAX_ROWS,
    memory_budget: int | None = None,
    spool: str | Path | None = None,
    store: str | Path | None = None,
) -> Iterator[tuple[int, Trace]]:
    """(index, trace) of each spec as its run ends, so that a long sweep need not hold all traces at once.

    As many runs are under way at any time as the memory budget allows, `max_rows` at most; the next one starts in the pass
    after one has ended, long prompts first and those of one prompt together. A prompt is forwarded once for runs that follow one
    another, and runs that are the same so far (two modes before the first wide set) share a pass until they part.

    spool: a folder on whose disk, in a file without a name, all distributions, logits and attention are kept instead of in
        memory; the arrays of a trace are then memory maps, and the file is gone when the trace is.
    store: a folder where each trace is saved as its run ends, and from which it is read when the same run is asked for again
        (same spec, weights, dtype, device, versions and code).
    """
    specs = _checked(specs, max_rows)
    runs = [
        Run(lm, index, spec, Spool(spool) if spool else None) for index, spec in enumerate(specs)
    ]
    shelf = TraceStore(lm, store) if store else None
    for run in list(runs):
        if shelf and (trace := shelf.get(run.spec)):
            runs.remove(run)
            yield run.index, trace
    if not runs:
        return
    num_rows = rows_that_fit(
        lm,
        [run.spec for run in runs],
        [run.num_prompt for run in runs],
        max_rows,
        memory_budget,
        spool,
    )
    # packed so that little is padding: in a pass every row is as long as the longest
    waiting = deque(
        sorted(
            runs,
            key=lambda run: (-run.num_prompt, run.prompt, -sum(map(len, run.spec.replay or ()))),
        )
    )
    runs.clear()  # a run that is over must not be held
    active: list[Run] = []
    finished: list[Run] = []
    cache = SlotCache(lm.num_layers, num_rows)
    free = list(range(num_rows))
    prefixes: dict[int, Prefix] = {}  # the prompt whose keys and values each row begins with
    try:
        while waiting or active:
            with installed(lm.model), torch.inference_mode():
                while not finished:
                    while waiting and free:
                        active.append(run := waiting.popleft())
                        _enter(run, free.pop(0), cache, prefixes)
                    for together in _passes([run for run in active if run.new_logits is None]):
                        _forward(lm, cache, together)
                    for run in active:
                        assert run.prefix is not None
                        prefixes[run.row] = run.prefix
                        if run.step():
                            run.finish(cache)
                            finished.append(run)
                    active = [run for run in active if run not in finished]
            while finished:
                run = finished.pop(0)
                free.append(run.row)
                index, trace = run.index, run.trace()
                if shelf:
                    shelf.put(trace)
                del run
                yield index, trace
                del trace
    finally:
        cache.release()
        for run in [*active, *finished]:
            if run.spool:
                run.spool.close()


def _checked(specs: Iterable[RunSpec], max_rows: int) -> list[RunSpec]:
    """The specs; SpecError if they are none, or so many rows cannot be had."""
    if isinstance(specs, RunSpec):
        raise SpecError("specs is one RunSpec; expected a list of tempo.RunSpec, such as [spec]")
    listed = list(specs)
    if strange := [spec for spec in listed if not isinstance(spec, RunSpec)]:
        raise SpecError(f"specs holds {strange[0]!r:.80}; expected a list of tempo.RunSpec")
    if not isinstance(max_rows, int) or max_rows < 1:
        raise SpecError(
            f"max_rows is {max_rows!r}; expected how many runs may be under way at once, a whole number from 1"
        )
    return listed


def _enter(run: Run, row: int, cache: SlotCache, prefixes: dict[int, Prefix]) -> None:
    """Give a run a row of the cache, with what some row's pass over the same prompt has left, if one has."""
    run.row = row
    if (known := next(filter(run.fits, prefixes.values()), None)) is not None:
        cache.copy(known.row, row, run.num_prompt)
        run.begin_with(known)
    prefixes.pop(row, None)


def _passes(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """The runs in groups that share a forward pass, in their order."""
    group: list[Run] = []
    for run in runs:
        if group and sum(other.num_new for other in group) + run.num_new > MAX_NEW_TOKENS:
            yield group
            group = []
        group.append(run)
    if group:
        yield group


def _forward(lm: LanguageModel, cache: SlotCache, runs: Sequence[Run]) -> None:
    """One pass over the new tokens of all runs; leaves each run its logits and what it records."""
    began = time.perf_counter()
    groups = _same_so_far(runs)
    packed = [group[0] for group in groups]
    context = _pass_context(lm, cache, groups)
    cache.step = context
    ends = np.cumsum([run.num_new for run in packed])
    read = torch.cat(
        [torch.arange(end - run.num_read, end) for run, end in zip(packed, ends, strict=True)]
    )
    tokens = [token for run in packed for token in run.layout.slot_token[run.layout.start :]]
    positions = [
        position for run in packed for position in run.layout.slot_position[run.layout.start :]
    ]
    captures_kv = any("kv" in run.spec.capture for run in runs)
    with raw_keys(lm.attention_modules) if captures_kv else nullcontext([]) as raw:
        output = lm.model(
            input_ids=torch.tensor([tokens], device=lm.device),
            position_ids=torch.tensor([positions], device=lm.device),
            # explicit and 4-D, so that transformers neither makes a mask nor reads shared positions as packed sequences
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=lm.device),
            use_cache=True,
            logits_to_keep=read.to(lm.device),
            tempo_pass=context,
            **{lm.cache_keyword: cache},
        )
    if context.recording is not None:
        context.recording.flush()
    if context.num_calls != len(lm.attention_calls):
        raise ModelError(
            f"{lm.name} made {context.num_calls} attention calls in a pass, {len(lm.attention_calls)} at load; load it again"
        )
    logits = output.logits[0].cpu()  # all at once: what follows, run by run, waits for no device
    seconds = time.perf_counter() - began
    for group, end, new_logits in zip(
        groups, ends, logits.split([run.num_read for run in packed]), strict=True
    ):
        for run in group:
            run.new_logits, run.pass_seconds = new_logits, seconds
            run.started = run.started or began
            if "kv" in run.spec.capture:
                run.raw_keys.append(
                    torch.cat([keys[:, :, end - run.num_new : end] for keys in raw])
                )
            if run.layout.new_tokens_are_prompt():
                run.begin_with(
                    Prefix(
                        run.row, run.prompt, new_logits, run.raw_keys[-1] if run.raw_keys else None
                    )
                )


def _same_so_far(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs in groups that differ in nothing yet: the first of each is forwarded for all."""
    groups: dict[tuple[bytes, int, int], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.history, run.layout.start, run.num_read), []).append(run)
    return list(groups.values())


def _pass_context(
    lm: LanguageModel, cache: SlotCache, groups: Sequence[Sequence[Run]]
) -> PassContext:
    """Rows, slots and masks of the tokens the runs have just appended, on the model's device."""
    runs = [group[0] for group in groups]
    num_rows, width = cache.num_rows, max(run.num_new for run in runs)
    num_slots = max(run.layout.num_slots for run in runs)
    tokens = [
        (run.row, offset, run.layout.start + offset)
        for run in runs
        for offset in range(run.num_new)
    ]
    rows, offsets, slots = torch.tensor(tokens, device=lm.device).unbind(dim=1)
    allowed, bias = _masks(runs, num_rows, width, num_slots)
    partly = [run for run in runs if run.spec.isolated_layers]
    context = PassContext(
        rows=rows,
        offsets=offsets,
        slots=slots,
        allowed=allowed.to(lm.device),
        bias=None if bias is None else bias.to(lm.device),
        expected=lm.attention_calls,
        only=range(runs[0].layout.start, num_slots) if num_rows == 1 else None,
        copies=_copies(lm, groups),
    )
    if any(call.window for call in lm.attention_calls):
        positions = torch.tensor(
            [p for run in runs for p in run.layout.slot_position[run.layout.start :]],
            device=lm.device,
        )
        cache.place(rows, slots, positions)
        if context.copies:
            cache.place(context.copies[0], context.copies[1], positions[context.copies[2]])
        context.slot_positions = cache.slot_positions[:, :num_slots]
        context.query_positions = torch.zeros(num_rows, width, dtype=torch.long, device=lm.device)
        context.query_positions[rows, offsets] = context.slot_positions[rows, slots]
    if partly:
        isolated, bias = _masks(runs, num_rows, width, num_slots, "isolated")
        context.isolated = isolated.to(lm.device)
        context.isolated_bias = None if bias is None else bias.to(lm.device)
        context.isolated_layers = {
            run.row: run.spec.isolated_layers for run in partly if run.spec.isolated_layers
        }
    context.recording = _recording(lm, context, groups)
    return context


def _recording(
    lm: LanguageModel, context: PassContext, groups: Sequence[Sequence[Run]]
) -> Recording | None:
    """Arrays for the attention of those runs that record it, to be filled from the row that is forwarded for each."""
    recorded = [(group[0].row, run) for group in groups for run in group if run.records_attention]
    if not recorded:
        return None
    num_rows, width, _ = context.allowed.shape
    own_slots = torch.zeros(num_rows, width, dtype=torch.long, device=lm.device)
    own_slots[context.rows, context.offsets] = context.slots
    if not any("attention" in run.spec.capture for _, run in recorded):
        own = np.empty((lm.num_layers, num_rows, lm.num_heads, width, width), np.float32)
        for row, run in recorded:
            run.attention, run.first_column = (
                own[:, row, :, : run.num_new, : run.num_new],
                run.layout.start,
            )
        return Recording([], own, own_slots)
    for _, run in recorded:
        run.attention, run.first_column = (
            np.empty((lm.num_layers, lm.num_heads, run.num_new, run.layout.num_slots), np.float32),
            0,
        )
    return Recording(
        [(row, run.attention) for row, run in recorded if run.attention is not None],
        None,
        own_slots,
    )


def _copies(
    lm: LanguageModel, groups: Sequence[Sequence[Run]]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Row and slot of each token that another run's pass makes, and which of the packed tokens it is."""
    found, first = [], 0
    for leader, *others in groups:
        start, width = leader.layout.start, leader.num_new
        found += [
            (run.row, start + offset, first + offset) for run in others for offset in range(width)
        ]
        first += width
    if not found:
        return None
    rows, slots, tokens = torch.tensor(found, device=lm.device).unbind(dim=1)
    return rows, slots, tokens


def _masks(
    runs: Sequence[Run], num_rows: int, width: int, num_slots: int, visibility: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """Who may see whom [R, w, N], and what is added to the attention logits, if anything is; under another visibility if given."""
    allowed = torch.zeros(num_rows, width, num_slots, dtype=torch.bool)
    allowed[:, :, 0] = (
        True  # queries that only pad the block attend to some slot, so that no softmax is empty
    )
    weighted = any(
        s.weighting != "none" or s.replay_weights or s.isolated_mass != "spread"
        for s in (run.spec for run in runs)
    )
    bias = torch.zeros(num_rows, width, num_slots) if weighted else None
    for run in runs:
        layout, new, used = run.layout, run.num_new, run.layout.num_slots
        allowed[run.row, :new, : layout.start] = True
        allowed[run.row, :new, layout.start : used] = layout.block(visibility)
        if bias is not None:
            bias[run.row, :new, :used] = layout.bias(visibility)
            if visibility and run.spec.isolated_mass == "self":
                bias[run.row, :new, :used] += layout.own_mass()
    return allowed, bias
