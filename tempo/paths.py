"""The paths through the sets of a finished run: which one is best, and how probable each is.

A path takes one member of each set. How probable it is follows from what the run kept: the set
probabilities, and for each member the posterior of the members before it.

Shapes: w members of a set, w' members of the next one.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Path(NamedTuple):
    """One member of each set.

    Attributes:
        members: The index of each member in its set.
        tokens: Their token ids.
        text: Their texts, joined.
        log_probability: The natural logarithm of the probability that the run gives to this text:
            of each token, what the member before it predicts.
        share: Its probability among all paths through the sets.
    """

    members: list[int]
    tokens: list[int]
    text: str
    log_probability: float
    share: float


def best_members(links: Sequence[np.ndarray], last: np.ndarray) -> list[int]:
    """The most probable member of the last set, and the most probable parents back from it.

    Args:
        links: Of each set but the last, the posterior of its members given those of the next set,
            [w, w'].
        last: The probabilities of the members of the last set, [w].

    Example:
        >>> best_members([np.array([[0.9, 0.2], [0.1, 0.8]])], np.array([0.4, 0.6]))
        [1, 1]
    """
    members = [int(np.argmax(last))]
    for posterior in reversed(links):
        members.append(int(np.argmax(posterior[:, members[-1]])))
    return members[::-1]


def most_probable(
    links: Sequence[np.ndarray], last: np.ndarray, num_paths: int
) -> list[tuple[float, list[int]]]:
    """The most probable paths as (log share, members), best first; ties by earlier members.

    The share of a path is last[i_d] times the product of links[k][i_k, i_{k+1}] (n-best Viterbi).

    Args:
        links: As for `best_members`.
        last: The weights of the members of the last set, which sum to one, [w].
        num_paths: How many paths to return at most.

    Example:
        >>> links = [np.array([[0.9, 0.2], [0.1, 0.8]])]
        >>> paths = most_probable(links, np.array([0.4, 0.6]), 2)
        >>> [(round(math.exp(log), 2), members) for log, members in paths]
        [(0.48, [1, 1]), (0.36, [0, 0])]
    """
    # the best paths that end in each member of the set reached so far
    num_first = len(links[0]) if links else len(last)
    ending = [[(0.0, [i])] for i in range(num_first)]
    for posterior in links:
        with np.errstate(divide="ignore"):  # a posterior of 0 becomes -inf, and is kept last
            logs = np.log(posterior.astype(np.float64)).tolist()
        before, ending = ending, []
        for u in range(posterior.shape[1]):
            longer = []
            for i, found in enumerate(before):
                longer += [(log + logs[i][u], [*path, u]) for log, path in found]
            ending.append(_best(longer, num_paths))
    whole = []
    for weight, found in zip(last, ending, strict=True):
        whole += [(log + math.log(weight), path) for log, path in found]
    return _best(whole, num_paths)


def _best(paths: list[tuple[float, list[int]]], num_paths: int) -> list[tuple[float, list[int]]]:
    return heapq.nsmallest(num_paths, paths, key=lambda path: (-path[0], path[1]))
