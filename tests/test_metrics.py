"""tempo.metrics: distances as in SciPy, attention scores by hand, positions from rotated keys."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import special, stats
from scipy.spatial import distance

import tempo
from tempo import metrics
from tempo.metrics import SMALLEST

# Sums of up to 50 float64 terms of order one.
ROUNDING = 1e-12

HALVES, THIRDS = np.array([0.5, 0.5, 0.0]), np.array([1.0, 1.0, 1.0]) / 3


DISTANCES = ("tv", "kl", "kl_reverse", "js", "max_abs")


def distributions(size, low=0.0):
    """Distributions over `size` tokens."""
    elements = st.floats(low, 1.0, allow_subnormal=False)
    weights = hnp.arrays(np.float64, size, elements=elements).filter(lambda a: a.sum() > 1e-3)
    return weights.map(lambda a: a / a.sum())


def with_size(strategy, low=2):
    return st.integers(low, 30).flatmap(strategy)


PAIRS = with_size(lambda n: st.tuples(distributions(n), distributions(n)))
POSITIVE_PAIRS = with_size(lambda n: st.tuples(distributions(n, 1e-4), distributions(n, 1e-4)))


def test_closed_forms():
    assert math.isclose(metrics.total_variation(HALVES, THIRDS), 1 / 3)
    assert math.isclose(metrics.kl_divergence(HALVES, THIRDS), math.log(1.5))
    assert math.isclose(metrics.entropy(THIRDS), math.log(3))
    assert math.isclose(metrics.entropy(HALVES), math.log(2))
    assert math.isclose(metrics.cosine(HALVES, THIRDS), math.sqrt(2 / 3))
    a, b = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert (metrics.total_variation(a, b), metrics.cosine(a, b)) == (1.0, 0.0)
    assert math.isclose(metrics.jensen_shannon(a, b), math.log(2))
    p = np.array([0.25, 0.75])
    of_p = 0.25 * math.log(0.25 / 0.625) + 0.75 * math.log(0.75 / 0.375)
    of_a = math.log(1 / 0.625)
    assert math.isclose(metrics.jensen_shannon(p, a), (of_p + of_a) / 2)
    assert not math.isclose(metrics.jensen_shannon(p, b), (of_p + of_a) / 2)


def test_temperature_has_the_divergence_of_an_exponential_family():
    logits = np.array([1.0, -2.0, 0.5, 3.0])
    p, q = metrics.softmax(logits), metrics.softmax(2 * logits)
    # KL(p || q) = A(2) - A(1) - (2 - 1) A'(1) with A(t) = log sum exp(t x)
    expected = special.logsumexp(2 * logits) - special.logsumexp(logits) - p @ logits
    assert math.isclose(metrics.kl_divergence(p, q), expected, rel_tol=1e-9)
    assert not math.isclose(metrics.kl_divergence(q, p), expected, rel_tol=1e-3)


@given(POSITIVE_PAIRS)
@settings(max_examples=100, deadline=None)
def test_distances_are_scipys(pair):
    p, q = pair
    half_of_taxi = 0.5 * distance.cityblock(p, q)
    assert math.isclose(metrics.total_variation(p, q), half_of_taxi, abs_tol=ROUNDING)
    assert math.isclose(metrics.kl_divergence(p, q), stats.entropy(p, q), abs_tol=ROUNDING)
    # SciPy takes the root of -1e-17 where p and q are nearly equal
    with np.errstate(invalid="ignore"):
        root = np.nan_to_num(distance.jensenshannon(p, q))
    assert math.isclose(metrics.jensen_shannon(p, q), root**2, abs_tol=1e-9)
    assert math.isclose(metrics.cosine(p, q), 1 - distance.cosine(p, q), abs_tol=ROUNDING)
    assert math.isclose(metrics.entropy(p), stats.entropy(p), abs_tol=ROUNDING)


def test_the_comparison_with_scipy_sees_a_fault():
    p, q = np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.3, 0.5])
    tv, kl = metrics.total_variation(p, q), metrics.kl_divergence(p, q)
    assert not math.isclose(tv, distance.cityblock(p, q), abs_tol=ROUNDING)
    assert not math.isclose(kl, stats.entropy(q, p), abs_tol=ROUNDING)
    assert not math.isclose(kl, stats.entropy(p, q, base=2), abs_tol=ROUNDING)
    root = distance.jensenshannon(p, q)
    assert not math.isclose(metrics.jensen_shannon(p, q), root, abs_tol=1e-9)


@given(PAIRS)
@settings(max_examples=150, deadline=None)
def test_bounds_and_symmetries(pair):
    p, q = pair
    tv, js = metrics.total_variation(p, q), metrics.jensen_shannon(p, q)
    kl = metrics.kl_divergence(p, q)
    assert 0 <= tv <= 1 + ROUNDING
    assert 0 <= kl < math.inf
    assert 0 <= js <= math.log(2) + ROUNDING
    assert 0 <= metrics.cosine(p, q) <= 1 + ROUNDING
    assert 0 <= metrics.entropy(p) <= math.log(len(p)) + ROUNDING
    assert tv**2 <= kl / 2 + ROUNDING  # Pinsker
    assert js <= tv * math.log(2) + ROUNDING  # Lin 1991
    for symmetric in (metrics.total_variation, metrics.jensen_shannon, metrics.cosine):
        assert math.isclose(symmetric(p, q), symmetric(q, p), abs_tol=ROUNDING)
    order = np.random.default_rng(0).permutation(len(p))
    assert math.isclose(metrics.kl_divergence(p[order], q[order]), kl, abs_tol=ROUNDING)


@given(with_size(distributions))
@settings(max_examples=60, deadline=None)
def test_a_distribution_is_at_no_distance_from_itself_and_at_some_from_another(p):
    same = metrics.compare(p, p, ks=(1, 2))
    assert all(same[name] == 0.0 for name in DISTANCES)
    assert math.isclose(same["cosine"], 1.0)
    assert same["top1"] == same["top2"] == 1.0
    other = np.roll(0.5 * p + 0.5 * np.eye(len(p))[p.argmax()], 1)
    moved = metrics.compare(p, other, ks=(1,))
    assert all(moved[name] > 0 for name in DISTANCES)
    assert moved["top1"] == 0.0 or (p.max() == np.sort(p)[-2])


def test_kl_is_not_symmetric():
    assert metrics.kl_divergence(HALVES, THIRDS) < 1 < metrics.kl_divergence(THIRDS, HALVES)


def test_zeros_do_not_make_a_divergence_infinite():
    a, b = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert stats.entropy(a, b) == math.inf
    assert math.isclose(metrics.kl_divergence(a, b), -math.log(SMALLEST), rel_tol=1e-9)
    assert metrics.kl_divergence(THIRDS, HALVES) < -math.log(SMALLEST)
    assert all(math.isfinite(value) for value in metrics.compare(a, b, ks=(1,)).values())


def test_a_term_of_a_float32_softmax_that_underflows_is_bounded():
    logits = np.array([0.0, -300.0])
    exact, rounded = metrics.softmax(logits), metrics.softmax(logits).astype(np.float32)
    assert exact[1] > 0 == rounded[1]
    half = np.array([0.5, 0.5])
    assert metrics.kl_divergence(half, exact) == metrics.kl_divergence(half, rounded) < 0.5 * 88
    assert stats.entropy(half, exact) > 100


def test_float32_distributions_are_compared_in_float64():
    p = metrics.softmax(np.random.default_rng(0).normal(0, 3, 50_000)).astype(np.float32)
    q = np.roll(p, 1)
    exact = 0.5 * math.fsum(abs(float(a) - float(b)) for a, b in zip(p, q, strict=True))
    assert math.isclose(metrics.total_variation(p, q), exact, rel_tol=1e-13)
    assert not math.isclose(0.5 * float(np.cumsum(np.abs(p - q))[-1]), exact, rel_tol=1e-8)


@given(
    hnp.arrays(np.float64, st.integers(1, 20), elements=st.floats(-700, 700)), st.floats(-1e4, 1e4)
)
@settings(max_examples=60, deadline=None)
def test_softmax_sums_to_one_and_ignores_a_constant(logits, constant):
    p = metrics.softmax(logits)
    assert p.dtype == np.float64
    assert math.isclose(p.sum(), 1.0)
    assert np.allclose(metrics.softmax(logits + constant), p, atol=1e-9)
    if 0.01 < p[0] < 0.99:
        assert not np.allclose(metrics.softmax(logits + np.eye(len(logits))[0]), p, atol=1e-9)


def test_softmax_is_along_the_last_axis():
    logits = np.array([[0.0, math.log(3)], [math.log(4), 0.0]], dtype=np.float32)
    assert np.allclose(metrics.softmax(logits), [[0.25, 0.75], [0.8, 0.2]])
    assert not np.allclose(metrics.softmax(logits.T).T, metrics.softmax(logits))


def test_top_k_overlap_counts_what_both_rank_high():
    p = np.array([0.4, 0.3, 0.2, 0.1, 0.0])
    q = np.array([0.3, 0.4, 0.0, 0.1, 0.2])
    found = [metrics.top_k_overlap(p, q, k) for k in (1, 2, 3, 4, 5)]
    assert found == [0.0, 1.0, 2 / 3, 3 / 4, 1.0]
    assert metrics.top_k_overlap(p, p, 1) == 1.0
    assert metrics.top_k_overlap(p, p[::-1], 2) == 0.0


@given(st.permutations(range(12)), st.permutations(range(12)), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_top_k_overlap_is_its_definition(one, other, k):
    p, q = np.array(one, np.float32), np.array(other, np.float32)
    expected = len(set(np.argsort(-p)[:k]) & set(np.argsort(-q)[:k])) / k
    assert metrics.top_k_overlap(p, q, k) == metrics.top_k_overlap(q, p, k) == expected
    worst = set(np.argsort(p)[:k])
    assert metrics.top_k_overlap(p, -p, k) == len(worst & set(np.argsort(-p)[:k])) / k


def test_compare_names_every_distance():
    p, q = metrics.softmax(np.arange(30.0)), metrics.softmax(np.arange(30.0)[::-1])
    found = metrics.compare(p, q)
    distances = ["tv", "kl", "kl_reverse", "js", "cosine", "max_abs"]
    assert list(found) == [*distances, "top1", "top5", "top10", "top20"]
    assert all(type(value) is float for value in found.values())
    assert found["kl_reverse"] == metrics.kl_divergence(q, p)
    assert found["max_abs"] == np.abs(p - q).max()
    assert (found["top10"], found["top20"]) == (0.0, 0.5)
    skewed = metrics.compare(HALVES, THIRDS, ks=(1,))
    assert skewed["kl"] != skewed["kl_reverse"]


# One layer, two heads, a set of two after three prompt slots. Rows are queries.
HEADS = np.array([
    [
        [[0.4, 0.2, 0.1, 0.2, 0.1], [0.1, 0.1, 0.1, 0.3, 0.4]],
        [[0.5, 0.25, 0.0, 0.25, 0.0], [0.7, 0.0, 0.1, 0.0, 0.2]],
    ]
])  # fmt: skip


def test_sibling_attention_is_the_example_by_hand():
    scores = metrics.sibling_attention(HEADS, [3, 4])
    assert np.allclose(scores.to_sibling, [[(0.1 + 0.3) / 2, 0.0]])
    assert np.allclose(scores.to_context, [[1.0 / 6, 1.55 / 6]])
    assert np.allclose(scores.to_context_without_sink, [[0.5 / 4, 0.35 / 4]])
    assert np.allclose(scores.self_mass, [[(0.2 + 0.4) / 2, (0.25 + 0.2) / 2]])
    assert np.allclose(scores.sibling_mass, [[0.2, 0.0]])
    assert np.allclose(scores.sink_mass, [[0.25, 0.6]])
    assert scores.max_to_sibling == 0.3
    assert math.isclose(scores.var_to_sibling, np.var([0.1, 0.3, 0.0, 0.0]))
    moved = metrics.sibling_attention(HEADS, [2, 3])
    assert not np.allclose(moved.to_sibling, scores.to_sibling)


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(2, 5),
    st.integers(1, 6),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_self_siblings_and_context_share_all_mass(layers, heads, width, context, seed):
    logits = np.random.default_rng(seed).normal(0, 2, (layers, heads, width, context + width))
    attention = metrics.softmax(logits).astype(np.float32)
    scores = metrics.sibling_attention(attention, range(context, context + width))
    assert scores.to_sibling.shape == scores.self_mass.shape == (layers, heads)
    mass = scores.self_mass + scores.sibling_mass + context * scores.to_context
    assert np.allclose(mass, 1.0, atol=1e-6)
    assert np.allclose(scores.sibling_mass, (width - 1) * scores.to_sibling)
    if context > 1:
        whole = scores.sink_mass + (context - 1) * scores.to_context_without_sink
        assert np.allclose(whole, context * scores.to_context)
    else:
        assert np.isnan(scores.to_context_without_sink).all()
    means = scores.self_mass + scores.to_sibling + scores.to_context
    assert not np.allclose(means, 1.0, atol=1e-6) or (width == 2 and context == 1)


def test_isolated_siblings_score_zero_and_one_leak_shows():
    attention = np.zeros((2, 2, 3, 6))
    attention[..., :3] = 0.2
    attention[..., 3:] = 0.4 * np.eye(3)
    scores = metrics.sibling_attention(attention, [3, 4, 5])
    assert scores.max_to_sibling == scores.var_to_sibling == 0.0
    assert (scores.to_sibling == 0).all()
    assert np.allclose(scores.self_mass, 0.4)
    attention[1, 0, 2, 3] = 1e-6
    leaky = metrics.sibling_attention(attention, [3, 4, 5])
    assert leaky.max_to_sibling == 1e-6
    assert (leaky.to_sibling > 0).tolist() == [[False, False], [True, False]]


def test_a_set_of_one_has_no_siblings():
    with pytest.raises(ValueError, match=r"a set of 1 has no siblings.*expected at least 2"):
        metrics.sibling_attention(HEADS[:, :, :1], [3])
    assert metrics.sibling_attention(HEADS, [3, 4]).max_to_sibling > 0


def test_sibling_attention_of_the_model_obeys_its_visibility(tiny):
    replay = [[65, 66, 67], [68]]
    for visibility in ("isolated", "visible"):
        settings = {"replay": replay, "visibility": visibility, "capture": "attention"}
        step = tempo.generate(tiny, "The cat", **settings).steps[0]
        scores = metrics.sibling_attention(step.attention, step.slots)
        mass = scores.self_mass + scores.sibling_mass + step.slots[0] * scores.to_context
        assert np.allclose(mass, 1.0, atol=1e-5)
        assert (scores.max_to_sibling == 0.0) == (visibility == "isolated")


@given(
    hnp.arrays(np.float64, (2, 2, 3, 5), elements=st.floats(0.01, 1.0)),
    st.floats(0.01, 1.0),
    st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_rows_that_are_scaled_have_no_context_distance(attention, scale, start):
    scaled = attention * scale
    scaled[..., start:] = 0.7  # what happens beyond the context does not matter
    assert np.allclose(metrics.context_distance(attention, scaled, start), 0.0, atol=ROUNDING)
    if start > 1:
        changed = attention.copy()
        changed[1, 0, 2, 0] += 1.0
        moved = metrics.context_distance(attention, changed, start)
        assert (moved > 1e-4).tolist() == [[False, False], [True, False]]


def test_context_distance_is_the_example_by_hand():
    one = np.array([[[[0.5, 0.5, 0.0], [0.2, 0.2, 0.6]]]])
    other = np.array([[[[0.3, 0.1, 0.6], [0.4, 0.4, 0.2]]]])
    assert np.allclose(metrics.context_distance(one, other, 2), [[0.25 / 2]])
    assert np.allclose(metrics.context_distance(one, other, 3), [[(0.6 + 0.4) / 2]])
    first, second = np.array([[[[1.0, 0.0]]]]), np.array([[[[0.0, 1.0]]]])
    assert metrics.context_distance(first, second, 2) == [[1.0]]


def test_a_row_without_context_has_no_distance():
    one = np.array([[[[0.0, 0.0, 1.0]], [[0.5, 0.5, 0.0]]]])
    assert np.isnan(metrics.context_distance(one, one, 2)).tolist() == [[True, False]]


def rotate(raw, positions, frequencies):
    """Llama's half-split rotation of raw keys [L, Hkv, N, D], written with cosines and sines."""
    keys = raw.copy()
    for layer, frequency in enumerate(frequencies):
        angles = np.outer(positions, frequency)  # [N, d]
        half = len(frequency)
        first, second = raw[layer, ..., :half], raw[layer, ..., half : 2 * half]
        keys[layer, ..., :half] = first * np.cos(angles) - second * np.sin(angles)
        keys[layer, ..., half : 2 * half] = second * np.cos(angles) + first * np.sin(angles)
    return keys


ROTATED = st.tuples(
    st.lists(st.integers(0, 39), min_size=1, max_size=8),  # positions
    st.integers(1, 3),  # layers
    st.integers(1, 3),  # heads
    st.integers(4, 8),  # frequencies a layer
    st.integers(0, 6),  # dimensions that are not rotated
    st.integers(0, 2**32 - 1),
)


def planted(positions, layers, heads, half, rest, seed, dtype=np.float64):
    """Keys rotated to these positions, the raw keys, and the frequencies of each layer."""
    rng = np.random.default_rng(seed)
    # every pair has unit length, so that a pair that tells two positions apart is never short
    angles = rng.uniform(0, 2 * math.pi, (layers, heads, len(positions), half))
    unrotated = rng.normal(size=(*angles.shape[:3], rest))
    raw = np.concatenate([np.cos(angles), np.sin(angles), unrotated], axis=-1)
    frequencies = [np.exp(rng.uniform(math.log(1e-3), 0.0, half)) for _ in range(layers)]
    for frequency in frequencies:
        # as in every rotary table, the fastest pair turns by one radian a position
        frequency[0] = 1.0
    return rotate(raw, positions, frequencies).astype(dtype), raw.astype(dtype), frequencies


@given(ROTATED)
@settings(max_examples=80, deadline=None)
def test_positions_of_rotated_keys_are_recovered(case):
    positions = case[0]
    keys, raw, frequencies = planted(*case)
    found = metrics.recover_positions(keys, raw, frequencies, 40)
    assert found.position.tolist() == positions
    # the residual is the root of a difference of sums that agree, so the root of rounding
    assert (found.residual < 1e-6).all()
    assert (found.runner_up > 0.01).all()
    assert (found.runner_up > found.residual).all()
    further = rotate(raw, np.array(positions) + 1, frequencies)
    shifted = metrics.recover_positions(further, raw, frequencies, 41)
    assert shifted.position.tolist() == [position + 1 for position in positions]


@given(st.lists(st.integers(0, 39), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_raw_keys_of_another_token_leave_a_large_residual(positions, seed):
    keys, raw, frequencies = planted(positions, 2, 2, 8, 0, seed)
    _, other, _ = planted(positions, 2, 2, 8, 0, [seed, 1])
    found = metrics.recover_positions(keys, other, frequencies, 40)
    assert (found.residual > 0.5).all()
    assert (found.residual <= found.runner_up).all()
    assert (metrics.recover_positions(keys, raw, frequencies, 40).residual < 1e-6).all()


def test_a_position_beyond_the_candidates_or_another_table_leaves_a_large_residual():
    keys, raw, frequencies = planted([3, 30], 2, 2, 8, 0, seed=5)
    found = metrics.recover_positions(keys, raw, frequencies, 20)
    assert found.position[0] == 3
    assert found.residual[0] < 1e-6
    assert found.residual[1] > 0.1
    turned = [frequency[::-1] for frequency in frequencies]
    wrong = metrics.recover_positions(keys, raw, turned, 40)
    assert (wrong.residual > 0.1).all()


def test_the_only_candidate_has_no_runner_up():
    keys, raw, frequencies = planted([0], 1, 1, 4, 0, seed=0)
    assert metrics.recover_positions(keys, raw, frequencies, 1).runner_up.tolist() == [math.inf]
    assert metrics.recover_positions(keys, raw, frequencies, 2).runner_up[0] < math.inf


def test_positions_are_recovered_from_float32_and_from_the_model(tiny):
    positions = [0, 7, 7, 7, 39]
    found = metrics.recover_positions(*planted(positions, 3, 2, 8, 0, seed=3, dtype=np.float32), 40)
    assert found.position.tolist() == positions
    replay = [[65, 66, 67], [68, 69]]
    for mode in ("shared", "sequential"):
        trace = tempo.generate(tiny, "The cat", replay=replay, positions=mode, capture="kv")
        tables, candidates = tiny.rotary_frequencies, trace.num_slots + 5
        found = metrics.recover_positions(trace.keys, trace.raw_keys, tables, candidates)
        assert found.position.tolist() == trace.slot_position.tolist()
        assert (found.residual < 1e-3).all()
        assert (found.runner_up > 0.1).all()
        assert (len(set(found.position.tolist())) == trace.num_slots) == (mode == "sequential")


@given(
    hnp.arrays(np.float64, st.integers(1, 20), elements=st.floats(-5, 5)), st.floats(-2000, 2000)
)
@settings(max_examples=50, deadline=None)
def test_log_mean_exp_is_its_definition_without_overflow(values, constant):
    expected = math.log(np.exp(values).mean())
    assert math.isclose(metrics.log_mean_exp(values), expected, abs_tol=1e-12)
    assert math.isclose(metrics.log_mean_exp(values + constant), expected + constant, abs_tol=1e-9)
    assert metrics.log_mean_exp(values + 1.0) != metrics.log_mean_exp(values)
