"""The conclusion: whether a model handles several tokens at one position just fine, and which mode to use.

Both are computed from findings by the rules registered here. A criterion that was not measured, or not decided, is never taken
for met: absence of evidence is no evidence of absence.
"""

from __future__ import annotations

from collections.abc import Sequence

from tempo.claims import Finding
from tempo.reporting.answers import EXACT, NOT_WORSE, TITLE, UNDETERMINED, Answer, Findings, Truth, every, scenario, unmeasured
from tempo.reporting.findings import violated

JUST_FINE, REWEIGHTED, NOT_FINE = "Just fine", "Fine with reweighting", "Not fine"
# What "just fine" demands, in words for the reader. The first was measured with reweighting as well, the others were not, so
# that reweighting can mend only the first.
DEPTH, READS, FACT = "exp7.error-does-not-grow-with-depth", "exp13.reads-as-well-as-greedy", "exp13.fact-still-found"
CRITERIA = {
    NOT_WORSE: "as near to the truth as the most probable branch",
    DEPTH: "no growth of the error with depth",
    READS: "reads as well as greedy",
    FACT: "facts still found",
}
NOT_WORSE_REWEIGHTED, HELPS = "exp11.reweighted-not-worse-than-top-branch", "exp11.probability-weighting-helps"
MENDING = {
    NOT_WORSE_REWEIGHTED: "as near if reweighted",
    HELPS: "nearer by reweighting",
}
VISIBLE_NOT_WORSE = "exp7.visible-not-worse-than-isolated"
FINE_RULE = (
    f"Only if no invariant is violated and {EXACT} is supported. Just fine: {', '.join(CRITERIA)} all supported. Fine with "
    f"reweighting: not that, but {', '.join(MENDING)} supported, and all of the former but {NOT_WORSE}, the only one that was "
    f"measured with reweighting too. Not fine: {NOT_WORSE} and {NOT_WORSE_REWEIGHTED} both refuted, or any other of the former "
    "refuted. Else undetermined."
)
MODE_RULE = (
    f"Visibility: isolated, if {VISIBLE_NOT_WORSE} is refuted; either, if it is supported or the scenario is A or B. Weighting: by "
    f"probability, if {HELPS} is supported; none, if it is refuted. Else undetermined."
)
SCENARIO_ADVICE = {
    "A": "The modes give the same results.",
    "B": "The modes are equivalent within what bfloat16 changes.",
    "C": "The modes choose the same tokens with different probabilities: name the mode wherever probabilities matter.",
    "D": "The modes are not interchangeable: name the one used with every result, and never mix runs of both.",
}
FINE_ADVICE = {
    JUST_FINE: "Parallel tokens may be relied on within what was tested.",
    REWEIGHTED: "Rely on parallel tokens only with that weighting (depth, reading and facts were measured without).",
    NOT_FINE: "Where the text matters, decode greedily (max_width=1).",
    UNDETERMINED: "Whether to rely on parallel tokens at all is undetermined.",
}


def just_fine(findings: Sequence[Finding]) -> Answer:
    """The question of the title, by FINE_RULE."""
    f = Findings(findings)
    claims = (*CRITERIA, *MENDING, EXACT)
    sound = False if any(map(violated, findings)) else f.truth(EXACT)
    plain, reweighted = f.truth(NOT_WORSE), f.truth(NOT_WORSE_REWEIGHTED)
    others = [f.truth(claim) for claim in (DEPTH, READS, FACT)]
    answers = {
        JUST_FINE: every(plain, *others),
        REWEIGHTED: every(reweighted, f.truth(HELPS), *others),
        NOT_FINE: (plain is False and reweighted is False) or False in others,
    }
    short = next((name for name, holds in answers.items() if holds), UNDETERMINED) if sound else UNDETERMINED
    broken = ["An invariant is violated, so nothing follows."] if sound is False else []
    return Answer(TITLE, short, " ".join([*broken, *criteria(findings), *unmeasured(f, claims)]), FINE_RULE, claims)


def criteria(findings: Sequence[Finding]) -> list[str]:
    """`Met: ...`, `Failed: ...`, `Open: ...`, of what was measured; of the reweighted arm only if plain does not meet its criterion."""
    f = Findings(findings)
    asked = CRITERIA if f.truth(NOT_WORSE) else CRITERIA | MENDING
    named: dict[Truth, list[str]] = {True: [], False: [], None: []}
    for claim, words in asked.items():
        if f.of(claim):
            named[f.truth(claim)].append(f"{words} ({f.said(claim)})")
    return [f"{head}: {'; '.join(named[truth])}." for truth, head in ((True, "Met"), (False, "Failed"), (None, "Open")) if named[truth]]


def recommended_mode(findings: Sequence[Finding]) -> Answer:
    """Visibility and weighting to use, by MODE_RULE."""
    f = Findings(findings)
    letter = scenario(findings).short[:1]
    visible, helps = f.truth(VISIBLE_NOT_WORSE), f.truth(HELPS)
    visibility = "isolated" if visible is False else "either visibility" if visible or letter in ("A", "B") else None
    weighting = {True: "weighting by probability", False: "no weighting", None: None}[helps]
    parts = [visibility or "visibility undetermined", weighting or "weighting undetermined"]
    short = ", ".join(parts).capitalize() if visibility or weighting else UNDETERMINED
    says = [advice(findings)]
    if f.of(VISIBLE_NOT_WORSE):
        says.append(f"Total variation to the truth, visible less isolated: {f.said(VISIBLE_NOT_WORSE)}.")
    if f.of(HELPS):
        says.append(f"Weighted by probability less unweighted: {f.said(HELPS)}.")
    claims = (VISIBLE_NOT_WORSE, HELPS)
    return Answer("Which mode should one use?", short, " ".join([*says, *unmeasured(f, claims)]), MODE_RULE, claims)


def advice(findings: Sequence[Finding]) -> str:
    """What the scenario and the conclusion mean for whoever uses the modes."""
    unknown = "Whether the modes are interchangeable is not shown: name the one used with every result."
    return f"{SCENARIO_ADVICE.get(scenario(findings).short[:1], unknown)} {FINE_ADVICE[just_fine(findings).short]}"
