"""Two reports as large as a full run makes them: 17 experiments, 162 prompts, two models.

What is counted here was counted in a record of SmolLM2 over all experiments: claims, configs,
figures with their bytes, lengths of texts, and sets of each run.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from fixtures.raw import spread
from tempo.claims import Finding
from tempo.reporting import figures
from tempo.reporting.answers import Answer, Conclusions
from tempo.reporting.figures.drawing import Picture
from tempo.reporting.figures.intervals import intervals
from tempo.reporting.report import PromptRow, Report, Section, TestRow, Values

NUM_CONFIGS, NUM_PROMPTS, NUM_CLAIMS = 20, 162, 202
FIGURES_A_CONFIG = 4  # in the record 73 over all
FIGURE_BYTES = 1_500_000  # of all SVGs of one model, with the dots of 162 prompts
MODELS = ("smollm2-135m", "gemma3-270m")
SAID = (
    "the cat sat on a mat and went back to see what it was that had been said in the first "
    "place by those who knew more than others about how such things are done where they live"
)
WORDS = SAID.split()
TOKENS = [f" {word}" for word in WORDS] + list(".,;:'\"!?") + [f"{word[:3]}ing" for word in WORDS]


def sentence(rng: np.random.Generator, length: int) -> str:
    """Words up to so many characters."""
    words = " ".join(rng.choice(WORDS, length // 3))
    return words[:length].strip()


def two_full_reports() -> tuple[Report, Report]:
    """One for each model; no prompt's value, run or figure of one is that of the other."""
    return full_report(0), full_report(1)


@functools.cache
def full_report(which: int) -> Report:
    rng = np.random.default_rng(which)
    texts = np.random.default_rng(9)  # both models measured the same claims on the same prompts
    suite = [
        (sentence(texts, int(texts.integers(12, 52))), f"kind {i % 11}") for i in range(NUM_PROMPTS)
    ]
    findings, sections = [], []
    pictures = drawn(which)
    for k in range(NUM_CONFIGS):
        prompts = tuple(PromptRow(text, kind, {"isolated": run(rng)}) for text, kind in suite)
        found, values = [], {}
        for i in range(k, NUM_CLAIMS, NUM_CONFIGS):
            made, known = claim(i, k, MODELS[which], rng, texts)
            found.append(made)
            values[made.claim] = known
        findings += found
        name = f"exp{k}_{sentence(texts, 12).replace(' ', '_')}"
        sections.append(
            Section(
                f"exp{k}", sentence(texts, 25), config(k), MODELS[which], NUM_PROMPTS,
                tuple(named(picture, which, k) for picture in pictures),
                settings={"prompt": "The cat sat on the", "threshold": 0.1, "max_steps": 12},
                text=sentence(rng, 1100), analysis=sentence(rng, 900),
                files=("analysis.txt", "cases.jsonl", "cells.json", "generation_log.json"),
                fingerprint="0123456789abcdef", folder=name, prompts=prompts, values=values,
            )
        )  # fmt: skip
    tests = tuple(
        TestRow(f"test_experiments/test_exp{i % 17}_{sentence(texts, 60)}", "passed", "SUPPORTED")
        for i in range(236)
    )
    return Report(
        tuple(findings), MODELS[which], tuple(sections),
        {"Made": "2026-11-24 16:02 UTC", "Command": "pytest test_experiments"},
        suite="162 prompts in English of 11 categories, 3 to 24 tokens (prompts.yaml)",
        tests=tests, recorded=conclusions(findings), root=Path(f"results-{which}"),
    )  # fmt: skip


def config(k: int) -> str:
    return f"exp{k}_config"


def run(rng: np.random.Generator) -> tuple[tuple[str, ...], ...]:
    """Nine sets of 24 members in all."""
    widths = 1 + rng.multinomial(15, [1 / 9] * 9)
    return tuple(tuple(map(str, rng.choice(TOKENS, width))) for width in widths)


def claim(
    i: int, k: int, model: str, rng: np.random.Generator, texts: np.random.Generator
) -> tuple[Finding, Values]:
    """A claim, of which one in six is an invariant: true on every prompt."""
    is_invariant = i % 6 == 5
    values = np.ones(NUM_PROMPTS) if is_invariant else rng.normal(0.2, 0.1, NUM_PROMPTS)
    control = np.zeros(NUM_PROMPTS) if i % 3 == 0 else rng.normal(0.0, 0.1, NUM_PROMPTS)
    known = Values(*(tuple(float(f"{x:.6g}") for x in of) for of in (values, control)))
    mean, low, high = spread(known.claim)  # type: ignore[arg-type]
    finding = Finding(
        claim=f"exp{k}.{sentence(texts, 26).replace(' ', '-')}-{i}",
        kind="invariant" if is_invariant else "empirical",
        statement=sentence(texts, 80),
        verdict=("SUPPORTED", "REFUTED", "INCONCLUSIVE")[0 if is_invariant else i % 3],
        reason=sentence(texts, 60), estimate=mean, low=low, high=high, effect_size=0.5,
        n=NUM_PROMPTS, unit="prompt", statistic=sentence(texts, 92),
        test="always" if is_invariant else "greater",
        margin=0.0 if is_invariant else 0.1, margin_reason=sentence(texts, 46),
        p=0.01, p_corrected=0.02, p_against=0.9, p_against_corrected=1.0,
        family="primary" if i % 5 == 0 else f"exp{k}", control=sentence(texts, 54),
        control_estimate=0.0, control_holds=True, refuted_by=sentence(texts, 33),
        context={
            "experiment": f"exp{k}", "config": config(k), "model": model,
            "n_prompts": NUM_PROMPTS, "dtype": "float32",
        },
    )  # fmt: skip
    return finding, known


def conclusions(findings: list[Finding]) -> Conclusions:
    """Eight answers, as long as those of this repository, each with a figure."""
    text = sentence(np.random.default_rng(3), 420)
    answers = []
    for i in range(8):
        place = "headline" if i < 4 else "advice" if i == 7 else "question"
        claims = tuple(f.claim for f in findings[i : 8 * 7 : 8])
        figure = "How near free runs stay to the truth" if i < 1 else ""
        said = "The distribution is 0.127 [0.118, 0.139] away from it."
        answers.append(
            Answer(f"Is it so, number {i}?", "Not fine", text, text, claims, place, said, figure)
        )
    return Conclusions("Is it just fine?", "Whether it is, in a sentence or two.", tuple(answers))


@functools.cache
def drawn(which: int) -> tuple[Picture, ...]:
    """Figures of the kinds that experiments draw, four for a config."""
    rng = np.random.default_rng(50 + which)
    ways = [f"a way to weigh siblings, number {i}" for i in range(9)]
    rows = {way: spread(rng.normal(0.3, 0.1, NUM_PROMPTS)) for way in ways}
    lines = {
        way: [(float(x), *spread(rng.normal(0.3, 0.1, NUM_PROMPTS))) for x in range(1, 7)]
        for way in ways[:4]
    }
    steps = [
        {"texts": rng.choice(TOKENS, 2).tolist(), "probabilities": [0.2] * 2, "position": at,
         "ended": []}
        for at in range(5, 17)
    ]  # fmt: skip
    return (
        intervals(rows, "total variation", "How near free runs stay to the truth", "See."),
        figures.lines_by(lines, "lag", "total variation", "Distance by lag", "See it fall."),
        figures.set_lattice("The cat sat on the", steps),
        figures.layer_head_map(rng.random((30, 9)), "Which heads", "mass", "See it."),
    )


def named(picture: Picture, which: int, k: int) -> Picture:
    """The picture as another one's: with ids and a title of its own."""
    svg = re.sub("fig[0-9a-f]{8}", f"fig{which:02d}{k:06d}", picture.svg)
    title = picture.title if k == 0 else f"{picture.title}, {k}"
    return replace(picture.named(f"{picture.name}-{k}"), svg=svg, title=title)
