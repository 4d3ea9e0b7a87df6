"""The experiments as their users run them: pytest in a process of its own, on the tiny model."""

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fixtures.store import Store
from tempo import ResultsError

ROOT = Path(__file__).resolve().parent.parent


def run_pytest(*arguments, plugin=None, **environment):
    """(exit code, output) of `pytest test_experiments --model tiny` with more arguments, and a fault to plant."""
    command = [sys.executable, "-m", "pytest", "test_experiments", "--model", "tiny", "-q", "-p", "no:cacheprovider", *map(str, arguments)]
    path = str(ROOT)
    if plugin:
        command += ["-p", plugin.stem]
        path = f"{plugin.parent}{os.pathsep}{path}"
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path} | environment, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """All experiments over a few prompts: (exit code, output, results folder, report)."""
    folder = tmp_path_factory.mktemp("everything")
    report = folder / "findings.html"
    code, output = run_pytest("--prompts", 12, "--results", folder / "results", "--html", report, "--self-contained-html")
    return code, output, folder / "results", report


def test_all_experiments_run_and_their_invariants_hold(everything):
    code, output, _, _ = everything
    assert code == 0, output[-3000:]
    assert "supported" in output.splitlines()[-1]


def test_raw_results_have_the_layout_of_the_design_and_open_without_pickle(everything):
    _, _, results, _ = everything
    expected = {
        "exp1_isolated": {"attention_weights.npz", "generation_log.json"},
        "exp1_visible": {"attention_weights.npz", "generation_log.json"},
        "exp2_logits": {"logits_distributions.npz", "kl_divergence.json", "analysis.txt"},
        "exp3_cross_parallel": {"cross_parallel_scores.json", "attention_weights.npz", "analysis.txt"},
        "exp4_kv_cache": {"rope_positions.json", "kv_cache_states.npz", "analysis.txt"},
        "exp5_high_parallelism": {"generation_log.json", "analysis.txt"},
    }
    for folder, names in expected.items():
        assert names <= {path.name for path in (results / folder).iterdir()}
    for path in results.rglob("*.npz"):
        with np.load(path) as arrays:
            manifest = json.loads(str(arrays["manifest"]))
        assert {"model_sha256", "config", "versions", "dtype", "seed"} <= set(manifest)


def test_findings_are_records_with_unit_n_interval_and_control(everything):
    _, _, results, _ = everything
    findings = [json.loads(line) for line in (results / "findings.jsonl").read_text().splitlines()]
    assert len({f["claim"] for f in findings}) >= 20
    for f in findings:
        assert f["verdict"] in ("SUPPORTED", "REFUTED", "INCONCLUSIVE")
        assert f["unit"] == "prompt"
        assert f["control"]
        assert f["n"] <= 13
        if f["verdict"] == "SUPPORTED":
            assert f["low"] <= f["estimate"] <= f["high"]
            assert f["control_holds"]


class Tags(HTMLParser):
    """What an HTML page refers to."""

    def __init__(self):
        super().__init__()
        self.references, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.references += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_is_one_file_with_the_findings_and_no_outside_reference(everything):
    _, _, _, report = everything
    page = Tags()
    page.feed(report.read_text(encoding="utf-8"))
    outside = [r for r in page.references if not r.startswith(("#", "data:")) and "pypi.python.org/pypi/pytest-html" not in r]
    assert not outside
    text = " ".join(page.text)
    assert "exp3.isolated-is-zero" in text
    assert "Verdict" in text
    assert report.stat().st_size < 5_000_000


def test_a_second_session_reads_the_cases_and_runs_no_model(everything, tmp_path):
    _, _, results, _ = everything
    fault = tmp_path / "no_runs.py"
    fault.write_text("import tempo, fixtures.execute\ndef none(*_, **__):\n    raise AssertionError('a model ran')\ntempo.stream = none\n")
    arguments = ("--prompts", 12, "--results", results, "-k", "exp2", "--html", tmp_path / "r.html")
    code, output = run_pytest(*arguments, plugin=fault)
    assert code == 0, output[-2000:]
    assert "are on disk already" in output
    code, output = run_pytest(*arguments[:2], "--results", tmp_path / "empty", *arguments[4:], plugin=fault)
    assert code == 1
    assert "a model ran" in output


def test_selecting_an_experiment_runs_nothing_else(tmp_path):
    code, output = run_pytest("--prompts", 6, "--results", tmp_path / "results", "-k", "exp3", "--html", tmp_path / "r.html")
    assert code == 0, output[-2000:]
    assert sorted(p.name for p in (tmp_path / "results").iterdir()) == ["exp3_cross_parallel", "findings.jsonl"]


FAULTS = {
    "positions": (
        "from tempo import layout\noriginal = layout.Layout.append_set\n"
        "def broken(self, tokens, probabilities):\n    self.positions = 'sequential'\n    original(self, tokens, probabilities)\n"
        "layout.Layout.append_set = broken\n",
        "exp4",
        "exp4.positions-are-p-plus-k",
    ),
    "mask": (
        "import torch\nfrom tempo import layout\noriginal = layout.Layout.block\n"
        "layout.Layout.block = lambda self: original(self) if self.start == 0 else torch.ones_like(original(self))\n",
        "exp3",
        "exp3.isolated-is-zero",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_planted_in_the_engine_turns_the_experiment_red(tmp_path, fault):
    source, experiment, claim = FAULTS[fault]
    plugin = tmp_path / "planted_fault.py"
    plugin.write_text(source)
    code, output = run_pytest(
        "--prompts", 6, "--results", tmp_path / "results", "-k", experiment, "--html", tmp_path / "r.html", plugin=plugin
    )
    assert code == 1
    assert any(claim in line for line in output.splitlines() if line.startswith("FAILED"))


CONFIG = """\
experiment: exp3
results: mine
prompt: Once upon a time
max_steps: 4
threshold: 0.05
visibility: visible
capture: [attention, logits]
"""


def test_a_config_of_ones_own_runs_its_experiment_alone(tmp_path):
    config = tmp_path / "my_own.yaml"
    config.write_text(CONFIG)
    code, output = run_pytest("--config", config, "--prompts", 8, "--results", tmp_path / "results", "--html", tmp_path / "r.html")
    assert code == 0, output[-2000:]
    log = json.loads((tmp_path / "results/mine/generation_log.json").read_text())
    assert log["manifest"]["config"]["prompt"] == "Once upon a time"
    assert sorted(p.name for p in (tmp_path / "results").iterdir()) == ["findings.jsonl", "mine"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("threshold: 0.05", "treshold: 0.05"), "did you mean 'threshold'?"),
        (("threshold: 0.05", "threshold: 1.5"), "threshold=1.5"),
        (("visibility: visible", "visibility: sideways"), "visibility='sideways'"),
        (("max_steps: 4", "max_steps: four"), "max_steps='four'"),
        (("experiment: exp3", "- a list"), "expected keys and values"),
    ],
)
def test_a_bad_config_is_a_usage_error_that_names_file_and_key(tmp_path, change, message):
    config = tmp_path / "bad.yaml"
    config.write_text(CONFIG.replace(*change) if "list" not in change[1] else change[1])
    code, output = run_pytest("--config", config, "--results", tmp_path / "results")
    assert code == 4
    assert "bad.yaml" in output
    assert message in output
    assert not (tmp_path / "results").exists()


def test_more_prompts_than_there_are_is_a_usage_error(tmp_path):
    code, output = run_pytest("--prompts", 1000, "--results", tmp_path)
    assert code == 4
    assert "from 1 to 160" in output


def test_a_results_folder_that_cannot_be_written_is_said_before_a_model_runs(tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, output = run_pytest("--prompts", 6, "--results", tmp_path / "file", "-k", "exp3", "--html", tmp_path / "r.html")
    assert code == 1
    assert "cannot write to the results folder" in output
    assert "measured" not in output


def test_an_unknown_model_is_said_in_one_line(tmp_path):
    code, output = run_pytest("--model", "smolm2-135m", "--prompts", 6, "--results", tmp_path, "-k", "exp3", "--html", tmp_path / "r.html")
    assert code == 1
    assert "did you mean 'smollm2-135m'" in output
    assert "Traceback" not in output


def test_a_full_disk_leaves_earlier_results_whole(tmp_path, monkeypatch):
    store = Store(tmp_path, {"made": "first"})
    store.arrays("weights", values=np.arange(3))
    store.json("scores", {"a": 1})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(ResultsError, match=r"No space left.*earlier results are untouched"):
        store.arrays("weights", values=np.arange(9))
    assert store.load("weights")["values"].tolist() == [0, 1, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scores.json", "weights.npz"]


def test_a_damaged_results_file_is_said_with_the_remedy(tmp_path):
    store = Store(tmp_path)
    store.arrays("weights", values=np.arange(3))
    path = tmp_path / "weights.npz"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ResultsError, match="delete the folder and run again"):
        store.load("weights")
