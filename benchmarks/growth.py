"""How time and memory grow with prompts, arms, width, depth, context and layers.

One quantity is varied at a time, and the exponent of its growth is fitted. Beside each time stands
its floor: what as many tokens take the bare model in large passes.
"""

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
from benchmarks.timing import (
    alternate,
    clock,
    exponents,
    judged,
    significant,
    token_seconds,
    wall,
)
from tempo import LanguageModel, RunSpec

# Members of each set of a forced run.
ARM = 4
# A difference of times counts as at least this much. On a busy machine noise may turn a small
# difference negative.
MICROSECOND = 1e-6
# The largest exponent that still counts as linear growth.
LINEAR = 1.1
# The most by which the measured peak memory may differ from the computed one, as a share of it.
NEAR = 0.1
# Memory is varied around this point.
BASE = Point(runs=8, width=8, context=64, steps=8)
# The same steps with their arrays on disk.
SPOOLED = "spooled"
# 1.4 GB on SmolLM2-135M, so that the memory of a single pass is small beside it.
LARGE = Point(runs=16, width=16, context=64, steps=12)


@dataclass(frozen=True)
class Scale:
    """How far each quantity is varied, and over how many steps and rounds a time is taken."""

    runs: Sequence[int] = (1, 2, 4, 8, 16, 32)
    depth: Sequence[int] = (8, 16, 32, 64, 128)
    width: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
    # Slots of one run that passes of `siblings` tokens read.
    slots: Sequence[int] = (128, 256, 512, 1024, 2048)
    layers: Sequence[int] = (4, 8, 16, 32)
    siblings: int = 32
    # Prompt tokens of timed runs.
    context: int = 16
    steps: int = 8
    rounds: int = 2
    base: Point = BASE
    memory_context: Sequence[int] = (64, 128, 256, 512)
    memory_steps: Sequence[int] = (8, 16, 32, 64)
    large: Point = LARGE


def step_seconds(
    lm: LanguageModel, prompt: Sequence[int], width: int, num_steps: int, **settings: Any
) -> float:
    """Seconds of one step of `width` siblings.

    A run of one step is subtracted from a longer one, because both include the prompt's pass.
    """
    long, short = (wide(prompt, width, steps, **settings) for steps in (num_steps + 1, 1))
    difference = clock(tempo.generate_batch, lm, [long]) - clock(tempo.generate_batch, lm, [short])
    return max(difference, MICROSECOND) / num_steps


def time_growth(lm: LanguageModel, scale: Scale) -> dict[str, dict[str, Any]]:
    """{quantity: its values, median seconds, exponents, and the floor of each}."""
    prompt = text_of(lm, scale.context)
    models = {n: layers_of(lm, n) for n in scale.layers}
    a_token = token_seconds(lm, wall)

    def sweep(n: int) -> float:
        prompts = [text_of(lm, scale.context, run) for run in range(n)]
        capture = ("attention", "logits")
        specs = [greedy(text, scale.steps, capture=capture) for text in prompts]
        return clock(tempo.generate_batch, lm, specs)

    def forced(n: int) -> float:
        # other tokens in each arm, so that no two share more than the prompt
        arms = [range(arm * ARM, (arm + 1) * ARM) for arm in range(1, n + 1)]
        specs = [
            RunSpec(prompt=prompt, replay=[arm] * scale.steps, capture="logits") for arm in arms
        ]
        return clock(tempo.generate_batch, lm, specs)

    def step_of_width(width: int) -> float:
        return step_seconds(lm, prompt, width, scale.steps)

    def run_of_depth(num_steps: int) -> float:
        return clock(tempo.generate_batch, lm, [wide(prompt, 1, num_steps)])

    def step_of_layers(n: int) -> float:
        return step_seconds(models[n], prompt, 1, scale.steps)

    def grown(
        what: str,
        values: Sequence[int],
        work: Callable[[int], float],
        floor: Callable[[int], float],
    ) -> dict[str, Any]:
        times = alternate({value: partial(work, value) for value in values}, scale.rounds)
        floors = [significant(floor(value)) for value in values]
        return _curve(what, values, [median(times[value]) for value in values]) | {"floor": floors}

    a_sweep = f"a sweep of {scale.steps} steps, attention and logits captured"
    an_arm = f"forced runs of one prompt, {scale.steps} sets of {ARM}, logits captured"
    tokens_of_run = scale.context + scale.steps
    return {
        "prompts": grown(a_sweep, scale.runs, sweep, lambda n: a_token * n * tokens_of_run),
        "arms": grown(
            an_arm,
            scale.runs,
            forced,
            lambda n: a_token * (scale.context + n * scale.steps * ARM),
        ),
        "width": grown("a step of one run", scale.width, step_of_width, lambda n: a_token * n),
        # the last set is chosen and not forwarded
        "depth": grown(
            "a run of one token a step",
            scale.depth,
            run_of_depth,
            lambda n: a_token * (scale.context + n - 1),
        ),
        "context": slots_growth(lm, scale, a_token),
        "layers": grown(
            "a step of one token, random weights",
            scale.layers,
            step_of_layers,
            lambda n: token_seconds(models[n], wall),
        ),
    }


def slots_growth(lm: LanguageModel, scale: Scale, a_token: float) -> dict[str, Any]:
    """Seconds of a pass against the number of slots it reads; the model takes `a_token` for each.

    One long run gives all points. Each point takes the passes that read within a tenth of its
    number of slots.
    """
    # a tenth more than the most slots, in whole steps, and one step more
    num_steps = -(-(scale.slots[-1] - scale.context) * 11 // (10 * scale.siblings)) + 1
    spec = wide(text_of(lm, scale.context), scale.siblings, num_steps)
    seconds: dict[int, list[float]] = {slots: [] for slots in scale.slots}
    for _ in range(scale.rounds):
        trace = tempo.generate_batch(lm, [spec])[0]
        # step k was chosen in the pass that read all slots before its own
        read = [(step.slots[0], step.seconds) for step in trace.steps[1:]]
        for slots, found in seconds.items():
            found += [spent for number, spent in read if abs(number - slots) <= slots / 10]
    # a run may end before it reaches the most slots
    reached = [slots for slots in scale.slots if seconds[slots]]
    medians = [median(seconds[slots]) for slots in reached]
    curve = _curve(f"a step of {scale.siblings} siblings of one run", reached, medians)
    met = all(curve["exponents"][key] <= LINEAR for key in ("fitted", "last"))
    floor = [significant(a_token * scale.siblings)] * len(reached)
    return curve | {"floor": floor, "at_most": LINEAR, "met": met}


def memory_growth(model: str, scale: Scale) -> dict[str, Any]:
    """Peak memory of the largest runs, and how memory grows with each quantity.

    `peak`: the measured peak of the largest runs over the computed one.
    `memory`: {quantity: values, bytes computed and measured, exponents}.
    """
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
        why = "the peak of a process cannot be reset here; Linux has /proc/self/clear_refs"
        return {"peak": {"skipped": why}, "memory": {}}
    large, rows = rows[0], rows[1:]
    growth = {}
    for axis, values in axes.items():
        found, rows = rows[: len(values)], rows[len(values) :]
        computed = [row["computed"] for row in found]
        peak = [row["peak"] for row in found]
        growth[axis] = {
            "values": list(values),
            "computed": computed,
            "peak": peak,
            "exponents": exponents(values, peak),
            "computed_exponents": exponents(values, computed),
        }
    ratio = judged(large["peak"] / large["computed"], 1 - NEAR, 1 + NEAR)
    return {"peak": large | ratio, "memory": growth}


def _curve(what: str, values: Sequence[int], seconds: Sequence[float]) -> dict[str, Any]:
    return {
        "what": what,
        "values": list(values),
        "seconds": [significant(s) for s in seconds],
        "exponents": exponents(values, seconds),
    }
