"""The conclusion: whether a model handles several tokens at one position just fine, and which mode to use.

Both are computed from findings by the rules registered here. A criterion that was not measured, or not decided, is never taken
for met: absence of evidence is no evidence of absence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tempo.claims import Finding
from tempo.reporting.answers import (
    EXACT,
    NOT_WORSE,
    TITLE,
    UNDETERMINED,
    Answer,
    Findings,
    Truth,
    every,
    scenario,
    unmeasured,
)
from tempo.reporting.findings import violated

JUST_FINE, REWEIGHTED, NOT_FINE = "Just fine", "Fine with reweighting", "Not fine"
DEPTH, READS, FACT = (
    "exp7.error-does-not-grow-with-depth",
    "exp13.reads-as-well-as-greedy",
    "exp13.fact-still-found",
)
NOT_WORSE_REWEIGHTED, HELPS = (
    "exp11.reweighted-not-worse-than-top-branch",
    "exp11.probability-weighting-helps",
)
READS_REWEIGHTED, FACT_REWEIGHTED = (
    "exp13.weighted-reads-as-well-as-greedy",
    "exp13.weighted-fact-still-found",
)
# What "fine" demands, in words for the reader: the claim about siblings as they are, and that about siblings weighted by
# probability. No claim about depth is registered with weighting, so that weighting mends nothing there.
CRITERIA = {
    "as near to the truth as the most probable branch": (NOT_WORSE, NOT_WORSE_REWEIGHTED),
    "no growth of the error with depth": (DEPTH, DEPTH),
    "reads as well as greedy": (READS, READS_REWEIGHTED),
    "facts still found": (FACT, FACT_REWEIGHTED),
}
PLAIN, WEIGHTED = ([pair[arm] for pair in CRITERIA.values()] for arm in (0, 1))
VISIBLE_NOT_WORSE = "exp7.visible-not-worse-than-isolated"
FINE_RULE = (
    f"Only if no invariant is violated and {EXACT} is supported. Just fine: {', '.join(PLAIN)} all supported. Fine with reweighting: "
    f"not that, but {', '.join([HELPS, *WEIGHTED])} all supported. Not fine: of both lists ({HELPS} apart) at least one refuted. "
    f"Else undetermined. (No claim like {DEPTH} is registered with reweighting, so reweighting mends nothing there.)"
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
    REWEIGHTED: "Rely on parallel tokens only with that weighting.",
    NOT_FINE: "Where the text matters, decode greedily (max_width=1).",
    UNDETERMINED: "Whether to rely on parallel tokens at all is undetermined.",
}


def just_fine(findings: Sequence[Finding]) -> Answer:
    """The question of the title, by FINE_RULE."""
    f = Findings(findings)
    claims = tuple(dict.fromkeys((*PLAIN, HELPS, *WEIGHTED, EXACT)))
    sound = False if any(map(violated, findings)) else f.truth(EXACT)
    plain, weighted = every(*map(f.truth, PLAIN)), every(*map(f.truth, WEIGHTED))
    answers = {
        JUST_FINE: plain,
        REWEIGHTED: every(f.truth(HELPS), weighted),
        NOT_FINE: plain is False and weighted is False,
    }
    short = (
        next((name for name, holds in answers.items() if holds), UNDETERMINED)
        if sound
        else UNDETERMINED
    )
    broken = ["An invariant is violated, so nothing follows."] if sound is False else []
    return Answer(
        TITLE,
        short,
        " ".join([*broken, *criteria(findings), *unmeasured(f, claims)]),
        FINE_RULE,
        claims,
    )


def criteria(findings: Sequence[Finding]) -> list[str]:
    """`Met: ...`, `Failed: ...`, `Open: ...`, of what was measured; the same with reweighting, unless all are met without."""
    f = Findings(findings)
    says = [f"{head}: {'; '.join(named)}." for head, named in _sorted(f, PLAIN, f.said)]
    if every(*map(f.truth, PLAIN)) or not any(
        f.of(claim) for claim in (NOT_WORSE_REWEIGHTED, READS_REWEIGHTED, FACT_REWEIGHTED)
    ):
        return says
    weighted = [f"{head.lower()}: {', '.join(named)}" for head, named in _sorted(f, WEIGHTED)]
    return [*says, f"With reweighting {'; '.join(weighted)}."]


def _sorted(
    f: Findings, claims: Sequence[str], said: Callable[[str], str] | None = None
) -> list[tuple[str, list[str]]]:
    """The measured criteria by their truth, in words, with numbers if `said` says them."""
    named: dict[Truth, list[str]] = {True: [], False: [], None: []}
    for words, claim in zip(CRITERIA, claims, strict=True):
        if f.of(claim):
            named[f.truth(claim)].append(f"{words} ({said(claim)})" if said else words)
    return [
        (head, named[truth])
        for truth, head in ((True, "Met"), (False, "Failed"), (None, "Open"))
        if named[truth]
    ]


def recommended_mode(findings: Sequence[Finding]) -> Answer:
    """Visibility and weighting to use, by MODE_RULE."""
    f = Findings(findings)
    letter = scenario(findings).short[:1]
    visible, helps = f.truth(VISIBLE_NOT_WORSE), f.truth(HELPS)
    visibility = (
        "isolated"
        if visible is False
        else "either visibility"
        if visible or letter in ("A", "B")
        else None
    )
    weighting = {True: "weighting by probability", False: "no weighting", None: None}[helps]
    parts = [visibility or "visibility undetermined", weighting or "weighting undetermined"]
    short = ", ".join(parts).capitalize() if visibility or weighting else UNDETERMINED
    says = [advice(findings)]
    if f.of(VISIBLE_NOT_WORSE):
        says.append(
            f"Total variation to the truth, visible less isolated: {f.said(VISIBLE_NOT_WORSE)}."
        )
    if f.of(HELPS):
        says.append(f"Weighted by probability less unweighted: {f.said(HELPS)}.")
    claims = (VISIBLE_NOT_WORSE, HELPS)
    return Answer(
        "Which mode should one use?",
        short,
        " ".join([*says, *unmeasured(f, claims)]),
        MODE_RULE,
        claims,
    )


def advice(findings: Sequence[Finding]) -> str:
    """What the scenario and the conclusion mean for whoever uses the modes."""
    unknown = (
        "Whether the modes are interchangeable is not shown: name the one used with every result."
    )
    return f"{SCENARIO_ADVICE.get(scenario(findings).short[:1], unknown)} {FINE_ADVICE[just_fine(findings).short]}"
