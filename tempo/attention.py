"""The attention function registered with transformers, and what one packed forward pass tells it.

One forward pass carries the new tokens of many runs, packed into one row without padding. So a
linear layer processes exactly as many tokens as there are. Only the attention function undoes the
packing: it lays queries out by run, and each attends to the slots of its own run under its mask.

Shapes: T packed tokens, R rows of the pass (one for each run), w widest set of the pass, N slots,
L layers, H query heads, Hkv key heads, G = H / Hkv, D head size, V value size.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from tempo.errors import ModelError
from tempo.support import attention_implementations

NAME = "tempo"

# Keyword arguments that models pass to every attention function and that change nothing here.
# Positions and masks come from `PassContext`, inference has no dropout, and the others ask for
# outputs that capture provides.
HARMLESS = frozenset(
    {
        "cache",
        "cache_position",
        "dropout",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_value",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)

# How many products of queries and keys may wait for their softmax: about what the cache of a
# processor holds.
WAITING = 2**18


class AttentionCall(NamedTuple):
    """One call of the attention function in a forward pass, as seen when the model was loaded.

    Attributes:
        module: The module that made the call.
        layer: The number of the layer, from 0.
        window: Keys this many positions back, or more, are hidden. None if there is no window.
        num_heads: H, the number of query heads.
        num_key_value_heads: Hkv, the number of key heads.
        key_size: D, the size of a key.
        value_size: V, the size of a value.
        forms_weights: Whether all weights are in memory at once: torch has no fused attention for
            caps, sinks, and values of another size than keys.
        has_sinks: Whether sinks take a part of each row, so that its weights need not sum to one.
    """

    module: nn.Module
    layer: int
    window: int | None
    num_heads: int
    num_key_value_heads: int
    key_size: int
    value_size: int
    forms_weights: bool = False
    has_sinks: bool = False


@dataclass
class Recording:
    """Where a pass leaves its attention weights.

    A layer costs one product. Softmax and copying are done for several layers at once, which is
    what makes recording cheap.

    Attributes:
        parts: The row of each run that records, and its array [L, H, w, N] float32.
        own: One array [L, R, H, w, c] float32 for all runs, instead of `parts`. It takes only the
            weights that the pass's own tokens give each other.
        own_slots: The slots of the pass's own tokens, [R, c]. They are w, and more if the pass is
            the later part of a set.
        width: w, the most tokens of one run.
    """

    parts: Sequence[tuple[int, np.ndarray]]
    own: np.ndarray | None
    own_slots: Tensor
    width: int
    # [R, Hkv, G*w, N] of the layers that wait for their softmax
    _products: list[Tensor] = field(default_factory=list)
    # the scale and the mask of all layers that wait
    _scale: float = 1.0
    _mask: Tensor | None = None
    # layers whose weights are in their array
    _num_kept: int = 0

    def take(self, query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> None:
        """Record the next layer's weights, the softmax of scale * query key + mask."""
        wide = torch.promote_types(query.dtype, torch.float32)
        product = query.to(wide) @ key.to(wide).transpose(-1, -2)
        if self._products:
            # only layers of one shape, scale and mask share a softmax
            waiting = self._products[0].shape, self._scale, id(self._mask)
            if waiting != (product.shape, scale, id(mask)):
                self.flush()
        self._scale, self._mask = scale, mask
        self._products.append(product)
        if len(self._products) * product.numel() >= WAITING:
            self.flush()

    def take_weights(self, weights: Tensor) -> None:
        """Record the next layer's weights [R, Hkv, G*w, N] as they are."""
        self.flush()
        self._keep(weights[None])

    def flush(self) -> None:
        """Write the weights of all layers that wait to their arrays."""
        if not self._products:
            return
        products = self._products
        scores = torch.stack(products) if len(products) > 1 else products[0][None]
        products.clear()
        scores.mul_(self._scale)
        if self._mask is not None:
            scores.add_(self._mask)
        self._keep(torch.softmax(scores, dim=-1))

    def _keep(self, weights: Tensor) -> None:
        """Write the weights [layers, R, Hkv, G*w, N] of the next layers to their arrays."""
        num_layers, num_rows, _, _, num_slots = weights.shape
        layers = slice(self._num_kept, self._num_kept + num_layers)
        self._num_kept = layers.stop
        weights = weights.reshape(num_layers, num_rows, -1, self.width, num_slots)
        if self.own is not None:
            columns = self.own_slots[:, None, None].expand(*weights.shape[:4], -1)
            self.own[layers] = weights.gather(-1, columns).cpu().numpy()
            return
        kept = weights.cpu().numpy()
        for row, part in self.parts:
            part[layers] = kept[:, row, :, : part.shape[2], : part.shape[3]]


@dataclass
class PassContext:
    """What one forward pass means: each packed token's run and slot, and who may see whom.

    Attributes:
        rows: [T], the row of the pass that each token belongs to.
        offsets: [T], the index of each token among those that its run appends in this pass.
        slots: [T], the slot that each token is written to.
        allowed: [R, w, N] bool, which slots a query may attend to.
        bias: [R, w, N] float64, added to the attention logits of allowed keys. None adds nothing.
        expected: The attention calls of the pass, as the model made them when it was loaded.
        query_positions: [R, w], given if a layer has a window.
        slot_positions: [R, N], given if a layer has a window.
        isolated: [R, w, N] bool, `allowed` in the layers that isolate siblings.
        isolated_bias: [R, w, N] float64, `bias` in these layers.
        isolated_layers: The first of these layers and the one after the last, by row.
        weighted_layers: The first layer in which `bias` counts and the one after the last, by row;
            a row without them is weighted in all layers.
        only: The slots of the tokens, if there is only one row.
        is_unmasked: Whether the pass has a single token, which may attend to every slot, and
            nothing is added.
        copies: Cache rows and slots that also hold a packed token, and which token it is.
        held: The rows of the cache that the rows of the pass are. A slice copies nothing.
        recording: Where attention weights go. None if no run records any.
        num_calls: How many attention calls were made so far.
    """

    rows: Tensor
    offsets: Tensor
    slots: Tensor
    allowed: Tensor
    bias: Tensor | None
    expected: Sequence[AttentionCall]
    query_positions: Tensor | None = None
    slot_positions: Tensor | None = None
    isolated: Tensor | None = None
    isolated_bias: Tensor | None = None
    isolated_layers: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    weighted_layers: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    only: range | None = None
    is_unmasked: bool = False
    copies: tuple[Tensor, Tensor, Tensor] | None = None
    held: slice | Tensor = field(default_factory=lambda: slice(None))
    recording: Recording | None = None
    num_calls: int = 0
    _masks: dict[tuple, Tensor] = field(default_factory=dict)

    @property
    def num_slots(self) -> int:
        """N, the number of slots in use once the pass is done."""
        return self.allowed.shape[-1]

    @property
    def cache_rows(self) -> Tensor:
        """[T], the row of the cache that each token is written to."""
        if isinstance(self.held, slice):
            return self.rows + (self.held.start or 0)
        return self.held[self.rows]

    def take_call(
        self, module: nn.Module, sliding_window: int | None
    ) -> tuple[int, int | None, bool]:
        """Layer and window of the next call, and whether it is the first call of its layer.

        Raises:
            ModelError: if the model did not make this call when it was loaded.
        """
        index, self.num_calls = self.num_calls, self.num_calls + 1
        known = self.expected[index] if index < len(self.expected) else None
        if (
            known is None
            or known.module is not module
            or (known.window and sliding_window not in (None, known.window))
        ):
            if known is None:
                at_load = "there was no such call"
            else:
                at_load = f"it was {type(known.module).__name__} with window {known.window}"
            raise ModelError(
                f"attention call {index} of a pass came from {type(module).__name__} with window "
                f"{sliding_window}, at load {at_load}; the model has changed since: load or wrap "
                "it again"
            )
        # A layer may call several times with the same queries and keys (differential attention).
        # Its weights are recorded once.
        is_first = index == 0 or self.expected[index - 1].layer != known.layer
        return known.layer, known.window, is_first

    def mask(
        self, layer: int, window: int | None, groups: int, dtype: torch.dtype
    ) -> Tensor | None:
        """The additive mask of one layer, [R, 1, G*w, N] in `dtype`.

        It holds the bias, or 0, where a query may attend, and -inf elsewhere. The G query heads
        that share a key head have the same mask. None stands for a single token that may attend to
        every slot.

        Args:
            layer: The number of the layer, from 0.
            window: The layer's window, counted in positions, not slots.
            groups: G, the number of query heads that share a key head.
            dtype: Of the mask.
        """
        if self.is_unmasked and window is None:
            return None
        isolating = tuple(
            row for row, (first, end) in self.isolated_layers.items() if first <= layer < end
        )
        plain = tuple(
            row for row, (first, end) in self.weighted_layers.items() if not first <= layer < end
        )
        key = isolating, plain, window, groups, dtype
        if key not in self._masks:
            self._masks[key] = self._make_mask(isolating, plain, window, groups, dtype)
        return self._masks[key]

    def _make_mask(
        self,
        isolating: Sequence[int],
        plain: Sequence[int],
        window: int | None,
        groups: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """The mask [R, 1, G*w, N] of a layer.

        The rows `isolating` isolate siblings in it. To the rows `plain` nothing is added.
        """
        allowed, bias = self.allowed, self.bias
        if plain and bias is not None:
            bias = bias.index_fill(0, torch.tensor(plain, device=bias.device), 0.0)
        if isolating:
            assert self.isolated is not None
            rows = torch.tensor(isolating, device=allowed.device)
            allowed = allowed.index_copy(0, rows, self.isolated[rows])
            if bias is not None and self.isolated_bias is not None:
                bias = bias.index_copy(0, rows, self.isolated_bias[rows])
        if window is not None:
            assert self.query_positions is not None
            assert self.slot_positions is not None
            distance = self.query_positions[:, :, None] - self.slot_positions[:, None, :]
            allowed = allowed & (distance < window)
        added = torch.zeros_like(allowed, dtype=dtype) if bias is None else bias.to(dtype)
        mask = added.masked_fill(~allowed, -torch.inf)  # [R, w, N]
        return mask.repeat(1, groups, 1).unsqueeze(1)


def tempo_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [R, Hkv, N, D], rotated and cached
    value: Tensor,  # [R, Hkv, N, V]
    # a placeholder, so that transformers makes no mask of its own
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    # [H], attention sinks: each adds to the sum of the softmax, but has no value
    s_aux: Tensor | None = None,
    tempo_pass: PassContext | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention outputs [1, T, H, V] of the packed queries.

    Each query attends to the slots that its run allows it. The signature is that of transformers.

    Raises:
        ModelError: if tempo's context does not arrive, or if the model passes an argument that is
            not known here.
    """
    if tempo_pass is None:
        _check_own_thread()
        raise ModelError(
            f"{type(module).__name__} does not pass keyword arguments on to its attention "
            "function, so tempo's masks would never arrive; use a model of transformers whose "
            "attention goes through AttentionInterface"
        )
    unknown = sorted(
        name for name, given in kwargs.items() if given is not None and name not in HARMLESS
    )
    if unknown:
        raise ModelError(
            f"{type(module).__name__} passes {', '.join(unknown)} to its attention function, which "
            "tempo does not know; ignoring it could be silently wrong, so this model is refused"
        )
    num_rows, num_key_heads, _, head_size = key.shape
    num_heads, width = query.shape[1], tempo_pass.allowed.shape[1]
    groups = num_heads // num_key_heads
    if tempo_pass.only is None:
        by_run = query.new_zeros(num_rows, width, num_heads, head_size)
        by_run[tempo_pass.rows, tempo_pass.offsets] = query[0].transpose(0, 1)
        by_run = by_run.transpose(1, 2)
    else:
        by_run = query  # a single row is laid out already
    # The G heads that share keys become extra queries. So keys are read once and never repeated.
    grouped = by_run.reshape(num_rows, num_key_heads, groups * width, head_size)
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
    # contiguous, as transformers' own functions are: some models view what they get (AfMoE)
    output = output.reshape(num_rows, num_heads, width, -1).transpose(1, 2).contiguous()
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
    """Softmax weights [R, Hkv, G*w, N], in float32 or wider. A masked entry is exactly 0."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(wide) @ key.to(wide).transpose(-1, -2)).mul_(scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores.add_(mask)
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    # each query head's sink becomes one more column, which is dropped after the softmax
    num_key_heads, num_queries = scores.shape[1], scores.shape[2]
    groups = sinks.numel() // num_key_heads
    sink = sinks.to(wide).view(1, num_key_heads, groups, 1)
    sink = sink.repeat_interleave(num_queries // groups, dim=-1)
    sink = sink.reshape(1, num_key_heads, num_queries, 1).expand(scores.shape[0], -1, -1, -1)
    return torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]


@contextmanager
def installed(model: PreTrainedModel, name: str = NAME) -> Iterator[None]:
    """Within the block the model uses the attention registered as `name`, afterwards its own.

    Other threads that want to replace the attention of this model wait for the end of the block.
    Modules that were compiled in place run as they are written.

    Raises:
        ModelError: if the model does not let its attention be replaced.
    """
    with _lock_of(model), _uncompiled(model):
        before = attention_implementations(model)
        model.set_attn_implementation(name)
        depth = _thread.depth
        _thread.depth = depth + 1
        try:
            if model.config._attn_implementation != name:
                raise ModelError(
                    f"{type(model).__name__} does not let its attention be replaced (its source "
                    "never asks transformers' AttentionInterface); use an architecture that does, "
                    "such as Llama, Qwen, Mistral or Gemma"
                )
            yield
        finally:
            _thread.depth = depth
            model.set_attn_implementation(before)


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Within the block no module runs what `module.compile()` made of it.

    That computes the same, by torch's promise, but for attention of another shape in each pass it
    would be made anew each time.
    """
    compiled = [
        (module, module._compiled_call_impl)
        for module in model.modules()
        if module._compiled_call_impl is not None
    ]
    for module, _ in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call


class _Thread(threading.local):
    """How many blocks of `installed` this thread is in."""

    depth = 0


_thread = _Thread()
_locks: WeakKeyDictionary[PreTrainedModel, threading.RLock] = WeakKeyDictionary()
_locks_lock = threading.Lock()


def _lock_of(model: PreTrainedModel) -> threading.RLock:
    with _locks_lock:
        return _locks.setdefault(model, threading.RLock())


def _check_own_thread() -> None:
    """Raises ModelError in a thread that runs a model while another one has replaced its attention.

    Without tempo's context its result would be wrong in silence.
    """
    if not _thread.depth:
        raise ModelError(
            "another thread runs tempo on this model, whose attention is tempo's meanwhile; let "
            "one thread wait for the other, or give each a model of its own"
        )


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask that transformers makes for a pass of tempo; tempo makes its own from the layout."""
    _check_own_thread()
    return sdpa_mask(*args, **kwargs)


AttentionInterface.register(NAME, tempo_attention)
# Without a mask function of the same name transformers prepares no mask, and the model runs
# non-causally.
AttentionMaskInterface.register(NAME, _mask)
