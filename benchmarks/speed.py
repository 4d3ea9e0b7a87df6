"""Speed as ratios, measured in alternation in one process on the same work: tempo against transformers' `generate`.

`python -m benchmarks.speed` prints a table and writes reports/published/speed.json. Seconds depend on the machine; a ratio
is of medians over paired repetitions, with the smallest and the largest pair beside it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import tempo
from fixtures.study import suite_prompts
from tempo import LanguageModel, RunSpec
from tempo.attention import installed

NUM_RUNS, NUM_STEPS, NUM_PAIRS = 16, 12, 7
SIBLINGS = 16

Work = Callable[[], Any]


def generate_with(lm: LanguageModel, implementation: str, tokens: list[list[int]], **options: Any) -> Any:
    """transformers' own greedy generate over equally long prompts, exactly NUM_STEPS tokens each."""
    ids = torch.tensor(tokens)
    with installed(lm.model, implementation):
        return lm.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_STEPS, min_new_tokens=NUM_STEPS, do_sample=False,
            pad_token_id=0, return_dict_in_generate=True, **options,
        )  # fmt: skip


def greedy(tokens: list[int], **settings: Any) -> RunSpec:
    return RunSpec(prompt=tokens, max_width=1, max_steps=NUM_STEPS, stop_at_eos=False, **settings)


def comparisons(lm: LanguageModel) -> dict[str, tuple[str, Work, Work]]:
    """{name: (what is compared, tempo's work, the peer's work)}; both sides do the same amount."""
    length = min(len(lm.encode(prompt)) for _, prompt in suite_prompts(NUM_RUNS))
    prompts = [lm.encode(prompt)[:length] for _, prompt in suite_prompts(NUM_RUNS)]
    captured = [greedy(tokens, capture=("attention", "logits")) for tokens in prompts]
    outputs = {"output_attentions": True, "output_logits": True}
    one = greedy(prompts[0])
    narrow, wide = (width_of(lm, prompts[0], width) for width in (1, SIBLINGS))
    return {
        "sweep, one by one": (
            f"{NUM_RUNS} runs x {NUM_STEPS} steps, attention and logits captured, against eager generate on one after another",
            lambda: tempo.generate_batch(lm, captured, max_rows=NUM_RUNS),
            lambda: [generate_with(lm, "eager", [tokens], **outputs) for tokens in prompts],
        ),
        "sweep, batched": (
            "the same against eager generate on all of them at once (equally long prompts: no padding)",
            lambda: tempo.generate_batch(lm, captured, max_rows=NUM_RUNS),
            lambda: generate_with(lm, "eager", prompts, **outputs),
        ),
        "single run": (
            f"one run of {NUM_STEPS} steps, nothing captured, against sdpa generate",
            lambda: tempo.generate_batch(lm, [one]),
            lambda: generate_with(lm, "sdpa", [prompts[0]]),
        ),
        f"{SIBLINGS} siblings": (
            f"steps of {SIBLINGS} siblings against steps of one",
            lambda: tempo.generate_batch(lm, [narrow]),
            lambda: tempo.generate_batch(lm, [wide]),
        ),
        "capture": (
            "a batch with nothing captured against the same with attention",
            lambda: tempo.generate_batch(lm, [spec.but(capture=()) for spec in captured], max_rows=NUM_RUNS),
            lambda: tempo.generate_batch(lm, [spec.but(capture=("attention",)) for spec in captured], max_rows=NUM_RUNS),
        ),
    }


def width_of(lm: LanguageModel, tokens: list[int], width: int) -> RunSpec:
    """A replay of NUM_STEPS sets of `width` arbitrary tokens."""
    sets = [[(97 * k + 31 * i) % lm.vocab_size for i in range(width)] for k in range(NUM_STEPS)]
    return RunSpec(prompt=tokens, replay=sets)


def measure(ours: Work, theirs: Work) -> dict[str, float]:
    """Median seconds of both, and the peer's over tempo's: above 1, tempo is faster."""
    pairs = []
    for repetition in range(NUM_PAIRS + 1):  # the first warms up
        order = (ours, theirs) if repetition % 2 else (theirs, ours)
        times = {}
        for work in order:
            began = time.perf_counter()
            work()
            times[work] = time.perf_counter() - began
        pairs.append((times[ours], times[theirs]))
    pairs = pairs[1:]
    ratios = [theirs / ours for ours, theirs in pairs]
    return {
        "tempo_seconds": round(statistics.median(pair[0] for pair in pairs), 4),
        "peer_seconds": round(statistics.median(pair[1] for pair in pairs), 4),
        "ratio": round(statistics.median(ratios), 3), "least": round(min(ratios), 3), "most": round(max(ratios), 3),
    }  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    report: dict[str, Any] = {"runs": NUM_RUNS, "steps": NUM_STEPS, "pairs": NUM_PAIRS, "threads": torch.get_num_threads(), "dtypes": {}}
    table = Table("dtype", "comparison", "tempo s", "peer s", "peer / tempo", "least to most")
    for dtype in ("float32", "bfloat16"):
        with tempo.load_model("smollm2-135m", dtype=dtype) as lm:
            found = report["dtypes"][dtype] = lm.provenance()
            for name, (what, ours, theirs) in track(comparisons(lm).items(), dtype, disable=not sys.stderr.isatty()):
                found[name] = {"what": what} | measure(ours, theirs)
                m = found[name]
                table.add_row(
                    dtype, name, *(f"{m[key]:.3g}" for key in ("tempo_seconds", "peer_seconds", "ratio")), f"{m['least']} to {m['most']}"
                )
    Console().print(table)
    target = Path("reports/published/speed.json")
    target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written: {target}")


if __name__ == "__main__":
    main()
