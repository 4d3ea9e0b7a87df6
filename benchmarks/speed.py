"""Speed and memory as ratios: tempo against transformers, nnsight, TransformerLens and the machine.

`python -m benchmarks.speed` writes speed.json, speed.md and speed.svg to reports/published.
`make speed` first installs the optional peers into an environment of their own.
Seconds depend on the machine. Every ratio compares works done in alternation in one process. It is
the median over rounds, with the least and the most beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markdown import Markdown
from transformers import DynamicCache

import tempo
from benchmarks.growth import Scale, memory_growth, step_seconds, time_growth
from benchmarks.memory import Point
from benchmarks.peers import (
    Captured,
    generate,
    greedy,
    optional_peers,
    same_runs,
    versions,
    with_continuous,
    with_generate,
    with_tempo,
)
from benchmarks.shapes import LLAMA_7B, random_llama, text_of, wide
from benchmarks.speed_report import markdown, picture_of
from benchmarks.timing import Ratio, Work, alternate, clock
from fixtures.suite import suite_texts
from tempo import LanguageModel, RunSpec
from tempo.attention import installed
from tempo.reporting.figures import save

SIBLINGS = 16
# These bounds were set before measuring.
# How many times as fast as each peer tempo has to be, in float32.
PEERS_AT_LEAST = {
    "generate": 6.0,
    "generate, one batch": 1.15,
    "nnsight": 7.0,
    "TransformerLens": 14.0,
    "single": 1.0,
}
# What a step of siblings may cost, over a step of one token.
SIBLINGS_AT_MOST = {torch.float32: 1.5, torch.bfloat16: 1.25}
# What capture may cost, over a run without, in float32.
CAPTURE_AT_MOST = {"attention": 1.15, "siblings": 1.03, "residual": 1.10}
# What weighting by posterior may cost, over no weighting, in float32.
WEIGHTING_AT_MOST = {"posterior": 1.05}
# Members of each set of the runs that are weighted.
WEIGHTED_WIDTH = 4
TARGET = Path("reports/published")


@dataclass(frozen=True)
class Size:
    """How much is done: runs, steps and prompt tokens of a sweep, and rounds."""

    runs: int = 16
    steps: int = 12
    context: int = 12
    sweep_rounds: int = 9
    # Rounds of everything shorter than a sweep.
    rounds: int = 5


QUICK = (
    Size(runs=2, steps=2, context=6, sweep_rounds=1, rounds=1),
    Scale(
        runs=(1, 2, 4),
        depth=(1, 2, 4),
        width=(1, 2, 4),
        slots=(64, 96, 128),
        layers=(1, 2),
        siblings=8,
        context=8,
        steps=2,
        rounds=1,
        base=Point(runs=2, width=4, context=16, steps=2),
        memory_context=(16, 32),
        memory_steps=(1, 2),
        large=Point(runs=2, width=8, context=16, steps=4),
    ),
)


# (name of the ratio, what it compares, the peer): each over tempo
SWEEPS = (
    ("transformers, eager", "generate with output_attentions, one run after another", "generate"),
    ("transformers, one batch", "the same with all runs in one batch", "generate, one batch"),
    (
        "transformers, one batch, last step too",
        "the same with one step more, which gives what tempo captures of the last tokens",
        "generate, one batch, last",
    ),
    (
        "transformers, sdpa",
        "generate that captures nothing, one run after another",
        "generate, no capture",
    ),
    (
        "transformers, one batch, sdpa",
        "generate that captures nothing, all runs in one batch",
        "generate, one batch, no capture",
    ),
    (
        "transformers, continuous batching",
        "its generate_batch, which captures nothing",
        "continuous batching",
    ),
    ("nnsight", "its traced generate, one run after another", "nnsight"),
    ("TransformerLens", "a loop of run_with_cache, one run after another", "TransformerLens"),
)


def in_float32(bounds: dict[str, float], lm: LanguageModel) -> dict[str, float]:
    """The bounds if the model is in float32; no bounds for other dtypes."""
    return bounds if lm.dtype == torch.float32 else {}


def sweep(lm: LanguageModel, size: Size, *, every: bool) -> list[dict[str, Any]]:
    """The same runs by tempo and by transformers, attention and logits captured.

    Also by transformers without capture, all runs in one batch and with continuous batching. With
    `every`, also one run after another, and by the optional peers.
    """
    prompts = [text_of(lm, size.context, run) for run in range(size.runs)]
    peers = {
        "tempo": with_tempo(lm, size.steps),
        "generate": with_generate(lm, size.steps),
        "generate, one batch": with_generate(lm, size.steps, together=True),
        "generate, one batch, last": with_generate(lm, size.steps, together=True, last=True),
    }
    peers["generate, one batch, no capture"] = with_generate(
        lm, size.steps, capture=False, together=True
    )
    peers["continuous batching"] = with_continuous(lm, size.steps)
    if every:
        peers["generate, no capture"] = with_generate(lm, size.steps, capture=False)
        peers |= optional_peers(lm, size.steps)
    tokens = {name: peer(prompts[:1]).tokens for name, peer in peers.items()}  # warms up

    def decode(name: str) -> None:
        found: Captured = peers[name](prompts)
        tokens[name] = found.tokens

    works = {name: partial(clock, decode, name) for name in peers}
    times = alternate(works, size.sweep_rounds, warm_up=False)
    bounds = in_float32(PEERS_AT_LEAST, lm)
    rows = []
    for name, what, peer in SWEEPS:
        if peer in peers:
            ratio = Ratio(name, what, peer, "tempo", at_least=bounds.get(peer))
            same = same_runs(tokens[peer], tokens["tempo"])
            rows.append(ratio.row(times) | {"same_runs": same})
    return rows


def own_lengths(lm: LanguageModel, size: Size) -> list[dict[str, Any]]:
    """The sweep over prompts of the suite as long as they are, against generate in one batch.

    generate pads them on the left. It makes one step more, so that it too captures what the last
    tokens give.
    """
    texts = suite_texts()
    prompts = [lm.encode(text) for text in texts[:: len(texts) // size.runs][: size.runs]]
    lengths = sorted(map(len, prompts))
    peers = {
        "tempo": with_tempo(lm, size.steps),
        "generate": with_generate(lm, size.steps, together=True, last=True),
    }
    tokens = {name: peer(prompts).tokens for name, peer in peers.items()}  # warms up
    works = {name: partial(clock, peer, prompts) for name, peer in peers.items()}
    times = alternate(works, size.sweep_rounds, warm_up=False)
    same = same_runs(tokens["generate"], tokens["tempo"])
    what = f"the same for prompts of {lengths[0]} to {lengths[-1]} tokens, padded on the left"
    row = Ratio("transformers, one batch, own lengths", what, "generate", "tempo").row(times)
    return [row | {"same_runs": same}]


def single(lm: LanguageModel, size: Size) -> list[dict[str, Any]]:
    """One greedy run without capture."""
    prompt = text_of(lm, size.context)
    works = {
        "tempo": partial(clock, tempo.generate_batch, lm, [greedy(prompt, size.steps)]),
        "generate": partial(clock, generate, lm, "sdpa", [prompt], size.steps),
    }
    what = "generate with sdpa over one run capped at width 1, neither with capture"
    at_least = in_float32(PEERS_AT_LEAST, lm).get("single")
    ratio = Ratio("single run", what, "generate", "tempo", at_least=at_least)
    return [ratio.row(alternate(works, size.rounds))]


def steps(lm: LanguageModel, size: Size) -> list[dict[str, Any]]:
    """A step of many siblings, a step of one, and two lower bounds of a step.

    The bounds are the model by itself, and its weights read once.
    """
    prompt = text_of(lm, size.context)
    step = partial(step_seconds, lm, prompt)
    model = partial(model_seconds, lm, prompt)
    captured = {name: f"{name} of {SIBLINGS}" for name in CAPTURE_AT_MOST}
    works: dict[str, Work] = {
        "one": partial(step, 1, size.steps),
        "siblings": partial(step, SIBLINGS, size.steps),
        **{
            work: partial(step, SIBLINGS, size.steps, capture=(name,))
            for name, work in captured.items()
        },
        "model, one": partial(model, 1, size.steps),
        "model, siblings": partial(model, SIBLINGS, size.steps),
        "weights": weights_read(lm),
    }
    times = alternate(works, size.rounds)
    ratios = [
        Ratio(
            f"{SIBLINGS} siblings",
            f"a step of {SIBLINGS} siblings over a step of one",
            "siblings",
            "one",
            at_most=SIBLINGS_AT_MOST[lm.dtype],
        ),
        Ratio(
            "model alone",
            f"transformers' forward pass of {SIBLINGS} tokens over that of one",
            "model, siblings",
            "model, one",
        ),
        Ratio(
            "one over model",
            "a step of one over transformers' forward pass of one token",
            "one",
            "model, one",
        ),
        Ratio(
            "siblings over model",
            f"a step of {SIBLINGS} siblings over the pass of {SIBLINGS} tokens",
            "siblings",
            "model, siblings",
        ),
        Ratio(
            "bound",
            "a step of one over reading as many bytes as the weights have",
            "one",
            "weights",
        ),
    ]
    bounds = in_float32(CAPTURE_AT_MOST, lm)
    for name, work in captured.items():
        what = f"the step of {SIBLINGS} with {name} captured over without"
        title = f"capture {name}, {SIBLINGS} siblings"
        ratios.append(Ratio(title, what, work, "siblings", at_most=bounds.get(name)))
    return [ratio.row(times) for ratio in ratios]


def model_seconds(lm: LanguageModel, prompt: Sequence[int], width: int, num_steps: int) -> float:
    """Seconds of one forward pass of `width` tokens as transformers runs it.

    It uses sdpa and a cache of its own, which grows with each pass.
    """
    with installed(lm.model, "sdpa"), torch.inference_mode():
        options: dict[str, Any] = {
            "use_cache": True,
            lm.cache_keyword: DynamicCache(config=lm.model.config),
        }
        lm.model(torch.tensor([prompt], device=lm.device), logits_to_keep=1, **options)
        tokens = torch.tensor([[0] * width], device=lm.device)
        return clock(lambda: [lm.model(tokens, **options) for _ in range(num_steps)]) / num_steps


def weights_read(lm: LanguageModel) -> Work:
    """A work that reads as many bytes as a pass must.

    These are all weights, less an input embedding that does not serve as output weights as well.
    """
    tied = lm.model.get_input_embeddings().weight is lm.model.get_output_embeddings().weight
    num_bytes = sum(parameter.nbytes for parameter in lm.model.parameters())
    num_bytes -= 0 if tied else lm.model.get_input_embeddings().weight.nbytes
    # float32 for every model, because the sum of bfloat16 is slower than reading it
    numbers = torch.ones(num_bytes // 4, device=lm.device)
    return partial(clock, numbers.sum)


def capture(lm: LanguageModel, size: Size) -> list[dict[str, Any]]:
    """The sweep with attention captured over as many passes without.

    `same_bits` says whether capture left every bit of the runs as it was.
    """
    prompts = [text_of(lm, size.context, run) for run in range(size.runs)]
    # capture of the last set takes a pass, which a run without capture spends on one more step
    without = [greedy(prompt, size.steps + 1) for prompt in prompts]
    captured = {}
    for name in CAPTURE_AT_MOST:
        changes = {"max_steps": size.steps, "capture": (name,)}
        captured[name] = [spec.but(**changes) for spec in without]
    works = {
        name: partial(clock, tempo.generate_batch, lm, specs)
        for name, specs in {"without": without, **captured}.items()
    }
    times = alternate(works, size.rounds)
    wide_runs = [wide(prompt, SIBLINGS, size.steps) for prompt in prompts[:2]]
    bounds = in_float32(CAPTURE_AT_MOST, lm)
    rows = []
    for name in CAPTURE_AT_MOST:
        what = f"the sweep with {name} captured over as many passes without"
        ratio = Ratio(f"capture {name}", what, name, "without", at_most=bounds.get(name))
        wide_captured = [spec.but(capture=(name, "logits")) for spec in wide_runs]
        bits = same_bits(lm, without, captured[name]) and same_bits(lm, wide_runs, wide_captured)
        row = ratio.row(times) | {"same_bits": bits}
        rows.append(row | {"met": bits and row["met"]})
    return rows


def weighting(lm: LanguageModel, size: Size) -> list[dict[str, Any]]:
    """Free runs with members weighted by query, over the same number of members unweighted."""
    prompts = [text_of(lm, size.context, run) for run in range(size.runs)]
    common = {"threshold": 0.0, "top_k": WEIGHTED_WIDTH, "stop_at_eos": False}
    works = {}
    for name in ("none", *WEIGHTING_AT_MOST):
        settings = {**common, "weighting": name, "max_steps": size.steps}
        specs = [RunSpec(prompt=tuple(prompt), **settings) for prompt in prompts]
        works[name] = partial(clock, tempo.generate_batch, lm, specs)
    times = alternate(works, size.rounds)
    bounds = in_float32(WEIGHTING_AT_MOST, lm)
    rows = []
    for name in WEIGHTING_AT_MOST:
        what = f"{size.runs} runs of sets of {WEIGHTED_WIDTH}, weighting {name} over none"
        ratio = Ratio(f"weighting {name}", what, name, "none", at_most=bounds.get(name))
        rows.append(ratio.row(times))
    return rows


def same_bits(lm: LanguageModel, plain: Sequence[RunSpec], full: Sequence[RunSpec]) -> bool:
    """Whether runs with capture choose from the same distributions as runs without, to the bit."""
    runs = tempo.generate_batch(lm, plain)
    captured = tempo.generate_batch(lm, full)
    for one, other in zip(runs, captured, strict=True):
        # a run without capture may have one step more
        for a, b in zip(one.steps, other.steps, strict=False):
            if a.tokens != b.tokens or not np.array_equal(a.distribution, b.distribution):
                return False
    return True


def ratios_of(lm: LanguageModel, size: Size, *, every: bool) -> dict[str, Any]:
    """All ratios of one model."""
    began = time.perf_counter()
    rows = sweep(lm, size, every=every)
    rows += own_lengths(lm, size) if lm.tokenizer else []
    rows += single(lm, size) + steps(lm, size)
    rows += capture(lm, size) + weighting(lm, size)
    return lm.provenance() | {"rows": rows, "took": round(time.perf_counter() - began)}


def on_gpu(size: Size) -> dict[str, Any]:
    """The ratios of a random Llama of seven billion weights in bfloat16, or why there are none."""
    if not torch.cuda.is_available():
        missing = f"torch {torch.__version__} sees no CUDA device"
        return {"skipped": f"{missing}, so a random Llama of the shape of 7B was not measured"}
    with random_llama(torch.bfloat16, "cuda", **LLAMA_7B) as lm:
        return ratios_of(lm, size, every=True) | {"device": torch.cuda.get_device_name()}


def measure(
    model: str, size: Size, scale: Scale, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """The whole report. After each part, `keep` gets the report so far."""
    began = time.perf_counter()
    report: dict[str, Any] = {
        "runs": size.runs,
        "steps": size.steps,
        "rounds": {"sweeps": size.sweep_rounds, "others": size.rounds},
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "peers": versions(),
        "models": [],
    }
    for dtype in ("float32", "bfloat16"):
        with tempo.load_model(model, dtype=dtype) as lm:
            print(f"{model} in {dtype}", file=sys.stderr, flush=True)
            report["models"].append(ratios_of(lm, size, every=dtype == "float32"))
            keep(report)
            if dtype == "float32":
                print("growth", file=sys.stderr, flush=True)
                report["time"] = time_growth(lm, scale)
                keep(report)
    print("memory", file=sys.stderr, flush=True)
    report |= memory_growth(model, scale)
    keep(report)
    report["gpu"] = on_gpu(size)
    report["machine_after"] = machine()
    return report | {"took": round(time.perf_counter() - began)}


def machine() -> dict[str, Any]:
    """What ratios depend on beside the code: cores, how threads wait, and what else is running."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    waiting = os.environ.get("OMP_WAIT_POLICY", "not set")
    return {"cores": os.cpu_count(), "wait_policy": waiting, "load": load}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    where = "where speed.json, speed.md and speed.svg go"
    parser.add_argument("--folder", type=Path, default=TARGET, help=where)
    once = "make every measurement once and small, to see whether it runs"
    parser.add_argument("--quick", action="store_true", help=once)
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    so_far = options.folder / "speed.unfinished.json"
    scales = QUICK if options.quick else (Size(), Scale())
    report = measure(options.model, *scales, keep=lambda part: _write(so_far, part))
    publish(report, options.folder)
    so_far.unlink()
    Console().print(Markdown(markdown(report)))
    print(
        f"written: speed.json, speed.md and speed.svg in {options.folder}; took {report['took']} s"
    )


def publish(report: dict[str, Any], folder: Path) -> None:
    """Write the numbers, the table and the plot."""
    _write(folder / "speed.json", report)
    (folder / "speed.md").write_text(markdown(report), encoding="utf-8")
    save(replace(picture_of(report), png=b""), folder)


def _write(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
