"""What a model shows of its attention when it is loaded, and that tempo then computes what the model itself does.

Configs say in many ways which layers see how far, and some modules do not tell their attention function at all. So the
model is asked: in a forward pass of a few tokens each attention call shows the mask that transformers made for it, and
the rule behind that mask is evaluated over the whole context. T tokens of the pass, N keys.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from tempo.attention import AttentionCall, PassContext, installed
from tempo.cache import SlotCache
from tempo.errors import ModelError
from tempo.support import cache_keyword

NAME = "tempo-probe"
NUM_TOKENS = 4
# Logits of two implementations of the same attention differ by rounding, of a wrong one by about their range; float32
# rounding stays under 1e-5 of the range in all architectures tested. In bfloat16 a router may flip: not judged.
SAME_LOGITS = 1e-3

MaskRule = Callable[
    [Tensor, Tensor, Tensor, Tensor], Tensor
]  # (batch, head, query, key) -> may attend


class Probed(NamedTuple):
    """What a model does in a forward pass."""

    calls: tuple[AttentionCall, ...]  # in order
    # (heads, key size, value size) of each layer's cache; layers that use another's keys have none, and latent attention
    # caches latents, from which it makes its keys and values anew
    cached: tuple[tuple[int, int, int], ...]


@dataclass
class _Sight:
    """What the pass under way has shown."""

    context_length: int
    masks: list[tuple[Tensor, MaskRule]] = field(default_factory=list)
    calls: list[AttentionCall] = field(default_factory=list)


_sight: ContextVar[_Sight] = ContextVar("tempo.probe")


@torch.inference_mode()
def probe(model: PreTrainedModel, context_length: int) -> Probed:
    """The attention calls of one forward pass, and what the layers cache.

    Raises ModelError if a mask is no causal one (a window of positions is), if tempo's function or its context does not
    arrive, if positions have no effect, or if tempo's logits are not the model's own.
    """
    embedding: Any = model.get_input_embeddings()
    device = embedding.weight.device
    index = torch.arange(NUM_TOKENS, device=device)
    tokens = (index % embedding.weight.shape[0])[None]
    plain = {"input_ids": tokens, "position_ids": index[None]}
    sight = _Sight(context_length)
    token = _sight.set(sight)
    try:
        with installed(model, NAME):
            model(**plain, use_cache=False)
        calls = sight.calls
        if not calls:
            raise ModelError(
                f"{type(model).__name__} never asked for attention in a forward pass; expected a decoder of attention layers"
            )
        with installed(model, "eager"):
            own = model(**plain, use_cache=True).logits[0].double()
        cache = SlotCache(calls[-1].layer + 1, num_rows=1)
        ours = [_by_tempo(model, tokens, index * stride, calls, cache) for stride in (1, 2)]
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"a plain forward pass of {NUM_TOKENS} tokens through {type(model).__name__} failed ({type(error).__name__}: {error}); "
            "expected a causal language model that needs nothing but tokens and positions"
        ) from error
    finally:
        _sight.reset(token)
    spread = float(own.max() - own.min()) or 1.0
    gap = float((ours[0] - own).abs().max()) / spread
    if own.isfinite().all() and embedding.weight.dtype != torch.bfloat16 and not gap <= SAME_LOGITS:
        raise ModelError(
            f"{type(model).__name__} gives other logits under tempo's attention than under its own (by {gap:.1%} of their range, "
            f"on {NUM_TOKENS} plain tokens): something in its attention is not known to tempo, so this model is refused"
        )
    if torch.equal(ours[0], ours[1]) and own.isfinite().all():
        raise ModelError(
            f"{type(model).__name__} gives the same logits whatever position_ids are passed, so siblings could not share a position; "
            "expected rotary embeddings that use position_ids"
        )
    return Probed(tuple(calls), cache.sizes)


def _by_tempo(
    model: PreTrainedModel,
    tokens: Tensor,
    positions: Tensor,
    calls: list[AttentionCall],
    cache: SlotCache,
) -> Tensor:
    """Logits [T, V] of plain text through the function and the cache that the engine uses."""
    index = torch.arange(NUM_TOKENS, device=tokens.device)
    context = PassContext(
        rows=torch.zeros_like(index), offsets=index, slots=index,
        allowed=torch.ones(1, NUM_TOKENS, NUM_TOKENS, dtype=torch.bool, device=tokens.device).tril(), bias=None,
        query_positions=positions[None], slot_positions=positions[None], expected=calls,
    )  # fmt: skip
    cache.step = context
    with installed(model):
        output = model(
            input_ids=tokens,
            position_ids=positions[None],
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device),
            use_cache=True,
            tempo_pass=context,
            **{cache_keyword(model): cache},
        )
    return output.logits[0].double()


def _probe_mask(*args: Any, **kwargs: Any) -> Tensor:
    """The mask that transformers would make, remembered with its rule."""
    mask: Any = sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})
    _sight.get().masks.append((mask, kwargs["mask_function"]))
    return mask


def _probe_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Note who asks, under which mask; the output is of the right shape and means nothing."""
    sight = _sight.get()
    rule = next((rule for mask, rule in sight.masks if _same(mask, attention_mask)), None)
    if rule is None:
        raise ModelError(
            f"{type(module).__name__} changes its mask on the way to the attention function, or makes one of its own, which tempo "
            "cannot follow; use a model whose attention is causal or has a sliding window"
        )
    window = _window(rule, sight.context_length, type(module).__name__)
    _, num_heads, length, _ = query.shape
    last = sight.calls[-1] if sight.calls else None
    layer = 0 if last is None else last.layer + (last.module is not module)
    sight.calls.append(
        AttentionCall(
            module, layer, window, num_heads, key.shape[1], key.shape[-1], value.shape[-1]
        )
    )
    return value.new_zeros(value.shape[0], length, num_heads, value.shape[-1]), None


def _same(made: Tensor, given: Tensor | None) -> bool:
    return given is not None and given.shape == made.shape and given.data_ptr() == made.data_ptr()


def _window(rule: MaskRule, length: int, who: str) -> int | None:
    """The window in positions that a mask rule states, None for a plain causal one; anything else is refused."""
    keys = torch.arange(length)
    zero = torch.zeros((), dtype=torch.long)

    def row(query: int) -> Tensor:
        try:
            return rule(zero, zero, torch.tensor(query), keys).broadcast_to(length)
        except IndexError:
            raise ModelError(
                f"the mask of {who} depends on the text it was made for (image blocks), not on positions alone"
            ) from None

    seen = row(length - 1)
    window = None if seen.all() else length - int(seen.int().argmax())
    queries = {0, 1, length // 2, length - 1} | (
        {window - 1, window, window + 1} if window else set()
    )
    for query in sorted(q for q in queries if 0 <= q < length):
        expected = (keys <= query) & (query - keys < (window or length))
        if not torch.equal(row(query), expected):
            raise ModelError(
                f"{who} has a mask that is neither causal nor a sliding window (position {query} sees {int(row(query).sum())} of "
                f"{length}, expected {int(expected.sum())}); use a model whose layers are of these kinds"
            )
    return window


AttentionInterface.register(NAME, _probe_attention)
AttentionMaskInterface.register(NAME, _probe_mask)
