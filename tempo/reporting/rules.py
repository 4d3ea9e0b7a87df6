"""Rules from verdicts to answers. Each can be decided from findings, and says itself in words.

    rules = {"Yes": supported("a", "b"), "No": refuted("a") | zero("a")}
    decide(findings, rules)  # "Yes", "No" or "Undetermined"
    explain(rules)  # "Yes: a and b supported. Else No: a refuted or a exactly zero. Else ..."

A claim is its id, or anything whose `str()` is the id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from tempo.reporting.answers import UNDETERMINED, Findings, Truth, every, negated
from tempo.reporting.findings import violated


@dataclass(frozen=True)
class Rule:
    """A condition on findings; `&` and `|` combine two.

    words: the condition for a reader. truth: whether it holds, None if that is unknown.
    """

    words: str
    truth: Callable[[Findings], Truth]
    is_choice: bool = False  # made by `|`, so that it needs brackets within a longer rule

    def __and__(self, other: Rule) -> Rule:
        words = [f"({rule.words})" if rule.is_choice else rule.words for rule in (self, other)]
        return Rule(", ".join(words), lambda f: every(self.truth(f), other.truth(f)))

    def __or__(self, other: Rule) -> Rule:
        def truth(f: Findings) -> Truth:
            return negated(every(negated(self.truth(f)), negated(other.truth(f))))

        return Rule(f"{self.words} or {other.words}", truth, is_choice=True)

    def called(self, words: str) -> Rule:
        """The same rule in other words."""
        return replace(self, words=words, is_choice=False)


def supported(*claims: object) -> Rule:
    """All these claims are supported."""
    return Rule(f"{listed(claims)} supported", lambda f: every(*map(f.truth, claims)))


def refuted(*claims: object) -> Rule:
    """All these claims are refuted."""
    return Rule(
        f"{listed(claims)} refuted", lambda f: every(*(negated(f.truth(claim)) for claim in claims))
    )


def any_supported(*claims: object) -> Rule:
    """One of these claims is supported, or more."""
    return Rule(f"{listed(claims, 'or')} supported", lambda f: negated(refuted(*claims).truth(f)))


def any_refuted(*claims: object) -> Rule:
    """One of these claims is refuted, or more."""
    return Rule(f"{listed(claims, 'or')} refuted", lambda f: negated(supported(*claims).truth(f)))


def zero(claim: object) -> Rule:
    """The claim's statistic was exactly 0 on every prompt."""
    return Rule(f"{claim} exactly zero", lambda f: f.zero(claim))


def not_refuted(claim: object) -> Rule:
    """The claim is supported, or unknown."""
    return Rule(f"{claim} not refuted", lambda f: f.truth(claim) is not False)


def not_measured(claim: object) -> Rule:
    """The record holds nothing about the claim."""
    return Rule(f"{claim} not measured", lambda f: not f.of(claim))


def nothing_violated() -> Rule:
    """Every invariant that was measured held."""
    return Rule("no invariant violated", lambda f: not any(map(violated, f.all)))


def decide(f: Findings, rules: Mapping[str, Rule], given: Rule | None = None) -> str:
    """The first answer whose rule holds; `Undetermined` if none does, or unless `given` holds."""
    if given is None or given.truth(f):
        for answer, rule in rules.items():
            if rule.truth(f):
                return answer
    return UNDETERMINED


def explain(rules: Mapping[str, Rule], given: Rule | None = None) -> str:
    """The rules in words.

    >>> explain({"Yes": supported("a"), "No": any_refuted("a", "b")}, given=supported("c"))
    'Only if c supported. Yes: a supported. Else No: a or b refuted. Else undetermined.'
    """
    said = [f"{answer}: {rule.words}" for answer, rule in rules.items()]
    only = f"Only if {given.words}. " if given else ""
    return f"{only}{'. Else '.join(said)}. Else undetermined."


def listed(words: Iterable[object], last: str = "and") -> str:
    """The words as a list.

    >>> listed("abc"), listed("ab", "or")
    ('a, b and c', 'a or b')
    """
    *most, end = map(str, words)
    return f"{', '.join(most)} {last} {end}" if most else end
