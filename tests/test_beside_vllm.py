"""The benchmark beside vLLM, with a module in vLLM's place that answers as vLLM does."""

import sys

import pytest

import tempo
from benchmarks import beside_vllm
from benchmarks.speed import QUICK

STAND_IN = """
__version__ = "0"


class SamplingParams:
    def __init__(self, temperature, max_tokens, ignore_eos):
        self.max_tokens = max_tokens


class Output:
    def __init__(self, num_tokens):
        self.token_ids, self.outputs = [0] * num_tokens, [self]


class LLM:
    def __init__(self, model, **limits):
        print("a line that is no round")

    def generate(self, prompts, settings, use_tqdm):
        return [Output(settings.max_tokens) for _ in prompts]
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text(STAND_IN, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(beside_vllm, "Size", lambda: QUICK[0])


def test_rounds_are_paired_and_other_tokens_are_seen(stand_in):
    found = beside_vllm.measure(sys.executable, "tiny")
    assert found["versions"]["vllm"] == "0"
    assert found["least"] <= found["ratio"] <= found["most"]
    assert found["same_runs"] == "0 of 2"  # the stand-in chooses token 0 always


def test_a_model_without_a_tokenizer_is_refused(stand_in, monkeypatch):
    lm = tempo.load_model("tiny")
    monkeypatch.setattr(lm, "tokenizer", None)
    monkeypatch.setattr(beside_vllm.tempo, "load_model", lambda model: lm)
    with pytest.raises(SystemExit, match="has no tokenizer"):
        beside_vllm.measure(sys.executable, "tiny")


@pytest.mark.parametrize("python", ["no-such-interpreter", sys.executable])
def test_an_interpreter_without_vllm_is_told(python, capfd):
    with pytest.raises(SystemExit, match="cannot import vllm"):
        beside_vllm.measure(python, "tiny")
