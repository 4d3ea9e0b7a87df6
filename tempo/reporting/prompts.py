"""Every prompt behind a claim: its value, its control's, and the sets that it gave.

A page holds them once, as JSON that its script makes tables of.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Sequence
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


def data_html(reports: Sequence[Report], at: Sequence[str]) -> str:
    """The JSON of all prompts, values and sets in a page; empty if none is on record.

    at: what the ids of each report's part of the page begin with.
    """
    prompts, runs, lists = _Interned(), _Interned(), _Interned()
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
            claims[f"{prefix}claim-{slug(finding.label)}"] = {
                "prompts": lists.number(tuple(rows)),
                "sets": sets,
                "values": list(map(_short, values.claim)),
                "control": list(map(_short, values.control)),
            }
    if not claims:
        return ""
    data = {"prompts": prompts.all, "runs": runs.all, "lists": lists.all, "claims": claims}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":  # no markup within, whatever a prompt says
        text = text.replace(char, f"\\u{ord(char):04x}")
    return f'<script type="application/json" id="{DATA}">{text}</script>'


def _shown(run: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(map(escaped, members)) for members in run)


def _short(value: float | None) -> float | None:
    """Four digits, which is more than a reader compares; the record has six."""
    if value is None or not math.isfinite(value):
        return None
    short = float(f"{value:.4g}")
    return int(short) if short.is_integer() and abs(short) < 1e6 else short


class _Interned:
    """Things that are kept once each, and named by their number."""

    def __init__(self) -> None:
        self.numbers: dict[Hashable, int] = {}

    def number(self, thing: Hashable) -> int:
        return self.numbers.setdefault(thing, len(self.numbers))

    @property
    def all(self) -> list[Hashable]:
        return list(self.numbers)
