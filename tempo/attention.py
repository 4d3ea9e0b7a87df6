"""The attention function registered with transformers, and what one packed forward pass tells it.

One forward pass carries the new tokens of many runs, packed into one row, so that a linear layer sees exactly as many
tokens as there are and no padding. Only here is the pack undone: queries are laid out by run, and attend to the
slots of their own run under the run's mask.

Shapes: T packed tokens, R cache rows (one a run), w widest set of the pass, N slots, H query heads, Hkv key heads,
G = H / Hkv, D head size, V value size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from tempo.errors import ModelError
from tempo.support import attention_implementations

NAME = "tempo"

# Keyword arguments that models pass on to every attention function and that change nothing here: positions and masks
# come from `PassContext`, inference has no dropout, and the rest asks for outputs that capture provides.
HARMLESS = frozenset(
    {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "dropout", "is_causal",
     "position_embeddings", "return_dict", "cache", "past_key_values", "past_key_value", "output_router_logits"}
)  # fmt: skip


# How many products of queries and keys may wait for their softmax: about what a processor's cache holds.
WAITING = 2**18


class AttentionCall(NamedTuple):
    """One call of the attention function in a forward pass, as seen when the model was loaded."""

    module: nn.Module
    layer: int
    window: int | None  # keys this many positions back, or more, are hidden
    num_heads: int
    num_key_value_heads: int
    key_size: int
    value_size: int


@dataclass
class Recording:
    """Where a pass leaves its attention weights: each run's own array, or one for all if it is but what sets give themselves.

    A layer costs one product; softmax and copying are done for several layers at once, which is what makes recording cheap.
    """

    parts: Sequence[tuple[int, np.ndarray]]  # cache row, and [L, H, w, N] float32 of its run
    own: np.ndarray | None  # [L, R, H, w, w] float32, if no run records more
    own_slots: Tensor  # [R, w] slots of the pass's own tokens
    _products: list[Tensor] = field(
        default_factory=list
    )  # [R, Hkv, G*w, N] of the layers that wait
    _scale: float = 1.0  # what these layers have in common
    _mask: Tensor | None = None
    _num_kept: int = 0  # layers whose weights are where they belong

    def take(self, query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> None:
        """Keep the next layer's weights, the softmax of scale * query key + mask."""
        wide = torch.promote_types(query.dtype, torch.float32)
        product = query.to(wide) @ key.to(wide).transpose(-1, -2)
        if self._products and (product.shape, scale, id(mask)) != (
            self._products[0].shape,
            self._scale,
            id(self._mask),
        ):
            self.flush()
        self._scale, self._mask = scale, mask
        self._products.append(product)
        if len(self._products) * product.numel() >= WAITING:
            self.flush()

    def take_weights(self, weights: Tensor) -> None:
        """Keep the next layer's weights [R, Hkv, G*w, N]."""
        self.flush()
        self._keep(weights[None])

    def flush(self) -> None:
        """Put the weights of all layers that have been taken where they belong."""
        if self._products:
            scores = (
                torch.stack(self._products) if len(self._products) > 1 else self._products[0][None]
            ).mul_(self._scale)
            self._products.clear()
            self._keep(
                torch.softmax(scores if self._mask is None else scores.add_(self._mask), dim=-1)
            )

    def _keep(self, weights: Tensor) -> None:
        num_layers, num_rows, _, _, num_slots = weights.shape
        layers = slice(self._num_kept, self._num_kept + num_layers)
        self._num_kept = layers.stop
        width = self.own_slots.shape[1]
        weights = weights.reshape(num_layers, num_rows, -1, width, num_slots)
        if self.own is not None:
            self.own[layers] = (
                weights.gather(-1, self.own_slots[:, None, None].expand(*weights.shape[:4], width))
                .cpu()
                .numpy()
            )
            return
        kept = weights.cpu().numpy()
        for row, part in self.parts:
            part[layers] = kept[:, row, :, : part.shape[2], : part.shape[3]]


@dataclass
class PassContext:
    """What one forward pass means: which run, slot and position each packed token has, and who may see whom."""

    rows: Tensor  # [T] cache row of each token
    offsets: Tensor  # [T] index of each token among those its run appends in this pass
    slots: Tensor  # [T] slot each token is written to
    allowed: Tensor  # [R, w, N] bool, query by key
    bias: Tensor | None  # [R, w, N] float32, added to the attention logits of allowed keys
    expected: Sequence[
        AttentionCall
    ]  # the attention calls of the pass, as the model made them when it was loaded
    query_positions: Tensor | None = None  # [R, w], where a layer has a window
    slot_positions: Tensor | None = None  # [R, N], where a layer has a window
    isolated: Tensor | None = None  # [R, w, N] bool, `allowed` in the layers that isolate siblings
    isolated_bias: Tensor | None = None  # [R, w, N], `bias` there
    isolated_layers: Mapping[int, tuple[int, int]] = field(
        default_factory=dict
    )  # of each row that has some: first, end
    only: range | None = None  # slots of the tokens, if there is but one row
    copies: tuple[Tensor, Tensor, Tensor] | None = (
        None  # rows and slots that also hold a packed token, and which it is
    )
    recording: Recording | None = None
    num_calls: int = 0  # made so far
    _masks: dict[tuple, Tensor] = field(default_factory=dict)

    @property
    def num_slots(self) -> int:
        return self.allowed.shape[-1]

    def take_call(
        self, module: nn.Module, sliding_window: int | None
    ) -> tuple[int, int | None, bool]:
        """Layer and window of the next call, and whether it is the first of its layer; ModelError if it was not expected."""
        index, self.num_calls = self.num_calls, self.num_calls + 1
        known = self.expected[index] if index < len(self.expected) else None
        if (
            known is None
            or known.module is not module
            or (known.window and sliding_window not in (None, known.window))
        ):
            raise ModelError(
                f"attention call {index} of a pass came from {type(module).__name__} with window {sliding_window}, at load it was "
                f"{known and (type(known.module).__name__, known.window)}; the model has changed since: load or wrap it again"
            )
        # a layer may ask several times with the same queries and keys (differential attention): its weights are one set
        return (
            known.layer,
            known.window,
            index == 0 or self.expected[index - 1].layer != known.layer,
        )

    def mask(
        self, layer: int, window: int | None, groups: int, dtype: torch.dtype
    ) -> Tensor | None:
        """The mask of one layer, [R, 1, G*w, N], the same for each of the G query heads that share a key head.

        Additive in `dtype`: the bias, or 0, where a query may attend, else -inf. None for a single token that sees all there
        is. A window counts positions, not slots.
        """
        if self.only is not None and len(self.only) == 1 and self.bias is None and window is None:
            return None
        inside = tuple(
            row for row, (first, end) in self.isolated_layers.items() if first <= layer < end
        )
        key = (inside, window, groups, dtype)
        if key not in self._masks:
            allowed, bias = self.allowed, self.bias
            if inside:
                assert self.isolated is not None
                allowed = allowed.index_copy(
                    0, (rows := torch.tensor(inside, device=allowed.device)), self.isolated[rows]
                )
                if bias is not None and self.isolated_bias is not None:
                    bias = bias.index_copy(0, rows, self.isolated_bias[rows])
            if window is not None:
                assert self.query_positions is not None
                assert self.slot_positions is not None
                distance = self.query_positions[:, :, None] - self.slot_positions[:, None, :]
                allowed = allowed & (distance < window)
            added = torch.zeros_like(allowed, dtype=dtype) if bias is None else bias.to(dtype)
            self._masks[key] = (
                added.masked_fill(~allowed, -torch.inf).repeat(1, groups, 1).unsqueeze(1)
            )
        return self._masks[key]


def tempo_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [R, Hkv, N, D], rotated and cached
    value: Tensor,  # [R, Hkv, N, V]
    attention_mask: Tensor
    | None,  # a placeholder that stops transformers from making one of its own
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor
    | None = None,  # [H] attention sinks: a logit in the softmax's sum without a value
    tempo_pass: PassContext | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention outputs [1, T, H, V] of the packed queries, each over the slots its run allows it."""
    if tempo_pass is None:
        raise ModelError(
            f"{type(module).__name__} does not pass keyword arguments on to its attention function, so tempo's masks "
            "would never arrive; use a model of transformers whose attention goes through AttentionInterface"
        )
    unknown = sorted(
        name for name, given in kwargs.items() if given is not None and name not in HARMLESS
    )
    if unknown:
        raise ModelError(
            f"{type(module).__name__} passes {', '.join(unknown)} to its attention function, which tempo does not know; "
            "ignoring it could be silently wrong, so this model is refused"
        )
    num_rows, num_key_heads, _, head_size = key.shape
    num_heads, (_, width, _) = query.shape[1], tempo_pass.allowed.shape
    groups = num_heads // num_key_heads
    if tempo_pass.only is None:
        padded = query.new_zeros(num_rows, width, num_heads, head_size)
        padded[tempo_pass.rows, tempo_pass.offsets] = query[0].transpose(0, 1)
        padded = padded.transpose(1, 2)
    else:
        padded = query  # one row needs no layout
    # the G heads that share keys become extra queries, so that keys are read once and never repeated
    grouped = padded.reshape(num_rows, num_key_heads, groups * width, head_size)
    layer, window, is_first = tempo_pass.take_call(module, sliding_window)
    mask = tempo_pass.mask(layer, window, groups, query.dtype)
    scale = head_size**-0.5 if scaling is None else scaling
    recording = tempo_pass.recording if is_first else None
    if softcap is None and s_aux is None:
        output = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
        if recording is not None:
            recording.take(grouped, key, scale, mask)
    else:
        weights = _weights(grouped, key, mask, scale, softcap, s_aux)
        output = weights.to(value.dtype) @ value
        if recording is not None:
            recording.take_weights(weights)
    output = output.reshape(num_rows, num_heads, width, -1).transpose(1, 2)
    if tempo_pass.only is None:
        output = output[tempo_pass.rows, tempo_pass.offsets].unsqueeze(0)
    return output, None


def _weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Softmax weights [R, Hkv, G*w, N] in float32 at least; a forbidden entry is exactly 0."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(wide) @ key.to(wide).transpose(-1, -2)).mul_(scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores.add_(mask)
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    num_key_heads, rows = scores.shape[1], scores.shape[2]
    groups = sinks.numel() // num_key_heads
    sink = (
        sinks.to(wide).view(1, num_key_heads, groups, 1).repeat_interleave(rows // groups, dim=-1)
    )
    sink = sink.reshape(1, num_key_heads, rows, 1).expand(scores.shape[0], -1, -1, -1)
    return torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]


@contextmanager
def installed(model: PreTrainedModel, name: str = NAME) -> Iterator[None]:
    """Within the block the model's attention is the one registered as `name`; afterwards it is what it was."""
    before = attention_implementations(model)
    model.set_attn_implementation(name)
    try:
        if model.config._attn_implementation != name:
            raise ModelError(
                f"{type(model).__name__} does not let its attention be replaced (its source never asks transformers' "
                "AttentionInterface); use an architecture that does, such as Llama, Qwen, Mistral or Gemma"
            )
        yield
    finally:
        model.set_attn_implementation(before)


AttentionInterface.register(NAME, tempo_attention)
# Without a mask function of the same name transformers would prepare none and the model would run non-causally.
AttentionMaskInterface.register(NAME, sdpa_mask)
