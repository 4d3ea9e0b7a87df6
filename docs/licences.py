"""Writes docs/licences.md: what tempo needs, and under which licence each package is.

Run by `make lock`. It reads the metadata of what is installed in the environment of `make setup`.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

DOCS = Path(__file__).resolve().parent
LOCKS = ("requirements.txt", "requirements-torch-cpu.txt")
INTRODUCTION = """# Licences of the packages

tempo is under the MIT licence. `make setup` installs these packages, by hash. The table is written
by `make lock` from what each package says about itself.

| package | version | licence |
|---|---|---|
"""
# Packages that are only installed on other systems than the one where the table was made.
ELSEWHERE = "only on other systems"


def pins() -> dict[str, str]:
    """{package: version} of the lock."""
    text = "".join((DOCS.parent / name).read_text(encoding="utf-8") for name in LOCKS)
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", text, flags=re.MULTILINE))


def licence(package: str) -> str:
    """The licence that the installed package states, in a few words."""
    try:
        found = metadata(package)
    except PackageNotFoundError:
        return ELSEWHERE
    classifiers = [
        line.rpartition(":: ")[2]
        for line in found.get_all("Classifier") or []
        if line.startswith("License ::") and line != "License :: OSI Approved"
    ]
    stated = (found.get("License") or "").strip().partition("\n")[0]
    return found.get("License-Expression") or ", ".join(classifiers) or stated[:60] or "not stated"


def page() -> str:
    """The page as Markdown."""
    rows = [f"| {name} | {version} | {licence(name)} |\n" for name, version in pins().items()]
    return INTRODUCTION + "".join(rows)


if __name__ == "__main__":
    (DOCS / "licences.md").write_text(page(), encoding="utf-8")
