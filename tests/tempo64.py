"""TEMPO by brute force on `Llama64`: masks, positions, bias and read-out, from their definitions.

What came before what is found by enumerating all paths through the sets, one member of each.

Shapes: P prompt tokens, N slots, w set width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tests.llama64 import Llama64, Pass, softmax


class Lattice(NamedTuple):
    """The slots of a prompt and sets: token, position and set of each."""

    tokens: list[int]
    positions: list[int]
    sets: list[int]  # every prompt token is a set of its own

    def slots(self, k: int, num_prompt: int) -> list[int]:
        """Slots of the members of generated set k; k = -1 is the last prompt token."""
        return [slot for slot, of_set in enumerate(self.sets) if of_set == num_prompt + k]


def lattice(
    prompt: Sequence[int], sets: Sequence[Sequence[int]], positions: str = "shared"
) -> Lattice:
    """The slots of these sets after the prompt.

    All of set k stands at position P + k (`shared`), or each slot at its own index (`sequential`).
    """
    tokens, of_sets = list(prompt), list(range(len(prompt)))
    for k, members in enumerate(sets):
        tokens += members
        of_sets += [len(prompt) + k] * len(members)
    at = of_sets if positions == "shared" else list(range(len(tokens)))
    return Lattice(tokens, at, of_sets)


def allowed(slots: Lattice, visibility: str, window: int | None = None) -> np.ndarray:
    """Who may attend to whom, bool [N, N], query by key, one pair at a time.

    A window counts positions.
    """

    def may(query: int, key: int) -> bool:
        if window is not None and slots.positions[query] - slots.positions[key] >= window:
            return False
        if slots.sets[key] < slots.sets[query] or key == query:
            return True
        siblings = slots.sets[key] == slots.sets[query]
        return siblings and (visibility == "visible" or (visibility == "causal" and key < query))

    size = len(slots.tokens)
    mask = np.zeros((size, size), dtype=bool)
    for query, key in np.ndindex(size, size):
        mask[query, key] = may(query, key)
    return mask


class Replayed(NamedTuple):
    """What forcing the sets gives."""

    slots: Lattice
    distributions: list[np.ndarray]  # [V] each; the last one is what follows the last set
    out: Pass
    bias: np.ndarray  # [N, N], what is added to the attention logits of allowed pairs


def replay(
    model: Llama64,
    prompt: Sequence[int],
    sets: Sequence[Sequence[int]],
    *,
    visibility: str = "isolated",
    positions: str = "shared",
    readout: str = "mixture",
    weighting: str = "none",
    window: int | None = None,
) -> Replayed:
    """One full pass a step, because the bias of a set needs the distribution it came from."""
    distributions: list[np.ndarray] = []
    key_bias, weights = [0.0] * len(prompt), np.ones(1)
    predicted: list[np.ndarray] = []
    for k in range(len(sets) + 1):
        slots = lattice(prompt, sets[:k], positions)
        query_set, key_set = np.array(slots.sets)[:, None], np.array(slots.sets)
        # a set's own queries are biased only where all siblings see each other
        biased = (key_set < query_set) | (visibility == "visible")
        bias = np.where(biased, key_bias, 0.0)
        if weighting in BY_QUERY:
            bias = _bias_by_query(slots, len(prompt), sets[:k], predicted, weighting)
        out = model(slots.tokens, slots.positions, allowed(slots, visibility, window), bias)
        members = out.logits[slots.slots(k - 1, len(prompt))]
        predicted.append(softmax(members))
        distributions.append(read_out(members, weights, readout))
        if k < len(sets):
            weights = distributions[k][list(sets[k])]
            weights = weights / weights.sum()
            key_bias += _bias(weights, weighting)
    return Replayed(slots, distributions, out, bias)


def all_paths(predicted: Sequence[np.ndarray], sets: Sequence[Sequence[int]]) -> np.ndarray:
    """The probability of every path through the sets, [w_0, w_1, ...]: one axis for each set.

    It is the product of what the members of the path predict of the next one.

    predicted: what the last prompt token gives, [1, V], then each member of each set, [w, V].
    """
    paths = np.ones(1)  # of the last prompt token alone
    for probabilities, members in zip(predicted, sets, strict=False):
        paths = paths[..., None] * probabilities[:, list(members)]
    return paths[0]


def came_before(
    predicted: Sequence[np.ndarray], sets: Sequence[Sequence[int]], j: int
) -> np.ndarray:
    """How probably each member of set j came before each member of the last set, [w_j, w_k].

    It is the share of the paths to the latter that lead through the former.
    """
    paths = all_paths(predicted, sets)
    others = tuple(axis for axis in range(paths.ndim - 1) if axis != j)
    together = paths.sum(axis=others)
    return together / together.sum(axis=0)


def on_best_path(
    predicted: Sequence[np.ndarray], sets: Sequence[Sequence[int]], j: int
) -> np.ndarray:
    """1 for the member of set j to which the best parents of each member of the last set lead."""
    found = np.zeros((len(sets[j]), len(sets[-1])))
    for u in range(len(sets[-1])):
        member = u
        for k in range(len(sets) - 1, j, -1):
            member = int(came_before(predicted, sets[: k + 1], k - 1)[:, member].argmax())
        found[member, u] = 1.0
    return found


BY_QUERY = {"posterior": came_before, "best_parent": on_best_path}


def _bias_by_query(
    slots: Lattice,
    num_prompt: int,
    sets: Sequence[Sequence[int]],
    predicted: Sequence[np.ndarray],
    weighting: str,
) -> np.ndarray:
    """The log of how probably each key came before each query, [N, N]; 0 where none is asked."""
    shares = np.ones((len(slots.tokens),) * 2)
    before = BY_QUERY[weighting]
    for k in range(1, len(sets)):
        queries = slots.slots(k, num_prompt)
        for j in range(k):
            # sets after set k say nothing of what its members knew
            of_set = before(predicted, sets[: k + 1], j)
            shares[np.ix_(queries, slots.slots(j, num_prompt))] = of_set.T
    with np.errstate(divide="ignore"):
        return np.log(shares)


def _bias(weights: np.ndarray, weighting: str) -> list[float]:
    """-log n or +log w_i on each key of a set wider than one."""
    if len(weights) == 1 or weighting not in ("count", "probability"):
        return [0.0] * len(weights)
    return [-np.log(len(weights))] * len(weights) if weighting == "count" else list(np.log(weights))


def read_out(logits: np.ndarray, weights: np.ndarray, readout: str) -> np.ndarray:
    """One distribution [V] from the members' logits [w, V]."""
    if readout == "mixture":
        return weights @ softmax(logits)
    one = {"mean_logits": logits.mean(axis=0), "first": logits[0], "last": logits[-1]}[readout]
    return softmax(one)
