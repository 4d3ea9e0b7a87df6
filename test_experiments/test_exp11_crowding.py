"""exp11: crowding or contradiction? How much error is only that n tokens weigh n times too much?

The scene, the readers and the distance are exp7's. Three kinds of sets of equal width: the real
siblings, copies of the top member (crowding alone, nothing contradicts), the top member among
random tokens. Each is read as it is, with every member weighing 1/n (`count`), and with what it was
chosen with (`probability`). Copies by count must be the single token again, to rounding.

The Bayes posterior of member i given the reader u, proportional to w_i b_i(u), is free at run time:
the members' own outputs b_i have been computed already to choose the reader. Where it is nearly
one-hot, keeping the most probable branch alone is as good. So the primary claims are about readers
after which no branch has a posterior of .6, and weighting must beat that branch there. Beside it
stand ways that others proposed (`fixtures.rivals`), their numbers tuned on other prompts.

A better weighting was looked for among powers and multiples of prior and posterior on one half of
the prompts. Older claims about what was found are decided on the other half alone (`is_held_out`).

Shapes: R readers, n members, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from fixtures.claims import PLANNED_SD, nearer
from fixtures.floors import rounding
from fixtures.margins import BFLOAT16_TV, PRACTICAL_TV
from fixtures.raw import FEWEST, grouped_means, lines_of, spread
from fixtures.readers import Readers, after_each, after_readers, answers_of, by_top_weight
from fixtures.rivals import (
    TUNING_TEXTS,
    Tuned,
    ape,
    by_head,
    inputs_mixed,
    read_as_one,
    read_changed,
    tokens_cannot_be_mixed,
    tuned,
)
from fixtures.scenes import NUM_READ, NUM_READERS, READER, ExactScene, exact_scene
from fixtures.truth import Distances, at_lags, distances_by_lag, forced
from tempo import RunSpec, Trace
from tempo.harness import Margin, Planned, Prompt, Space, Steps, Store, Study
from tempo.metrics import total_variation
from tempo.reporting.figures import Picture, lines_by
from tempo.reporting.figures.intervals import intervals

LAGS = range(READER, READER + NUM_READ)
# A weight below this is as good as none, and its logarithm stays finite in float32.
LEAST_WEIGHT = 1e-12

ARMS = {
    "isolated": "siblings as they are",
    "count": "siblings by count",
    "probability": "siblings by probability",
    "posterior": "siblings by posterior",
    "late_branch": "best branch given the reader",
    "top_branch": "top branch alone",
    "copies": "copies of the top member as they are",
    "copies_count": "copies of the top member by count",
    "random": "random siblings as they are",
    "random_count": "random siblings by count",
    "random_probability": "random siblings by probability",
    "dropped": "set dropped",
    # What others proposed
    "ape": "APE, temperature and scale tuned",
    "mixture_of_inputs": "one token, mixture of inputs",
    "heads": "weights fitted for each head",
    # The neighbourhood of the posterior, in which nothing better was found on the development half
    "posterior_root": "posterior to the power 1/2",
    "posterior_square": "posterior to the power 2",
    "posterior_half": "posterior, the set weighing 1/2",
    "posterior_double": "posterior, the set weighing 2",
    # Wrong weights
    "reversed": "probabilities in reverse order",
    "unread": "posterior given another reader",
    "heavier": "each sibling weighing n",
}
IN_CURVES = dict(list(ARMS.items())[:6])  # the others would hide them
TRIED = ("probability", *(name for name in ARMS if name.startswith("posterior")), "late_branch")
IN_PANELS = (*IN_CURVES, "posterior_square", "ape", "mixture_of_inputs", "heads", "unread")

# Older claims were written for one reader, on 2026-11-24. With five they are other statistics.
study = Study(
    "exp11",
    title="Crowding or contradiction?",
    registered="2026-11-28T10:15Z",
    needs=tokens_cannot_be_mixed,
    space=Space(widest=32),
)


@dataclass(frozen=True)
class Case:
    """What one prompt gives."""

    held_out: bool
    width: int
    far: Distances  # by lag, along the text of the first reader
    readers: Readers
    weights: dict[str, list[float]]  # of the members, by probability and by the first's posterior
    copies_tv: dict[str, float]  # to the top branch: largest anywhere; "reader": copies, mean
    own_posterior_tv: float  # between the posterior that a decoder has and the branches' own
    tuned: dict[str, float]  # the rivals' numbers, and what they were worth where they were tuned
    dtype: str

    def distance(self, arm: str, metric: str = "tv") -> float | None:
        """How far an arm is from the truth at the reader, mean over readers."""
        return self.readers.distance(arm, metric)


def is_held_out(prompt: str) -> bool:
    """Whether the prompt was left alone while a better weighting was looked for."""
    return hashlib.sha256(prompt.encode()).digest()[0] % 2 == 1


@study.measure
def every_weighting(prompt: Prompt) -> Steps[Case | None]:
    """Every arm's distance to the truth after five readers, and of some along the first's text."""
    scene = yield from exact_scene(prompt)
    if scene is None:
        return None
    answers, members = (yield from answers_of(prompt.lm, scene)), scene.members
    texts = {
        "isolated": scene.read(members),
        "probability": scene.read(members, weighting="probability"),
        "posterior": scene.read(members, weighting="posterior"),
        "count": scene.read_briefly(members, weighting="count"),
        "copies": scene.copies(),
        "copies_count": scene.copies(weighting="count"),
    }
    by_all, by_each = read_by_all(scene, answers.posterior), _of_each(scene, answers.posterior)
    each = [spec for specs in by_each.values() for spec in specs]
    asked = [*scene.branches.runs(), *map(forced, (*texts.values(), *by_all.values(), *each))]
    found = iter((yield asked))
    plain = [next(found) for _ in members]
    runs = {name: next(found) for name in texts}
    read = {name: next(found) for name in by_all}
    after = {name: after_readers(trace) for name, trace in read.items()}
    for name, specs in by_each.items():
        after[name] = after_each([next(found) for _ in specs])
    after |= {"top_branch": answers.branches[:, 0], "late_branch": answers.late}
    numbers = tuned(prompt.lm, tuple(prompt.but(text).spec(capture=()) for text in TUNING_TEXTS))
    after["ape"] = read_changed(prompt.lm, scene, ape(numbers.temperature, numbers.scale))
    of_heads = by_head(numbers.offsets, numbers.powers, answers.posterior)
    after["heads"] = read_changed(prompt.lm, scene, of_heads)
    mixes = inputs_mixed(scene.weights, answers.posterior)
    after["mixture_of_inputs"] = read_as_one(prompt.lm, scene, mixes)
    readers = Readers.measure(answers, after)
    arms = {name: at_lags(trace, LAGS) for name, trace in runs.items()}
    arms["top_branch"] = at_lags(plain[0], LAGS)
    arms["late_branch"] = at_lags(plain[int(answers.posterior[0].argmax())], LAGS)
    far = distances_by_lag(LAGS, [scene.branches.truth(plain, lag) for lag in LAGS], arms)
    case = Case(
        held_out=is_held_out(prompt.text),
        width=scene.width,
        far=far,
        readers=readers,
        weights={
            "probability": scene.weights.tolist(),
            "posterior": answers.posterior[0].tolist(),
        },
        copies_tv=_copies_tv(after, arms),
        own_posterior_tv=_own_posterior_tv(read["posterior"], answers.posterior),
        tuned=_numbers(numbers),
        dtype=prompt.lm.provenance()["dtype"],
    )
    if prompt.store:
        _keep(prompt, prompt.store, scene, answers.posterior, case, numbers)
    return case


def read_by_all(scene: ExactScene, posterior: np.ndarray) -> dict[str, RunSpec]:
    """The runs in which all readers read one set; `posterior` is [R, n]."""
    members, strangers = scene.members, (scene.members[0], *scene.strangers)
    read = scene.read_by_all
    plain = (1.0,) * len(scene.readers)
    specs = {
        # exp7 asks for the first five as well
        "isolated": read(members),
        "probability": read(members, weighting="probability"),
        "posterior": read(members, weighting="posterior"),
        "random": read(strangers),
        "dropped": read(),
        "count": read(members, weighting="count"),
        "copies": read(scene.copied),
        "copies_count": read(scene.copied, weighting="count"),
        "random_count": read(strangers, weighting="count"),
        "random_probability": read(strangers, weighting="probability"),
        "reversed": read(members, replay_weights=[scene.weights[::-1].tolist(), plain]),
        "heavier": read(members, replay_weights=[(float(scene.width),) * scene.width, plain]),
    }
    links = {
        "posterior_root": _positive(posterior**0.5),
        "posterior_square": _positive(posterior**2),
        "unread": np.roll(posterior, 1, axis=0),
    }
    for name, weights in links.items():
        specs[name] = read(members, weighting="posterior", replay_links=[weights.T])
    return specs


def _of_each(scene: ExactScene, posterior: np.ndarray) -> dict[str, list[RunSpec]]:
    """A run for each reader, of weights that do not sum to one and differ by reader."""
    specs = {}
    for name, total in {"posterior_half": 0.5, "posterior_double": 2.0}.items():
        specs[name] = []
        for reader, weights in zip(scene.readers, total * _positive(posterior), strict=True):
            alone = replace(scene, readers=(reader,))
            rows = [weights.tolist(), (1.0,)]
            specs[name].append(alone.read_by_all(scene.members, replay_weights=rows))
    return specs


def _positive(weights: np.ndarray) -> np.ndarray:
    """Weights [R, n] whose rows sum to one, each above 0."""
    weights = np.maximum(weights / weights.sum(axis=1, keepdims=True), LEAST_WEIGHT)
    return weights / weights.sum(axis=1, keepdims=True)


def _copies_tv(
    after: Mapping[str, np.ndarray], arms: Mapping[str, Sequence[np.ndarray]]
) -> dict[str, float]:
    """How far copies of the top member are from that member alone."""
    found = {}
    for name in ("copies", "copies_count"):
        of_readers = list(map(total_variation, after[name], after["top_branch"]))
        found[name] = max(*of_readers, *map(total_variation, arms[name], arms["top_branch"]))
        if name == "copies":
            found["reader"] = float(np.mean(of_readers))
    return found


def _own_posterior_tv(trace: Trace, posterior: np.ndarray) -> float:
    """How far the links of a run are from the branches' posterior [R, n], the largest of all."""
    links = trace.steps[0].links
    assert links is not None
    return max(map(total_variation, links.T, posterior))


def _numbers(numbers: Tuned) -> dict[str, float]:
    found = {name: getattr(numbers, name) for name in ("temperature", "scale", "num_steps")}
    return found | {f"tv of {name}": round(tv, 6) for name, tv in numbers.tv.items()}


def _keep(
    prompt: Prompt,
    store: Store,
    scene: ExactScene,
    posterior: np.ndarray,
    case: Case,
    numbers: Tuned,
) -> None:
    pairs = zip(case.weights["probability"], case.weights["posterior"], strict=True)
    lines = ["probability  posterior", *(f"{p:11.4f} {q:10.4f}" for p, q in pairs)]
    shown = {arm: ARMS[arm] for arm in case.far.tv}
    more: dict[str, Any] = {
        "weights": case.weights,
        "posterior_by_reader": posterior.tolist(),
        "tv": case.far.tv,
        "tv_by_reader": case.readers.tv,
        "tuned": case.tuned,
        "tuned_on": TUNING_TEXTS,
    }
    scene.keep(store, prompt.lm, "weights", shown, case.far, lines, **more)
    arrays = {"offsets": numbers.offsets, "powers": numbers.powers}
    store.arrays("head_weights", **{name: a.cpu().numpy() for name, a in arrays.items()})


PILOT = "a pilot's 0.10 for two copies and 0.18 for four, interval 0.138 to 0.229 on 46 prompts"
DEVELOPED = "half of what the development half shows, with its spread"
HELD_OUT = "; the half of the prompts on which it was not chosen"
APART = "; readers after which no branch has a posterior of .6"
# Seen before these claims were registered, on 47 prompts of a review that are not the suite's.
REVIEW = (
    "a review's 47 prompts, seen before: below .6 posterior 0.121, late branch 0.182, none 0.205, "
    "posterior better than late by 0.061 [0.046, 0.080]"
)
NOT_SEEN = "a guess before any data: these ways had not been tried"
FREE = Margin(0.0, "any gain: weights cost nothing")
EITHER = Margin(0.0, "any gain, against whichever of the two is better on the prompt")


@study.claim(always=True, control="copies")
def test_copies_by_count_are_one(case: Case, arm: str = "copies_count") -> bool:
    """Copies of a token that weigh 1/n each are that token alone: crowding is an excess of log n.

    Largest TV(copies by count, one token) after any reader and at lags 2 to 4 of the first is at
    most 5.2e-05, ten times the floor.
    Control: the same copies without weights.
    """
    return case.copies_tv[arm] <= rounding("tv", case.dtype)


@study.claim(more_than=BFLOAT16_TV, planned=Planned(0.1, 0.15, PILOT), control="copies_count")
def test_copies_alone_disturb(case: Case, what: str = "reader") -> float:
    """As many copies of a token as the set has members change what the reader predicts.

    TV(one token, copies) at lag 2, mean over readers: what crowding disturbs by itself.
    Control: the same copies weighing 1/n each, at the worst lag and reader.
    """
    return case.copies_tv[what]


closer = partial(nearer, study, ARMS)
test_probability_weighting_helps = closer(
    "probability_weighting_helps",
    "Siblings that weigh what they were chosen with are read nearer to the truth than as they are.",
    ("probability", "isolated", "heavier"),
    less_than=FREE,
    planned=Planned(-0.05, 0.15, "somewhat less than a pilot's -0.069, and most of its spread"),
)
test_count_weighting_helps = closer(
    "count_weighting_helps",
    "Siblings that weigh as much together as one token are read nearer to the truth.",
    ("count", "isolated", "heavier"),
    less_than=FREE,
    planned=Planned(-0.03, 0.1, "near a pilot's -0.037; a smaller spread, as less is changed"),
)
test_mostly_crowding = closer(
    "mostly_crowding",
    "More than half of the error is crowding: weighting by count removes it.",
    ("count", "isolated", "heavier"),
    share=1 / 2,
    because="half is what 'mostly' means",
    planned=Planned(0.05, 0.12, "a pilot's 0.172 - 0.209 / 2 = 0.07: it should be refuted"),
)
test_probability_removes_a_third = closer(
    "probability_removes_a_third",
    "Weighting by probability removes at least a third of the error.",
    ("probability", "isolated", "heavier"),
    share=2 / 3,
    because="a remedy that leaves more than two thirds of the harm is none",
    planned=Planned(-0.03, 0.12, "between no gain beyond a third and half of the error removed"),
)
test_reweighted_not_worse_than_top_branch = closer(
    "reweighted_not_worse_than_top_branch",
    "Siblings weighted by probability are read no worse than the most probable of them alone.",
    ("probability", "top_branch", "dropped"),
    less_than=PRACTICAL_TV,
    planned=Planned(-0.03, PLANNED_SD, "less than half of a pilot's -0.078, with its spread"),
)
test_real_siblings_read_better_than_random = closer(
    "real_siblings_read_better_than_random",
    "At equal width, real siblings are read nearer to the truth than random ones of the top token.",
    ("isolated", "random", "dropped"),
    less_than=-BFLOAT16_TV,
    planned=Planned(-0.12, PLANNED_SD, "half of a pilot's -0.24, with its spread"),
)
where_open = partial(closer, part=lambda case: case.readers.open, note=APART)
test_plain_not_worse_than_late_branch_where_open = where_open(
    "plain_not_worse_than_late_branch_where_open",
    "Where several branches stay probable, siblings as they are are read no worse than the best "
    "branch alone.",
    ("isolated", "late_branch", "dropped"),
    less_than=PRACTICAL_TV,
    planned=Planned(0.02, 0.1, REVIEW),
)
test_posterior_beats_late_branch_where_open = where_open(
    "posterior_beats_late_branch_where_open",
    "Where several branches stay probable, weighting by posterior beats the best branch alone.",
    ("posterior", "late_branch", "dropped"),
    because="any gain: the branch alone needs no weights, only to forget members",
    planned=Planned(-0.05, 0.1, REVIEW),
)
test_posterior_removes_a_third_where_open = where_open(
    "posterior_removes_a_third_where_open",
    "Where several branches stay probable, weighting by posterior removes a third of the error.",
    ("posterior", "isolated", "heavier"),
    share=2 / 3,
    because="a remedy that leaves more than two thirds of the harm is none",
    planned=Planned(-0.015, 0.06, REVIEW),
)
test_posterior_beats_its_square_where_open = where_open(
    "posterior_beats_its_square_where_open",
    "Where several branches stay probable, Bayes' weights beat sharper ones: it is not sharpening.",
    ("posterior", "posterior_square", "heavier"),
    because="any gain: both are equally cheap",
    planned=Planned(-0.01, 0.04, "a guess; a review found the square no worse over all readers"),
)
test_posterior_beats_ape_where_open = where_open(
    "posterior_beats_ape_where_open",
    "Where several branches stay probable, weighting by posterior beats APE's scale.",
    ("posterior", "ape", "heavier"),
    because="any gain: APE's numbers must be tuned, a posterior is free",
    planned=Planned(-0.05, 0.1, NOT_SEEN),
)
test_posterior_beats_mixture_of_inputs_where_open = where_open(
    "posterior_beats_mixture_of_inputs_where_open",
    "Where several branches stay probable, weights in attention beat a mixture of embeddings.",
    ("posterior", "mixture_of_inputs", "dropped"),
    because="any gain: a mixture of embeddings is one token instead of several",
    planned=Planned(-0.05, 0.1, NOT_SEEN),
)
test_posterior_not_worse_than_fitted_heads = closer(
    "posterior_not_worse_than_fitted_heads",
    "No weight fitted for each layer and head does better than the posterior, which fits nothing.",
    ("posterior", "heads", "isolated"),
    less_than=BFLOAT16_TV,
    because="a gain that bfloat16 would hide is not worth fitting hundreds of numbers",
    planned=Planned(0.0, 0.05, NOT_SEEN),
)
closer_if_held_out = partial(
    closer, part=lambda case: case if case.held_out else None, note=HELD_OUT
)
test_posterior_beats_probability = closer_if_held_out(
    "posterior_beats_probability",
    "Siblings that weigh their posterior given the reader are read nearer than by probability.",
    ("posterior", "probability", "unread"),
    less_than=-BFLOAT16_TV,
    because="more than bfloat16 changes; less would not be worth a weight for each reader",
    planned=Planned(-0.1, 0.2, "less than the -0.14 of the development half, with its spread"),
)
test_posterior_beats_late_commitment = closer_if_held_out(
    "posterior_beats_late_commitment",
    "Weighting by posterior is better than keeping only the most probable member given the reader.",
    ("posterior", "late_branch", "unread"),
    because="any gain: late commitment needs no weights, only to forget members",
    planned=Planned(-0.007, 0.03, DEVELOPED),
)


@study.claim(less_than=EITHER, planned=Planned(-0.02, 0.05, DEVELOPED), control="posterior_half")
def test_set_weighs_one_token(case: Case, arm: str = "posterior") -> float | None:
    """With posterior weights, a set should weigh as one token: half and twice are both worse.

    TV(truth, weights that sum to 1) - the smaller TV of weights that sum to 1/2 and to 2, at lag 2,
    means over readers; the half of the prompts on which it was not chosen.
    Control: weights that sum to 1/2 against those that sum to 1 and to 2.
    """
    if not case.held_out:
        return None
    others = {"posterior", "posterior_half", "posterior_double"} - {arm}
    far = {name: np.mean(case.readers.tv[name]) for name in (arm, *others)}
    return float(far[arm] - min(far[name] for name in others))


@study.pictures
def pictures(store: Store, cases: Sequence[Case]) -> Iterator[Picture]:
    """All arms at the reader; apart by the reader; by lag and by width; weights on both halves."""
    if len(cases) < 2:
        return
    far = "total variation to the truth"
    yield _all_arms(cases, far)
    yield by_top_weight([case.readers for case in cases], {arm: ARMS[arm] for arm in IN_PANELS})
    lines = lines_of([case.far.tv for case in cases], IN_CURVES, LAGS)
    caption = (
        f"Mean and 95 % interval over {len(cases)} prompts, along the text of the first reader. "
        "Weights are those of the reader throughout: later tokens do not update the posterior."
    )
    yield lines_by(lines, "lag after the set", far, "Weighted siblings by lag", caption)
    lines = {}
    for arm, title in IN_CURVES.items():
        lines[title] = grouped_means([(case.width, _mean(case, arm))] for case in cases)
    counts = sorted(Counter(case.width for case in cases).items())
    caption = "Mean and 95 % interval over the prompts whose set has this width: "
    caption += ", ".join(f"{width}: {count}" for width, count in counts if count >= FEWEST)
    yield lines_by(lines, "width of the set", far, "Weighted siblings by width", f"{caption}.")
    developed = [case for case in cases if not case.held_out]
    held_out = [case for case in cases if case.held_out]
    if min(len(developed), len(held_out)) > 1:
        rows = {}
        for arm in TRIED:
            for half, of_half in (("development", developed), ("held out", held_out)):
                rows[f"{ARMS[arm]}, {half}"] = spread([_mean(case, arm) for case in of_half])
        caption = (
            f"Total variation to the truth at the reader on the {len(developed)} prompts on which "
            f"weights were chosen and on the {len(held_out)} that were left alone; mean and 95 % "
            "interval. The latter decide the older claims about the posterior."
        )
        yield intervals(rows, far, "The weights that were tried, on both halves", caption)


def _mean(case: Case, arm: str, metric: str = "tv") -> float:
    return float(np.mean(getattr(case.readers, metric)[arm]))


def _spreads(cases: Sequence[Case], metric: str) -> dict[str, tuple[float, float, float]]:
    """The `spread` over prompts of each arm's mean over readers, by its title."""
    found = {}
    for arm, title in ARMS.items():
        found[title] = spread([_mean(case, arm, metric) for case in cases])
    return found


def _all_arms(cases: Sequence[Case], far: str) -> Picture:
    rows, js = (_spreads(cases, metric) for metric in ("tv", "js"))
    plain = rows[ARMS["isolated"]][0]
    notes = [f"{1 - rows[arm][0] / plain:.0%}, {js[arm][0]:.3f}" for arm in rows]
    copies = np.mean([case.copies_tv["reader"] for case in cases])
    numbers = cases[0].tuned
    caption = (
        "Total variation to the exact branch mixture after the first token that reads the set; "
        f"mean over {NUM_READERS} readers of a prompt, then mean and 95 % interval over "
        f"{len(cases)} prompts. Beside: the share of the error of "
        "siblings as they are that is removed, and the Jensen-Shannon divergence in nats. Line: "
        f"the top branch alone. Copies as they are stand {copies:.3f} away from the single token: "
        "crowding without any contradiction. On other prompts, APE was tuned to a temperature of "
        f"{numbers['temperature']:g} and a scale of {numbers['scale']:g}. The weights of each head "
        f"were fitted for {numbers['num_steps']:g} steps from the posterior, as many as were best "
        "on further texts."
    )
    title = "Crowding or contradiction: sets, and what their members weigh"
    return intervals(rows, far, title, caption, notes, rows[ARMS["top_branch"]][0])


def test_the_posterior_is_free_at_run_time(cases: list[Case]) -> None:
    """The members' own outputs give the posterior that the branches, run as plain text, give."""
    for case in cases:
        # a probability relative to another may be off by more than the probability
        assert case.own_posterior_tv <= 10 * rounding("tv", case.dtype)


def test_weights_are_on_disk(store: Store, own_case: Case | None) -> None:
    """weights.json holds a weight for each member, and a posterior for each reader."""
    if own_case:
        found = store.load_json("weights")
        rows = [*found["weights"].values(), *found["posterior_by_reader"]]
        assert {len(of_members) for of_members in rows} == {own_case.width}
        assert all(abs(sum(of_members) - 1) < 1e-9 for of_members in rows)
        assert len(found["posterior_by_reader"]) == len(found["readers"])
