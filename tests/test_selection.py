"""tempo.selection: logits to a distribution, and a distribution to a set, compared with NumPy."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import chisquare

from tempo.selection import SMALLEST_PROBABILITY, member_weights, read_out, select
from tempo.spec import READOUTS
from tests.checks import lets_in

# float32 softmax of logits up to 30 against float64: ten times the largest difference seen.
ROUNDING = 1e-6
DISTRIBUTION = torch.tensor([0.05, 0.30, 0.10, 0.30, 0.20, 0.05])

PROBABILITIES = hnp.arrays(
    np.float32, st.integers(1, 12), elements=st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 1.0])
)
THRESHOLDS = st.sampled_from([0.05, 0.1, 0.25, 0.3, 0.4, 0.5, 1.0])
LOGITS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(2, 9)),
    elements=st.floats(-30, 30, width=32, allow_subnormal=False),
)


def numpy_softmax(logits):
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def numpy_read_out(logits, probabilities, readout):
    """The read-out of docs/semantics.md in float64."""
    weights = np.array(probabilities, dtype=np.float64)
    return {
        "mixture": weights / weights.sum() @ numpy_softmax(logits),
        "mean_logits": numpy_softmax(logits.astype(np.float64).mean(axis=0)),
        "last": numpy_softmax(logits[-1]),
        "first": numpy_softmax(logits[0]),
    }[readout]


def by_definition(distribution, threshold=0.0, max_width=None, **rules):
    """The set of docs/semantics.md, without a sort of torch's."""
    return lets_in(distribution, threshold, **rules)[:max_width]


def test_a_probability_at_the_threshold_is_in_and_one_below_is_not():
    at = torch.tensor([0.5, 0.25, 0.25])
    below = torch.tensor([0.5, 0.25, float(np.nextafter(np.float32(0.25), np.float32(0)))])
    assert select(at, threshold=0.25).tokens == [0, 1, 2]
    assert select(below, threshold=0.25).tokens == [0, 1]


@given(st.floats(1e-6, 0.5), st.integers(-1, 1))
@settings(max_examples=200, deadline=None)
def test_no_token_below_a_threshold_joins_though_float32_cannot_hold_it(threshold, ulps):
    near = np.float32(threshold)
    for _ in range(abs(ulps)):
        near = np.nextafter(near, np.float32(ulps))
    distribution = torch.tensor([1.0, near])
    assert (
        select(distribution, threshold=threshold).tokens == [0, 1][: 1 + (float(near) >= threshold)]
    )


def test_a_threshold_between_two_numbers_of_float32_is_not_rounded_down():
    assert float(np.float32(0.3)) > 0.3
    assert float(np.float32(0.7)) < 0.7
    below, above = torch.tensor([1.0, 0.7]), torch.tensor([1.0, 0.3])
    assert select(below, threshold=0.7).tokens == [0]
    assert select(above, threshold=0.3).tokens == [0, 1]
    assert select(below, min_p=0.7).tokens == [0]


def test_members_come_by_falling_probability_and_ties_by_lower_id():
    chosen = select(DISTRIBUTION, threshold=0.1)
    assert chosen.tokens == [1, 3, 4, 2]
    assert chosen.probabilities == DISTRIBUTION[[1, 3, 4, 2]].tolist()
    assert chosen.tokens != sorted(chosen.tokens)
    assert (chosen.ended, chosen.stops) == ([], False)


def test_many_ties_come_by_lower_id():
    uniform = torch.full((5000,), 1 / 5000)
    assert select(uniform, threshold=1e-4).tokens == list(range(5000))
    assert select(uniform, threshold=1e-4, max_width=3).tokens == [0, 1, 2]
    uniform[4000] *= 2
    assert select(uniform, threshold=1e-4, max_width=3).tokens == [4000, 0, 1]


def test_without_any_above_the_threshold_the_argmax_alone_is_chosen():
    assert select(DISTRIBUTION, threshold=0.31) == ([1], DISTRIBUTION[[1]].tolist(), [], False)
    assert select(DISTRIBUTION.flip(0), threshold=0.31).tokens == [2]  # the lower of ids 2 and 4
    assert select(DISTRIBUTION, threshold=0.30).tokens == [1, 3]


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, None])
def test_max_width_keeps_the_most_probable(width):
    tokens = [1, 3, 4, 2][:width]
    chosen = select(DISTRIBUTION, threshold=0.1, max_width=width)
    assert chosen.tokens == tokens
    assert chosen.probabilities == DISTRIBUTION[tokens].tolist()
    assert select(DISTRIBUTION, threshold=0.9, max_width=width).tokens == [1]


@given(PROBABILITIES, THRESHOLDS, st.none() | st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_the_set_is_the_definition_for_any_distribution(distribution, threshold, width):
    chosen = select(torch.tensor(distribution), threshold=threshold, max_width=width)
    assert chosen.tokens == by_definition(distribution, threshold, width)
    assert chosen.probabilities == distribution[chosen.tokens].tolist()
    if len(chosen.tokens) > 1:
        assert chosen.tokens != by_definition(distribution, threshold, len(chosen.tokens) - 1)


# Probabilities that float32 holds, and whose sums are exact: ties of a rule are ties.
DYADIC = hnp.arrays(np.int64, st.integers(1, 12), elements=st.integers(0, 8)).filter(any)
RULES = st.fixed_dictionaries(
    {
        "threshold": st.sampled_from([0.0, 0.0, 0.0625, 0.125, 0.5]),
        "top_k": st.none() | st.integers(1, 13),
        "top_p": st.none() | st.sampled_from([0.125, 0.25, 0.5, 0.75, 0.9, 1.0]),
        "min_p": st.none() | st.sampled_from([0.125, 0.25, 0.5, 1.0]),
        "max_width": st.none() | st.integers(1, 5),
    }
)


def shares(counts):
    """Probabilities in sixty-fourths, or less where they would sum to more than one."""
    return (np.array(counts) / max(64, 2 ** math.ceil(math.log2(sum(counts))))).astype(np.float32)


@given(DYADIC, RULES)
@settings(max_examples=400, deadline=None)
def test_the_set_is_what_every_rule_lets_in(counts, rules):
    distribution = shares(counts)
    chosen = select(torch.tensor(distribution), **rules)
    expected = by_definition(distribution, **rules)
    assert chosen.tokens == expected
    assert chosen.probabilities == distribution[expected].tolist()


@given(DYADIC, RULES)
@settings(max_examples=200, deadline=None)
def test_rules_together_let_in_what_all_let_in_alone(counts, rules):
    distribution = torch.tensor(shares(counts))
    together = select(distribution, **rules).tokens
    everything = select(distribution).tokens
    of_each = [
        set(select(distribution, **{name: value}).tokens)
        for name, value in rules.items()
        if value is not None
    ]
    admitted = set(everything).intersection(*of_each)
    assert together == [token for token in everything if token in admitted]


@pytest.mark.parametrize(
    ("rules", "tokens"),
    [
        ({}, [1, 3, 4, 2, 0, 5]),
        ({"top_k": 1}, [1]),  # two are as probable, and the lower id counts
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 99}, [1, 3, 4, 2, 0, 5]),
        ({"top_p": 0.3}, [1]),
        ({"top_p": 0.31}, [1, 3]),
        ({"top_p": 0.75}, [1, 3, 4]),
        ({"top_p": 1.0}, [1, 3, 4, 2, 0, 5]),
        ({"min_p": 1.0}, [1, 3]),
        ({"min_p": 0.6}, [1, 3, 4]),
        ({"min_p": 0.6, "top_p": 0.31}, [1, 3]),
        ({"threshold": 0.15, "top_k": 4}, [1, 3, 4]),
        ({"threshold": 0.9, "top_k": 4, "top_p": 1.0}, [1]),
    ],
    ids=str,
)
def test_each_rule_by_hand(rules, tokens):
    assert select(DISTRIBUTION, **rules).tokens == tokens


def test_tokens_without_probability_never_join():
    distribution = torch.tensor([0.0, 0.5, 0.0, 0.5])
    for rules in ({}, {"top_k": 3}, {"top_p": 1.0}, {"sample": 4}, {"max_width": 4}):
        assert select(distribution, **rules).tokens == [1, 3]
    assert select(torch.tensor([0.25] * 4), top_k=3).tokens == [0, 1, 2]


def inclusion(weights, num_drawn):
    """How probably each token is among `num_drawn` drawn one after another without replacement."""
    found = dict.fromkeys(weights, 0.0)
    for drawn in itertools.permutations(weights, num_drawn):
        probability, left = 1.0, sum(weights.values())
        for token in drawn:
            probability *= weights[token] / left
            left -= weights[token]
        for token in drawn:
            found[token] += probability
    return found


# How many draws of the check by chi-square, and how improbable a value it may take.
DRAWS, RARE = 4000, 1e-4


def pairs_drawn(draw):
    """How often each pair of the four most probable tokens is drawn, and how often it should be."""
    weights = {token: float(DISTRIBUTION[token]) for token in (1, 3, 4, 2)}
    counts = dict.fromkeys(itertools.combinations(weights, 2), 0)
    for seed in range(DRAWS):
        counts[tuple(draw(seed))] += 1
    total = sum(weights.values())
    expected = []
    for one, other in counts:
        p, q = weights[one] / total, weights[other] / total
        expected.append(DRAWS * (p * q / (1 - p) + q * p / (1 - q)))
    return list(counts.values()), expected


def test_draws_without_replacement_have_the_right_frequencies():
    found, expected = pairs_drawn(
        lambda seed: select(DISTRIBUTION, threshold=0.1, sample=2, seed=seed).tokens
    )
    assert chisquare(found, expected).pvalue > RARE

    def two_of_all_alike(seed):
        return sorted(np.random.default_rng(seed).permutation(4)[:2])

    order = np.array([1, 3, 4, 2])
    found, _ = pairs_drawn(lambda seed: order[two_of_all_alike(seed)].tolist())
    assert chisquare(found, expected).pvalue < RARE


def test_each_token_is_drawn_as_often_as_it_should_be():
    weights = {token: float(DISTRIBUTION[token]) for token in range(6)}
    for num_drawn in (1, 2, 3):
        counts = np.zeros(6)
        for seed in range(DRAWS):
            counts[select(DISTRIBUTION, sample=num_drawn, seed=seed).tokens] += 1
        expected = np.array(list(inclusion(weights, num_drawn).values()))
        assert abs(expected.sum() - num_drawn) < 1e-6  # of DISTRIBUTION, which is float32
        error = np.sqrt(expected * (1 - expected) / DRAWS)
        assert (np.abs(counts / DRAWS - expected) < 4.5 * error).all()


def test_a_draw_keeps_the_order_of_members_and_is_the_same_for_a_seed():
    for seed in range(50):
        chosen = select(DISTRIBUTION, sample=3, seed=seed)
        ranked = [token for token in (1, 3, 4, 2, 0, 5) if token in chosen.tokens]
        assert chosen.tokens == ranked
        assert chosen == select(DISTRIBUTION, sample=3, seed=seed)
    drawn = {tuple(select(DISTRIBUTION, sample=3, seed=seed).tokens) for seed in range(50)}
    assert len(drawn) > 5


def test_a_draw_does_not_depend_on_candidates_that_lose():
    """Another rule that takes away what was not drawn changes nothing."""
    narrowed = 0
    for seed in range(200):
        few = select(DISTRIBUTION, threshold=0.1, sample=2, seed=seed).tokens
        many = select(DISTRIBUTION, sample=2, seed=seed).tokens
        if set(many) <= {1, 3, 4, 2}:
            assert many == few
        narrowed += many != few
    assert narrowed


def test_a_draw_of_as_many_as_may_join_is_no_draw():
    for seed in range(20):
        assert select(DISTRIBUTION, threshold=0.1, sample=4, seed=seed).tokens == [1, 3, 4, 2]
        assert select(DISTRIBUTION, threshold=0.1, sample=9, seed=seed).tokens == [1, 3, 4, 2]
        assert select(DISTRIBUTION, threshold=0.9, sample=9, seed=seed).tokens == [1]
    widths = {len(select(DISTRIBUTION, sample=4, max_width=2, seed=s).tokens) for s in range(20)}
    assert widths == {2}


def test_more_draws_keep_the_members_of_fewer():
    for seed in range(50):
        sets = [set(select(DISTRIBUTION, sample=n, seed=seed).tokens) for n in range(1, 7)]
        assert all(one < other for one, other in itertools.pairwise(sets))


def test_a_leading_end_of_sequence_stays_and_stops_the_run():
    leading = frozenset({1})
    for threshold, tokens in ((0.1, [1, 3, 4, 2]), (0.31, [1])):
        chosen = select(DISTRIBUTION, threshold=threshold, eos=leading)
        assert chosen == (tokens, DISTRIBUTION[tokens].tolist(), [], True)
    assert not select(DISTRIBUTION, threshold=0.1).stops


def test_an_end_of_sequence_tied_for_the_lead_stops_only_with_the_lower_id():
    assert select(DISTRIBUTION, threshold=0.1, eos=frozenset({1})).stops
    assert not select(DISTRIBUTION, threshold=0.1, eos=frozenset({3})).stops


def test_an_end_of_sequence_that_does_not_lead_is_left_out_and_named():
    chosen = select(DISTRIBUTION, threshold=0.1, eos=frozenset({4}))
    assert chosen == ([1, 3, 2], DISTRIBUTION[[1, 3, 2]].tolist(), [4], False)
    assert select(DISTRIBUTION, threshold=0.1).tokens == [1, 3, 4, 2]


def test_an_end_of_sequence_below_the_threshold_is_not_named():
    assert select(DISTRIBUTION, threshold=0.25, eos=frozenset({4})).ended == []
    assert select(DISTRIBUTION, threshold=0.20, eos=frozenset({4})).ended == [4]


@pytest.mark.parametrize(
    ("eos", "tokens", "ended", "stops"),
    [
        ({3, 2}, [1, 4], [3, 2], False),
        ({1, 4}, [1, 3, 4, 2], [], True),
        ({3, 4, 2}, [1], [3, 4, 2], False),
        ({0, 5}, [1, 3, 4, 2], [], False),
        ({0, 2, 99}, [1, 3, 4], [2], False),
    ],
)
def test_several_end_of_sequence_tokens_are_each_judged(eos, tokens, ended, stops):
    chosen = select(DISTRIBUTION, threshold=0.1, eos=frozenset(eos))
    assert (chosen.tokens, chosen.ended, chosen.stops) == (tokens, ended, stops)
    assert chosen.probabilities == DISTRIBUTION[tokens].tolist()
    assert select(DISTRIBUTION, threshold=0.1, eos=frozenset()).tokens == [1, 3, 4, 2]


@given(LOGITS, st.data())
@settings(max_examples=150, deadline=None)
def test_each_readout_is_the_definition(logits, data):
    size = len(logits)
    probabilities = data.draw(st.lists(st.floats(1e-3, 1.0), min_size=size, max_size=size))
    for readout in READOUTS:
        distribution = read_out(torch.tensor(logits), probabilities, readout)
        assert distribution.dtype == torch.float32
        assert distribution.shape == logits.shape[1:]
        expected = numpy_read_out(logits, probabilities, readout)
        assert np.abs(distribution.numpy() - expected).max() < ROUNDING
        assert abs(float(distribution.double().sum()) - 1) < 10 * ROUNDING


def test_the_readouts_differ_on_logits_that_differ():
    logits, probabilities = torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 4.0]]), [0.6, 0.2]
    results = [read_out(logits, probabilities, readout) for readout in READOUTS]
    for i, one in enumerate(results):
        assert all((one - other).abs().max() > 0.1 for other in results[:i])
    mixture = 0.75 * torch.softmax(logits[0], 0) + 0.25 * torch.softmax(logits[1], 0)
    assert torch.allclose(results[READOUTS.index("mixture")], mixture, atol=ROUNDING)
    unweighted = torch.softmax(logits, -1).mean(0)
    assert not torch.allclose(results[READOUTS.index("mixture")], unweighted, atol=0.1)


@given(
    hnp.arrays(
        np.float32, st.tuples(st.just(1), st.integers(1, 50)), elements=st.floats(-30, 30, width=32)
    ),
    st.floats(0, 1),
)
@settings(max_examples=100, deadline=None)
def test_every_readout_of_one_member_is_its_softmax_to_the_bit(logits, probability):
    logits = torch.tensor(logits)
    softmax = torch.softmax(logits[0], dim=-1)
    for readout in READOUTS:
        assert torch.equal(read_out(logits, [probability], readout), softmax)
    if logits.shape[1] > 1:
        other = torch.softmax(logits[0] + torch.eye(logits.shape[1])[0], -1)
        assert not torch.equal(read_out(logits, [probability], "mixture"), other)


def test_the_order_of_members_matters_to_first_and_last_and_not_to_the_others():
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    for readout in READOUTS:
        forward = read_out(logits, [0.6, 0.3], readout)
        backward = read_out(logits.flip(0), [0.3, 0.6], readout)
        same = torch.allclose(forward, backward, atol=ROUNDING)
        assert same == (readout in ("mixture", "mean_logits"))


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_weights_are_the_probabilities_renormalised(probabilities):
    weights = member_weights(probabilities)
    assert weights.dtype == torch.float64
    assert abs(float(weights.sum()) - 1) < 1e-12
    assert np.allclose(weights.numpy(), np.array(probabilities) / sum(probabilities), rtol=1e-12)
    if sum(probabilities) < 0.99:
        assert not np.allclose(weights.numpy(), probabilities)


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        ([0.0], [1.0]),
        ([0.0, 0.0], [0.5, 0.5]),
        ([0.4, 0.0], [1.0, SMALLEST_PROBABILITY / 0.4]),
        ([5e-324, 1e-40], [0.5, 0.5]),
    ],
)
def test_weights_survive_probabilities_that_underflow(probabilities, expected):
    weights = member_weights(probabilities)
    assert np.allclose(weights.numpy(), expected, rtol=1e-12, atol=0.0)
    assert torch.isfinite(torch.log(weights)).all()
    raw = torch.tensor(probabilities, dtype=torch.float64)
    assert not torch.isfinite(torch.log(raw)).all() or raw.sum() < SMALLEST_PROBABILITY


def test_a_mixture_of_members_that_underflow_is_finite():
    distribution = read_out(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), [0.0, 0.0], "mixture")
    assert torch.allclose(distribution, torch.tensor([0.5, 0.5]))
    assert torch.isnan(torch.zeros(2) / torch.zeros(2).sum()).all()


@pytest.mark.parametrize("readout", ["median", "Mixture", "", None])
def test_an_unknown_readout_is_refused(readout):
    with pytest.raises(ValueError, match="unknown readout"):
        read_out(torch.zeros(2, 3), [0.5, 0.5], readout)
    assert read_out(torch.zeros(2, 3), [0.5, 0.5], "mixture").shape == (3,)


@pytest.mark.parametrize("readout", READOUTS)
def test_float64_logits_are_read_in_float64(readout):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 8, (4, 1000))
    probabilities = [0.4, 0.3, 0.2, 0.1]
    exact = numpy_read_out(logits, probabilities, readout).astype(np.float32)
    wide = read_out(torch.tensor(logits), probabilities, readout)
    narrow = read_out(torch.tensor(logits, dtype=torch.float32), probabilities, readout)
    assert wide.dtype == narrow.dtype == torch.float32
    # float64 inside: nothing is lost but the last rounding to float32
    assert np.abs(wide.numpy() - exact).max() <= np.spacing(exact.max())
    assert (np.abs(wide.numpy() - exact) <= np.spacing(exact)).all()
    assert not (np.abs(narrow.numpy() - exact) <= np.spacing(exact)).all()


def test_half_precision_logits_are_read_in_float32():
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    probabilities = [0.5, 0.3, 0.1]
    for readout in READOUTS:
        found = read_out(logits, probabilities, readout)
        assert torch.equal(found, read_out(logits.float(), probabilities, readout))
    low = torch.softmax(logits[0], -1)
    assert not torch.equal(low.float(), read_out(logits, probabilities, "first"))
