"""exp15: does a free run stay near the truth if its members read their own lattice?

A free run chooses its own sets. The truth at each step is the exact mixture of all paths through
the sets so far, each path read as plain text. A perfect reader (`exact`) chooses its sets from that
mixture itself: it is the ceiling of every comparison, in the distribution and as text. The runs
differ in how the members of earlier sets are weighted, and in which are dropped. Text is the best
path of a run, which mixes no branches, and stands beside greedy text and beam searches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fixtures.lattices import Choose, ExactRun, by_threshold, exact_runs, given
from fixtures.margins import ANY_GAIN, BFLOAT16_TV, NLL, THIRD
from fixtures.raw import grouped_means, keep_log, lattice, spread, spreads_of
from fixtures.rows import minus
from fixtures.truth import forced
from tempo import RunSpec, Trace
from tempo.harness import Margin, Planned, Prompt, Space, Steps, Store, Study, average
from tempo.metrics import total_variation
from tempo.reporting.figures import Picture, lines_by, number
from tempo.reporting.figures.intervals import intervals
from test_experiments.reading import Beam, Search, search

# From so many wide sets on, a member has several paths behind it, and one weight a key is not
# enough.
WIDE_SETS = 2
WEIGHTINGS = {
    "none": "siblings as they are",
    "count": "weighting count",
    "probability": "weighting probability",
    "posterior": "weighting posterior",
    "best_parent": "weighting best parent",
}
# At the same bound the two ways to prune would drop different numbers of members. These bounds
# dropped about as many on eight prompts, which were looked at for this alone.
PRUNED: dict[str, dict[str, Any]] = {
    "posterior pruned": {"weighting": "posterior", "prune": 0.05},
    "pruned": {"prune": 0.1},
    "pruned by attention": {"prune": 0.4, "prune_by": "attention"},
}
# Rules beside the config's threshold. The floor keeps noise out, the width keeps the exact truth
# within reach.
BOUNDED = {"weighting": "posterior", "threshold": 0.02, "max_width": 3}
RULES: dict[str, dict[str, Any]] = {
    "top-k 2": {"weighting": "posterior", "threshold": 0.0, "top_k": 2},
    "top-p 0.6": BOUNDED | {"top_p": 0.6},
    "min-p 0.3": BOUNDED | {"min_p": 0.3},
}
RUNS = {name: {"weighting": name} for name in WEIGHTINGS} | PRUNED | RULES
TEXTS = WEIGHTINGS | {
    "posterior pruned": "posterior, pruned below 0.05",
    "pruned": "as they are, pruned by posterior below 0.1",
    "pruned by attention": "as they are, pruned by attention below 0.4",
    "top-k 2": "posterior, top-k 2",
    "top-p 0.6": "posterior, top-p 0.6, at most 3",
    "min-p 0.3": "posterior, min-p 0.3, at most 3",
}
BEAMS = (2, 4)

study = Study(
    "exp15",
    title="Do free runs stay near the truth?",
    registered="2026-11-28T10:02Z",
    space=Space(widest=32),
)


@dataclass(frozen=True)
class Case:
    """What one prompt gives, by run."""

    widths: dict[str, list[int]]
    tv: dict[str, list[float]]  # of each step, to the exact mixture of the run's own sets
    kept: float  # the least share of the paths' probability that the exact mixtures follow
    same_set: dict[str, float | None]  # share of steps, after a wide set, with the exact run's set
    dropped: dict[str, int]  # members that pruning dropped
    nll: dict[str, float]  # of the best path, nats a token under the plain model
    tokens: dict[str, int]  # forwarded after the prompt

    def distance(self, arm: str) -> float | None:
        """Total variation to the truth, mean over the steps that follow two wide sets."""
        wide = np.cumsum([width > 1 for width in self.widths.get(arm, self.widths["posterior"])])
        far = [
            tv for tv, before in zip(self.tv[arm][1:], wide, strict=False) if before >= WIDE_SETS
        ]
        return average(far)

    def distances(self, arms: Iterable[str]) -> dict[str, float | None]:
        return {arm: self.distance(arm) for arm in arms}

    @property
    def branched(self) -> bool:
        """Whether the runs had two wide sets to read."""
        return self.distance("none") is not None and self.distance("posterior") is not None

    def extra(self, path: str, other: str = "greedy") -> float | None:
        """How many nats a token one text costs more than another, if the prompt branched."""
        return self.nll[path] - self.nll[other] if self.branched else None


@study.measure
def free_runs(prompt: Prompt, names: Sequence[str] = tuple(RUNS)) -> Steps[Case]:
    """Free runs, the exact mixture of all paths through the sets of each, and their best paths.

    names: which of `RUNS`; with "none" and "posterior" among them.
    """
    specs = [prompt.spec(stop_at_eos=False, **RUNS[name]) for name in names]
    found = yield [forced(spec) for spec in specs]
    traces: dict[str, Trace] = dict(zip(names, found, strict=True))
    traces["rolled"] = yield forced(_rolled(traces["posterior"]))
    choosers: list[Choose] = [given(trace.sets) for trace in traces.values()]
    choosers.append(by_threshold(prompt.config.threshold))
    prefix, steps = traces["none"].prompt_tokens, prompt.config.max_steps
    *truths, exact = yield from exact_runs(prompt.lm, prefix, choosers, steps)
    tv, same = {}, {}
    for (name, trace), truth in zip(traces.items(), truths, strict=True):
        tv[name] = _distances(trace, truth)
        same[name] = _same_sets(trace.sets, exact)
    same["late"] = _same_sets([[], *traces["posterior"].sets], exact)
    best = {name: trace.best_path for name, trace in traces.items()}
    best |= {"exact": list(exact.paths[0]), "last": _last_path(traces["posterior"])}
    widths = {name: trace.widths for name, trace in traces.items()} | {
        "exact": list(map(len, exact.sets))
    }
    texts = yield from _texts(prompt, prefix, best, widths["posterior"])
    if prompt.store:
        keep_log(prompt.store, traces["posterior"])
        _keep(prompt, prompt.store, tv, texts)
    return Case(
        widths=widths,
        tv=tv,
        kept=min(truth.kept for truth in (*truths, exact)),
        same_set=same,
        dropped={name: _num_dropped(traces[name]) for name in PRUNED if name in traces},
        nll={name: text.nll for name, text in texts.items()},
        tokens={name: sum(of_sets) for name, of_sets in widths.items()},
    )


def _rolled(trace: Trace) -> RunSpec:
    """The run's sets again, each posterior given to the next member of its set instead."""
    links = []
    for step in trace.steps[:-1]:
        assert step.links is not None
        links.append(np.roll(step.links, 1, axis=0))
    return trace.spec.but(replay=trace, replay_links=links)


def _distances(trace: Trace, truth: ExactRun) -> list[float]:
    pairs = zip(trace.steps, truth.distributions, strict=True)
    return [round(total_variation(step.distribution, exact), 9) for step, exact in pairs]


def _same_sets(sets: Sequence[Sequence[int]], exact: ExactRun) -> float | None:
    """The share of steps with the exact run's set, from the first that could differ on."""
    wide = next((k for k, members in enumerate(exact.sets) if len(members) > 1), len(exact.sets))
    pairs = zip(sets, exact.sets, strict=False)
    return average([float(set(one) == set(other)) for one, other in list(pairs)[wide + 1 :]])


def _num_dropped(trace: Trace) -> int:
    return sum(len(step.dropped) for step in trace.steps)


def _last_path(trace: Trace) -> list[int]:
    return [step.tokens[-1] for step in trace.steps]


def _texts(
    prompt: Prompt, prefix: Sequence[int], paths: Mapping[str, list[int]], widths: Sequence[int]
) -> Steps[dict[str, Beam]]:
    """What each path costs, and greedy text and beam searches of like cost, by the plain model.

    A beam search of width n forwards n tokens a step, as a run with sets of n does. "equal" has
    the posterior run's mean width.
    """
    searches = {"greedy": Search(), "equal beam": Search(max(1, round(float(np.mean(widths)))))}
    searches |= {f"beam {width}": Search(width) for width in BEAMS}
    for name, path in paths.items():
        searches[name] = Search(1, [[token] for token in path])
    found = yield from search(prompt.lm, prefix, list(searches.values()), len(widths))
    return {name: beams[0] for name, beams in zip(searches, found, strict=True)}


def _keep(
    prompt: Prompt, store: Store, tv: Mapping[str, list[float]], texts: Mapping[str, Beam]
) -> None:
    store.json("distances", {"total_variation_by_step": tv})
    lines = [f"{prompt.text!r}: nats a token under the plain model"]
    for name, text in texts.items():
        lines.append(f"{name:20} {text.nll:6.3f}  {prompt.lm.decode(text.tokens)!r}")
    lines += ["", "total variation to the exact mixture of the run's own sets, by step"]
    for name, values in tv.items():
        lines.append(f"{name:20} " + " ".join(f"{value:.3f}" for value in values))
    store.text("analysis", "\n".join(lines))


planned = partial(
    Planned, source="a prototype on 47 other prompts: posterior 0.062, plain siblings 0.275"
)
NEAR = Margin(0.08, "four times what bfloat16 changes, and under a third of plain siblings' error")
AT_STEPS = f"at the steps that follow {WIDE_SETS} wide sets of the run's own"


@study.claim(less_than=NEAR, planned=planned(0.062, 0.08), control="rolled")
def test_posterior_is_near_the_truth(case: Case, arm: str = "posterior") -> float | None:
    """A free run with posterior weighting stays near the exact mixture of its own paths.

    TV(truth, run), mean over the steps that follow two wide sets.
    Control: the same sets with each posterior given to the next member of its set.
    """
    return case.distance(arm)


@study.claim(less_than=NEAR, planned=planned(0.275, 0.15), control="rolled")
def test_plain_is_near_the_truth(case: Case, arm: str = "none") -> float | None:
    """A free run of siblings as they are stays near the exact mixture of its own paths.

    TV(truth, run), mean over the steps that follow two wide sets.
    Control: the posterior run's sets with each posterior given to the next member of its set.
    """
    return case.distance(arm)


@study.claim(
    less_than=ANY_GAIN,
    because="two thirds are gone",
    planned=planned(-0.03, 0.12),
    control="rolled",
)
def test_posterior_removes_two_thirds(case: Case, arm: str = "posterior") -> float | None:
    """Posterior weighting leaves at most 35 % of the error that siblings as they are make.

    TV(truth, posterior run) - 0.35 TV(truth, plain run), each on its own sets, mean over the steps
    that follow two wide sets.
    Control: the posterior run's sets with each posterior given to the next member of its set.
    """
    plain = case.distance("none")
    return minus(case.distance(arm), None if plain is None else THIRD * plain)


@study.claim(less_than=BFLOAT16_TV, planned=planned(-0.05, 0.1), control="rolled")
def test_posterior_beats_one_weight_a_key(case: Case, arm: str = "posterior") -> float | None:
    """Posterior weighting is no further from the truth than weighting by probability.

    TV(truth, posterior run) - TV(truth, probability run), mean over the steps that follow two wide
    sets.
    Control: the posterior run's sets with each posterior given to the next member of its set.
    """
    return minus(case.distance(arm), case.distance("probability"))


@study.claim(
    more_than=0.1,
    because="one set in ten",
    planned=Planned(0.3, 0.3, "a prototype on 47 other prompts: 84 % and 47 %"),
    control="late",
)
def test_posterior_chooses_as_the_truth(case: Case, arm: str = "posterior") -> float | None:
    """With posterior weighting, more sets are those of the exact run than without.

    Share of steps with the exact run's set, posterior run minus plain run.
    Control: the posterior run's sets one step late.
    """
    return minus(case.same_set[arm], case.same_set["none"])


@study.claim(
    less_than=NLL,
    planned=Planned(-0.06, 0.3, "eight prompts of the suite"),
    control="last",
)
def test_perfect_best_path_reads_as_well_as_greedy(case: Case, path: str = "exact") -> float | None:
    """The best path of a perfect reader reads as well as greedy text: the ruler can be met.

    Nats a token of the most probable path of the exact run minus those of greedy text.
    Control: the least probable member of each set of the posterior run.
    """
    return case.extra(path)


@study.claim(
    less_than=NLL,
    planned=Planned(0.39, 0.6, "a prototype on 47 other prompts"),
    control="last",
)
def test_plain_best_path_reads_as_well_as_greedy(case: Case, path: str = "none") -> float | None:
    """The best path of siblings as they are reads as well as greedy text.

    Nats a token of that path minus those of greedy text, under the plain model.
    Control: the least probable member of each set of the posterior run.
    """
    return case.extra(path)


@study.claim(
    less_than=NLL,
    planned=Planned(0.0, 0.4, "a prototype on 47 other prompts"),
    control="last",
)
def test_best_path_reads_as_well_as_the_perfect_readers(
    case: Case, path: str = "posterior"
) -> float | None:
    """The best path of a posterior run reads as well as the best path of a perfect reader.

    Nats a token of that path minus those of the most probable path of the exact run.
    Control: the least probable member of each set.
    """
    return case.extra(path, "exact")


@study.claim(
    less_than=NLL,
    planned=Planned(-0.04, 0.4, "a prototype on 47 other prompts"),
    control="last",
)
def test_best_path_reads_as_well_as_greedy(case: Case, path: str = "posterior") -> float | None:
    """The best path of a posterior run reads as well as greedy text.

    Nats a token of that path minus those of greedy text, under the plain model.
    Control: the least probable member of each set.
    """
    return case.extra(path)


@study.claim(
    less_than=NLL,
    planned=Planned(0.15, 0.4, "a prototype on 47 other prompts: beams of two are 0.15 better"),
    control="last",
)
def test_best_path_reads_as_well_as_beam(case: Case, path: str = "posterior") -> float | None:
    """The best path of a posterior run reads as well as a beam search that forwards as much.

    Nats a token of that path minus those of the best beam, of a search whose width is the run's
    mean width.
    Control: the least probable member of each set.
    """
    return case.extra(path, "equal beam")


@study.claim(less_than=BFLOAT16_TV, planned=planned(0.0, 0.05), control="rolled")
def test_pruning_costs_nothing(case: Case, arm: str = "posterior pruned") -> float | None:
    """Dropping members whose posterior is below 0.05 brings a posterior run no further off.

    TV(truth, pruned run) - TV(truth, posterior run), mean over the steps that follow two wide sets.
    Control: the posterior run's sets with each posterior given to the next member of its set.
    """
    return minus(case.distance(arm), case.distance("posterior"))


@study.claim(less_than=-BFLOAT16_TV, planned=planned(-0.1, 0.2), control="none")
def test_posterior_prunes_better_than_attention(case: Case, arm: str = "pruned") -> float | None:
    """Members are better dropped by their posterior than by the attention they get.

    TV(truth, run pruned by posterior) - TV(truth, run pruned by attention), without weighting, mean
    over the steps that follow two wide sets.
    Control: the run that drops nothing.
    """
    return minus(case.distance(arm), case.distance("pruned by attention"))


@study.pictures
def pictures(store: Store, cases: Sequence[Case]) -> Iterator[Picture]:
    """The own sets; the distance to the truth by run and by wide sets; what the best paths cost."""
    yield lattice(store)
    if not (branched := [case for case in cases if case.branched]):
        return
    yield _distance_by_run(branched)
    lines = {}
    for arm in ("none", "probability", "posterior", "best_parent"):
        lines[TEXTS[arm]] = grouped_means([_by_wide_sets(case, arm) for case in branched])
    caption = (
        "Total variation to the exact mixture of all paths through the run's own sets, by the "
        "number of wide sets before the step; mean and 95 % interval over prompts."
    )
    title = "How the error grows with what has been read in parallel"
    yield lines_by(lines, "wide sets before", "total variation to the truth", title, caption)
    yield _nll_by_path(branched)


def _by_wide_sets(case: Case, arm: str) -> list[tuple[float, float]]:
    wide = np.cumsum([width > 1 for width in case.widths[arm]])
    return list(zip(wide.tolist(), case.tv[arm][1:], strict=False))


def _distance_by_run(cases: Sequence[Case]) -> Picture:
    found = [case.distances((*TEXTS, "rolled")) for case in cases]
    whole = [row for row in found if None not in row.values()]
    texts = TEXTS | {"rolled": "posterior of the next member (control)"}
    rows: Any = spreads_of(whole, texts)  # type: ignore[arg-type]
    rows["the exact mixture (perfect reader)"] = (0.0, 0.0, 0.0)
    notes = []
    for arm in texts:
        widths = np.mean([np.mean(case.widths[arm]) for case in cases])
        same = average([s for case in cases if (s := case.same_set[arm]) is not None])
        dropped = ""
        if arm in PRUNED:
            dropped = f", {np.mean([case.dropped[arm] for case in cases]):.1f} dropped"
        notes.append(f"width {widths:.1f}, same set {same or 0:.0%}{dropped}")
    kept = np.mean([case.kept for case in cases])
    caption = (
        f"Total variation to the exact mixture of the run's own paths, {AT_STEPS}; mean and 95 % "
        f"interval over {len(whole)} prompts. Beside: the mean width of the sets, and how often "
        "they are the perfect reader's. The exact mixtures follow "
        f"{kept:.1%} of the paths' probability."
    )
    title = "How near free runs stay to the truth"
    return intervals(rows, "total variation to the truth", title, caption, [*notes, ""])


def _nll_by_path(cases: Sequence[Case]) -> Picture:
    texts = {"greedy": "greedy text"} | {f"beam {n}": f"beam search of width {n}" for n in BEAMS}
    texts |= {"equal beam": "beam search of the run's mean width"}
    texts |= {"exact": "exact run, best path (perfect reader)"}
    texts |= {arm: f"{text}, best path" for arm, text in TEXTS.items()}
    texts["last"] = "posterior, last members (control)"
    rows = spreads_of([case.nll for case in cases], texts)
    notes = []
    for name in texts:
        tokens = [case.tokens[name] for case in cases if name in case.tokens]
        notes.append(f"{np.mean(tokens):.0f} tokens" if tokens else "")
    extra = [case.nll["posterior"] - case.nll["greedy"] for case in cases]
    mean, low, high = map(number, spread(extra))
    caption = (
        "Negative log probability a token under the plain model; mean and 95 % interval over "
        f"{len(cases)} prompts. Beside: tokens forwarded after the prompt; a beam search of width "
        "n forwards n a step, in as many passes. Dashed: greedy text. Posterior, best path, minus "
        f"greedy text is {mean} [{low}, {high}]."
    )
    title = "What the best path through the sets costs"
    label, dashed = "nats a token (lower reads better)", rows["greedy text"][0]
    return intervals(rows, label, title, caption, notes, reference=dashed)


def test_the_truth_is_followed_far_enough(cases: list[Case]) -> None:
    """The exact mixtures of most prompts follow most of the paths' probability."""
    assert float(np.median([case.kept for case in cases])) > 0.8  # of the flattest of models 0.86


def test_before_the_second_wide_set_posterior_is_nearly_exact(cases: list[Case]) -> None:
    """Right after the first wide set, a run's mixture is the exact one to rounding."""
    for case in cases:
        wide = np.flatnonzero(np.array(case.widths["posterior"]) > 1)
        if wide.size and wide[0] + 1 < len(case.tv["posterior"]):
            assert case.tv["posterior"][wide[0] + 1] < 1e-3
