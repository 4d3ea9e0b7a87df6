"""tempo doctor: what is damaged is named and set aside, nothing else is touched."""

import json

import pytest
import torch
from typer.testing import CliRunner

import tempo
from tempo import doctor
from tempo.capture import memory_budget
from tempo.cli import app
from tempo.errors import TempoError
from tempo.harness.execute import ROWS
from tempo.parsing import seal
from tempo.records import append_jsonl, read_jsonl
from tempo.wheels import KNOWN_MODELS


@pytest.fixture
def folder(tiny, tmp_path):
    """Results of one config, and a trace."""
    append_jsonl(tmp_path / "exp/cases.jsonl", [{"key": str(i), "case": i / 7} for i in range(5)])
    append_jsonl(tmp_path / "findings.jsonl", [{"claim": "a"}, {"claim": "b"}])
    (tmp_path / "exp/report.json").write_text(json.dumps(seal({"experiment": "exp"})))
    tempo.generate(tiny, "The cat", max_steps=2).save(tmp_path / "trace")
    (tmp_path / "exp/notes.json").write_text("{not ours")
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def doctored(*arguments):
    result = CliRunner().invoke(app, ["doctor", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_sound_folder_is_left_as_it_is(folder):
    before = contents(folder)
    assert "nothing damaged" in doctored("--repair", folder)
    assert contents(folder) == before


def test_damaged_lines_are_set_aside_and_the_rest_is_kept(folder):
    path = folder / "exp/cases.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = lines[1].replace(b'"case": 0', b'"case": 1')
    torn = lines[4][:30]
    path.write_bytes(b"".join([lines[0], damaged, *lines[2:4], torn]))
    untouched = {p: c for p, c in contents(folder).items() if p != path}
    output = doctored("--repair", folder)
    assert "cases.jsonl line 2: its checksum does not fit" in output
    assert "cases.jsonl line 5: it is no JSON" in output
    assert "to get it back: run pytest on the studies: these prompts are measured again" in output
    assert "2 damaged parts" in output
    assert path.read_bytes() == b"".join([lines[0], *lines[2:4]])
    assert path.with_name("cases.jsonl.damaged").read_bytes() == damaged + torn + b"\n"
    assert {p: c for p, c in contents(folder).items() if p in untouched} == untouched
    assert read_jsonl(path).damaged == []
    append_jsonl(path, [{"key": "new"}])
    assert [record["key"] for record in read_jsonl(path).records] == ["0", "2", "3", "new"]
    assert "nothing damaged" in doctored("--repair", folder)


def test_damaged_files_and_traces_are_set_aside_whole(folder):
    report, trace = folder / "exp/report.json", folder / "trace"
    report.write_bytes(report.read_bytes().replace(b"exp", b"exq"))
    arrays = trace / "arrays.npz"
    arrays.write_bytes(arrays.read_bytes()[:-1])
    assert {damage.path.name for damage in doctor.look(folder)} == {"report.json", "trace.json"}
    doctor.repair(folder)
    assert not report.exists() and report.with_name("report.json.damaged").exists()
    assert not trace.exists() and (folder / "trace.damaged/arrays.npz").exists()
    assert [damage.path for damage in doctor.look(folder)] == []
    assert (folder / "exp/notes.json").read_text() == "{not ours"


def test_a_plan_is_for_as_many_rows_as_a_session_has():
    assert doctor.PLANNED_ROWS == ROWS  # which the doctor cannot import without pytest


def test_no_folder_is_said(tmp_path):
    with pytest.raises(TempoError, match="there is no folder"):
        doctor.repair(tmp_path / "none")


def test_the_machine_is_described_in_a_few_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("TEMPO_CACHE", str(tmp_path))
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    lines = doctored().splitlines()
    assert len(lines) <= 8
    assert "torch" in lines[0] and "model tiny: built in" in lines
    assert "model smollm2-135m: not here; 93 MB to load" in lines
    (tmp_path / "smollm2-135m").mkdir()
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 0.0, 0.0))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert KNOWN_MODELS["smollm2-135m"].is_present()
    output = doctored()
    assert "! model smollm2-135m: " in output and "Delete that folder" in output
    assert "! other programs use the cores" in output
    assert "load 99.0; OMP_WAIT_POLICY not set" in output
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    output = doctored()
    assert "OMP_WAIT_POLICY PASSIVE" in output
    assert "! other programs use the cores" not in output


def test_the_memory_plan_says_what_weights_rows_and_workers_take(tiny):
    output = doctored("--model", "tiny")
    assert f"{tiny.weight_bytes / 2**20:.1f} MiB of weights" in output
    assert output.count(" workers: ") == 6
    assert "attention and logits: the first run up to " in output


def test_workers_that_do_not_fit_are_said_not_to(tiny, monkeypatch):
    free = type("Memory", (), {"available": 3 * tiny.weight_bytes})()
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    lines = doctor.memory_plan(tiny)
    assert any(line.startswith("! 4 workers: 4 workers load 0.5 MiB of weights") for line in lines)
    assert any(line.startswith("! 1 worker: ") and "may need" in line for line in lines)


def test_the_budget_keeps_to_what_is_free_on_the_gpu_and_is_shared_by_workers(monkeypatch):
    free = type("Memory", (), {"available": 1000})()
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (400, 5000))
    assert memory_budget() == 500
    assert memory_budget(7) == 7
    assert memory_budget(None, torch.device("cpu")) == 500
    assert memory_budget(None, torch.device("cuda")) == 200
    assert (
        memory_budget(None, torch.device("cpu"), weights=100, workers=4) == (1000 - 400) // 2 // 4
    )
    with pytest.raises(TempoError, match="5 workers load .* at most 4 fit"):
        memory_budget(None, torch.device("cpu"), weights=250, workers=5)
