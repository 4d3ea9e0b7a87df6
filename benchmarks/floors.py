"""Rounding floors: how far apart the same run comes out in other batch shapes, orders and thread counts, by dtype.

Nothing is called identical that was not compared with these. `python -m benchmarks.floors` measures them on SmolLM2-135M
and writes test_experiments/floors.json, which the experiments read.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from rich.progress import track

import tempo
from fixtures.floors import FLOORS
from fixtures.study import suite_prompts
from tempo import LanguageModel, RunSpec, Trace
from tempo.metrics import kl_divergence, total_variation

NUM_PROMPTS, NUM_STEPS, THRESHOLD = 20, 4, 0.05
ROWS = 16
CAPTURE = ("attention", "logits", "kv")


def in_batches(lm: LanguageModel, specs: Sequence[RunSpec]) -> list[Trace]:
    """What every variant is compared with: sixteen runs at a time, in the order given."""
    return tempo.generate_batch(lm, specs, max_rows=ROWS)


def alone(lm: LanguageModel, specs: Sequence[RunSpec]) -> list[Trace]:
    return [tempo.generate_batch(lm, [spec])[0] for spec in specs]


def few_at_a_time(lm: LanguageModel, specs: Sequence[RunSpec]) -> list[Trace]:
    return tempo.generate_batch(lm, specs, max_rows=3)


def backwards(lm: LanguageModel, specs: Sequence[RunSpec]) -> list[Trace]:
    return tempo.generate_batch(lm, specs[::-1], max_rows=ROWS)[::-1]


def other_threads(lm: LanguageModel, specs: Sequence[RunSpec]) -> list[Trace]:
    """With one thread if there are several, else with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if before > 1 else 2)
    try:
        return in_batches(lm, specs)
    finally:
        torch.set_num_threads(before)


def other_mode(lm: LanguageModel, specs: Sequence[RunSpec]) -> list[Trace]:
    """No floor but an effect, to see them side by side: visible instead of isolated siblings."""
    return in_batches(lm, [spec.but(visibility="visible") for spec in specs])


VARIANTS: dict[str, Callable[[LanguageModel, Sequence[RunSpec]], list[Trace]]] = {
    "again": in_batches, "alone": alone, "few_at_a_time": few_at_a_time, "backwards": backwards, "other_threads": other_threads,
}  # fmt: skip


def differences(one: Trace, other: Trace) -> dict[str, float]:
    """The largest difference of any step, member, layer and head, by quantity."""
    pairs = list(zip(one.steps, other.steps, strict=True))
    return {
        "tv": max(total_variation(a.distribution, b.distribution) for a, b in pairs),
        "kl": max(kl_divergence(a.distribution, b.distribution) for a, b in pairs),
        "probability": max(float(np.abs(a.distribution - b.distribution).max()) for a, b in pairs),
        "logit": max(float(np.abs(a.logits - b.logits).max()) for a, b in pairs),
        "attention": max(float(np.abs(a.attention - b.attention).max()) for a, b in pairs),
        "kv": max(
            float(np.abs(getattr(one, name) - getattr(other, name)).max())
            for name in ("keys", "values")
        ),
        "top1_differs": float(
            np.mean([a.distribution.argmax() != b.distribution.argmax() for a, b in pairs])
        ),
    }


def measure(lm: LanguageModel, specs: Sequence[RunSpec]) -> dict[str, Any]:
    """{variant: {quantity: largest over prompts}}, their maximum as "floor", and the effect of the mode beside it."""
    base = in_batches(lm, specs)
    found = {}
    for name, variant in track(
        [*VARIANTS.items(), ("effect", other_mode)], str(lm.dtype), disable=not sys.stderr.isatty()
    ):
        pairs = [differences(a, b) for a, b in zip(base, variant(lm, specs), strict=True)]
        found[name] = {key: float(f"{max(pair[key] for pair in pairs):.3g}") for key in pairs[0]}
    effect = found.pop("effect")
    return {
        "floor": {key: max(f[key] for f in found.values()) for key in effect},
        "variants": found,
        "effect_of_visibility": effect,
    }


def main() -> None:
    """Measure, print, write."""
    prompts = [prompt for _, prompt in suite_prompts(NUM_PROMPTS)]
    with tempo.load_model("smollm2-135m") as lm:
        free = tempo.generate_batch(
            lm, [RunSpec(prompt=p, threshold=THRESHOLD, max_steps=NUM_STEPS) for p in prompts]
        )
    specs = [trace.spec.but(replay=trace, capture=CAPTURE) for trace in free]
    report: dict[str, Any] = {
        "model": "smollm2-135m",
        "prompts": NUM_PROMPTS,
        "steps": NUM_STEPS,
        "threshold": THRESHOLD,
        "dtypes": {},
    }
    for dtype in ("float32", "bfloat16", "float64"):
        began = time.perf_counter()
        with tempo.load_model("smollm2-135m", dtype=dtype) as lm:
            measured = measure(lm, specs)
            report["dtypes"][dtype] = measured | {
                "seconds": round(time.perf_counter() - began),
                **lm.provenance(),
            }
        print(dtype, json.dumps(measured, indent=1), flush=True)
    FLOORS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written: {FLOORS}")


if __name__ == "__main__":
    main()
