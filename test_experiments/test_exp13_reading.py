"""exp13: does it read well? Free runs as a reader meets them, judged by the plain model, which knows nothing of sets.

A reader takes the most probable member of each set (the naive path) or looks for the best path through the sets. Either is
ordinary text, so the plain model says how probable it is: against greedy decoding for the naive path, which is no search, and
against a beam search of equal width for the best path. Whether the sets hide what was said before them is asked of the model
itself: facts stated before the prompt, asked for after the sets.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import CensoredData, binomtest, ecdf

from fixtures.floors import rounding
from fixtures.raw import keep_log, lattice, spread
from fixtures.session import test_claim  # noqa: F401  every claim below is a test
from fixtures.store import Store
from fixtures.study import CONFIRMATORY, Context, Run, Study
from tempo import LanguageModel, RunSpec, Trace
from tempo.claims import Case, Claim, Statistic
from tempo.reporting.figures import Picture, lines_by
from tempo.reporting.figures.intervals import intervals
from tempo.statistics import SEED
from tempo.text import number
from test_experiments.reading import Facts, Path, Search, Sets, bigrams, coverage, parted_at, search
from test_experiments.truth import forced, read_spec

MODES: dict[str, dict[str, Any]] = {
    "isolated": {"visibility": "isolated"},
    "visible": {"visibility": "visible"},
    "weighted": {"visibility": "isolated", "weighting": "probability"},
}
DOSES = (0.05, 0.2)  # thresholds of isolated runs beside the config's: half of it and twice it
LONE = 0.51  # at most one token has more than half of the probability
NUM_BEAMS = 4
FACT_STEPS = 8  # sets between the facts and the questions
NLL_MARGIN = 0.10
NLL_REASON = "a perplexity ten per cent higher"
LOST_MARGIN = 0.05
LOST_REASON = "five questions in a hundred"
PILOT = "a first look at forty prompts of the suite, used for this planning only"


def measure(context: Context) -> Generator[Sequence[Run], Sequence[Trace], dict[str, Any]]:
    """One prompt: free runs and their paths scored by the plain model; facts before it, asked for after sets.

    Runs are asked for one after the other and reduced at once: a trace holds a whole distribution for each of its steps.
    """
    lm, prompt = context.lm, context.prompt
    spec = context.config.spec(prompt, stop_at_eos=False)
    free = {name: spec.but(**mode) for name, mode in MODES.items()}
    free |= {str(dose): spec.but(threshold=dose) for dose in DOSES}
    sets: dict[str, Sets] = {}
    for name, wanted in free.items():
        (trace,) = yield [Run(wanted)]
        sets[name] = trace.sets
        if context.store and name == "isolated":
            keep_log(context.store, trace)
    (lone,) = yield [Run(spec.but(threshold=LONE))]
    searches = _searches(sets)
    found = search(lm, lone.prompt_tokens, list(searches.values()), spec.max_steps)
    beams = dict(zip(searches, found, strict=True))
    paths = {name: final[0] for name, final in beams.items()}
    greedy = [[token] for token in paths["greedy"].tokens]
    in_beams = bigrams([beam.tokens for beam in beams["beam"]])
    facts = Facts.draw(np.random.default_rng([SEED, *prompt.encode()]))
    asked = yield from _ask(context, facts, spec)
    if context.store:
        _keep(context, paths, facts, asked)
    return {
        "widths": {name: list(map(len, chosen)) for name, chosen in sets.items()},
        "branched": any(len(members) > 1 for members in sets["isolated"]),
        "ended": any(
            token in lm.eos_token_ids
            for name in ("greedy", "isolated naive")
            for token in paths[name].tokens
        ),
        "nll": {name: path.nll for name, path in paths.items()},
        "lone_is_greedy": _equal_but_for_ties(lone, paths["greedy"].tokens),
        "config_is_greedy": list(map(list, sets["isolated"])) == greedy,
        "parted_at": {
            "visible": parted_at(sets["isolated"], sets["visible"]),
            "weighted": parted_at(sets["isolated"], sets["weighted"]),
            "greedy twice": parted_at(lone.sets, greedy),
        },
        "coverage": {
            "lattice": coverage(in_beams, sets["isolated"]),
            "reversed": coverage(in_beams, sets["isolated"][::-1]),
            "greedy": coverage(in_beams, greedy),
        },
        **asked,
    }


def _searches(sets: Mapping[str, Sets]) -> dict[str, Search]:
    """What the plain model is asked for, by name: greedy and beam search, and paths through each run's sets."""
    naive = {name: [members[:1] for members in chosen] for name, chosen in sets.items()}
    return {
        "greedy": Search(),
        "beam": Search(NUM_BEAMS),
        **{f"{name} best": Search(NUM_BEAMS, sets[name]) for name in MODES},
        **{f"{name} naive": Search(1, path) for name, path in naive.items()},
        "last members": Search(1, [members[-1:] for members in sets["isolated"]]),
        "reversed best": Search(NUM_BEAMS, sets["isolated"][::-1]),
    }


def _equal_but_for_ties(run: Trace, tokens: Sequence[int]) -> bool:
    """A run of single tokens chose these; where it first did not, the two were equally probable but for rounding."""
    for step, token in zip(run.steps, tokens, strict=True):
        if step.tokens != [token]:
            tied = step.distribution[step.tokens].max() - step.distribution[token] <= rounding(
                "probability"
            )
            return len(step.tokens) == 1 and bool(tied)
    return True


def _ask(
    context: Context, facts: Facts, spec: RunSpec
) -> Generator[Sequence[Run], Sequence[Trace], dict[str, Any]]:
    """How well each fact is found after the sets of an isolated run, read in each mode, and after greedy text."""
    before = spec.but(prompt=facts.before(context.prompt), max_steps=FACT_STEPS)
    (chosen,) = yield [Run(before)]
    (plain,) = yield [Run(before.but(max_width=1))]
    with_facts, without = chosen.prompt_tokens, context.lm.encode(context.prompt)
    asked_after = {
        **{name: (with_facts, chosen.sets, mode) for name, mode in MODES.items()},
        "greedy": (with_facts, plain.sets, {}),
        "absent": (without, chosen.sets, {}),
    }
    questions, answers_at = facts.questions(context.lm)
    probability: dict[str, list[float]] = {}
    found: dict[str, list[bool]] = {}
    for arm, (prefix, between, mode) in asked_after.items():
        (trace,) = yield [forced(read_spec(prefix, between, questions, stop_at_eos=False, **mode))]
        answers = [trace.steps[FACT_STEPS + at] for at in answers_at]
        probability[arm] = [step.probabilities[0] for step in answers]
        found[arm] = [step.probabilities[0] >= float(step.distribution.max()) for step in answers]
    return {"found": found, "probability": probability, "fact_branched": max(chosen.widths) > 1}


def _keep(
    context: Context, paths: Mapping[str, Path], facts: Facts, asked: Mapping[str, Any]
) -> None:
    store, decode = context.store, context.lm.decode
    assert store is not None
    rows = {
        name: {"tokens": list(path.tokens), "text": decode(path.tokens), "nats_per_token": path.nll}
        for name, path in paths.items()
    }
    store.json("paths", {"prompt_tokens": context.lm.encode(context.prompt), "paths": rows})
    lines = [f"{context.prompt!r}: continued, nats a token under the plain model"]
    lines += [
        f"{name:16} {row['nats_per_token']:6.3f}  {row['text']!r}" for name, row in rows.items()
    ]
    lines += [
        "",
        f"{facts.before(context.prompt)!r}",
        "asked for in reverse order: probability of the right token, * if the most probable",
    ]
    lines += [
        f"{arm:16} "
        + "  ".join(
            f"{p:.3f}{'*' if right else ' '}"
            for p, right in zip(asked["probability"][arm], found, strict=True)
        )
        for arm, found in asked["found"].items()
    ]
    store.text("analysis", "\n".join(lines))


def _extra(one: str, other: str) -> Statistic:
    """How many nats a token one path costs more than another, on prompts that branched."""
    return lambda case: case["nll"][one] - case["nll"][other] if case["branched"] else None


def _lost(arm: str) -> Statistic:
    """The share of facts found after greedy text minus that found in `arm`, on prompts whose sets branched."""
    return lambda case: (
        float(np.mean(case["found"]["greedy"]) - np.mean(case["found"][arm]))
        if case["fact_branched"]
        else None
    )


def _reads_as_well(
    id: str, mode: str, text: str, family: str, planned: tuple[float, float]
) -> Claim:
    return Claim(
        id=f"exp13.{id}",
        statement=f"The most probable member of each set of {text} reads as well as greedy text: its perplexity is no worse.",
        statistic="negative log probability per token of the naive path minus that of greedy text, under the plain model, in nats",
        values=_extra(f"{mode} naive", "greedy"),
        test="less",
        margin=NLL_MARGIN,
        margin_reason=NLL_REASON,
        family=family,
        planned_effect=planned[0],
        planned_sd=planned[1],
        planned_from=PILOT,
        refuted_by="a mean significantly above 0.10 nats a token",
        control=_extra("last members", "greedy"),
        control_statement="the least probable member of each set",
    )


def _best_path(other: str, text: str, planned: tuple[float, float]) -> Claim:
    return Claim(
        id=f"exp13.best-path-as-good-as-{other}",
        statement=f"The best path through the sets of isolated mode is no less probable than {text}.",
        statistic=f"negative log probability per token of the best of {NUM_BEAMS} beams in the sets minus that of {other}, in nats",
        values=_extra("isolated best", other),
        test="less",
        margin=NLL_MARGIN,
        margin_reason=NLL_REASON,
        family="exp13",
        planned_effect=planned[0],
        planned_sd=planned[1],
        planned_from=PILOT,
        refuted_by="a mean significantly above 0.10 nats a token",
        control=_extra("reversed best", other),
        control_statement="the best path through the same sets in reverse order",
    )


def _still_found(id: str, mode: str, text: str, planned: tuple[float, float]) -> Claim:
    return Claim(
        id=f"exp13.{id}",
        statement=f"Facts stated before wide sets are still found after them, with {text}.",
        statistic="share of facts found after greedy text minus share found after the sets",
        values=_lost(mode),
        test="less",
        margin=LOST_MARGIN,
        margin_reason=LOST_REASON,
        family="exp13",
        planned_effect=planned[0],
        planned_sd=planned[1],
        planned_from=PILOT,
        refuted_by="a loss significantly above five points",
        control=_lost("absent"),
        control_statement="the facts not stated at all",
    )


CLAIMS = (
    Claim(
        id="exp13.lone-threshold-is-greedy",
        statement=f"With the threshold at {LONE} the sets are greedy decoding, token for token.",
        statistic="the same tokens as transformers' own forward pass chooses, but for ties within rounding",
        values=lambda case: case["lone_is_greedy"],
        test="always",
        refuted_by="one token that is not the plain model's most probable",
        control=lambda case: case["config_is_greedy"] if case["branched"] else None,
        control_statement="the config's threshold",
    ),
    _reads_as_well(
        "reads-as-well-as-greedy", "isolated", "isolated mode", CONFIRMATORY, (1.0, 1.5)
    ),
    _reads_as_well(
        "weighted-reads-as-well-as-greedy",
        "weighted",
        "isolated mode weighted by probability",
        "exp13",
        (1.0, 1.2),
    ),
    _best_path("beam", f"what a beam search of equal width ({NUM_BEAMS}) finds", (0.3, 0.5)),
    _best_path("greedy", "greedy text, which was not searched for", (0.3, 0.5)),
    _still_found("fact-still-found", "isolated", "siblings isolated", (0.0, 0.15)),
    _still_found(
        "weighted-fact-still-found",
        "weighted",
        "siblings isolated and weighted by probability",
        (0.0, 0.15),
    ),
    Claim(
        id="exp13.covers-beam",
        statement="The sets of isolated mode hold more of what a beam search considered than greedy text does.",
        statistic="share of the final beams' distinct bigrams in consecutive sets minus the share in greedy text",
        values=lambda case: case["coverage"]["lattice"] - case["coverage"]["greedy"],
        test="greater",
        margin=0.05,
        margin_reason="about half a bigram of the eleven that a text of twelve tokens has",
        family="exp13",
        planned_effect=0.12,
        planned_sd=0.2,
        planned_from=PILOT,
        refuted_by="a difference significantly below five points: alternatives that belong to no other text",
        control=lambda case: case["coverage"]["reversed"] - case["coverage"]["greedy"],
        control_statement="the same sets in reverse order",
    ),
    Claim(
        id="exp13.modes-part",
        statement="Free runs of isolated and visible mode come to different sets within twelve steps, on most prompts.",
        statistic="share of prompts whose runs have parted",
        values=lambda case: case["parted_at"]["visible"] is not None,
        test="proportion",
        margin=0.5,
        margin_reason="most prompts",
        family="exp13",
        planned_effect=0.8,
        planned_from=PILOT,
        refuted_by="a share significantly below one half",
        control=lambda case: case["parted_at"]["greedy twice"] is not None,
        control_statement=f"a run with the threshold at {LONE} against the plain model's greedy decoding",
    ),
)


def pictures(store: Store, cases: Sequence[Case]) -> list[Picture]:
    """The own prompt's sets; nats a token by arm and by threshold; survival until the modes part; facts and bigrams found."""
    found = [lattice(store)]
    branched = [case for case in cases if case["branched"]]
    asked = [case for case in cases if case["fact_branched"]]
    if branched:
        found += [
            _nll_by_arm(branched),
            _nll_by_threshold(branched, str(store.manifest["config"]["threshold"])),
        ]
    found.append(_survival(cases))
    if asked:
        found.append(_facts_found(asked))
    arms = {
        "lattice": "sets of isolated mode",
        "greedy": "greedy text",
        "reversed": "the same sets, reversed",
    }
    rows = {text: spread([case["coverage"][arm] for case in cases]) for arm, text in arms.items()}
    caption = f"Of the distinct bigrams of the {NUM_BEAMS} final beams; mean and 95 % interval over prompts."
    found.append(
        intervals(
            rows, "share of beam search's bigrams held", "What a beam search considered", caption
        )
    )
    return found


def _nll_by_arm(cases: Sequence[Case]) -> Picture:
    texts = {"greedy": "greedy text", "beam": f"beam search of width {NUM_BEAMS}"}
    texts |= {
        f"{mode} {path}": f"{mode}, {path} path" for path in ("naive", "best") for mode in MODES
    }
    texts |= {
        "last members": "isolated, last members",
        "reversed best": "isolated sets reversed, best path",
    }
    rows = {text: spread([case["nll"][name] for case in cases]) for name, text in texts.items()}
    whole = [case for case in cases if not case["ended"]]
    extra = [
        spread([case["nll"]["isolated naive"] - case["nll"]["greedy"] for case in of])
        for of in (cases, whole)
        if of
    ]
    caption = (
        "Negative log probability per token under the plain model; mean and 95 % interval over prompts that branched. Naive: the most "
        f"probable member of each set; best: of {NUM_BEAMS} beams within the sets. Dashed: greedy text. Isolated naive minus greedy: "
        + "; ".join(
            f"{number(m)} [{number(low)}, {number(high)}]{of}"
            for (m, low, high), of in zip(extra, _OF_ENDED, strict=False)
        )
        + "."
    )
    title = "How probable the plain model finds what is read"
    return intervals(
        rows, "nats a token (lower reads better)", title, caption, reference=rows["greedy text"][0]
    )


_OF_ENDED = ("", " on prompts where neither text holds an end-of-sequence token")


def _nll_by_threshold(cases: Sequence[Case], threshold: str) -> Picture:
    runs = {float(threshold): "isolated"} | {dose: str(dose) for dose in DOSES}
    points = {
        dose: spread([case["nll"][f"{name} naive"] - case["nll"]["greedy"] for case in cases])
        for dose, name in runs.items()
    }
    widths = ", ".join(
        f"{number(float(np.mean([np.mean(c['widths'][name]) for c in cases])))} at {dose}"
        for dose, name in runs.items()
    )
    caption = (
        f"What the naive path costs more than greedy text, isolated mode; mean and 95 % interval over prompts. Mean width: {widths}. "
        f"From {LONE} on it is greedy text, and costs nothing."
    )
    groups = {"naive path minus greedy": [(dose, *point) for dose, point in points.items()]}
    return lines_by(
        groups, "threshold", "nats a token", "The lower the threshold, the worse it reads", caption
    )


def _survival(cases: Sequence[Case]) -> Picture:
    """Kaplan and Meier's curves (1958) of the steps until runs part; a run that has not parted is censored at its end."""
    groups = {}
    for other, text in (("visible", "isolated and visible"), ("weighted", "isolated and weighted")):
        parted = [case["parted_at"][other] for case in cases]
        last = len(cases[0]["widths"]["isolated"]) - 1
        data = CensoredData(
            [k for k in parted if k is not None], right=[last for k in parted if k is None]
        )
        survival = ecdf(data).sf
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # where nothing or everything has parted, the formula has no interval
            interval = survival.confidence_interval(method="log-log")
        steps = np.arange(last + 1)
        mean, low, high = (f.evaluate(steps) for f in (survival, interval.low, interval.high))
        low, high = np.where(np.isfinite(low), low, mean), np.where(np.isfinite(high), high, mean)
        groups[text] = [
            tuple(map(float, point)) for point in zip(steps, mean, low, high, strict=True)
        ]
    caption = "Share of prompts on which both free runs have had the same sets up to and including a step, with Greenwood's interval."
    return lines_by(groups, "step", "share not yet parted", "Steps until the modes part", caption)


def _facts_found(cases: Sequence[Case]) -> Picture:
    texts = {
        "greedy": "after greedy text",
        **{mode: f"after sets, {mode}" for mode in MODES},
        "absent": "facts not stated",
    }
    rows = {
        text: spread([float(np.mean(case["found"][arm])) for case in cases])
        for arm, text in texts.items()
    }
    chance = [float(np.mean([case["probability"][arm] for case in cases])) for arm in texts]
    pairs = [
        pair
        for case in cases
        for pair in zip(case["found"]["greedy"], case["found"]["isolated"], strict=True)
    ]
    only_greedy, only_isolated = pairs.count((True, False)), pairs.count((False, True))
    p = (
        float(binomtest(only_greedy, only_greedy + only_isolated).pvalue)
        if only_greedy + only_isolated
        else 1.0
    )
    caption = (
        f"Share of facts whose first token is the most probable one when asked for after {FACT_STEPS} steps; mean and 95 % interval over "
        f"prompts, beside it the mean probability. Of {len(pairs)} questions, {only_greedy} were found after greedy text only and "
        f"{only_isolated} after isolated sets only (McNemar's exact p = {number(p)}, as if questions of one prompt were independent)."
    )
    notes = [f"p {value:.2f}" for value in chance]
    return intervals(
        rows,
        "share of facts found",
        "Is what was said before the sets still found?",
        caption,
        notes=notes,
    )


STUDY = Study("exp13", "Does it read well?", measure, CLAIMS, pictures)


def test_paths_cost_what_one_plain_pass_says(store: Store, lm: LanguageModel) -> None:
    """Harness check: the search's sums equal a forward pass over the whole text, without cache, beams or batch."""
    kept = store.load_json("paths")
    start = len(kept["prompt_tokens"])
    for name, path in kept["paths"].items():
        text = torch.tensor([kept["prompt_tokens"] + path["tokens"]], device=lm.device)
        with torch.inference_mode():
            logs = (
                lm.model(input_ids=text, use_cache=False)
                .logits[0, start - 1 : -1]
                .double()
                .log_softmax(dim=-1)
            )
        nll = -float(logs.gather(1, text[0, start:, None]).mean())
        assert abs(nll - path["nats_per_token"]) < 1e-3, (
            f"{name}: {path['nats_per_token']} nats a token, {nll} in one pass"
        )


def test_best_paths_stay_in_their_sets(store: Store) -> None:
    """Harness check: what is called a path through the sets takes one member of each."""
    sets = [set(step["tokens"]) for step in store.load_json("generation_log")["runs"][0]["steps"]]
    paths = {name: path["tokens"] for name, path in store.load_json("paths")["paths"].items()}
    for name in ("isolated best", "isolated naive", "last members"):
        assert all(token in members for token, members in zip(paths[name], sets, strict=True)), name
