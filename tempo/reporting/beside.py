"""Files that a page links to: runs to walk through, and figures that it does not hold itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from tempo.reporting.report import FIGURES, RUNS, Report, Section
from tempo.viewing.page import is_page

# From a file of a report's results folder to its address, relative to the page that links to it.
# It is empty where there is no such file, so that no link is dead.
Address = Callable[[Report, str], str]


def nowhere(report: Report, name: str) -> str:
    """Of a page that stands alone."""
    return ""


def of_runs(address: Address) -> Address:
    """The addresses of runs alone, for a page that holds all of its figures."""
    return lambda report, name: address(report, name) if name.startswith(f"{RUNS}/") else ""


def from_page(page: Path, runs: Mapping[str, bytes]) -> Address:
    """The addresses of these runs beside a page at this path, and of figures on record."""

    def address(report: Report, name: str) -> str:
        if name in runs:
            return name
        path = report.root / name
        if name.startswith(f"{RUNS}/") or not path.is_file():
            return ""
        try:
            found = os.path.relpath(os.path.realpath(path), os.path.realpath(page.parent))
        except ValueError:  # on another drive
            return ""
        return quote(Path(found).as_posix())

    return address


def run_pages(reports: Sequence[Report]) -> dict[str, bytes]:
    """The pages of runs that the reports link to, by their paths below a page's folder."""
    found = {}
    for report in reports:
        for section in report.sections:
            name = run_file(section)
            if section.run and (content := run_page(report.root / name)):
                found[name] = content
    return found


def run_page(path: Path) -> bytes:
    """The page of a run; empty if there is none, or if it may run a script that is not tempo's."""
    try:
        content = path.read_bytes()
    except OSError:
        return b""
    return content if is_page(content) else b""


def figure_file(section: Section, name: str) -> str:
    """The path of a recorded figure below its results folder."""
    return f"{section.folder}/{FIGURES}/{name}.svg"


def run_file(section: Section) -> str:
    """The path of the run on a section's own prompt, below its results folder or beside a page."""
    return f"{RUNS}/{section.run}"
