"""The report as records: what a session leaves in its results folder, to make reports from.

`<results>/findings.jsonl` holds the findings. `<results>/report.json` holds what the session knows
beside them: provenance, its tests, and the conclusions about each model.
`<results>/<config>/report.json` holds the pictures and evidence of one config. A page made from
these is the same to the byte, whoever makes it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from tempo import files
from tempo.claims import Finding
from tempo.errors import ResultsError, TempoError, TraceError
from tempo.parsing import seal
from tempo.records import AGAIN, plain, read_findings, read_record, validated
from tempo.reporting.answers import Conclusions, verdicts_alone
from tempo.reporting.figures.drawing import Picture, check_svg, contents_of
from tempo.text import slug

RECORD = "report.json"
ELSEWHERE = "choose another folder with --results"
FIGURES = "figures"
RUNS = "runs"  # folder of pages to walk through runs, below a results folder
_PICTURE = ("name", "title", "caption", "alt", "svg", "csv")


@dataclass(frozen=True)
class PromptRow:
    """One prompt of a config, and the sets that its free runs chose.

    sets: of each visibility, the members' texts of each set; empty where they are not on record.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    text: str
    category: str = ""
    sets: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Values:
    """What a claim's statistic was on each prompt of its config, and that of its control.

    None stands for a prompt that has no value. Truth is 1. Of a map it is the cell of the estimate.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    claim: tuple[float | None, ...]
    control: tuple[float | None, ...]


@dataclass(frozen=True)
class Section:
    """What one config of an experiment shows beside its findings.

    config: the name of its file. settings: its values. text: the sets of the config's own prompt.
    files: raw results beside this record. problem: why there are no pictures.
    rasters: a hash of the PNG of each picture, by its name.
    folder: where the record lies, under the results folder.
    prompts: those that the claims were judged on. values: by claim, one for each of the prompts.
    run: the name of a page of the run on the config's own prompt, in the folder `runs`.
    drawn_from: a hash of all that the pictures were drawn from.
    What an older tempo did not record of these is empty.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    experiment: str
    title: str
    config: str
    model: str
    num_prompts: Annotated[int, Field(ge=0)]
    pictures: tuple[Picture, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    analysis: str = ""
    files: tuple[str, ...] = ()
    fingerprint: str = ""
    problem: str = ""
    rasters: Mapping[str, str] = field(default_factory=dict)
    folder: str = ""
    prompts: tuple[PromptRow, ...] = ()
    values: Mapping[str, Values] = field(default_factory=dict)
    run: Annotated[str, Field(pattern=r"^([0-9a-f]{16}\.html)?$")] = ""
    drawn_from: str = ""

    @property
    def anchor(self) -> str:
        return f"tempo-{slug(self.config)}"


@dataclass(frozen=True)
class TestRow:
    """One test of a session: how it ended (`passed`, `failed`, ...), and the verdict of its claim.

    seconds: how long it took. message: why it failed or was skipped.
    """

    __test__: ClassVar[bool] = False  # pytest collects classes called Test...
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    outcome: str
    verdict: str = ""
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    message: str = ""


@dataclass(frozen=True)
class Session:
    """What a session of one model knows beside its findings and sections.

    about: provenance, by name. conclusions: None if its studies draw none.
    suite: the prompts in a phrase, such as `162 prompts in English of 11 categories
    (prompts.yaml)`.
    quick_look: of how many prompts, if it measured only a part of the suite.
    """

    model: str
    about: Mapping[str, str]
    conclusions: Conclusions | None = None
    suite: str = ""
    quick_look: int | None = None
    tests: Sequence[TestRow] = ()


@dataclass(frozen=True)
class Report:
    """All that a report shows of one model; `root` is the results folder.

    outdated: whether findings were added after the recorded conclusions, which are then left out.
    damaged: what could not be read of the results folder, and so is missing.
    """

    findings: tuple[Finding, ...]
    model: str = ""
    sections: tuple[Section, ...] = ()
    about: Mapping[str, str] = field(default_factory=dict)
    quick_look: int | None = None
    suite: str = ""
    tests: tuple[TestRow, ...] = ()
    recorded: Conclusions | None = None
    outdated: bool = False
    damaged: tuple[str, ...] = ()
    root: Path = Path()

    @property
    def conclusions(self) -> Conclusions:
        """Those on record; if there are none, how many claims have which verdict."""
        return self.recorded or verdicts_alone(self.findings)


class _Record(BaseModel):
    """The session's `report.json`. What an older tempo did not write is empty."""

    model_config = ConfigDict(extra="forbid")

    model: str = ""
    about: dict[str, str] = {}
    suite: str = ""
    quick_look: Annotated[int, Field(ge=1)] | None = None
    tests: tuple[TestRow, ...] = ()
    conclusions: dict[str, Conclusions] = {}  # by model
    drawn_from: dict[str, str] = {}  # by model: a hash of the findings behind its conclusions


def write_section(results: Path, section: Section) -> None:
    """Keep a section: `report.json` and its pictures as SVG and PNG, in the section's folder.

    Pictures of an earlier session are removed. What else lies there stays.
    """
    folder = results / section.folder
    pictures = unlike_names(section.pictures)
    record = asdict(section)
    del record["folder"]
    record["pictures"] = [
        {name: getattr(picture, name) for name in _PICTURE} for picture in pictures
    ]
    record["rasters"] = {
        picture.name: hashlib.sha256(picture.png).hexdigest() for picture in pictures
    }
    contents = {f"{FIGURES}/{name}": content for name, content in contents_of(pictures).items()}
    contents[RECORD] = _text(record).encode()
    try:
        files.publish(folder, contents, ELSEWHERE, is_replaceable=lambda path: True)
    except OSError as error:
        raise _cannot_write(folder, error) from None


def drawn_before(results: Path, folder: str, drawn_from: str) -> tuple[Picture, ...] | None:
    """The pictures of a section on disk, if they were drawn from the same and are whole."""
    path = results / folder / RECORD
    try:
        section = _section(path, results)
        if section.drawn_from != drawn_from or section.problem:
            return None
        found = []
        for picture in section.pictures:
            png = (path.parent / FIGURES / f"{picture.name}.png").read_bytes()
            if hashlib.sha256(png).hexdigest() != section.rasters.get(picture.name):
                return None
            found.append(replace(picture, png=png))
        return tuple(found)
    except (OSError, ValueError, TempoError):  # they are drawn again
        return None


def write_session(results: Path, session: Session) -> str:
    """Keep what a session knows. Conclusions about other models in the same folder stay.

    Returns a line if an earlier record was damaged, so that those are lost; else an empty text.
    """
    lost = ""
    try:
        before = _session(results)
    except TraceError as error:
        before, lost = _Record(), f"conclusions about other models are lost: {error}"
    conclusions, drawn_from = dict(before.conclusions), dict(before.drawn_from)
    conclusions.pop(session.model, None)
    if session.conclusions:
        conclusions[session.model] = session.conclusions
        drawn_from[session.model] = _digest(findings_of(results, session.model))
    record = asdict(session) | {
        "conclusions": {model: drawn.record() for model, drawn in conclusions.items()},
        "drawn_from": {model: drawn_from.get(model, "") for model in conclusions},
    }
    try:
        files.write(results / RECORD, _text(record))
    except OSError as error:
        raise _cannot_write(results / RECORD, error) from None
    return lost


def findings_of(results: Path, model: str) -> list[Finding]:
    """The findings about one model in a results folder, in a report's order: to conclude from."""
    path = results / "findings.jsonl"
    found = read_findings(path).findings if path.exists() else []
    return sorted((f for f in found if _model(f) == model), key=_order)


def read_report(results: Path) -> Report:
    """The report of a folder's last session, or if none is on record of its last finding.

    Raises TraceError if the folder has no findings. What is damaged is left out, and told in
    `damaged`.
    """
    return read_reports([results])[0]


def read_reports(folders: Sequence[Path]) -> list[Report]:
    """A report for each model of each results folder, that of the folder's last session first.

    Raises TraceError if a folder has no findings. What is damaged is left out, and told.
    """
    return [report for folder in folders for report in _of_folder(folder)]


def _of_folder(results: Path) -> list[Report]:
    findings, damaged = read_findings(results / "findings.jsonl")
    if not findings:
        raise TraceError(
            f"{results}/findings.jsonl holds no findings{_beside(damaged)}; run pytest on the "
            "studies to make some"
        )
    session = _Record()
    try:
        session = _session(results)
    except TraceError as error:
        damaged.append(str(error))
    of_session = session.model or _model(findings[-1])
    sections = []
    for path in sorted(results.glob(f"*/{RECORD}")):
        try:
            sections.append(_section(path, results))
        except TraceError as error:
            damaged.append(str(error))
    sections.sort(key=lambda section: (experiment_number(section.experiment), section.config))
    reports = []
    for model in dict.fromkeys([of_session, *map(_model, findings)]):
        own = sorted((f for f in findings if _model(f) == model), key=_order)
        known = session.conclusions.get(model)
        outdated = known is not None and session.drawn_from.get(model) != _digest(own)
        # A folder keeps one session. Of other models it is gone, and so are the pictures of configs
        # that were run again.
        last = session if model == of_session else _Record()
        report = Report(
            findings=tuple(own),
            model=model,
            sections=tuple(section for section in sections if section.model == model),
            about=last.about,
            quick_look=last.quick_look,
            suite=last.suite,
            tests=last.tests,
            recorded=None if outdated else known,
            outdated=outdated,
            damaged=tuple(damaged),
            root=results,
        )
        reports.append(report)
        damaged = []  # said once a folder
    return reports


def _beside(damaged: Sequence[str]) -> str:
    return f" that are whole ({damaged[0]})" if damaged else ""


def names_of(reports: Sequence[Report]) -> list[str]:
    """What tells the reports apart: the model, and its folder where several are of one model."""
    models = [report.model or "no model" for report in reports]
    return [
        f"{model} ({report.root})" if models.count(model) > 1 else model
        for model, report in zip(models, reports, strict=True)
    ]


def experiment_number(experiment: str) -> tuple[int, str]:
    """For sorting: a name that ends in 10 comes after one that ends in 9.

    >>> sorted(["b10", "b9", "entropy"], key=experiment_number)
    ['entropy', 'b9', 'b10']
    """
    digits = re.search(r"\d+", experiment)
    return (int(digits[0]) if digits else 0, experiment)


def unlike_names(pictures: Sequence[Picture]) -> list[Picture]:
    """The pictures with names of their own, so that no file replaces another."""
    seen: dict[str, int] = {}
    out = []
    for picture in pictures:
        seen[picture.name] = seen.get(picture.name, 0) + 1
        number = seen[picture.name]
        out.append(picture if number == 1 else picture.named(f"{picture.name}-{number}"))
    return out


def _model(finding: Finding) -> str:
    return str(finding.context.get("model", ""))


def _order(finding: Finding) -> tuple[Any, ...]:
    """By experiment and config; claims of one config stay in the order of registration."""
    experiment = experiment_number(str(finding.context.get("experiment", "")))
    return (*experiment, str(finding.context.get("config", "")))


def _digest(findings: Sequence[Finding]) -> str:
    """A hash of the findings: whether conclusions were drawn from these."""
    records = [plain(finding.record()) for finding in findings]
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()[:16]


def _session(results: Path) -> _Record:
    path = results / RECORD
    return validated(_Record, read_record(path), str(path)) if path.exists() else _Record()


def _section(path: Path, results: Path) -> Section:
    folder = path.parent.relative_to(results).as_posix()
    section = validated(Section, {**read_record(path), "folder": folder}, str(path))
    for picture in section.pictures:
        # The name becomes that of a file.
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,99}", picture.name):
            raise TraceError(
                f"{path} names a picture {picture.name!r:.60}; expected lower-case words joined by "
                "hyphens, so that it stays in its folder"
            )
        check_svg(picture.svg, str(path))
    for claim, values in section.values.items():
        if not len(values.claim) == len(values.control) == len(section.prompts):
            raise TraceError(
                f"{path} has {len(values.claim)} values of {claim!r:.60} for "
                f"{len(section.prompts)} prompts; {AGAIN}"
            )
    return section


def _text(record: object) -> str:
    return json.dumps(seal(plain(record)), indent=1)


def _cannot_write(path: Path, error: OSError) -> ResultsError:
    """What to say of a record that cannot be written; what was refused in words stays as it is."""
    if isinstance(error, ResultsError):
        return error
    return ResultsError(f"cannot write {path}: {files.reason(error)}; {ELSEWHERE}")
