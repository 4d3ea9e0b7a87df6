"""What counts the work of a session counts each token once, and its table is that of its record."""

import json
import time

import pytest
import torch

import tempo
from benchmarks.sessions import TARGET, counted, markdown
from benchmarks.timing import AT_ONCE, token_seconds


def test_each_token_of_a_pass_counts_once(tiny):
    prompt = tiny.encode("The cat sat")
    with counted() as found:
        greedy = {"threshold": 1.0, "max_width": 1, "max_steps": 4, "stop_at_eos": False}
        tempo.generate(tiny, prompt, **greedy)
    # the last set is chosen and not forwarded
    assert found["float32"] == len(prompt) + 3
    assert found["passes"] == 4
    assert found["seconds"] > 0


def test_passes_of_others_count_by_their_dtype(tiny):
    with counted() as found, torch.inference_mode():
        tiny.model(input_ids=torch.zeros(2, 5, dtype=torch.long))
        tiny.model(inputs_embeds=torch.zeros(1, 3, tiny.model.config.hidden_size))
    assert (found["float32"], found["passes"]) == (13, 2)


def test_nothing_counts_outside_of_the_block(tiny):
    with counted() as found:
        pass
    tiny.model(input_ids=torch.zeros(1, 5, dtype=torch.long))
    assert not found


def test_the_time_of_a_token_is_that_of_a_large_pass(tiny):
    began = time.process_time()
    spent = token_seconds(tiny, time.process_time)
    assert 0 < spent * AT_ONCE < time.process_time() - began


def test_the_committed_table_is_that_of_the_committed_record():
    record = json.loads((TARGET / "sessions.json").read_text(encoding="utf-8"))
    assert (TARGET / "sessions.md").read_text(encoding="utf-8") == markdown(record)
    (whole,) = [row for row in record if row["over_floor"]["at_most"]]
    floor = whole["tokens"] * sum(whole["milliseconds_a_token"]) / 2e3
    assert whole["floor_seconds"] == pytest.approx(floor, rel=0.001)
    assert whole["over_floor"]["ratio"] == pytest.approx(whole["cpu_seconds"] / floor, rel=0.001)
