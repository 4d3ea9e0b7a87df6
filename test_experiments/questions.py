"""The key questions, answered from the findings of the experiments by rules fixed before the data.

The rules are written with the claims themselves. Where a claim is renamed or removed, this module
cannot be imported, and no answer turns into "undetermined" unseen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from tempo.claims import Finding
from tempo.reporting.answers import (
    UNDETERMINED,
    Answer,
    Conclusions,
    Findings,
    Hero,
    HeroRow,
    Place,
    every,
    unmeasured,
)
from tempo.reporting.rules import (
    any_refuted,
    any_supported,
    decide,
    explain,
    listed,
    not_measured,
    not_refuted,
    nothing_violated,
    refuted,
    supported,
    zero,
)
from test_experiments import test_exp2_logits_comparison as exp2
from test_experiments import test_exp3_cross_parallel_attention as exp3
from test_experiments import test_exp4_kv_cache as exp4
from test_experiments import test_exp6_why_identical as exp6
from test_experiments import test_exp7_branch_mixture as exp7
from test_experiments import test_exp8_position_or_company as exp8
from test_experiments import test_exp11_crowding as exp11
from test_experiments import test_exp15_free_lattices as exp15
from test_experiments import test_exp16_other_texts as exp16

TITLE = "Does a language model handle several tokens at the same position just fine?"
ASKED = (
    "At each step every token that reaches a probability threshold is appended, all at one "
    "position. Does the model cope, and does it matter whether such siblings attend to each other "
    "(visible) or not (isolated)?"
)

# exp2: what the modes predict after a set. exp3: what siblings give each other.
SAME_BEFORE = exp2.test_same_before_first_wide_set
IDENTICAL, EQUIVALENT = exp2.test_identical_logits, exp2.test_equivalent_at_reader
TOP_10, SELECTION = exp2.test_same_top_10, exp2.test_same_selection
ATTENDS, MORE_THAN_UNIFORM = exp3.test_score_above_zero, exp3.test_more_than_uniform
ISOLATED_ZERO, WORKS = exp3.test_isolated_is_zero, exp3.test_does_something
NEAR = exp3.test_more_than_at_distance_one
AT_ONCE, MATTERS_WHO = exp16.test_does_something_at_once, exp16.test_it_matters_who_is_seen
MORE_THAN_STRANGERS = exp16.test_siblings_do_more_than_strangers
AGAIN_EQUIVALENT = exp16.test_equivalent_at_reader
# exp4: where siblings stand. exp7 and exp8: how near the truth they are read. exp11: weights.
STORED = (
    exp4.test_siblings_share_a_position,
    exp4.test_positions_are_p_plus_k,
    exp4.test_next_query_reaches_every_slot,
)
EXACT, CLOSER = exp7.test_exact_where_theory_says, exp7.test_closer_than_top_branch
NOT_WORSE = exp7.test_not_worse_than_top_branch
VISIBLE_NOT_WORSE = exp7.test_visible_not_worse_than_isolated
SHARING, READER_DISTANCE = exp8.test_sharing_helps, exp8.test_reader_distance
HELPS = exp11.test_probability_weighting_helps
# exp6: artefacts of the earlier pipeline. Each that is supported makes the modes look identical.
ENGINE_DIFFERS, ZERO_TOO = exp6.test_correct_engine_differs, exp6.test_zero_in_visible_mode_too
ARTEFACTS: dict[object, str] = {
    exp6.test_last_only_cache_is_identical: "only the last sibling enters the cache",
    exp6.test_dropped_mask_is_identical: "the mask never reaches the model",
    exp6.test_before_the_siblings_is_identical: "what is compared was computed before the siblings "
    "exist",
}


class Part(NamedTuple):
    """One part of "fine", asked of siblings as they are and of the best weighting that is free.

    question: what it asks. plain, weighted: the claims that must be supported, each in words.
    ruler: what a perfect reader must pass as well; if it fails, the part measures only the ruler.
    beside: claims that stand beside with their numbers and decide nothing, each in words.
    sentence: what the numbers of two claims say, plain and weighted, with their units.
    figure: the title of the picture that shows it.
    """

    question: str
    plain: dict[object, str]
    weighted: dict[object, str]
    ruler: tuple[object, ...]
    beside: dict[object, str]
    sentence: tuple[str, object, object]
    figure: str


NEAR_TRUTH, DEPTH = "distance to it", "its growth with each set"
READS, FACTS = "best path less greedy text, nats a token", "facts lost"
LESS_BRANCH = "distance less that of the best branch"
LESS_THIRDS = "distance less two thirds of plain siblings'"
DISTRIBUTION = Part(
    "As a distribution: near the exact mixture of all branches?",
    {
        exp16.test_plain_is_near_the_truth: NEAR_TRUTH,
        exp16.test_plain_error_does_not_grow_with_depth: DEPTH,
    },
    {
        exp16.test_posterior_is_near_the_truth: NEAR_TRUTH,
        exp16.test_error_does_not_grow_with_depth: DEPTH,
    },
    (EXACT,),
    {},
    (
        "The total variation to the exact mixture of all branches is {plain} with siblings as they "
        "are, {weighted} with posterior weighting (near: below 0.08, growing by less than 0.03 a "
        "set).",
        exp16.test_plain_is_near_the_truth,
        exp16.test_posterior_is_near_the_truth,
    ),
    "How near free runs stay to the truth",
)
TEXT = Part(
    "As text: as good as greedy, and facts still found?",
    {exp16.test_plain_best_path_reads_as_well_as_greedy: READS, exp16.test_fact_still_found: FACTS},
    {
        exp16.test_best_path_reads_as_well_as_greedy: READS,
        exp16.test_posterior_fact_still_found: FACTS,
    },
    (exp16.test_perfect_best_path_reads_as_well_as_greedy,),
    {
        exp16.test_perfect_best_path_reads_as_well_as_greedy: "a perfect reader's best path less "
        "greedy text",
        exp16.test_best_path_reads_as_well_as_beam: "posterior weighting less a beam search that "
        "forwards as many tokens",
    },
    (
        "The best path less greedy text is {plain} nats a token with siblings as they are, "
        "{weighted} with posterior weighting (below 0: more probable).",
        exp16.test_plain_best_path_reads_as_well_as_greedy,
        exp16.test_best_path_reads_as_well_as_greedy,
    ),
    "What the best path through the sets costs",
)
OPEN = Part(
    "Where no branch reaches a posterior of 0.6: better than the best branch?",
    {exp16.test_plain_not_worse_than_late_branch_where_open: LESS_BRANCH},
    {
        exp16.test_posterior_beats_late_branch_where_open: LESS_BRANCH,
        exp16.test_posterior_removes_a_third_where_open: LESS_THIRDS,
    },
    (EXACT,),
    {},
    (
        "The distance of the whole set less that of its best branch is {plain} with siblings as "
        "they are, {weighted} with posterior weighting (below 0: the set is nearer).",
        exp16.test_plain_not_worse_than_late_branch_where_open,
        exp16.test_posterior_beats_late_branch_where_open,
    ),
    "Crowding or contradiction: sets, and what their members weigh",
)
PARTS = (DISTRIBUTION, TEXT, OPEN)
AS_THEY_ARE, BY_POSTERIOR = "as they are", "with posterior weighting"
YES, NO = "yes", "no"
NO_VALUE = "No prompt of this record gives a value."
POSTERIOR_HELPS = (
    exp16.test_forced_posterior_removes_two_thirds,
    exp16.test_posterior_removes_two_thirds,
)

SCENARIOS = {
    "A: prior context dominates": supported(IDENTICAL) & zero(ATTENDS),
    "B: subtle cross-attention": supported(ATTENDS, EQUIVALENT) & refuted(MORE_THAN_UNIFORM),
    "C: significant interaction, same top-k": supported(ATTENDS, TOP_10, SELECTION)
    & refuted(EQUIVALENT),
    "D: fundamental difference": supported(ATTENDS) & refuted(EQUIVALENT, TOP_10, SELECTION),
}
SCENARIO_MEANS = dict(
    zip(
        SCENARIOS,
        (
            "Siblings get no attention, and both modes give the same distributions.",
            "Siblings attend to each other, no more than to any other token, and the "
            "distributions are equivalent.",
            "Siblings attend to each other and the distributions differ, but not the tokens that "
            "are chosen.",
            "Siblings attend to each other, and distributions, top ten and chosen sets all differ.",
        ),
        strict=True,
    )
)
SCENARIO_CLAIMS = (IDENTICAL, EQUIVALENT, TOP_10, SELECTION, ATTENDS, MORE_THAN_UNIFORM)
SCENARIO_ADVICE = {
    "A": "The modes give the same results.",
    "B": "The modes are equivalent within what bfloat16 changes.",
    "C": "The modes choose the same tokens with different probabilities: name the mode wherever "
    "probabilities matter.",
    "D": "The modes are not interchangeable: name the one used with every result, and never mix "
    "runs of both.",
}
NAME_THE_MODE = (
    "Whether the modes are interchangeable is not shown: name the one used with every result."
)
TEXT_ADVICE = {
    YES: "Read a run by its best path, weighted by posterior.",
    NO: "Where the text matters, decode greedily (max_width=1) or by beam search.",
    UNDETERMINED: "Whether the text of a run can be relied on is undetermined.",
}


def conclusions(findings: Sequence[Finding]) -> Conclusions:
    """What the findings of one model say about parallel tokens, for the top of its report."""
    f = Findings(findings)
    questions = (attend(f), identical(f), same_position(f), looked_identical(f))
    parts = [part(f, which) for which in PARTS]
    answers = (*parts, scenario(f), *questions, recommended_mode(f))
    return Conclusions(TITLE, ASKED, answers, hero(f))


def hero(f: Findings) -> Hero:
    """The figure beside the verdict: ways to read a set, and how far each is from the truth."""
    study = exp16 if f.of(exp16.test_plain_is_near_the_truth) else exp15
    plain, posterior = study.test_plain_is_near_the_truth, study.test_posterior_is_near_the_truth
    control = exp15.test_posterior_is_near_the_truth
    rows = (
        HeroRow("siblings as they are", str(plain)),
        HeroRow("by count", row="weighting count"),
        HeroRow("by probability", row="weighting probability"),
        HeroRow("by posterior", str(posterior)),
        HeroRow("each member reads its best path alone", row="weighting best parent"),
        HeroRow("control: posteriors of other members", str(control), is_control=True),
    )
    return Hero(
        title="Ways to weigh siblings, and how far each is from the truth",
        unit="total variation to the exact mixture of all paths",
        rows=rows,
        picture=DISTRIBUTION.figure,
        perfect="a perfect reader",
        caption="Free runs of isolated mode, at the steps that follow two sets of several tokens.",
    )


def part(f: Findings, which: Part) -> Answer:
    """One part of the question of the title, for both ways to weigh siblings."""
    shorts, rules, said = [], [], []
    for way, claims in ((AS_THEY_ARE, which.plain), (BY_POSTERIOR, which.weighted)):
        short, rule = _decided(f, which, claims)
        shorts.append(f"{short.lower()} {way}")
        rules.append(f"{way.capitalize()}. {rule}")
        if numbers := _numbers(f, claims):
            said.append(f"{way.capitalize()}: {numbers}.")
    if numbers := _numbers(f, which.beside):
        said.append(f"Beside: {numbers}.")
    if not all(short.startswith(UNDETERMINED.lower()) for short in shorts):
        short = ", ".join(shorts).capitalize()
    else:
        short = UNDETERMINED
    if nothing_violated().truth(f) is False:
        said.insert(0, "An invariant is violated, so nothing follows.")
    elif supported(*which.ruler).truth(f) is False:
        said.insert(0, "A perfect reader fails as well, so nothing follows.")
    every_claim = (*which.plain, *which.weighted, *which.ruler, *which.beside)
    said += unmeasured(f, every_claim)
    answer = _answer(which.question, short, said, " ".join(rules), every_claim, "headline")
    sentence, plain, weighted = which.sentence
    if _has_value(f, plain) and _has_value(f, weighted):
        numbers = {"plain": plain, "weighted": weighted}
        sentence = sentence.format(**{k: f.said(v, named=False) for k, v in numbers.items()})
    else:
        sentence = " ".join(unmeasured(f, (plain, weighted))) or NO_VALUE
    return replace(answer, sentence=sentence, figure=which.figure)


def _decided(f: Findings, which: Part, claims: Iterable[object]) -> tuple[str, str]:
    """Whether a part is met by one way to weigh siblings, and the rule for it in words."""
    rules = {YES: supported(*claims), NO: any_refuted(*claims)}
    given = nothing_violated() & supported(*which.ruler)
    return decide(f, rules, given), explain(rules, given)


def _numbers(f: Findings, claims: Mapping[object, str]) -> str:
    """What was measured of these claims."""
    measured = [claim for claim in claims if _has_value(f, claim)]
    return "; ".join(f"{claims[claim]} {f.said(claim)}" for claim in measured)


def _has_value(f: Findings, claim: object) -> bool:
    """Whether any prompt gave a value; short prompts of a flat model may all give none."""
    return any(found.n for found in f.of(claim))


def scenario(f: Findings) -> Answer:
    """Which of the four scenarios the verdicts of exp2 and exp3 make."""
    short = decide(f, SCENARIOS)
    text = (
        f"After a wide set the modes' distributions differ by a total variation of "
        f"{f.said(EQUIVALENT)} (0.02 would be equivalent), their top ten by {_percent(f, TOP_10)}, "
        f"the set they choose at {_percent(f, SELECTION)} of steps; a visible sibling gets "
        f"{_percent(f, ATTENDS)} of another's attention."
    )
    rule = explain(SCENARIOS)
    if short in SCENARIOS:
        rule = f"{short}: {SCENARIOS[short].words}"
    else:
        possible = [name[0] for name, rule in SCENARIOS.items() if rule.truth(f) is None]
        unknown = ", ".join(str(claim) for claim in SCENARIO_CLAIMS if f.truth(claim) is None)
        text = f"The verdicts fit none of the four. {text}"
        if possible:
            text = f"{listed(possible, 'or')} cannot be told yet: no verdict on {unknown}."
    claims = [claim for claim in SCENARIO_CLAIMS if str(claim) in rule]
    question = "How do visible and isolated mode differ?"
    answer = _answer(question, short, [text], rule, claims, "headline")
    sentence = SCENARIO_MEANS.get(short, " ".join(unmeasured(f, SCENARIO_CLAIMS)))
    return replace(answer, sentence=sentence, options=tuple(SCENARIO_MEANS.items()))


def attend(f: Findings) -> Answer:
    """Question 1."""
    rules = {
        "No": refuted(AT_ONCE) | zero(ATTENDS),
        "Yes": supported(AT_ONCE, MATTERS_WHO, ISOLATED_ZERO),
    }
    uniform = {True: "more than", False: "no more than", None: "undecided whether more than"}
    does = {
        True: "it does change",
        False: "it hardly changes",
        None: "undecided whether it changes",
    }
    effect = (
        f"At the first wide set, where both modes have read the same, it changes what members "
        f"predict by KL {f.said(AT_ONCE)} nats; against random tokens in the siblings' slots by "
        f"{f.said(MATTERS_WHO)}; siblings less random tokens {f.said(MORE_THAN_STRANGERS)}."
    )
    text = (
        f"A visible sibling gives each other one {_percent(f, ATTENDS)} of its attention, an "
        f"isolated one exactly 0 on {f.count(ISOLATED_ZERO)}. That is "
        f"{uniform[f.truth(MORE_THAN_UNIFORM)]} an equal spread (log ratio "
        f"{f.said(MORE_THAN_UNIFORM)}), and {does[f.truth(WORKS)]} what siblings predict: KL "
        f"{f.said(WORKS)} nats."
    )
    if any(map(f.of, (AT_ONCE, MATTERS_WHO))):
        text = f"{text} {effect}"
    claims = (AT_ONCE, MATTERS_WHO, ISOLATED_ZERO, ATTENDS, MORE_THAN_UNIFORM, WORKS)
    claims = (*claims, MORE_THAN_STRANGERS)
    question = "Do parallel tokens attend to each other in visible mode?"
    answer = _answer(question, decide(f, rules), _any(f, claims, text), explain(rules), claims)
    return replace(answer, figure="Which heads attend to siblings")


def identical(f: Findings) -> Answer:
    """Question 2."""
    rules = {
        "Identical": supported(IDENTICAL),
        "Not identical, but equivalent": refuted(IDENTICAL) & supported(EQUIVALENT),
        "Only the top-k": refuted(EQUIVALENT) & supported(TOP_10, SELECTION),
        "Neither": refuted(EQUIVALENT) & any_refuted(TOP_10, SELECTION),
    }
    text = (
        f"After a wide set the distributions agree on {f.count(IDENTICAL)}; total variation "
        f"{f.said(EQUIVALENT)}. The top ten differ by {_percent(f, TOP_10)}, the selected set at "
        f"{_percent(f, SELECTION)} of steps."
    )
    if f.of(AGAIN_EQUIVALENT):
        text += f" On texts drawn later the total variation is {f.said(AGAIN_EQUIVALENT)}."
    claims = (IDENTICAL, EQUIVALENT, TOP_10, SELECTION, AGAIN_EQUIVALENT)
    question = "Are the distributions identical, or just the top-k?"
    answer = _answer(question, decide(f, rules), _any(f, claims, text), explain(rules), claims)
    return replace(answer, figure="Divergence by step")


def same_position(f: Findings) -> Answer:
    """Question 3: where siblings stand, and how near the model comes to the truth."""
    alone = "by following the most probable sibling alone"
    rules = {
        f"Better than {alone}": supported(CLOSER),
        f"No worse than {alone}": supported(NOT_WORSE),
        f"Worse than {alone}": refuted(NOT_WORSE),
    }
    # Siblings stand at one position, and the yardstick is exact where theory says so.
    given = supported(*STORED, EXACT)
    where = {
        True: "Siblings really stand at one position (from the cached keys, on "
        f"{f.count(STORED[0])}), and the next step reads them all.",
        False: "Siblings do NOT stand where they should: see the violated claims of exp4.",
        None: "Where siblings stand is not shown in this record: exp4 is missing or undecided.",
    }
    parts: dict[object, str] = {
        NOT_WORSE: "The truth is the exact mixture of the separate branches. In total variation "
        "to it, the next prediction after the whole set less that after its most probable member "
        f"alone is {f.said(NOT_WORSE)} (below 0.05: no worse).",
        SHARING: f"One after another the same siblings would be read {f.said(SHARING)} farther "
        f"from it ({f.verdict(SHARING)}).",
        READER_DISTANCE: "A reader as far off as behind such a row costs "
        f"{f.said(READER_DISTANCE)} by itself ({f.verdict(READER_DISTANCE)}).",
        NEAR: "Against the same token one position back a sibling gets a log ratio of "
        f"{f.said(NEAR)} in attention.",
    }
    measured = [text for claim, text in parts.items() if f.of(claim)]
    stored = every(*map(f.truth, STORED))
    said = (where[stored], *measured, *unmeasured(f, (NOT_WORSE, SHARING)))
    claims = (*STORED, EXACT, NOT_WORSE, CLOSER, SHARING, READER_DISTANCE, NEAR)
    question = "How does the model handle several tokens at one position?"
    answer = _answer(question, decide(f, rules, given), said, explain(rules, given), claims)
    return replace(answer, figure="How near each way of reading a set comes to the truth")


def looked_identical(f: Findings) -> Answer:
    """Question 4: whether they are identical, and which artefacts suffice to make them look so."""
    differ = supported(SAME_BEFORE) & refuted(IDENTICAL)
    engine_agrees = refuted(ENGINE_DIFFERS) | not_measured(ENGINE_DIFFERS)
    rules = {
        "They are identical": supported(SAME_BEFORE, IDENTICAL) & engine_agrees,
        "Artefacts of the earlier pipeline, not the model": differ
        & supported(ENGINE_DIFFERS)
        & any_supported(*ARTEFACTS),
        "Not the model": differ & not_refuted(ENGINE_DIFFERS),
    }
    parts = []
    if f.truth(SAME_BEFORE) is False:
        parts.append(
            f"The modes differ even before a wide set ({f.count(SAME_BEFORE)} are identical), so "
            "the harness is at fault."
        )
    elif f.of(SAME_BEFORE) or f.of(IDENTICAL):
        parts.append(
            "Until the first wide set has been read they are identical to the last bit, by "
            f"construction, on {f.count(SAME_BEFORE)}; after it on {f.count(IDENTICAL)}."
        )
    enough = [f"{words} ({f.count(claim)})" for claim, words in ARTEFACTS.items() if f.truth(claim)]
    if enough:
        parts.append(f"Each of these alone makes them look identical: {'; '.join(enough)}.")
    if f.of(ENGINE_DIFFERS):
        verdict = f.verdict(ENGINE_DIFFERS)
        parts.append(
            f"Without any of them the modes differ on {f.count(ENGINE_DIFFERS)} ({verdict})."
        )
    if f.truth(ZERO_TOO):
        said = '"No attention between siblings" comes out in visible mode as well'
        parts.append(f"{said} ({f.count(ZERO_TOO)}).")
    needed = (SAME_BEFORE, IDENTICAL, ENGINE_DIFFERS, *ARTEFACTS)
    question = "Why did both isolation modes give identical results?"
    said = (*parts, *unmeasured(f, needed))
    answer = _answer(question, decide(f, rules), said, explain(rules), (*needed, ZERO_TOO))
    return replace(answer, figure="What each artefact does")


def recommended_mode(f: Findings) -> Answer:
    """Visibility and weighting to use, and what that means for whoever uses the modes."""
    same, subtle = list(SCENARIOS.values())[:2]
    a_or_b = (same | subtle).called("scenario A or B")
    modes = {
        "visibility": {
            "isolated": refuted(VISIBLE_NOT_WORSE),
            "either visibility": supported(VISIBLE_NOT_WORSE) | a_or_b,
        },
        "weighting": {
            "weighting by posterior": supported(*POSTERIOR_HELPS),
            "weighting by probability": supported(HELPS),
            "no weighting": refuted(HELPS),
        },
    }
    decided = {what: decide(f, rules) for what, rules in modes.items()}
    parts = [f"{what} {mode}" if mode == UNDETERMINED else mode for what, mode in decided.items()]
    short = UNDETERMINED if set(decided.values()) == {UNDETERMINED} else ", ".join(parts)
    numbers: dict[object, str] = {
        VISIBLE_NOT_WORSE: "Total variation to the truth, visible less isolated",
        HELPS: "Weighted by probability less unweighted",
        POSTERIOR_HELPS[0]: "Forced sets, weighted by posterior less 0.35 of unweighted",
        POSTERIOR_HELPS[1]: "Free runs, the same",
    }
    advice = SCENARIO_ADVICE.get(scenario(f).short[0], NAME_THE_MODE)
    said = [advice, TEXT_ADVICE[_decided(f, TEXT, TEXT.weighted)[0]]]
    said += [f"{what}: {f.said(claim)}." for claim, what in numbers.items() if f.of(claim)]
    said += unmeasured(f, numbers)
    rule = " ".join(f"{what.capitalize()}. {explain(rules)}" for what, rules in modes.items())
    question = "Which mode should one use?"
    answer = _answer(question, short.capitalize(), said, rule, tuple(numbers), "advice")
    return replace(answer, sentence=" ".join(said[:2]))


def _answer(
    question: str,
    short: str,
    sentences: Sequence[str],
    rule: str,
    claims: Sequence[object],
    place: Place = "question",
) -> Answer:
    """The answer of these sentences, resting on each claim once."""
    text = " ".join(filter(None, sentences))
    return Answer(question, short, text, rule, tuple(dict.fromkeys(map(str, claims))), place)


def _percent(f: Findings, claim: object) -> str:
    return f.said(claim, percent=True)


def _any(f: Findings, claims: Sequence[object], text: str) -> list[str]:
    """The text if any of the claims was measured, else which experiments are missing."""
    return [text] if any(map(f.of, claims)) else unmeasured(f, claims)
