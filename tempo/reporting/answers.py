"""The answers a report gives, computed from findings by rules registered here; "undetermined" is one of them.

A claim is true (SUPPORTED), false (REFUTED) or unknown (missing, INCONCLUSIVE, decided otherwise by another config, or with a
control that misbehaves). A scenario holds if all its conditions do; it is unknown if none is false and one is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tempo.claims import Finding
from tempo.reporting.text import number

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
        return True if all(f.estimate == f.low == f.high == 0 for f in found) else (None if self.truth(claim) is None else False)

    def said(self, claim: str, percent: bool = False) -> str:
        """The estimate with its interval, of each config if there are several: `0.147 [0.136, 0.159]`; `not measured`."""
        found = [f for f in self.of(claim) if f.n]

        def one(f: Finding) -> str:
            low, mid, high = (number(100 * x if percent else x) for x in (f.low, f.estimate, f.high))
            where = f" ({f.context['variant']})" if len(found) > 1 and f.context.get("variant") else ""
            return f"{mid}{NBSP + '%' if percent else ''} [{low}, {high}]{where}"

        return ", ".join(map(one, found)) or "not measured"

    def count(self, claim: str) -> str:
        """For how many prompts it was true: `160 of 162 prompts`."""
        found = [f for f in self.of(claim) if f.n]
        return ", ".join(f"{round(f.estimate * f.n)} of {f.n} {f.unit}s" for f in found) or "not measured"

    def has(self, experiment: str) -> bool:
        return any(f.context.get("experiment") == experiment or f.claim.startswith(f"{experiment}.") for f in self.all)


def every(*truths: Truth) -> Truth:
    """Whether all are true: False if one is false, else None if one is unknown."""
    return False if False in truths else None if None in truths else True


def negated(truth: Truth) -> Truth:
    return None if truth is None else not truth


IDENTICAL, EQUIVALENT = "exp2.identical-logits", "exp2.equivalent-at-reader"
TOP_10, SELECTION = "exp2.same-top-10", "exp2.same-selection"
ATTENDS, MORE_THAN_UNIFORM, ISOLATED_ZERO = "exp3.score-above-zero", "exp3.more-than-uniform", "exp3.isolated-is-zero"
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
    short = "No" if zero or attends is False else "Yes" if every(attends, f.truth(ISOLATED_ZERO)) else UNDETERMINED
    uniform = {True: "more than", False: "no more than", None: "undecided whether more than"}[f.truth(MORE_THAN_UNIFORM)]
    does = {True: "it does change", False: "it hardly changes", None: "undecided whether it changes"}[works]
    text = (
        f"A visible sibling gives each other one {f.said(ATTENDS, percent=True)} of its attention, an isolated one exactly 0 on "
        f"{f.count(ISOLATED_ZERO)}. That is {uniform} an equal spread (log ratio {f.said(MORE_THAN_UNIFORM)}), and {does} what siblings "
        f"predict: KL {f.said('exp3.does-something')} nats."
    )
    claims = (ATTENDS, ISOLATED_ZERO, MORE_THAN_UNIFORM, "exp3.does-something")
    rule = f"Yes: {ATTENDS} and {ISOLATED_ZERO} supported. No: {ATTENDS} refuted or exactly zero. Else undetermined."
    return Answer("Do parallel tokens attend to each other in visible mode?", short, _if_measured(f, claims, text), rule, claims)


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
    return Answer("Are the distributions identical, or just the top-k?", short, _if_measured(f, claims, text), rule, claims)


def same_position(findings: Sequence[Finding]) -> Answer:
    """Question 3: where siblings stand is known from exp4; how well a model copes would take exp7 and exp8."""
    f = Findings(findings)
    claims = ("exp4.siblings-share-a-position", "exp4.positions-are-p-plus-k", "exp4.next-query-reaches-every-slot")
    near = "exp3.more-than-at-distance-one"
    stored = every(*(f.truth(claim) for claim in claims))
    known = {
        True: f"They really stand at one position (recovered from the cached keys on {f.count(claims[0])}), and the next step reads all.",
        False: "They do NOT stand where they should: see the violated claims of exp4.",
        None: "Where they stand was not shown: exp4 is missing or undecided.",
    }[stored]
    more = f" Against the same token one position back a sibling gets a log ratio of {f.said(near)} in attention." if f.of(near) else ""
    rule = f"Where they stand: {', '.join(claims)}. How well it is handled: exp7 and exp8; no rule reads them yet."
    question = "How does the model handle several tokens at one position?"
    return Answer(question, UNDETERMINED, f"{known}{more} How well it copes: {_missing(f, 'exp7', 'exp8')}.", rule, (*claims, near))


def looked_identical(findings: Sequence[Finding]) -> Answer:
    """Question 4: what exp2's bitwise identity says, and that the rest would take exp6."""
    f = Findings(findings)
    before = "exp2.same-before-first-wide-set"
    same, after = f.truth(before), f.truth(IDENTICAL)
    short, text = UNDETERMINED, f"No verdict on {before} or {IDENTICAL}."
    if same and after is False:
        short = "Not the model"
        text = (
            f"Until the first wide set has been read they are identical to the last bit ({f.count(before)}), by construction; after it on "
            f"{f.count(IDENTICAL)}. So identical results come from what was measured, not from the model."
        )
    elif same and after:
        short, text = "They are identical", f"To the last bit before a wide set ({f.count(before)}), and after one on {f.count(IDENTICAL)}."
    elif same is False:
        text = f"The modes differ even before a wide set: {before} holds on {f.count(before)} only, so the harness is at fault."
    rule = f"Not the model: {before} supported and {IDENTICAL} refuted. Which artefact it was would take exp6."
    text += f" Which artefact of the earlier pipeline did it: {_missing(f, 'exp6')}."
    return Answer("Why did both isolation modes give identical results?", short, text, rule, (before, IDENTICAL))


def recommended_mode(findings: Sequence[Finding]) -> Answer:
    """The default to use: exp7, exp11 and exp13 would decide it; else undetermined, with what the present evidence says."""
    f = Findings(findings)
    found = scenario(findings).short[:1]
    says = {
        "A": "The modes give the same results, so either will do.",
        "B": "The modes are equivalent within what bfloat16 changes, so either will do.",
        "C": "The modes choose the same tokens with different probabilities: name the mode wherever probabilities matter.",
        "D": "The modes are not interchangeable: choose one, name it with every result, and never mix runs of both.",
    }.get(found, "Present evidence does not tell the modes apart or together: name the mode with every result.")
    rule = "Needs whether parallel tokens are handled well (exp7), repaired by weighting (exp11) and useful in text (exp13)."
    if absent := [name for name in ("exp7", "exp11", "exp13") if not f.has(name)]:
        says += f" Which is better is undetermined without {', '.join(absent)}, not built yet."
    return Answer("Which mode should one use?", UNDETERMINED, says, rule)


def just_fine(findings: Sequence[Finding]) -> Answer:
    """The question of the title: exp7 would answer it, with exp11 and exp13; until then undetermined."""
    f = Findings(findings)
    rule = "Needs the distance to the exact branch mixture (exp7), what weighting repairs (exp11) and text that is read (exp13)."
    text = f"Whether the model copes just fine is {_missing(f, 'exp7', 'exp11', 'exp13')}."
    return Answer(TITLE, UNDETERMINED, text, rule)


def questions(findings: Sequence[Finding]) -> tuple[Answer, ...]:
    """The four key questions, answered."""
    return tuple(answer(findings) for answer in (attend, identical, same_position, looked_identical))


def _missing(f: Findings, *experiments: str) -> str:
    """Why it is undetermined, never a guess."""
    absent = [name for name in experiments if not f.has(name)]
    if not absent:
        return f"undetermined: no rule reads {', '.join(experiments)} yet"
    built = "experiment not built" if len(absent) == 1 else "experiments not built"
    return f"undetermined: {built} ({', '.join(absent)})"


def _if_measured(f: Findings, claims: Sequence[str], text: str) -> str:
    return text if any(f.of(claim) for claim in claims) else f"Not measured in this record: {', '.join(claims)}."
