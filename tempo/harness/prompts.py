"""Suites of prompts: read from a file in any of four formats, or from a dataset on the hub."""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from tempo.claims import moment
from tempo.errors import SpecError
from tempo.parsing import parse_json, parse_yaml, read_text

FORMATS = ".txt, .csv, .jsonl, .yaml or .yml"
# Rows of a hub dataset that are read at most: more than anybody measures on one machine.
MOST_ROWS = 10_000


class SuitePrompt(NamedTuple):
    """One prompt of a suite and the category it stands for ("" if the suite has none)."""

    text: str
    category: str = ""


@dataclass(frozen=True)
class Suite:
    """Prompts that stand for those one wants to know about, each once, with where they come from.

    >>> suite = Suite((SuitePrompt("Es war einmal"), SuitePrompt("Der Hund")), "prompts.txt")
    >>> suite.describe()
    '2 prompts (prompts.txt)'
    """

    prompts: tuple[SuitePrompt, ...]
    source: str
    language: str = ""
    drawn: str = ""  # when, as an ISO date or time; "" if the suite does not say

    @cached_property
    def texts(self) -> frozenset[str]:
        """The texts of its prompts."""
        return frozenset(prompt.text for prompt in self.prompts)

    @property
    def sha256(self) -> str:
        """A hash of the prompts' texts, whatever their order and the file they stand in."""
        texts = sorted(prompt.text for prompt in self.prompts)
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()

    def spread(self, number: int | None = None) -> tuple[SuitePrompt, ...]:
        """All prompts, or so many of them in proportion to the categories: one of each in turn."""
        by_category: dict[str, list[SuitePrompt]] = {}
        for prompt in self.prompts:
            by_category.setdefault(prompt.category, []).append(prompt)
        if number is not None and number < len(self.prompts):
            shares = _shares({name: len(of) for name, of in by_category.items()}, number)
            by_category = {name: of[: shares[name]] for name, of in by_category.items()}
        rounds = zip_longest(*by_category.values())
        return tuple(prompt for one_each in rounds for prompt in one_each if prompt)

    def describe(self, lengths: Sequence[int] = ()) -> str:
        """How many prompts, in which language, of how many categories, how long, from where."""
        categories = len({prompt.category for prompt in self.prompts} - {""})
        parts = [f"{len(self.prompts)} prompts" if len(self.prompts) != 1 else "1 prompt"]
        parts[0] += f" in {self.language}" if self.language else ""
        parts[0] += f" of {categories} categories" if categories > 1 else ""
        if lengths:
            parts.append(f"{min(lengths)} to {max(lengths)} tokens")
        return f"{', '.join(parts)} ({self.source})"


def _shares(sizes: Mapping[str, int], number: int) -> dict[str, int]:
    """How many of each category: in proportion, what is left to the largest remainders."""
    total = sum(sizes.values())
    shares = {name: number * size // total for name, size in sizes.items()}
    left = number - sum(shares.values())
    by_remainder = sorted(sizes, key=lambda name: -(number * sizes[name] % total))
    for name in by_remainder[:left]:
        shares[name] += 1
    return shares


def read_suite(source: str) -> Suite:
    """The suite in a file, or of `hf:dataset[:column]`. Raises SpecError in one line.

    .txt: a prompt a line; .csv and .jsonl: a column or key `prompt`, and `category` and
    `language` if there are any; .yaml: a list of prompts, or a list for each category, or these
    under `prompts:` beside `language:` and `drawn:` (when, as an ISO date or time: what a
    finding's standing depends on). Repeated prompts count once.
    """
    if source.startswith("hf:"):
        return _suite(_from_hub(source), source)
    path = Path(source).expanduser()
    readers = {".txt": _lines, ".csv": _csv, ".jsonl": _jsonl, ".yaml": _yaml, ".yml": _yaml}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise SpecError(
            f"the suite {source} is of no known format; expected {FORMATS}, or hf:dataset"
        )
    try:
        text = read_text(path)
    except OSError as error:
        raise SpecError(f"cannot read the suite {source}: {error.strerror}") from None
    except ValueError as error:
        raise SpecError(f"cannot read the suite {source}: {error}") from None
    return _suite(reader(text, source), path.name)


Row = Mapping[str, Any]


def _suite(rows: Iterable[Row], source: str) -> Suite:
    """A suite from rows with the keys prompt, category, language and drawn."""
    prompts: dict[str, SuitePrompt] = {}
    languages: set[str] = set()
    drawn: set[str] = set()
    for row in rows:
        text = row["prompt"]
        prompts.setdefault(text, SuitePrompt(text, str(row.get("category") or "")))
        languages.add(str(row.get("language") or ""))
        drawn.add(str(row.get("drawn") or ""))
    if not prompts:
        raise SpecError(f"the suite {source} holds no prompt; expected one at least")
    if strange := [when for when in drawn if when and moment(when) is None]:
        raise SpecError(
            f"the suite {source} was drawn {strange[0]!r}; expected an ISO date or time, such as "
            "2026-11-28"
        )
    # Of parts drawn at several times the first counts. Of one that does not say, nothing is known.
    first = "" if "" in drawn else min(drawn, key=lambda when: str(moment(when)))
    return Suite(tuple(prompts.values()), source, ", ".join(filter(None, sorted(languages))), first)


def _lines(text: str, source: str) -> list[Row]:
    return [{"prompt": line.rstrip("\r")} for line in text.split("\n") if line.strip()]


def _csv(text: str, source: str) -> list[Row]:
    table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [
            _checked(row, f"{source} line {number}") for number, row in enumerate(table, start=2)
        ]
    except csv.Error as error:
        raise SpecError(f"{source} line {table.line_num} is no CSV: {error}") from None
    if not rows and table.fieldnames:
        _checked(dict.fromkeys(table.fieldnames, "x"), source)
    return rows


def _jsonl(text: str, source: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise SpecError(f"{source} line {number}: {error}") from None
        if not isinstance(row, dict):
            raise SpecError(f'{source} line {number} is no JSON object such as {{"prompt": "..."}}')
        rows.append(_checked(row, f"{source} line {number}"))
    return rows


def _yaml(text: str, source: str) -> list[Row]:
    try:
        found = parse_yaml(text)
    except ValueError as error:
        raise SpecError(f"{source}: {error}") from None
    of_all = {}
    if isinstance(found, dict) and "prompts" in found:
        of_all = {name: str(found.get(name, "")) for name in ("language", "drawn")}
        found = found["prompts"]
    by_category = found if isinstance(found, dict) else {"": found}
    rows = []
    for category, texts in by_category.items():
        if not isinstance(texts, list):
            raise SpecError(f"{source}: {category or 'the file'} holds no list of prompts")
        for text in texts:
            row = {"prompt": text, "category": category, **of_all}
            rows.append(_checked(row, f"{source}, {category or 'list'}"))
    return rows


def _checked(row: Row, where: str) -> Row:
    """The row, if its prompt is text."""
    if "prompt" not in row:
        keys = [str(key) for key in row]
        near = difflib.get_close_matches("prompt", keys, n=1)
        hint = f"rename {near[0]!r}" if near else f"it has {', '.join(map(repr, keys))}"
        raise SpecError(f"{where} has no 'prompt'; {hint}")
    if not isinstance(row["prompt"], str) or not row["prompt"].strip():
        raise SpecError(f"{where}: the prompt is {row['prompt']!r:.60}, expected text; quote it")
    try:
        row["prompt"].encode()
    except UnicodeEncodeError:
        raise SpecError(f"{where}: the prompt holds half a character; give valid Unicode") from None
    return row


def _from_hub(source: str) -> list[Row]:
    """The rows of `hf:dataset[:column]`: its train split, or the first one it has."""
    name, _, column = source.removeprefix("hf:").partition(":")
    column = column or "prompt"
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SpecError(f"{source} needs the package datasets; run pip install datasets") from None
    try:
        splits = load_dataset(name)
        rows = splits["train" if "train" in splits else next(iter(splits))]
        rows = rows.select(range(min(MOST_ROWS, len(rows))))
    except Exception as error:  # the library raises some ten kinds, all of them about the dataset
        first = str(error).strip().partition("\n")[0]
        raise SpecError(f"cannot load the dataset {name!r}: {first}") from None
    if column not in rows.column_names:
        known = ", ".join(rows.column_names)
        raise SpecError(f"the dataset {name!r} has no column {column!r}; it has {known}")
    kept = [key for key in ("category", "language") if key in rows.column_names]
    return [
        _checked({"prompt": row[column], **{key: row[key] for key in kept}}, source) for row in rows
    ]
