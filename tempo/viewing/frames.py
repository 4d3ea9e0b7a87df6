"""Runs and findings as pandas frames. pandas is optional: it is imported on use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from tempo.claims import Finding
from tempo.errors import TempoError
from tempo.trace import Trace
from tempo.viewing.data import best_members

if TYPE_CHECKING:
    from pandas import DataFrame  # pyright: ignore[reportMissingImports]

# Of a finding's context, what tells it from other findings of the same claim.
CONTEXT = ("experiment", "config", "variant", "model", "dtype", "n_prompts")


def trace_frame(trace: Trace) -> DataFrame:
    """One row for each member of each set. See `Trace.to_frame`."""
    rows: list[dict[str, Any]] = []
    best = best_members(trace)
    for k, step in enumerate(trace.steps):
        links = trace.steps[k - 1].links if k else None
        parents = None if links is None else links.argmax(axis=0)
        for i, token in enumerate(step.tokens):
            row: dict[str, Any] = {"step": k, "member": i, "token": token, "text": step.texts[i]}
            row |= {"probability": step.probabilities[i], "position": step.position}
            row |= {"slot": step.slots[i], "parent": None, "parent_probability": None}
            if links is not None and parents is not None:
                parent = int(parents[i])
                row |= {"parent": parent, "parent_probability": float(links[parent, i])}
            row["on_best_path"] = None if best is None else best[k] == i
            rows.append(row)
    frame = _pandas("Trace.to_frame").DataFrame(rows)
    kinds = {"parent": "Int64", "parent_probability": "float64", "on_best_path": "boolean"}
    return frame.astype(kinds)


def findings_frame(findings: Sequence[Finding]) -> DataFrame:
    """One row for each finding. See `Findings.to_frame`."""
    plain = [field.name for field in fields(Finding) if field.name not in ("details", "context")]
    rows = []
    for finding in findings:
        row: dict[str, Any] = {name: finding.context.get(name) for name in CONTEXT}
        rows.append({name: getattr(finding, name) for name in plain} | row)
    return _pandas("Findings.to_frame").DataFrame(rows, columns=[*plain, *CONTEXT])


def _pandas(whose: str) -> Any:
    try:
        import pandas  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise TempoError(
            f"{whose} needs pandas, which is not installed; pip install 'tempo-harness[notebook]'"
        ) from None
    return pandas
