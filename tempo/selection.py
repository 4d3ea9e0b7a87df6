"""From logits to the next set: readout, threshold and end of sequence.

The engine and the brute-force oracle (`tempo.reference`) share this module.

Shapes: w members of a set, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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
    distribution: Tensor, threshold: float, max_width: int | None, eos: frozenset[int] = frozenset()
) -> Selection:
    """The set of all tokens whose probability reaches the threshold, or the argmax if none does.

    Members come by falling probability, ties by lower token id.

    Args:
        distribution: The probabilities of all tokens, [V].
        threshold: A token with at least this probability joins the set.
        max_width: Only this many of the most probable tokens join the set. None sets no limit.
        eos: The end-of-sequence tokens. A set led by one is kept and stops the run. One that does
            not lead is left out and listed in `ended`.

    Example:
        >>> distribution = torch.tensor([0.125, 0.5, 0.125, 0.25])
        >>> select(distribution, threshold=0.2, max_width=None)
        Selection(tokens=[1, 3], probabilities=[0.5, 0.25], ended=[], stops=False)
        >>> select(distribution, threshold=0.9, max_width=None).tokens  # none reaches it
        [1]
        >>> select(distribution, threshold=0.2, max_width=None, eos=frozenset({3}))
        Selection(tokens=[1], probabilities=[0.5], ended=[3], stops=False)
    """
    tokens = torch.nonzero(distribution >= threshold).flatten()
    if tokens.numel() == 0:
        # torch does not say which of several equal maxima argmax returns. The first index of the
        # maximum is the lower token id.
        tokens = torch.nonzero(distribution == distribution.max())[0]
    if max_width is not None and tokens.numel() > max_width:
        # A tiny threshold lets the whole vocabulary in. Only tokens that reach the last place are
        # worth sorting.
        last_place = distribution.topk(max_width).values[-1]
        tokens = torch.nonzero(distribution >= last_place).flatten()
    probabilities, order = torch.sort(distribution[tokens], descending=True, stable=True)
    chosen = tokens[order][:max_width].tolist()
    values = probabilities[:max_width].tolist()
    if not eos.intersection(chosen):
        return Selection(chosen, values, [], False)
    if chosen[0] in eos:
        return Selection(chosen, values, [], True)
    ended = [token for token in chosen if token in eos]
    kept = [(token, value) for token, value in zip(chosen, values, strict=True) if token not in eos]
    return Selection([token for token, _ in kept], [value for _, value in kept], ended, False)
