"""The report as records: what a session leaves in its results folder, and what a report is made from.

`<results>/findings.jsonl` holds the findings, `<results>/report.json` the session's provenance, `<results>/tests.html` the list of
tests as pytest-html wrote it, and `<results>/<config>/report.json` the pictures and evidence of each config. A page made from
these is the same to the byte whoever makes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tempo.claims import Finding
from tempo.errors import ResultsError, TraceError
from tempo.records import plain, read_findings
from tempo.reporting.figures.drawing import Picture, save
from tempo.text import slug

RECORD = "report.json"
TESTS = "tests.html"
FIGURES = "figures"
_PICTURE = ("name", "title", "caption", "alt", "svg")


@dataclass(frozen=True)
class Section:
    """What one config of an experiment shows beside its findings."""

    experiment: str
    title: str
    config: str  # name of the config file
    model: str
    num_prompts: int
    pictures: tuple[Picture, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)  # the config's values
    text: str = ""  # the sets of the config's own prompt
    analysis: str = ""
    files: tuple[str, ...] = ()  # raw results beside this record
    fingerprint: str = ""
    problem: str = ""  # why there are no pictures
    folder: str = ""  # under the results folder

    @property
    def anchor(self) -> str:
        return f"tempo-{slug(self.config)}"


@dataclass(frozen=True)
class Report:
    """All that a report shows of one model."""

    findings: tuple[Finding, ...]
    model: str = ""
    sections: tuple[Section, ...] = ()
    about: Mapping[str, str] = field(default_factory=dict)  # provenance
    quick_look: int | None = None  # of how many prompts, if not of the whole suite
    tests: str = ""  # the page with the list of tests
    root: Path = Path()  # the results folder


def write_section(results: Path, section: Section) -> None:
    """Keep a section: `report.json` and its pictures as SVG and PNG, in the section's folder."""
    folder = results / section.folder
    pictures = unlike_names(section.pictures)
    figures = folder / FIGURES
    try:
        for old in figures.glob("*") if figures.is_dir() else ():
            if old.suffix in (".svg", ".png"):
                old.unlink()
        for picture in pictures:
            save(picture, figures)
    except OSError as error:
        raise ResultsError(
            f"cannot write to {figures}: {error.strerror}; choose another folder with --results"
        ) from None
    record = {
        key: value for key, value in asdict(section).items() if key not in ("pictures", "folder")
    }
    record["pictures"] = [
        {name: getattr(picture, name) for name in _PICTURE} for picture in pictures
    ]
    _write(folder / RECORD, json.dumps(plain(record), indent=1))


def write_session(
    results: Path, model: str, about: Mapping[str, str], quick_look: int | None, tests: str = ""
) -> None:
    """Keep what a session knows beyond its sections."""
    _write(
        results / RECORD,
        json.dumps({"model": model, "about": plain(about), "quick_look": quick_look}, indent=1),
    )
    _write(results / TESTS, tests)


def read_report(results: Path) -> Report:
    """The report of a results folder's last session, or of its last finding if no session is on record."""
    return read_reports([results])[0]


def read_reports(folders: Sequence[Path]) -> list[Report]:
    """A report for each model that has findings in each results folder, that of the folder's last session first.

    Raises TraceError if a folder has no findings or a record is damaged.
    """
    return [report for folder in folders for report in _of_folder(folder)]


def _of_folder(results: Path) -> list[Report]:
    findings = read_findings(results / "findings.jsonl")
    if not findings:
        raise TraceError(
            f"{results}/findings.jsonl holds no findings; run pytest test_experiments to make some"
        )
    session = _read(results / RECORD) if (results / RECORD).exists() else {}
    of_session = session.get("model") or _model(findings[-1])
    every = [_section(path, results) for path in results.glob(f"*/{RECORD}")]
    every.sort(key=lambda section: (experiment_number(section.experiment), section.config))
    tests = results / TESTS
    reports = []
    for model in dict.fromkeys([of_session, *map(_model, findings)]):
        own = sorted((f for f in findings if _model(f) == model), key=_order)
        report = Report(
            tuple(own),
            model,
            tuple(section for section in every if section.model == model),
            root=results,
        )
        if (
            model == of_session
        ):  # of other models, pictures of configs that were run again are gone, and so is their session
            report = replace(
                report, about=session.get("about", {}), quick_look=session.get("quick_look"),
                tests=tests.read_text(encoding="utf-8") if tests.exists() else "",
            )  # fmt: skip
        reports.append(report)
    return reports


def names_of(reports: Sequence[Report]) -> list[str]:
    """What tells the reports apart: the model, and its results folder where several are of one model."""
    models = [report.model or "no model" for report in reports]
    return [
        f"{model} ({report.root})" if models.count(model) > 1 else model
        for model, report in zip(models, reports, strict=True)
    ]


def _model(finding: Finding) -> str:
    return str(finding.context.get("model", ""))


def experiment_number(experiment: str) -> tuple[int, str]:
    """For sorting: exp10 comes after exp9."""
    digits = re.search(r"\d+", experiment)
    return (int(digits[0]) if digits else 0, experiment)


def unlike_names(pictures: Sequence[Picture]) -> list[Picture]:
    """The pictures with names of their own, so that no file replaces another."""
    seen: dict[str, int] = {}
    out = []
    for picture in pictures:
        seen[picture.name] = seen.get(picture.name, 0) + 1
        name = picture.name if seen[picture.name] == 1 else f"{picture.name}-{seen[picture.name]}"
        out.append(
            Picture(name, picture.title, picture.caption, picture.alt, picture.svg, picture.png)
        )
    return out


def _order(finding: Finding) -> tuple[Any, ...]:
    """By experiment and config; the claims of one config stay in the order of their registration."""
    return (
        *experiment_number(str(finding.context.get("experiment", ""))),
        str(finding.context.get("config", "")),
    )


def _section(path: Path, results: Path) -> Section:
    record = _read(path)
    try:
        pictures = tuple(Picture(**picture) for picture in record.pop("pictures"))
        files = tuple(record.pop("files"))
        return Section(
            **record,
            pictures=pictures,
            files=files,
            folder=path.parent.relative_to(results).as_posix(),
        )
    except (KeyError, TypeError) as error:
        raise TraceError(
            f"{path} is not a report's record ({error}); run pytest test_experiments to make it again"
        ) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TraceError(
            f"cannot read {path}: {error}; delete it and run pytest test_experiments to make it again"
        ) from None
    if not isinstance(record, dict):
        raise TraceError(
            f"{path} is not a report's record; delete it and run pytest test_experiments to make it again"
        )
    return record


def _write(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        raise ResultsError(
            f"cannot write {path}: {error.strerror}; choose another folder with --results"
        ) from None
