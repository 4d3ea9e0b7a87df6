"""The decode loop: many runs at once, every new token of every run in one packed forward pass.

Shapes: B runs, T packed tokens, R rows of a pass, w widest set of a pass, N slots, L layers,
H query heads, Hkv key heads, D head size, V vocabulary.
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
from tempo.cache import Prompts, SlotCache
from tempo.capture import Spool, check_files, raw_keys, rows_that_fit
from tempo.errors import ModelError, SpecError
from tempo.identity import warn_of_hooks
from tempo.inputs import checked, conform, model, optional, place, seen, whole
from tempo.layout import MAX_NEW_TOKENS, MAX_PADDED
from tempo.models import LanguageModel
from tempo.residual import Change, Hooks, Tap, hooks_by_place, tapped
from tempo.run import Prefix, Run
from tempo.spec import (
    Capture,
    IsolatedMass,
    Positions,
    Prompt,
    PruneBy,
    Readout,
    RunSpec,
    Visibility,
    Weighting,
)
from tempo.store import TraceStore
from tempo.support import adapter_settings, check_adapters, check_autocast
from tempo.trace import Trace, check_writable

# Runs that share a forward pass. On a CPU more rows add little speed and take more memory.
# Traces do not depend on it beyond rounding.
MAX_ROWS = 16
# From so many tokens on a pass costs hardly less for each token on a CPU.
SATURATED = 128
# What these arguments take, see `tempo.inputs`.
BYTES, FOLDER = optional(whole(0)), optional(place)


@checked(lm=model, memory_budget=BYTES, spool=FOLDER, store=FOLDER)
def generate(
    lm: LanguageModel,
    prompt: Prompt,
    *,
    threshold: float = 0.1,
    schedule: Sequence[float] | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    sample: int | None = None,
    seed: int = 0,
    max_steps: int = 10,
    visibility: Visibility = "isolated",
    positions: Positions = "shared",
    readout: Readout = "mixture",
    weighting: Weighting = "none",
    prune: float | None = None,
    prune_by: PruneBy = "posterior",
    max_width: int | None = None,
    stop_at_eos: bool = True,
    replay: Sequence[Sequence[int]] | Trace | None = None,
    replay_positions: Sequence[Sequence[int]] | None = None,
    replay_weights: Sequence[Sequence[float]] | None = None,
    replay_links: Sequence[Sequence[Sequence[float]]] | None = None,
    weighting_layers: tuple[int, int] | None = None,
    isolated_layers: tuple[int, int] | None = None,
    isolated_mass: IsolatedMass = "spread",
    capture: Capture | Iterable[Capture] = (),
    memory_budget: int | None = None,
    spool: str | Path | None = None,
    store: str | Path | None = None,
    hooks: Hooks | None = None,
) -> Trace:
    """The trace of one TEMPO run.

    At each step, every token whose probability reaches the threshold is appended, and all of them
    enter the model in one forward pass. docs/semantics.md states the rules.

    Args:
        lm: The model, from `load_model` or `wrap_model`.
        prompt: Text, or token ids in any form that a tokenizer or `lm.chat` returns: a list, an
            array or tensor [P] or [1, P], a list of one list, or a mapping with `input_ids`.
        threshold: Every token with at least this probability joins the set. If no token reaches
            it, the most probable one joins alone. 0 lets every token in, for another rule to
            choose from.
        schedule: Thresholds by step, instead of `threshold`; the last one holds for later steps.
        top_k: Only the k most probable tokens may join a set.
        top_p: Only the most probable tokens that together first reach this probability may join.
        min_p: Only tokens with at least this share of the top probability may join.
        sample: Draw so many of the tokens that may join, without replacement, each in proportion
            to its probability. None takes all of them.
        seed: Of the draws. The same seed, prompt and step give the same draw.
        max_steps: A free run generates at most this many sets. A replay runs all its sets.
        visibility: Which siblings a sibling attends to: none (`isolated`), all (`visible`), or
            those in earlier slots (`causal`).
        positions: One rotary position for a whole set (`shared`), or the next position for each
            token (`sequential`, the control).
        readout: How the members' logits become the one next distribution: the mixture of their
            softmaxes by probability (`mixture`), the softmax of their mean (`mean_logits`), or
            the softmax of one member (`last`, `first`).
        weighting: What is added to the attention logits of keys in sets wider than one: nothing
            (`none`), -log n for n members (`count`), the log of the member's share
            (`probability`), or the log of the probability that this member came before the one
            that attends (`posterior`; `best_parent` keeps only the most probable path to it).
        prune: Drop an earlier member for all later queries once its posterior, over the members
            of the newest set, is below this. The most probable one of each set stays.
        prune_by: What is compared with `prune`: the `posterior`, or the member's share of the
            `attention` that its set got from the newest forwarded set, over layers and heads.
        max_width: Only this many of the most probable tokens join a set; None sets no limit.
        stop_at_eos: Whether a run ends after a set that an end-of-sequence token leads. Such a
            token that does not lead is then never appended.
        replay: Token sets to force, one a step, instead of choosing; or a Trace, whose sets are
            taken. Their order is the order of the slots. A set may hold one token twice.
        replay_positions: With a replay, the rotary position of each member of each set, instead
            of what `positions` gives.
        replay_weights: With a replay, the weight of each member of each set (1 leaves it as it
            is), instead of what `weighting` gives. Its log is added to that key's attention
            logits.
        replay_links: With a replay and weighting `posterior` or `best_parent`, the probability
            that each member came before each member of the next set, [w, w'] for every set but
            the last, instead of what the members predict. Columns sum to one.
        weighting_layers: The layers (first, end), end excluded, in which `weighting` or
            `replay_weights` count. None means all. It excludes `isolated_layers`.
        isolated_layers: The layers (first, end), end excluded, in which siblings are isolated
            whatever `visibility` says.
        isolated_mass: Where a sibling's attention goes in those layers: to all it still sees
            (`spread`), or to itself (`self`: its own key counts for all n members, +log n).
        capture: What to record beside the sets, one name or several: "attention" [L, H, w, N],
            "siblings" (the set's own columns of attention, [L, H, w, w]), "logits" [w, V], "kv"
            (keys and values [L, Hkv, N, D]), "residual" (the stream before each layer and after
            the last, [L + 1, w, E]).
        memory_budget: Bytes that the run may take; None means half of the free memory.
        spool: A folder on whose disk the captured arrays are kept instead of in memory. They
            vanish with the trace.
        store: A folder where the trace is saved, and from which it is read if the same run is
            asked for again.
        hooks: Functions by (step, member, layer). Each gets the residual [E] of that member before
            that layer (L: after the last one) in the real pass, and returns what takes its place.
            Not with `store`.

    Returns:
        A `Trace`: per step the tokens, their probabilities and the distribution [V] float32 that
        they were chosen from, and the arrays that `capture` names.

    Raises:
        SpecError: if a setting is unknown or cannot be run.
        MemoryBudgetError: if the run may need more than `memory_budget`; nothing is computed.
        ModelError: if logits or captured values are not finite.
        TraceError: if `spool` or `store` cannot be written.

    Example:
        >>> import tempo
        >>> lm = tempo.load_model("tiny")
        >>> trace = tempo.generate(lm, "The cat", threshold=0.05, max_steps=3, capture="attention")
        >>> trace
        <Trace 'The cat' + 3 sets, 13 slots, isolated, tiny>
        >>> trace.widths
        [3, 1, 2]
        >>> trace.steps[0].attention.shape  # (layers, heads, members of the set, slots so far)
        (3, 4, 3, 10)
    """
    if isinstance(prompt, RunSpec):
        raise SpecError(
            "generate takes a prompt and settings; "
            "a RunSpec is run by generate_batch(lm, [spec])[0]"
        )
    settings: dict[str, Any] = {
        "prompt": prompt,
        "threshold": threshold,
        "schedule": schedule,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "sample": sample,
        "seed": seed,
        "max_steps": max_steps,
        "visibility": visibility,
        "positions": positions,
        "readout": readout,
        "weighting": weighting,
        "prune": prune,
        "prune_by": prune_by,
        "max_width": max_width,
        "stop_at_eos": stop_at_eos,
        "replay": replay,
        "replay_positions": replay_positions,
        "replay_weights": replay_weights,
        "replay_links": replay_links,
        "weighting_layers": weighting_layers,
        "isolated_layers": isolated_layers,
        "isolated_mass": isolated_mass,
        "capture": capture,
    }
    spec = RunSpec(**settings)
    limits = {"memory_budget": memory_budget, "spool": spool, "store": store}
    return generate_batch(lm, [spec], hooks=[hooks], **limits)[0]


@checked(lm=model, max_rows=whole(1), memory_budget=BYTES, spool=FOLDER, store=FOLDER)
def generate_batch(
    lm: LanguageModel,
    specs: Iterable[RunSpec],
    *,
    max_rows: int = MAX_ROWS,
    memory_budget: int | None = None,
    spool: str | Path | None = None,
    store: str | Path | None = None,
    hooks: Sequence[Hooks | None] | None = None,
) -> list[Trace]:
    """The traces of all specs, in their order, computed together.

    Args:
        lm: The model, from `load_model` or `wrap_model`.
        specs: One `RunSpec` a run; prompts and settings may differ.
        max_rows: At most this many runs are under way at once.
        memory_budget: Bytes that all runs together may take; None means half of the free memory.
        spool: A folder on whose disk the captured arrays are kept instead of in memory. They
            vanish with the trace.
        store: A folder where each trace is saved, and from which it is read if the same run is
            asked for again.
        hooks: For each spec its functions by (step, member, layer), as `generate` takes them, or
            None. A run with hooks shares no pass with another from the first changed set on.

    Raises:
        SpecError: if a spec cannot be run on this model.
        MemoryBudgetError: if all traces together may need more than `memory_budget`.
        ModelError: if logits or captured values are not finite.
        TraceError: if `spool` or `store` cannot be written.

    Example:
        >>> import tempo
        >>> lm = tempo.load_model("tiny")
        >>> spec = tempo.RunSpec(prompt="The cat", threshold=0.05, max_steps=3)
        >>> isolated, visible = tempo.generate_batch(lm, [spec, spec.but(visibility="visible")])
        >>> isolated.sets[0] == visible.sets[0]  # no wide set has been read yet
        True
    """
    specs = _listed(specs)
    given = _hooks_of(specs, hooks)
    runs = [Run(lm, index, spec, hooks=given[index]) for index, spec in enumerate(specs)]
    prompts = [run.num_prompt for run in runs]
    max_rows = rows_that_fit(lm, specs, prompts, max_rows, memory_budget, spool, keep_all=True)
    if spool:
        check_files(len(specs), spool)
    limits = {"memory_budget": memory_budget, "spool": spool, "store": store}
    traces = dict(stream(lm, specs, max_rows=max_rows, hooks=given, **limits))
    return [traces[index] for index in range(len(specs))]


@checked(lm=model, max_rows=whole(1), memory_budget=BYTES, spool=FOLDER, store=FOLDER)
def stream(
    lm: LanguageModel,
    specs: Iterable[RunSpec],
    *,
    max_rows: int = MAX_ROWS,
    memory_budget: int | None = None,
    spool: str | Path | None = None,
    store: str | Path | None = None,
    hooks: Sequence[Hooks | None] | None = None,
    prompts: Prompts | None = None,
    workers: int | str | None = None,
) -> Iterator[tuple[int, Trace]]:
    """(index, trace) of each spec as its run ends, so that a sweep need not hold all traces.

    As many runs are under way as the memory budget allows, at most `max_rows`. When one ends, the
    next one starts: long prompts first, equal prompts together. A prompt is forwarded once for
    runs that follow one another. Runs that are the same so far share a pass until they part, for
    example two modes before the first wide set.

    Args:
        lm: The model, from `load_model` or `wrap_model`.
        specs: One `RunSpec` a run; prompts and settings may differ.
        max_rows: At most this many runs are under way at once.
        memory_budget: Bytes that the runs under way may take; None means half of the free memory.
        spool: A folder for a file without a name that takes distributions, logits and attention
            instead of memory. The arrays of a trace are then memory maps; the file is gone when
            the trace is.
        store: A folder where each trace is saved as its run ends. A run that is already there is
            read and not computed, if spec, weights, dtype, device, versions and code are the same.
        hooks: For each spec its functions by (step, member, layer), as `generate` takes them, or
            None. A run with hooks shares no pass with another from the first changed set on.
        prompts: What earlier calls with this model read of prompts, which is not forwarded again.
            Prompts that are not among them are added. Not with `workers`.
        workers: Who computes, if not this process: a number of processes, a folder that hosts with
            `tempo work FOLDER` share, "ray" or "ray:N". They load the model by its name. Specs go
            to them in chunks of `max_rows`, and traces do not depend on who computes them.

    Yields:
        The index of the spec in `specs`, and its trace, in the order in which runs end; with
        `workers` chunk after chunk, whichever is ready first.

    Raises:
        SpecError: if a spec cannot be run on this model.
        MemoryBudgetError: if even one run may need more than `memory_budget`.
        ModelError: if logits or captured values are not finite.
        TraceError: if `spool` or `store` cannot be written.
        WorkerError: if there can be no workers with this model.

    Example:
        >>> import tempo
        >>> lm = tempo.load_model("tiny")
        >>> specs = [tempo.RunSpec(prompt="ab", max_width=1, max_steps=n) for n in (4, 2)]
        >>> for index, trace in tempo.stream(lm, specs):
        ...     print(index, trace.widths)
        1 [1, 1]
        0 [1, 1, 1, 1]
    """
    specs = _listed(specs)
    given = _hooks_of(specs, hooks)
    if store and any(given):
        raise SpecError(
            "a run with hooks has no name in a store, which knows runs by their spec; "
            "leave store or hooks out"
        )
    if workers is not None and (spool or prompts or any(given)):
        raise SpecError("workers take neither hooks nor spool nor prompts; leave one of them out")
    check_autocast(lm.device)
    adapters = adapter_settings(lm.model)
    if len(specs) > 1:
        warn_of_hooks(lm)
    runs = [
        Run(lm, index, spec, Spool(spool) if spool else None, hooks=given[index])
        for index, spec in enumerate(specs)
    ]
    shelf = TraceStore(lm, store) if store else None
    for run in list(runs):
        if shelf and (trace := shelf.get(run.spec)):
            runs.remove(run)
            yield run.index, trace
    if not runs:
        return
    if store:
        check_writable(store)
    if workers is not None:
        from tempo.workers.specs import stream_from

        runs.sort(key=_longest_first)
        yield from stream_from(lm, runs, workers, max_rows, memory_budget, shelf)
        return
    num_rows = rows_that_fit(
        lm,
        [run.spec for run in runs],
        [run.num_prompt for run in runs],
        max_rows,
        memory_budget,
        spool,
    )
    if spool:
        check_files(num_rows, spool)
    # In a pass every row is as long as the longest, so runs of like length go together.
    waiting = deque(sorted(runs, key=_longest_first))
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
                        _enter(run, free.pop(0), cache, prefixes, prompts)
                    known = [run for run in active if run.new_logits is not None]
                    passes = list(_passes([run for run in active if run.new_logits is None]))
                    for together in [known, *passes]:
                        if together is not known:
                            _forward_in_parts(lm, cache, together)
                        # at once, so that the logits of one pass are held, not of all
                        for run in together:
                            assert run.prefix is not None
                            prefixes[run.row] = run.prefix
                            if prompts and not run.steps:
                                prompts.keep(tuple(run.prompt), cache, run.row, run.prefix.logits)
                            if run.step():
                                run.finish(cache)
                                finished.append(run)
                    active = [run for run in active if run not in finished]
            check_adapters(lm.model, adapters)
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


def _longest_first(run: Run) -> tuple[int, list[int], int]:
    """A sort key: long prompts first, equal prompts together, then long replays first."""
    return -run.num_prompt, run.prompt, -sum(map(len, run.spec.replay or ()))


def _listed(specs: Iterable[RunSpec]) -> list[RunSpec]:
    """The specs as a list; SpecError if they are none."""
    if isinstance(specs, RunSpec):
        raise SpecError("specs is one RunSpec; expected a list of tempo.RunSpec, such as [spec]")
    if isinstance(specs, str | bytes) or not isinstance(specs, Iterable):
        raise SpecError(f"specs is {seen(specs)}; expected a list of tempo.RunSpec")
    listed = list(specs)
    if strange := [spec for spec in listed if not isinstance(spec, RunSpec)]:
        raise SpecError(f"specs holds {seen(strange[0])}; expected a list of tempo.RunSpec")
    return listed


def _hooks_of(specs: Sequence[RunSpec], hooks: object) -> list[Hooks]:
    """The hooks of each spec; SpecError unless they are a list as long as `specs`, or None."""
    if hooks is None:
        return [{} for _ in specs]
    if not isinstance(hooks, Sequence) or isinstance(hooks, str | bytes):
        raise SpecError(f"hooks is {seen(hooks)}; expected a list with a mapping or None a spec")
    if len(hooks) != len(specs):
        raise SpecError(
            f"hooks has {len(hooks)} entries for {len(specs)} specs; give one mapping or None each"
        )
    return [conform(hooks_by_place, "hooks", given) for given in hooks]


def _enter(
    run: Run, row: int, cache: SlotCache, prefixes: dict[int, Prefix], prompts: Prompts | None
) -> None:
    """Give a run a row of the cache, and what an earlier pass over its prompt left, if any."""
    run.row = row
    if (known := next(filter(run.fits, prefixes.values()), None)) is not None:
        cache.copy(known.row, row, run.num_prompt)
        run.begin_with(known)
    elif prompts and "kv" not in run.spec.capture:  # keys before rotation are not kept
        run.layout.start, logits = prompts.begin(tuple(run.prompt), cache, row)
        if logits is not None:
            run.layout.start = 0
            run.begin_with(Prefix(row, run.prompt, logits, None))
    prefixes.pop(row, None)


def _passes(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """The runs in lists that share a forward pass, those with the most new tokens first.

    All rows of a pass are as wide as the widest. So once a pass is large enough for its products to
    be fast, no run joins it that would fill less than half of its row.
    """
    together: list[Run] = []
    num_tokens = num_rows = widest = 0
    for group in sorted(_same_so_far(runs), key=lambda group: -group[0].num_new):
        new = group[0].num_new
        if new > MAX_NEW_TOKENS:  # they come first; each is forwarded in parts, by itself
            yield from ([run] for run in group)
            continue
        is_full = num_tokens + new > MAX_NEW_TOKENS or (num_rows + 1) * widest > MAX_PADDED
        if together and (is_full or (num_tokens >= SATURATED and 2 * new < widest)):
            yield together
            together, num_tokens, num_rows = [], 0, 0
        widest = widest if together else new
        together += group
        num_tokens, num_rows = num_tokens + new, num_rows + 1
    if together:
        yield together


def _forward_in_parts(lm: LanguageModel, cache: SlotCache, runs: Sequence[Run]) -> None:
    """Make the pass of these runs; that of a single run with very many new tokens in parts."""
    run, layout = runs[0], runs[0].layout
    if len(runs) > 1 or run.num_new <= MAX_NEW_TOKENS:
        _forward(lm, cache, runs)
        return
    start, seconds, logits, whole, residuals = layout.start, 0.0, [], None, []
    if run.records_attention:
        # the slots that a part has no weights for are those that it may not see
        first = 0 if run.records_all_attention else start
        shape = lm.num_layers, lm.num_heads, run.num_new, layout.num_slots - first
        whole = np.zeros(shape, np.float32)
    for part in layout.parts(MAX_NEW_TOKENS):
        layout.start, layout.part_end = part
        _forward(lm, cache, runs)
        assert run.new_logits is not None
        logits.append(run.new_logits)
        seconds += run.pass_seconds
        residuals += [] if run.residual is None else [run.residual]
        if whole is not None and run.attention is not None:
            first = run.first_column - (layout.num_slots - whole.shape[3])
            columns = slice(first, first + run.attention.shape[3])
            whole[:, :, layout.start - start : layout.end - start, columns] = run.attention
    layout.start, layout.part_end = start, None
    run.new_logits = torch.cat(logits) if len(logits) > 1 else logits[0]
    run.pass_seconds, run.attention = seconds, whole
    run.residual = np.concatenate(residuals, axis=1) if residuals else None
    run.first_column = 0 if whole is None else layout.num_slots - whole.shape[3]


def _forward(lm: LanguageModel, cache: SlotCache, runs: Sequence[Run]) -> None:
    """Make one pass over the new tokens of all runs; each gets its logits and what it records."""
    began = time.perf_counter()
    groups = _same_so_far(runs)
    packed = [group[0] for group in groups]
    context = _pass_context(lm, cache, groups)
    cache.step = context
    ends = np.cumsum([run.num_new for run in packed])
    read = torch.cat(
        [torch.arange(end - run.num_read, end) for run, end in zip(packed, ends, strict=True)]
    )
    tokens = _of_new_slots(packed, "slot_token")
    positions = _of_new_slots(packed, "slot_position")
    captures_kv = any("kv" in run.spec.capture for run in runs)
    tap = _tap(lm, groups, ends)
    with (
        raw_keys(lm.attention_modules) if captures_kv else nullcontext([]) as raw,
        tapped(lm.residual_stream, tap) if tap else nullcontext(),
    ):
        output = lm.model(
            input_ids=torch.tensor([tokens], device=lm.device),
            position_ids=torch.tensor([positions], device=lm.device),
            # Explicit and 4-D: else transformers makes a mask of its own, or takes shared
            # positions for packed sequences.
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
            f"{lm.name} made {context.num_calls} attention calls in a pass, "
            f"{len(lm.attention_calls)} at load; load it again"
        )
    logits = output.logits[0].cpu()  # all at once, so that no run waits for the device again
    if tap and tap.found:
        _hand_out(torch.stack(tap.found).float().cpu().numpy(), groups)
    seconds = time.perf_counter() - began
    parts = logits.split([run.num_read for run in packed])
    for group, end, new_logits in zip(groups, ends, parts, strict=True):
        for run in group:
            run.new_logits, run.pass_seconds = new_logits, seconds
            run.started = run.started or began
            if "kv" in run.spec.capture:
                new = slice(end - run.num_new, end)
                run.raw_keys.append(torch.cat([keys[:, :, new] for keys in raw]))
            if run.layout.end == run.layout.num_prompt:
                own_keys = torch.cat(run.raw_keys, dim=2) if run.raw_keys else None
                run.begin_with(Prefix(run.row, run.prompt, new_logits, own_keys))


def _tap(lm: LanguageModel, groups: Sequence[Sequence[Run]], ends: np.ndarray) -> Tap | None:
    """What the coming pass reads of its residual stream and changes in it; None if nothing.

    A group's tokens end at its entry of `ends`. Residuals are read of the groups in which a run
    records them, and changed in those of a run with hooks, which is alone in its group.
    """
    rows: list[int] = []
    changes: dict[int, list[tuple[int, Change]]] = {}
    for group, end in zip(groups, ends, strict=True):
        leader, first = group[0], int(end) - group[0].num_new
        if any(run.records_residual for run in group):
            rows += range(first, int(end))
        for layer, offset, change in leader.changes():
            changes.setdefault(layer, []).append((first + offset, change))
    if not rows and not changes:
        return None
    return Tap(torch.tensor(rows, device=lm.device) if rows else None, changes, [])


def _hand_out(residuals: np.ndarray, groups: Sequence[Sequence[Run]]) -> None:
    """Give the runs that record residuals their part [L + 1, w, E] of those that were read."""
    first = 0
    for group in groups:
        recording = [run for run in group if run.records_residual]
        end = first + group[0].num_new * bool(recording)
        for run in recording:
            run.residual = residuals[:, first:end]
        first = end


def _of_new_slots(runs: Sequence[Run], name: str) -> list[int]:
    """What the layouts of the runs hold under this name for the slots of the coming pass."""
    return [
        value
        for run in runs
        for value in getattr(run.layout, name)[run.layout.start : run.layout.end]
    ]


def _same_so_far(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs in groups that are equal so far; the first of a group is forwarded for all."""
    groups: dict[tuple[bytes, int, int], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.history, run.layout.start, run.num_read), []).append(run)
    return list(groups.values())


def _pass_context(
    lm: LanguageModel, cache: SlotCache, groups: Sequence[Sequence[Run]]
) -> PassContext:
    """Rows, slots and masks of the tokens the runs have just appended, on the model's device."""
    runs = [group[0] for group in groups]
    num_rows, width = len(runs), max(run.num_new for run in runs)
    num_slots = max(run.layout.end for run in runs)
    tokens, partly, weighted = [], {}, {}
    for row, run in enumerate(runs):
        tokens += [(row, offset, run.layout.start + offset) for offset in range(run.num_new)]
        if run.spec.isolated_layers:
            partly[row] = run.spec.isolated_layers
        if run.spec.weighting_layers:
            weighted[row] = run.spec.weighting_layers
    rows, offsets, slots = torch.tensor(tokens, device=lm.device).unbind(dim=1)
    allowed, bias = _masks(runs, width, num_slots)
    isolated, isolated_bias = (
        _masks(runs, width, num_slots, "isolated") if partly else (allowed, bias)
    )
    is_biased = bool(bias.any() or isolated_bias.any())
    context = PassContext(
        rows=rows,
        offsets=offsets,
        slots=slots,
        allowed=allowed.to(lm.device),
        bias=bias.to(lm.device) if is_biased else None,
        expected=lm.attention_calls,
        isolated_layers=partly,
        weighted_layers=weighted,
        only=range(runs[0].layout.start, num_slots) if num_rows == 1 else None,
        is_unmasked=num_rows == width == 1 and not is_biased and bool(allowed.all()),
        copies=_copies(lm, groups),
        held=_held([run.row for run in runs], lm.device),
    )
    if any(call.window for call in lm.attention_calls):
        positions = torch.tensor(_of_new_slots(runs, "slot_position"), device=lm.device)
        cache.place(context.cache_rows, slots, positions)
        if context.copies:
            cache.place(context.copies[0], context.copies[1], positions[context.copies[2]])
        context.slot_positions = cache.slot_positions[context.held, :num_slots]
        context.query_positions = torch.zeros(num_rows, width, dtype=torch.long, device=lm.device)
        context.query_positions[rows, offsets] = context.slot_positions[rows, slots]
    if partly:
        context.isolated = isolated.to(lm.device)
        context.isolated_bias = isolated_bias.to(lm.device) if is_biased else None
    context.recording = _recording(lm, context, groups)
    return context


def _recording(
    lm: LanguageModel, context: PassContext, groups: Sequence[Sequence[Run]]
) -> Recording | None:
    """Arrays for the attention of the runs that record it; None if no run does.

    Each is filled from the row that is forwarded for the run's group.
    """
    recorded = []
    for row, group in enumerate(groups):
        recorded += [(row, run) for run in group if run.records_attention]
    if not recorded:
        return None
    num_rows, width, _ = context.allowed.shape
    # the columns of the sets that the pass forwards, which may have begun in an earlier part
    columns = {row: range(run.layout.first_sibling, run.layout.end) for row, run in recorded}
    own_slots = torch.zeros(num_rows, max(map(len, columns.values())), dtype=torch.long)
    for row, slots in columns.items():
        own_slots[row, : len(slots)] = torch.tensor(slots)
    own_slots = own_slots.to(lm.device)
    if not any(run.records_all_attention for _, run in recorded):
        shape = (lm.num_layers, num_rows, lm.num_heads, width, own_slots.shape[1])
        own = np.empty(shape, np.float32)
        for row, run in recorded:
            run.attention = own[:, row, :, : run.num_new, : len(columns[row])]
            run.first_column = columns[row].start
        return Recording([], own, own_slots, width)
    parts = []
    for row, run in recorded:
        shape = (lm.num_layers, lm.num_heads, run.num_new, run.layout.end)
        run.attention, run.first_column = np.empty(shape, np.float32), 0
        parts.append((row, run.attention))
    return Recording(parts, None, own_slots, width)


def _copies(
    lm: LanguageModel, groups: Sequence[Sequence[Run]]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Row and slot of each token whose pass another run makes, and its index among the packed."""
    found, first = [], 0
    for leader, *others in groups:
        start, width = leader.layout.start, leader.num_new
        for run in others:
            found += [(run.row, start + offset, first + offset) for offset in range(width)]
        first += width
    if not found:
        return None
    rows, slots, tokens = torch.tensor(found, device=lm.device).unbind(dim=1)
    return rows, slots, tokens


def _held(rows: list[int], device: torch.device) -> slice | Tensor:
    """These rows of the cache as an index, which is a slice if they follow one another."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows, device=device)


def _masks(
    runs: Sequence[Run], width: int, num_slots: int, visibility: str | None = None
) -> tuple[Tensor, Tensor]:
    """Who may see whom, and what is added to the attention logits: bool and float64 [R, w, N].

    `visibility` stands for that of every run, if it is given.
    """
    num_rows = len(runs)
    allowed = torch.zeros(num_rows, width, num_slots, dtype=torch.bool)
    # Queries that only fill the block attend to some slot, so that no softmax is empty.
    allowed[:, :, 0] = True
    bias = torch.zeros(num_rows, width, num_slots, dtype=torch.float64)
    for row, run in enumerate(runs):
        spec, layout, new, used = run.spec, run.layout, run.num_new, run.layout.end
        first = layout.first_sibling
        allowed[row, :new, :first] = True
        allowed[row, :new, first:used] = layout.block(visibility)
        allowed[row, :new, layout.dropped] = False
        if spec.weighting != "none" or spec.replay_weights:
            bias[row, :new, :used] = layout.bias(visibility)
        if visibility and spec.isolated_mass == "self":
            bias[row, :new, :used] += layout.own_mass()
    return allowed, bias
