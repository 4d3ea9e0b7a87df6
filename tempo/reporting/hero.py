"""The figure beside the verdict: what the study's conclusions name, or the claims behind them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator

from tempo.claims import Finding
from tempo.reporting.answers import Hero, HeroRow
from tempo.reporting.figures.drawing import Picture
from tempo.reporting.figures.strips import Strip, strips
from tempo.reporting.findings import primary_first
from tempo.reporting.prompts import known, values_of
from tempo.reporting.report import Report
from tempo.reporting.table import region

MOST_ROWS = 7  # of a figure that nobody chose


def hero_of(report: Report) -> Picture | None:
    """The figure for the first screen; None if there is nothing to draw."""
    hero = report.conclusions.hero
    rows = list(_rows(hero, report)) if hero else []
    if hero and rows:
        said = f"{hero.caption} " if hero.caption else ""
        caption = f"{said}{_how_drawn(rows)}"
        return strips(rows, hero.title, caption, hero.unit, hero.perfect)
    return _of_claims(report)


def _how_drawn(rows: list[Strip]) -> str:
    dots = "each faint dot is a prompt; " if any(row.values for row in rows) else ""
    said = f"Disc and bar: mean and 95 % interval; {dots}n is the number of prompts."
    if any(row.is_control for row in rows):
        said += " Open disc: a control, which must lie apart."
    return said


ENDS = ("estimate", "low", "high")


def _rows(hero: Hero, report: Report) -> Iterator[Strip]:
    """The rows of which the record has numbers."""
    tables = [p.csv for s in report.sections for p in s.pictures if p.title == hero.picture]
    recorded = {row["row"]: row for table in tables for row in _read(table)}
    for row in hero.rows:
        found = [f for f in report.findings if row.claim and f.claim == row.claim and f.n]
        for f in found:
            yield _of_claim(row, f, report, several=len(found) > 1)
        if not found and row.row in recorded:
            numbers = recorded[row.row]
            estimate, low, high = (_number(numbers.get(name)) for name in ENDS)
            yield Strip(row.label, estimate, low, high, is_control=row.is_control)


def _of_claim(row: HeroRow, f: Finding, report: Report, several: bool) -> Strip:
    values = values_of(report, f)
    variant = f.context.get("variant") or f.context.get("config")
    label = f"{row.label} ({variant})" if several else row.label
    if row.is_control:
        found = known(values.control) if values else []
        return Strip(label, f.control_estimate, values=found, is_control=True)
    found = known(values.claim) if values else []
    return Strip(label, f.estimate, f.low, f.high, found, f"n {f.n}")


def _of_claims(report: Report) -> Picture | None:
    """The claims behind the headlines, each on a scale of its own."""
    behind = {claim for answer in report.conclusions.headlines for claim in answer.claims}
    found = [f for f in report.findings if f.claim in behind and f.kind == "empirical"]
    found = [f for f in primary_first(found) if math.isfinite(f.estimate)]
    if not found:
        return None
    shown, rows = found[:MOST_ROWS], []
    for f in shown:
        values = values_of(report, f)
        holds = region(f)
        rows.append(
            Strip(
                f.statement,
                f.estimate,
                f.low,
                f.high,
                known(values.claim) if values else (),
                f"n {f.n}",
                holds,
                f.verdict,
            )
        )
    more = f" {len(found) - len(shown)} more stand below." if len(found) > len(shown) else ""
    caption = (
        "Disc and bar: estimate and 95 % interval; each faint dot is a prompt. A claim would hold "
        f"in its shaded region. The thin line is zero. Each row has its own scale.{more}"
    )
    return strips(rows, "The claims behind the answer", caption, shares_scale=False)


def _read(table: str) -> list[dict[str, str]]:
    """The rows of a recorded table that are named."""
    try:
        rows = list(csv.DictReader(io.StringIO(table)))
    except csv.Error:
        return []
    return [row for row in rows if row.get("row") and row.get("kind") in (None, "estimate")]


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan
