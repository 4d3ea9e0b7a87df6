"""The storeys of the house: who may import whom, and how experiments are written."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEMPO = sorted((ROOT / "tempo").rglob("*.py"))
HARNESS = [path for path in TEMPO if path.parent.name == "harness"]
REPORTING = [path for path in TEMPO if "reporting" in path.parts]
# The command line stands above all storeys, and loads them when a command needs them.
DECODER = [path for path in TEMPO if path not in HARNESS + REPORTING and path.stem != "cli"]
EXPERIMENTS = sorted((ROOT / "test_experiments").glob("*.py"))


def imports(source: str) -> set[str]:
    """The modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def nested_comprehensions(source: str) -> list[int]:
    """The lines of comprehensions within a comprehension."""
    kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    found = []
    for outer in ast.walk(ast.parse(source)):
        if isinstance(outer, kinds):
            inner = [node for node in ast.walk(outer) if isinstance(node, kinds)]
            found += [node.lineno for node in inner if node is not outer]
    return found


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


FORBIDDEN = {
    "decoder": (DECODER, r"pytest|tempo\.(harness|reporting)|fixtures|test_experiments"),
    "reporting": (REPORTING, r"pytest|tempo\.harness|fixtures|test_experiments"),
    "harness": (HARNESS, r"fixtures|test_experiments"),
}


@pytest.mark.parametrize("storey", FORBIDDEN)
def test_arrows_point_downward(storey):
    paths, forbidden = FORBIDDEN[storey]
    for path in paths:
        upward = [name for name in imports(path.read_text()) if re.match(forbidden, name)]
        assert not upward, f"{named(path)} imports {upward}"


def test_an_arrow_upward_would_be_seen():
    assert "tempo.harness" in imports("def f():\n    from tempo.harness import run\n")
    assert re.match(FORBIDDEN["decoder"][1], "tempo.harness")


@pytest.mark.parametrize("path", TEMPO, ids=named)
def test_tempo_names_no_experiment_and_no_claim(path):
    """Not in an import, and not in a string either: others bring experiments of their own."""
    text = path.read_text()
    assert not re.findall(r"test_experiments|\bfixtures\b", text)
    assert not re.findall(r"\bexp\d+\.[a-z]", text), "the id of a claim"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=named)
def test_no_comprehension_stands_within_another(path):
    assert nested_comprehensions(path.read_text()) == []


def test_a_nested_comprehension_would_be_seen():
    assert nested_comprehensions("x = [[a for a in b] for b in c]\n") == [1]
    assert nested_comprehensions("x = [a for b in c for a in b]\n") == []
