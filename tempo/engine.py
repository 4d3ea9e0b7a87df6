"""The decode loop: many runs at once, every new token of every run in one packed forward pass.

Shapes: T packed tokens, R cache rows, w widest set of a pass, N slots, L layers, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tempo.attention import PassContext, installed
from tempo.cache import SlotCache
from tempo.capture import check_budget, raw_keys, trace_bytes
from tempo.errors import ModelError, SpecError
from tempo.layout import Layout
from tempo.models import LanguageModel
from tempo.selection import Selection, read_out, select
from tempo.spec import RunSpec
from tempo.trace import Step, Trace, slot_steps

# Runs that share a forward pass. On a CPU more rows add little speed and more memory; traces do not depend on it
# beyond rounding.
MAX_ROWS = 16
# New tokens in one forward pass, beyond which a pass is made in parts: bounds the memory that the logits take.
MAX_NEW_TOKENS = 1024


def generate(lm: LanguageModel, prompt: str | Sequence[int], *, memory_budget: int | None = None, **settings: Any) -> Trace:
    """The trace of one TEMPO run; `settings` are those of `RunSpec`.

    Raises SpecError for settings that cannot be run, MemoryBudgetError if what it would record exceeds
    `memory_budget` bytes (default: half of the free memory), ModelError if the logits are not finite.
    """
    settings["prompt"] = prompt
    return generate_batch(lm, [RunSpec(**settings)], memory_budget=memory_budget)[0]


def generate_batch(
    lm: LanguageModel, specs: Sequence[RunSpec], *, max_rows: int = MAX_ROWS, memory_budget: int | None = None
) -> list[Trace]:
    """The traces of `specs`, in their order, computed together. Same errors as `generate`."""
    check_budget(lm, specs, [len(lm.encode(spec.prompt)) for spec in specs], memory_budget)
    traces = dict(stream(lm, specs, max_rows=max_rows, memory_budget=memory_budget))
    return [traces[index] for index in range(len(specs))]


def stream(
    lm: LanguageModel, specs: Sequence[RunSpec], *, max_rows: int = MAX_ROWS, memory_budget: int | None = None
) -> Iterator[tuple[int, Trace]]:
    """(index, trace) of each spec as its run ends, so that a long sweep need not hold all traces at once.

    `max_rows` runs are under way at any time; the next one starts in the pass after one has ended. The memory budget
    is for those, as if they were the largest of all.
    """
    runs = [_Run(lm, index, spec) for index, spec in enumerate(specs)]
    largest = sorted(runs, key=lambda run: -sum(trace_bytes(lm, run.spec, run.num_prompt).values()))[:max_rows]
    check_budget(lm, [run.spec for run in largest], [run.num_prompt for run in largest], memory_budget)
    waiting, active = deque(runs), []
    cache = SlotCache(lm.num_layers, num_rows=min(max_rows, len(runs)))
    free = list(range(cache.num_rows))
    while waiting or active:
        finished: list[_Run] = []
        with installed(lm.model), torch.inference_mode():
            while not finished:
                while waiting and free:
                    active.append(waiting.popleft())
                    active[-1].row = free.pop(0)
                for together in _passes(active):
                    _forward(lm, cache, together)
                for run in active:
                    if run.step(lm):
                        run.finish(cache)
                        finished.append(run)
                active = [run for run in active if run not in finished]
        for run in finished:
            free.append(run.row)
            yield run.index, run.trace(lm)


@dataclass(eq=False)
class _Run:
    """One run under way: its slots, what it has chosen, what it has recorded."""

    lm: LanguageModel
    index: int
    spec: RunSpec
    row: int = -1
    steps: list[dict[str, Any]] = field(default_factory=list)
    slots: list[range] = field(default_factory=list)  # of each set that has been appended
    num_forwarded: int = 0  # sets whose pass has been made
    new_logits: Tensor | None = None  # [w, V] of the last prompt token, or of the members of the sets just forwarded
    stop_reason: str = ""
    started: float = 0.0
    pass_seconds: float = 0.0
    attention: list[np.ndarray] = field(default_factory=list)
    raw_keys: list[Tensor] = field(default_factory=list)
    kv: dict[str, np.ndarray] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        spec = self.spec
        self.prompt = self.lm.encode(spec.prompt)
        self.num_prompt = len(self.prompt)
        self.num_steps = len(spec.replay) if spec.replay else spec.max_steps
        self.layout = Layout(spec.visibility, spec.positions, spec.weighting, spec.replay_positions, spec.replay_weights)
        self.layout.append_prompt(self.prompt)
        for step, tokens in enumerate(spec.replay or ()):
            strange = [token for token in tokens if not 0 <= token < self.lm.vocab_size]
            if strange:
                raise SpecError(
                    f"replay step {step} holds token id {strange[0]}, outside the vocabulary of {self.lm.name} "
                    f"(0 to {self.lm.vocab_size - 1}); replay sets made with the same tokenizer"
                )
        if "kv" in spec.capture and not self.lm.has_plain_keys:
            raise SpecError(
                f"the layers of {self.lm.name} do not all cache keys and values of one size (they share them, cache latents, or differ); "
                "leave 'kv' out of capture"
            )
        longest = self.num_prompt + self.num_steps
        longest = max(longest, *(position + 1 for row in spec.replay_positions or () for position in row), 0)
        if longest > self.lm.context_length:
            raise SpecError(
                f"{self.num_prompt} prompt tokens and {self.num_steps} steps need {longest} positions, {self.lm.name} has "
                f"{self.lm.context_length}; shorten the prompt or lower max_steps"
            )
        if spec.isolated_layers and spec.isolated_layers[1] > self.lm.num_layers:
            raise SpecError(
                f"isolated_layers={list(spec.isolated_layers)}: {self.lm.name} has {self.lm.num_layers} layers, 0 to "
                f"{self.lm.num_layers - 1}; the second number is the layer after the last"
            )

    @property
    def num_new(self) -> int:
        return self.layout.num_slots - self.layout.start

    @property
    def num_read(self) -> int:
        """How many of the new tokens need logits: the last of a prompt, every member of a set."""
        return 1 if self.layout.new_tokens_are_prompt() else self.num_new

    @property
    def records_attention(self) -> bool:
        return "attention" in self.spec.capture and not self.layout.new_tokens_are_prompt()

    def step(self, lm: LanguageModel) -> bool:
        """Take in the logits of a pass, then choose and append what the next one forwards; True once the run is over."""
        assert self.new_logits is not None
        if not torch.isfinite(self.new_logits).all():
            where = f"after set {len(self.steps) - 1}" if self.steps else "after the prompt"
            raise ModelError(
                f"{lm.name} gave logits that are not finite {where} of run {self.index} (prompt {self.spec.prompt!r:.60}); "
                f"the model runs in {str(lm.dtype).removeprefix('torch.')}: try float32, and check its weights"
            )
        sets = [range(self.layout.start, self.layout.num_slots)[-1:]] if not self.slots else self.slots[self.num_forwarded :]
        self.num_forwarded = len(self.slots)
        attention = self.attention.pop() if self.attention else None
        for slots, logits in zip(sets, self.new_logits.split([len(slots) for slots in sets]), strict=True):
            if self.steps:
                self._record(slots, logits, attention)
            if self.stop_reason:
                return True
            self._choose(lm, logits, len(sets))
        # the last set is forwarded only if something of that pass is asked for
        return bool(self.stop_reason) and not self.spec.capture

    def _record(self, slots: range, logits: Tensor, attention: np.ndarray | None) -> None:
        """What the members of the last set themselves gave in the pass that forwarded them."""
        if "logits" in self.spec.capture:
            self.steps[-1]["logits"] = logits.float().cpu().numpy()
        if attention is not None:
            first = self.layout.start
            own = attention[:, :, slots.start - first : slots.stop - first, : slots.stop]
            self.steps[-1]["attention"] = np.ascontiguousarray(own)

    def _choose(self, lm: LanguageModel, logits: Tensor, num_sets: int) -> None:
        """The next set, from the logits of the last one; it is appended unless the pass just made has forwarded it."""
        k, spec = len(self.steps), self.spec
        probabilities = self.steps[-1]["probabilities"] if k else [1.0]
        distribution = read_out(logits, probabilities, spec.readout)
        if spec.replay:
            tokens = list(spec.replay[k])
            chosen = Selection(tokens, distribution[tokens].tolist(), [], False)
        else:
            eos = lm.eos_token_ids if spec.stop_at_eos else frozenset()
            chosen = select(distribution, spec.threshold, spec.max_width, eos)
        if k == len(self.slots):
            self._append(chosen)
        self.steps.append(
            {
                "tokens": chosen.tokens,
                "probabilities": chosen.probabilities,
                "position": self.layout.slot_position[self.slots[k].start],
                "slots": list(self.slots[k]),
                "texts": [lm.token_text(token) for token in chosen.tokens],
                "ended": chosen.ended,
                "distribution": distribution.cpu().numpy(),
                "seconds": self.pass_seconds / num_sets,
            }
        )
        if chosen.stops or k + 1 == self.num_steps:
            self.stop_reason = "eos" if chosen.stops else "replay" if spec.replay else "max_steps"

    def _append(self, chosen: Selection) -> None:
        """Give the chosen set its slots. A replay's sets are known, and follow all at once, to share one pass."""
        start = self.layout.num_slots
        self._append_set(chosen.tokens, chosen.probabilities)
        # the weights of a set under `probability` are known only once the set before it has been read
        if self.spec.replay and self.spec.weighting != "probability":
            # the last one too, captured or not: what is captured must not change the shape of the pass
            for tokens in self.spec.replay[len(self.slots) :]:
                self._append_set(tokens, [1.0] * len(tokens))
        self.layout.start = start

    def _append_set(self, tokens: Sequence[int], probabilities: Sequence[float]) -> None:
        start = self.layout.num_slots
        self.layout.append_set(tokens, probabilities)
        self.slots.append(range(start, self.layout.num_slots))

    def finish(self, cache: SlotCache) -> None:
        """Copy out what the next run in this row would overwrite."""
        self.seconds = time.perf_counter() - self.started
        if "kv" in self.spec.capture:
            held = slice(self.row, self.row + 1), slice(None), slice(0, self.layout.num_slots)
            for name in ("keys", "values"):
                self.kv[name] = torch.cat([getattr(layer, name)[held] for layer in cache.layers]).float().cpu().numpy()
            self.kv["raw_keys"] = torch.cat(self.raw_keys, dim=2).float().cpu().numpy()

    def trace(self, lm: LanguageModel) -> Trace:
        layout, widths = self.layout, [len(step["tokens"]) for step in self.steps]
        return Trace(
            spec=self.spec,
            prompt_tokens=self.prompt,
            steps=[Step(**step) for step in self.steps],
            slot_token=np.array(layout.slot_token, dtype=np.int64),
            slot_position=np.array(layout.slot_position, dtype=np.int64),
            slot_step=slot_steps(self.num_prompt, widths),
            stop_reason=self.stop_reason,
            seconds=self.seconds,
            peak_bytes=sum(trace_bytes(lm, self.spec, self.num_prompt, widths).values()),
            provenance=lm.provenance(),
            **self.kv,
        )


def _passes(runs: Sequence[_Run]) -> Iterator[list[_Run]]:
    """The runs in groups that share a forward pass, in their order."""
    group: list[_Run] = []
    for run in runs:
        if group and sum(other.num_new for other in group) + run.num_new > MAX_NEW_TOKENS:
            yield group
            group = []
        group.append(run)
    yield group


def _forward(lm: LanguageModel, cache: SlotCache, runs: Sequence[_Run]) -> None:
    """One pass over the new tokens of all runs; leaves each run its logits and what it records."""
    began = time.perf_counter()
    context = _pass_context(lm, cache, runs)
    cache.step = context
    ends = np.cumsum([run.num_new for run in runs])
    read = torch.cat([torch.arange(end - run.num_read, end) for run, end in zip(runs, ends, strict=True)])
    tokens = [token for run in runs for token in run.layout.slot_token[run.layout.start :]]
    positions = [position for run in runs for position in run.layout.slot_position[run.layout.start :]]
    captures_kv = [run for run in runs if "kv" in run.spec.capture]
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
    if context.num_calls != len(lm.attention_calls):
        raise ModelError(f"{lm.name} made {context.num_calls} attention calls in a pass, {len(lm.attention_calls)} at load; load it again")
    for run in captures_kv:
        of_run = context.rows == run.row
        run.raw_keys.append(torch.cat([keys[:, :, of_run] for keys in raw]))
    logits = output.logits[0].split([run.num_read for run in runs])
    seconds = time.perf_counter() - began
    for run, new_logits in zip(runs, logits, strict=True):
        run.new_logits, run.pass_seconds = new_logits, seconds
        run.started = run.started or began


def _pass_context(lm: LanguageModel, cache: SlotCache, runs: Sequence[_Run]) -> PassContext:
    """Rows, slots and masks of the tokens the runs have just appended, on the model's device."""
    num_rows, width = cache.num_rows, max(run.num_new for run in runs)
    num_slots = max(run.layout.num_slots for run in runs)
    tokens = [(run.row, offset, run.layout.start + offset) for run in runs for offset in range(run.num_new)]
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
    )
    if any(call.window for call in lm.attention_calls):
        positions = [position for run in runs for position in run.layout.slot_position[run.layout.start :]]
        cache.place(rows, slots, torch.tensor(positions, device=lm.device))
        context.slot_positions = cache.slot_positions[:, :num_slots]
        context.query_positions = torch.zeros(num_rows, width, dtype=torch.long, device=lm.device)
        context.query_positions[rows, offsets] = context.slot_positions[rows, slots]
    if partly:
        isolated, bias = _masks(runs, num_rows, width, num_slots, "isolated")
        context.isolated = isolated.to(lm.device)
        context.isolated_bias = None if bias is None else bias.to(lm.device)
        context.isolated_layers = {run.row: run.spec.isolated_layers for run in partly if run.spec.isolated_layers}
    recording = [run for run in runs if run.records_attention]
    for run in recording:
        run.attention.append(np.empty((lm.num_layers, lm.num_heads, run.num_new, run.layout.num_slots), np.float32))
    context.record = partial(_record_attention, recording) if recording else None
    return context


def _masks(runs: Sequence[_Run], num_rows: int, width: int, num_slots: int, visibility: str | None = None) -> tuple[Tensor, Tensor | None]:
    """Who may see whom [R, w, N], and what is added to the attention logits, if anything is; under another visibility if given."""
    allowed = torch.zeros(num_rows, width, num_slots, dtype=torch.bool)
    allowed[:, :, 0] = True  # queries that only pad the block attend to some slot, so that no softmax is empty
    weighted = any(s.weighting != "none" or s.replay_weights or s.isolated_mass != "spread" for s in (run.spec for run in runs))
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


def _record_attention(runs: Sequence[_Run], layer: int, weights: Tensor) -> None:
    """Keep each run's own part of one layer's weights [R, H, w, N]."""
    for run in runs:
        run.attention[-1][layer] = weights[run.row, :, : run.num_new, : run.layout.num_slots].cpu().numpy()
