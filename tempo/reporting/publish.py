"""What `tempo report` writes: the page, Markdown for a repository or a paper, and every figure as SVG and PNG."""

from __future__ import annotations

import shutil
from pathlib import Path

from tempo.errors import ResultsError
from tempo.reporting.answers import TITLE, just_fine, questions, recommended_mode, scenario
from tempo.reporting.comparison import Comparison, comparison_markdown
from tempo.reporting.figures.drawing import Picture, save
from tempo.reporting.figures.forest import forest
from tempo.reporting.findings import findings_markdown, markdown_cell
from tempo.reporting.page import ASKED, alarms_of, certainty, report_html
from tempo.reporting.report import FIGURES, Report, Section
from tempo.reporting.text import slug

MAIN = "findings"  # the picture that a README shows


def main_picture(report: Report) -> Picture:
    """Every empirical claim: effect with interval, and the region in which it would hold."""
    drawn = forest([finding for finding in report.findings if finding.kind == "empirical"], "Every empirical claim")
    return Picture(MAIN, drawn.title, drawn.caption, drawn.alt, drawn.svg, drawn.png)


def publish(report: Report, results: Path, out: Path, against: Comparison | None = None) -> list[Path]:
    """Write findings.html, findings.md, findings.svg and .png, figures/, and comparison.md; the paths written.

    Figures are those that the session left in `results`; those of an earlier publication are removed.
    """
    main = main_picture(report)
    texts = {"findings.html": report_html(report, against), "findings.md": report_markdown(report, main)}
    if against:
        texts["comparison.md"] = comparison_markdown(against)
    try:
        out.mkdir(parents=True, exist_ok=True)
        written = []
        for name, text in texts.items():
            (out / name).write_text(text, encoding="utf-8")
            written.append(out / name)
        written += save(main, out)
        for old in (out / FIGURES).glob("*") if (out / FIGURES).is_dir() else ():
            if old.suffix in (".svg", ".png"):
                old.unlink()
        for section in report.sections:
            for picture in section.pictures:
                written += _copy(results / section.folder / FIGURES, picture, out / FIGURES, figure_name(section, picture))
        return written
    except OSError as error:
        raise ResultsError(f"cannot write to {out}: {error.strerror}; choose another folder with --out") from None


def figure_name(section: Section, picture: Picture) -> str:
    """A file name of its own for each figure of a report."""
    return f"{slug(section.folder)}-{picture.name}"


def _copy(source: Path, picture: Picture, target: Path, name: str) -> list[Path]:
    """The SVG is written from the record, the PNG copied if the session left one."""
    saved = save(Picture(name, picture.title, picture.caption, picture.alt, picture.svg), target)
    raster = source / f"{picture.name}.png"
    if raster.exists():
        shutil.copyfile(raster, target / f"{name}.png")
        saved.append(target / f"{name}.png")
    return saved


def report_markdown(report: Report, main: Picture) -> str:
    """The report as Markdown: answers, claims, figures with their captions, provenance."""
    found, mode = scenario(report.findings), recommended_mode(report.findings)
    lines = [f"# {TITLE}", "", f"*{markdown_cell(report.model)}*", ""]
    lines += [f"**{markdown_cell(line)}**\n" for line in alarms_of(report)]
    said = f"{found.short}. {found.text} {just_fine(report.findings).text}"
    brief = ("Asked", ASKED), ("Found", said), ("How sure", " ".join(certainty(report))), ("What to do", mode.text)
    lines += ["| | |", "|---|---|", *(f"| **{name}** | {markdown_cell(said)} |" for name, said in brief), ""]
    lines += ["## The questions", "", "| question | answer | the data | rule |", "|---|---|---|---|"]
    for answer in (*questions(report.findings), found, mode):
        cells = (answer.question, answer.short, answer.text, answer.rule)
        lines.append("| " + " | ".join(map(markdown_cell, cells)) + " |")
    lines += ["", "## Claims", "", f"![{markdown_cell(main.title)}]({MAIN}.svg)", "", markdown_cell(main.caption), ""]
    lines += [findings_markdown(report.findings)]
    for section in report.sections:
        lines += [f"## {markdown_cell(f'{section.experiment}: {section.title} ({section.config})')}", ""]
        for picture in section.pictures:
            path = f"{FIGURES}/{figure_name(section, picture)}.svg"
            said = f"**{markdown_cell(picture.title)}.** {markdown_cell(picture.caption)}"
            lines += [f"![{markdown_cell(picture.title)}]({path})", "", said, ""]
    if report.about:
        lines += ["## Provenance", "", "| | |", "|---|---|"]
        lines += [f"| {markdown_cell(key)} | {markdown_cell(value)} |" for key, value in report.about.items()]
    return "\n".join(lines) + "\n"
