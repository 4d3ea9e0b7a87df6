"""tempo.claims: verdicts on data whose answer is known, their correction, and how often null data fool them."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tempo import statistics
from tempo.claims import ALPHA, MIN_UNITS, Claim, correct, declared_sizes, judge

# Enough for p-values down to 1/200; the smallest alpha used here is 0.01.
FEW_RESAMPLES = 199
NUM_SIMULATIONS = 200
# Three standard errors of a share of NUM_SIMULATIONS whose expectation is ALPHA: one true null in 740 goes beyond.
TOO_MANY = ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / NUM_SIMULATIONS)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "NUM_RESAMPLES", FEW_RESAMPLES)


def make_claim(test="greater", **changes):
    """A claim about plain numbers; its control is the opposite of what it says."""
    opposite = {
        "greater": lambda case: 2 * changes.get("margin", 0.0) - case,
        "less": lambda case: 2 * changes.get("margin", 0.0) - case,
        "equivalent": lambda case: case + 10 * changes.get("margin", 0.0),
        "always": lambda case: not case,
        "proportion": lambda case: not case,
    }[test]
    fields = {
        "id": "c1",
        "statement": "the numbers are so",
        "statistic": "the number",
        "values": lambda case: case,
        "test": test,
        "refuted_by": "other numbers",
        "control": opposite,
        "control_statement": "the opposite",
    }
    return Claim(**{**fields, **changes})


def spread(mean, n=20, sd=1.0):
    """n numbers of exactly this mean and standard deviation, symmetric about it."""
    numbers = np.linspace(-1, 1, n)
    return mean + sd * numbers / numbers.std(ddof=1)


PLANTED = [
    ("greater", 0.0, spread(1.0), "SUPPORTED"),
    ("greater", 0.0, spread(-1.0), "REFUTED"),
    ("greater", 0.0, spread(0.1), "INCONCLUSIVE"),
    ("greater", 3.0, spread(4.0), "SUPPORTED"),
    ("greater", 3.0, spread(1.0), "REFUTED"),
    ("greater", 3.0, spread(3.1), "INCONCLUSIVE"),
    ("less", 0.0, spread(-1.0), "SUPPORTED"),
    ("less", 0.0, spread(1.0), "REFUTED"),
    ("less", 0.0, spread(-0.1), "INCONCLUSIVE"),
    ("less", 2.0, spread(1.0), "SUPPORTED"),
    ("less", 2.0, spread(3.0), "REFUTED"),
    ("equivalent", 1.0, spread(0.1), "SUPPORTED"),
    ("equivalent", 1.0, spread(-0.1), "SUPPORTED"),
    ("equivalent", 1.0, spread(2.0), "REFUTED"),
    ("equivalent", 1.0, spread(-2.0), "REFUTED"),
    ("equivalent", 1.0, spread(0.9), "INCONCLUSIVE"),
    ("equivalent", 0.1, spread(0.0), "INCONCLUSIVE"),
    ("proportion", 0.5, [True] * 18 + [False] * 2, "SUPPORTED"),
    ("proportion", 0.5, [True] * 2 + [False] * 18, "REFUTED"),
    ("proportion", 0.5, [True] * 11 + [False] * 9, "INCONCLUSIVE"),
    ("proportion", 0.95, [True] * 18 + [False] * 2, "INCONCLUSIVE"),
    ("always", 0.0, [True] * 20, "SUPPORTED"),
    ("always", 0.0, [True] * 19 + [False], "REFUTED"),
    ("always", 0.0, [True], "SUPPORTED"),
    ("always", 0.0, [False], "REFUTED"),
]


@pytest.mark.parametrize(("test", "margin", "values", "verdict"), PLANTED, ids=lambda value: None if np.ndim(value) else str(value))
def test_planted_data_get_their_verdict(test, margin, values, verdict):
    finding = judge(make_claim(test, margin=margin), values)
    assert finding.verdict == verdict, finding.reason
    assert finding.n == len(values)
    assert math.isclose(finding.estimate, np.mean(values), abs_tol=1e-12)
    assert finding.low <= finding.estimate <= finding.high
    assert (finding.kind, finding.test) == ("invariant" if test == "always" else "empirical", test)
    if test != "always":
        assert (finding.p < ALPHA) == (verdict == "SUPPORTED")


@pytest.mark.parametrize(("test", "wanted"), [("greater", "above 0.5"), ("less", "below 0.5"), ("equivalent", "within ±0.5")])
def test_the_reason_says_what_was_asked_and_how_it_came_out(test, wanted):
    reasons = {judge(make_claim(test, margin=0.5), spread(mean)).reason for mean in (-3.0, 0.0, 0.5, 3.0)}
    assert all(wanted in reason for reason in reasons)
    assert any(reason.startswith(wanted) for reason in reasons)
    assert any(reason.startswith(f"not {wanted}: the opposite is") for reason in reasons)
    assert any(reason.startswith(f"neither {wanted}") for reason in reasons)


@pytest.mark.parametrize("test", ["greater", "less", "equivalent"])
def test_values_without_spread_are_inconclusive(test):
    finding = judge(make_claim(test, margin=0.5), [0.25] * 20)
    assert finding.verdict == "INCONCLUSIVE"
    assert finding.reason == "all 20 values are 0.25: no spread to judge by"
    assert (finding.estimate, finding.low, finding.high) == (0.25, 0.25, 0.25)
    assert math.isnan(finding.p)
    assert "no spread" not in judge(make_claim(test, margin=0.5), [0.25] * 19 + [0.75]).reason


@pytest.mark.parametrize(("test", "values"), [("greater", spread(1.0, MIN_UNITS, 0.1)), ("proportion", [True] * MIN_UNITS)])
def test_too_few_units_are_inconclusive(test, values):
    claim = make_claim(test, margin=0.1, unit="prompt pair")
    finding = judge(claim, values[1:])
    assert finding.verdict == "INCONCLUSIVE"
    assert finding.reason == f"{MIN_UNITS - 1} prompt pairs, at least {MIN_UNITS} are needed"
    assert judge(claim, values).verdict == "SUPPORTED"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("test", ["greater", "less", "equivalent", "always", "proportion"])
def test_values_that_are_not_finite_decide_nothing(test, bad):
    values = [1.0] * 18
    finding = judge(make_claim(test, margin=0.5), [*values, bad, bad])
    assert finding.verdict == "INCONCLUSIVE"
    assert finding.reason == "2 of 20 values are not finite"
    assert "finite" not in judge(make_claim(test, margin=0.5), values).reason


@pytest.mark.parametrize("test", ["greater", "less", "equivalent", "always", "proportion"])
@pytest.mark.parametrize("cases", [[], [None] * 20], ids=["no cases", "only None"])
def test_no_values_decide_nothing(test, cases):
    finding = judge(make_claim(test, margin=0.5, control=lambda case: 0.0), cases)
    assert (finding.verdict, finding.n) == ("INCONCLUSIVE", 0)
    assert finding.reason == "no prompt has anything to say about it"
    assert math.isnan(finding.estimate)


def test_prompts_with_nothing_to_say_are_left_out():
    values = list(spread(1.0))
    claim = make_claim(control=lambda case: None if case is None else -case)
    assert judge(claim, [None, *values, None]) == judge(claim, values)
    assert judge(claim, [0.0, *values, 0.0]).estimate != judge(claim, values).estimate


def test_an_invariant_is_violated_by_one():
    assert judge(make_claim("always"), [True] * 200).reason == "true for all 200"
    finding = judge(make_claim("always"), [True] * 199 + [False])
    assert (finding.verdict, finding.reason) == ("REFUTED", "violated by 1 of 200")
    assert finding.estimate == 199 / 200


@given(st.integers(MIN_UNITS, 60), st.data(), st.sampled_from([0.05, 0.3, 0.5, 0.8, 1.0]))
@settings(max_examples=60, deadline=None)
def test_a_proportion_is_clopper_pearson_and_exact_binomial(n, data, margin):
    held = data.draw(st.integers(0, n))
    finding = judge(make_claim("proportion", margin=margin, control=lambda case: False), [True] * held + [False] * (n - held))
    low = stats.beta.ppf(0.025, held, n - held + 1) if held else 0.0
    high = stats.beta.ppf(0.975, held + 1, n - held) if held < n else 1.0
    assert np.allclose((finding.estimate, finding.low, finding.high), (held / n, low, high), atol=1e-9)
    assert math.isclose(finding.p, stats.binom.sf(held - 1, n, margin) if margin < 1 else 1.0, rel_tol=1e-9)
    below = stats.binom.cdf(held, n, margin)
    assert finding.verdict == ("SUPPORTED" if finding.p < ALPHA else "REFUTED" if below < ALPHA else "INCONCLUSIVE")
    if 0 < held < n:
        wilson = stats.binomtest(held, n).proportion_ci(0.95, "wilson")
        assert abs(finding.low - wilson.low) + abs(finding.high - wilson.high) > 1e-3


def test_an_invariant_has_the_interval_of_a_proportion():
    finding = judge(make_claim("always"), [True] * 30)
    assert (finding.estimate, finding.high) == (1.0, 1.0)
    assert math.isclose(finding.low, 0.025 ** (1 / 30), rel_tol=1e-9)
    assert judge(make_claim("always"), [True] * 10).low < finding.low


def test_few_units_are_judged_by_all_their_signs():
    values = [0.3, 1.1, 0.7, 2.0, 0.4, 0.9]
    assert judge(make_claim(), values).p == 1 / 2**6
    assert judge(make_claim(), [-0.1, *values[1:]]).p == 2 / 2**6
    assert judge(make_claim(), [*values, 0.5]).p == 1 / 2**7
    assert judge(make_claim("less"), values).p == 1.0


def test_many_units_have_a_p_that_is_never_zero():
    finding = judge(make_claim(), spread(100.0, n=40))
    assert finding.p == 1 / (FEW_RESAMPLES + 1)
    assert finding.p > 0


def test_the_same_data_give_the_same_finding_and_other_data_another():
    values = spread(0.4, n=30)
    np.random.seed(1)
    one = judge(make_claim(), values)
    np.random.seed(2)
    assert judge(make_claim(), values).record() == one.record()
    assert judge(make_claim(), values + 0.1).record() != one.record()


def test_the_effect_size_is_the_mean_in_standard_deviations():
    finding = judge(make_claim(), spread(1.5, sd=3.0))
    assert math.isclose(finding.effect_size, 0.5)
    assert math.isnan(judge(make_claim("proportion", margin=0.5), [True] * 20).effect_size)


def test_the_interval_holds_the_mean_of_most_samples():
    rng = np.random.default_rng(0)
    held = [f.low <= 1.0 <= f.high for f in (judge(make_claim(), rng.normal(1, 1, 40)) for _ in range(100))]
    assert 88 <= sum(held) < 100  # 95 %, and three standard errors below it
    missed = [f.low <= 1.6 <= f.high for f in (judge(make_claim(), rng.normal(1, 1, 40)) for _ in range(20))]
    assert sum(missed) < 10


def test_a_stricter_alpha_asks_for_more():
    values = spread(0.45)
    p = judge(make_claim(), values).p
    assert 0.01 < p < 0.05
    assert judge(make_claim(), values).verdict == "SUPPORTED"
    assert judge(make_claim(alpha=0.01), values).verdict == "INCONCLUSIVE"


@pytest.mark.parametrize(("test", "margin", "values", "verdict"), PLANTED, ids=lambda value: None if np.ndim(value) else str(value))
def test_a_claim_that_its_control_supports_as_well_is_never_supported(test, margin, values, verdict):
    finding = judge(make_claim(test, margin=margin, control=lambda case: case, control_statement="itself"), values)
    assert finding.control_holds == (verdict != "SUPPORTED")
    assert finding.verdict == ("INCONCLUSIVE" if verdict == "SUPPORTED" else verdict)
    assert math.isclose(finding.control_estimate, np.mean(values), abs_tol=1e-12)
    if verdict == "SUPPORTED":
        assert finding.reason == "the control supports it as well (itself)"


def test_a_claim_whose_control_never_applied_could_not_have_failed():
    finding = judge(make_claim(control=lambda case: None), spread(1.0))
    assert finding.verdict == "INCONCLUSIVE"
    assert "could not have failed" in finding.reason
    assert judge(make_claim(), spread(1.0)).verdict == "SUPPORTED"
    assert judge(make_claim(control=lambda case: None), spread(-1.0)).verdict == "REFUTED"


def findings_with(ps, family="f", **changes):
    """Findings of claims c0, c1, ... with these p-values, supported where p < ALPHA."""
    base = judge(make_claim(family=family), spread(1.0))
    return [
        replace(base, claim=f"c{i}", p=p, p_corrected=p, verdict="SUPPORTED" if p < ALPHA else "INCONCLUSIVE", **changes)
        for i, p in enumerate(ps)
    ]


def corrected(ps, declared, **changes):
    return [finding.p_corrected for finding in correct(findings_with(ps, **changes), {"f": declared})]


def test_holm_is_the_example_by_hand():
    # sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 = 0.02, 0.03, 0.06, 0.04; the last is raised to 0.06
    assert np.allclose(corrected([0.01, 0.04, 0.03, 0.005], 4), [0.03, 0.06, 0.06, 0.02])
    verdicts = [finding.verdict for finding in correct(findings_with([0.01, 0.04, 0.03, 0.005]), {"f": 4})]
    assert verdicts == ["SUPPORTED", "INCONCLUSIVE", "INCONCLUSIVE", "SUPPORTED"]
    bonferroni = [0.04, 0.16, 0.12, 0.02]
    assert not np.allclose(corrected([0.01, 0.04, 0.03, 0.005], 4), bonferroni)


def test_claims_that_were_declared_but_not_run_count():
    # as if two more claims with p = 1 had been run: 0.005 * 6, 0.01 * 5, 0.03 * 4, 0.04 * 3
    assert np.allclose(corrected([0.01, 0.04, 0.03, 0.005], 6), [0.05, 0.12, 0.12, 0.03])
    assert np.allclose(corrected([0.01, 0.04, 0.03, 0.005, 1.0, 1.0], 6)[:4], [0.05, 0.12, 0.12, 0.03])
    assert not np.allclose(corrected([0.01, 0.04, 0.03, 0.005], 4), corrected([0.01, 0.04, 0.03, 0.005], 6))
    survivor, loser = correct(findings_with([0.01, 0.02]), {"f": 4})
    assert (survivor.verdict, loser.verdict) == ("SUPPORTED", "INCONCLUSIVE")
    assert loser.reason == "p = 0.02 does not survive the correction for its family (0.06)"


@pytest.mark.parametrize("p", [0.001, 0.0499, 0.05, 0.7, 1.0])
def test_a_family_of_one_is_unchanged(p):
    (before,) = findings_with([p])
    (after,) = correct([before], {"f": 1})
    assert after == before
    assert correct([before], {}) == [before]
    (two,) = correct([before], {"f": 2})
    assert two.p_corrected == min(1.0, 2 * p)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.integers(0, 4))
@settings(max_examples=100, deadline=None)
def test_holm_is_its_definition_for_any_family(ps, missing):
    size = len(ps) + missing
    order = np.argsort(ps, kind="stable")
    expected = np.empty(len(ps))
    expected[order] = np.maximum.accumulate([min(1.0, (size - rank) * ps[i]) for rank, i in enumerate(order)])
    found = np.array(corrected(ps, size))
    assert np.allclose(found, expected)
    assert (found >= ps).all()
    assert (found <= np.minimum(1, size * np.array(ps)) + 1e-15).all()
    # a claim left out by -k never makes the others more significant
    assert (np.array(corrected(ps[:-1], size)) >= found[:-1] - 1e-15).all() if ps[-1] == max(ps) else True


def test_families_are_corrected_apart():
    both = [*findings_with([0.02, 0.03], "one"), *findings_with([0.04], "two")]
    assert [f.p_corrected for f in correct(both, {"one": 2, "two": 1})] == [0.04, 0.04, 0.04]
    together = [replace(finding, family="one") for finding in both]
    assert [f.p_corrected for f in correct(together, {"one": 3})] == [0.06, 0.06, 0.06]


def test_invariants_and_findings_without_p_are_no_members():
    invariant = judge(make_claim("always", id="i", family="f"), [True] * 10)
    undecided = judge(make_claim(id="u", family="f"), [1.0] * 10)
    (real,) = findings_with([0.03])
    out = correct([invariant, real, undecided], {"f": 1})
    assert [finding.p_corrected for finding in out][1] == 0.03
    assert [finding.verdict for finding in out] == ["SUPPORTED", "SUPPORTED", "INCONCLUSIVE"]
    assert correct([invariant, real, undecided], {"f": 2})[1].p_corrected == 0.06


def test_a_correction_supports_nothing_and_spares_refutations():
    refuted = [replace(finding, verdict="REFUTED") for finding in findings_with([0.9, 0.99])]
    undecided = findings_with([0.2])
    assert [finding.verdict for finding in correct(refuted + undecided, {"f": 9})] == ["REFUTED", "REFUTED", "INCONCLUSIVE"]
    assert correct([], {"f": 3}) == []


def test_declared_sizes_counts_empirical_claims_by_family():
    made = [
        make_claim(id="a", family="f"),
        make_claim(id="b", family="f"),
        make_claim("always", id="c", family="f"),
        make_claim(id="d"),
    ]
    assert declared_sizes(made) == {"f": 2, "d": 1}
    assert declared_sizes(made[2:3]) == {}
    assert judge(made[3], spread(1.0)).family == "d"


DRAWS = {
    "normal": lambda rng, n: rng.normal(0, 1, n),
    # Skewness 1. The sign flip assumes symmetry: at skewness 2 (exponential) its true level is 9.5 % where the long
    # tail lies beyond the margin, and 2.6 % on the other side.
    "skewed": lambda rng, n: rng.gamma(4, 1, n) - 4,
    "ties": lambda rng, n: rng.choice([-1.0, 0.0, 0.0, 1.0], n),
}


# Their controls are plain constants, for which the claim is plainly wrong: cheap, and never in the way.
NULL_CLAIMS = {
    "greater": make_claim("greater", control=lambda case: 0.0),
    "equivalent": make_claim("equivalent", margin=2.0, control=lambda case: 20.0),
}


def share_supported(claim, draw, shift, seed=0):
    rng = np.random.default_rng(seed)
    verdicts = [judge(claim, draw(rng, 40) + shift).verdict for _ in range(NUM_SIMULATIONS)]
    return verdicts.count("SUPPORTED") / NUM_SIMULATIONS


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_null_data_seldom_support_a_claim_of_more(draw):
    assert share_supported(NULL_CLAIMS["greater"], draw, 0.0) <= TOO_MANY


@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_data_at_the_margin_seldom_support_equivalence(draw, side):
    assert share_supported(NULL_CLAIMS["equivalent"], draw, 2.0 * side) <= TOO_MANY


@pytest.mark.parametrize(("test", "shift"), [("greater", 0.5), ("equivalent", 1.0)])
def test_the_calibration_sees_data_that_are_not_null(test, shift):
    claim = NULL_CLAIMS[test]
    assert share_supported(claim, DRAWS["normal"], shift) > 0.5


@pytest.mark.parametrize(("test", "shift"), [("greater", 0.0), ("equivalent", 2.0)])
def test_the_calibration_sees_a_test_that_is_too_easy(test, shift):
    sloppy = replace(NULL_CLAIMS[test], alpha=4 * ALPHA)
    assert share_supported(sloppy, DRAWS["normal"], shift) > TOO_MANY


@pytest.mark.parametrize(("test", "margin", "values", "verdict"), PLANTED, ids=lambda value: None if np.ndim(value) else str(value))
def test_a_record_is_strict_json(test, margin, values, verdict):
    context = {"model": "tiny", "versions": {"numpy": "2"}, "config": [1, 2.5, None]}
    finding = judge(make_claim(test, margin=margin, margin_reason="…"), values, context)
    record = json.loads(json.dumps(finding.record(), allow_nan=False))
    assert record == finding.record()
    assert record["verdict"] == verdict
    assert record["context"] == context


@pytest.mark.parametrize("values", [[], [math.nan] * 9, [1.0] * 9, [1.0] * 3], ids=["none", "nan", "no spread", "few"])
def test_a_record_of_undecided_data_has_none_for_nan(values):
    finding = judge(make_claim(), values)
    with pytest.raises(ValueError, match="Out of range float values"):
        json.dumps(vars(finding), allow_nan=False)
    record = json.loads(json.dumps(finding.record(), allow_nan=False))
    assert record["p"] is None
    assert record["effect_size"] is None
    assert record["verdict"] == "INCONCLUSIVE"


def test_a_finding_keeps_its_own_copy_of_the_context():
    context = {"model": "tiny"}
    finding = judge(make_claim(), spread(1.0), context)
    context["model"] = "other"
    assert finding.context == {"model": "tiny"}
    assert judge(make_claim(), spread(1.0)).context == {}


def test_a_claim_is_named_by_its_id():
    assert str(make_claim(id="exp1-c2")) == "exp1-c2"
    assert make_claim("always").kind == "invariant"
    assert make_claim("greater").kind == "empirical"
