"""Engine against oracle on the real model: every visibility, positions, readout and weighting over twenty prompts.

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
# float32. Both sides are about 5e-6 in attention from the same run in float64, so two of them can be 1e-5 apart and a
# little more; the same comparison in float64 has no such excuse (FLOAT64_BOUND).
BOUNDS = {"probabilities": 1e-5, "logits": 1e-3, "attention": 5e-5, "kv": 2e-3}
# transformers computes softmax and norms in float32 even in a float64 model, so 1e-6 is what can be had.
FLOAT64_BOUND = 1e-5
NUM_PROMPTS, NUM_STEPS, THRESHOLD = 20, 3, 0.06


def specs(prompt: str, settings: Sequence[dict[str, Any]]) -> list[RunSpec]:
    """One run for each of the settings, everything captured."""
    common = {"prompt": prompt, "threshold": THRESHOLD, "max_steps": NUM_STEPS, "capture": ("attention", "logits", "kv")}
    return [RunSpec(**common | chosen) for chosen in settings]


def deviations(lm: LanguageModel, run: Trace) -> dict[str, Any]:
    """The largest differences of a run from the oracle's, each having chosen its sets freely."""
    exact = tempo.reference.generate(lm, **run.spec.model_dump())
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
    for dtype, settings in (("float32", SETTINGS), ("float64", SETTINGS[::6])):
        began = time.perf_counter()
        with tempo.load_model("smollm2-135m", dtype=dtype) as lm:
            found = []
            for prompt in track(prompts, description=dtype, disable=not sys.stderr.isatty()):
                found += [deviations(lm, run) for run in tempo.generate_batch(lm, specs(prompt, settings), max_rows=24)]
            matched = [f for f in found if f["same_sets"]]
            report["dtypes"][dtype] = {
                "runs": len(found),
                "other_sets": len(found) - len(matched),
                "runs_with_a_wide_set": sum(f["widest"] > 1 for f in matched),
                **{name: max(f[name] for f in matched) for name in ("probabilities", "logits", "attention", "kv", "forbidden")},
                "attention_over_1e-5": sum(f["attention"] > 1e-5 for f in matched),
                "seconds": round(time.perf_counter() - began),
                **lm.provenance(),
            }
        print(json.dumps({dtype: report["dtypes"][dtype]}, indent=1), flush=True)
    target = Path("reports/published/conformance.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written: {target}")


if __name__ == "__main__":
    main()
