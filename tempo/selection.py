"""From logits to the next set: read-out, threshold, end of sequence. Shared by the engine and the oracle.

Shapes: w members of a set, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# A replayed member may have a probability that underflows to 0; its weight is then that of the smallest
# normal float32, so that weights and their logarithms stay finite.
SMALLEST_PROBABILITY = torch.finfo(torch.float32).tiny


class Selection(NamedTuple):
    """One step's set. `ended`: end-of-sequence tokens that reached the threshold but were not appended."""

    tokens: list[int]
    probabilities: list[float]
    ended: list[int]
    stops: bool


def member_weights(probabilities: Sequence[float]) -> Tensor:
    """w_i, the members' selection probabilities renormalised to sum to one: float64 [w]."""
    weights = torch.tensor(probabilities, dtype=torch.float64).clamp_min(SMALLEST_PROBABILITY)
    return weights / weights.sum()


def read_out(logits: Tensor, probabilities: Sequence[float], readout: str) -> Tensor:
    """The next step's one distribution, float32 [V], from the members' logits [w, V] (design: semantics, 5).

    `mixture` is the probability-weighted mean of the members' softmaxes (for isolated siblings of the first wide
    set this is the exact marginal over the set), `mean_logits` the softmax of the mean logits, `last` and `first`
    the softmax of that member alone.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if readout == "mixture":
        weights = member_weights(probabilities).to(logits)
        distribution = (
            weights @ torch.softmax(logits, dim=-1)
            if len(weights) > 1
            else torch.softmax(logits[0], dim=-1)
        )
    elif readout == "mean_logits":
        distribution = torch.softmax(logits.mean(dim=0), dim=-1)
    elif readout in ("last", "first"):
        distribution = torch.softmax(logits[-1 if readout == "last" else 0], dim=-1)
    else:
        raise ValueError(f"unknown readout {readout!r}")
    return distribution.float()


def select(
    distribution: Tensor, threshold: float, max_width: int | None, eos: frozenset[int] = frozenset()
) -> Selection:
    """The set that `distribution` [V] gives: p >= threshold by falling p, ties by lower id, else the argmax alone.

    With `eos` ids: a set led by one is kept and stops the run; one that does not lead is left out and named in `ended`.
    """
    tokens = torch.nonzero(distribution >= threshold).flatten()
    if tokens.numel() == 0:
        # argmax of several equal maxima is unspecified in torch; the first index of the maximum is the lower id
        tokens = torch.nonzero(distribution == distribution.max())[0]
    if max_width is not None and tokens.numel() > max_width:
        # a tiny threshold lets the whole vocabulary in: only what reaches the last place is worth sorting
        tokens = torch.nonzero(distribution >= distribution.topk(max_width).values[-1]).flatten()
    probabilities, order = torch.sort(distribution[tokens], descending=True, stable=True)
    chosen = tokens[order][:max_width].tolist()
    values = probabilities[:max_width].tolist()
    if not eos.intersection(chosen):
        return Selection(chosen, values, [], False)
    if chosen[0] in eos:
        return Selection(chosen, values, [], True)
    kept = [(token, value) for token, value in zip(chosen, values, strict=True) if token not in eos]
    return Selection(
        [t for t, _ in kept], [p for _, p in kept], [t for t in chosen if t in eos], False
    )
