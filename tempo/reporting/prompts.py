"""Every prompt behind a claim: its value, its control's, and the sets that it gave.

A page holds each text, each run and each list of numbers once, as JSON. Its script makes tables of
them, and draws each prompt as a dot behind its mean.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np

from tempo.claims import Finding
from tempo.reporting.report import Report, Section, Values
from tempo.text import escaped, slug

DATA = "tempo-data"  # the id of the JSON in the page
_CLOSE = 1e-4  # how far a mean of recorded values, of six digits, may be from its estimate


def section_of(report: Report, finding: Finding) -> Section | None:
    """What is on record of the finding's config."""
    config = finding.context.get("config")
    return next((section for section in report.sections if section.config == config), None)


def values_of(report: Report, finding: Finding) -> Values | None:
    """The values behind a finding; None if they are not on record, or belong to another run.

    A session that was cut short may leave findings and values that do not belong together.
    """
    section = section_of(report, finding)
    values = section.values.get(finding.claim) if section else None
    if values is None:
        return None
    found = known(values.claim)
    if len(found) != finding.n or not found:
        return None
    off = abs(float(np.mean(found)) - finding.estimate)
    if finding.estimand == "mean" and off > _CLOSE * max(1.0, abs(finding.estimate)):
        return None
    return values


def known(values: Sequence[float | None]) -> list[float]:
    """The values of those prompts that have one."""
    return [value for value in values if value is not None]


def claim_id(finding: Finding, at: str = "") -> str:
    """The anchor of a finding in a page; `at` is what the ids of its model begin with."""
    return f"{at}claim-{slug(finding.label)}"


def data_html(reports: Sequence[Report], at: Sequence[str]) -> str:
    """The JSON of all prompts, values and sets in a page; empty if none is on record.

    at: what the ids of each report's part of the page begin with.

    `tokens` holds every text of a member, the most frequent first. A run is a text of their
    numbers to base 36: `0 1a/1` is a set of two, then a set of one. `numbers` holds lists of
    values, each as its decimals and then the values without a point: `[2, 31, null]` is 0.31, then
    none.
    """
    prompts, runs, lists, numbers = _Interned(), _Interned(), _Interned(), _Interned()
    claims: dict[str, Any] = {}
    for report, prefix in zip(reports, at, strict=True):
        for finding in report.findings:
            section, values = section_of(report, finding), values_of(report, finding)
            if section is None or values is None:
                continue
            modes = sorted({mode for prompt in section.prompts for mode in prompt.sets})
            rows = [prompts.number((escaped(p.text), escaped(p.category))) for p in section.prompts]
            sets = {}
            for mode in modes:
                of_mode = [p.sets.get(mode) for p in section.prompts]
                sets[escaped(mode)] = lists.number(
                    tuple(-1 if run is None else runs.number(_shown(run)) for run in of_mode)
                )
            claims[claim_id(finding, prefix)] = {
                "prompts": lists.number(tuple(rows)),
                "sets": sets,
                "values": numbers.number(_whole(values.claim)),
                "control": numbers.number(_whole(values.control)),
            }
    if not claims:
        return ""
    tokens, as_text = _numbered(runs.all)
    data = {
        "prompts": prompts.all,
        "tokens": tokens,
        "runs": as_text,
        "lists": lists.all,
        "numbers": numbers.all,
        "claims": claims,
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":  # no markup within, whatever a prompt says
        text = text.replace(char, f"\\u{ord(char):04x}")
    return f'<script type="application/json" id="{DATA}">{text}</script>'


def _shown(run: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(map(escaped, members)) for members in run)


def _numbered(runs: Sequence[Any]) -> tuple[list[str], list[str]]:
    """The texts of all members, and the runs as texts of their numbers."""
    counted = Counter(text for run in runs for members in run for text in members)
    tokens = [text for text, _ in counted.most_common()]
    number = {text: np.base_repr(i, 36).lower() for i, text in enumerate(tokens)}
    shown = ["/".join(" ".join(number[t] for t in members) for members in run) for run in runs]
    return tokens, shown


def _whole(values: Sequence[float | None]) -> tuple[int | None, ...]:
    """How many decimals a column of values shows, then the values without their points.

    Half of them keep at least three digits that count, which is what a reader compares.

    >>> _whole([0.1234, 0.5, None]), _whole([1.0, 0.0])
    ((3, 123, 500, None), (0, 1, 0))
    """
    found = [value for value in values if value is not None and math.isfinite(value)]
    decimals = _decimals(found)
    by = 10.0**decimals
    shown = [
        None if value is None or not math.isfinite(value * by) else round(value * by)
        for value in values
    ]
    return (decimals, *shown)


def _decimals(values: Iterable[float]) -> int:
    sizes = sorted(abs(value) for value in values if value)
    if not sizes or all(size.is_integer() and size < 1e6 for size in sizes):
        return 0
    return max(0, 2 - math.floor(math.log10(sizes[(len(sizes) - 1) // 2])))


class _Interned:
    """Things that are kept once each, and named by their number."""

    def __init__(self) -> None:
        self.numbers: dict[Hashable, int] = {}

    def number(self, thing: Hashable) -> int:
        return self.numbers.setdefault(thing, len(self.numbers))

    @property
    def all(self) -> list[Hashable]:
        return list(self.numbers)
