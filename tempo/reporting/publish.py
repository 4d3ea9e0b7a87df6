"""What `tempo report` writes: the page, Markdown for a repository or a paper, and every figure as SVG and PNG."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from tempo.claims import Finding
from tempo.errors import ResultsError
from tempo.reporting.answers import TITLE, Answer, evidence, questions, scenario
from tempo.reporting.comparison import Comparison, comparison_markdown
from tempo.reporting.conclusion import just_fine, recommended_mode
from tempo.reporting.figures.drawing import Picture, save
from tempo.reporting.figures.forest import forest
from tempo.reporting.findings import SIGNS, findings_markdown, interval, markdown_cell, role
from tempo.reporting.page import ASKED, alarms_of, certainty, report_html, roles
from tempo.reporting.report import FIGURES, Report, Section, names_of
from tempo.reporting.sidebyside import side_by_side_markdown
from tempo.text import number, slug

MAIN = "findings"  # the picture that a README shows


def main_picture(report: Report, name: str = MAIN) -> Picture:
    """Every empirical claim: effect with interval, and the region in which it would hold."""
    title = "Every empirical claim" if name == MAIN else f"Every empirical claim, {report.model}"
    drawn = forest([finding for finding in report.findings if finding.kind == "empirical"], title)
    return Picture(name, drawn.title, drawn.caption, drawn.alt, drawn.svg, drawn.png)


def publish(reports: Sequence[Report], out: Path, against: Comparison | None = None) -> list[Path]:
    """Write findings.html, findings.md, findings.svg and .png, figures/, and comparison.md; the paths written.

    Of several models each has pictures of its own, whose names begin with the model's: findings-<model>.svg. Figures are those
    that sessions left in the results folders; those of an earlier publication are removed.
    """
    prefixes = _prefixes(reports)
    mains = [
        main_picture(report, f"{MAIN}-{prefix}".strip("-"))
        for report, prefix in zip(reports, prefixes, strict=True)
    ]
    texts = {
        "findings.html": report_html(*reports, against=against),
        "findings.md": report_markdown(reports, mains, prefixes),
    }
    if against:
        texts["comparison.md"] = comparison_markdown(against)
    try:
        out.mkdir(parents=True, exist_ok=True)
        written = []
        for name, text in texts.items():
            (out / name).write_text(text, encoding="utf-8")
            written.append(out / name)
        for old in [*out.glob(f"{MAIN}*"), *(out / FIGURES).glob("*")]:
            if old.suffix in (".svg", ".png"):
                old.unlink()
        for main in mains:
            written += save(main, out)
        for report, prefix in zip(reports, prefixes, strict=True):
            for section in report.sections:
                for picture in section.pictures:
                    name = figure_name(section, picture, prefix)
                    written += _copy(
                        report.root / section.folder / FIGURES, picture, out / FIGURES, name
                    )
        return written
    except OSError as error:
        raise ResultsError(
            f"cannot write to {out}: {error.strerror}; choose another folder with --out"
        ) from None


def _prefixes(reports: Sequence[Report]) -> list[str]:
    """What the file names of each model's pictures begin with: nothing if there is one model, else its name, made unlike others."""
    slugs = [slug(name) for name in names_of(reports)]
    if len(slugs) == 1:
        return [""]
    return [
        name if slugs.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(slugs, start=1)
    ]


def figure_name(section: Section, picture: Picture, prefix: str = "") -> str:
    """A file name of its own for each figure of a report."""
    return f"{prefix}-{slug(section.folder)}-{picture.name}".strip("-")


def _copy(source: Path, picture: Picture, target: Path, name: str) -> list[Path]:
    """The SVG is written from the record, the PNG copied if the session left one."""
    saved = save(Picture(name, picture.title, picture.caption, picture.alt, picture.svg), target)
    raster = source / f"{picture.name}.png"
    if raster.exists():
        shutil.copyfile(raster, target / f"{name}.png")
        saved.append(target / f"{name}.png")
    return saved


def report_markdown(
    reports: Sequence[Report], mains: Sequence[Picture], prefixes: Sequence[str]
) -> str:
    """The report as Markdown: answers, claims, figures with their captions, provenance; several models side by side first."""
    lines = [f"# {TITLE}", "", f"*{markdown_cell(', '.join(names_of(reports)))}*", ""]
    if len(reports) > 1:
        lines += [*_table([("Asked", ASKED)]), *side_by_side_markdown(reports)]
    for report, name, main, prefix in zip(reports, names_of(reports), mains, prefixes, strict=True):
        lines += [f"# {markdown_cell(name)}", ""] if len(reports) > 1 else []
        lines += _one_model(report, main, prefix, [("Asked", ASKED)] if len(reports) == 1 else [])
    return "\n".join(lines) + "\n"


def _one_model(
    report: Report, main: Picture, prefix: str, asked: list[tuple[str, str]]
) -> list[str]:
    found = report.findings
    fine, what, mode = just_fine(found), scenario(found), recommended_mode(found)
    lines = [f"**{markdown_cell(line)}**\n" for line in alarms_of(report)]
    said = f"{fine.short}. {fine.text} Scenario: {what.short}. {what.text}"
    lines += _table(
        [
            *asked,
            ("Found", said),
            ("How sure", " ".join(certainty(report))),
            ("What to do", f"{mode.short}. {mode.text}"),
        ]
    )
    lines += ["## The questions", ""]
    for answer in (fine, *questions(found), what, mode):
        lines += _answer(answer, found)
    lines += [
        "## Claims",
        "",
        markdown_cell(roles(found)),
        "",
        f"![{markdown_cell(main.title)}]({main.name}.svg)",
        "",
    ]
    lines += [markdown_cell(main.caption), "", findings_markdown(found)]
    for section in report.sections:
        lines += [
            f"## {markdown_cell(f'{section.experiment}: {section.title} ({section.config})')}",
            "",
        ]
        for picture in section.pictures:
            path = f"{FIGURES}/{figure_name(section, picture, prefix)}.svg"
            said = f"**{markdown_cell(picture.title)}.** {markdown_cell(picture.caption)}"
            lines += [f"![{markdown_cell(picture.title)}]({path})", "", said, ""]
    if report.about:
        lines += ["## Provenance", "", *_table(list(report.about.items()))]
    return lines


def _answer(answer: Answer, findings: Sequence[Finding]) -> list[str]:
    """An answer with the claims it rests on and its rule."""
    lines = [
        f"### {markdown_cell(answer.question)}",
        "",
        f"**{markdown_cell(answer.short)}.** {markdown_cell(answer.text)}",
        "",
    ]
    lines += [
        "| rests on | verdict | estimate [95 % interval] | n | control |",
        "|---|---|--:|--:|--:|",
    ]
    for claim, f in evidence(answer, findings):
        cells = (claim, "not measured in this record", "", "", "")
        if f:
            control = number(f.control_estimate) + ("" if f.control_holds else ", misbehaves")
            cells = (
                f.label,
                f"{SIGNS[f.verdict]} {f.verdict.lower()}, {role(f)}",
                interval(f),
                f"{f.n}",
                control,
            )
        lines.append("| " + " | ".join(map(markdown_cell, cells)) + " |")
    return [*lines, "", f"Rule: {markdown_cell(answer.rule)}", ""]


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    return [
        "| | |",
        "|---|---|",
        *(f"| **{markdown_cell(name)}** | {markdown_cell(said)} |" for name, said in rows),
        "",
    ]
