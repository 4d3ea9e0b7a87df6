"""All experiments on all architectures: the record is whole, and a fault would be seen."""

import json

import pytest
import transformers
from typer.testing import CliRunner

from benchmarks import architectures, families
from benchmarks.architectures import Entry
from benchmarks.families import FOLDER, Family, run_all, table
from tempo import LanguageModel
from tempo.cli import app
from tempo.support import read_registry

KNOWN = read_registry()[transformers.__version__]
SUPPORTED = {name: entry for name, entry in KNOWN.items() if entry["status"] == "supported"}
EXPERIMENTS = {f"exp{number}" for number in range(1, 18)}


@pytest.fixture(scope="module")
def record():
    found = json.loads((FOLDER / "families.json").read_text(encoding="utf-8"))
    assert found["transformers"] == transformers.__version__
    return {each["name"]: Family(**each) for each in found["families"]}


def test_every_experiment_was_tried_on_every_architecture_and_none_is_wrong(record):
    assert set(record) == set(SUPPORTED)
    assert len(record) >= 90
    for name, family in record.items():
        assert family.wrong == [], name
        assert set(family.verdicts) == EXPERIMENTS, name
        found = {verdict for counts in family.verdicts.values() for verdict in counts}
        assert "REFUTED" not in found
        # what is not applicable has its reason
        without = {each.partition(".")[0] for each in family.inapplicable}
        assert without == set(family.reasons), name


def test_the_table_and_the_registry_are_those_of_the_record(record):
    page = (FOLDER / "families.md").read_text(encoding="utf-8")
    assert page == table(list(record.values()))
    for name, entry in SUPPORTED.items():
        assert entry["inapplicable"] == record[name].inapplicable
    others = [entry for name, entry in KNOWN.items() if name not in SUPPORTED]
    assert all(entry.get("inapplicable") is None for entry in others)


def test_kinds_of_models_are_told_apart_in_the_registry():
    assert SUPPORTED["llama"]["inapplicable"] == []
    assert "exp4" in SUPPORTED["deepseek_v3"]["inapplicable"]
    assert "exp1.rows-sum-to-one" in SUPPORTED["gpt_oss"]["inapplicable"]
    assert {"exp4", "exp17"} <= set(SUPPORTED["gemma3n_text"]["inapplicable"])


def test_an_invariant_that_is_violated_is_told(monkeypatch):
    """The control: sinks that the experiments do not know of."""
    plain = run_all("gpt_oss", ["-k", "rows_sum_to_one"])
    assert (plain.wrong, plain.verdicts["exp1"]) == ([], {"INAPPLICABLE": 2})
    assert plain.inapplicable == ["exp1", "exp5"]  # as all that was selected of them
    hidden = property(lambda self: False, lambda self, value: None)
    monkeypatch.setattr(LanguageModel, "has_sinks", hidden, raising=False)
    found = run_all("gpt_oss", ["-k", "rows_sum_to_one"])
    assert found.verdicts["exp1"] == {"REFUTED": 2}
    assert len(found.wrong) == 4 and "rows_sum_to_one" in found.wrong[0]
    assert "2 ✕" in table([found])


def test_an_architecture_that_cannot_be_run_is_told(monkeypatch):
    monkeypatch.setattr(families, "save_folder", lambda architecture, folder: folder.mkdir())
    found = run_all("llama", ["-k", "exp1 and rows_sum_to_one"])
    assert len(found.wrong) == 1 and "cannot load the folder" in found.wrong[0]


def test_the_list_of_architectures_says_which_experiments_can_judge_each(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    listed = CliRunner().invoke(app, ["models", "--architectures"])
    assert listed.exit_code == 0
    rows = {line.split()[0]: line for line in listed.stdout.splitlines() if line.split()}
    assert " all " in rows["llama"] and "all but" not in rows["llama"]
    assert "all but exp4" in rows["deepseek_v3"]
    assert " all" not in rows["bert"].partition("it has no")[0]
    assert "which of tempo's can judge it" in listed.stdout


def test_a_new_registry_keeps_what_experiments_found(monkeypatch, tmp_path):
    before = {"llama": {"inapplicable": ["exp4"]}}
    monkeypatch.setattr(architectures, "REGISTRY", tmp_path / "architectures.json")
    monkeypatch.setattr(architectures, "read_registry", lambda: {transformers.__version__: before})
    architectures.write({name: Entry(name, "supported", "") for name in ("llama", "new")})
    written = json.loads((tmp_path / "architectures.json").read_text(encoding="utf-8"))
    found = written[transformers.__version__]
    assert (found["llama"]["inapplicable"], found["new"]["inapplicable"]) == (["exp4"], None)
