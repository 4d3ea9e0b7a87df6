"""Which member came before which: Bayes' rule along the sets of a run, while it is under way.

The sets of a run form a lattice of paths, one member of each set. A run with readout `mixture`
sums over these paths. Bayes' rule tells back from each member which path led to it.

Shapes: w members of a set, w' members of the next one, G slots before the newest set, counted from
the last prompt token on, V vocabulary. All is float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# The log probability of a token that a model rules out. A replay may force it all the same.
IMPOSSIBLE = -1e4


def link(logits: Tensor, log_weights: Tensor, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which member of a set came before which token of the next one, and what these weigh.

    Args:
        logits: What each member predicts, [w, V].
        log_weights: The logarithm of each member's weight, [w].
        tokens: The token ids of the next set, [w'].

    Returns:
        The posterior of each member given each token, [w, w'], each column of which sums to one,
        and the logarithm of each token's weight, [w']. The weight of a token is the sum over
        members of weight times prediction, rescaled.

    Example:
        >>> logits = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()  # two members, two tokens
        >>> posterior, log_weights = link(logits, torch.tensor([0.5, 0.5]).log(), [0, 1])
        >>> posterior  # the first member came before token 0 in nine cases of ten
        tensor([[0.9000, 0.1000],
                [0.1000, 0.9000]], dtype=torch.float64)
    """
    predicted = logits[:, list(tokens)].double()
    if len(logits) > 1:  # of a single member, what all tokens have in common cancels
        predicted = predicted - logits.logsumexp(dim=-1, keepdim=True)
    joint = log_weights[:, None].double() + predicted.clamp_min(IMPOSSIBLE)  # [w, w']
    weight = joint.logsumexp(dim=0)
    return torch.exp(joint - weight), torch.log_softmax(weight, dim=0)


class Lattice:
    """What led to the members of a run's newest set. Call `extend` for each set, from the first.

    Attributes:
        log_weights: The logarithm of the weight of each member of the newest set, [w].
        ancestors: The probability that the token in each earlier slot came before each member of
            the newest set, [G, w]. None if it is not kept.

    Example:
        >>> lattice = Lattice("posterior")
        >>> _ = lattice.extend(torch.tensor([[0.4, 0.4, 0.2]]).log(), [0, 1])
        >>> _ = lattice.extend(torch.tensor([[0.9, 0.0, 0.1], [0.1, 0.9, 0.0]]).log(), [0])
        >>> lattice.ancestors[1:]  # slot 0 is the last prompt token
        tensor([[0.9000],
                [0.1000]], dtype=torch.float64)
    """

    def __init__(self, weighting: str, keeps_ancestors: bool = True) -> None:
        """
        Args:
            weighting: `best_parent` keeps the most probable path to each member only.
            keeps_ancestors: Whether `ancestors` is needed.
        """
        self.one_path = weighting == "best_parent"
        self.log_weights = torch.zeros(1, dtype=torch.float64)
        self.ancestors = torch.zeros(0, 1, dtype=torch.float64) if keeps_ancestors else None

    def extend(
        self,
        logits: Tensor,
        tokens: Sequence[int],
        links_given: Sequence[Sequence[float]] | None = None,
    ) -> Tensor:
        """The posterior of each member of the newest set, given each token of the next: [w, w'].

        The next set is the newest one from here on.

        Args:
            logits: What the members of the newest set predict, [w, V].
            tokens: The token ids of the next set, [w'].
            links_given: What is returned and used instead, [w, w'].
        """
        links, self.log_weights = link(logits, self.log_weights, tokens)
        if links_given is not None:
            links = torch.tensor(links_given, dtype=torch.float64)
        if self.ancestors is not None:
            kernel = best_parents(links) if self.one_path else links
            self.ancestors = torch.cat([self.ancestors @ kernel, kernel])
        return links

    @property
    def posterior(self) -> Tensor:
        """The probability that each earlier slot is on the path, over the newest set: [G]."""
        assert self.ancestors is not None
        return self.ancestors @ self.log_weights.exp()


def best_parents(links: Tensor) -> Tensor:
    """1 for the most probable member before each token, and 0 for the others: [w, w'].

    Of several equal ones the first counts.
    """
    kernel = torch.zeros_like(links)
    parents = torch.from_numpy(links.numpy().argmax(axis=0))  # NumPy takes the first maximum
    return kernel.scatter_(0, parents[None], 1.0)


def dropped(shares: np.ndarray, seen: np.ndarray, least: float) -> list[int]:
    """The members of a set that are dropped now: those still seen whose share is below `least`.

    The most probable of those still seen stays, so that no set vanishes.

    Args:
        shares: Of the members, in any unit, [w].
        seen: Which members have not been dropped before, bool [w].
        least: The smallest share that stays, once all are rescaled to sum to one.

    Example:
        >>> everyone = np.array([True, True, True])
        >>> dropped(np.array([0.6, 0.3, 0.1]), everyone, 0.2)
        [2]
        >>> dropped(np.array([0.4, 0.3, 0.3]), everyone, 0.9)
        [1, 2]
        >>> dropped(np.array([0.6, 0.3, 0.1]), np.array([False, True, True]), 0.9)
        [2]
        >>> dropped(np.array([0.0, 0.0, 0.0]), everyone, 0.9)  # nothing is known of them
        []
    """
    total = shares.sum()
    if not total > 0:
        return []
    low = seen & (shares / total < least)
    low[np.where(seen, shares, -1.0).argmax()] = False
    return np.flatnonzero(low).tolist()
