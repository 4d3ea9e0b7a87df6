"""Engine against oracle on the real model: every visibility, positions, readout and weighting over twenty prompts.

The oracle runs in float64, so that a deviation is the engine's own and not the sum of two roundings.
`python -m benchmarks.conformance` prints the largest deviations and writes reports/published/conformance.json.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

import tempo
from fixtures.study import suite_prompts
from tempo import LanguageModel, RunSpec, Trace
from tempo.spec import POSITIONS, READOUTS, VISIBILITIES, WEIGHTINGS

SETTINGS = [
    {"visibility": v, "positions": p, "readout": r, "weighting": w}
    for v, p, r, w in itertools.product(VISIBILITIES, POSITIONS, READOUTS, WEIGHTINGS)
]
# Of a float32 engine from a float64 oracle. (Two float32 runs can each be 8e-6 off in attention, and 2e-5 apart.)
BOUNDS = {"probabilities": 1e-5, "logits": 1e-3, "attention": 1e-5, "kv": 2e-3}
NUM_PROMPTS, NUM_STEPS, THRESHOLD = 20, 3, 0.06


def specs(prompt: str, settings: Sequence[dict[str, Any]]) -> list[RunSpec]:
    """One run for each of the settings, everything captured."""
    common = {"prompt": prompt, "threshold": THRESHOLD, "max_steps": NUM_STEPS, "capture": ("attention", "logits", "kv")}
    return [RunSpec(**common | chosen) for chosen in settings]


def deviations(oracle: LanguageModel, run: Trace) -> dict[str, Any]:
    """The largest differences of a run from the oracle's, each having chosen its sets freely."""
    exact = tempo.reference.generate(oracle, **run.spec.model_dump())
    if run.sets != exact.sets:
        return {"same_sets": False}
    pairs = list(zip(run.steps, exact.steps, strict=True))
    return {
        "same_sets": True,
        "widest": max(run.widths),
        "probabilities": max(float(np.abs(a.distribution - b.distribution).max()) for a, b in pairs),
        "logits": max(float(np.abs(a.logits - b.logits).max()) for a, b in pairs),
        "attention": max(float(np.abs(a.attention - b.attention).max()) for a, b in pairs),
        "kv": max(float(np.abs(getattr(run, n) - getattr(exact, n)).max()) for n in ("keys", "values", "raw_keys")),
        "forbidden": _largest_forbidden(run),
    }


def _largest_forbidden(run: Trace) -> float:
    """The largest weight between two members that may not see each other."""
    largest = 0.0
    for step in run.steps:
        width = len(step.tokens)
        may = {"isolated": np.eye(width), "visible": np.ones((width, width)), "causal": np.tri(width)}[run.spec.visibility]
        block = step.attention[..., step.slots[0] :]
        largest = max(largest, float(block[..., may == 0].max(initial=0.0)))
    return largest


def main() -> None:
    """Measure, print, write."""
    prompts = [prompt for _, prompt in suite_prompts(NUM_PROMPTS)]
    report: dict[str, Any] = {"prompts": prompts, "settings": len(SETTINGS), "steps": NUM_STEPS, "threshold": THRESHOLD, "dtypes": {}}
    with tempo.load_model("smollm2-135m", dtype="float64") as oracle, tempo.load_model("smollm2-135m") as single:
        for lm, settings in ((single, SETTINGS), (oracle, SETTINGS[::6])):
            measured = measure(lm, oracle, prompts, settings)
            report["dtypes"][measured["dtype"]] = measured
            print(json.dumps(measured, indent=1), flush=True)
    target = Path("reports/published/conformance.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written: {target}")


def measure(lm: LanguageModel, oracle: LanguageModel, prompts: Sequence[str], settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The largest deviations over all prompts and settings, and how many runs are beyond a bound."""
    began = time.perf_counter()
    found = []
    for prompt in track(prompts, description=str(lm.dtype), disable=not sys.stderr.isatty()):
        found += [deviations(oracle, run) for run in tempo.generate_batch(lm, specs(prompt, settings), max_rows=24)]
    matched = [f for f in found if f["same_sets"]]
    return {
        "oracle": str(oracle.dtype).removeprefix("torch."),
        "runs": len(found),
        "other_sets": len(found) - len(matched),
        "runs_with_a_wide_set": sum(f["widest"] > 1 for f in matched),
        **{name: max(f[name] for f in matched) for name in ("probabilities", "logits", "attention", "kv", "forbidden")},
        "beyond_a_bound": sum(any(f[name] > bound for name, bound in BOUNDS.items()) for f in matched),
        "seconds": round(time.perf_counter() - began),
        **lm.provenance(),
    }


if __name__ == "__main__":
    main()
