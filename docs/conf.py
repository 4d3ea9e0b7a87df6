"""The site: `make docs` builds it from these Markdown pages into docs/_build.

The pages are written to be read on GitHub as well. They link to files of the repository. Here such
a link becomes one within the site: to a page where the file is Markdown, else to the file itself.
"""

from __future__ import annotations

import os
import re
import shutil
import tomllib
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
COPIED = DOCS / "_copied"  # Markdown from outside docs/, as pages of the site; never committed
# Each page from outside, and where the site has it.
OUTSIDE = {
    ROOT / "CONTRIBUTING.md": COPIED / "contributing.md",
    ROOT / "CHANGELOG.md": COPIED / "changelog.md",
    ROOT / "SECURITY.md": COPIED / "security.md",
    **{page: COPIED / page.name for page in sorted((ROOT / "reports/published").glob("*.md"))},
    ROOT / "reports/published/exp16/findings.md": COPIED / "findings-exp16.md",
}
REAL = {copy: page for page, copy in OUTSIDE.items()}

metadata = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
project, release = "tempo", metadata["version"]
author = copyright = "the tempo authors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "examples"]
nitpicky = False  # types of other libraries have no page here
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "pydata_sphinx_theme"
html_title = "tempo"
html_show_sourcelink = False
# Only the reference has pages below pages.
html_sidebars = {
    "_copied/*": [],
    **{page.stem: [] for page in DOCS.glob("*.md")},
}
html_theme_options = {"navigation_depth": 2, "show_toc_level": 2, "navbar_align": "left"}

NAMED = re.compile(r"(\w+(?:, \w+)*): (\S.*)")  # what a docstring says of one argument or field
CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")  # napoleon knows two backticks only
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")


def copy_pages(app: object) -> None:
    """Pages from outside docs/ are copied in, with the figures beside them."""
    shutil.rmtree(COPIED, ignore_errors=True)
    COPIED.mkdir()
    for page, copy in OUTSIDE.items():
        shutil.copy(page, copy)


def link_within_the_site(app: object, name: str, source: list[str]) -> None:
    """Links to what lies outside docs/ are rewritten, seen from where the page really is."""
    page = DOCS / f"{name}.md"
    real = REAL.get(page, page)

    def rewritten(link: re.Match[str]) -> str:
        target = (real.parent / link[2]).resolve()
        if not target.is_relative_to(ROOT) or not target.is_file():
            return link[0]
        target = OUTSIDE.get(target, target)
        return f"{link[1]}{os.path.relpath(target, page.parent)}{link[3]}"

    source[0] = LINK.sub(rewritten, source[0])


def readable(
    app: object, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Docstrings are plain text. Here they become reStructuredText, which napoleon then reads.

    A line that hangs under another one joins it. Lines such as `title: the question` become a
    list. A bar, as in KL(p || q), is no markup.
    """
    joined: list[str] = []
    in_example = False
    for line in lines:
        in_example = bool(line.strip()) and (in_example or line.lstrip().startswith(">>>"))
        above = joined[-1] if joined else ""
        hangs = _indent(line) > _indent(above) and above.strip() and not above.endswith(":")
        if line.strip() and hangs and not in_example:
            joined[-1] += f" {line.strip()}"
        else:
            joined.append(line)
    found: list[str] = []
    for line in joined:
        if ">>>" not in line:
            line = CODE.sub(r"``\1``", line.replace("|", r"\|"))
        named = NAMED.fullmatch(line)
        in_list = bool(found) and found[-1].startswith("- **")
        if in_list and re.match(r"[a-z`]", line) and not named:  # the item goes on
            found[-1] += f" {line}"
            continue
        if found and found[-1] and line and in_list != bool(named):  # a list begins or ends
            found.append("")
        found.append(f"- **{named[1]}**: {named[2]}" if named else line)
    if what == "property" and found:  # napoleon takes what stands before a colon for a type
        found[0] = re.sub(r"^([^`:]*): ", r"\1 – ", found[0])
    lines[:] = found


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def setup(app: object) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", copy_pages)  # type: ignore[attr-defined]
    app.connect("source-read", link_within_the_site)  # type: ignore[attr-defined]
    # before napoleon, which has the usual priority of 500
    app.connect("autodoc-process-docstring", readable, priority=400)  # type: ignore[attr-defined]
