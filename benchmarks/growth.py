"""How time and memory grow with runs, width, context and layers: one quantity varied at a time, exponents fitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import tempo
from benchmarks import memory
from benchmarks.memory import Point
from benchmarks.peers import greedy
from benchmarks.shapes import layers_of, text_of, wide
from benchmarks.timing import alternate, clock, exponents, judged, significant
from tempo import LanguageModel

MICROSECOND = 1e-6  # the least that a difference of times counts as: on a busy machine noise may turn a small one negative
LINEAR = 1.1  # what an exponent of linear growth may come out at

NEAR = 0.1  # how far the peak memory may be from what was computed
BASE = Point(runs=8, width=8, context=64, steps=8)  # what memory is varied around
SPOOLED = "spooled"  # the same steps, their arrays on disk
LARGE = Point(
    runs=16, width=16, context=64, steps=12
)  # 1.4 GB on SmolLM2-135M, so that one pass's own memory is little beside it


@dataclass(frozen=True)
class Scale:
    """How far each quantity is varied, and over how many steps and rounds a time is taken."""

    runs: Sequence[int] = (1, 2, 4, 8, 16, 32)
    width: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
    slots: Sequence[int] = (128, 256, 512, 1024, 2048)  # of one run, read by steps of `siblings`
    layers: Sequence[int] = (4, 8, 16, 32)
    siblings: int = 32
    context: int = 16  # prompt tokens of timed runs
    steps: int = 8
    rounds: int = 2
    base: Point = BASE
    memory_context: Sequence[int] = (64, 128, 256, 512)
    memory_steps: Sequence[int] = (8, 16, 32, 64)
    large: Point = LARGE


def step_seconds(
    lm: LanguageModel, prompt: Sequence[int], width: int, num_steps: int, **settings: Any
) -> float:
    """Seconds of one step of `width` siblings: a run of one step, whose prompt pass it shares, taken off a longer one."""
    long, short = (wide(prompt, width, steps, **settings) for steps in (num_steps + 1, 1))
    difference = clock(tempo.generate_batch, lm, [long]) - clock(tempo.generate_batch, lm, [short])
    return max(difference, MICROSECOND) / num_steps


def time_growth(lm: LanguageModel, scale: Scale) -> dict[str, dict[str, Any]]:
    """{quantity: its values, median seconds, exponents}."""
    prompt = text_of(lm, scale.context)
    models = {n: layers_of(lm, n) for n in scale.layers}

    def sweep(n: int) -> float:
        specs = [
            greedy(text_of(lm, scale.context, run), scale.steps, capture=("attention", "logits"))
            for run in range(n)
        ]
        return clock(tempo.generate_batch, lm, specs)

    def grown(what: str, values: Sequence[int], work: Callable[[int], float]) -> dict[str, Any]:
        times = alternate({value: partial(work, value) for value in values}, scale.rounds)
        return _curve(what, values, [median(times[value]) for value in values])

    return {
        "runs": grown(
            f"a sweep of {scale.steps} steps, attention and logits captured", scale.runs, sweep
        ),
        "width": grown(
            "a step of one run",
            scale.width,
            lambda width: step_seconds(lm, prompt, width, scale.steps),
        ),
        "context": slots_growth(lm, scale),
        "layers": grown(
            "a step of one token, random weights",
            scale.layers,
            lambda n: step_seconds(models[n], prompt, 1, scale.steps),
        ),
    }


def slots_growth(lm: LanguageModel, scale: Scale) -> dict[str, Any]:
    """Seconds of a pass against the slots it reads: one long run, the passes within a tenth of each number of slots."""
    most = scale.slots[-1]
    spec = wide(
        text_of(lm, scale.context),
        scale.siblings,
        -(-(most - scale.context) * 11 // (10 * scale.siblings)) + 1,
    )
    seconds: dict[int, list[float]] = {slots: [] for slots in scale.slots}
    for _ in range(scale.rounds):
        trace = tempo.generate_batch(lm, [spec])[0]
        # step k was chosen in the pass that read all slots before its own
        read = [(step.slots[0], step.seconds) for step in trace.steps[1:]]
        for slots, found in seconds.items():
            found += [spent for number, spent in read if abs(number - slots) <= slots / 10]
    reached = [
        slots for slots in scale.slots if seconds[slots]
    ]  # a run may end before the most slots
    curve = _curve(
        f"a step of {scale.siblings} siblings of one run",
        reached,
        [median(seconds[slots]) for slots in reached],
    )
    met = all(curve["exponents"][key] <= LINEAR for key in ("fitted", "last"))
    return curve | {"at_most": LINEAR, "met": met}


def memory_growth(model: str, scale: Scale) -> dict[str, Any]:
    """`peak`: the largest runs' peak over what was computed; `memory`: {quantity: values, bytes computed and measured, exponents}."""
    axes = {
        "runs": scale.runs,
        "width": scale.width,
        "context": scale.memory_context,
        "layers": scale.layers,
        "steps": scale.memory_steps,
    }
    points = [scale.base._replace(**{axis: n}) for axis, values in axes.items() for n in values]
    axes[SPOOLED] = scale.memory_steps
    points += [scale.base._replace(steps=n, spooled=True) for n in scale.memory_steps]
    rows = memory.measured(model, [scale.large, *points])
    if not rows:
        return {
            "peak": {
                "skipped": "the peak of a process cannot be reset here; Linux has /proc/self/clear_refs"
            },
            "memory": {},
        }
    large, rows = rows[0], rows[1:]
    growth = {}
    for axis, values in axes.items():
        found, rows = rows[: len(values)], rows[len(values) :]
        computed, peak = ([row[key] for row in found] for key in ("computed", "peak"))
        growth[axis] = {
            "values": list(values), "computed": computed, "peak": peak,
            "exponents": exponents(values, peak), "computed_exponents": exponents(values, computed),
        }  # fmt: skip
    return {
        "peak": large | judged(large["peak"] / large["computed"], 1 - NEAR, 1 + NEAR),
        "memory": growth,
    }


def _curve(what: str, values: Sequence[int], seconds: Sequence[float]) -> dict[str, Any]:
    return {
        "what": what,
        "values": list(values),
        "seconds": [significant(s) for s in seconds],
        "exponents": exponents(values, seconds),
    }
