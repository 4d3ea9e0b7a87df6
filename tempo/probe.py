"""What a loaded model shows of its attention, and a check that tempo computes what the model does.

Configs have many ways to say which layers see how far. Some modules do not even tell their
attention function. So the model itself is asked, in a forward pass of a few tokens. Each attention
call then shows the mask that transformers made for it. The rule behind that mask is evaluated over
the whole context.

Shapes: T tokens of the pass, H query heads, Hkv key heads, D key size, V vocabulary.
"""

from __future__ import annotations

import math
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
from tempo.support import cache_keyword, check_autocast, coarse_dtypes

NAME = "tempo-probe"
NUM_TOKENS = 4
# Two implementations of attention count as the same if their logits differ by at most this share
# of the logits' range. Rounding in float32 stays under 1e-5 in all architectures tested. A wrong
# implementation differs by about the whole range. Models in bfloat16 are not judged, because a
# router may flip there.
SAME_LOGITS = 1e-3
# The same where weights or activations are coarser: float16, or quantised to eight bits. There
# rounding was 0.2 to 1.4 % of the range.
SAME_COARSE = 0.05

# (batch, head, query, key) -> whether the query may attend to the key
MaskRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Probed(NamedTuple):
    """What a model does in a forward pass.

    Attributes:
        calls: Its attention calls, in order.
        cached: (heads, key size, value size) of each layer's cache. A layer that uses the keys of
            another one has none. Latent attention caches latents, and makes keys and values from
            them anew.
    """

    calls: tuple[AttentionCall, ...]
    cached: tuple[tuple[int, int, int], ...]


@dataclass
class _Observed:
    """What the forward pass under way has shown so far."""

    context_length: int
    masks: list[tuple[Tensor, MaskRule]] = field(default_factory=list)
    calls: list[AttentionCall] = field(default_factory=list)


_observed: ContextVar[_Observed] = ContextVar("tempo.probe")


@torch.inference_mode()
def probe(model: PreTrainedModel, context_length: int) -> Probed:
    """The attention calls of one forward pass, and what the layers cache.

    Args:
        model: A causal language model of transformers.
        context_length: The number of positions over which masks are evaluated.

    Raises:
        ModelError: if a mask is neither causal nor a window of positions. Also if tempo's function
            or its context does not arrive, if positions have no effect, or if tempo's logits are
            not the model's own.
    """
    embedding: Any = model.get_input_embeddings()
    check_autocast(embedding.weight.device)
    index = torch.arange(NUM_TOKENS, device=embedding.weight.device)
    tokens = (index % embedding.weight.shape[0])[None]
    plain = {"input_ids": tokens, "position_ids": index[None]}
    observed = _Observed(context_length)
    token = _observed.set(observed)
    try:
        with installed(model, NAME):
            model(**plain, use_cache=False)
        calls = observed.calls
        if not calls:
            raise ModelError(
                f"{type(model).__name__} never asked for attention in a forward pass; expected a "
                "decoder of attention layers"
            )
        with installed(model, "eager"):
            own = model(**plain, use_cache=True).logits[0].double()
        cache = SlotCache(calls[-1].layer + 1, num_rows=1)
        ours = _by_tempo(model, tokens, index, calls, cache)
        ours_elsewhere = _by_tempo(model, tokens, index * 2, calls, cache)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"a plain forward pass of {NUM_TOKENS} tokens through {type(model).__name__} failed "
            f"({type(error).__name__}: {error}); expected a causal language model that needs "
            "nothing but tokens and positions"
        ) from error
    finally:
        _observed.reset(token)
    # A model may mask tokens with -inf. Any other number that is not finite is an error of a run.
    is_sound = bool(own.amax(dim=-1).isfinite().all())
    shown = own.isfinite()
    spread = float(own[shown].max() - own[shown].min()) or 1.0 if is_sound else 1.0
    gap = float((ours - own)[shown].abs().max()) / spread if is_sound else math.inf
    if not torch.equal(ours == -math.inf, own == -math.inf):
        gap = math.inf
    dtypes = coarse_dtypes(model)
    is_judged = is_sound and torch.bfloat16 not in dtypes
    # written so that a gap of NaN is refused as well
    if is_judged and not gap <= (SAME_COARSE if dtypes else SAME_LOGITS):
        raise ModelError(
            f"{type(model).__name__} gives other logits under tempo's attention than under its own "
            f"(by {gap:.1%} of their range, on {NUM_TOKENS} plain tokens): something in its "
            "attention is not known to tempo, so this model is refused"
        )
    if torch.equal(ours, ours_elsewhere) and is_sound:
        raise ModelError(
            f"{type(model).__name__} gives the same logits whatever position_ids are passed, so "
            "siblings could not share a position; expected rotary embeddings that use position_ids"
        )
    return Probed(tuple(calls), cache.sizes)


def _by_tempo(
    model: PreTrainedModel,
    tokens: Tensor,
    positions: Tensor,
    calls: list[AttentionCall],
    cache: SlotCache,
) -> Tensor:
    """Logits [T, V] of plain text, by the attention function and the cache of the engine."""
    index = torch.arange(NUM_TOKENS, device=tokens.device)
    everything = torch.ones(1, NUM_TOKENS, NUM_TOKENS, dtype=torch.bool, device=tokens.device)
    context = PassContext(
        rows=torch.zeros_like(index),
        offsets=index,
        slots=index,
        allowed=everything.tril(),
        bias=None,
        query_positions=positions[None],
        slot_positions=positions[None],
        expected=calls,
    )
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
    """The mask that transformers makes for a call. It is remembered with its rule."""
    mask: Any = sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})
    _observed.get().masks.append((mask, kwargs["mask_function"]))
    return mask


def _probe_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, Hkv, T, D]
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Zeros in the shape of an attention output. The call is noted with the window of its mask."""
    observed = _observed.get()
    rule = next((rule for mask, rule in observed.masks if _same(mask, attention_mask)), None)
    if rule is None:
        raise ModelError(
            f"{type(module).__name__} changes its mask on the way to the attention function, or "
            "makes one of its own, which tempo cannot follow; use a model whose attention is "
            "causal or has a sliding window"
        )
    _, num_heads, length, _ = query.shape
    last = observed.calls[-1] if observed.calls else None
    observed.calls.append(
        AttentionCall(
            module=module,
            # a module that calls several times in a row is one layer
            layer=0 if last is None else last.layer + (last.module is not module),
            window=_window(rule, observed.context_length, type(module).__name__),
            num_heads=num_heads,
            num_key_value_heads=key.shape[1],
            key_size=key.shape[-1],
            value_size=value.shape[-1],
            forms_weights=key.shape[-1] != value.shape[-1]
            or any(kwargs.get(name) is not None for name in ("softcap", "s_aux")),
            has_sinks=kwargs.get("s_aux") is not None,
        )
    )
    return value.new_zeros(value.shape[0], length, num_heads, value.shape[-1]), None


def _same(made: Tensor, given: Tensor | None) -> bool:
    return given is not None and given.shape == made.shape and given.data_ptr() == made.data_ptr()


def _window(rule: MaskRule, length: int, who: str) -> int | None:
    """The window in positions that a mask rule states, or None for a plain causal one.

    Raises ModelError for any other rule.
    """
    keys = torch.arange(length)
    zero = torch.zeros((), dtype=torch.long)

    def row(query: int) -> Tensor:
        try:
            return rule(zero, zero, torch.tensor(query), keys).broadcast_to(length)
        except IndexError:
            raise ModelError(
                f"the mask of {who} depends on the text it was made for (image blocks), not on "
                "positions alone; use a model whose mask is causal or a sliding window"
            ) from None

    seen = row(length - 1)
    window = None if seen.all() else length - int(seen.int().argmax())
    # queries at both ends, in the middle, and around the first one that the window cuts off
    queries = {0, 1, length // 2, length - 1}
    if window:
        queries |= {window - 1, window, window + 1}
    for query in sorted(query for query in queries if 0 <= query < length):
        found = row(query)
        expected = (keys <= query) & (query - keys < (window or length))
        if not torch.equal(found, expected):
            raise ModelError(
                f"{who} has a mask that is neither causal nor a sliding window (position {query} "
                f"sees {int(found.sum())} of {length}, expected {int(expected.sum())}); use a "
                "model whose layers are of these kinds"
            )
    return window


AttentionInterface.register(NAME, _probe_attention)
AttentionMaskInterface.register(NAME, _probe_mask)
