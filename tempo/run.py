"""One run under way: what it has chosen, which slots that took, and what is kept of it.

Shapes: P prompt tokens, w members of a set, N slots, L layers, H query heads, Hkv key heads,
D head size, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tempo.cache import SlotCache
from tempo.capture import Spool, trace_bytes
from tempo.errors import ModelError, SpecError
from tempo.lattice import Lattice, dropped
from tempo.layout import MAX_NEW_TOKENS, Layout
from tempo.models import LanguageModel
from tempo.residual import Change, Hooks
from tempo.selection import Selection, read_out, select
from tempo.spec import BY_QUERY, RunSpec
from tempo.trace import Step, Trace, slot_steps


class Prefix(NamedTuple):
    """What a pass over a prompt gave. Its keys and values are in the cache.

    Attributes:
        row: The cache row that holds them.
        prompt: The token ids, [P].
        logits: The logits of the last token, [1, V].
        raw_keys: The keys before rotation, [L, Hkv, P, D], if they were captured.
    """

    row: int
    prompt: list[int]
    logits: Tensor
    raw_keys: Tensor | None


@dataclass(eq=False)
class Run:
    """One run under way: its slots, what it has chosen, and what it has recorded.

    Attributes:
        lm: The model.
        index: The number of the run.
        spec: The settings of the run.
        spool: Where the large arrays go, instead of memory.
        row: The run's row in the cache, -1 while it has none.
        history: A hash of what determines keys and values of all slots so far. Runs with the same
            history can share a pass.
        steps: The fields of a `Step`, for each set that was chosen.
        slots: The slots of each set that was appended.
        num_forwarded: How many sets a pass has forwarded.
        new_logits: [num_read, V], the logits of the pass just made. They belong to the last prompt
            token, or to the members of the sets just forwarded.
        prefix: What the pass over the prompt gave, once it is made.
        stop_reason: Why the run ends: "max_steps", "eos" or "replay". Empty until the last set is
            chosen.
        started: When the run's first pass began, by `time.perf_counter`.
        pass_seconds: The time of the pass just made.
        attention: [L, H, w, N - first_column], the weights of the pass just made.
        first_column: The slot that the first column of `attention` belongs to.
        raw_keys: The keys before rotation, [L, Hkv, T, D] for each pass of T tokens.
        kv: The arrays of "kv", once the run is finished.
        seconds: How long the run took, once it is finished.
        hooks: What changes a residual, by step, member and layer.
        residual: [L + 1, w, E], what the layers of the pass just made handed on.

    Raises:
        SpecError: if the spec does not fit the model.
    """

    lm: LanguageModel
    index: int
    spec: RunSpec
    spool: Spool | None = None
    row: int = -1
    history: bytes = b""
    steps: list[dict[str, Any]] = field(default_factory=list)
    slots: list[range] = field(default_factory=list)
    num_forwarded: int = 0
    new_logits: Tensor | None = None
    prefix: Prefix | None = None
    stop_reason: str = ""
    started: float = 0.0
    pass_seconds: float = 0.0
    attention: np.ndarray | None = None
    first_column: int = 0
    raw_keys: list[Tensor] = field(default_factory=list)
    kv: dict[str, np.ndarray] = field(default_factory=dict)
    seconds: float = 0.0
    hooks: Hooks = field(default_factory=dict)
    residual: np.ndarray | None = None

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
        by_query = spec.weighting in BY_QUERY
        self.lattice = Lattice(spec.weighting, by_query or spec.prune is not None)
        self._note(0, None)
        self._check_spec()

    def _check_spec(self) -> None:
        """SpecError if this model cannot run this spec."""
        spec, lm = self.spec, self.lm
        for step, tokens in enumerate(spec.replay or ()):
            strange = [token for token in tokens if not 0 <= token < lm.vocab_size]
            if strange:
                raise SpecError(
                    f"replay step {step} holds token id {strange[0]}, outside the vocabulary of "
                    f"{lm.name} (0 to {lm.vocab_size - 1}); replay sets made with the same "
                    "tokenizer"
                )
        if "kv" in spec.capture and not lm.has_plain_keys:
            raise SpecError(
                f"the layers of {lm.name} do not all cache keys and values of one size (they share "
                "them, cache latents, or differ); leave 'kv' out of capture"
            )
        self._check_residuals()
        num_positions = self._num_positions()
        if num_positions > lm.context_length:
            raise SpecError(
                f"{self.num_prompt} prompt tokens and {self.num_steps} steps need {num_positions} "
                f"positions, {lm.name} has {lm.context_length}; shorten the prompt or lower "
                "max_steps"
            )
        for name in ("isolated_layers", "weighting_layers"):
            layers = getattr(spec, name)
            if layers and layers[1] > lm.num_layers:
                raise SpecError(
                    f"{name}={list(layers)}: {lm.name} has {lm.num_layers} layers, "
                    f"0 to {lm.num_layers - 1}; the second number is the layer after the last"
                )

    def _check_residuals(self) -> None:
        """SpecError if residuals are asked for that the run will not have."""
        lm, spec = self.lm, self.spec
        if not self.hooks and "residual" not in spec.capture:
            return
        try:
            num_layers = len(lm.residual_stream.layers)
        except ModelError as error:
            remedy = "leave 'residual' out of capture and give no hooks"
            raise SpecError(f"{error}; {remedy}") from None
        for step, member, layer in self.hooks:
            if step >= self.num_steps:
                raise SpecError(
                    f"a hook is for step {step} and the run has {self.num_steps}, counted from 0"
                )
            if layer > num_layers:
                raise SpecError(
                    f"a hook is for layer {layer}: {lm.name} has {num_layers} layers; expected "
                    f"the layer that the residual enters, or {num_layers} for after the last"
                )
            if spec.replay:
                self._check_member(step, member, len(spec.replay[step]))

    def _check_member(self, step: int, member: int, width: int) -> None:
        if member >= width:
            raise SpecError(
                f"a hook is for member {member} of step {step}, whose set has {width}, counted "
                "from 0; replay sets to know how wide they are"
            )

    def _num_positions(self) -> int:
        """How many positions the run takes at least: one for each step, unless a replay says."""
        num_positions = self.num_prompt + self.num_steps
        if self.spec.replay and self.spec.positions == "sequential":
            num_positions = self.num_prompt + sum(map(len, self.spec.replay))
        for positions in self.spec.replay_positions or ():
            num_positions = max(num_positions, *(position + 1 for position in positions))
        return num_positions

    @property
    def num_new(self) -> int:
        """How many tokens the coming pass forwards."""
        return self.layout.end - self.layout.start

    @property
    def num_read(self) -> int:
        """How many of the new tokens need logits.

        The last token of a prompt does, and every member of a set. This includes readouts that use
        one member only: what is captured must not change the shape of the pass. The last set of a
        run needs none, unless logits are captured.
        """
        if self.layout.new_tokens_are_prompt():
            return int(self.layout.end == self.layout.num_prompt)
        return 0 if self.stop_reason and "logits" not in self.spec.capture else self.num_new

    @property
    def records_residual(self) -> bool:
        """Whether the residuals of the coming pass are captured."""
        return "residual" in self.spec.capture and not self.layout.new_tokens_are_prompt()

    def changes(self) -> Iterator[tuple[int, int, Change]]:
        """Layer, offset among the new tokens, and function of each hook in the coming pass."""
        layout = self.layout
        for (step, member, layer), change in self.hooks.items():
            if step < len(self.slots):
                slot = self.slots[step].start + member
                if layout.start <= slot < layout.end:
                    yield layer, slot - layout.start, change

    def _is_hooked(self, step: int) -> bool:
        """Whether a hook changes a member of this set."""
        return any(of_step == step for of_step, _, _ in self.hooks)

    @property
    def records_attention(self) -> bool:
        """Whether attention weights of the coming pass are captured, or decide what is pruned."""
        wanted = self.records_all_attention or "siblings" in self.spec.capture
        return wanted and not self.layout.new_tokens_are_prompt()

    @property
    def records_all_attention(self) -> bool:
        """Whether the weights of all slots are recorded, and not only those of siblings."""
        return "attention" in self.spec.capture or self.spec.prune_by == "attention"

    def fits(self, prefix: Prefix) -> bool:
        """Whether another run's pass over its prompt gave all that this run needs."""
        has_raw_keys = "kv" not in self.spec.capture or prefix.raw_keys is not None
        return prefix.prompt == self.prompt and has_raw_keys

    def begin_with(self, prefix: Prefix) -> None:
        """Start from a pass over the prompt, whose keys and values are now in this run's row.

        The pass was made for this run, or for another one with the same prompt.
        """
        self.prefix = prefix._replace(row=self.row)
        self.started = self.started or time.perf_counter()
        self.new_logits = prefix.logits
        if "kv" in self.spec.capture:
            assert prefix.raw_keys is not None
            self.raw_keys = [prefix.raw_keys]

    def step(self) -> bool:
        """Read the logits of a pass, then choose and append the sets of the next one.

        Returns True once the run is over.
        """
        assert self.new_logits is not None
        new_logits, self.new_logits = self.new_logits, None
        # -inf masks a token, which a model may do, unless it masks them all
        self._check_finite("logits", new_logits.amax(dim=-1))
        if self.slots:
            sets = self.slots[self.num_forwarded :]
        else:
            # of the prompt only the last token gives logits
            sets = [range(self.layout.start, self.layout.num_slots)[-1:]]
        self.num_forwarded = len(self.slots)
        attention, self.attention = self.attention, None
        residual, self.residual = self.residual, None
        if residual is not None:
            self._check_finite("residuals", torch.from_numpy(residual[-1]))
        if attention is not None and not len(new_logits):
            # without logits, weights of the last layer show whether the pass was finite
            self._check_finite("attention weights", torch.from_numpy(attention[-1]))
        parts = [new_logits]
        if len(new_logits):
            parts = new_logits.split([len(slots) for slots in sets])
        for slots, logits in zip(sets, parts, strict=True):
            if self.steps:
                self._record(slots, logits, attention, residual)
            if self.stop_reason:
                return True
            self._choose(logits, attention, len(sets))
        # the last set is forwarded only if something of that pass is captured or hooked
        is_needed = bool(self.spec.capture) or self._is_hooked(len(self.steps) - 1)
        return bool(self.stop_reason) and not is_needed

    def _check_finite(self, what: str, found: Tensor) -> None:
        if found.numel() and not all(map(math.isfinite, torch.aminmax(found))):
            where = f"after set {len(self.steps) - 1}" if self.steps else "after the prompt"
            raise ModelError(
                f"{self.lm.name} gave {what} that are not finite {where} of run {self.index} "
                f"(prompt {self.spec.prompt!r:.60}); {self._why_not_finite()}"
            )

    def _why_not_finite(self) -> str:
        """What made a pass give numbers that are not finite, and what to do about it."""
        lm = self.lm
        for name, weight in lm.model.named_parameters():
            if not bool(weight.isfinite().all()):
                return f"its weight {name} is not finite: the checkpoint is damaged, get it again"
        dtype = str(lm.dtype).removeprefix("torch.")
        wider = {"float16": "float32", "bfloat16": "float32", "float32": "float64"}.get(dtype)
        remedy = f"load it in {wider}" if wider else "look for a hook or a layer that makes them"
        return f"all its weights are finite and it runs in {dtype}, so that it overflows: {remedy}"

    def _record(
        self,
        slots: range,
        logits: Tensor,
        attention: np.ndarray | None,
        residual: np.ndarray | None,
    ) -> None:
        """Keep what the members of the last set gave in the pass that forwarded them.

        Args:
            slots: The slots of the set.
            logits: The members' logits, [w, V].
            attention: The weights of the whole pass, [L, H, w of the pass, N - first_column].
            residual: What its layers handed on, [L + 1, w of the pass, E].
        """
        if residual is not None:
            new = self.layout.start
            own = residual[:, slots.start - new : slots.stop - new]
            self.steps[-1]["residual"] = self._keep(own)
        if "logits" in self.spec.capture:
            kept = logits.float()
            if self.spool is None and kept.untyped_storage().nbytes() > kept.nbytes:
                kept = kept.clone()  # a view would hold the logits of all runs of the pass
            self.steps[-1]["logits"] = self._keep(kept.numpy())
        if attention is not None:
            new, first = self.layout.start, self.first_column
            own = attention[:, :, slots.start - new : slots.stop - new, : slots.stop - first]
            if "attention" in self.spec.capture:
                self.steps[-1]["attention"] = self._keep(own)
            if "siblings" in self.spec.capture:
                self.steps[-1]["siblings"] = self._keep(own[..., slots.start - first :])

    def _keep(self, array: np.ndarray) -> Any:
        return np.ascontiguousarray(array) if self.spool is None else self.spool.write(array)

    def _choose(self, logits: Tensor, attention: np.ndarray | None, num_sets: int) -> None:
        """Choose the next set from the logits [w, V] of the last one.

        It is appended, unless it is a replay's set that the pass just made has forwarded already.

        Args:
            logits: The logits of the last set's members, [w, V].
            attention: The weights of the pass just made, [L, H, w of the pass, N].
            num_sets: How many sets shared the pass just made.
        """
        k, spec, lm = len(self.steps), self.spec, self.lm
        probabilities = self.steps[-1]["probabilities"] if k else [1.0]
        distribution = read_out(logits, probabilities, spec.readout)
        if spec.replay:
            tokens = list(spec.replay[k])
            chosen = Selection(tokens, distribution[tokens].tolist(), [], False)
        else:
            eos = lm.eos_token_ids if spec.stop_at_eos else frozenset()
            chosen = select(distribution, **spec.rules(k, self.prompt), eos=eos)
        gone: list[int] = []
        if spec.readout == "mixture":
            before = self.lattice.log_weights.exp().numpy()
            given = spec.replay_links[k - 1] if k and spec.replay_links else None
            links = self.lattice.extend(logits, chosen.tokens, given)
            if k:
                self.steps[-1]["links"] = links.float().numpy()
            gone = self._prune(before, attention)
        if k == len(self.slots):
            self._append(chosen, gone)
        self.steps.append(
            {
                "tokens": chosen.tokens,
                "probabilities": chosen.probabilities,
                "position": self.layout.slot_position[self.slots[k].start],
                "slots": list(self.slots[k]),
                "texts": lm.token_texts(chosen.tokens),
                "ended": chosen.ended,
                "dropped": gone,
                "distribution": self._keep(distribution.numpy()),
                "seconds": self.pass_seconds / num_sets,
            }
        )
        if chosen.stops:
            self.stop_reason = "eos"
        elif k + 1 == self.num_steps:
            self.stop_reason = "replay" if spec.replay else "max_steps"

    def _prune(self, weights: np.ndarray, attention: np.ndarray | None) -> list[int]:
        """The slots that the set just chosen and all later ones may not see any more.

        Args:
            weights: Of the members of the set just forwarded, [w].
            attention: The weights of the pass that forwarded it, [L, H, w, N].
        """
        if self.spec.prune is None or not self.slots:
            return []
        if self.spec.prune_by == "posterior":
            first = self.layout.num_prompt - 1
            shares, sets = self.lattice.posterior.numpy(), self.slots
        else:
            # of what its own members give to the newest set, nothing tells which of them led on
            assert attention is not None
            first = self.first_column
            shares, sets = weights @ attention.mean(axis=(0, 1)), self.slots[:-1]
        gone: list[int] = []
        for slots in sets:
            of_set = shares[slots.start - first : slots.stop - first]
            seen = np.array([slot not in self.layout.dropped for slot in slots])
            gone += [slots[i] for i in dropped(of_set, seen, self.spec.prune)]
        return gone

    def _append(self, chosen: Selection, gone: Sequence[int]) -> None:
        """Give the chosen set its slots, from where the slots `gone` are not seen any more.

        The sets of a replay are known. They are all appended at once, so that they share one pass,
        unless how one is seen is known only once the set before it has been read.
        """
        start = self.layout.num_slots
        self.layout.dropped += gone
        if self.spec.weighting in BY_QUERY:
            self.layout.ancestors = self.lattice.ancestors
        self._append_set(chosen.tokens, chosen.probabilities)
        if self.spec.replay and not self.spec.goes_by_sets:
            # The last set is among them even if nothing of it is captured. What is captured must
            # not change the shape of the pass.
            for tokens in self.spec.replay[len(self.slots) :]:
                if self.layout.num_slots - start + len(tokens) > MAX_NEW_TOKENS:
                    break  # these sets are the next pass
                self._append_set(tokens, [1.0] * len(tokens))
        self.layout.start = start

    def _append_set(self, tokens: Sequence[int], probabilities: Sequence[float]) -> None:
        start = self.layout.num_slots
        self.layout.append_set(tokens, probabilities)
        self.slots.append(range(start, self.layout.num_slots))
        # a single token without a weight looks the same in every mode
        plain = len(self.slots[-1]) == 1 and not self.layout.slot_bias[start]
        spec, step = self.spec, len(self.slots) - 1
        mode = spec.visibility, spec.isolated_layers, spec.isolated_mass, spec.weighting_layers
        if self._is_hooked(step):
            for _, member, _ in (at for at in self.hooks if at[0] == step):
                self._check_member(step, member, len(tokens))
            # what a hook does is known to no other run, so from here on none shares a pass
            self._note(start, ("hooked", self.index))
        else:
            self._note(start, None if plain else mode)

    def _note(self, start: int, mode: object) -> None:
        """Add the slots from `start` on, and how they see each other, to the history."""
        layout = self.layout
        added = (
            layout.slot_token[start:],
            layout.slot_position[start:],
            layout.slot_bias[start:],
            layout.dropped,
            mode,
        )
        weights = b""
        if layout.ancestors is not None and not bool((layout.ancestors == 1).all()):
            weights = layout.ancestors.numpy().tobytes()
        self.history = hashlib.sha256(self.history + repr(added).encode() + weights).digest()

    def finish(self, cache: SlotCache) -> None:
        """Copy out what the next run in this row would overwrite."""
        late = max((step for step, _, _ in self.hooks), default=-1)
        if late >= len(self.slots):
            raise SpecError(
                f"a hook is for step {late}, and the run ended after {len(self.slots)} sets "
                f"({self.stop_reason}); stop_at_eos=False or a replay has all its steps"
            )
        self.seconds = time.perf_counter() - self.started
        if "kv" not in self.spec.capture:
            return
        held = slice(self.row, self.row + 1), slice(None), slice(0, self.layout.num_slots)
        for name in ("keys", "values"):
            of_layers = torch.cat([getattr(layer, name)[held] for layer in cache.layers])
            self.kv[name] = of_layers.float().cpu().numpy()
        self._check_finite("cached values", torch.from_numpy(self.kv["values"][-1]))
        self.kv["raw_keys"] = torch.cat(self.raw_keys, dim=2).float().cpu().numpy()

    def trace(self) -> Trace:
        """The trace of the finished run."""
        lm, layout = self.lm, self.layout
        widths = [len(step["tokens"]) for step in self.steps]
        steps = self.spool.read(self.steps) if self.spool else self.steps
        hooked = {"hooks": list(map(list, sorted(self.hooks)))} if self.hooks else {}
        return Trace(
            spec=self.spec,
            prompt_tokens=self.prompt,
            steps=[Step(**step) for step in steps],
            slot_token=np.array(layout.slot_token, dtype=np.int64),
            slot_position=np.array(layout.slot_position, dtype=np.int64),
            slot_step=slot_steps(self.num_prompt, widths),
            stop_reason=self.stop_reason,
            seconds=self.seconds,
            peak_bytes=sum(trace_bytes(lm, self.spec, self.num_prompt, widths).values()),
            provenance=lm.provenance() | hooked,
            prompt_texts=[lm.token_text(token) for token in self.prompt],
            **self.kv,
        )
