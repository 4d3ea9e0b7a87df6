"""Distances between distributions, attention scores of siblings, and positions recovered from keys.

All functions take NumPy arrays and compute in float64. They return plain floats unless a shape is
given.

Shapes: L layers, H query heads, Hkv key heads, w siblings, N slots, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp, rel_entr
from scipy.special import softmax as _softmax

from tempo.errors import SpecError
from tempo.inputs import array, checked, distribution, several, whole

# A float32 softmax underflows to 0 where the true probability is merely small. A divergence must
# not become infinite because of that. The smallest normal float32 bounds each term at p * 87 nats.
SMALLEST = float(np.finfo(np.float32).tiny)


@checked(logits=array(finite=False))
def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis, float64, of the shape of `logits`.

    Example:
        >>> softmax(np.zeros(4)).tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    return _softmax(logits, axis=-1)


@checked(p=distribution, q=distribution)
def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """Total variation distance of two distributions [V], in [0, 1]: half their L1 distance.

    It is the largest difference of the probabilities that p and q give to any one event. It is the
    primary metric, because the tail of the vocabulary does not drive it.

    Example:
        >>> total_variation(np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.5, 0.25]))
        0.25
    """
    _check_same_shape(p, q)
    return 0.5 * float(np.abs(p - q).sum())


@checked(p=distribution, q=distribution)
def kl_divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Kullback-Leibler divergence KL(p || q) of two distributions [V], in nats.

    Zeros are first raised to the smallest normal float32. Both are then renormalised.

    Example:
        >>> round(kl_divergence(np.array([1.0, 0.0]), np.array([0.5, 0.5])), 4)  # log 2
        0.6931
    """
    _check_same_shape(p, q)
    p, q = np.maximum(p, SMALLEST), np.maximum(q, SMALLEST)
    return max(0.0, float(rel_entr(p / p.sum(), q / q.sum()).sum()))


@checked(p=distribution, q=distribution)
def jensen_shannon(p: np.ndarray, q: np.ndarray) -> float:
    """Jensen-Shannon divergence of two distributions [V], in nats, in [0, log 2].

    Example:
        >>> round(jensen_shannon(np.array([1.0, 0.0]), np.array([0.0, 1.0])), 4)  # log 2
        0.6931
    """
    _check_same_shape(p, q)
    mean = (p + q) / 2
    return (kl_divergence(p, mean) + kl_divergence(q, mean)) / 2


@checked(p=distribution, q=distribution)
def cosine(p: np.ndarray, q: np.ndarray) -> float:
    """Cosine of the angle between two probability vectors [V], in [0, 1].

    Example:
        >>> cosine(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
        0.0
    """
    _check_same_shape(p, q)
    return float(p @ q / np.sqrt((p @ p) * (q @ q)))


@checked(p=array(1), q=array(1), k=whole(1))
def top_k_overlap(p: np.ndarray, q: np.ndarray, k: int) -> float:
    """Share of the k most probable tokens that two distributions [V] have in common, in [0, 1].

    Example:
        >>> top_k_overlap(np.array([0.5, 0.4, 0.1]), np.array([0.5, 0.1, 0.4]), k=2)
        0.5
    """
    _check_same_shape(p, q)
    if k > len(p):
        raise SpecError(f"top_k_overlap: k is {k}; expected at most {len(p)}, the number of tokens")
    return len(_most_probable(p, k) & _most_probable(q, k)) / k


def _most_probable(p: np.ndarray, k: int) -> set[int]:
    return set(np.argpartition(-p, k - 1)[:k].tolist())


def _check_same_shape(first: np.ndarray, second: np.ndarray) -> None:
    if first.shape != second.shape:
        raise SpecError(
            f"arrays of the shapes {first.shape} and {second.shape} are compared; expected two of "
            "one shape, such as two distributions over one vocabulary"
        )


@checked(p=distribution)
def entropy(p: np.ndarray) -> float:
    """Shannon entropy of a distribution [V], in nats.

    Example:
        >>> round(entropy(np.array([0.5, 0.5, 0.0])), 4)  # log 2
        0.6931
    """
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


@checked(p=distribution, q=distribution, ks=several(whole(1), "whole numbers"))
def compare(p: np.ndarray, q: np.ndarray, ks: Sequence[int] = (1, 5, 10, 20)) -> dict[str, float]:
    """All distances of two distributions [V], by name.

    `kl` is KL(p || q) and `kl_reverse` is KL(q || p). `max_abs` is the largest difference of one
    token's probabilities. `top5` is the overlap of the five most probable tokens.

    Args:
        p: The first distribution, [V].
        q: The second distribution, [V].
        ks: For which k to compute the overlap of the k most probable tokens; at most V each.

    Example:
        >>> found = compare(np.array([0.75, 0.25]), np.array([0.25, 0.75]), ks=(1,))
        >>> sorted(found)
        ['cosine', 'js', 'kl', 'kl_reverse', 'max_abs', 'top1', 'tv']
        >>> found["tv"], found["top1"]
        (0.5, 0.0)
    """
    return {
        "tv": total_variation(p, q),
        "kl": kl_divergence(p, q),
        "kl_reverse": kl_divergence(q, p),
        "js": jensen_shannon(p, q),
        "cosine": cosine(p, q),
        "max_abs": float(np.abs(p - q).max()),
        **{f"top{k}": top_k_overlap(p, q, k) for k in ks},
    }


class SiblingAttention(NamedTuple):
    """Where the siblings of one set attend. Arrays are [L, H], averaged over the querying siblings.

    The context is all slots before the set. `self_mass`, `sibling_mass` and the mass on the context
    sum to 1.

    Attributes:
        to_sibling: The mean weight on one sibling.
        to_context: The mean weight on one slot of the context.
        to_context_without_sink: The same without slot 0, which most models use as an attention
            sink. NaN if the context has no other slot.
        sibling_mass: The sum of the weights on all siblings.
        self_mass: The weight on itself.
        sink_mass: The weight on slot 0.
        max_to_sibling: The largest weight on a sibling, over layers, heads and pairs.
        var_to_sibling: The variance of the weights on siblings, over layers, heads and pairs.
    """

    to_sibling: np.ndarray
    to_context: np.ndarray
    to_context_without_sink: np.ndarray
    sibling_mass: np.ndarray
    self_mass: np.ndarray
    sink_mass: np.ndarray
    max_to_sibling: float
    var_to_sibling: float


@checked(attention=array(4), slots=several(whole(0), "slots"))
def sibling_attention(attention: np.ndarray, slots: Sequence[int]) -> SiblingAttention:
    """How the members of one set spread their attention over siblings, context and themselves.

    The mean of `to_sibling` is the cross_parallel_score: attention[i, j] averaged over siblings
    i != j. The mean of `to_context` is the prior_context_score: attention[i, context] averaged.

    Args:
        attention: The weights of the set's members, [L, H, w, N]: `trace.steps[k].attention`.
        slots: The w consecutive slots of the set: `trace.steps[k].slots`.

    Raises:
        SpecError: if the set has fewer than two members, or the slots are not those of attention.

    Example:
        >>> weights = np.array([[0.5, 0.25, 0.25],   # the first sibling, in slot 1
        ...                     [0.5, 0.125, 0.375]])  # the second, in slot 2
        >>> scores = sibling_attention(weights[None, None], slots=[1, 2])
        >>> scores.to_sibling, scores.to_context, scores.max_to_sibling
        (array([[0.1875]]), array([[0.5]]), 0.25)
    """
    width = len(slots)
    if width < 2:
        raise SpecError(f"a set of {width} has no siblings to attend to; expected at least 2")
    weights, start = attention, slots[0]
    if list(slots) != [*range(max(1, start), start + width)] or weights.shape[2] != width:
        raise SpecError(
            f"slots is {list(slots)} for attention of shape {weights.shape}; expected the "
            "consecutive slots of the set, after at least one other, one for each of its rows"
        )
    if start + width > weights.shape[3]:
        raise SpecError(f"slots is {list(slots)}, but attention has {weights.shape[3]} columns")
    context = weights[..., :start]
    block = weights[..., start : start + width]
    pairs = block[..., ~np.eye(width, dtype=bool)]  # [L, H, w * (w - 1)]
    if start > 1:
        to_context_without_sink = context[..., 1:].mean(axis=(-1, -2))
    else:
        to_context_without_sink = np.full(pairs.shape[:2], np.nan)
    return SiblingAttention(
        to_sibling=pairs.mean(axis=-1),
        to_context=context.mean(axis=(-1, -2)),
        to_context_without_sink=to_context_without_sink,
        sibling_mass=pairs.sum(axis=-1) / width,
        self_mass=np.einsum("lhii->lh", block) / width,
        sink_mass=context[..., 0].mean(axis=-1),
        max_to_sibling=float(pairs.max()),
        var_to_sibling=float(pairs.var()),
    )


@checked(first=array(4), second=array(4), start=whole(1))
def context_distance(first: np.ndarray, second: np.ndarray, start: int) -> np.ndarray:
    """Total variation [L, H] between two attentions [L, H, w, N] over the slots before `start`.

    A mode that lets siblings see each other takes mass from the context. Each row is renormalised
    over the context first, so the distance compares only how the remaining mass is spread. It is
    averaged over the w rows, and NaN where a row has no mass on the context.

    Example:
        >>> first = np.array([[0.25, 0.25, 0.5]])
        >>> second = np.array([[0.125, 0.375, 0.5]])
        >>> context_distance(first[None, None], second[None, None], start=2)
        array([[0.25]])
    """
    _check_same_shape(first[..., :start], second[..., :start])
    if start > first.shape[3]:
        raise SpecError(f"start is {start}, but attention has {first.shape[3]} columns")
    contexts = [attention[..., :start] for attention in (first, second)]
    with np.errstate(invalid="ignore", divide="ignore"):
        rows = [context / context.sum(axis=-1, keepdims=True) for context in contexts]
    return 0.5 * np.abs(rows[0] - rows[1]).sum(axis=-1).mean(axis=-1)


class RecoveredPositions(NamedTuple):
    """The position of each slot, recovered from cached keys, and how well it fits.

    Attributes:
        position: [N], the position whose rotation turns raw keys into cached ones best.
        residual: [N], |R(position) raw - cached| / |cached| over all layers and heads.
        runner_up: [N], the residual of the best *other* position.
    """

    position: np.ndarray
    residual: np.ndarray
    runner_up: np.ndarray


@checked(
    keys=array(4),
    raw_keys=array(4),
    frequencies=several(array(1), "one array of frequencies for each layer"),
    num_candidates=whole(1),
)
def recover_positions(
    keys: np.ndarray,
    raw_keys: np.ndarray,
    frequencies: Sequence[np.ndarray],
    num_candidates: int,
    interleaved: Sequence[bool] = (),
    scales: Sequence[float] = (),
) -> RecoveredPositions:
    """Positions proven from the cache, by comparing rotated keys with those before rotation.

    Source: RoFormer, arXiv 2104.09864, equation 34.

    Args:
        keys: The cached keys, [L, Hkv, N, D]: `trace.keys`.
        raw_keys: The keys before rotation, [L, Hkv, N, D]: `trace.raw_keys`.
        frequencies: The rotary frequencies [d] of each layer, in radians a position. d is D / 2,
            or less if a head is rotated in part. A layer that does not rotate has the frequency 0.
        num_candidates: Positions 0 to num_candidates - 1 are tried.
        interleaved: For each layer whether neighbours are the pairs that rotate, as in Cohere. By
            default each dimension is paired with the one half a head away, as in Llama.
        scales: What each layer multiplies rotated keys by; by default 1. `lm.rotations` knows all
            three of a model.

    Example:
        >>> raw = np.ones((1, 1, 2, 2))  # one layer, one head, two slots, one pair of dimensions
        >>> angle = 3.0  # both slots are rotated to position 3 by one radian a position
        >>> pair = [np.cos(angle) - np.sin(angle), np.sin(angle) + np.cos(angle)]
        >>> recover_positions(np.broadcast_to(pair, raw.shape), raw, [np.ones(1)], 6).position
        array([3, 3])
    """
    _check_same_shape(keys, raw_keys)
    widest = max(map(len, frequencies), default=0)
    if len(frequencies) != len(keys) or 2 * widest > keys.shape[3]:
        raise SpecError(
            f"frequencies holds {len(frequencies)} arrays of at most {widest}; expected one for "
            f"each of {len(keys)} layers, of at most {keys.shape[3] // 2} frequencies"
        )
    pairs_of_layer = interleaved or [False] * len(keys)
    scale_of_layer = scales or [1.0] * len(keys)
    candidates = np.arange(num_candidates)
    num_slots = keys.shape[2]
    # <cached, R(m) raw> for each slot and candidate m, summed over layers, heads and pairs
    score = np.zeros((num_slots, num_candidates))
    cached_energy, raw_energy = np.zeros(num_slots), np.zeros(num_slots)
    for layer, frequency in enumerate(frequencies):
        half, neighbours = len(frequency), pairs_of_layer[layer]
        cached = _as_complex(keys[layer], half, neighbours)
        raw = _as_complex(raw_keys[layer], half, neighbours)
        if scale_of_layer[layer] != 1.0:
            raw = raw * scale_of_layer[layer]
        phases = np.exp(-1j * np.outer(frequency, candidates))  # [d, M]
        score += np.real((cached * raw.conj()).sum(axis=0) @ phases)
        cached_energy += _energy(cached)
        raw_energy += _energy(raw)
    # |R(m) raw - cached|^2 = |raw|^2 + |cached|^2 - 2 <cached, R(m) raw>, relative to |cached|^2
    difference = np.maximum((cached_energy + raw_energy)[:, None] - 2 * score, 0.0)
    squared = difference / cached_energy[:, None]
    order = np.argsort(squared, axis=1)
    slots = np.arange(num_slots)
    if num_candidates > 1:
        runner_up = np.sqrt(squared[slots, order[:, 1]])
    else:
        runner_up = np.full(num_slots, np.inf)
    return RecoveredPositions(
        position=order[:, 0],
        residual=np.sqrt(squared[slots, order[:, 0]]),
        runner_up=runner_up,
    )


def _as_complex(keys: np.ndarray, half: int, interleaved: bool) -> np.ndarray:
    """The rotated pairs of dimensions as complex numbers, [Hkv, N, d]."""
    if interleaved:
        return keys[..., 0 : 2 * half : 2] + 1j * keys[..., 1 : 2 * half : 2]
    return keys[..., :half] + 1j * keys[..., half : 2 * half]


def _energy(keys: np.ndarray) -> np.ndarray:
    """Squared length of each slot's keys, [N], over heads and pairs."""
    return (np.abs(keys) ** 2).sum(axis=(0, 2))


@checked(values=array(1, finite=False))
def log_mean_exp(values: np.ndarray) -> float:
    """log of the mean of exp(values), without overflow.

    Example:
        >>> log_mean_exp(np.array([1000.0, 1000.0]))
        1000.0
    """
    return float(logsumexp(values) - np.log(len(values)))
