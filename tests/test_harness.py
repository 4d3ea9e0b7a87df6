"""The experiments as their users run them: pytest in a process of its own, on the tiny model."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tempo import ResultsError
from tempo.claims import SCHEMA
from tempo.harness import Store

ROOT = Path(__file__).resolve().parent.parent


# What every session leaves beside the folders of its experiments.
RECORDS = {"findings.jsonl", "report.json", "runs"}


def run_pytest(*arguments, plugin=None, **environment):
    """(exit code, output) of pytest on the experiments with the tiny model, and a fault planted."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "test_experiments",
        "--model",
        "tiny",
        "-q",
        "-p",
        "no:cacheprovider",
        *map(str, arguments),
    ]
    path = str(ROOT)
    if plugin:
        command += ["-p", plugin.stem]
        path = f"{plugin.parent}{os.pathsep}{path}"
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CI", "GITHUB_STEP_SUMMARY")
    }
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=inherited | {"PYTHONPATH": path, "COLUMNS": "400"} | environment,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """All experiments over a few prompts: (exit code, output, results folder, report)."""
    folder = tmp_path_factory.mktemp("everything")
    report = folder / "findings.html"
    records = ("--junit-xml", folder / "junit.xml", "--summary", folder / "summary.md")
    code, output = run_pytest(
        "--prompts",
        12,
        "--results",
        folder / "results",
        "--findings",
        report,
        *records,
    )
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
        "exp3_cross_parallel": {
            "cross_parallel_scores.json",
            "attention_weights.npz",
            "analysis.txt",
        },
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
        assert f["schema"] == SCHEMA
        if f["verdict"] == "SUPPORTED":
            assert f["low"] <= f["estimate"] <= f["high"]
            assert f["control_holds"]


def test_the_junit_record_holds_each_finding_as_plain_properties(everything):
    _, _, results, _ = everything
    cases = ET.parse(results.parent / "junit.xml").iter("testcase")
    properties = {
        case.get("name"): {p.get("name"): p.get("value") for p in case.iter("property")}
        for case in cases
    }
    of_claims = {name: found for name, found in properties.items() if "verdict" in found}
    assert len(of_claims) >= 40
    for found in of_claims.values():
        record = json.loads(found["finding"])
        assert found["verdict"] == record["verdict"]
        for name in ("estimate", "low", "n", "p", "p_against_corrected"):
            assert (float(found[name]) if name in found else None) == record[name]


def test_the_summary_of_a_ci_job_has_counts_and_the_table(everything, tmp_path):
    _, _, results, _ = everything
    summary = (results.parent / "summary.md").read_text()
    assert summary.startswith("## tempo: ")
    assert "| verdict | claim |" in summary
    assert "exp3.isolated-is-zero" in summary
    job = tmp_path / "job.md"
    job.write_text("another step's\n")
    run_pytest(
        "--prompts",
        12,
        "--results",
        results,
        "-k",
        "exp4",
        "--findings",
        tmp_path / "r.html",
        GITHUB_STEP_SUMMARY=str(job),
    )
    assert job.read_text().startswith("another step's\n## tempo: ")
    assert "exp3" not in job.read_text()


class Tags(HTMLParser):
    """What an HTML page refers to."""

    def __init__(self):
        super().__init__()
        self.references, self.text, self.handlers = [], [], []

    def handle_starttag(self, tag, attrs):
        self.references += [value for name, value in attrs if name in ("src", "href") and value]
        self.handlers += [f"{name}={value}" for name, value in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_is_one_file_with_the_findings_and_no_outside_reference(everything):
    _, _, _, report = everything
    page = Tags()
    page.feed(report.read_text(encoding="utf-8"))
    outside = [r for r in page.references if not r.startswith(("#", "data:"))]
    runs = {f"runs/{path.name}" for path in (report.parent / "runs").iterdir()}
    assert runs == set(outside)  # links to pages beside it, of which it loads nothing
    text = " ".join(page.text)
    assert "exp3.isolated-is-zero" in text
    assert "Verdict" in text
    assert report.stat().st_size < 5_000_000


def test_the_report_made_again_without_pytest_is_the_same_to_the_byte(everything, tmp_path):
    _, _, results, _ = everything
    report = tmp_path / "of_the_session.html"
    assert run_pytest("--prompts", 12, "--results", results, "--findings", report)[0] == 0
    command = [sys.executable, "-m", "tempo.cli", "report", "--results", results, "--out", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (tmp_path / "findings.html").read_bytes() == report.read_bytes()
    assert "exp5" in report.read_text(encoding="utf-8")
    figures = {path.suffix for path in (tmp_path / "figures").iterdir()}
    assert figures == {".svg"}


def test_hostile_names_and_prompts_stay_text_in_page_terminal_and_paths(tmp_path):
    config = tmp_path / "<img src=x onerror=alert(1)>\x1b[31m.yaml"
    prompt = r'"<script>alert(1)</script> \x00\x1b[2J\u202e \U0001f600"'
    config.write_text(CONFIG.replace("Once upon a time", prompt).replace("0.05", "0.02"))
    report = tmp_path / "r.html"
    arguments = (
        "--prompts",
        6,
        "--results",
        tmp_path / "results",
        "--findings",
        report,
    )
    code, output = run_pytest("--config", config, *arguments)
    assert code == 0, output[-2000:]
    assert not set(output) & set("\x00\x1b\u202e")
    page = Tags()
    page.feed(report.read_text(encoding="utf-8"))
    assert not set(report.read_text(encoding="utf-8")) & set("\x00\x1b\u202e")
    assert "<script>alert(1)</script>" in " ".join(page.text)
    assert not any("onerror" in handler for handler in page.handlers)
    names = {path.name for path in (tmp_path / "results").rglob("*")}
    assert not any(set(name) & set("<>\x1b ") for name in names)


def test_a_picture_that_fails_takes_no_finding_with_it_but_is_said(tmp_path):
    plugin = tmp_path / "no_pictures.py"
    plugin.write_text(
        "from tempo.reporting import figures\n"
        "def broken(*_, **__):\n    raise ValueError('cannot draw')\n"
        "figures.position_map = broken\n"
    )
    arguments = (
        "--prompts",
        6,
        "--results",
        tmp_path / "results",
        "-k",
        "exp4",
        "--findings",
        tmp_path / "r.html",
    )
    code, output = run_pytest(*arguments, plugin=plugin)
    assert code == 1
    assert "no pictures of exp4_kv_cache_inspection: ValueError: cannot draw" in output
    assert "exp4.every-sibling-is-cached" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_progress_is_plain_lines_without_a_terminal_and_colours_are_off(everything):
    _, output, _, _ = everything
    assert "tempo: measuring 260 prompt cases" in output
    assert "\x1b" not in output
    assert "\r" not in output


def test_a_second_session_reads_the_cases_and_runs_no_model(everything, tmp_path):
    _, _, results, _ = everything
    fault = tmp_path / "no_runs.py"
    fault.write_text(
        "import tempo\ndef none(*_, **__):\n    raise AssertionError('a model ran')\n"
        "tempo.stream = none\n"
    )
    arguments = (
        "--prompts",
        12,
        "--results",
        results,
        "-k",
        "exp2",
        "--findings",
        tmp_path / "r.html",
    )
    code, output = run_pytest(*arguments, plugin=fault)
    assert code == 0, output[-2000:]
    assert "are on disk already" in output
    code, output = run_pytest(
        *arguments[:2], "--results", tmp_path / "empty", *arguments[4:], plugin=fault
    )
    assert code == 1
    assert "a model ran" in output


def test_selecting_an_experiment_runs_nothing_else(tmp_path):
    code, output = run_pytest(
        "--prompts",
        6,
        "--results",
        tmp_path / "results",
        "-k",
        "exp3",
        "--findings",
        tmp_path / "r.html",
    )
    assert code == 0, output[-2000:]
    assert {p.name for p in (tmp_path / "results").iterdir()} == RECORDS | {"exp3_cross_parallel"}


def test_collecting_says_how_many_prompts_each_claim_needs_and_runs_nothing(tmp_path):
    arguments = ("--collect-only", "-k", "exp2", "--results", tmp_path / "results")
    code, output = run_pytest(*arguments)
    assert code == 0, output[-2000:]
    lines = [line for line in output.splitlines() if line.startswith("tempo: exp2.")]
    assert len(lines) == 5
    assert any(
        "exp2.same-selection" in line and "68 prompts tell 0.025 (sd 0.052) from 0.05" in line
        for line in lines
    )
    assert not any("TOO FEW" in line for line in lines)
    assert not (tmp_path / "results").exists()
    _, few = run_pytest(*arguments, "--prompts", 20)
    assert sum("TOO FEW: 21 are planned" in line for line in few.splitlines()) == 2


# The earlier implementation's own fault: whatever mode is asked for, siblings are isolated.
MODE_NOT_WIRED = (
    "from tempo import layout\noriginal = layout.Layout.block\n"
    "layout.Layout.block = lambda self, visibility=None: original(self, 'isolated')\n"
)


@pytest.fixture
def run_with_expectations(tmp_path):
    """Runs exp3 against expectations in a folder of its own, with a fault in the engine or none."""

    def run(*arguments, fault="", **environment):
        plugin = tmp_path / f"planted_{'fault' if fault else 'nothing'}.py"
        plugin.write_text(
            "from tempo.harness import expectations\n"
            f"expectations.FOLDER = {str(tmp_path)!r}\n{fault}"
        )
        results = tmp_path / ("faulty" if fault else "results")
        shared = (
            "--prompts",
            20,
            "--results",
            results,
            "-k",
            "exp3",
            "--findings",
            tmp_path / "r.html",
        )
        return run_pytest(*shared, *arguments, plugin=plugin, **environment)

    return run


def failed(output):
    return [line for line in output.splitlines() if line.startswith("FAILED")]


def test_a_fault_flips_a_verdict_and_turns_the_run_red_and_without_it_all_is_green(
    run_with_expectations, tmp_path
):
    code, output = run_with_expectations()
    assert (code, failed(output)) == (0, []), output[-2000:]
    assert "seen for the first time" in output  # a new model: a notice
    code, output = run_with_expectations("--update-expectations")
    assert code == 0, output[-2000:]
    assert "expectations written to" in output
    code, output = run_with_expectations()
    assert (code, failed(output)) == (0, []), output[-2000:]
    assert "seen for the first time" not in output
    code, output = run_with_expectations("--summary", tmp_path / "summary.md", fault=MODE_NOT_WIRED)
    assert code == 1
    assert any(
        "exp3.score-above-zero" in line
        and "expected SUPPORTED" in line
        and "found INCONCLUSIVE" in line
        for line in failed(output)
    )
    assert (
        "**regression** exp3.score-above-zero: expected SUPPORTED"
        in (tmp_path / "summary.md").read_text()
    )
    assert (
        "exp3.score-above-zero" in (tmp_path / "faulty/findings.jsonl").read_text()
    )  # written before it was asserted
    code, output = run_with_expectations()
    assert (code, failed(output)) == (0, []), output[-2000:]


def test_expectations_are_not_rewritten_in_ci_nor_for_claims_left_out(
    run_with_expectations, tmp_path
):
    code, output = run_with_expectations("--update-expectations", CI="true")
    assert code == 4
    assert "refused in CI" in output
    assert not (tmp_path / "tiny.yaml").exists()
    assert run_with_expectations("--update-expectations", CI="false")[0] == 0
    before = (tmp_path / "tiny.yaml").read_text()
    assert (
        run_with_expectations(
            "--update-expectations", "-k", "exp3.does-something", fault=MODE_NOT_WIRED
        )[0]
        == 0
    )
    after = (tmp_path / "tiny.yaml").read_text()
    assert before != after
    changed = set(before.splitlines()) ^ set(after.splitlines())
    assert "exp3.more-than-uniform" not in "".join(changed)
    code, output = run_with_expectations("--update-expectations", "--prompts", 12)
    assert code == 4
    assert "12 cannot replace that" in output or "13 cannot replace that" in output
    assert (tmp_path / "tiny.yaml").read_text() == after


def test_strict_claims_fails_on_what_is_refuted(tmp_path):
    arguments = (
        "--prompts",
        100,
        "--results",
        tmp_path / "results",
        "-k",
        "exp2.equivalent-at-siblings",
        "--findings",
        tmp_path / "r.html",
    )
    code, output = run_pytest(*arguments)
    assert code == 0, output[-2000:]
    assert "1 refuted" in output
    code, output = run_pytest(*arguments, "--strict-claims")
    assert code == 1
    assert "--strict-claims: exp2.equivalent-at-siblings is REFUTED" in failed(output)[0]


def test_a_claim_that_cannot_be_judged_loses_no_other_finding(tmp_path):
    plugin = tmp_path / "bad_statistic.py"
    plugin.write_text(
        "from tempo import claims\noriginal = claims._values\n"
        "def broken(claim, statistic, cases):\n"
        "    if claim.id == 'exp4.every-sibling-is-cached':\n"
        "        raise KeyError('no such measure')\n"
        "    return original(claim, statistic, cases)\nclaims._values = broken\n"
    )
    arguments = (
        "--prompts",
        6,
        "--results",
        tmp_path / "results",
        "-k",
        "exp4",
        "--findings",
        tmp_path / "r.html",
    )
    code, output = run_pytest(*arguments, plugin=plugin)
    assert code == 1
    assert "1 failed" in output and "5 supported" in output
    assert "exp4.every-sibling-is-cached could not be judged: KeyError: 'no such measure'" in output
    findings = [
        json.loads(line)["claim"]
        for line in (tmp_path / "results/findings.jsonl").read_text().splitlines()
    ]
    assert len(findings) == 5


FAULTS = {
    "positions": (
        "from tempo import layout\noriginal = layout.Layout.append_set\n"
        "def broken(self, tokens, probabilities):\n    self.positions = 'sequential'\n"
        "    original(self, tokens, probabilities)\n"
        "layout.Layout.append_set = broken\n",
        "exp4",
        "exp4.positions-are-p-plus-k",
    ),
    "mask": (
        "from tempo import layout\noriginal = layout.Layout.block\n"
        "layout.Layout.block = lambda self, visibility=None: original(self, 'visible')\n",
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
        "--prompts",
        6,
        "--results",
        tmp_path / "results",
        "-k",
        experiment,
        "--findings",
        tmp_path / "r.html",
        plugin=plugin,
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
    code, output = run_pytest(
        "--config",
        config,
        "--prompts",
        8,
        "--results",
        tmp_path / "results",
        "--findings",
        tmp_path / "r.html",
    )
    assert code == 0, output[-2000:]
    log = json.loads((tmp_path / "results/mine/generation_log.json").read_text())
    assert log["manifest"]["config"]["prompt"] == "Once upon a time"
    assert {p.name for p in (tmp_path / "results").iterdir()} == RECORDS | {"mine"}


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
    assert "from 1 to 162" in output


def test_a_results_folder_that_cannot_be_written_is_said_before_a_model_runs(tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, output = run_pytest(
        "--prompts",
        6,
        "--results",
        tmp_path / "file",
        "-k",
        "exp3",
        "--findings",
        tmp_path / "r.html",
    )
    assert code == 4
    assert "cannot write to the folder" in output
    assert "measured" not in output


def test_an_unknown_model_is_said_in_one_line(tmp_path):
    code, output = run_pytest(
        "--model",
        "smolm2-135m",
        "--prompts",
        6,
        "--results",
        tmp_path,
        "-k",
        "exp3",
        "--findings",
        tmp_path / "r.html",
    )
    assert code == 4
    said = [line for line in output.splitlines() if "did you mean 'smollm2-135m'" in line]
    assert len(said) == 1
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
    with pytest.raises(ResultsError, match="run again, and it is measured again"):
        store.load("weights")
