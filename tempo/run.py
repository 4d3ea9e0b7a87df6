"""One run under way: what it has chosen, which slots that took, and what is kept of it.

Shapes: w members of a set, N slots, L layers, H heads, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tempo.cache import SlotCache
from tempo.capture import Spool, trace_bytes
from tempo.errors import ModelError, SpecError
from tempo.layout import Layout
from tempo.models import LanguageModel
from tempo.selection import Selection, read_out, select
from tempo.spec import RunSpec
from tempo.trace import Step, Trace, slot_steps


class Prefix(NamedTuple):
    """What a pass over a prompt gave, beside the keys and values that it left in a row."""

    row: int
    prompt: list[int]
    logits: Tensor  # [1, V] of the last token
    raw_keys: Tensor | None  # [L, Hkv, P, D] if they were captured


@dataclass(eq=False)
class Run:
    """One run under way: its slots, what it has chosen, what it has recorded.

    spool: where the large arrays go instead of memory.
    history: what decides keys and values of all slots so far: runs of one history can share a pass.
    """

    lm: LanguageModel
    index: int
    spec: RunSpec
    spool: Spool | None = None
    row: int = -1
    history: bytes = b""
    steps: list[dict[str, Any]] = field(default_factory=list)
    slots: list[range] = field(default_factory=list)  # of each set that has been appended
    num_forwarded: int = 0  # sets whose pass has been made
    new_logits: Tensor | None = (
        None  # [num_read, V] of the last prompt token, or of the members of the sets just forwarded
    )
    prefix: Prefix | None = None  # once the prompt has been forwarded
    stop_reason: str = ""
    started: float = 0.0
    pass_seconds: float = 0.0
    attention: np.ndarray | None = None  # [L, H, w, N - first_column] of the pass just made
    first_column: int = 0  # the slot that its first column is about
    raw_keys: list[Tensor] = field(default_factory=list)
    kv: dict[str, np.ndarray] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        spec = self.spec
        self.prompt = self.lm.encode(spec.prompt)
        self.num_prompt = len(self.prompt)
        self.num_steps = len(spec.replay) if spec.replay else spec.max_steps
        self.layout = Layout(
            spec.visibility,
            spec.positions,
            spec.weighting,
            spec.replay_positions,
            spec.replay_weights,
        )
        self.layout.append_prompt(self.prompt)
        self._note(0, None)
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
        longest = max(
            longest, *(position + 1 for row in spec.replay_positions or () for position in row), 0
        )
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
        """How many of the new tokens need logits: the last of a prompt, every member of a set; of the last set none, unless captured.

        A readout of one member takes those of all as well: what is captured must not change the shape of the pass.
        """
        if self.layout.new_tokens_are_prompt():
            return 1
        return 0 if self.stop_reason and "logits" not in self.spec.capture else self.num_new

    @property
    def records_attention(self) -> bool:
        return (
            bool({"attention", "siblings"}.intersection(self.spec.capture))
            and not self.layout.new_tokens_are_prompt()
        )

    def fits(self, prefix: Prefix) -> bool:
        """Whether another run's pass over its prompt gave all that this run's would."""
        return prefix.prompt == self.prompt and (
            "kv" not in self.spec.capture or prefix.raw_keys is not None
        )

    def begin_with(self, prefix: Prefix) -> None:
        """Take what a pass over the prompt gave, be it this run's own or another's whose keys and values are now in this row."""
        self.prefix = prefix._replace(row=self.row)
        self.started = self.started or time.perf_counter()
        self.new_logits = prefix.logits
        if "kv" in self.spec.capture:
            assert prefix.raw_keys is not None
            self.raw_keys = [prefix.raw_keys]

    def step(self) -> bool:
        """Take in the logits of a pass, then choose and append what the next one forwards; True once the run is over."""
        assert self.new_logits is not None
        new_logits, self.new_logits = self.new_logits, None
        self._check_finite("logits", new_logits)
        sets = (
            [range(self.layout.start, self.layout.num_slots)[-1:]]
            if not self.slots
            else self.slots[self.num_forwarded :]
        )
        self.num_forwarded = len(self.slots)
        attention, self.attention = self.attention, None
        if attention is not None and not len(new_logits):
            self._check_finite("attention weights", torch.from_numpy(attention[-1]))
        parts = (
            new_logits.split([len(slots) for slots in sets]) if len(new_logits) else [new_logits]
        )
        for slots, logits in zip(sets, parts, strict=True):
            if self.steps:
                self._record(slots, logits, attention)
            if self.stop_reason:
                return True
            self._choose(logits, len(sets))
        # the last set is forwarded only if something of that pass is asked for
        return bool(self.stop_reason) and not self.spec.capture

    def _check_finite(self, what: str, found: Tensor) -> None:
        if found.numel() and not all(map(math.isfinite, torch.aminmax(found))):
            where = f"after set {len(self.steps) - 1}" if self.steps else "after the prompt"
            raise ModelError(
                f"{self.lm.name} gave {what} that are not finite {where} of run {self.index} (prompt {self.spec.prompt!r:.60}); "
                f"the model runs in {str(self.lm.dtype).removeprefix('torch.')}: try float32, and check its weights"
            )

    def _record(self, slots: range, logits: Tensor, attention: np.ndarray | None) -> None:
        """What the members of the last set themselves gave in the pass that forwarded them."""
        if "logits" in self.spec.capture:
            self.steps[-1]["logits"] = self._keep(logits.float().numpy())
        if attention is not None:
            new, first = self.layout.start, self.first_column
            own = attention[:, :, slots.start - new : slots.stop - new, : slots.stop - first]
            if "attention" in self.spec.capture:
                self.steps[-1]["attention"] = self._keep(own)
            if "siblings" in self.spec.capture:
                self.steps[-1]["siblings"] = self._keep(own[..., slots.start - first :])

    def _keep(self, array: np.ndarray) -> Any:
        return np.ascontiguousarray(array) if self.spool is None else self.spool.write(array)

    def _choose(self, logits: Tensor, num_sets: int) -> None:
        """The next set, from the logits of the last one; it is appended unless the pass just made has forwarded it."""
        k, spec, lm = len(self.steps), self.spec, self.lm
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
                "distribution": self._keep(distribution.numpy()),
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
        # a single token of no weight is seen by all modes alike
        plain = len(self.slots[-1]) == 1 and not self.layout.slot_bias[start]
        self._note(
            start,
            None
            if plain
            else (self.spec.visibility, self.spec.isolated_layers, self.spec.isolated_mass),
        )

    def _note(self, start: int, mode: object) -> None:
        """Take the slots from `start` on into the history."""
        layout = self.layout
        added = (
            layout.slot_token[start:],
            layout.slot_position[start:],
            layout.slot_bias[start:],
            mode,
        )
        self.history = hashlib.sha256(self.history + repr(added).encode()).digest()

    def finish(self, cache: SlotCache) -> None:
        """Copy out what the next run in this row would overwrite."""
        self.seconds = time.perf_counter() - self.started
        if "kv" in self.spec.capture:
            held = slice(self.row, self.row + 1), slice(None), slice(0, self.layout.num_slots)
            for name in ("keys", "values"):
                self.kv[name] = (
                    torch.cat([getattr(layer, name)[held] for layer in cache.layers])
                    .float()
                    .cpu()
                    .numpy()
                )
            self._check_finite("cached values", torch.from_numpy(self.kv["values"][-1]))
            self.kv["raw_keys"] = torch.cat(self.raw_keys, dim=2).float().cpu().numpy()

    def trace(self) -> Trace:
        lm, layout, widths = self.lm, self.layout, [len(step["tokens"]) for step in self.steps]
        return Trace(
            spec=self.spec,
            prompt_tokens=self.prompt,
            steps=[
                Step(**step) for step in (self.spool.read(self.steps) if self.spool else self.steps)
            ],
            slot_token=np.array(layout.slot_token, dtype=np.int64),
            slot_position=np.array(layout.slot_position, dtype=np.int64),
            slot_step=slot_steps(self.num_prompt, widths),
            stop_reason=self.stop_reason,
            seconds=self.seconds,
            peak_bytes=sum(trace_bytes(lm, self.spec, self.num_prompt, widths).values()),
            provenance=lm.provenance(),
            **self.kv,
        )
