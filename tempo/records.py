"""JSON lines that survive a killed run, and the findings read back from them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError

from tempo import files
from tempo.claims import SCHEMA, Finding
from tempo.errors import ResultsError, TraceError
from tempo.text import escaped

T = TypeVar("T")
AGAIN = "run pytest on the studies to make it again"


def read_findings(path: str | Path) -> list[Finding]:
    """The findings in a `findings.jsonl`, the last one of each claim, config and model.

    Raises TraceError if the file is missing, holds something else, or has another schema version.
    """
    found: dict[tuple[str, str, str], Finding] = {}
    try:
        for record in read_jsonl(path):
            if (seen := record.pop("schema", "none")) != SCHEMA:
                raise TraceError(
                    f"{path} holds a finding of schema {seen!r}, this tempo reads {SCHEMA}; delete "
                    "the file and run pytest on the studies again: what was measured is kept, so "
                    "that no model runs for it"
                )
            values: dict[str, Any] = {
                name: math.nan if value is None else value for name, value in record.items()
            }
            finding = Finding(**values)
            _adapter(Finding).validate_python(values)
            context = finding.context
            found[finding.claim, str(context.get("config")), str(context.get("model"))] = finding
    except (TypeError, ValidationError) as error:
        raise TraceError(
            f"{path} is not a record of findings ({_first(error)}); run pytest on the studies to "
            "make one"
        ) from None
    except OSError as error:
        raise TraceError(
            f"cannot read {path}: {error.strerror}; run pytest on the studies to make it"
        ) from None
    return list(found.values())


def validated(kind: type[T], record: object, where: str) -> T:
    """The record as `kind`, each field checked. A TraceError names the first wrong field."""
    try:
        return _adapter(kind).validate_python(record)
    except ValidationError as error:
        raise TraceError(f"{where} is damaged ({_first(error)}); {AGAIN}") from None


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
    """Append one line per record and force them to disk; several processes may.

    Half a line left by a killed run is dropped first. NumPy values, paths and dataclasses become
    plain JSON. NaN and infinity become null, since JSON has neither.
    Raises TypeError before anything is written if a record holds something else, and ResultsError
    if the file cannot be written: what it held is whole.
    """
    lines = [json.dumps(plain(record), allow_nan=False) + "\n" for record in records]
    try:
        files.append(path, "".join(lines).encode(), lambda tail: _parse(tail) is not None)
    except OSError as error:
        raise ResultsError(
            f"cannot write {path}: {files.reason(error)}; its earlier lines are untouched. "
            "Free some space, or choose another folder with --results"
        ) from None


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The records of the file; none if there is no file.

    A last line that a killed run left unfinished is ignored. Raises TraceError with the line's
    number if any other line is not a JSON object.
    """
    path = Path(path)
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    records = []
    for i, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif line.strip() and i < len(lines):
            start = escaped(line[:40].decode("utf-8", "replace"))
            raise TraceError(
                f"{path} line {i} is not a JSON object: {start!r}; remove that line or run again"
            )
    return records


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


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # of JSON or of UTF-8
        return None
    return record if isinstance(record, dict) else None
