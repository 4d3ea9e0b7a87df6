"""What a session leaves behind: records of each config and of itself, the report, a summary."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shlex
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import tempo
from tempo import files
from tempo.claims import Finding
from tempo.errors import ResultsError
from tempo.harness.evidence import Evidence, Sets
from tempo.harness.ownprompt import write_run
from tempo.harness.plan import Plan
from tempo.harness.plugin import verdict_of
from tempo.harness.store import Store
from tempo.records import plain
from tempo.reporting import report as records
from tempo.reporting.answers import headline_lines, verdicts_alone
from tempo.reporting.beside import from_page, run_pages
from tempo.reporting.findings import BLIND, findings_summary, findings_table
from tempo.reporting.page import report_html
from tempo.statistics import SEED
from tempo.text import escaped

if TYPE_CHECKING:
    from tempo.harness.session import Session

COLOURS = {
    "SUPPORTED": "green",
    "REFUTED": "yellow",
    "INCONCLUSIVE": "purple",
    "INAPPLICABLE": "white",
}


def write(session: Session) -> list[str]:
    """Write records, report and summary; what went wrong with single pictures, in lines.

    Raises ResultsError if something cannot be written: what was there before is whole.
    """
    evidence, option = session.gathered, session.config.option
    if not evidence.findings:  # nothing was found out, so an earlier report stays
        return []
    problems: list[str] = []
    sections = [_section(evidence, plan, problems) for plan in evidence.plans]
    for section in sections:
        records.write_section(evidence.results, section)
    session.conclusions, inconclusive = _conclude(session)
    problems += inconclusive
    lost = records.write_session(
        evidence.results,
        records.Session(
            model=evidence.lm.name,
            about=_about(session, evidence),
            conclusions=session.conclusions,
            suite=evidence.described(),
            quick_look=option.prompts,
            tests=tuple(map(_row, session.tests)),
        ),
    )
    reports = records.read_reports([evidence.results])
    damaged = [line for report in reports for line in report.damaged]
    session.notices[:0] = [lost, *damaged] if lost else damaged
    runs = run_pages(reports)
    for name, content in runs.items():
        _write(option.findings.parent / name, "--findings", content)
    address = from_page(option.findings, runs)
    _write(option.findings, "--findings", report_html(*reports, address=address))
    unjudged = [f"{id} ({name}) could not be judged" for name, id in evidence.unjudged]
    failed = [f"{name} could not be measured: {why}" for name, why in evidence.failures.items()]
    found = [finding for _, finding in session.asked]
    wrong = [*failed, *unjudged, *session.failures]
    summary = findings_summary(found, wrong, session.notices)
    if option.summary:
        _write(option.summary, "--summary", summary)
    if job := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            files.append(job, summary.encode())  # GitHub's steps share one file
        except OSError as error:
            problems.append(f"no summary in {job}: {files.reason(error)}")
    for section in sections:
        if section.problem and section.config not in evidence.inapplicable:
            problems.append(f"no pictures of {section.config}: {section.problem}")
    return problems


def _row(report: Any) -> records.TestRow:
    """A test's outcome as a row of the report."""
    text = str(report.longrepr) if report.failed else ""
    return records.TestRow(report.nodeid, report.outcome, verdict_of(report), report.duration, text)


def _conclude(session: Session) -> tuple[Any, list[str]]:
    """What all findings of this model on record say, by the rules of whoever wrote the studies.

    Without rules it is None. Rules that fail take no finding with them: that is said in a line.
    """
    own = records.findings_of(session.gathered.results, session.gathered.lm.name)
    try:
        return session.config.hook.pytest_tempo_conclusions(findings=own), []
    except Exception as error:
        return None, [f"no conclusions: {type(error).__name__}: {error}"]


def _run(evidence: Evidence, plan: Plan, problems: list[str]) -> str:
    """The page of the run on the config's own prompt; what failed is added to `problems`."""
    try:
        return write_run(evidence, plan)
    except Exception as error:
        problems.append(f"no run of {plan.name} to walk through: {type(error).__name__}: {error}")
        return ""


def _section(evidence: Evidence, plan: Plan, problems: list[str]) -> records.Section:
    """What a config shows in the report; a picture that fails takes no finding with it."""
    store, every = evidence.store(plan), evidence.cases.get(plan.name, [])
    text = analysis = drawn_from = ""
    cases = [case for case in every if case is not None]
    pictures: list[Any] = []
    problem = evidence.failures.get(plan.name, "")
    if why := evidence.inapplicable.get(plan.name):
        problem = f"not applicable: {why}"
    if not problem:
        try:
            drawn_from = _drawn_from(evidence, plan, cases, store)
            known = records.drawn_before(evidence.results, plan.folder, drawn_from)
            if known is not None:
                pictures = list(known)
            elif plan.study.draw:
                pictures = list(plan.study.draw(store, cases))
            text, analysis = _sets_of(store), _analysis_of(store)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
    judged = [] if problem else evidence.judged.get(plan.name, [])
    return records.Section(
        prompts=tuple(
            records.PromptRow(prompt.text, prompt.category, _frozen(sets))
            for prompt, sets in judged
        ),
        values=_values(evidence, plan) if judged else {},
        experiment=plan.study.name,
        title=plan.study.title,
        config=plan.name,
        model=evidence.lm.name,
        num_prompts=len(every),
        pictures=tuple(pictures),
        settings=plan.config.model_dump(mode="json", exclude={"suite"}),
        text=text,
        analysis=analysis,
        files=_files_of(store),
        fingerprint=evidence.fingerprints[plan.study.name],
        problem=problem,
        folder=plan.folder,
        run="" if problem else _run(evidence, plan, problems),
        drawn_from=drawn_from,
    )


def _drawn_from(evidence: Evidence, plan: Plan, cases: list[Any], store: Store) -> str:
    """A hash of what pictures show and of the code that draws them: the same is drawn once."""
    raw = {name: store.sha256(name) for name in _files_of(store)}
    made = [evidence.fingerprints[plan.study.name], version("matplotlib"), raw, plain(cases)]
    digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode())
    digest.update(_code())
    return digest.hexdigest()


@cache
def _code() -> bytes:
    """A hash of the code of tempo."""
    digest = hashlib.sha256()
    for path in sorted(Path(tempo.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.digest()


def _frozen(sets: Sets) -> dict[str, tuple[tuple[str, ...], ...]]:
    return {mode: tuple(map(tuple, of_mode)) for mode, of_mode in sets.items()}


def _values(evidence: Evidence, plan: Plan) -> dict[str, records.Values]:
    """Of each finding of a config, the statistic and its control on each prompt."""
    cases, found = evidence.cases[plan.name], {}
    for claim in plan.claims:
        finding = evidence.finding(plan, claim)
        if isinstance(finding, Finding):
            cell = tuple(finding.details.get("cell", ()))
            found[claim.id] = records.Values(
                tuple(_value(claim.claim.values(case), cell) for case in cases),
                tuple(_value(claim.claim.control(case), cell) for case in cases),
            )
    return found


def _value(value: Any, cell: tuple[int, ...]) -> float | None:
    """A statistic as a number of six digits: of a map the cell, of the whole map the mean."""
    if value is None:
        return None
    values = np.asarray(value, np.float64)
    one = float(values[cell] if values.ndim and cell else values.mean())
    return float(f"{one:.6g}") if math.isfinite(one) else None


def _sets_of(store: Store) -> str:
    """The sets of the own prompt, if the study kept its log."""
    if not (store.folder / "generation_log.json").exists():
        return ""
    return str(store.load_json("generation_log")["runs"][0]["text"])


def _analysis_of(store: Store) -> str:
    """The study's own notes without their manifest."""
    if not (store.folder / "analysis.txt").exists():
        return ""
    return store.load_text("analysis")


def _files_of(store: Store) -> tuple[str, ...]:
    """The names of the raw results."""
    others = (records.RECORD, records.FIGURES)
    paths = store.folder.iterdir() if store.folder.is_dir() else ()
    names = [path.name for path in paths if path.name not in others]
    return tuple(sorted(name for name in names if not name.startswith(".")))


def _about(session: Session, evidence: Evidence) -> dict[str, str]:
    """Provenance for the end of the report."""
    lm, made = evidence.lm, evidence.lm.provenance()
    numbers = sorted({len(cases) for cases in evidence.cases.values()})
    number = session.config.getoption("prompts")
    quick = f" (a quick look: --prompts {number})" if number else ""
    versions = {"tempo": tempo.__version__, **made["versions"]}
    fingerprints = ", ".join(f"{name} {value}" for name, value in evidence.fingerprints.items())
    weights = f"weights sha256 {evidence.model_sha256}"
    return {
        "Model": f"{lm.name}, {made['dtype']} on {made['device']}, {weights}",
        "Prompts": f"{', '.join(map(str, numbers))} a config{quick}",
        "Software": ", ".join(f"{name} {number}" for name, number in versions.items()),
        "Machine": f"{platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, {platform.system()}",
        "Seed": f"{SEED} (permutation and bootstrap; decoding draws no random numbers)",
        "Command": shlex.join(["pytest", *session.config.invocation_params.args]),
        "Fingerprint": f"{fingerprints} (weights, versions, code; other cases were not used)",
        "Time": f"evidence gathered in {evidence.seconds:.0f} s "
        f"({evidence.num_reused} cases were on disk already)",
        "Made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _write(path: Path, option: str, text: str | bytes) -> None:
    try:
        files.write(path, text)
    except OSError as error:
        raise ResultsError(
            f"cannot write {path}: {files.reason(error)}; choose another file with {option}. "
            "What was measured is kept: 'tempo report' makes the page again"
        ) from None


def summarise(session: Session, terminal: Any) -> None:
    """The findings table, what the data say, and where the rest is."""
    evidence, option = session.gathered, session.config.option
    if not evidence.findings:
        return
    terminal.section("findings")
    for line in findings_table(evidence.findings, terminal._tw.fullwidth):
        terminal.write_line(line, **_colour(line))
    for line in _not_applicable(evidence):
        terminal.write_line(escaped(line))
    for problem in session.report_problems:
        terminal.write_line(f"tempo: {escaped(problem)}", red=True)
    for line in headline_lines(session.conclusions or verdicts_alone(evidence.findings)):
        terminal.write_line(escaped(line))
    for line in session.notices[:1]:
        more = len(session.notices) - 1
        others = f" (and {more} more)" if more else ""
        terminal.write_line(f"tempo: {escaped(line)}{others}")
    terminal.write_line(f"raw results: {evidence.results}/   report: {option.findings}")


def _not_applicable(evidence: Evidence) -> list[str]:
    """Why claims cannot be judged on this model: a line for each reason, with what it holds for."""
    by_reason: dict[str, list[str]] = {}
    for f in evidence.findings:
        if f.verdict == "INAPPLICABLE":
            whole = f.context["config"] in evidence.inapplicable
            by_reason.setdefault(f.reason, []).append(f.context["experiment"] if whole else f.claim)
    return [f"{', '.join(dict.fromkeys(of))}: {why}" for why, of in by_reason.items()]


def _colour(line: str) -> dict[str, bool]:
    """Of a line of the findings table; pytest leaves colours off where there is no terminal."""
    if line.endswith(BLIND):
        return {"red": True, "bold": True}
    first = line.split()[0]
    return {COLOURS[first]: True} if first in COLOURS else {}
