"""The documentation is true: its code runs, its links lead somewhere, its names exist."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from typer.main import get_command

import tempo
from tempo.harness import StudyConfig, plugin
from tempo.spec import (
    CAPTURES,
    POSITIONS,
    READOUTS,
    VISIBILITIES,
    WEIGHTINGS,
    IsolatedMass,
    PruneBy,
)
from tests.documents import blocks_of, missing_lines

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [
    *sorted(path for path in DOCS.rglob("*.md") if not path.parent.name.startswith("_")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
LONGEST_LINE = 100
LONGEST_README = 120


def named(page):
    return str(page.relative_to(ROOT))


def text(page):
    return (ROOT / page).read_text(encoding="utf-8")


def run_page(page, languages, folder):
    """What is not as the page says, when its blocks are run in a folder."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CI", "GITHUB_STEP_SUMMARY")
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.documents", str(page), languages],
        cwd=folder,
        env=inherited | {"PYTHONPATH": str(ROOT), "COLUMNS": "80", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# --- what the pages tell to do


def test_the_tutorial_runs_as_it_stands(tmp_path):
    assert run_page(DOCS / "tutorial.md", "sh,python", tmp_path) == []


def test_the_page_on_viewing_runs_as_it_stands(tmp_path):
    assert run_page(DOCS / "viewing.md", "python", tmp_path) == []


# `real` makes sure that the model is there.
@pytest.mark.usefixtures("real")
@pytest.mark.parametrize(
    ("page", "languages"), [("README.md", "console,python"), ("docs/library.md", "python")]
)
def test_the_code_for_the_real_model_runs_as_it_stands(page, languages, tmp_path):
    assert run_page(ROOT / page, languages, tmp_path) == []


def test_the_code_about_interpretability_runs_as_it_stands(tmp_path):
    assert run_page(DOCS / "interpretability.md", "python", tmp_path) == []


BROKEN = """\
Save this as `test_x.py`, which holds no study:

```python
def test_x():
    print("done")
```

```sh
pytest . -s
```

```text
donne
...
...1 passed in ...
```

```python
print(1 + 1)  # 3
```

```sh
pytest . --no-such-option
```

<!-- not run by the tests -->
```sh
pytest . --no-such-option-either
```
"""


def test_a_page_that_is_not_true_is_told(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(BROKEN)
    wrong = run_page(page, "sh,python", tmp_path)
    assert [problem.partition(":")[0] for problem in wrong] == [
        "page.md, line 12",
        "page.md, line 18",
        "page.md, line 22",
    ]
    assert "not printed: 'donne'" in wrong[0]
    assert "--no-such-option ends with 4" in wrong[2]


@pytest.mark.parametrize(
    ("expected", "found", "is_same"),
    [
        ("n  12", "n 12", True),
        ("n 12", "n 13", False),
        ("0.25 [0.1, 0.4]", "0.26 [0.1, 0.4]", True),  # one unit of the last place
        ("0.25 [0.1, 0.4]", "0.27 [0.1, 0.4]", False),
        ("in ... s", "in 3.5 s", True),
        ("...\nb", "a\nb", True),
        ("a\nb", "b\na", False),  # another order
    ],
)
def test_what_is_printed_may_differ_in_spaces_and_the_last_place(expected, found, is_same):
    assert (missing_lines(expected, found) == []) == is_same


def known_options():
    """The options that the harness adds to pytest."""
    found = []

    class Parser:
        def getgroup(self, *_):
            return self

        def addoption(self, name, **_):
            found.append(name)

        def addini(self, name, _):
            found.append(name)

    plugin.pytest_addoption(Parser())  # type: ignore[arg-type]
    return found


PYTESTS_OWN = {"-k", "-m", "-q", "--collect-only", "--junit-xml"}


def commands():
    """(page, words) of every command in a block of the shell."""
    for page in PAGES:
        for block in blocks_of(page):
            for line in block.text.splitlines():
                prompt = "$ " if block.language == "console" else ""
                if block.language in ("sh", "console") and line.startswith(prompt):
                    yield named(page), shlex.split(line.removeprefix(prompt), comments=True)


def test_every_command_of_the_pages_exists():
    from tempo.cli import app

    of_tempo = get_command(app).commands  # type: ignore[attr-defined]
    targets = re.findall(r"^([a-z]+):", text("Makefile"), re.MULTILINE)
    seen = set()
    for page, words in commands():
        program, *arguments = words
        seen.add(program)
        options = [word for word in arguments if word.startswith("-")]
        where = f"{page}: {shlex.join(words)}"
        if program == "make":
            assert set(arguments) <= set(targets), where
        elif program == "tempo":
            known = [name for p in of_tempo[arguments[0]].params for name in p.opts]
            assert set(options) <= set(known), where
        elif program == "pytest":
            assert set(options) <= {*known_options(), *PYTESTS_OWN}, where
    assert {"make", "tempo", "pytest"} <= seen


# --- what the pages say of names


def test_every_option_and_key_is_explained():
    page = text("docs/experiments.md")
    names = [*known_options(), *StudyConfig.model_fields]
    assert len(names) > 15
    assert [name for name in names if f"`{name}" not in page] == []


def test_every_setting_of_a_run_is_explained():
    page = text("docs/semantics.md")
    choices = (VISIBILITIES, POSITIONS, READOUTS, WEIGHTINGS, CAPTURES)
    choices = (*choices, get_args(IsolatedMass), get_args(PruneBy))
    names = [name for name in tempo.RunSpec.model_fields if name != "prompt"]
    names += [choice for each in choices for choice in each]
    assert [name for name in names if not re.search(rf'[`"]{name}\b', page)] == []


def test_every_claim_that_the_pages_name_is_registered():
    modules = (ROOT / "test_experiments").glob("test_exp*.py")
    studies = [importlib.import_module(f"test_experiments.{path.stem}").study for path in modules]
    known = {claim for study in studies for claim in study.claims}
    mentioned = {claim for page in PAGES for claim in re.findall(r"`(exp\d+\.[\w-]+)`", text(page))}
    assert len(mentioned) > 6
    assert mentioned - known == set()
    assert "exp2.no-such-claim" not in known


def test_the_reference_has_every_public_name():
    pages = "".join(text(page) for page in (DOCS / "reference").glob("*.md"))
    from tempo import harness

    modules = {"claims", "metrics", "reference", "viewing"}
    for module, names in (("tempo", set(tempo.__all__) - modules), ("harness", harness.__all__)):
        errors = {name for name in names if name.endswith("Error")}  # tempo.errors has them all
        found = {name for name in names if f":: {name}\n" in pages or f"`{name}[" in pages}
        assert set(names) - errors - found == set(), module
    for module in ("tempo.errors", "tempo.metrics", "tempo.claims", "tempo.statistics"):
        assert f"automodule:: {module}\n" in pages


# --- how the pages are written


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_the_links_of_a_page_lead_somewhere(page):
    wrong = []
    for link in LINK.findall(text(page)):
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        if target.startswith("http"):
            continue
        if not path.exists() or (anchor and anchor not in anchors(path)):
            wrong.append(link)
    assert wrong == []


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_no_line_of_prose_is_too_long(page):
    """Tables and printed output cannot be wrapped."""
    outside = re.sub(r"^```text.*?^```$", "", text(page), flags=re.DOTALL | re.MULTILINE)
    lines = [line for line in outside.splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(line) > LONGEST_LINE] == []


def test_the_readme_is_short_and_names_what_it_must():
    readme = text("README.md")
    assert readme.count("\n") < LONGEST_README
    for words in (
        "make experiments",
        "make test",
        'pip install "tempo-harness[test]"',
        "tempo new entropy",
        "SmolLM2-135M-Instruct",
        "Gemma 3 270M instruct",
        "4-bit",
        "docs/figures/mechanism.svg",
    ):
        assert words in readme


def test_every_page_is_in_the_table_of_contents():
    index = text("docs/index.md")
    pages = [page.relative_to(DOCS).with_suffix("") for page in DOCS.glob("*.md")]
    assert [page for page in pages if page.name != "index" and f"<{page}>" not in index] == []
    assert "<reference/index>" in index


INTERVAL = re.compile(r"[+-]?\d[\d.]*(?: nats a token)? \[[^\]]*\]")


def intervals_of(page):
    """Every number of a page that has an interval, on one line and in one notation."""
    plain = re.sub(r"\s+", " ", text(page).replace("\\[", "[").replace("\\]", "]"))
    return {found.replace(" nats a token", "") for found in INTERVAL.findall(plain)}


def test_the_prior_art_compares_with_the_numbers_that_were_found():
    """Its table is a copy: new results must not leave it behind."""
    copied = intervals_of("docs/prior-art.md")
    known = intervals_of("docs/results.md") | intervals_of("reports/published/findings.md")
    assert len(copied) >= 15
    assert copied <= known
    assert "0.048 [0.041, 0.058]" not in known


def test_the_numbers_of_the_prior_art_stand_in_one_table():
    outside = re.sub(r"^\| N\d+ \|.*$", "", text("docs/prior-art.md"), flags=re.MULTILINE)
    assert INTERVAL.findall(outside) == []
    assert set(re.findall(r"\bN\d+\b", outside)) <= set(
        re.findall(r"^\| (N\d+) \|", text("docs/prior-art.md"), flags=re.MULTILINE)
    )


def test_the_picture_of_the_mechanism_is_what_its_script_draws(tmp_path):
    fresh = tmp_path / "mechanism.svg"
    subprocess.run([sys.executable, DOCS / "figures/mechanism.py", fresh], check=True)
    assert fresh.read_text(encoding="utf-8") == text("docs/figures/mechanism.svg")


# --- files beside the pages


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation["version"] == tempo.__version__
    assert citation["license"] == "MIT"


@pytest.mark.parametrize("path", [".github/workflows/ci.yml", "docs/examples/github-workflow.yml"])
def test_a_workflow_is_valid_and_pins_the_versions_of_its_actions(path):
    workflow = yaml.safe_load(text(path))
    assert workflow[True]  # YAML reads the key `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        uses = [step["uses"] for step in job["steps"] if "uses" in step]
        assert uses
        assert [action for action in uses if not re.fullmatch(r"actions/[\w-]+@v\d+", action)] == []


def test_the_projects_workflow_runs_its_gate():
    workflow = yaml.safe_load(text(".github/workflows/ci.yml"))
    steps = [step.get("run") for job in workflow["jobs"].values() for step in job["steps"]]
    assert ".ci/run" in steps
    assert "make docs" in steps
    assert os.access(ROOT / ".ci/run", os.X_OK)
