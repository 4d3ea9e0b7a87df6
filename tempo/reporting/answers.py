"""The answers a report gives, computed from findings by rules registered here; "undetermined" is one of them.

A claim is true (SUPPORTED), false (REFUTED) or unknown (missing, INCONCLUSIVE, decided otherwise by another config, or with a
control that misbehaves). A scenario holds if all its conditions do; it is unknown if none is false and one is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tempo.claims import Finding
from tempo.text import number

Truth = bool | None
UNDETERMINED = "Undetermined"
NBSP = "\u00a0"
TITLE = "Does a language model handle several tokens at the same position just fine?"


@dataclass(frozen=True)
class Answer:
    """An answer in a word, what the data say in a sentence with numbers, by which rule, from which claims."""

    question: str
    short: str
    text: str
    rule: str
    claims: tuple[str, ...] = ()


class Findings:
    """The findings of one model, asked by claim."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.all = list(findings)

    def of(self, claim: str) -> list[Finding]:
        return [finding for finding in self.all if finding.claim == claim]

    def truth(self, claim: str) -> Truth:
        """True if SUPPORTED, False if REFUTED, on every config that decided it and with a control that behaves; else None."""
        found = self.of(claim)
        if not found or not all(f.control_holds for f in found):
            return None
        verdicts = {f.verdict for f in found}
        return True if verdicts == {"SUPPORTED"} else False if verdicts == {"REFUTED"} else None

    def zero(self, claim: str) -> Truth:
        """Whether the statistic was exactly 0 on every prompt, which leaves a test nothing to judge by; None if not measured."""
        found = [f for f in self.of(claim) if f.n]
        if not found:
            return None
        return (
            True
            if all(f.estimate == f.low == f.high == 0 for f in found)
            else (None if self.truth(claim) is None else False)
        )

    def said(self, claim: str, percent: bool = False) -> str:
        """The estimate with its interval, of each config if there are several: `0.147 [0.136, 0.159]`; `not measured`."""
        found = [f for f in self.of(claim) if f.n]

        def one(f: Finding) -> str:
            low, mid, high = (
                number(100 * x if percent else x) for x in (f.low, f.estimate, f.high)
            )
            where = (
                f" ({f.context['variant']})" if len(found) > 1 and f.context.get("variant") else ""
            )
            return f"{mid}{NBSP + '%' if percent else ''} [{low}, {high}]{where}"

        return ", ".join(map(one, found)) or "not measured"

    def count(self, claim: str) -> str:
        """For how many prompts it was true: `160 of 162 prompts`."""
        found = [f for f in self.of(claim) if f.n]
        return (
            ", ".join(f"{round(f.estimate * f.n)} of {f.n} {f.unit}s" for f in found)
            or "none measured"
        )


def every(*truths: Truth) -> Truth:
    """Whether all are true: False if one is false, else None if one is unknown."""
    return False if False in truths else None if None in truths else True


def negated(truth: Truth) -> Truth:
    return None if truth is None else not truth


IDENTICAL, EQUIVALENT = "exp2.identical-logits", "exp2.equivalent-at-reader"
TOP_10, SELECTION = "exp2.same-top-10", "exp2.same-selection"
ATTENDS, MORE_THAN_UNIFORM, ISOLATED_ZERO = (
    "exp3.score-above-zero",
    "exp3.more-than-uniform",
    "exp3.isolated-is-zero",
)
SCENARIO_CLAIMS = (IDENTICAL, EQUIVALENT, TOP_10, SELECTION, ATTENDS, MORE_THAN_UNIFORM)

# (letter, name, rule in words, rule): registered before the data, and shown beside the answer.
SCENARIOS: tuple[tuple[str, str, str, Callable[[Findings], Truth]], ...] = (
    (
        "A", "prior context dominates", f"{IDENTICAL} supported, and {ATTENDS} exactly zero",
        lambda f: every(f.truth(IDENTICAL), f.zero(ATTENDS)),
    ),
    (
        "B", "subtle cross-attention", f"{ATTENDS} and {EQUIVALENT} supported, {MORE_THAN_UNIFORM} refuted",
        lambda f: every(f.truth(ATTENDS), f.truth(EQUIVALENT), negated(f.truth(MORE_THAN_UNIFORM))),
    ),
    (
        "C", "significant interaction, same top-k", f"{ATTENDS}, {TOP_10} and {SELECTION} supported, {EQUIVALENT} refuted",
        lambda f: every(f.truth(ATTENDS), negated(f.truth(EQUIVALENT)), f.truth(TOP_10), f.truth(SELECTION)),
    ),
    (
        "D", "fundamental difference", f"{ATTENDS} supported, {EQUIVALENT}, {TOP_10} and {SELECTION} refuted",
        lambda f: every(f.truth(ATTENDS), *(negated(f.truth(claim)) for claim in (EQUIVALENT, TOP_10, SELECTION))),
    ),
)  # fmt: skip


def scenario(findings: Sequence[Finding]) -> Answer:
    """Which of the four scenarios A to D the findings of exp2 and exp3 make, by the rules in SCENARIOS."""
    f = Findings(findings)
    held = {letter: rule(f) for letter, _, _, rule in SCENARIOS}
    question = "Which scenario is it?"
    for letter, name, words, _ in SCENARIOS:
        if held[letter]:
            claims = tuple(claim for claim in SCENARIO_CLAIMS if claim in words)
            return Answer(question, f"{letter}: {name}", _numbers(f), f"{letter}: {words}", claims)
    rules = "; ".join(f"{letter}: {words}" for letter, _, words, _ in SCENARIOS)
    if open_ones := [letter for letter in held if held[letter] is None]:
        unknown = [claim for claim in SCENARIO_CLAIMS if f.truth(claim) is None]
        text = f"{_alternatives(open_ones)} cannot be told yet: no verdict on {', '.join(unknown)}."
    else:
        text = f"The verdicts fit none of the four. {_numbers(f)}"
    return Answer(question, UNDETERMINED, text, rules, SCENARIO_CLAIMS)


def _alternatives(letters: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(letters[:-1]), letters[-1])))


def _numbers(f: Findings) -> str:
    return (
        f"After a wide set the modes' distributions differ by a total variation of {f.said(EQUIVALENT)} (0.02 would be equivalent), "
        f"their top ten by {f.said(TOP_10, percent=True)}, the set they choose at {f.said(SELECTION, percent=True)} of steps; "
        f"a visible sibling gets {f.said(ATTENDS, percent=True)} of another's attention."
    )


def attend(findings: Sequence[Finding]) -> Answer:
    """Question 1."""
    f = Findings(findings)
    attends, zero, works = f.truth(ATTENDS), f.zero(ATTENDS), f.truth("exp3.does-something")
    short = (
        "No"
        if zero or attends is False
        else "Yes"
        if every(attends, f.truth(ISOLATED_ZERO))
        else UNDETERMINED
    )
    uniform = {True: "more than", False: "no more than", None: "undecided whether more than"}[
        f.truth(MORE_THAN_UNIFORM)
    ]
    does = {
        True: "it does change",
        False: "it hardly changes",
        None: "undecided whether it changes",
    }[works]
    text = (
        f"A visible sibling gives each other one {f.said(ATTENDS, percent=True)} of its attention, an isolated one exactly 0 on "
        f"{f.count(ISOLATED_ZERO)}. That is {uniform} an equal spread (log ratio {f.said(MORE_THAN_UNIFORM)}), and {does} what siblings "
        f"predict: KL {f.said('exp3.does-something')} nats."
    )
    claims = (ATTENDS, ISOLATED_ZERO, MORE_THAN_UNIFORM, "exp3.does-something")
    rule = f"Yes: {ATTENDS} and {ISOLATED_ZERO} supported. No: {ATTENDS} refuted or exactly zero. Else undetermined."
    return Answer(
        "Do parallel tokens attend to each other in visible mode?",
        short,
        _if_measured(f, claims, text),
        rule,
        claims,
    )


def identical(findings: Sequence[Finding]) -> Answer:
    """Question 2."""
    f = Findings(findings)
    equivalent, top, chosen = f.truth(EQUIVALENT), f.truth(TOP_10), f.truth(SELECTION)
    answers = {
        "Identical": f.truth(IDENTICAL),
        "Not identical, but equivalent": every(negated(f.truth(IDENTICAL)), equivalent),
        "Only the top-k": every(negated(equivalent), top, chosen),
        "Neither": every(negated(equivalent), negated(every(top, chosen))),
    }
    short = next((name for name, holds in answers.items() if holds), UNDETERMINED)
    text = (
        f"After a wide set the distributions agree on {f.count(IDENTICAL)}; total variation {f.said(EQUIVALENT)}. "
        f"The top ten differ by {f.said(TOP_10, percent=True)}, the selected set at {f.said(SELECTION, percent=True)} of steps."
    )
    rule = (
        f"Identical: {IDENTICAL} supported; equivalent: {EQUIVALENT} supported; only the top-k: {EQUIVALENT} refuted, {TOP_10} and "
        f"{SELECTION} supported; neither: {EQUIVALENT} and one of these two refuted. Else undetermined."
    )
    claims = (IDENTICAL, EQUIVALENT, TOP_10, SELECTION)
    return Answer(
        "Are the distributions identical, or just the top-k?",
        short,
        _if_measured(f, claims, text),
        rule,
        claims,
    )


STORED = (
    "exp4.siblings-share-a-position",
    "exp4.positions-are-p-plus-k",
    "exp4.next-query-reaches-every-slot",
)
NEAR = "exp3.more-than-at-distance-one"
EXACT, NOT_WORSE, CLOSER = (
    "exp7.exact-where-theory-says",
    "exp7.not-worse-than-top-branch",
    "exp7.closer-than-top-branch",
)
SHARING, READER_DISTANCE = "exp8.sharing-helps", "exp8.reader-distance"


def same_position(findings: Sequence[Finding]) -> Answer:
    """Question 3: where siblings stand, from exp4, and how near the model comes to the truth, from exp7 and exp8."""
    f = Findings(findings)
    claims = (*STORED, EXACT, NOT_WORSE, CLOSER, SHARING, READER_DISTANCE, NEAR)
    stored = every(*map(f.truth, STORED))
    sound = every(stored, f.truth(EXACT))
    answers = {
        "Better than by following the most probable sibling alone": every(sound, f.truth(CLOSER)),
        "No worse than by following the most probable sibling alone": every(
            sound, f.truth(NOT_WORSE)
        ),
        "Worse than by following the most probable sibling alone": every(
            sound, negated(f.truth(NOT_WORSE))
        ),
    }
    short = next((name for name, holds in answers.items() if holds), UNDETERMINED)
    where = {
        True: f"Siblings really stand at one position (from the cached keys, on {f.count(STORED[0])}), and the next step reads them all.",
        False: "Siblings do NOT stand where they should: see the violated claims of exp4.",
        None: "Where siblings stand is not shown in this record: exp4 is missing or undecided.",
    }[stored]
    parts = [where]
    if f.of(NOT_WORSE):
        parts.append(
            "The truth is the exact mixture of the separate branches. In total variation to it, the next prediction after the whole set "
            f"less that after its most probable member alone is {f.said(NOT_WORSE)} (below 0.05: no worse)."
        )
    if f.of(SHARING):
        parts.append(
            f"One after another the same siblings would be read {f.said(SHARING)} farther from it{_verdict(f, SHARING)}."
        )
    if f.of(READER_DISTANCE):
        parts.append(
            f"A reader as far off as behind such a row costs {f.said(READER_DISTANCE)} by itself{_verdict(f, READER_DISTANCE)}."
        )
    if f.of(NEAR):
        parts.append(
            f"Against the same token one position back a sibling gets a log ratio of {f.said(NEAR)} in attention."
        )
    rule = (
        f"Only if siblings stand at one position ({', '.join(STORED)}) and the yardstick is exact where theory says so ({EXACT}): "
        f"better, if {CLOSER} is supported; else no worse, if {NOT_WORSE} is; worse, if that is refuted. Else undetermined."
    )
    text = " ".join([*parts, *unmeasured(f, (NOT_WORSE, SHARING))])
    return Answer(
        "How does the model handle several tokens at one position?", short, text, rule, claims
    )


BEFORE, ENGINE_DIFFERS, ZERO_TOO = (
    "exp2.same-before-first-wide-set",
    "exp6.correct-engine-differs",
    "exp6.zero-in-visible-mode-too",
)
ARTEFACTS = {  # each makes the modes look identical all by itself, if its claim is supported
    "exp6.last-only-cache-is-identical": "only the last sibling enters the cache",
    "exp6.dropped-mask-is-identical": "the mask never reaches the model",
    "exp6.before-the-siblings-is-identical": "what is compared was computed before the siblings exist",
}


def looked_identical(findings: Sequence[Finding]) -> Answer:
    """Question 4: whether they are identical, from exp2, and which artefacts of the earlier pipeline suffice to say so, from exp6."""
    f = Findings(findings)
    claims = (BEFORE, IDENTICAL, ENGINE_DIFFERS, *ARTEFACTS, ZERO_TOO)
    same, after, engine = f.truth(BEFORE), f.truth(IDENTICAL), f.truth(ENGINE_DIFFERS)
    enough = [claim for claim in ARTEFACTS if f.truth(claim)]
    differ = every(same, negated(after))
    answers = {
        "They are identical": every(same, after, negated(engine) if f.of(ENGINE_DIFFERS) else True),
        "Artefacts of the earlier pipeline, not the model": every(differ, engine, bool(enough)),
        "Not the model": None if engine is False else differ,
    }
    short = next((name for name, holds in answers.items() if holds), UNDETERMINED)
    parts = []
    if same is False:
        parts.append(
            f"The modes differ even before a wide set ({f.count(BEFORE)} are identical), so the harness is at fault."
        )
    elif f.of(BEFORE) or f.of(IDENTICAL):
        until = "Until the first wide set has been read they are identical to the last bit, by construction,"
        parts.append(f"{until} on {f.count(BEFORE)}; after it on {f.count(IDENTICAL)}.")
    if enough:
        named = "; ".join(f"{ARTEFACTS[claim]} ({f.count(claim)})" for claim in enough)
        parts.append(f"Each of these alone makes them look identical: {named}.")
    if f.of(ENGINE_DIFFERS):
        parts.append(
            f"Without any of them the modes differ on {f.count(ENGINE_DIFFERS)}{_verdict(f, ENGINE_DIFFERS)}."
        )
    if f.truth(ZERO_TOO):
        parts.append(
            f'"No attention between siblings" comes out in visible mode as well ({f.count(ZERO_TOO)}).'
        )
    rule = (
        f"Artefacts: {BEFORE} supported, {IDENTICAL} refuted, {ENGINE_DIFFERS} supported, and one of {', '.join(ARTEFACTS)} supported. Not "
        f"the model (but which artefact is open): the first two alone. They are identical: {IDENTICAL} supported. Else undetermined."
    )
    text = " ".join([*parts, *unmeasured(f, (BEFORE, IDENTICAL, ENGINE_DIFFERS, *ARTEFACTS))])
    return Answer("Why did both isolation modes give identical results?", short, text, rule, claims)


def questions(findings: Sequence[Finding]) -> tuple[Answer, ...]:
    """The four key questions, answered."""
    return tuple(
        answer(findings) for answer in (attend, identical, same_position, looked_identical)
    )


def evidence(answer: Answer, findings: Sequence[Finding]) -> list[tuple[str, Finding | None]]:
    """Each claim that the answer rests on with its finding, of each config; None if it was not measured."""
    f = Findings(findings)
    return [(claim, found) for claim in answer.claims for found in (f.of(claim) or [None])]


def unmeasured(f: Findings, claims: Sequence[str]) -> list[str]:
    """A sentence naming the experiments that the record lacks; none if it lacks none."""
    absent = dict.fromkeys(claim.split(".")[0] for claim in claims if not f.of(claim))
    return [f"Not measured in this record: {', '.join(absent)}."] if absent else []


def _verdict(f: Findings, claim: str) -> str:
    return f" ({ {True: 'supported', False: 'refuted', None: 'undecided'}[f.truth(claim)] })"


def _if_measured(f: Findings, claims: Sequence[str], text: str) -> str:
    return text if any(f.of(claim) for claim in claims) else " ".join(unmeasured(f, claims))
