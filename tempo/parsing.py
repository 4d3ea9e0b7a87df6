"""JSON and YAML are read within bounds, and records carry a checksum.

A file may come from somebody else, or a bit of it may have flipped. So nothing is believed before
it was checked. All functions raise ValueError in one line, which their callers complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

CHECKSUM = "checksum"  # the last key of every record; see `seal`
# 64 bits: one damaged record in 2^64 is taken for whole. It is no defence against forgery.
CHECKSUM_LENGTH = 16
# Far deeper than anything that tempo writes, far less than what exhausts Python's stack.
DEEPEST = 40
# The longest records known, a config's cases over a thousand prompts, take some ten megabytes.
MOST_BYTES = 1 << 29
# PyYAML reads about one megabyte a second. Longer suites are better kept as .txt or .jsonl.
MOST_YAML_BYTES = 1 << 24


def read_bytes(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """All bytes of a regular file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if its name holds a NUL, if it is no regular file, or if it is too large.
    """
    seen = os.stat(path)  # of a name with a NUL this is a ValueError
    # A pipe or a device may never end.
    if not stat.S_ISREG(seen.st_mode) and not stat.S_ISDIR(seen.st_mode):
        raise ValueError("it is no regular file")
    if seen.st_size > most:
        raise ValueError(f"it has {seen.st_size:,} bytes, expected at most {most:,}")
    with open(path, "rb") as file:
        # as much as there is: memory for all that is asked for would be taken at once
        return file.read(seen.st_size)


def read_text(path: str | Path, most: int = MOST_BYTES) -> str:
    """The text of a regular file in UTF-8, without a byte order mark. Raises as `read_bytes`."""
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is no UTF-8 text; save it as UTF-8") from None


def parse_json(text: str | bytes) -> Any:
    """What the JSON text says: no duplicate keys, no NaN, not too deep.

    >>> parse_json('{"a": [1, 2.5, null]}')
    {'a': [1, 2.5, None]}
    >>> parse_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: the key 'a' occurs twice
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=_unlike, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(_too_deep()) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is no UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error}") from None
    _check_depth(value)
    return value


def _unlike(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r:.60} occurs twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _check_depth(value: Any) -> None:
    layer = [value]
    for _ in range(DEEPEST):
        below = []
        for item in layer:
            if isinstance(item, dict):
                below += [each for each in item.values() if isinstance(each, dict | list)]
            elif isinstance(item, list):
                below += [each for each in item if isinstance(each, dict | list)]
        if not below:
            return
        layer = below
    raise ValueError(_too_deep())


def _too_deep() -> str:
    return f"it is nested more than {DEEPEST} deep"


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with a checksum of all its content as the last key.

    The record is plain JSON: `unseal` must find the same numbers after writing and reading.

    >>> seal({"a": 1})
    {'a': 1, 'checksum': '015abd7f5cc57a2d'}
    """
    kept = {key: value for key, value in record.items() if key != CHECKSUM}
    return kept | {CHECKSUM: _checksum(kept)}


def unseal(record: Any) -> dict[str, Any]:
    """The record without its checksum. Raises ValueError if that does not fit, or is missing."""
    if not isinstance(record, dict):
        raise ValueError(f"it is a {type(record).__name__}, expected an object")
    kept = {key: value for key, value in record.items() if key != CHECKSUM}
    if CHECKSUM not in record:
        raise ValueError("it has no checksum, so nobody knows whether it is whole")
    if record[CHECKSUM] != _checksum(kept):
        raise ValueError("its checksum does not fit: something in it was changed")
    return kept


def _checksum(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:CHECKSUM_LENGTH]


_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE, _FALSE = re.compile("true|True|TRUE"), re.compile("false|False|FALSE")
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
_SPECIAL = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}
# YAML 1.1 and 1.2 read these as different things, and so do people.
_AMBIGUOUS = re.compile(
    r"""[-+]?0[0-9_]+ | [-+]?0[box][0-9a-fA-F_]+ | [-+]?[0-9][0-9_]*_[0-9_.]*
    | [-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?
    | yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF""",
    re.VERBOSE,
)
MOST_DIGITS = 1000  # Python itself refuses more than 4,300


def parse_yaml(text: str) -> Any:
    """What the YAML text says, of which everybody reads the same.

    Refused are: aliases, tags, duplicate keys, more than one document, what is nested too deep, and
    plain words that YAML 1.1 and 1.2 read differently, such as 010, 1:0 and no. A number may be
    written 1e-3. Keys are text.

    >>> parse_yaml("a: 1e-3\\nb: [x, '010', true]")
    {'a': 0.001, 'b': ['x', '010', True]}
    >>> parse_yaml("a: 010")
    Traceback (most recent call last):
    ValueError: line 1: 010 is read as different things by different programs; write it in quotes \
if it is a text, else as a plain decimal number
    """
    if len(text) > MOST_YAML_BYTES:
        raise ValueError(f"it has {len(text):,} characters, expected at most {MOST_YAML_BYTES:,}")
    try:
        events = yaml.parse(text, Loader=yaml.SafeLoader)
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                break
            if isinstance(event, yaml.StreamEndEvent):
                return None
        value = _build(next(events), events, 0)
        next(events)  # the document's end
        if not isinstance(after := next(events), yaml.StreamEndEvent):
            raise ValueError(f"{_line(after)}: a second document begins; keep one")
    except yaml.YAMLError as error:
        raise ValueError(f"it is not valid YAML: {' '.join(str(error).split())}") from None
    return value


def _build(event: Any, events: Iterator[Any], depth: int) -> Any:
    if isinstance(event, yaml.AliasEvent):
        raise ValueError(
            f"{_line(event)}: *{event.anchor} is an alias, which can make a few bytes endless; "
            "write out what it stands for"
        )
    if event.tag is not None:
        raise ValueError(f"{_line(event)}: the tag {event.tag} is not taken; leave it out")
    if depth > DEEPEST:
        raise ValueError(f"{_line(event)}: {_too_deep()}")
    if isinstance(event, yaml.ScalarEvent):
        if re.search("[\ud800-\udfff]", event.value):
            raise ValueError(f"{_line(event)}: half a character (a lone surrogate)")
        return event.value if event.style else _plain(event)
    if isinstance(event, yaml.SequenceStartEvent):
        return list(_items(events, yaml.SequenceEndEvent, depth))
    found: dict[str, Any] = {}
    while not isinstance(key := next(events), yaml.MappingEndEvent):
        if not isinstance(key, yaml.ScalarEvent):
            raise ValueError(f"{_line(key)}: a key is no text")
        if key.value in found:
            raise ValueError(f"{_line(key)}: the key {key.value!r:.60} occurs twice; keep one")
        found[key.value] = _build(next(events), events, depth + 1)
    return found


def _items(events: Iterator[Any], end: type[Any], depth: int) -> Iterator[Any]:
    while not isinstance(event := next(events), end):
        yield _build(event, events, depth + 1)


def _plain(event: Any) -> Any:
    """What a scalar without quotes is."""
    text = event.value
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text) or _FALSE.fullmatch(text):
        return bool(_TRUE.fullmatch(text))
    if text.lower() in _SPECIAL:
        return float(_SPECIAL[text.lower()])
    if _AMBIGUOUS.fullmatch(text):
        raise ValueError(
            f"{_line(event)}: {text:.40} is read as different things by different programs; "
            "write it in quotes if it is a text, else as a plain "
            + ("true or false" if text.isalpha() else "decimal number")
        )
    if _INT.fullmatch(text):
        # int() would refuse 5,000 digits in words of its own
        if len(text) > MOST_DIGITS:
            raise ValueError(
                f"{_line(event)}: an integer of {len(text)} digits; expected at most {MOST_DIGITS}"
            )
        return int(text)
    if _FLOAT.fullmatch(text):
        value = float(text)
        if value in (float("inf"), -float("inf")):
            raise ValueError(f"{_line(event)}: {text:.40} is too large for a number")
        return value
    return text


def _line(event: Any) -> str:
    return f"line {event.start_mark.line + 1}"


class _Dumper(yaml.SafeDumper):
    """Writes what `parse_yaml` reads back: no aliases, and quotes around whatever needs them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML knows which words YAML 1.1 reads as something else; these are read so here alone.
    readings = (_FLOAT, _INT, _AMBIGUOUS)
    quoted = "'" if any(kind.fullmatch(text) for kind in readings) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=quoted)


_Dumper.add_representer(str, _represent_text)


def dump_yaml(value: Any, **options: Any) -> str:
    """The value as YAML that `parse_yaml` reads back. `options` are those of PyYAML.

    >>> parse_yaml(dump_yaml({"a": "1e-3", "b": 0.001})) == {"a": "1e-3", "b": 0.001}
    True
    >>> dump_yaml({"hash": "0bbf52f632ffe42d"})
    "hash: '0bbf52f632ffe42d'\\n"
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, **options)
