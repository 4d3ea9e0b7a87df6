"""The answers follow from the findings by the registered rules, and are undetermined where a needed finding is."""

import importlib.util
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tempo.claims import Finding
from tempo.reporting import answers, conclusion
from tempo.reporting.answers import (
    ARTEFACTS,
    ATTENDS,
    CLOSER,
    ENGINE_DIFFERS,
    EQUIVALENT,
    EXACT,
    IDENTICAL,
    ISOLATED_ZERO,
    MORE_THAN_UNIFORM,
    NOT_WORSE,
    SELECTION,
    SHARING,
    STORED,
    TOP_10,
    ZERO_TOO,
)
from tempo.reporting.conclusion import (
    DEPTH,
    FACT,
    FACT_REWEIGHTED,
    HELPS,
    NOT_WORSE_REWEIGHTED,
    READS,
    READS_REWEIGHTED,
    VISIBLE_NOT_WORSE,
)

ROOT = Path(__file__).resolve().parent.parent
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


ZERO = finding(
    ATTENDS, I, estimate=0.0, low=0.0, high=0.0, p=math.nan
)  # no spread: the test has nothing to judge by


def pattern(letter) -> dict[str, Finding]:
    found = {claim: finding(claim, verdict) for claim, verdict in PATTERNS[letter].items()}
    return found | ({ATTENDS: ZERO} if letter == "A" else {})


@pytest.mark.parametrize("letter", PATTERNS)
def test_each_scenario_follows_from_its_pattern_and_no_other_does(letter):
    found = answers.scenario(list(pattern(letter).values()))
    assert found.short.startswith(f"{letter}: ")
    assert found.rule.startswith(f"{letter}: ")
    held = [
        name
        for name, _, _, rule in answers.SCENARIOS
        if rule(answers.Findings(list(pattern(letter).values())))
    ]
    assert held == [letter]


@pytest.mark.parametrize(
    ("letter", "claim"), [(letter, claim) for letter, claims in NEEDED.items() for claim in claims]
)
@pytest.mark.parametrize(
    "how", ["missing", "inconclusive", "control", "contradicted by another config"]
)
def test_a_scenario_is_undetermined_where_a_needed_finding_is_missing_or_unsound(
    letter, claim, how
):
    found = pattern(letter)
    known = found.pop(claim)
    if how == "inconclusive":
        found[claim] = finding(claim, I)
    elif how == "control":
        found[claim] = finding(claim, R if letter in "AD" else S, control_holds=False)
    elif how.startswith("contradicted"):
        other = finding(
            claim,
            R if known.verdict == S else S,
            context={"experiment": "x", "config": "mine", "variant": "mine"},
        )
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
    for answer in (
        *answers.questions([]),
        answers.scenario([]),
        conclusion.recommended_mode([]),
        conclusion.just_fine([]),
    ):
        assert answer.short == "Undetermined"
    assert "Not measured in this record: exp7, exp13, exp11" in conclusion.just_fine([]).text
    assert "not built" not in conclusion.just_fine([]).text


@pytest.mark.parametrize(
    ("attends", "isolated", "short"),
    [
        (S, S, "Yes"),
        (R, S, "No"),
        (I, S, "Undetermined"),
        (S, I, "Undetermined"),
        (None, S, "Undetermined"),
        (S, None, "Undetermined"),
    ],
)
def test_whether_siblings_attend(attends, isolated, short):
    found = [
        finding(claim, verdict)
        for claim, verdict in ((ATTENDS, attends), (ISOLATED_ZERO, isolated))
        if verdict
    ]
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
    said = answers.identical(
        [finding(claim, verdict) for claim, verdict in zip(claims, verdicts, strict=True)]
    )
    assert said.short == short
    assert "0.25 [0.125, 0.5]" in said.text
    assert "25\u00a0% [12.5, 50]" in said.text


POSITION = {**dict.fromkeys(STORED, S), EXACT: S, NOT_WORSE: S, CLOSER: S}


def of(verdicts) -> list[Finding]:
    """A finding for each claim with this verdict; None: not measured."""
    invariants = (*STORED, EXACT, BEFORE, *ARTEFACTS, ZERO_TOO)
    return [
        finding(claim, v, kind="invariant" if claim in invariants else "empirical", estimate=1.0 if v == S else 0.25)
        for claim, v in verdicts.items() if v
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "short"),
    [({}, "Better than"), ({CLOSER: R}, "No worse than"), ({CLOSER: I}, "No worse than"), ({CLOSER: R, NOT_WORSE: R}, "Worse than"),
     ({CLOSER: I, NOT_WORSE: I}, "Undetermined"), ({STORED[1]: R}, "Undetermined"), ({STORED[2]: None}, "Undetermined"),
     ({EXACT: None}, "Undetermined"), ({EXACT: R}, "Undetermined"), ({CLOSER: None, NOT_WORSE: None}, "Undetermined")],
)  # fmt: skip
def test_how_well_several_tokens_at_one_position_are_handled(changes, short):
    said = answers.same_position(of(POSITION | changes))
    assert said.short.startswith(short)


def test_what_no_experiment_measured_is_never_guessed():
    stored = of(dict.fromkeys(STORED, S))
    said = answers.same_position(stored)
    assert said.short == "Undetermined"
    assert "They really stand" not in said.text
    assert "Siblings really stand at one position" in said.text
    assert "Not measured in this record: exp7, exp8." in said.text
    assert (
        "do NOT stand"
        in answers.same_position([stored[0], replace(stored[1], verdict=R), stored[2]]).text
    )
    assert "not shown" in answers.same_position(stored[:2]).text
    assert "Not measured" not in answers.same_position(of(POSITION | {SHARING: S})).text


LOOKED = {BEFORE: S, IDENTICAL: R, ENGINE_DIFFERS: S, **dict.fromkeys(ARTEFACTS, S), ZERO_TOO: S}


@pytest.mark.parametrize(
    ("changes", "short"),
    [({}, "Artefacts"), (dict.fromkeys(ARTEFACTS, R), "Not the model"), ({ENGINE_DIFFERS: I}, "Not the model"),
     ({ENGINE_DIFFERS: None, **dict.fromkeys(ARTEFACTS)}, "Not the model"), ({ENGINE_DIFFERS: R}, "Undetermined"),
     ({IDENTICAL: S, ENGINE_DIFFERS: R}, "They are identical"), ({IDENTICAL: S}, "Undetermined"), ({IDENTICAL: I}, "Undetermined"),
     ({BEFORE: R}, "Undetermined"), ({BEFORE: None}, "Undetermined")],
)  # fmt: skip
def test_why_they_looked_identical(changes, short):
    assert answers.looked_identical(of(LOOKED | changes)).short.startswith(short)


def test_the_artefacts_that_suffice_are_named_and_no_other():
    first, second, _ = ARTEFACTS
    text = answers.looked_identical(of(LOOKED | {second: R})).text
    assert ARTEFACTS[first] in text
    assert ARTEFACTS[second] not in text
    assert "160 of 160 prompts" in text
    assert "visible mode as well" in text
    assert "visible mode as well" not in answers.looked_identical(of(LOOKED | {ZERO_TOO: R})).text
    assert "harness is at fault" in answers.looked_identical(of(LOOKED | {BEFORE: R})).text
    assert (
        "Not measured in this record: exp6."
        in answers.looked_identical(of({BEFORE: S, IDENTICAL: R})).text
    )


FINE = {EXACT: S, NOT_WORSE: S, DEPTH: S, READS: S, FACT: S}
WEIGHTED = {NOT_WORSE_REWEIGHTED: S, READS_REWEIGHTED: S, FACT_REWEIGHTED: S}
MENDED = {HELPS: S, **WEIGHTED}
UNMENDED = dict.fromkeys(MENDED, R)
PAIRS = {NOT_WORSE: NOT_WORSE_REWEIGHTED, READS: READS_REWEIGHTED, FACT: FACT_REWEIGHTED}
CONCLUSIONS = [
    (FINE, "Just fine"),
    (FINE | UNMENDED, "Just fine"),  # plain needs no mending
    (FINE | MENDED, "Just fine"),
    *(
        (FINE | MENDED | {plain: verdict}, "Fine with reweighting")
        for plain in PAIRS
        for verdict in (R, I, None)
    ),
    (FINE | MENDED | dict.fromkeys(PAIRS, R), "Fine with reweighting"),
    *(
        (FINE | MENDED | {plain: R, weighted: R}, "Not fine")
        for plain in PAIRS
        for weighted in WEIGHTED
    ),
    (FINE | {NOT_WORSE: R} | UNMENDED, "Not fine"),
    (FINE | {DEPTH: R}, "Not fine"),
    (
        FINE | MENDED | {DEPTH: R},
        "Not fine",
    ),  # depth was not measured with reweighting, so it mends nothing there
    # nothing open is taken for met
    *((FINE | {claim: verdict}, "Undetermined") for claim in FINE for verdict in (I, None)),
    *(
        (FINE | MENDED | {NOT_WORSE: R, claim: verdict}, "Undetermined")
        for claim in (DEPTH, EXACT, *MENDED)
        for verdict in (I, None)
    ),
    *(
        (FINE | {plain: R}, "Undetermined") for plain in PAIRS
    ),  # whether reweighting mends it was not measured
    *((FINE | MENDED | {plain: I, PAIRS[plain]: R}, "Undetermined") for plain in PAIRS),
    (
        FINE | MENDED | {NOT_WORSE: R, HELPS: R},
        "Undetermined",
    ),  # fine if weighted, yet not by the weighting
    # a yardstick that is not exact where it must be measures nothing
    (FINE | {EXACT: R}, "Undetermined"),
    (FINE | {NOT_WORSE: R} | UNMENDED | {EXACT: R}, "Undetermined"),
]


@pytest.mark.parametrize(("verdicts", "short"), CONCLUSIONS)
def test_the_conclusion(verdicts, short):
    assert conclusion.just_fine(of(verdicts)).short == short


def test_every_conclusion_is_possible():
    assert {short for _, short in CONCLUSIONS} == {
        "Just fine",
        "Fine with reweighting",
        "Not fine",
        "Undetermined",
    }


@pytest.mark.parametrize("claim", [*FINE, *MENDED])
def test_no_conclusion_rests_on_a_claim_whose_control_misbehaves(claim):
    found = [replace(f, control_holds=f.claim != claim) for f in of(FINE | MENDED | {NOT_WORSE: R})]
    needless = claim in (NOT_WORSE, READS, FACT)
    assert conclusion.just_fine(found).short == (
        "Fine with reweighting" if needless else "Undetermined"
    )


def test_nothing_follows_where_any_invariant_is_violated():
    broken = finding("exp4.anything", R, kind="invariant")
    said = conclusion.just_fine([*of(FINE), broken])
    assert said.short == "Undetermined"
    assert "An invariant is violated" in said.text
    assert conclusion.just_fine([*of(FINE), replace(broken, verdict=S)]).short == "Just fine"


def test_the_conclusion_says_what_was_met_and_what_was_not():
    words = {claim: said for said, claims in conclusion.CRITERIA.items() for claim in claims}
    text = conclusion.just_fine(
        of(FINE | MENDED | {NOT_WORSE: R, FACT: I, READS_REWEIGHTED: R})
    ).text
    text, reweighted = text.split(" With reweighting ")
    met, failed = text.removeprefix("Met: ").split("Failed: ")
    failed, undecided = failed.split("Open: ")
    assert f"{words[DEPTH]} (0.25 [0.125, 0.5])" in met.replace("(1 ", "(0.25 ")
    assert failed.startswith(words[NOT_WORSE])
    assert undecided.startswith(words[FACT])
    met, failed = reweighted.removeprefix("met: ").split("; failed: ")
    assert met == ", ".join(words[claim] for claim in (NOT_WORSE, DEPTH, FACT))
    assert failed == f"{words[READS]}."
    assert "With reweighting" not in conclusion.just_fine(of(FINE | MENDED)).text
    assert "With reweighting" not in conclusion.just_fine(of(FINE | {READS: R})).text


def test_the_recommended_mode_without_fidelity_is_undetermined_but_says_what_the_evidence_says():
    advice = {
        letter: conclusion.recommended_mode(list(pattern(letter).values())) for letter in PATTERNS
    }
    either = "Either visibility, weighting undetermined"
    assert [answer.short for answer in advice.values()] == [
        either,
        either,
        "Undetermined",
        "Undetermined",
    ]
    assert "not interchangeable" in advice["D"].text
    assert "same results" in advice["A"].text
    assert len({answer.text for answer in advice.values()}) == 4
    assert "Not measured in this record: exp7, exp11." in advice["D"].text


@pytest.mark.parametrize(
    ("visible", "helps", "short"),
    [(R, S, "Isolated, weighting by probability"), (S, R, "Either visibility, no weighting"), (R, I, "Isolated, weighting undetermined"),
     (I, S, "Visibility undetermined, weighting by probability"), (I, I, "Undetermined"), (None, None, "Undetermined")],
)  # fmt: skip
def test_the_recommended_mode(visible, helps, short):
    found = conclusion.recommended_mode(of({VISIBLE_NOT_WORSE: visible, HELPS: helps}))
    assert found.short == short
    refuted = of({VISIBLE_NOT_WORSE: R}) + list(pattern("B").values())
    assert conclusion.recommended_mode(refuted).short.startswith("Isolated")


def test_the_advice_follows_the_conclusion():
    said = {
        short: conclusion.recommended_mode(of(verdicts)).text
        for verdicts, short in reversed(CONCLUSIONS)
    }
    for short, text in said.items():
        assert conclusion.FINE_ADVICE[short] in text


def test_every_answer_names_its_claims_and_they_come_with_their_findings():
    for make in (answers.scenario, answers.attend, answers.identical, answers.same_position, answers.looked_identical,
                 conclusion.just_fine, conclusion.recommended_mode):  # fmt: skip
        answer = make([])
        assert answer.claims
        assert [f for _, f in answers.evidence(answer, [])] == [None] * len(answer.claims)
        both = [finding(answer.claims[0], S), finding(answer.claims[0], R)]
        assert [
            f for claim, f in answers.evidence(answer, both) if claim == answer.claims[0]
        ] == both


def registered() -> set[str]:
    """The ids of all registered claims."""
    found = set()
    for path in sorted((ROOT / "test_experiments").glob("test_exp*.py")):
        spec = importlib.util.spec_from_file_location(f"claims_of_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found |= {claim.id for claim in module.STUDY.claims}
    return found


def test_every_claim_that_a_rule_or_the_method_names_is_registered():
    """A renamed claim must not turn an answer into "undetermined" unseen."""
    known = registered()
    experiments = {claim.split(".")[0] for claim in known}
    rules = (*answers.questions([]), conclusion.just_fine([]), conclusion.recommended_mode([]))
    explained = re.findall(
        r"`(exp\d+\.[a-z0-9-]+)`", (ROOT / "docs/method.md").read_text(encoding="utf-8")
    )
    named = {
        *answers.SCENARIO_CLAIMS,
        *explained,
        *(claim for answer in rules for claim in answer.claims),
    }
    assert len(explained) >= 7
    assert {claim for claim in named if claim.split(".")[0] in experiments} <= known
    assert "exp2.no-such-claim" not in known


def test_the_links_of_the_method_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / "docs/method.md").read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
