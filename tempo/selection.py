"""From logits to the next set: readout, threshold and end of sequence.

The engine and the brute-force oracle (`tempo.reference`) share this module.

Shapes: w members of a set, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# The probability of a replayed member may underflow to 0. It is then raised to the smallest normal
# float32, so that weights and their logarithms stay finite.
SMALLEST_PROBABILITY = torch.finfo(torch.float32).tiny


class Selection(NamedTuple):
    """The set chosen at one step.

    Attributes:
        tokens: The members' token ids, by falling probability.
        probabilities: The members' probabilities.
        ended: End-of-sequence tokens that reached the threshold but were not appended.
        stops: Whether the run ends with this set.
    """

    tokens: list[int]
    probabilities: list[float]
    ended: list[int]
    stops: bool


def member_weights(probabilities: Sequence[float]) -> Tensor:
    """The members' selection probabilities, rescaled to sum to one: float64 [w].

    Example:
        >>> member_weights([0.3, 0.1])
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    weights = torch.tensor(probabilities, dtype=torch.float64).clamp_min(SMALLEST_PROBABILITY)
    return weights / weights.sum()


def read_out(logits: Tensor, probabilities: Sequence[float], readout: str) -> Tensor:
    """The distribution that the next step chooses from: float32 [V]. See docs/semantics.md.

    Args:
        logits: Each member's own output, [w, V].
        probabilities: The probabilities that the members were selected with, [w].
        readout: `mixture` is the mean of the members' softmaxes, weighted by `member_weights`. For
            isolated siblings of the first wide set it is the exact marginal over the set.
            `mean_logits` is the softmax of the mean logits. `first` and `last` are the softmax of
            that member alone.

    Raises:
        ValueError: if there is no such readout.

    Example:
        >>> logits = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()  # two members, two tokens
        >>> read_out(logits, [0.3, 0.1], "mixture")  # 0.75 * 0.9 + 0.25 * 0.1 = 0.7
        tensor([0.7000, 0.3000])
        >>> read_out(logits, [0.3, 0.1], "first")
        tensor([0.9000, 0.1000])
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if readout == "mixture":
        weights = member_weights(probabilities).to(logits)
        if len(weights) > 1:
            distribution = weights @ torch.softmax(logits, dim=-1)
        else:
            distribution = torch.softmax(logits[0], dim=-1)
    elif readout == "mean_logits":
        distribution = torch.softmax(logits.mean(dim=0), dim=-1)
    elif readout in ("last", "first"):
        distribution = torch.softmax(logits[-1 if readout == "last" else 0], dim=-1)
    else:
        raise ValueError(
            f"unknown readout {readout!r}; expected mixture, mean_logits, first or last"
        )
    return distribution.float()


def select(
    distribution: Tensor,
    *,
    threshold: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    sample: int | None = None,
    seed: int = 0,
    max_width: int | None = None,
    eos: frozenset[int] = frozenset(),
) -> Selection:
    """The set of all tokens that every rule lets in, or the argmax if none does.

    Members come by falling probability, ties by lower token id. A rule that is None lets every
    token in. A token without probability never joins.

    Args:
        distribution: The probabilities of all tokens, [V].
        threshold: A token needs at least this probability.
        top_k: Only the k most probable tokens may join.
        top_p: Only the most probable tokens that together first reach this probability may join
            (nucleus, arXiv 1904.09751).
        min_p: A token needs at least this share of the top probability (arXiv 2407.01082).
        sample: Draw so many of the tokens that may join, without replacement, each in proportion
            to its probability.
        seed: Of the draw.
        max_width: Only this many of the most probable tokens that are left join the set.
        eos: The end-of-sequence tokens. A set led by one is kept and stops the run. One that does
            not lead is left out and listed in `ended`.

    Example:
        >>> distribution = torch.tensor([0.125, 0.5, 0.125, 0.25])
        >>> select(distribution, threshold=0.2)
        Selection(tokens=[1, 3], probabilities=[0.5, 0.25], ended=[], stops=False)
        >>> select(distribution, threshold=0.9).tokens  # none reaches it
        [1]
        >>> select(distribution, top_k=3, top_p=0.7).tokens  # 0.5 is less, 0.75 is enough
        [1, 3]
        >>> select(distribution, sample=2, seed=1).tokens
        [1, 0]
        >>> select(distribution, threshold=0.2, eos=frozenset({3}))
        Selection(tokens=[1], probabilities=[0.5], ended=[3], stops=False)
    """
    most = distribution.max()
    least = at_least(max(threshold, (min_p or 0.0) * most.item()))
    tokens = torch.nonzero((distribution >= least) & (distribution > 0)).flatten()
    if tokens.numel() == 0:
        # torch does not say which of several equal maxima argmax returns. The first index of the
        # maximum is the lower token id.
        tokens = torch.nonzero(distribution == most)[0]
    limits = [limit for limit in (top_k, None if sample else max_width) if limit is not None]
    if limits and tokens.numel() > min(limits):
        # A tiny threshold lets the whole vocabulary in. Only tokens that reach the last place are
        # worth sorting.
        last_place = distribution.topk(min(limits)).values[-1]
        tokens = torch.nonzero(distribution >= last_place).flatten()
    # Up to here, and with top_p, what may join is a beginning of the tokens in this order.
    probabilities, order = torch.sort(distribution[tokens], descending=True, stable=True)
    tokens = tokens[order][: min(limits, default=None)]
    if top_p is not None:
        before = probabilities[: len(tokens)].double().cumsum(0) - probabilities[: len(tokens)]
        tokens = tokens[before < top_p]
    if sample is not None and len(tokens) > sample:
        tokens = tokens[_draw(distribution[tokens], tokens, len(distribution), sample, seed)]
    chosen = tokens[:max_width].tolist()
    values = distribution[chosen].tolist()
    if not eos.intersection(chosen):
        return Selection(chosen, values, [], False)
    if chosen[0] in eos:
        return Selection(chosen, values, [], True)
    ended = [token for token in chosen if token in eos]
    kept = [(token, value) for token, value in zip(chosen, values, strict=True) if token not in eos]
    return Selection([token for token, _ in kept], [value for _, value in kept], ended, False)


def at_least(bound: float) -> float:
    """The smallest float32 that is not below the bound.

    torch rounds a bound to float32 before it compares: to the nearest, which may lie below it.

    Example:
        >>> float(np.float32(0.1)) > 0.1, float(np.float32(0.3)) > 0.3, at_least(0.1) > 0.1
        (True, True, True)
        >>> float(np.float32(0.7)) < 0.7 <= at_least(0.7)
        True
    """
    nearest = np.float32(bound)
    return float(nearest if float(nearest) >= bound else np.nextafter(nearest, np.float32(np.inf)))


def _draw(
    probabilities: Tensor, tokens: Tensor, vocab_size: int, num_drawn: int, seed: int
) -> Tensor:
    """Which of the tokens win an exponential race, in their order (Efraimidis & Spirakis 2006).

    Each token's time comes from its id and the seed, so that another candidate more or less does
    not change the others' times.
    """
    generator = torch.Generator().manual_seed(seed)
    times = torch.empty(vocab_size, dtype=torch.float64).exponential_(generator=generator)
    arrivals = times[tokens] / probabilities
    return arrivals.topk(num_drawn, largest=False).indices.sort().values
