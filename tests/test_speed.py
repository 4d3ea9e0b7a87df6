"""The benchmark measures what it says: equal work, paired ratios, exact exponents."""

import json
import os
from importlib.util import find_spec

import numpy as np
import pytest
import torch

import tempo
from benchmarks import memory, peers, speed
from benchmarks.growth import NEAR, SPOOLED
from benchmarks.memory import Point
from benchmarks.shapes import layers_of, random_llama, text_of, wide
from benchmarks.speed_report import markdown
from benchmarks.timing import Ratio, alternate, exponents, judged

pytestmark = pytest.mark.usefixtures("one_thread")
# The optional peers are installed, and checked here, only where `make speed` sets TEMPO_PEERS.
NUM_STEPS = 3
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def test_works_alternate_and_the_first_round_is_not_kept():
    done = []

    def work(name):
        def once():
            done.append(name)
            return float(len(done))

        return once

    seconds = alternate({name: work(name) for name in "ab"}, 2)
    assert "".join(done) == "baabba"
    assert seconds == {"a": [3.0, 6.0], "b": [4.0, 5.0]}


def test_a_ratio_is_the_median_of_pairs_and_not_a_ratio_of_medians():
    seconds = {"tempo": [1.0, 2.0, 4.0], "peer": [6.0, 2.0, 40.0]}
    row = Ratio("peer", "", "peer", "tempo", at_least=5).row(seconds)
    assert (row["ratio"], row["least"], row["most"], row["met"]) == (6.0, 1.0, 10.0, True)
    assert row["seconds"] == [6.0, 2.0]


@pytest.mark.parametrize(
    ("bounds", "met"),
    [
        ({}, None),
        ({"at_least": 2}, True),
        ({"at_least": 2.1}, False),
        ({"at_most": 2}, True),
        ({"at_most": 1.9}, False),
    ],
)
def test_bounds_are_met_or_not(bounds, met):
    assert judged(2.0, **bounds)["met"] is met


def test_exponents_are_those_of_a_power_law():
    x = [1, 2, 4, 8]
    assert exponents(x, [3 * n**1.5 for n in x]) == {"fitted": 1.5, "last": 1.5}
    assert exponents(x, [1, 1, 1, 4])["last"] == 2.0


def own_of_first_step(name, found):
    """Attention of the first new token of the first run, [L, H, N], as the peer captured it."""
    attention = found.attention[0]
    if name == "tempo":
        return attention[:, :, 0]
    if name == "nnsight":  # a flat list of steps and layers
        num_layers = len(attention) // NUM_STEPS
        layers = attention[num_layers : 2 * num_layers]
    elif name == "TransformerLens":
        layers = list(attention[1].values())
    else:
        layers = attention[1]
    return torch.stack([weights[0, :, -1] for weights in layers]).numpy()


@pytest.mark.parametrize(
    "name", ["generate", *(peers.OPTIONAL if os.environ.get("TEMPO_PEERS") else ())]
)
def test_peers_do_the_same_work(tiny, name):
    prompts = [text_of(tiny, 8, run) for run in range(2)]
    ours = peers.with_tempo(tiny, NUM_STEPS)(prompts)
    make = peers.with_generate if name == "generate" else peers.OPTIONAL[name][1]
    found = make(tiny, NUM_STEPS)(prompts)
    assert found.tokens == ours.tokens
    assert np.allclose(own_of_first_step(name, found), own_of_first_step("tempo", ours), atol=1e-5)


def test_peers_that_capture_nothing_choose_the_same_tokens(tiny):
    prompts = [text_of(tiny, 8, run) for run in range(3)]
    ours = peers.with_tempo(tiny, NUM_STEPS)(prompts).tokens
    together = peers.with_generate(tiny, NUM_STEPS, capture=False, together=True)
    assert together(prompts).tokens == ours
    continuous = peers.with_continuous(tiny, NUM_STEPS)
    assert continuous(prompts).tokens == ours
    assert continuous(prompts[::-1]).tokens == ours[::-1] != ours


def test_a_peer_leaves_the_model_alone(tiny):
    prompt = text_of(tiny, 8)
    before = tempo.generate(tiny, prompt, max_steps=2).steps[-1].distribution
    modules = [type(module) for module in tiny.model.modules()]
    for peer in peers.optional_peers(tiny, 2).values():
        peer([prompt])
    assert [type(module) for module in tiny.model.modules()] == modules
    assert np.array_equal(tempo.generate(tiny, prompt, max_steps=2).steps[-1].distribution, before)


def test_peers_are_named_whether_or_not_they_are_installed():
    assert {name: release is not None for name, release in peers.versions().items()} == {
        "nnsight": find_spec("nnsight") is not None,
        "TransformerLens": find_spec("transformer_lens") is not None,
    }


@pytest.mark.parametrize("width", [1, 16])
def test_a_wide_run_has_exactly_that_many_tokens_a_step(tiny, width):
    assert tempo.generate_batch(tiny, [wide(text_of(tiny, 8), width, 4)])[0].widths == [width] * 4


def test_models_of_any_number_of_layers(tiny):
    model = layers_of(tiny, 5)
    assert (model.num_layers, model.num_heads, tiny.num_layers) == (5, tiny.num_heads, 3)


@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="needs /proc/self/clear_refs")
def test_the_peak_is_what_was_computed():
    point = Point(runs=4, width=64, context=32, steps=24)
    large, small = memory.measured("tiny", [point, Point(1, 8, 8, 2)])
    assert abs(large["peak"] / large["computed"] - 1) <= NEAR, large
    # the small peak is of its own runs, not of those before
    assert large["computed"] > 50 * 2**20 > small["peak"]
    (spooled,) = memory.measured("tiny", [point._replace(spooled=True)])
    assert spooled["peak"] < large["peak"] / 4


def test_without_a_gpu_there_is_a_notice_and_with_one_this_would_run():
    if not torch.cuda.is_available():
        assert "no CUDA device" in speed.on_gpu(speed.QUICK[0])["skipped"]
    with random_llama(torch.bfloat16, "cpu", **SMALL) as lm:
        found = speed.ratios_of(lm, speed.QUICK[0], every=True)
    assert (found["dtype"], found["device"]) == ("bfloat16", "cpu")
    works = {"16 siblings", "transformers, eager", "single run", "bound"}
    captures = {"capture attention", "capture siblings", "capture residual"}
    assert works | captures <= {row["name"] for row in found["rows"]}


def test_the_committed_table_is_that_of_the_committed_record():
    report = json.loads((speed.TARGET / "speed.json").read_text(encoding="utf-8"))
    assert (speed.TARGET / "speed.md").read_text(encoding="utf-8") == markdown(report)
    names = {row["name"] for row in report["models"][0]["rows"]}
    assert {"nnsight", "TransformerLens", "single run", "capture siblings"} <= names


def test_one_command_writes_numbers_table_and_plot(tmp_path, capsys):
    speed.main(["--model", "tiny", "--quick", "--folder", str(tmp_path)])
    report = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    assert [found["dtype"] for found in report["models"]] == ["float32", "bfloat16"]
    in_float32 = report["models"][0]["rows"]
    sweeps = [row for row in in_float32 if "same_runs" in row]
    assert all(row["same_runs"].startswith("2 ") for row in sweeps)
    captures = [row for found in report["models"] for row in found["rows"] if "same_bits" in row]
    assert len(captures) == 6
    assert all(row["same_bits"] for row in captures)
    assert set(report["machine"]) == {"cores", "wait_policy", "load"}
    assert f"{report['machine']['cores']} cores, OMP_WAIT_POLICY" in markdown(report)
    assert {"transformers, one batch", "transformers, continuous batching"} <= {
        row["name"] for row in in_float32
    }
    assert set(report["time"]) == {"prompts", "arms", "width", "depth", "context", "layers"}
    assert set(report["memory"]) in (
        {"runs", "width", "context", "layers", "steps", SPOOLED},
        set(),
    )
    for curve in report["time"].values():
        assert len(curve["floor"]) == len(curve["seconds"]) == len(curve["values"])
        assert min(curve["floor"]) > 0
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".json", ".md", ".svg"]
    assert (tmp_path / "speed.md").read_text(encoding="utf-8") == markdown(report)
    assert "^" in (tmp_path / "speed.svg").read_text(encoding="utf-8")
    assert "16 siblings" in capsys.readouterr().out
