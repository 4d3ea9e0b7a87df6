"""The oracle: the semantics of TEMPO by brute force, one full forward pass a step, no cache and no batch.

It shares with the engine nothing but spec, selection and trace, so that it cannot inherit the engine's mistakes: every
mask entry is decided by asking the definition for one pair of slots, and transformers' own eager attention does the rest.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tempo.errors import ModelError
from tempo.models import LanguageModel
from tempo.selection import Selection, member_weights, read_out, select
from tempo.spec import RunSpec
from tempo.trace import Step, Trace


class _Slot(NamedTuple):
    token: int
    position: int
    step: int  # -1 for the prompt
    set_id: int
    bias: float  # what the weighting adds to the attention logits of this key


def generate(lm: LanguageModel, prompt: str | Sequence[int], **settings: Any) -> Trace:
    """The same trace as `tempo.generate`, to rounding, computed without cache, batch or custom attention."""
    settings["prompt"] = prompt
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
    """The slots of one set, by design semantics 3 (positions) and 8 (weighting)."""
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
    """Whether slot `query` attends to slot `key` (design semantics 4)."""
    if window is not None and slots[query].position - slots[key].position >= window:
        return False
    if slots[key].set_id < slots[query].set_id or key == query:
        return True
    same_set = slots[key].set_id == slots[query].set_id
    return same_set and (visibility == "visible" or (visibility == "causal" and key < query))


def _bias(query: int, key: int, slots: Sequence[_Slot], visibility: str) -> float:
    """What is added to the logit of an allowed pair: for later queries, and the own set only if all is visible."""
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
    rows = [
        [
            _bias(query, key, slots, visibility)
            if _may_attend(query, key, slots, visibility, window)
            else -math.inf
            for key in range(len(slots))
        ]
        for query in range(len(slots))
    ]
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
    """Every slot from scratch, by transformers' eager attention under an explicit mask and explicit positions."""
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
    weights = output.attentions if wanted else None
    return _Output(
        logits=output.logits[0].cpu()
        if output.logits.dtype == torch.float64
        else output.logits[0].float().cpu(),
        attention=None
        if weights is None
        else torch.cat([w.float().cpu() for w in weights]).numpy(),
        kv={} if raw is None else {"raw_keys": torch.cat(raw).numpy(), **_cached(cache)},
    )


def _cached(cache: Any) -> dict[str, np.ndarray]:
    layers = {
        name: [getattr(layer, name).float().cpu() for layer in cache.layers]
        for name in ("keys", "values")
    }
    return {name: torch.cat(tensors).numpy() for name, tensors in layers.items()}


def _record(steps: list[dict[str, Any]], output: _Output, slots: list[int], spec: RunSpec) -> None:
    """What the last set's members themselves gave in this pass."""
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
    """A ready-made 4-D mask bypasses the sliding window of transformers, so each layer gets its own."""

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
    """Keys as the projection (or the norm after it) gives them, [1, Hkv, N, D] a layer."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if output.dim() == 3:  # a projection: heads side by side
            output = output.unflatten(-1, (lm.num_key_value_heads, lm.head_dim)).transpose(1, 2)
        elif (
            output.shape[1] != lm.num_key_value_heads
        ):  # a norm before heads and slots change places
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
