"""Answers follow from findings by their rules, and are undetermined where a needed finding is."""

import importlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tempo.claims import Finding, judge
from tempo.errors import TraceError
from tempo.reporting import rules
from tempo.reporting.answers import (
    FEW,
    Answer,
    Conclusions,
    Findings,
    evidence,
    headline_lines,
    verdicts_alone,
)
from tempo.reporting.rules import decide, explain, refuted, supported, zero
from test_experiments import questions as q
from test_experiments import test_exp2_logits_comparison as exp2
from test_experiments import test_exp13_reading as exp13
from test_experiments import test_exp14_lattices as exp14
from test_experiments import test_exp15_free_lattices as exp15
from test_experiments import test_exp16_other_texts as exp16
from test_experiments.questions import (
    ATTENDS,
    CLOSER,
    ENGINE_DIFFERS,
    EQUIVALENT,
    EXACT,
    HELPS,
    IDENTICAL,
    ISOLATED_ZERO,
    MORE_THAN_UNIFORM,
    NOT_WORSE,
    SELECTION,
    SHARING,
    STORED,
    TOP_10,
    VISIBLE_NOT_WORSE,
    ZERO_TOO,
)

ROOT = Path(__file__).resolve().parent.parent
S, R, I = "SUPPORTED", "REFUTED", "INCONCLUSIVE"  # noqa: E741
BEFORE = q.SAME_BEFORE
ARTEFACTS = tuple(q.ARTEFACTS)
# The verdicts that make each scenario, by its rule; in A no sibling gets any attention at all.
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
        claim=str(claim),
        statement="",
        kind="empirical",
        verdict=verdict,
        reason="",
        estimate=0.25,
        low=0.125,
        high=0.5,
        effect_size=1.0,
        n=160,
        unit="prompt",
        statistic="",
        test="greater",
        margin=0.0,
        margin_reason="",
        p=0.01,
        p_corrected=0.02,
        p_against=1.0,
        p_against_corrected=1.0,
        family="",
        control="",
        control_estimate=0.0,
        control_holds=True,
        context={"experiment": str(claim).split(".")[0], "model": "tiny"},
    )
    return replace(base, **changes)


# No spread: the test has nothing to judge by.
ZERO = finding(ATTENDS, I, estimate=0.0, low=0.0, high=0.0, p=math.nan)


def told(answer, found) -> Answer:
    """What a rule of the questions answers from findings."""
    return answer(Findings(list(found)))


def pattern(letter) -> dict[object, Finding]:
    found = {claim: finding(claim, verdict) for claim, verdict in PATTERNS[letter].items()}
    return found | ({ATTENDS: ZERO} if letter == "A" else {})


@pytest.mark.parametrize("letter", PATTERNS)
def test_each_scenario_follows_from_its_pattern_and_no_other_does(letter):
    found = told(q.scenario, pattern(letter).values())
    assert found.short.startswith(f"{letter}: ")
    assert found.rule.startswith(f"{letter}: ")
    assert found.claims
    f = Findings(list(pattern(letter).values()))
    held = [name[0] for name, rule in q.SCENARIOS.items() if rule.truth(f)]
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
    said = told(q.scenario, found.values())
    assert said.short == "Undetermined"
    assert str(claim) in said.text


def test_a_needless_finding_may_be_open():
    found = pattern("D") | {IDENTICAL: finding(IDENTICAL, I)}
    del found[MORE_THAN_UNIFORM]
    assert told(q.scenario, found.values()).short.startswith("D")


def test_verdicts_that_fit_no_scenario_are_said_to_fit_none():
    found = pattern("D") | {SELECTION: finding(SELECTION, S)}
    said = told(q.scenario, found.values())
    assert said.short == "Undetermined"
    assert "fit none of the four" in said.text


def test_nothing_is_known_from_no_findings():
    for answer in q.conclusions([]).answers:
        assert answer.short == "Undetermined"
    fine = q.part(Findings([]), q.DISTRIBUTION)
    assert "Not measured in this record: exp16, exp7." in fine.text


@pytest.mark.parametrize(
    ("does", "matters", "isolated", "short"),
    [
        (S, S, S, "Yes"),
        (R, S, S, "No"),
        (I, S, S, "Undetermined"),
        (S, I, S, "Undetermined"),
        (S, R, S, "Undetermined"),
        (S, S, I, "Undetermined"),
        (None, S, S, "Undetermined"),
        (S, S, None, "Undetermined"),
    ],
)
def test_whether_siblings_attend(does, matters, isolated, short):
    """It rests on what attention does: a softmax gives every allowed key some weight."""
    verdicts = {q.AT_ONCE: does, q.MATTERS_WHO: matters, ISOLATED_ZERO: isolated}
    assert told(q.attend, of(verdicts)).short == short
    assert told(q.attend, of({ATTENDS: S, ISOLATED_ZERO: S})).short == "Undetermined"
    assert told(q.attend, [ZERO]).short == "No"


def test_an_isolated_sibling_that_attends_makes_no_yes():
    found = of({q.AT_ONCE: S, q.MATTERS_WHO: S, ISOLATED_ZERO: R})
    assert told(q.attend, found).short == "Undetermined"


@pytest.mark.parametrize(
    ("verdicts", "short"),
    [
        ((S, S, S, S), "Identical"),
        ((R, S, S, S), "Not identical, but equivalent"),
        ((R, R, S, S), "Only the top-k"),
        ((R, R, R, S), "Neither"),
        ((R, R, S, R), "Neither"),
        ((R, R, I, S), "Undetermined"),
        ((I, I, R, R), "Undetermined"),
    ],
)
def test_identical_equivalent_or_only_the_top_k(verdicts, short):
    claims = (IDENTICAL, EQUIVALENT, TOP_10, SELECTION)
    found = [finding(claim, verdict) for claim, verdict in zip(claims, verdicts, strict=True)]
    said = told(q.identical, found)
    assert said.short == short
    assert "0.25 [0.125, 0.5]" in said.text
    assert "25\u00a0% [12.5, 50]" in said.text


POSITION = {**dict.fromkeys(STORED, S), EXACT: S, NOT_WORSE: S, CLOSER: S}


def of(verdicts) -> list[Finding]:
    """A finding for each claim with this verdict; None: not measured."""
    invariants = (*STORED, EXACT, BEFORE, *ARTEFACTS, ZERO_TOO)
    found = []
    for claim, verdict in verdicts.items():
        if verdict:
            kind = "invariant" if claim in invariants else "empirical"
            estimate = 1.0 if verdict == S else 0.25
            found.append(finding(claim, verdict, kind=kind, estimate=estimate))
    return found


@pytest.mark.parametrize(
    ("changes", "short"),
    [
        ({}, "Better than"),
        ({CLOSER: R}, "No worse than"),
        ({CLOSER: I}, "No worse than"),
        ({CLOSER: R, NOT_WORSE: R}, "Worse than"),
        ({CLOSER: I, NOT_WORSE: I}, "Undetermined"),
        ({STORED[1]: R}, "Undetermined"),
        ({STORED[2]: None}, "Undetermined"),
        ({EXACT: None}, "Undetermined"),
        ({EXACT: R}, "Undetermined"),
        ({CLOSER: None, NOT_WORSE: None}, "Undetermined"),
    ],
)
def test_how_well_several_tokens_at_one_position_are_handled(changes, short):
    said = told(q.same_position, of(POSITION | changes))
    assert said.short.startswith(short)


def test_what_no_experiment_measured_is_never_guessed():
    stored = of(dict.fromkeys(STORED, S))
    said = told(q.same_position, stored)
    assert said.short == "Undetermined"
    assert "They really stand" not in said.text
    assert "Siblings really stand at one position" in said.text
    assert "Not measured in this record: exp7, exp8." in said.text
    moved = [stored[0], replace(stored[1], verdict=R), stored[2]]
    assert "do NOT stand" in told(q.same_position, moved).text
    assert "not shown" in told(q.same_position, stored[:2]).text
    assert "Not measured" not in told(q.same_position, of(POSITION | {SHARING: S})).text


LOOKED = {BEFORE: S, IDENTICAL: R, ENGINE_DIFFERS: S, **dict.fromkeys(ARTEFACTS, S), ZERO_TOO: S}


@pytest.mark.parametrize(
    ("changes", "short"),
    [
        ({}, "Artefacts"),
        (dict.fromkeys(ARTEFACTS, R), "Not the model"),
        ({ENGINE_DIFFERS: I}, "Not the model"),
        ({ENGINE_DIFFERS: None, **dict.fromkeys(ARTEFACTS)}, "Not the model"),
        ({ENGINE_DIFFERS: R}, "Undetermined"),
        ({IDENTICAL: S, ENGINE_DIFFERS: R}, "They are identical"),
        ({IDENTICAL: S, ENGINE_DIFFERS: None}, "They are identical"),
        ({IDENTICAL: S}, "Undetermined"),
        ({IDENTICAL: I}, "Undetermined"),
        ({BEFORE: R}, "Undetermined"),
        ({BEFORE: None}, "Undetermined"),
    ],
)
def test_why_they_looked_identical(changes, short):
    assert told(q.looked_identical, of(LOOKED | changes)).short.startswith(short)


def test_the_artefacts_that_suffice_are_named_and_no_other():
    first, second, _ = ARTEFACTS
    text = told(q.looked_identical, of(LOOKED | {second: R})).text
    assert q.ARTEFACTS[first] in text
    assert q.ARTEFACTS[second] not in text
    assert "160 of 160 prompts" in text
    too = "visible mode as well"
    assert too in text
    assert too not in told(q.looked_identical, of(LOOKED | {ZERO_TOO: R})).text
    assert "harness is at fault" in told(q.looked_identical, of(LOOKED | {BEFORE: R})).text
    text = told(q.looked_identical, of({BEFORE: S, IDENTICAL: R})).text
    assert "Not measured in this record: exp6." in text


YES_YES = "Yes as they are, yes with posterior weighting"


def all_of(which) -> tuple[object, ...]:
    return (*which.plain, *which.weighted, *which.ruler)


def met(which) -> dict[object, str]:
    """The verdicts by which a part is met in both ways."""
    return dict.fromkeys(all_of(which), S)


def part_of(which, verdicts) -> Answer:
    return q.part(Findings(of(verdicts)), which)


@pytest.mark.parametrize("which", q.PARTS, ids=lambda which: which.question.partition(":")[0])
def test_a_part_is_met_or_failed_for_each_way_to_weigh_siblings(which):
    plain, weighted, fine = dict(which.plain), dict(which.weighted), met(which)
    assert part_of(which, fine).short == YES_YES
    for claim in plain:
        assert part_of(which, fine | {claim: R}).short.startswith("No as they are, yes")
        for open_ in (I, None):
            short = part_of(which, fine | {claim: open_}).short
            assert short == "Undetermined as they are, yes with posterior weighting"
    for claim in weighted:
        assert part_of(which, fine | {claim: R}).short.endswith("no with posterior weighting")
    failed = fine | dict.fromkeys((*plain, *weighted), R)
    assert part_of(which, failed).short == "No as they are, no with posterior weighting"


@pytest.mark.parametrize("which", q.PARTS, ids=lambda which: which.question.partition(":")[0])
def test_a_part_that_a_perfect_reader_fails_decides_nothing(which):
    for verdict in (R, I, None):
        ruled = met(which) | dict.fromkeys(which.ruler, verdict)
        said = part_of(which, ruled)
        assert said.short == "Undetermined"
        why = ("A perfect reader fails as well", "An invariant is violated")
        assert said.text.startswith(why) == (verdict == R)


@pytest.mark.parametrize("which", q.PARTS, ids=lambda which: which.question.partition(":")[0])
def test_no_part_rests_on_a_claim_whose_control_misbehaves(which):
    for claim in all_of(which):
        found = [replace(f, control_holds=f.claim != str(claim)) for f in of(met(which))]
        assert q.part(Findings(found), which).short != YES_YES


def test_nothing_follows_where_any_invariant_is_violated():
    broken = finding("exp4.anything", R, kind="invariant")
    found = of(met(q.TEXT))
    said = q.part(Findings([*found, broken]), q.TEXT)
    assert said.short == "Undetermined"
    assert "An invariant is violated" in said.text
    held = replace(broken, verdict=S)
    assert q.part(Findings([*found, held]), q.TEXT).short == YES_YES


@pytest.mark.parametrize("which", q.PARTS)
def test_where_no_prompt_has_a_value_no_sentence_speaks_of_one(which):
    nan = math.nan
    empty = [
        finding(claim, "INCONCLUSIVE", n=0, estimate=nan, low=nan, high=nan)
        for claim in all_of(which)
    ]
    answer = q.part(Findings(empty), which)
    assert answer.sentence == q.NO_VALUE
    assert "not measured" not in f"{answer.text}{answer.sentence}"
    assert q.NO_VALUE not in part_of(which, met(which)).sentence


def test_a_part_says_its_numbers_and_what_stands_beside():
    beside = dict.fromkeys(q.TEXT.beside, I)
    text = part_of(q.TEXT, met(q.TEXT) | beside | dict.fromkeys(q.TEXT.ruler, S)).text
    assert f"{q.READS} 1 [0.125, 0.5]" in text
    assert "a beam search that forwards as many tokens 0.25 [0.125, 0.5]" in text
    missing = part_of(q.TEXT, {}).text
    assert "Not measured in this record: exp16." in missing


ZEROS = {arm: [0.0] * 12 for arm in ("none", "posterior")}
LOST = [0.0, 0.0, *[0.5] * 10]  # what siblings of no relation give once a wide set was read
WIDTHS = {arm: [2] * 12 for arm in ("none", "posterior", "rolled")}
NEAR = (exp16.test_plain_is_near_the_truth, exp16.test_posterior_is_near_the_truth)
SLOPES = (
    exp16.test_plain_error_does_not_grow_with_depth,
    exp16.test_error_does_not_grow_with_depth,
)


def judged(claims, cases) -> list[Finding]:
    return [judge(claim.claim, cases) for claim in claims]


def free_runs(tv) -> exp15.Case:
    """What exp15 measures of runs that are so far from the truth, step by step."""
    return exp15.Case(WIDTHS, tv | {"rolled": LOST}, 1.0, {}, {}, {}, {})


def forced_sets(by_depth) -> exp14.Case:
    """What exp14 measures of ways to read that are so far from the truth, by depth."""
    of_arms = dict.fromkeys(("none", "posterior"), by_depth)
    found = {
        str(width): {arm: far[: len(depths)] for arm, far in of_arms.items()}
        for width, depths in exp14.DEPTHS.items()
    }
    return exp14.Case(found, 1.0, {})


def case_of(forced, free) -> exp16.Case:
    """What exp16 measures, if nothing but these is looked at."""
    modes, facts = exp2.Case("float32", {}), exp13.Answered(False, {}, {})
    return exp16.Case("", modes, {}, None, facts, forced, free)


@pytest.mark.parametrize(
    ("tv", "by_depth", "short"),
    [
        (ZEROS, [0.0] * 6, YES_YES),
        (
            {"none": LOST, "posterior": LOST},
            [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
            "No as they are, no with posterior weighting",
        ),
    ],
)
def test_an_exact_mixture_in_the_engines_place_is_fine_and_random_siblings_are_not(
    tv, by_depth, short
):
    """The statistics of the claims are computed, not planted: from perfect and from broken runs."""
    noise = np.random.default_rng(0).normal(0, 1e-3, size=(60, 18))
    free = [
        free_runs({arm: np.add(far, row[:12]).tolist() for arm, far in tv.items()}) for row in noise
    ]
    forced = [forced_sets(np.add(by_depth, row[12:]).tolist()) for row in noise]
    cases = list(map(case_of, forced, free))
    found = [*judged((*NEAR, *SLOPES), cases), finding(EXACT, S)]
    assert all(f.control_holds for f in found)
    assert q.part(Findings(found), q.DISTRIBUTION).short == short


def test_the_recommended_mode_without_fidelity_is_undetermined_but_says_what_the_evidence_says():
    advice = {letter: told(q.recommended_mode, pattern(letter).values()) for letter in PATTERNS}
    either = "Either visibility, weighting undetermined"
    shorts = [answer.short for answer in advice.values()]
    assert shorts == [either, either, "Undetermined", "Undetermined"]
    assert "not interchangeable" in advice["D"].text
    assert "same results" in advice["A"].text
    assert len({answer.text for answer in advice.values()}) == 4
    assert "Not measured in this record: exp7, exp11, exp16." in advice["D"].text


@pytest.mark.parametrize(
    ("visible", "helps", "posterior", "short"),
    [
        (R, S, None, "Isolated, weighting by probability"),
        (R, S, S, "Isolated, weighting by posterior"),
        (S, R, R, "Either visibility, no weighting"),
        (R, I, I, "Isolated, weighting undetermined"),
        (I, S, I, "Visibility undetermined, weighting by probability"),
        (I, I, I, "Undetermined"),
        (None, None, None, "Undetermined"),
    ],
)
def test_the_recommended_mode(visible, helps, posterior, short):
    verdicts = {VISIBLE_NOT_WORSE: visible, HELPS: helps}
    found = of(verdicts | dict.fromkeys(q.POSTERIOR_HELPS, posterior))
    assert told(q.recommended_mode, found).short == short
    refuted_in_b = of({VISIBLE_NOT_WORSE: R}) + list(pattern("B").values())
    assert told(q.recommended_mode, refuted_in_b).short.startswith("Isolated")


def test_the_advice_follows_what_a_run_is_worth_as_text():
    decided = {
        q.YES: met(q.TEXT),
        q.NO: met(q.TEXT) | dict.fromkeys(q.TEXT.weighted, R),
        "Undetermined": {},
    }
    for short, verdicts in decided.items():
        assert q.TEXT_ADVICE[short] in told(q.recommended_mode, of(verdicts)).text


def test_every_answer_names_its_claims_and_they_come_with_their_findings():
    for answer in q.conclusions([]).answers:
        assert answer.claims
        assert answer.rule
        assert [f for _, f in evidence(answer, [])] == [None] * len(answer.claims)
        both = [finding(answer.claims[0], S), finding(answer.claims[0], R)]
        behind = evidence(answer, both)
        assert [f for claim, f in behind if claim == answer.claims[0]] == both


def test_the_conclusions_are_three_parts_the_scenario_four_questions_and_advice():
    made = q.conclusions(list(pattern("D").values()))
    assert [answer.place for answer in made.answers] == ["headline"] * 4 + ["question"] * 4 + [
        "advice"
    ]
    assert [answer.question for answer in made.headlines[:3]] == [p.question for p in q.PARTS]
    assert made.title == q.TITLE
    assert made.headlines[3].short == "D: fundamental difference"
    assert Conclusions.from_record(json.loads(json.dumps(made.record()))) == made


def registered(experiments) -> set[str]:
    """The ids of all claims of these experiments."""
    found = set()
    for experiment in experiments:
        (path,) = (ROOT / "test_experiments").glob(f"test_{experiment}_*.py")
        module = importlib.import_module(f"test_experiments.{path.stem}")
        found |= set(module.study.claims)
    return found


@pytest.mark.parametrize("page", ["docs/method.md", "docs/prior-art.md"])
def test_every_claim_that_a_page_names_is_registered(page):
    """A renamed claim must not leave the page behind. The rules would not even import."""
    text = (ROOT / page).read_text(encoding="utf-8")
    explained = re.findall(r"`(exp\d+\.[a-z0-9-]+)`", text)
    assert len(explained) >= 7
    known = registered({claim.split(".")[0] for claim in explained})
    assert set(explained) <= known
    assert "exp2.no-such-claim" not in known


def test_the_links_of_the_method_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / "docs/method.md").read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


# --- what every study can use


def test_a_claim_is_asked_for_by_its_id_or_by_itself():
    class Claim:
        def __str__(self):
            return "s.a"

    f = Findings([finding("s.a", S, estimate=0.5, low=0.25, high=0.75)])
    for claim in ("s.a", Claim()):
        assert f.of(claim)
        assert f.truth(claim) is True
        assert f.zero(claim) is False
        assert f.said(claim, percent=True) == "50\u00a0% [25, 75]"
        assert f.count(claim) == "80 of 160 prompts"
        assert f.verdict(claim) == "supported"
    assert f.truth("s.b") is None
    assert f.said("s.b") == "not measured"
    twice = [replace(one, context={"variant": name}) for one in f.all for name in ("x", "y")]
    assert Findings(twice).said("s.a") == "0.5 [0.25, 0.75] (x), 0.5 [0.25, 0.75] (y)"
    assert Findings(twice).said("s.a", named=False) == "0.5 [0.25, 0.75] and 0.5 [0.25, 0.75]"
    assert f.verdict("s.b") == "undecided"


TRUTHS = {"yes": S, "no": R, "open": I, "absent": None}


@pytest.mark.parametrize(
    ("rule", "truth"),
    [
        (rules.supported("yes", "yes"), True),
        (rules.supported("yes", "no"), False),
        (rules.supported("no", "open"), False),
        (rules.supported("yes", "open"), None),
        (rules.supported("absent"), None),
        (rules.refuted("no"), True),
        (rules.refuted("no", "yes"), False),
        (rules.refuted("no", "open"), None),
        (rules.any_supported("no", "yes", "open"), True),
        (rules.any_supported("no", "open"), None),
        (rules.any_supported("no", "no"), False),
        (rules.any_refuted("no", "yes", "open"), True),
        (rules.any_refuted("yes", "open"), None),
        (rules.any_refuted("yes", "yes"), False),
        (rules.not_refuted("yes"), True),
        (rules.not_refuted("open"), True),
        (rules.not_refuted("absent"), True),
        (rules.not_refuted("no"), False),
        (rules.not_measured("absent"), True),
        (rules.not_measured("open"), False),
        (rules.zero("zero"), True),
        (rules.zero("yes"), False),
        (rules.zero("absent"), None),
        (rules.supported("yes") & rules.refuted("no"), True),
        (rules.supported("yes") & rules.supported("open"), None),
        (rules.supported("no") & rules.supported("open"), False),
        (rules.supported("yes") | rules.supported("open"), True),
        (rules.supported("no") | rules.supported("open"), None),
        (rules.supported("no") | rules.supported("no"), False),
    ],
)
def test_a_rule_is_true_false_or_unknown(rule, truth):
    found = [finding(claim, verdict) for claim, verdict in TRUTHS.items() if verdict]
    found.append(finding("zero", I, estimate=0.0, low=0.0, high=0.0))
    assert rule.truth(Findings(found)) is truth


def test_a_violated_invariant_is_seen_by_the_rule_for_it():
    broken = finding("s.a", R, kind="invariant")
    assert rules.nothing_violated().truth(Findings([broken])) is False
    assert rules.nothing_violated().truth(Findings([replace(broken, kind="empirical")])) is True


def test_rules_say_themselves_in_words_and_choices_are_bracketed_within_longer_ones():
    choice = refuted("b") | zero("b")
    assert choice.words == "b refuted or b exactly zero"
    assert (supported("a") & choice).words == "a supported, (b refuted or b exactly zero)"
    assert (supported("a") & choice.called("B")).words == "a supported, B"
    answers = {"Yes": supported("a", "b"), "No": choice}
    assert explain(answers) == (
        "Yes: a and b supported. Else No: b refuted or b exactly zero. Else undetermined."
    )


def test_the_first_rule_that_holds_decides_if_what_is_given_holds():
    f = Findings([finding("a", S), finding("b", R)])
    both = {"One": supported("a"), "Two": refuted("b")}
    assert decide(f, both) == "One"
    assert decide(f, both, given=refuted("b")) == "One"
    assert decide(f, both, given=supported("b")) == "Undetermined"
    assert decide(f, both, given=supported("absent")) == "Undetermined"
    assert decide(f, {"Two": supported("b")}) == "Undetermined"


def test_a_study_without_conclusions_shows_its_verdicts():
    found = [finding("s.a", S, statement="It grows."), finding("s.b", R, statement="It shrinks.")]
    made = verdicts_alone(found)
    (headline,) = made.answers
    assert headline.place == "headline"
    assert headline.short == "1 supported, 1 refuted"
    assert "It grows: supported, 0.25 [0.125, 0.5]." in headline.text
    assert made.explained == ()
    assert headline_lines(made)[0].startswith("Findings: 1 supported, 1 refuted. It grows: ")
    many = verdicts_alone(found * FEW)
    assert many.headlines[0].text == ""
    assert headline_lines(verdicts_alone([])) == ["Findings: no findings."]


def headline(question, short, text="") -> Answer:
    return Answer(question, short, text, "a rule", (), "headline")


def test_the_lines_at_the_end_of_a_session_tell_numbers_of_the_first_decided_answer_alone():
    open_first = (headline("Is it?", "Undetermined", "No."), headline("Which?", "A", "1."))
    assert headline_lines(Conclusions("Is it?", "", (*open_first, headline("So?", "B", "2.")))) == [
        "Is it? Undetermined.",
        "Which? A. 1.",
        "So? B.",
    ]
    none = (headline("Is it?", "Undetermined", "No."), headline("So?", "Undetermined", "2."))
    assert headline_lines(Conclusions("Is it?", "", none)) == [
        "Is it? Undetermined. No.",
        "So? Undetermined.",
    ]


RECORD = Conclusions("T", "A", (headline("Q", "S", "t"),)).record()


@pytest.mark.parametrize(
    ("damaged", "field"),
    [
        ([], "it"),
        ("text", "it"),
        ({**RECORD, "title": 3}, "title"),
        ({**RECORD, "title": None}, "title"),
        ({key: value for key, value in RECORD.items() if key != "answers"}, "answers"),
        ({**RECORD, "more": 1}, "more"),
        ({**RECORD, "answers": [{**RECORD["answers"][0], "place": "top"}]}, "answers.0.place"),
        ({**RECORD, "answers": [{**RECORD["answers"][0], "claims": [1]}]}, "answers.0.claims.0"),
        ({**RECORD, "answers": [{**RECORD["answers"][0], "more": 1}]}, "answers.0.more"),
    ],
)
def test_a_damaged_record_of_conclusions_is_an_error_of_one_line(damaged, field):
    with pytest.raises(TraceError) as error:
        Conclusions.from_record(damaged)
    assert re.search(rf"\({re.escape(field)}: ", str(error.value))
    assert "\n" not in str(error.value)
    assert "tempo doctor --repair" in str(error.value)
    assert Conclusions.from_record(RECORD).answers[0].short == "S"
