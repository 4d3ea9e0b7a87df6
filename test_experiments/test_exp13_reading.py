"""exp13: does it read well? Free runs as a reader meets them, judged by the plain model.

A reader takes the most probable member of each set (the naive path), or looks for the best path
through the sets. Either is ordinary text, so the plain model says how probable it is. The naive
path is no search, and is compared with greedy decoding; the best path with a beam search of equal
width. Most probable members of neighbouring sets may belong to different branches, whoever reads
them. So a perfect reader stands beside: it chooses its sets from the exact mixture of all paths
(`exact`), and is read in the same two ways. Facts stated before the prompt are asked for after the
sets: do these hide what was said?
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest

from fixtures.floors import rounding
from fixtures.lattices import by_threshold, exact_runs
from fixtures.margins import LOST, NLL
from fixtures.raw import keep_log, lattice, spread, spreads_of, survival
from fixtures.truth import forced, read_spec
from tempo import LanguageModel, Trace
from tempo.harness import Planned, Prompt, Space, Steps, Store, Study, run
from tempo.reporting.figures import Picture, lines_by, number
from tempo.reporting.figures.intervals import intervals
from test_experiments.reading import Beam, Facts, Search, Sets, bigrams, coverage, parted_at, search

MODES: dict[str, dict[str, Any]] = {
    "isolated": {"visibility": "isolated"},
    "visible": {"visibility": "visible"},
    "weighted": {"visibility": "isolated", "weighting": "probability"},
    "posterior": {"visibility": "isolated", "weighting": "posterior"},
}
NAMES_OF = {"exact": "perfect reader"}
DOSES = (0.05, 0.2)  # thresholds of isolated runs beside the config's: half of it and twice it
RUNS = {**MODES, **{str(dose): {"threshold": dose} for dose in DOSES}}
LONE = 0.51  # at most one token has more than half of the probability
NUM_BEAMS = 4
LATER = "2026-11-28T09:36Z"  # the claims about a perfect reader and about posteriors
FACT_STEPS = 8  # sets between the facts and the questions
Paths = Mapping[str, Beam]

study = Study(
    "exp13", title="Does it read well?", registered="2026-11-24", space=Space(steps=(2, None))
)


@dataclass(frozen=True)
class Answered:
    """How well facts that were told before sets are found after them."""

    fact_branched: bool
    found: dict[str, list[bool]]  # each fact, by the text after which it was asked for
    probability: dict[str, list[float]]  # of its first token

    def lost(self, arm: str) -> float | None:
        """The share of facts found after greedy text minus that after `arm`, if sets branched."""
        before, after = (float(np.mean(self.found[name])) for name in ("greedy", arm))
        return before - after if self.fact_branched else None


@dataclass(frozen=True)
class Case(Answered):
    """What one prompt gives."""

    widths: dict[str, list[int]]  # by run
    branched: bool
    ended: bool  # greedy text or the naive path holds an end-of-sequence token
    nll: dict[str, float]  # of each path, nats a token under the plain model
    is_greedy: dict[str, bool | None]  # whether a run is greedy decoding, by its threshold
    parted_at: dict[str, int | None]  # the step at which two runs' sets first differ
    coverage: dict[str, float]  # share of beam search's bigrams that consecutive sets hold

    def extra(self, path: str, other: str = "greedy") -> float | None:
        """How many nats a token one path costs more than another, if the prompt branched."""
        return self.nll[path] - self.nll[other] if self.branched else None


@study.measure
def free_runs(prompt: Prompt) -> Steps[Case]:
    """Free runs and their paths scored by the plain model; facts before them, asked for after sets.

    Runs are asked for one by one and reduced at once: a trace holds a whole distribution a step.
    """
    sets: dict[str, Sets] = {}
    for name, settings in RUNS.items():
        trace: Trace = yield run(prompt, stop_at_eos=False, **settings)
        sets[name] = trace.sets
        if prompt.store and name == "isolated":
            keep_log(prompt.store, trace)
    lone: Trace = yield run(prompt, stop_at_eos=False, threshold=LONE)
    choose = by_threshold(prompt.config.threshold)
    prefix, num_steps = lone.prompt_tokens, prompt.config.max_steps
    (exact,) = yield from exact_runs(prompt.lm, prefix, [choose], num_steps)
    sets["exact"] = exact.sets
    searches, isolated = _searches(sets), sets["isolated"]
    found = yield from search(prompt.lm, prefix, [*searches.values()], num_steps)
    beams = dict(zip(searches, found, strict=True))
    paths = {name: final[0] for name, final in beams.items()}
    greedy = [[token] for token in paths["greedy"].tokens]
    texts = {"lattice": isolated, "reversed": isolated[::-1], "greedy": greedy}
    wanted = bigrams([beam.tokens for beam in beams["beam"]])
    parted = {name: parted_at(isolated, sets[name]) for name in ("visible", "weighted")}
    read = (*paths["greedy"].tokens, *paths["isolated naive"].tokens)
    branched = any(len(members) > 1 for members in isolated)
    facts = Facts.draw(prompt.rng())
    case = Case(
        widths={name: list(map(len, chosen)) for name, chosen in sets.items()},
        branched=branched,
        ended=not prompt.lm.eos_token_ids.isdisjoint(read),
        nll={name: path.nll for name, path in paths.items()},
        is_greedy={
            "lone": _equal_but_for_ties(lone, paths["greedy"].tokens),
            "config": isolated == greedy if branched else None,
        },
        parted_at={**parted, "greedy twice": parted_at(lone.sets, greedy)},
        coverage={name: coverage(wanted, text) for name, text in texts.items()},
        **asdict((yield from ask(prompt, facts))),
    )
    if prompt.store:
        _keep(prompt, prompt.store, paths, facts, case)
    return case


def _searches(sets: Mapping[str, Sets]) -> dict[str, Search]:
    """What is asked of the plain model: greedy and beam search, and paths through each run."""
    naive = {}
    for name, chosen in sets.items():
        naive[name] = [members[:1] for members in chosen]
    return {
        "greedy": Search(),
        "beam": Search(NUM_BEAMS),
        **{f"{name} best": Search(NUM_BEAMS, sets[name]) for name in (*MODES, "exact")},
        **{f"{name} naive": Search(1, path) for name, path in naive.items()},
        "last members": Search(1, [members[-1:] for members in sets["isolated"]]),
        "reversed best": Search(NUM_BEAMS, sets["isolated"][::-1]),
    }


def _equal_but_for_ties(trace: Trace, tokens: Sequence[int]) -> bool:
    """A run of single tokens chose these. Where it first did not, both were equally probable."""
    for step, token in zip(trace.steps, tokens, strict=True):
        if step.tokens != [token]:
            gap = step.distribution[step.tokens].max() - step.distribution[token]
            bound = rounding("probability", trace.provenance["dtype"])
            return len(step.tokens) == 1 and bool(gap <= bound)
    return True


def ask(prompt: Prompt, facts: Facts, modes: Sequence[str] = tuple(MODES)) -> Steps[Answered]:
    """How well facts are found after an isolated run's sets in each mode, and after greedy text."""
    before = prompt.but(facts.before(prompt.text)).spec(stop_at_eos=False, max_steps=FACT_STEPS)
    chosen: Trace = yield run(before)
    plain: Trace = yield run(before, max_width=1)
    stated, sets = chosen.prompt_tokens, chosen.sets
    after: dict[str, tuple[Any, ...]] = {name: (stated, sets, MODES[name]) for name in modes}
    after["greedy"] = (stated, plain.sets, {})
    after["absent"] = (prompt.lm.encode(prompt.given), sets, {})
    questions, answers_at = facts.questions(prompt.lm)
    found, probability = {}, {}
    for arm, (prefix, between, mode) in after.items():
        spec = read_spec(prefix, between, questions, stop_at_eos=False, **mode)
        trace: Trace = yield forced(spec)
        answers = [trace.steps[FACT_STEPS + at] for at in answers_at]
        probability[arm] = [step.probabilities[0] for step in answers]
        found[arm] = [step.probabilities[0] >= float(step.distribution.max()) for step in answers]
    branched = max(chosen.widths) > 1
    return Answered(fact_branched=branched, found=found, probability=probability)


def _keep(prompt: Prompt, store: Store, paths: Paths, facts: Facts, case: Case) -> None:
    rows, lines = {}, [f"{prompt.text!r}: continued, nats a token under the plain model"]
    for name, path in paths.items():
        text = prompt.lm.decode(path.tokens)
        rows[name] = {"tokens": path.tokens, "text": text, "nats_per_token": path.nll}
        lines.append(f"{name:16} {path.nll:6.3f}  {text!r}")
    store.json("paths", {"prompt_tokens": prompt.lm.encode(prompt.given), "paths": rows})
    lines += ["", repr(facts.before(prompt.text)), "asked for in reverse order: probability of the"]
    lines[-1] += " right token, * if the most probable"
    for arm, found in case.found.items():
        pairs = zip(case.probability[arm], found, strict=True)
        lines.append(f"{arm:16} " + "  ".join(f"{p:.3f}{' *'[right]}" for p, right in pairs))
    store.text("analysis", "\n".join(lines))


@study.claim(always=True, control="config")
def test_lone_threshold_is_greedy(case: Case, threshold: str = "lone") -> bool | None:
    """With the threshold at 0.51 the sets are greedy decoding, token for token.

    The same tokens as transformers' own forward pass chooses, but for ties within rounding.
    Control: the config's threshold.
    """
    return case.is_greedy[threshold]


planned = partial(Planned, source="a first look at forty prompts, used for this planning only")
perfect = partial(Planned, source="a review's 47 other prompts: isolated +0.20 [-0.11, 0.54]")


@study.claim(less_than=NLL, planned=planned(1.0, 1.5), control="last members")
def test_reads_as_well_as_greedy(case: Case, path: str = "isolated naive") -> float | None:
    """The most probable member of each set of isolated mode reads as well as greedy text.

    Nats a token of that path minus those of greedy text, under the plain model.
    Control: the least probable member of each set.
    """
    return case.extra(path)


@study.claim(less_than=NLL, planned=perfect(0.2, 1.2), control="last members", registered=LATER)
def test_reads_as_well_as_a_perfect_reader(
    case: Case, path: str = "isolated naive"
) -> float | None:
    """The most probable members of isolated sets read as well as those of a perfect reader's sets.

    Nats a token of that path minus those of the most probable members of the exact run's sets.
    Control: the least probable member of each set.
    """
    return case.extra(path, "exact naive")


@study.claim(less_than=NLL, planned=perfect(0.0, 0.8), control="last members", registered=LATER)
def test_posterior_reads_as_well_as_a_perfect_reader(
    case: Case, path: str = "posterior naive"
) -> float | None:
    """With posterior weighting, the most probable members read as well as a perfect reader's.

    Nats a token of that path minus those of the most probable members of the exact run's sets.
    Control: the least probable member of each set of isolated mode.
    """
    return case.extra(path, "exact naive")


@study.claim(less_than=NLL, planned=planned(1.0, 1.2), control="last members")
def test_weighted_reads_as_well_as_greedy(case: Case, path: str = "weighted naive") -> float | None:
    """With siblings weighted by probability, the most probable members read as well as greedy text.

    Nats a token of that path minus those of greedy text, under the plain model.
    Control: the least probable member of each set of isolated mode.
    """
    return case.extra(path)


@study.claim(less_than=NLL, planned=planned(0.3, 0.5), control="reversed best")
def test_best_path_as_good_as_beam(case: Case, path: str = "isolated best") -> float | None:
    """The best path through isolated sets is no less probable than a beam search of its width.

    Nats a token of the best of four beams in the sets minus those of the beam search.
    Control: the best path through the same sets in reverse order.
    """
    return case.extra(path, "beam")


@study.claim(less_than=NLL, planned=planned(0.3, 0.5), control="reversed best")
def test_best_path_as_good_as_greedy(case: Case, path: str = "isolated best") -> float | None:
    """The best path through isolated sets is no less probable than greedy text, which is no search.

    Nats a token of the best of four beams in the sets minus those of greedy text.
    Control: the best path through the same sets in reverse order.
    """
    return case.extra(path)


@study.claim(less_than=LOST, planned=planned(0.0, 0.15), control="absent")
def test_fact_still_found(case: Case, arm: str = "isolated") -> float | None:
    """Facts stated before wide sets are still found after them.

    Share of facts found after greedy text minus share found after isolated siblings.
    Control: the facts not stated at all.
    """
    return case.lost(arm)


@study.claim(less_than=LOST, planned=planned(0.0, 0.15), control="absent")
def test_weighted_fact_still_found(case: Case, arm: str = "weighted") -> float | None:
    """Facts stated before wide sets are still found if siblings are weighted by probability.

    Share of facts found after greedy text minus share found after weighted siblings.
    Control: the facts not stated at all.
    """
    return case.lost(arm)


@study.claim(less_than=LOST, planned=planned(0.0, 0.15), control="absent", registered=LATER)
def test_posterior_fact_still_found(case: Case, arm: str = "posterior") -> float | None:
    """Facts stated before wide sets are still found if siblings are weighted by posterior.

    Share of facts found after greedy text minus share found after posterior-weighted siblings.
    Control: the facts not stated at all.
    """
    return case.lost(arm)


HALF = "about half a bigram of the eleven that a text of twelve tokens has"


@study.claim(more_than=0.05, because=HALF, planned=planned(0.12, 0.2), control="reversed")
def test_covers_beam(case: Case, sets: str = "lattice") -> float:
    """Isolated sets hold more of what a beam search considered than greedy text does.

    Share of the final beams' distinct bigrams in consecutive sets minus the share in greedy text.
    Control: the same sets in reverse order.
    """
    return case.coverage[sets] - case.coverage["greedy"]


@study.claim(share_above=0.5, because="most prompts", planned=planned(0.8), control="greedy twice")
def test_modes_part(case: Case, other: str = "visible") -> bool:
    """Free isolated and visible runs come to different sets within twelve steps on most prompts.

    Share of prompts whose runs have parted.
    Control: the run with a threshold of 0.51 against the plain model's greedy decoding.
    """
    return case.parted_at[other] is not None


MEAN = "mean and 95 % interval over prompts"


@study.pictures
def pictures(store: Store, cases: Sequence[Case]) -> Iterator[Picture]:
    """The own sets; nats a token by path and threshold; survival; facts and bigrams found."""
    yield lattice(store)
    if branched := [case for case in cases if case.branched]:
        yield _nll_by_path(branched)
        yield _nll_by_threshold(branched, store.manifest["config"]["threshold"])
    lines, last = {}, max(len(case.widths["isolated"]) for case in cases) - 1
    for other in ("visible", "weighted"):
        lines[f"isolated and {other}"] = survival([case.parted_at[other] for case in cases], last)
    caption = (
        "Share of prompts on which both free runs have had the same sets up to and including a "
        "step (Kaplan and Meier 1958), with Greenwood's interval."
    )
    yield lines_by(lines, "step", "share not yet parted", "Steps until the modes part", caption)
    if asked := [case for case in cases if case.fact_branched]:
        yield _facts_found(asked)
    texts = {"lattice": "isolated sets", "greedy": "greedy text", "reversed": "the sets reversed"}
    rows = spreads_of([case.coverage for case in cases], texts)
    title = "What a beam search considered"
    caption = f"Of the distinct bigrams of the {NUM_BEAMS} final beams; {MEAN}."
    yield intervals(rows, "share of beam search's bigrams held", title, caption)


def _nll_by_path(cases: Sequence[Case]) -> Picture:
    texts = {"greedy": "greedy text", "beam": f"beam search of width {NUM_BEAMS}"}
    for kind, mode in product(("naive", "best"), (*MODES, "exact")):
        texts[f"{mode} {kind}"] = f"{NAMES_OF.get(mode, mode)}, {kind} path"
    texts |= {"last members": "isolated, last members", "reversed best": "reversed, best path"}
    rows = spreads_of([case.nll for case in cases], texts)
    whole = [case.nll for case in cases if not case.ended]
    extra = [nll["isolated naive"] - nll["greedy"] for nll in whole] or [math.nan]
    mean, low, high = map(number, spread(extra))
    caption = (
        f"Negative log probability per token under the plain model; {MEAN} that branched. Naive: "
        f"the most probable member of each set. Best: of {NUM_BEAMS} beams in the sets. Dashed: "
        "greedy text. Where neither holds an end-of-sequence token, isolated naive minus greedy is "
        f"{mean} [{low}, {high}]."
    )
    title = "How probable the plain model finds what is read"
    label, dashed = "nats a token (lower reads better)", rows["greedy text"][0]
    return intervals(rows, label, title, caption, reference=dashed)


def _nll_by_threshold(cases: Sequence[Case], threshold: float) -> Picture:
    points, widths = [], []
    for dose, name in [(threshold, "isolated"), *((dose, str(dose)) for dose in DOSES)]:
        extra = [case.nll[f"{name} naive"] - case.nll["greedy"] for case in cases]
        points.append((dose, *spread(extra)))
        width = float(np.mean([np.mean(case.widths[name]) for case in cases]))
        widths.append(f"{number(width)} at {dose}")
    caption = (
        f"What the naive path costs more than greedy text, isolated mode; {MEAN}. Mean width: "
        f"{', '.join(widths)}. From {LONE} on it is greedy text, and costs nothing."
    )
    title = "The lower the threshold, the worse it reads"
    return lines_by({"naive minus greedy": points}, "threshold", "nats a token", title, caption)


def _facts_found(cases: Sequence[Case]) -> Picture:
    texts = {"greedy": "after greedy text", **{mode: f"after {mode} sets" for mode in MODES}}
    texts["absent"] = "facts not stated"
    found, rows, notes = {}, {}, []
    for arm, text in texts.items():
        found[arm] = np.array([case.found[arm] for case in cases])  # [cases, facts]
        rows[text] = spread(found[arm].mean(axis=1))
        notes.append(f"p {np.mean([case.probability[arm] for case in cases]):.2f}")
    pairs = [found["greedy"] & ~found["isolated"], found["isolated"] & ~found["greedy"]]
    only_greedy, only_sets = (int(pair.sum()) for pair in pairs)
    either = only_greedy + only_sets
    p = float(binomtest(only_greedy, either).pvalue) if either else 1.0
    caption = (
        "Share of facts whose first token is the most probable one when asked for after "
        f"{FACT_STEPS} steps; {MEAN}, beside it the mean probability. Of {found['greedy'].size} "
        f"questions, {only_greedy} were found after greedy text only and {only_sets} after "
        f"isolated sets only (McNemar's exact p = {number(p)}, as if questions of one prompt were "
        "independent)."
    )
    title = "Is what was said before the sets still found?"
    return intervals(rows, "share of facts found", title, caption, notes=notes)


def test_paths_cost_what_one_plain_pass_says(store: Store, lm: LanguageModel) -> None:
    """The search's sums equal a forward pass over the whole text, without cache, beams or batch."""
    kept = store.load_json("paths")
    start = len(kept["prompt_tokens"])
    for name, path in kept["paths"].items():
        text = torch.tensor([kept["prompt_tokens"] + path["tokens"]], device=lm.device)
        with torch.inference_mode():
            logits = lm.model(input_ids=text, use_cache=False).logits[0, start - 1 : -1]
        logs = logits.double().log_softmax(dim=-1).gather(1, text[0, start:, None])
        assert abs(-float(logs.mean()) - path["nats_per_token"]) < 1e-3, name


def test_best_paths_stay_in_their_sets(store: Store) -> None:
    """What is called a path through the sets takes one member of each."""
    sets = [set(step["tokens"]) for step in store.load_json("generation_log")["runs"][0]["steps"]]
    paths = store.load_json("paths")["paths"]
    for name in ("isolated best", "isolated naive", "last members"):
        pairs = zip(paths[name]["tokens"], sets, strict=True)
        assert all(token in members for token, members in pairs), name
