"""tempo.claims: verdicts on data whose answer is known, what cannot be decided, and corrections."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tempo import statistics
from tempo.claims import ALPHA, MIN_UNITS, SCHEMA, Claim, correct, declared_sizes, judge, num_needed
from tempo.errors import SpecError

# Enough for a two-sided p down to 1/200; the smallest alpha used here is 0.01.
FEW_RESAMPLES = 399


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


@pytest.mark.parametrize(
    ("test", "margin", "values", "verdict"),
    PLANTED,
    ids=lambda value: None if np.ndim(value) else str(value),
)
def test_planted_data_get_their_verdict(test, margin, values, verdict):
    finding = judge(make_claim(test, margin=margin), values)
    assert finding.verdict == verdict, finding.reason
    assert finding.n == len(values)
    assert math.isclose(finding.estimate, np.mean(values), abs_tol=1e-12)
    assert finding.low <= finding.estimate <= finding.high
    assert (finding.kind, finding.test) == ("invariant" if test == "always" else "empirical", test)
    if test != "always":
        assert (finding.p < ALPHA) == (verdict == "SUPPORTED")


@pytest.mark.parametrize(
    ("test", "wanted"),
    [("greater", "above 0.5"), ("less", "below 0.5"), ("equivalent", "within ±0.5")],
)
def test_the_reason_says_what_was_asked_and_how_it_came_out(test, wanted):
    claim = make_claim(test, margin=0.5)
    reasons = {judge(claim, spread(mean, sd=0.5)).reason for mean in (-3.0, 0.0, 0.5, 3.0)}
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


@pytest.mark.parametrize(
    ("test", "values"),
    [("greater", spread(1.0, MIN_UNITS, 0.1)), ("proportion", [True] * MIN_UNITS)],
)
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
    claim = make_claim("proportion", margin=margin, control=lambda case: False)
    finding = judge(claim, [True] * held + [False] * (n - held))
    low = stats.beta.ppf(0.025, held, n - held + 1) if held else 0.0
    high = stats.beta.ppf(0.975, held + 1, n - held) if held < n else 1.0
    found = (finding.estimate, finding.low, finding.high)
    assert np.allclose(found, (held / n, low, high), atol=1e-9)
    above = min(1.0, 2 * stats.binom.sf(held - 1, n, margin))
    below = min(1.0, 2 * stats.binom.cdf(held, n, margin))
    assert math.isclose(finding.p, above, rel_tol=1e-9, abs_tol=1e-12)
    assert math.isclose(finding.p_against, below, rel_tol=1e-9, abs_tol=1e-12)
    if above < ALPHA:
        assert finding.verdict == "SUPPORTED"
    elif below < ALPHA:
        assert finding.verdict == "REFUTED"
    else:
        assert finding.verdict == "INCONCLUSIVE"
    if 0 < held < n:
        wilson = stats.binomtest(held, n).proportion_ci(0.95, "wilson")
        assert abs(finding.low - wilson.low) + abs(finding.high - wilson.high) > 1e-3


def test_an_invariant_has_the_interval_of_a_proportion():
    finding = judge(make_claim("always"), [True] * 30)
    assert (finding.estimate, finding.high) == (1.0, 1.0)
    assert math.isclose(finding.low, 0.025 ** (1 / 30), rel_tol=1e-9)
    assert judge(make_claim("always"), [True] * 10).low < finding.low


def test_every_p_is_two_sided_and_none_is_zero():
    finding = judge(make_claim(), spread(100.0, n=40))
    assert finding.p == 2 / (FEW_RESAMPLES + 1)
    assert finding.p_against == 1.0
    assert judge(make_claim("less"), spread(100.0, n=40)).p_against == finding.p


def test_the_same_data_give_the_same_finding_and_other_data_another():
    values = spread(0.4, n=30)
    np.random.seed(1)
    one = judge(make_claim(), values)
    np.random.seed(2)
    assert judge(make_claim(), values).record() == one.record()
    assert judge(make_claim(), values + 0.1).record() != one.record()


def test_the_effect_size_is_the_mean_in_standard_deviations():
    assert math.isclose(judge(make_claim(), spread(1.5, sd=3.0)).effect_size, 0.5)
    # of a share it is Cohen's h
    of_share = judge(make_claim("proportion", margin=0.5), [True] * 20)
    assert math.isclose(of_share.effect_size, math.pi / 2)
    # of ranks it is 1 when all are on one side
    of_ranks = judge(make_claim(estimand="pseudomedian"), spread(9.0))
    assert of_ranks.effect_size == 1.0


def test_the_interval_holds_the_mean_of_most_samples():
    rng = np.random.default_rng(0)
    found = [judge(make_claim(), rng.normal(1, 1, 40)) for _ in range(100)]
    held = sum(f.low <= 1.0 <= f.high for f in found)
    assert 88 <= held < 100  # 95 %, and three standard errors below it
    found = [judge(make_claim(), rng.normal(1, 1, 40)) for _ in range(20)]
    held_another = sum(f.low <= 1.6 <= f.high for f in found)
    assert held_another < 10


def test_a_stricter_alpha_asks_for_more():
    values = spread(0.6)
    p = judge(make_claim(), values).p
    assert 0.01 < p < 0.05
    assert judge(make_claim(), values).verdict == "SUPPORTED"
    assert judge(make_claim(alpha=0.01), values).verdict == "INCONCLUSIVE"


@pytest.mark.parametrize(
    ("test", "margin", "values", "verdict"),
    PLANTED,
    ids=lambda value: None if np.ndim(value) else str(value),
)
def test_a_claim_that_its_control_supports_as_well_is_never_supported(
    test, margin, values, verdict
):
    control = {"control": lambda case: case, "control_statement": "itself"}
    finding = judge(make_claim(test, margin=margin, **control), values)
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
    judged = judge(make_claim(family=family), spread(1.0))
    base = replace(judged, p_against=1.0, p_against_corrected=1.0)
    found = []
    for i, p in enumerate(ps):
        verdict = "SUPPORTED" if p < ALPHA else "INCONCLUSIVE"
        found.append(replace(base, claim=f"c{i}", p=p, p_corrected=p, verdict=verdict, **changes))
    return found


def turned(findings):
    """The same findings about the opposite: what was shown is refuted."""
    swap = {"SUPPORTED": "REFUTED", "REFUTED": "SUPPORTED", "INCONCLUSIVE": "INCONCLUSIVE"}
    return [
        replace(
            f,
            verdict=swap[f.verdict],
            p=f.p_against,
            p_corrected=f.p_against_corrected,
            p_against=f.p,
            p_against_corrected=f.p_corrected,
        )
        for f in findings
    ]


def corrected(ps, declared, **changes):
    """The corrected p-values of a family of so many declared claims."""
    findings = correct(findings_with(ps, **changes), {"f": declared})
    return [finding.p_corrected for finding in findings]


def verdicts(findings):
    return [finding.verdict for finding in findings]


FOUR = [0.01, 0.04, 0.03, 0.005]


def test_holm_is_the_example_by_hand():
    # sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 = 0.02, 0.03, 0.06, 0.04
    # the last one is raised to 0.06
    assert np.allclose(corrected(FOUR, 4), [0.03, 0.06, 0.06, 0.02])
    found = correct(findings_with(FOUR), {"f": 4})
    assert verdicts(found) == ["SUPPORTED", "INCONCLUSIVE", "INCONCLUSIVE", "SUPPORTED"]
    bonferroni = [0.04, 0.16, 0.12, 0.02]
    assert not np.allclose(corrected(FOUR, 4), bonferroni)


def test_claims_that_were_declared_but_not_run_count():
    # as if two more claims with p = 1 had been run: 0.005 * 6, 0.01 * 5, 0.03 * 4, 0.04 * 3
    assert np.allclose(corrected(FOUR, 6), [0.05, 0.12, 0.12, 0.03])
    assert np.allclose(corrected([*FOUR, 1.0, 1.0], 6)[:4], [0.05, 0.12, 0.12, 0.03])
    assert not np.allclose(corrected(FOUR, 4), corrected(FOUR, 6))
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
    scaled = [min(1.0, (size - rank) * ps[i]) for rank, i in enumerate(order)]
    expected = np.empty(len(ps))
    expected[order] = np.maximum.accumulate(scaled)
    found = np.array(corrected(ps, size))
    assert np.allclose(found, expected)
    assert (found >= ps).all()
    assert (found <= np.minimum(1, size * np.array(ps)) + 1e-15).all()
    # a claim left out by -k never makes the others more significant
    if ps[-1] == max(ps):
        assert (np.array(corrected(ps[:-1], size)) >= found[:-1] - 1e-15).all()


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
    assert out[1].p_corrected == 0.03
    assert verdicts(out) == ["SUPPORTED", "SUPPORTED", "INCONCLUSIVE"]
    assert correct([invariant, real, undecided], {"f": 2})[1].p_corrected == 0.06


@pytest.mark.parametrize("ps", [FOUR, [0.02, 0.02], [0.0001]])
def test_a_refutation_needs_correcting_as_much_as_support(ps):
    size = {"f": len(ps) + 1}
    supported, refuted = correct(findings_with(ps), size), correct(turned(findings_with(ps)), size)
    assert refuted == turned(supported)
    against = turned(findings_with([0.02, 0.03]))
    assert set(verdicts(correct(against, {"f": 3}))) == {"INCONCLUSIVE"}
    assert set(verdicts(correct(against, {"f": 2}))) == {"REFUTED"}


def test_a_correction_gives_no_verdict_that_was_not_there():
    assert verdicts(correct(findings_with([0.2]), {"f": 9})) == ["INCONCLUSIVE"]
    (supported,) = findings_with([0.001])
    reason = "the control supports it as well"
    blind = [replace(supported, verdict="INCONCLUSIVE", reason=reason)]
    assert correct(blind, {"f": 1}) == blind
    assert correct([], {"f": 3}) == []


def test_a_verdict_survives_at_the_alpha_of_its_own_claim():
    strict = [replace(f, alpha=0.01) for f in findings_with([0.009, 0.009])]
    # two members make a family of two, whatever was declared
    assert set(verdicts(correct(strict, {"f": 1}))) == {"INCONCLUSIVE"}
    assert set(verdicts(correct(strict[:1], {"f": 1}))) == {"SUPPORTED"}


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


LAYERS, HEADS = 3, 4


def maps(means, n=40, seed=0):
    """n maps of layers by heads whose cells have these means, each with a spread of one."""
    noise = np.random.default_rng(seed).normal(0, 1, (n, LAYERS, HEADS))
    return list(noise - noise.mean(axis=0) + means)


def hot(value, elsewhere=0.0):
    """Means of a map that are all alike but for one cell."""
    means = np.full((LAYERS, HEADS), elsewhere)
    means[1, 2] = value
    return means


MAP_CLAIM = make_claim("greater", control=lambda case: 0 * case)
MAP_CLAIM = replace(MAP_CLAIM, test="somewhere", margin=0.5)


def test_a_map_is_searched_for_the_cell_that_exceeds_the_margin():
    finding = judge(MAP_CLAIM, maps(hot(2.0)))
    assert finding.verdict == "SUPPORTED"
    assert finding.details == {"cell": [1, 2], "cells": 12, "significant": 1}
    assert "1 of 12 cells, most in [1, 2]" in finding.reason
    assert math.isclose(finding.estimate, 2.0)
    assert judge(MAP_CLAIM, maps(hot(0.5, 0.5))).verdict == "INCONCLUSIVE"
    assert judge(MAP_CLAIM, maps(hot(-1.0, -1.0))).verdict == "REFUTED"
    # one cell may exceed the margin, so it is not refuted
    assert judge(MAP_CLAIM, maps(hot(0.5, -1.0))).verdict == "INCONCLUSIVE"


def test_a_cell_pays_for_all_the_cells_it_was_picked_from():
    values = maps(hot(0.9))
    alone = judge(make_claim("greater", margin=0.5), [case[1, 2] for case in values])
    assert alone.p < judge(MAP_CLAIM, values).p


def test_a_typical_prompt_is_not_moved_by_an_extreme_one():
    values = np.array([*spread(0.1, n=39, sd=0.5), 200.0])
    of_mean = make_claim(margin=1.0)
    of_typical = make_claim(estimand="pseudomedian", margin=1.0)
    mean, typical = judge(of_mean, values), judge(of_typical, values)
    assert (mean.verdict, typical.verdict) == ("INCONCLUSIVE", "REFUTED")
    assert typical.estimate < 0.2 < 5 < mean.estimate
    assert judge(of_typical, values + 2).verdict == "SUPPORTED"


def test_data_too_skewed_for_so_few_prompts_say_so():
    tail = [0.1] * 18 + [0.2, 3.0]
    finding = judge(make_claim("less", margin=1.0), tail)
    assert finding.verdict == "INCONCLUSIVE"
    assert "too few for data this skewed to show that the mean is below anything" in finding.reason
    assert judge(make_claim("less", margin=1.0), tail * 40).verdict == "SUPPORTED"
    # in the direction of the tail they are enough
    assert judge(make_claim("greater", margin=-1.0), tail).verdict == "SUPPORTED"


A_PILOT = {"planned_effect": 0.0, "planned_sd": 1.0, "planned_from": "a pilot"}
BAD_CLAIMS = [
    ({"test": "bigger"}, "test is 'bigger'; expected one of always, greater"),
    ({"estimand": "mode"}, "estimand is 'mode'; expected one of mean, pseudomedian"),
    ({"alpha": 5}, "alpha is 5; expected a number above 0 below 1"),
    ({"test": "proportion", "margin": 95}, "margin=95, expected a share"),
    ({"test": "equivalent", "margin": 0.0}, "nothing is shown to be within 0"),
    ({"planned_effect": 1.0}, "planned_effect needs planned_sd above 0 and planned_from"),
    (A_PILOT, "the planned effect is the margin"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CLAIMS)
def test_a_claim_that_makes_no_sense_is_refused_when_it_is_registered(change, message):
    with pytest.raises(SpecError, match=message):
        replace(make_claim(), **change)


@pytest.mark.parametrize(
    ("test", "values", "message"),
    [
        ("always", [0.5] * 10, "needs a statistic that is true or false"),
        ("greater", ["a"] * 10, "gives no numbers"),
        ("greater", [[1.0, 2.0]] * 10, "`somewhere` is for maps"),
        ("somewhere", [1.0] * 10, "`somewhere` is for maps"),
        ("somewhere", [[1.0], [1.0, 2.0]] * 5, "maps of different shapes"),
    ],
)
def test_a_statistic_of_the_wrong_kind_is_an_error_that_names_the_claim(test, values, message):
    with pytest.raises(SpecError, match=f"claim c1: .*{message}"):
        judge(replace(make_claim(), test=test, control=lambda case: case), values)


def planned(effect=1.0, sd=1.0, **changes):
    """A claim with a planned effect."""
    plan = {"planned_effect": effect, "planned_sd": sd, "planned_from": "a pilot"}
    return make_claim(**plan | changes)


def test_the_number_of_prompts_needed_is_the_textbook_one():
    # G*Power: t test, one sample, dz 0.5, two tails
    assert num_needed(planned(0.5), power=0.8) == 34
    assert num_needed(planned(0.5), power=0.9) == 44
    assert num_needed(planned(0.5, margin=0.3), power=0.8) > num_needed(planned(0.5), power=0.8)
    # it takes as many to refute
    assert num_needed(planned(-0.5), power=0.8) == num_needed(planned(0.5), power=0.8)
    assert num_needed(planned(0.5), 5) > num_needed(planned(0.5))
    assert num_needed(planned(0.5, estimand="pseudomedian")) > num_needed(planned(0.5))
    of_map = replace(planned(0.5), test="somewhere", cells=270)
    assert num_needed(of_map) > num_needed(planned(0.5), 7)
    assert num_needed(planned(0.0, test="equivalent", margin=0.5)) > num_needed(planned(0.5))
    plan = {"planned_effect": 1.0, "planned_from": "none fails"}
    assert num_needed(make_claim("proportion", margin=0.95, **plan), 5) == 104
    assert num_needed(make_claim()) is None


@pytest.mark.parametrize(("effect", "test"), [(0.6, "greater"), (0.0, "equivalent")])
def test_so_many_prompts_do_reach_the_verdict(effect, test):
    settings = {
        "greater": {"control": lambda case: 0.0},
        "equivalent": {"margin": 0.6, "control": lambda case: 9.0},
    }[test]
    claim = planned(effect, test=test, **settings)
    rng = np.random.default_rng(0)

    def power(n):
        found = [judge(claim, rng.normal(effect, 1, n)) for _ in range(200)]
        return verdicts(found).count("SUPPORTED") / 200

    needed = num_needed(claim)
    assert power(needed) > 0.9 - 3 * math.sqrt(0.9 * 0.1 / 200)
    assert power(needed // 2) < 0.8


@pytest.mark.parametrize(
    ("test", "margin", "values", "verdict"),
    PLANTED,
    ids=lambda value: None if np.ndim(value) else str(value),
)
def test_a_record_is_strict_json(test, margin, values, verdict):
    context = {"model": "tiny", "versions": {"numpy": "2"}, "config": [1, 2.5, None]}
    finding = judge(make_claim(test, margin=margin, margin_reason="…"), values, context)
    record = json.loads(json.dumps(finding.record(), allow_nan=False))
    assert record == finding.record()
    assert record["verdict"] == verdict
    assert record["context"] == context
    assert record["schema"] == SCHEMA


@pytest.mark.parametrize(
    "values", [[], [math.nan] * 9, [1.0] * 9, [1.0] * 3], ids=["none", "nan", "no spread", "few"]
)
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
