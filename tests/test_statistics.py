"""tempo.statistics: each test beside its definition, textbook values or SciPy, and on bad data."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tempo import statistics
from tempo.claims import Claim, judge
from tempo.statistics import (
    COCHRAN,
    bca_interval,
    bootstrap_t,
    hodges_lehmann,
    holm,
    map_test,
    mean_test,
    num_for_share,
    one_sided_mean,
    one_sided_ranks,
    pseudomedian_test,
    share_test,
    sign_flip,
    skew_note,
)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "NUM_RESAMPLES", 1999)


def sample(n=40, mean=0.3, seed=0):
    return np.random.default_rng(seed).normal(mean, 1, n)


@given(st.lists(st.integers(-6, 6), min_size=4, max_size=8))
@settings(max_examples=50, deadline=None)
def test_sign_flips_of_few_values_are_all_of_them(numbers):
    values = np.array(numbers) / 10 + 0.01
    all_signs = itertools.product((-1, 1), repeat=len(values))
    sums = np.array([np.dot(signs, values) for signs in all_signs])
    greater = np.mean(sums - values.sum() >= -1e-9)
    less = np.mean(values.sum() - sums >= -1e-9)
    assert np.allclose(sign_flip(values), (greater, less))
    assert greater + less > 1  # what was observed counts on both sides


def t_test(values):
    """SciPy's one-sided p for a mean above 0."""
    return stats.ttest_1samp(values, 0, alternative="greater").pvalue


def test_many_sign_flips_are_drawn_and_count_the_observed_one():
    strong = sample(mean=9.0)
    assert sign_flip(strong) == (1 / 2000, 1.0)
    assert sign_flip(-strong) == (1.0, 1 / 2000)
    assert abs(sign_flip(sample())[0] - t_test(sample())) < 0.02


def test_the_studentised_bootstrap_is_the_t_test_for_normal_data_and_not_for_skewed():
    values = sample(200, 0.1)
    assert abs(bootstrap_t(values)[0] - t_test(values)) < 0.02
    skewed = 1 - np.random.default_rng(3).exponential(1, 15) + 0.5
    assert bootstrap_t(skewed)[0] > 1.3 * t_test(skewed)


@pytest.mark.parametrize("scale", [1e-200, 1e-6, 1.0, 1e6, 1e100])
def test_the_unit_of_measurement_does_not_matter(scale):
    assert np.allclose(one_sided_mean(sample() * scale), one_sided_mean(sample()), atol=2e-3)
    assert np.allclose(one_sided_ranks(sample() * scale), one_sided_ranks(sample()))
    assert not np.allclose(one_sided_mean(sample() + 0.1), one_sided_mean(sample()), atol=2e-3)


def test_one_mean_is_judged_by_the_more_careful_of_two_tests():
    for values in (sample(), sample(60, -0.3), np.linspace(-1, 2, 20)):
        scaled = values / np.abs(values).max()
        assert one_sided_mean(values) == tuple(map(max, sign_flip(scaled), bootstrap_t(scaled)))


def test_signed_ranks_are_wilcoxons():
    # Hollander & Wolfe (1973), table 3.1, is the example of R's wilcox.test: V = 40, one-sided
    # p = 0.01953
    before = np.array([1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30])
    after = np.array([0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29])
    assert round(one_sided_ranks(before - after)[0], 5) == 0.01953
    for n in (6, 13, 30):
        exact = stats.wilcoxon(sample(n), alternative="greater", method="exact").pvalue
        assert math.isclose(one_sided_ranks(sample(n))[0], exact)
    approximate = stats.wilcoxon(sample(160), alternative="greater").pvalue
    assert abs(one_sided_ranks(sample(160))[0] - approximate) < 2e-4


@given(st.lists(st.integers(-3, 5), min_size=10, max_size=25), st.integers(-4, 6))
@settings(max_examples=100, deadline=None)
def test_the_rank_test_rejects_nothing_that_its_interval_includes(numbers, edge):
    values = np.array(numbers, dtype=float)
    estimate, low, high = hodges_lehmann(values)
    p, against = (2 * p for p in one_sided_ranks(values - edge))
    assert low <= estimate <= high
    assert p >= 0.05 or low > edge
    assert against >= 0.05 or high < edge


def test_the_rank_test_is_stricter_than_wilcoxons_where_the_data_are_skewed():
    def wilcoxon(values):
        return stats.wilcoxon(values, alternative="less").pvalue

    skewed = stats.expon.ppf((np.arange(200) + 0.5) / 200) - 1
    assert one_sided_ranks(skewed)[1] > 1.2 * wilcoxon(skewed)
    symmetric = np.concatenate([skewed, -skewed]) - 0.1
    assert math.isclose(one_sided_ranks(symmetric)[1], wilcoxon(symmetric), rel_tol=0.05)


def test_a_pseudomedian_is_the_median_of_all_pairs_means():
    values = sample(11)
    pairs = [(values[i] + values[j]) / 2 for i in range(11) for j in range(i, 11)]
    assert math.isclose(hodges_lehmann(values)[0], np.median(pairs))
    assert (
        pseudomedian_test(values, "greater", 0.0).estimate
        != mean_test(values, "greater", 0.0).estimate
    )


def test_a_share_has_the_exact_binomial_p_doubled():
    found = share_test(9, 10, 0.5)
    assert math.isclose(found.p, 2 * 11 / 1024)
    assert found.p_against == 1.0
    assert share_test(1, 10, 0.5).p_against == found.p
    assert share_test(5, 10, 0.5).p == 1.0


@pytest.mark.parametrize(("planned", "margin"), [(0.4, 0.05), (1.0, 0.95), (0.1, 0.5), (0.0, 0.05)])
def test_so_many_units_tell_two_shares_apart_and_one_fewer_do_not(planned, margin):
    def power(n):
        found = [share_test(held, n, margin) for held in range(n + 1)]
        ps = np.array([f.p if planned > margin else f.p_against for f in found])
        return stats.binom.pmf(np.arange(n + 1), n, planned)[ps < 0.05].sum()

    needed = num_for_share(planned, margin, 0.05, 0.9)
    assert power(needed) >= 0.9
    assert needed == statistics.MIN_UNITS or power(needed - 1) < 0.9


def test_an_equivalence_is_the_worse_of_two_tests_and_its_opposite_the_better():
    values = sample(60, 0.2)
    upper, lower = one_sided_mean(values - 0.5), one_sided_mean(values + 0.5)
    found = mean_test(values, "equivalent", 0.5)
    assert found.p == min(1.0, 2 * max(upper[1], lower[0]))
    assert found.p_against == min(1.0, 2 * min(upper[0], lower[1]))


def test_the_direction_against_a_long_tail_is_not_tested_on_few_values():
    skewed = np.array([0.0] * 9 + [1.0])
    too_few = "too few for data this skewed to show that the mean is below anything"
    assert skew_note(skewed).startswith(too_few)
    assert "above anything" in skew_note(-skewed)
    assert one_sided_mean(skewed - 0.5)[1] == 1.0 > sign_flip(skewed - 0.5)[1]
    needed = int(skew_note(skewed).rstrip(")").split()[-1])
    assert needed == math.floor(COCHRAN * stats.skew(skewed) ** 2) + 1
    assert skew_note(np.tile(skewed, needed // 10 + 1)) == ""


def test_the_best_of_one_cell_is_the_test_of_its_mean():
    values = sample(30, 0.5)
    found = map_test(values[:, None, None], 0.0)
    alone = [max(pair) for pair in zip(sign_flip(values), bootstrap_t(values), strict=True)]
    assert np.allclose((found.p, found.p_against), [min(1, 2 * p) for p in alone], atol=0.01)


def test_the_best_of_many_cells_needs_more_than_the_best_of_one():
    cells = np.random.default_rng(0).normal(0, 1, (40, 20, 10))
    best = cells.mean(axis=0).argmax()
    assert 2 * sign_flip(cells.reshape(40, -1)[:, best])[0] < 0.05 < map_test(cells, 0.0).p


def test_sign_flips_alone_would_find_something_in_skewed_maps_of_nothing():
    def t(values):
        return stats.ttest_1samp(values, 0).statistic

    rng = np.random.default_rng(0)
    maps = [1 - rng.exponential(1, (20, 30, 9)) for _ in range(10)]
    assert not any(map_test(each, 0.0).p < 0.05 for each in maps)
    signs = rng.choice([-1.0, 1.0], (500, 20))[:, :, None]
    num_found = 0
    for each in maps:
        cells = each.reshape(20, -1)
        flipped = stats.ttest_1samp(signs * cells, 0, axis=1).statistic.max(axis=1)
        num_found += t(cells).max() > np.quantile(flipped, 0.95)
    assert num_found >= 5


def test_the_interval_is_scipys_bca():
    values = sample()
    rng = np.random.default_rng(statistics.SEED)

    def bootstrap(method):
        found = stats.bootstrap((values,), np.mean, n_resamples=1999, method=method, rng=rng)
        return found.confidence_interval.low, found.confidence_interval.high

    assert np.allclose(bca_interval(values), bootstrap("BCa"))
    assert not np.allclose(bca_interval(values), bootstrap("percentile"))


def test_holm_is_the_example_by_hand():
    assert np.allclose(holm([0.01, 0.04, 0.03, 0.005], 4), [0.03, 0.06, 0.06, 0.02])
    assert np.allclose(holm([0.01, 0.04], 4), [0.04, 0.12])
    assert holm([], 3) == []


BREAKING = {
    "one differs": [0.0] * 11 + [1.0],
    "differ by rounding": [0.3] * 11 + [0.3 + 5.6e-17],
    "one huge": [1e-300] * 11 + [1e300],
    "tiny": list(np.linspace(1, 2, 12) * 1e-308),
    "huge": list(np.linspace(1, 2, 12) * 1e300),
    "two values": [0.0, 1.0] * 6,
    "on the margin": [0.5] * 11 + [0.6],
}


HALF = Claim(
    id="c",
    statement="",
    statistic="",
    values=lambda case: case,
    test="greater",
    refuted_by="",
    control=lambda case: 0.5,
    control_statement="",
    margin=0.5,
)


@pytest.mark.parametrize("values", BREAKING.values(), ids=BREAKING)
@pytest.mark.parametrize("test", ["greater", "less", "equivalent", "somewhere"])
@pytest.mark.parametrize("estimand", ["mean", "pseudomedian"])
def test_nothing_breaks_on_ill_conditioned_data(values, test, estimand):
    """Warnings are errors here. A p is never 0, and NaN only where there is no spread."""
    claim = replace(HALF, test=test, estimand=estimand, control=lambda case: -case)
    if test == "somewhere":
        values = [np.array([value, -value]) for value in values]
    finding = judge(claim, values)
    assert finding.verdict in ("SUPPORTED", "REFUTED", "INCONCLUSIVE")
    if math.isnan(finding.p):
        assert "no spread" in finding.reason
    else:
        assert 0 < finding.p <= 1
        assert 0 < finding.p_against <= 1


@pytest.mark.parametrize(("test", "verdict"), [("greater", "SUPPORTED"), ("less", "REFUTED")])
def test_data_of_any_size_get_their_verdict(test, verdict):
    assert judge(replace(HALF, test=test), BREAKING["huge"]).verdict == verdict
