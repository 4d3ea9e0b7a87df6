"""The answers follow from the findings by the registered rules, and are undetermined where a needed finding is."""

import math
from dataclasses import replace

import pytest

from tempo.claims import Finding
from tempo.reporting import answers
from tempo.reporting.answers import ATTENDS, EQUIVALENT, IDENTICAL, ISOLATED_ZERO, MORE_THAN_UNIFORM, SELECTION, TOP_10

S, R, I = "SUPPORTED", "REFUTED", "INCONCLUSIVE"  # noqa: E741
BEFORE = "exp2.same-before-first-wide-set"
# The pattern of verdicts that makes each scenario, by its registered rule; in A no sibling gets any attention at all.
PATTERNS = {
    "A": {IDENTICAL: S, EQUIVALENT: S, TOP_10: S, SELECTION: S, MORE_THAN_UNIFORM: R},
    "B": {IDENTICAL: R, EQUIVALENT: S, TOP_10: S, SELECTION: S, MORE_THAN_UNIFORM: R, ATTENDS: S},
    "C": {IDENTICAL: R, EQUIVALENT: R, TOP_10: S, SELECTION: S, MORE_THAN_UNIFORM: R, ATTENDS: S},
    "D": {IDENTICAL: R, EQUIVALENT: R, TOP_10: R, SELECTION: R, MORE_THAN_UNIFORM: R, ATTENDS: S},
}
NEEDED = {
    "A": [IDENTICAL, ATTENDS],
    "B": [ATTENDS, EQUIVALENT, MORE_THAN_UNIFORM],
    "C": [ATTENDS, EQUIVALENT, TOP_10, SELECTION],
    "D": [ATTENDS, EQUIVALENT, TOP_10, SELECTION],
}


def finding(claim, verdict, **changes) -> Finding:
    base = Finding(
        claim=claim, statement="", kind="empirical", verdict=verdict, reason="", estimate=0.25, low=0.125, high=0.5,
        effect_size=1.0, n=160, unit="prompt", statistic="", test="greater", margin=0.0, margin_reason="", p=0.01, p_corrected=0.02,
        p_against=1.0, p_against_corrected=1.0, family="", control="", control_estimate=0.0, control_holds=True,
        context={"experiment": claim.split(".")[0], "model": "tiny"},
    )  # fmt: skip
    return replace(base, **changes)


ZERO = finding(ATTENDS, I, estimate=0.0, low=0.0, high=0.0, p=math.nan)  # no spread: the test has nothing to judge by


def pattern(letter) -> dict[str, Finding]:
    found = {claim: finding(claim, verdict) for claim, verdict in PATTERNS[letter].items()}
    return found | ({ATTENDS: ZERO} if letter == "A" else {})


@pytest.mark.parametrize("letter", PATTERNS)
def test_each_scenario_follows_from_its_pattern_and_no_other_does(letter):
    found = answers.scenario(list(pattern(letter).values()))
    assert found.short.startswith(f"{letter}: ")
    assert found.rule.startswith(f"{letter}: ")
    held = [name for name, _, _, rule in answers.SCENARIOS if rule(answers.Findings(list(pattern(letter).values())))]
    assert held == [letter]


@pytest.mark.parametrize(("letter", "claim"), [(letter, claim) for letter, claims in NEEDED.items() for claim in claims])
@pytest.mark.parametrize("how", ["missing", "inconclusive", "control", "contradicted by another config"])
def test_a_scenario_is_undetermined_where_a_needed_finding_is_missing_or_unsound(letter, claim, how):
    found = pattern(letter)
    known = found.pop(claim)
    if how == "inconclusive":
        found[claim] = finding(claim, I)
    elif how == "control":
        found[claim] = finding(claim, R if letter in "AD" else S, control_holds=False)
    elif how.startswith("contradicted"):
        other = finding(claim, R if known.verdict == S else S, context={"experiment": "x", "config": "mine", "variant": "mine"})
        found |= {claim: known, "other": other}
    said = answers.scenario(list(found.values()))
    assert said.short == "Undetermined"
    assert claim in said.text


def test_a_needless_finding_may_be_open():
    found = pattern("D") | {IDENTICAL: finding(IDENTICAL, I)}
    del found[MORE_THAN_UNIFORM]
    assert answers.scenario(list(found.values())).short.startswith("D")


def test_verdicts_that_fit_no_scenario_are_said_to_fit_none():
    found = pattern("D") | {SELECTION: finding(SELECTION, S)}
    said = answers.scenario(list(found.values()))
    assert said.short == "Undetermined"
    assert "fit none of the four" in said.text


def test_nothing_is_known_from_no_findings():
    for answer in (*answers.questions([]), answers.scenario([]), answers.recommended_mode([]), answers.just_fine([])):
        assert answer.short == "Undetermined"


@pytest.mark.parametrize(
    ("attends", "isolated", "short"),
    [(S, S, "Yes"), (R, S, "No"), (I, S, "Undetermined"), (S, I, "Undetermined"), (None, S, "Undetermined"), (S, None, "Undetermined")],
)
def test_whether_siblings_attend(attends, isolated, short):
    found = [finding(claim, verdict) for claim, verdict in ((ATTENDS, attends), (ISOLATED_ZERO, isolated)) if verdict]
    assert answers.attend(found).short == short
    assert answers.attend([ZERO]).short == "No"


def test_an_isolated_sibling_that_attends_makes_no_yes():
    assert answers.attend([finding(ATTENDS, S), finding(ISOLATED_ZERO, R)]).short == "Undetermined"


@pytest.mark.parametrize(
    ("verdicts", "short"),
    [((S, S, S, S), "Identical"), ((R, S, S, S), "Not identical, but equivalent"), ((R, R, S, S), "Only the top-k"),
     ((R, R, R, S), "Neither"), ((R, R, S, R), "Neither"), ((R, R, I, S), "Undetermined"), ((I, I, R, R), "Undetermined")],
)  # fmt: skip
def test_identical_equivalent_or_only_the_top_k(verdicts, short):
    claims = (IDENTICAL, EQUIVALENT, TOP_10, SELECTION)
    said = answers.identical([finding(claim, verdict) for claim, verdict in zip(claims, verdicts, strict=True)])
    assert said.short == short
    assert "0.25 [0.125, 0.5]" in said.text
    assert "25\u00a0% [12.5, 50]" in said.text


def test_what_no_experiment_measured_is_never_guessed():
    stored = [
        finding(f"exp4.{name}", S) for name in ("siblings-share-a-position", "positions-are-p-plus-k", "next-query-reaches-every-slot")
    ]
    said = answers.same_position(stored)
    assert said.short == "Undetermined"
    assert "They really stand at one position" in said.text
    assert "undetermined: experiments not built (exp7, exp8)" in said.text
    assert "do NOT stand" in answers.same_position([stored[0], replace(stored[1], verdict=R), stored[2]]).text
    assert "was not shown" in answers.same_position(stored[:2]).text
    built = [*stored, finding("exp7.anything", S), finding("exp8.anything", S)]
    assert "no rule reads exp7, exp8 yet" in answers.same_position(built).text


def test_why_they_looked_identical():
    same, differ = finding(BEFORE, S, estimate=1.0), finding(IDENTICAL, R, estimate=0.0)
    said = answers.looked_identical([same, differ])
    assert said.short == "Not the model"
    assert "160 of 160 prompts" in said.text
    assert "0 of 160 prompts" in said.text
    assert "undetermined: experiment not built (exp6)" in said.text
    assert answers.looked_identical([same, replace(differ, verdict=S)]).short == "They are identical"
    assert answers.looked_identical([same]).short == "Undetermined"
    assert "harness is at fault" in answers.looked_identical([replace(same, verdict=R), differ]).text


def test_the_recommended_mode_is_undetermined_but_says_what_the_evidence_says():
    advice = {letter: answers.recommended_mode(list(pattern(letter).values())) for letter in PATTERNS}
    assert {answer.short for answer in advice.values()} == {"Undetermined"}
    assert "not interchangeable" in advice["D"].text
    assert "either will do" in advice["A"].text
    assert "either will do" in advice["B"].text
    assert len({answer.text for answer in advice.values()}) == 4
    assert "exp7, exp11, exp13, not built yet" in advice["D"].text


def test_every_claim_that_a_rule_names_is_registered():
    """A renamed claim must not turn an answer into "undetermined" unseen."""
    import importlib.util
    from pathlib import Path

    registered = set()
    for path in sorted(Path(__file__).resolve().parent.parent.glob("test_experiments/test_exp*.py")):
        spec = importlib.util.spec_from_file_location(f"claims_of_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        registered |= {claim.id for claim in module.STUDY.claims}
    everything = [
        a for make in (answers.attend, answers.identical, answers.same_position, answers.looked_identical) for a in make([]).claims
    ]
    named = {*answers.SCENARIO_CLAIMS, *everything}
    assert named <= registered
    assert "exp2.no-such-claim" not in registered
