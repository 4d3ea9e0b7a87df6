"""What `tempo report` writes: the page, Markdown for a repository or a paper, the figures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tempo import files
from tempo.claims import Finding
from tempo.errors import ResultsError, SpecError
from tempo.reporting.answers import Answer, brief, evidence
from tempo.reporting.beside import figure_file, run_page, run_pages
from tempo.reporting.certainty import alarms_of, certainty, roles
from tempo.reporting.comparison import Comparison, comparison_markdown
from tempo.reporting.differences import differences_markdown
from tempo.reporting.figures.drawing import FORMATS, Picture, contents_of
from tempo.reporting.figures.forest import forest
from tempo.reporting.findings import (
    SIGNS,
    findings_markdown,
    interval,
    markdown_cell,
    markdown_row,
    rank,
)
from tempo.reporting.page import report_html
from tempo.reporting.report import FIGURES, RUNS, Report, Section, names_of
from tempo.reporting.sidebyside import side_by_side_markdown
from tempo.text import number, slug

MAIN = "findings"  # the picture that a README shows
ELSEWHERE = "choose another folder with --out"
PAGES = ("comparison.md", "findings.md", "findings.html")  # the last one is moved last
HEAD = 4096  # bytes at the begin of a page that hold its title


def publish(
    reports: Sequence[Report], out: Path, against: Comparison | None = None, format: str = "svg"
) -> list[Path]:
    """Write findings.html, findings.md, the figures, and with `against` comparison.md; the paths.

    format: of every figure, `svg` or `png`. The main one is findings.svg, the others lie in
    figures/.
    Of several models each has figures of its own, whose names hold the model's:
    findings-<model>.svg.
    Only files that the manifest of an earlier publication lists are replaced or removed, and a
    findings.html that pytest wrote. All are written aside first, and the page takes its place last.
    Raises SpecError if there is no such format, ResultsError if a file cannot be written, or if a
    file of somebody else's has the name of one.
    """
    if format not in FORMATS:
        raise SpecError(f"format={format!r}, expected one of {', '.join(FORMATS)}")
    prefixes = _prefixes(reports)
    mains = [main_picture(*each) for each in zip(reports, prefixes, strict=True)]
    pictures: list[Picture] = []
    for report, prefix in zip(reports, prefixes, strict=True):
        pictures += _figures(report, prefix, format)
    contents = run_pages(reports) | contents_of(mains, [format])
    contents |= {f"{FIGURES}/{name}": c for name, c in contents_of(pictures, [format]).items()}
    if against:
        contents["comparison.md"] = comparison_markdown(against).encode()
    contents["findings.md"] = report_markdown(reports, mains, format).encode()
    at = _addresses(reports, prefixes, format)

    def address(report: Report, name: str) -> str:
        found = at.get((id(report), name), name)
        return found if found in contents else ""

    contents["findings.html"] = report_html(*reports, against=against, address=address).encode()
    try:
        written = files.publish(out, contents, ELSEWHERE, _is_page)
    except ResultsError:
        raise
    except OSError as error:
        raise ResultsError(f"cannot write to {out}: {files.reason(error)}; {ELSEWHERE}") from None
    shown = [path for path in written if path.parent.name not in (FIGURES, RUNS)]
    return shown[::-1] + [path for path in written if path not in shown]


def _addresses(
    reports: Sequence[Report], prefixes: Sequence[str], format: str
) -> dict[tuple[int, str], str]:
    """Where the figures stand that lie elsewhere in their results folders."""
    found = {}
    for report, prefix in zip(reports, prefixes, strict=True):
        for section in report.sections:
            for picture in section.pictures:
                name = f"{FIGURES}/{figure_name(section, picture, prefix)}.{format}"
                found[id(report), figure_file(section, picture.name)] = name
    return found


def _is_page(path: Path) -> bool:
    """Whether this is a page of tempo's that no manifest lists: pytest writes one, for example."""
    if path.parent.name == RUNS and run_page(path):
        return True
    if path.name == "findings.html" and b"<title>tempo: " in path.read_bytes()[:HEAD]:
        return True
    return path.name in PAGES and (path.parent / files.MANIFEST).exists()


def main_picture(report: Report, prefix: str = "") -> Picture:
    """Every empirical claim: effect with interval, and the region in which it would hold."""
    empirical = [finding for finding in report.findings if finding.kind == "empirical"]
    title = f"Every empirical claim, {report.model}" if prefix else "Every empirical claim"
    return forest(empirical, title).named(f"{MAIN}-{prefix}".strip("-"))


def _prefixes(reports: Sequence[Report]) -> list[str]:
    """What the figures' names of each model begin with: nothing if there is one, else its name."""
    slugs = [slug(name) for name in names_of(reports)]
    if len(slugs) == 1:
        return [""]
    return [
        name if slugs.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(slugs, start=1)
    ]


def figure_name(section: Section, picture: Picture, prefix: str = "") -> str:
    """A file name of its own for each figure of a report."""
    return f"{prefix}-{slug(section.folder)}-{picture.name}".strip("-")


def _figures(report: Report, prefix: str, format: str) -> list[Picture]:
    """The sections' pictures by the names of their files; a PNG is read from the results folder."""
    found = []
    for section in report.sections:
        for picture in section.pictures:
            named = picture.named(figure_name(section, picture, prefix))
            if format == "png":
                raster = report.root / section.folder / FIGURES / f"{picture.name}.png"
                if not raster.is_file():
                    raise ResultsError(f"there is no {raster}; publish the figures as svg instead")
                content = raster.read_bytes()
                if hashlib.sha256(content).hexdigest() != section.rasters.get(picture.name):
                    raise ResultsError(
                        f"{raster} is not the figure that was recorded; publish the figures as svg "
                        "instead, or run pytest on the studies to draw it again"
                    )
                named = replace(named, png=content)
            found.append(named)
    return found


def report_markdown(
    reports: Sequence[Report], mains: Sequence[Picture], format: str = "svg"
) -> str:
    """The report as Markdown: answers, claims, figures, provenance; several models side by side.

    mains: the main picture of each report.
    """
    names, prefixes = names_of(reports), _prefixes(reports)
    title = markdown_cell(reports[0].conclusions.title)
    lines = [f"# {title}", "", f"*{markdown_cell(', '.join(names))}*", ""]
    several = len(reports) > 1
    if several:
        lines += [*_table([("Asked", reports[0].conclusions.asked)])]
        lines += side_by_side_markdown(reports) + differences_markdown(reports)
    for report, name, main, prefix in zip(reports, names, mains, prefixes, strict=True):
        lines += [f"# {markdown_cell(name)}", ""] if several else []
        lines += _one_model(report, main, prefix, format, with_question=not several)
    return "\n".join(lines) + "\n"


def _one_model(
    report: Report, main: Picture, prefix: str, format: str, with_question: bool
) -> list[str]:
    found, conclusions = report.findings, report.conclusions
    headlines = [f"{question} {short}. {text}" for question, short, text in brief(conclusions)]
    advice = [f"{answer.short}. {answer.text}" for answer in conclusions.advice]
    lines = [f"**{markdown_cell(line)}**\n" for line in alarms_of(report)]
    rows = [
        ("Asked", conclusions.asked if with_question else ""),
        ("Found", " ".join(line.strip() for line in headlines)),
        ("How sure", " ".join(certainty(report))),
        ("What to do", " ".join(advice)),
    ]
    lines += _table(rows)
    lines += ["## The questions", ""] if conclusions.explained else []
    for answer in conclusions.explained:
        lines += _answer(answer, found)
    lines += ["## Claims", "", markdown_cell(roles(found)), ""]
    lines += _figure(main, f"{main.name}.{format}")
    lines += [findings_markdown(found)]
    for section in report.sections:
        title = f"{section.experiment}: {section.title} ({section.config})"
        lines += [f"## {markdown_cell(title)}", ""]
        for picture in section.pictures:
            name = f"{FIGURES}/{figure_name(section, picture, prefix)}.{format}"
            lines += _figure(picture, name)
    if report.about:
        lines += ["## Provenance", "", *_table(list(report.about.items()))]
    return lines


def _figure(picture: Picture, path: str) -> list[str]:
    title, caption = markdown_cell(picture.title), markdown_cell(picture.caption)
    return [f"![{title}]({path})", "", f"**{title}.** {caption}", ""]


def _answer(answer: Answer, findings: Sequence[Finding]) -> list[str]:
    """An answer with the claims behind it and its rule."""
    said = f"**{markdown_cell(answer.short)}.** {markdown_cell(answer.text)}"
    lines = [f"### {markdown_cell(answer.question)}", "", said, ""]
    lines += ["| rests on | verdict | estimate [95 % interval] | n | control |"]
    lines += ["|---|---|--:|--:|--:|"]
    for claim, f in evidence(answer, findings):
        if f is None:
            lines.append(markdown_row(claim, "not measured in this record", "", "", ""))
            continue
        verdict = f"{SIGNS[f.verdict]} {f.verdict.lower()}, {rank(f)}"
        control = number(f.control_estimate) + ("" if f.control_holds else ", misbehaves")
        lines.append(markdown_row(f.label, verdict, interval(f), str(f.n), control))
    lines += ["", f"Rule: {markdown_cell(answer.rule)}"] if answer.rule else []
    return [*lines, ""]


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    """A table of names and what is said of each; rows that say nothing are left out."""
    shown = [(markdown_cell(name), markdown_cell(said)) for name, said in rows if said]
    lines = [f"| **{name}** | {said} |" for name, said in shown]
    return ["| | |", "|---|---|", *lines, ""]
