"""JSON lines that survive a killed run, and the findings read back from them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_args

import numpy as np
from pydantic import TypeAdapter, ValidationError

from tempo import files
from tempo.claims import SCHEMA, Estimand, Finding, Test
from tempo.errors import ResultsError, TraceError
from tempo.parsing import parse_json, read_bytes, seal, unseal
from tempo.text import escaped

if TYPE_CHECKING:
    from pandas import DataFrame  # pyright: ignore[reportMissingImports]

T = TypeVar("T")
AGAIN = "run pytest on the studies to make it again"
REPAIR = "tempo doctor --repair FOLDER sets the damaged parts aside"


class Lines(NamedTuple):
    """What a file of JSON lines holds: the whole records, and what is wrong with every other line.

    damaged: one message for each damaged line, with file, number, and reason.
    """

    records: list[dict[str, Any]]
    damaged: list[str]


class Findings(NamedTuple):
    """The findings on record, the last one of each claim, config and model; see `Lines`."""

    findings: list[Finding]
    damaged: list[str]

    def to_frame(self) -> DataFrame:
        """A pandas frame with one row for each finding: its fields, experiment, config and model.

        Raises TempoError if pandas is not installed.
        """
        from tempo.viewing.frames import findings_frame

        return findings_frame(self.findings)

    def _repr_html_(self) -> str:
        from tempo.viewing.objects import findings_html

        return findings_html(self.findings)


def read_findings(path: str | Path) -> Findings:
    """The findings in a `findings.jsonl`. Damaged lines are told, the others kept.

    Raises TraceError if the file is missing, or has another schema version.
    """
    path = Path(path)
    if not os.path.exists(path):  # unlike Path.exists it takes any name
        raise TraceError(f"cannot read {path}: no such file; run pytest on the studies to make it")
    found: dict[tuple[str, str, str], Finding] = {}
    records, damaged = read_jsonl(path)
    for record in records:
        if (seen := record.pop("schema", "none")) != SCHEMA:
            raise TraceError(
                f"{path} holds a finding of schema {seen!r}, this tempo reads {SCHEMA}; delete "
                "the file and run pytest on the studies again: what was measured is kept, so "
                "that no model runs for it"
            )
        try:
            finding = _finding(record)
        except (TypeError, ValueError) as error:  # pydantic's errors among them
            what = str(record.get("claim", "no claim"))
            damaged.append(f"{path} holds no finding of {escaped(what):.80}: {_first(error)}")
            continue
        context = finding.context
        found[finding.claim, str(context.get("config")), str(context.get("model"))] = finding
    return Findings(list(found.values()), damaged)


def _finding(record: Mapping[str, Any]) -> Finding:
    """The finding that a record holds. Raises TypeError or ValueError if it cannot be one."""
    if unknown := sorted(set(record) - {field.name for field in fields(Finding)}):
        raise ValueError(f"unknown field {unknown[0]!r:.40}")
    values: dict[str, Any] = {
        name: math.nan if value is None else value for name, value in record.items()
    }
    finding: Finding = _adapter(Finding).validate_json(json.dumps(values), strict=True)
    shares = (finding.p, finding.p_corrected, finding.p_against, finding.p_against_corrected)
    # Of what could not be computed, NaN, nothing is said. A comparison with it is false.
    wrong = {
        "a p outside 0 to 1": any(p < 0 or p > 1 for p in shares),
        "alpha outside 0 to 1": not 0 < finding.alpha < 1,
        "n below 0": finding.n < 0,
        "low above high": finding.low > finding.high,
        f"kind {finding.kind!r:.40}": finding.kind not in ("invariant", "empirical"),
        f"test {finding.test!r:.40}": finding.test not in get_args(Test),
        f"estimand {finding.estimand!r:.40}": finding.estimand not in get_args(Estimand),
    }
    for what, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(what)
    context = finding.context
    for name in ("experiment", "config", "model", "dtype", "variant"):
        if not isinstance(context.get(name, ""), str):
            raise ValueError(f"context.{name} is no text")
    prompts = context.get("n_prompts", 0)
    if type(prompts) is not int or prompts < 0:
        raise ValueError("context.n_prompts is no count")
    return finding


def validated(kind: type[T], record: object, where: str) -> T:
    """The record as `kind`, each field checked. A TraceError names the first wrong field."""
    try:
        return _adapter(kind).validate_python(record)
    except ValidationError as error:
        raise TraceError(f"{where} is damaged ({_first(error)}); {REPAIR}") from None


@cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _first(error: Exception) -> str:
    """The first thing that is wrong, in one line: the field, and what about it."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"


def append_jsonl(path: str | Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append one line per record, each with its checksum; several processes may.

    Half a line left by a killed run is dropped first. NumPy values, paths and dataclasses become
    plain JSON. NaN and infinity become null, since JSON has neither.
    Raises TypeError before anything is written if a record holds something else, and ResultsError
    if the file cannot be written: what it held is whole.
    """
    lines = [json.dumps(seal(plain(record)), allow_nan=False) + "\n" for record in records]
    try:
        files.append(path, "".join(lines).encode(), _is_object)
    except OSError as error:
        raise ResultsError(
            f"cannot write {path}: {files.reason(error)}; its earlier lines are untouched. "
            "Free some space, or choose another folder with --results"
        ) from None


def read_jsonl(path: str | Path) -> Lines:
    """The whole records of the file, without their checksums; none if there is no file.

    A line that is no JSON object, or does not fit its checksum, is told by its number. So is a
    last line that a killed run left unfinished. The others are kept.
    Raises TraceError if the file cannot be read at all.
    """
    path = Path(path)
    records, damaged = [], []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            records.append(unseal(parse_json(line)))
        except ValueError as error:
            damaged.append(f"{path} line {number} is damaged: {error}")
    return Lines(records, damaged)


def _lines(path: Path) -> list[bytes]:
    try:
        return read_bytes(path).split(b"\n")
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise TraceError(f"cannot read {path}: {reason(error)}; {AGAIN}") from None


def read_record(path: Path) -> dict[str, Any]:
    """The record in a JSON file, without its checksum.

    Raises TraceError if it cannot be read, or if anything in it was changed since it was written.
    """
    try:
        return unseal(parse_json(read_bytes(path)))
    except (OSError, ValueError) as error:
        raise TraceError(f"{path} cannot be used: {reason(error)}; {AGAIN}") from None


def reason(error: Exception) -> str:
    """What went wrong, in a few words, without the name of the file."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def plain(value: Any) -> Any:
    """The value as what JSON knows: dict, list, str, int, float, bool, None.

    Raises TypeError if it is made of something else.

    >>> plain({"at": Path("a"), "x": (1, math.nan)})
    {'at': 'a', 'x': [1, None]}
    """
    match value:
        case np.ndarray() | np.generic():
            return plain(value.tolist())
        case Path():
            return str(value)
        case Mapping():
            return {str(plain(key)): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case set() | frozenset():
            return sorted((plain(item) for item in value), key=repr)
        case float():
            return value if math.isfinite(value) else None
        case str() | int() | None:
            return value
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    raise TypeError(
        f"cannot record a {type(value).__name__} as JSON; pass numbers, strings, lists, dicts or "
        "arrays"
    )


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False
