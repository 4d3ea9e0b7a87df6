"""Rounding floors by dtype: how far a run differs in other batches, orders and thread counts.

No two runs are called identical unless they were compared with these floors.
`python -m benchmarks.floors` measures them on SmolLM2-135M. It writes test_experiments/floors.json,
which the experiments read.
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
from fixtures.suite import suite_texts
from tempo import LanguageModel, RunSpec, Trace
from tempo.metrics import kl_divergence, total_variation
from tempo.parsing import seal

NUM_PROMPTS, NUM_STEPS, THRESHOLD = 20, 4, 0.05
ROWS = 16
CAPTURE = ("attention", "logits", "kv")


def in_batches(lm: LanguageModel, specs: Sequence[RunSpec]) -> list[Trace]:
    """The base of every comparison: sixteen runs at a time, in the order given."""
    return tempo.generate_batch(lm, specs, max_rows=ROWS)


def alone(lm: LanguageModel, specs: Sequence[RunSpec]) -> list[Trace]:
    """One run at a time."""
    return [tempo.generate_batch(lm, [spec])[0] for spec in specs]


def few_at_a_time(lm: LanguageModel, specs: Sequence[RunSpec]) -> list[Trace]:
    """Three runs at a time."""
    return tempo.generate_batch(lm, specs, max_rows=3)


def backwards(lm: LanguageModel, specs: Sequence[RunSpec]) -> list[Trace]:
    """Sixteen runs at a time, in the reverse order."""
    return tempo.generate_batch(lm, specs[::-1], max_rows=ROWS)[::-1]


def other_threads(lm: LanguageModel, specs: Sequence[RunSpec]) -> list[Trace]:
    """One thread if there are several, else two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if before > 1 else 2)
    try:
        return in_batches(lm, specs)
    finally:
        torch.set_num_threads(before)


def other_mode(lm: LanguageModel, specs: Sequence[RunSpec]) -> list[Trace]:
    """Visible siblings instead of isolated ones.

    This is an effect and no floor. It is measured to see both side by side.
    """
    return in_batches(lm, [spec.but(visibility="visible") for spec in specs])


VARIANTS: dict[str, Callable[[LanguageModel, Sequence[RunSpec]], list[Trace]]] = {
    "again": in_batches,
    "alone": alone,
    "few_at_a_time": few_at_a_time,
    "backwards": backwards,
    "other_threads": other_threads,
}


def differences(one: Trace, other: Trace) -> dict[str, float]:
    """The largest difference of any step, member, layer and head, by quantity."""
    pairs = list(zip(one.steps, other.steps, strict=True))
    cached = [(getattr(one, name), getattr(other, name)) for name in ("keys", "values")]
    moved = [a.distribution.argmax() != b.distribution.argmax() for a, b in pairs]
    return {
        "tv": max(total_variation(a.distribution, b.distribution) for a, b in pairs),
        "kl": max(kl_divergence(a.distribution, b.distribution) for a, b in pairs),
        "probability": max(_largest_gap(a.distribution, b.distribution) for a, b in pairs),
        "logit": max(_largest_gap(a.logits, b.logits) for a, b in pairs),
        "attention": max(_largest_gap(a.attention, b.attention) for a, b in pairs),
        "kv": max(_largest_gap(a, b) for a, b in cached),
        "top1_differs": float(np.mean(moved)),
    }


def _largest_gap(one: Any, other: Any) -> float:
    return float(np.abs(one - other).max())


def _largest_of(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """The largest value of each quantity."""
    largest = {}
    for key in found[0]:
        largest[key] = max(each[key] for each in found)
    return largest


def measure(lm: LanguageModel, specs: Sequence[RunSpec]) -> dict[str, Any]:
    """The floors, the variants they come from, and the effect of visibility beside them.

    `variants`: {variant: {quantity: largest over prompts}}. `floor`: their maximum by quantity.
    """
    base = in_batches(lm, specs)
    found = {}
    variants = [*VARIANTS.items(), ("effect", other_mode)]
    for name, variant in track(variants, str(lm.dtype), disable=not sys.stderr.isatty()):
        pairs = [differences(a, b) for a, b in zip(base, variant(lm, specs), strict=True)]
        largest = _largest_of(pairs)
        found[name] = {key: float(f"{value:.3g}") for key, value in largest.items()}
    effect = found.pop("effect")
    return {
        "floor": _largest_of(list(found.values())),
        "variants": found,
        "effect_of_visibility": effect,
    }


def main() -> None:
    """Measure, print, write."""
    prompts = suite_texts(NUM_PROMPTS)
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
    FLOORS.write_text(json.dumps(seal(report), indent=1) + "\n", encoding="utf-8")
    print(f"written: {FLOORS}")


if __name__ == "__main__":
    main()
