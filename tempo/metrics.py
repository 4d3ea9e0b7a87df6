"""Distances between distributions, attention scores of siblings, and positions recovered from cached keys.

All functions take NumPy arrays, compute in float64, and return plain floats unless a shape is given.
Shapes: L layers, H query heads, w siblings, N slots, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp, rel_entr
from scipy.special import softmax as _softmax

# A float32 softmax underflows to 0 where the true probability is merely small; a divergence must not become infinite
# by that. The smallest normal float32 bounds what any term can contribute to p * 87 nats.
SMALLEST = float(np.finfo(np.float32).tiny)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis, float64."""
    return _softmax(np.asarray(logits, dtype=np.float64), axis=-1)


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """sup |P(A) - Q(A)| = half the L1 distance, in [0, 1]; the primary metric (it is not driven by the tail)."""
    return 0.5 * float(np.abs(np.asarray(p, np.float64) - np.asarray(q, np.float64)).sum())


def kl_divergence(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p || q) in nats; both are renormalised after raising zeros to the smallest normal float32."""
    p, q = (np.maximum(np.asarray(d, np.float64), SMALLEST) for d in (p, q))
    return max(0.0, float(rel_entr(p / p.sum(), q / q.sum()).sum()))


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> float:
    """Jensen-Shannon divergence in nats, in [0, log 2]."""
    mean = (np.asarray(p, np.float64) + np.asarray(q, np.float64)) / 2
    return (kl_divergence(p, mean) + kl_divergence(q, mean)) / 2


def cosine(p: np.ndarray, q: np.ndarray) -> float:
    """Cosine of the angle between two probability vectors."""
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    return float(p @ q / np.sqrt((p @ p) * (q @ q)))


def top_k_overlap(p: np.ndarray, q: np.ndarray, k: int) -> float:
    """Share of the k most probable tokens that both have, in [0, 1]."""
    top = [set(np.argpartition(-np.asarray(d), k - 1)[:k].tolist()) for d in (p, q)]
    return len(top[0] & top[1]) / k


def entropy(p: np.ndarray) -> float:
    """Shannon entropy in nats."""
    p = np.asarray(p, np.float64)
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def compare(p: np.ndarray, q: np.ndarray, ks: Sequence[int] = (1, 5, 10, 20)) -> dict[str, float]:
    """All distances of two distributions [V] by name: tv, kl (p||q), kl_reverse, js, cosine, top1, top5, ..."""
    return {
        "tv": total_variation(p, q),
        "kl": kl_divergence(p, q),
        "kl_reverse": kl_divergence(q, p),
        "js": jensen_shannon(p, q),
        "cosine": cosine(p, q),
        "max_abs": float(np.abs(np.asarray(p, np.float64) - np.asarray(q, np.float64)).max()),
        **{f"top{k}": top_k_overlap(p, q, k) for k in ks},
    }


class SiblingAttention(NamedTuple):
    """How the siblings of one set [L, H] distribute attention, averaged over the querying siblings.

    `to_sibling` and `to_context` are mean weights *per key*; `to_context_without_sink` leaves out slot 0, which most
    models use as an attention sink; the masses are sums over keys, so self + siblings + context = 1.
    """

    to_sibling: np.ndarray
    to_context: np.ndarray
    to_context_without_sink: np.ndarray
    sibling_mass: np.ndarray
    self_mass: np.ndarray
    sink_mass: np.ndarray
    max_to_sibling: float
    var_to_sibling: float


def sibling_attention(attention: np.ndarray, slots: Sequence[int]) -> SiblingAttention:
    """Scores of a set's own attention [L, H, w, N] with its members at `slots`, w >= 2.

    cross_parallel_score = mean attention[i, j] over siblings i != j is the mean of `to_sibling`, prior_context_score =
    mean attention[i, context] that of `to_context`.
    """
    width, start = len(slots), slots[0]
    if width < 2:
        raise ValueError(f"a set of {width} has no siblings to attend to; expected at least 2")
    weights = attention.astype(np.float64)
    block = weights[..., start : start + width]
    others = ~np.eye(width, dtype=bool)
    context = weights[..., :start]
    pairs = block[..., others]
    return SiblingAttention(
        to_sibling=pairs.mean(axis=-1),
        to_context=context.mean(axis=(-1, -2)),
        to_context_without_sink=context[..., 1:].mean(axis=(-1, -2))
        if start > 1
        else np.full(pairs.shape[:2], np.nan),
        sibling_mass=pairs.sum(axis=-1) / width,
        self_mass=np.einsum("lhii->lh", block) / width,
        sink_mass=context[..., 0].mean(axis=-1),
        max_to_sibling=float(pairs.max()),
        var_to_sibling=float(pairs.var()),
    )


def context_distance(first: np.ndarray, second: np.ndarray, start: int) -> np.ndarray:
    """Total variation [L, H] between two attentions [L, H, w, N] over the slots before `start`, rows renormalised.

    Renormalised, because a mode that lets siblings see each other takes mass from the context without changing how
    the rest is spread; mean over the w rows. NaN where a row has no mass on the context.
    """
    rows = [a[..., :start].astype(np.float64) for a in (first, second)]
    with np.errstate(invalid="ignore", divide="ignore"):
        rows = [r / r.sum(axis=-1, keepdims=True) for r in rows]
    return 0.5 * np.abs(rows[0] - rows[1]).sum(axis=-1).mean(axis=-1)


class RecoveredPositions(NamedTuple):
    """For each slot [N]: the position whose rotation best turns raw keys into cached ones, and how well it fits.

    Residuals are |R(position) raw - cached| / |cached| over all layers and heads; `runner_up` is the residual of the
    best *other* position.
    """

    position: np.ndarray
    residual: np.ndarray
    runner_up: np.ndarray


def recover_positions(
    keys: np.ndarray, raw_keys: np.ndarray, frequencies: Sequence[np.ndarray], num_candidates: int
) -> RecoveredPositions:
    """Positions proven from the cache: cached keys [L, Hkv, N, D] un-rotated against raw keys of the same shape.

    `frequencies`: the rotary frequencies [d] of each of the L layers, d <= D / 2 (fewer if only part is rotated), in the
    half-split layout of Llama. Every position 0..num_candidates-1 is tried (RoFormer, arXiv 2104.09864, eq. 34).
    """
    candidates = np.arange(num_candidates)
    score = np.zeros(
        (keys.shape[2], num_candidates)
    )  # <cached, R(m) raw>, summed over layers, heads and pairs
    energy = np.zeros((2, keys.shape[2]))
    for layer, frequency in enumerate(frequencies):
        half = len(frequency)
        cached, raw = (
            k[layer, ..., :half].astype(np.float64) + 1j * k[layer, ..., half : 2 * half]
            for k in (keys, raw_keys)
        )
        phases = np.exp(-1j * np.outer(frequency, candidates))  # [d, M]
        score += np.real((cached * raw.conj()).sum(axis=0) @ phases)
        energy += np.stack([(np.abs(k) ** 2).sum(axis=(0, 2)) for k in (cached, raw)])
    squared = np.maximum(energy.sum(axis=0)[:, None] - 2 * score, 0.0) / energy[0][:, None]
    order = np.argsort(squared, axis=1)
    slots = np.arange(len(order))
    return RecoveredPositions(
        position=order[:, 0],
        residual=np.sqrt(squared[slots, order[:, 0]]),
        runner_up=np.sqrt(squared[slots, order[:, 1]])
        if num_candidates > 1
        else np.full(len(order), np.inf),
    )


def log_mean_exp(values: np.ndarray) -> float:
    """log of the mean of exp(values), without overflow."""
    return float(logsumexp(values) - np.log(len(values)))
