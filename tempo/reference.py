"""The oracle: TEMPO by brute force, one full forward pass a step, no cache and no batch.

It shares with the engine nothing but spec, selection and trace, so that it cannot inherit the
engine's mistakes. Every mask entry is decided by asking the definition for one pair of slots, and
transformers' own eager attention does the rest. docs/semantics.md states the definition.

Shapes: N slots, L layers, H query heads, Hkv key heads, w set width, D head size, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tempo.errors import ModelError
from tempo.models import LanguageModel
from tempo.selection import Selection, member_weights, read_out, select
from tempo.spec import (
    Capture,
    IsolatedMass,
    Positions,
    Prompt,
    Readout,
    RunSpec,
    Visibility,
    Weighting,
    spell_checked,
)
from tempo.trace import Step, Trace


class _Slot(NamedTuple):
    token: int
    position: int
    step: int  # -1 for the prompt
    set_id: int
    bias: float  # what the weighting adds to the attention logits of this key


@spell_checked
def generate(
    lm: LanguageModel,
    prompt: Prompt,
    *,
    threshold: float = 0.1,
    max_steps: int = 10,
    visibility: Visibility = "isolated",
    positions: Positions = "shared",
    readout: Readout = "mixture",
    weighting: Weighting = "none",
    max_width: int | None = None,
    stop_at_eos: bool = True,
    replay: Sequence[Sequence[int]] | Trace | None = None,
    replay_positions: Sequence[Sequence[int]] | None = None,
    replay_weights: Sequence[Sequence[float]] | None = None,
    isolated_layers: tuple[int, int] | None = None,
    isolated_mass: IsolatedMass = "spread",
    capture: Capture | Iterable[Capture] = (),
) -> Trace:
    """The trace that `tempo.generate` gives, to rounding, by brute force.

    It has no cache, no batch and no attention function of tempo's. It is slow: one forward pass
    over all slots a step. Use it to check the engine on a model of your own.

    Args:
        lm: The model, from `load_model` or `wrap_model`.
        prompt: Text, or token ids in any form that a tokenizer or `lm.chat` returns: a list, an
            array or tensor [P] or [1, P], a list of one list, or a mapping with `input_ids`.
        threshold: Every token with at least this probability joins the set; above 0, at most 1.
            If no token reaches it, the most probable one joins alone.
        max_steps: A free run generates at most this many sets. A replay runs all its sets.
        visibility: Which siblings a sibling attends to: none (`isolated`), all (`visible`), or
            those in earlier slots (`causal`).
        positions: One rotary position for a whole set (`shared`), or the next position for each
            token (`sequential`, the control).
        readout: How the members' logits become the one next distribution: the mixture of their
            softmaxes by probability (`mixture`), the softmax of their mean (`mean_logits`), or
            the softmax of one member (`last`, `first`).
        weighting: What is added to the attention logits of keys in sets wider than one: nothing
            (`none`), -log n for n members (`count`), or the log of the member's share
            (`probability`).
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
        isolated_layers: The layers (first, end), end excluded, in which siblings are isolated
            whatever `visibility` says.
        isolated_mass: Where a sibling's attention goes in those layers: to all it still sees
            (`spread`), or to itself (`self`: its own key counts for all n members, +log n).
        capture: What to record beside the sets, one name or several: "attention" [L, H, w, N],
            "siblings" (the set's own columns of attention, [L, H, w, w]), "logits" [w, V], "kv"
            (keys and values [L, Hkv, N, D]).

    Returns:
        A `Trace` with the arrays that `capture` names, in the shapes of `tempo.generate`. Its
        provenance says `oracle`, and its `peak_bytes` is 0.

    Raises:
        SpecError: if a setting is unknown or cannot be run.
        ModelError: if "kv" is captured and the model's keys cannot be read before rotation.

    Example:
        >>> import tempo
        >>> lm = tempo.load_model("tiny")
        >>> exact = tempo.reference.generate(lm, "The cat", threshold=0.05, max_steps=3)
        >>> exact.sets == tempo.generate(lm, "The cat", threshold=0.05, max_steps=3).sets
        True
    """
    settings: dict[str, Any] = {
        "prompt": prompt,
        "threshold": threshold,
        "max_steps": max_steps,
        "visibility": visibility,
        "positions": positions,
        "readout": readout,
        "weighting": weighting,
        "max_width": max_width,
        "stop_at_eos": stop_at_eos,
        "replay": replay,
        "replay_positions": replay_positions,
        "replay_weights": replay_weights,
        "isolated_layers": isolated_layers,
        "isolated_mass": isolated_mass,
        "capture": capture,
    }
    spec, began = RunSpec(**settings), time.perf_counter()
    prompt_tokens = lm.encode(spec.prompt)
    slots = [_Slot(token, i, -1, i, 0.0) for i, token in enumerate(prompt_tokens)]
    steps: list[dict[str, Any]] = []
    read, probabilities, stop_reason = [len(slots) - 1], [1.0], ""
    num_steps = len(spec.replay) if spec.replay else spec.max_steps
    while not stop_reason:
        k = len(steps)
        output = _full_forward(lm, spec, slots)
        _record(steps, output, read, spec)
        distribution = read_out(output.logits[read], probabilities, spec.readout)
        if spec.replay:
            forced = list(spec.replay[k])
            chosen = Selection(forced, distribution[forced].tolist(), [], False)
        else:
            eos = lm.eos_token_ids if spec.stop_at_eos else frozenset()
            chosen = select(distribution, spec.threshold, spec.max_width, eos)
        probabilities = chosen.probabilities
        read = list(range(len(slots), len(slots) + len(chosen.tokens)))
        slots += _new_slots(spec, chosen, k, len(prompt_tokens), len(slots))
        steps.append(
            {
                "tokens": chosen.tokens,
                "probabilities": probabilities,
                "position": slots[read[0]].position,
                "slots": read,
                "texts": [lm.token_text(token) for token in chosen.tokens],
                "ended": chosen.ended,
                "distribution": distribution.numpy(),
            }
        )
        if chosen.stops or k + 1 == num_steps:
            stop_reason = "eos" if chosen.stops else "replay" if spec.replay else "max_steps"
    output = _full_forward(lm, spec, slots)
    _record(steps, output, read, spec)
    return Trace(
        spec=spec,
        prompt_tokens=prompt_tokens,
        steps=[Step(**step) for step in steps],
        slot_token=np.array([slot.token for slot in slots]),
        slot_position=np.array([slot.position for slot in slots]),
        slot_step=np.array([slot.step for slot in slots]),
        stop_reason=stop_reason,
        seconds=time.perf_counter() - began,
        peak_bytes=0,
        provenance=lm.provenance() | {"oracle": True},
        **output.kv,
    )


def _new_slots(
    spec: RunSpec, chosen: Selection, step: int, num_prompt: int, num_slots: int
) -> list[_Slot]:
    """The slots of one set: their positions, and what `weighting` adds to their keys."""
    slots = []
    for i, token in enumerate(chosen.tokens):
        position = num_prompt + step if spec.positions == "shared" else num_slots + i
        if spec.replay_positions:
            position = spec.replay_positions[step][i]
        bias = 0.0
        if spec.replay_weights:
            bias = math.log(spec.replay_weights[step][i])
        elif len(chosen.tokens) > 1 and spec.weighting == "count":
            bias = -math.log(len(chosen.tokens))
        elif len(chosen.tokens) > 1 and spec.weighting == "probability":
            bias = math.log(float(member_weights(chosen.probabilities)[i]))
        slots.append(_Slot(token, position, step, num_prompt + step, bias))
    return slots


def _may_attend(
    query: int, key: int, slots: Sequence[_Slot], visibility: str, window: int | None
) -> bool:
    """Whether slot `query` attends to slot `key`."""
    if window is not None and slots[query].position - slots[key].position >= window:
        return False
    if slots[key].set_id < slots[query].set_id or key == query:
        return True
    same_set = slots[key].set_id == slots[query].set_id
    return same_set and (visibility == "visible" or (visibility == "causal" and key < query))


def _bias(query: int, key: int, slots: Sequence[_Slot], visibility: str) -> float:
    """What is added to the attention logit of an allowed pair of slots.

    Later queries get it, and the key's own set only if its members all see each other.
    """
    later = slots[key].set_id < slots[query].set_id
    return slots[key].bias if later or visibility == "visible" else 0.0


def _isolates(spec: RunSpec, layer: int) -> bool:
    """Whether this layer isolates siblings whatever the visibility is."""
    return (
        spec.isolated_layers is not None
        and spec.isolated_layers[0] <= layer < spec.isolated_layers[1]
    )


def _mask(
    slots: Sequence[_Slot], spec: RunSpec, isolates: bool, window: int | None, dtype: torch.dtype
) -> Tensor:
    """The additive mask [1, 1, N, N] of a layer, pair by pair."""
    visibility = "isolated" if isolates else spec.visibility

    def entry(query: int, key: int) -> float:
        if _may_attend(query, key, slots, visibility, window):
            return _bias(query, key, slots, visibility)
        return -math.inf

    num_slots = len(slots)
    rows = [[entry(query, key) for key in range(num_slots)] for query in range(num_slots)]
    if isolates and spec.isolated_mass == "self":
        for query, slot in enumerate(slots):
            rows[query][query] += math.log(sum(other.set_id == slot.set_id for other in slots))
    return torch.tensor(rows, dtype=dtype)[None, None]


class _Output(NamedTuple):
    logits: Tensor  # [N, V]
    attention: np.ndarray | None  # [L, H, N, N]
    kv: dict[str, np.ndarray]  # keys, values, raw_keys [L, Hkv, N, D], if captured


@torch.inference_mode()
def _full_forward(lm: LanguageModel, spec: RunSpec, slots: Sequence[_Slot]) -> _Output:
    """Every slot from scratch, by eager attention under an explicit mask and positions."""
    kinds = [(_isolates(spec, layer), window) for layer, window in enumerate(lm.layer_windows)]
    made = {kind: _mask(slots, spec, *kind, lm.dtype).to(lm.device) for kind in set(kinds)}
    masks = [made[kind] for kind in kinds]
    cache: Any = DynamicCache()  # new for each pass, read afterwards and thrown away
    wanted = "attention" in spec.capture or "siblings" in spec.capture
    with ExitStack() as stack:
        stack.enter_context(_eager(lm))
        if any(lm.layer_windows) or spec.isolated_layers:
            stack.enter_context(_masks_by_layer(lm, masks))
        raw = stack.enter_context(_raw_keys(lm)) if "kv" in spec.capture else None
        output = lm.model(
            input_ids=torch.tensor([[slot.token for slot in slots]], device=lm.device),
            position_ids=torch.tensor([[slot.position for slot in slots]], device=lm.device),
            attention_mask=masks[0],
            use_cache=True,
            output_attentions=wanted,
            **{lm.cache_keyword: cache},
        )
    logits, attention = output.logits[0], None
    if logits.dtype != torch.float64:
        logits = logits.float()
    if wanted:
        attention = torch.cat([weights.float().cpu() for weights in output.attentions]).numpy()
    kv = {} if raw is None else {"raw_keys": torch.cat(raw).numpy(), **_cached(cache)}
    return _Output(logits.cpu(), attention, kv)


def _cached(cache: Any) -> dict[str, np.ndarray]:
    layers = {
        name: [getattr(layer, name).float().cpu() for layer in cache.layers]
        for name in ("keys", "values")
    }
    return {name: torch.cat(tensors).numpy() for name, tensors in layers.items()}


def _record(steps: list[dict[str, Any]], output: _Output, slots: list[int], spec: RunSpec) -> None:
    """Keep what the members of the last set gave in this pass."""
    if not steps:
        return
    if "logits" in spec.capture:
        steps[-1]["logits"] = output.logits[slots].float().numpy()
    if "attention" in spec.capture and output.attention is not None:
        steps[-1]["attention"] = output.attention[:, :, slots]
    if "siblings" in spec.capture and output.attention is not None:
        steps[-1]["siblings"] = output.attention[:, :, slots][..., slots]


@contextmanager
def _eager(lm: LanguageModel) -> Iterator[None]:
    before: Any = lm.model.config._attn_implementation
    lm.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        lm.model.set_attn_implementation(before)


def _self_attention(lm: LanguageModel) -> list[Any]:
    """The model's attention modules by layer, found by what transformers calls them."""
    found: list[Any] = [
        m
        for m in lm.model.modules()
        if hasattr(m, "layer_idx") and type(m).__name__.endswith("Attention")
    ]
    return sorted(found, key=lambda module: module.layer_idx)


@contextmanager
def _masks_by_layer(lm: LanguageModel, masks: Sequence[Tensor]) -> Iterator[None]:
    """Give each layer its own mask: a ready-made 4-D mask bypasses transformers' windows."""

    def replace(
        module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs | {"attention_mask": masks[module.layer_idx]}

    handles = [m.register_forward_pre_hook(replace, with_kwargs=True) for m in _self_attention(lm)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _raw_keys(lm: LanguageModel) -> Iterator[list[Tensor]]:
    """The keys [1, Hkv, N, D] of each layer, as the projection or the norm after it gives them."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if output.dim() == 3:  # a projection: heads side by side
            output = output.unflatten(-1, (lm.num_key_value_heads, lm.head_dim)).transpose(1, 2)
        elif output.shape[1] != lm.num_key_value_heads:
            # a norm that comes before heads and slots change places
            output = output.transpose(1, 2)
        found.append(output.float().cpu())

    handles = []
    for module in _self_attention(lm):
        source = getattr(module, "k_norm", None) or getattr(module, "k_proj", None)
        if source is None:
            raise ModelError(
                f"the oracle finds no k_proj in {type(module).__name__}; leave 'kv' out of capture"
            )
        handles.append(source.register_forward_hook(keep))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
