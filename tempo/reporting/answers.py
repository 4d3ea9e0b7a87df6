"""What a study concludes: answers, each with its numbers, its rule and the claims behind it.

A claim is true (SUPPORTED), false (REFUTED) or unknown: not measured, INCONCLUSIVE, decided
otherwise by another config, or with a control that misbehaves. An unknown claim is never taken for
a true one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from tempo.claims import Finding
from tempo.records import validated
from tempo.reporting.findings import counts, interval
from tempo.text import number

Truth = bool | None
Place = Literal["headline", "question", "advice"]
UNDETERMINED = "Undetermined"
NBSP = "\u00a0"
# A study without conclusions of its own shows the statements of so many claims in place of an
# answer.
FEW = 4


@dataclass(frozen=True)
class Answer:
    """An answer in a word, what the data say in a sentence, by which rule, and from which claims.

    place: `headline` answers stand at the top of a report and at the end of a pytest session;
    `advice` says what to do; a `question` is answered in a section of its own.
    sentence: the answer in one plain sentence with units, for the first screen; by default `text`.
    figure: the title of a picture on record that shows it.
    options: the answers that were possible, each with what it means.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    question: str
    short: str
    text: str
    rule: str
    claims: tuple[str, ...] = ()
    place: Place = "question"
    sentence: str = ""
    figure: str = ""
    options: tuple[tuple[str, str], ...] = ()

    @property
    def plain(self) -> str:
        """What the first screen and a terminal say of it."""
        return self.sentence or self.text


@dataclass(frozen=True)
class HeroRow:
    """A row of the figure beside the verdict; left out if the record holds none of its numbers.

    label: what the row is called. claim: whose estimate and prompts it shows; with `is_control`
    those of its control. row: else the name of a row of the recorded picture of the hero.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    label: str
    claim: str = ""
    is_control: bool = False
    row: str = ""


@dataclass(frozen=True)
class Hero:
    """The one figure beside the verdict: quantities of one unit, a row each, on one scale.

    unit: what the axis shows, with its unit. picture: the title of the recorded picture whose table
    holds the rows that no claim is about. perfect: what stands at zero, such as a perfect reader.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    title: str
    unit: str
    rows: tuple[HeroRow, ...]
    picture: str = ""
    perfect: str = ""
    caption: str = ""


@dataclass(frozen=True)
class Conclusions:
    """What a report says before its claims: the question of its title, and its answers in order.

    title: the heading of the report. asked: what was asked, in a sentence or two. hero: the figure
    beside the verdict; by default the claims behind it.

    >>> answer = Answer("Is it so?", "Yes", "On 9 of 9 prompts.", "yes, if a is supported", ("a",))
    >>> conclusions = Conclusions("Is it so?", "Whether it is so.", (answer,))
    >>> Conclusions.from_record(conclusions.record()) == conclusions
    True
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    title: str
    asked: str
    answers: tuple[Answer, ...]
    hero: Hero | None = None

    @property
    def headlines(self) -> tuple[Answer, ...]:
        return tuple(answer for answer in self.answers if answer.place == "headline")

    @property
    def advice(self) -> tuple[Answer, ...]:
        return tuple(answer for answer in self.answers if answer.place == "advice")

    @property
    def explained(self) -> tuple[Answer, ...]:
        """All answers, for a section of their own; none if no rule gives any of them."""
        return self.answers if any(answer.rule for answer in self.answers) else ()

    @property
    def in_short(self) -> str:
        """The headline answers in a word each: `Just fine; B: subtle`."""
        return "; ".join(dict.fromkeys(answer.short for answer in self.headlines))

    def record(self) -> dict[str, Any]:
        """The conclusions as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: object, where: str = "the record of conclusions") -> Conclusions:
        """The conclusions that `record` gave. Raises TraceError if it is anything else."""
        return validated(cls, record, where)


class Findings:
    """The findings of one model, asked by claim: its id, or anything whose `str()` is the id."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.all = list(findings)

    def of(self, claim: object) -> list[Finding]:
        """The findings about the claim, one for each config."""
        return [finding for finding in self.all if finding.claim == str(claim)]

    def truth(self, claim: object) -> Truth:
        """True if SUPPORTED, False if REFUTED: on every config, with a control that behaves."""
        found = self.of(claim)
        if not found or not all(f.control_holds for f in found):
            return None
        verdicts = {f.verdict for f in found}
        return True if verdicts == {"SUPPORTED"} else False if verdicts == {"REFUTED"} else None

    def zero(self, claim: object) -> Truth:
        """Whether the statistic was exactly 0 on every prompt, so that no test can judge it.

        None if it was not measured.
        """
        found = [f for f in self.of(claim) if f.n]
        if not found:
            return None
        if all(f.estimate == f.low == f.high == 0 for f in found):
            return True
        return None if self.truth(claim) is None else False

    def said(self, claim: object, percent: bool = False, named: bool = True) -> str:
        """The estimate with its interval, of each config: `0.147 [0.136, 0.159]`.

        named: whether several configs are named; else their order tells them apart.
        """
        found = [f for f in self.of(claim) if f.n]
        scale, unit = (100, f"{NBSP}%") if percent else (1, "")
        said = []
        for f in found:
            low, middle, high = (number(scale * x) for x in (f.low, f.estimate, f.high))
            variant = f.context.get("variant") if named and len(found) > 1 else None
            ends = f"[{low}, {high}]" if math.isfinite(f.high - f.low) else "[too few]"
            said.append(f"{middle}{unit} {ends}" + (f" ({variant})" if variant else ""))
        return (", " if named else " and ").join(said) or "not measured"

    def count(self, claim: object) -> str:
        """For how many prompts it was true: `160 of 162 prompts`."""
        found = [f for f in self.of(claim) if f.n]
        said = [f"{round(f.estimate * f.n)} of {f.n} {f.unit}s" for f in found]
        return ", ".join(said) or "none measured"

    def verdict(self, claim: object) -> str:
        """`supported`, `refuted` or `undecided`."""
        return {True: "supported", False: "refuted", None: "undecided"}[self.truth(claim)]


def every(*truths: Truth) -> Truth:
    """Whether all are true: False if one is false, else None if one is unknown.

    >>> every(True, None), every(False, None), every()
    (None, False, True)
    """
    return False if False in truths else None if None in truths else True


def negated(truth: Truth) -> Truth:
    """The opposite; of an unknown truth None."""
    return None if truth is None else not truth


def first_true(answers: Mapping[str, Truth]) -> str:
    """The first answer that is true, else `Undetermined`.

    >>> first_true({"Yes": None, "No": False})
    'Undetermined'
    """
    return next((answer for answer, holds in answers.items() if holds), UNDETERMINED)


def unmeasured(f: Findings, claims: Iterable[object]) -> list[str]:
    """A sentence naming the studies that the findings lack; none if they lack none."""
    absent = dict.fromkeys(str(claim).split(".")[0] for claim in claims if not f.of(claim))
    return [f"Not measured in this record: {', '.join(absent)}."] if absent else []


def evidence(answer: Answer, findings: Sequence[Finding]) -> list[tuple[str, Finding | None]]:
    """Each claim behind the answer with its finding, of each config; None if not measured."""
    f = Findings(findings)
    return [(claim, found) for claim in answer.claims for found in (f.of(claim) or [None])]


def verdicts_alone(findings: Sequence[Finding]) -> Conclusions:
    """The conclusions of a study that draws none: how many claims have which verdict.

    A few claims are named with their estimates; the table of claims shows many better.
    """
    title = "Findings"
    said = [f"{f.statement.rstrip('.')}: {f.verdict.lower()}, {interval(f)}." for f in findings]
    answer = Answer(
        question=title,
        short=counts(findings) or "no findings",
        text=" ".join(said) if len(said) <= FEW else "",
        rule="",
        claims=tuple(dict.fromkeys(f.claim for f in findings)),
        place="headline",
    )
    return Conclusions(title, asked="", answers=(answer,))


def brief(conclusions: Conclusions) -> list[tuple[str, str, str]]:
    """The headlines as (question, answer in a word, text). A question that is the title is empty.

    An answer with a plain sentence of its own says it. Of the others only the first that is decided
    has a text, or the first of all if none is. Their numbers stand by their rules, and so do all
    where there are many: a phone's first screen also holds how sure they are and what to do.
    """
    headlines = conclusions.headlines
    decided = [answer for answer in headlines if answer.short != UNDETERMINED]
    told = (decided or headlines)[:1] if len(headlines) < FEW else ()
    said = []
    for answer in headlines:
        question = "" if answer.question == conclusions.title else answer.question
        text = answer.plain if answer in told else answer.sentence
        said.append((question, answer.short, text))
    return said


def headline_lines(conclusions: Conclusions) -> list[str]:
    """The headline answers for the end of a pytest session, a line each.

    >>> headline_lines(verdicts_alone([]))
    ['Findings: no findings.']
    """
    lines = []
    for question, short, text in brief(conclusions):
        asked = question or conclusions.title
        lead = asked if asked.endswith("?") else f"{asked}:"
        lines.append(f"{lead} {short}. {text}".rstrip())
    return lines
