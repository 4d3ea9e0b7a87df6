"""exp14: are lattices read right? Forced sets one after another, each depth against the truth.

The sets are the two (or three) most probable tokens of the exact mixture of all paths so far, so
that no way of reading has a say in them. At depth d the members of the newest set have read d sets
before them, and their mixture is compared with the exact one. Depth 0 is exact by theorem. The ways
differ in how much each member of an earlier set weighs: one number a key, or one for each pair of
key and query, which is what Bayes' rule asks for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from fixtures.lattices import Choose, ExactRun, exact_runs
from fixtures.margins import ANY_GAIN, BFLOAT16_TV, SLOPE, THIRD
from fixtures.raw import keep_log, lattice, lines_of, spreads_of
from fixtures.truth import forced
from tempo import RunSpec, Trace
from tempo.harness import Planned, Prompt, Steps, Store, Study
from tempo.lattice import link
from tempo.metrics import total_variation
from tempo.reporting.figures import Picture, lines_by
from tempo.reporting.figures.intervals import intervals

# How deep a lattice of each width goes. All paths are followed: 2^7 and 3^5 at the end.
DEPTHS = {2: range(1, 7), 3: range(1, 5)}
ALL_PATHS = 2**7 + 3**5
ARMS = {
    "none": "siblings as they are",
    "count": "weighting count",
    "probability": "weighting probability",
    "key": "one exact posterior a key",
    "posterior": "weighting posterior",
    "exact": "posterior by exact links",
    "best_parent": "weighting best parent",
}
CONTROLS = {
    "rolled": "posterior of the next member (control)",
    "unread": "posterior of a token not read (control)",
}
PLAINLY = ("none", "count", "probability", "best_parent")  # by a weighting of that name alone
# The control of a slope is an error that grows: with each set so much more.
PLANTED = 0.1

study = Study(
    "exp14", title="Are lattices read right?", captures=("logits",), registered="2026-11-28T10:02Z"
)


@dataclass(frozen=True)
class Case:
    """What one prompt gives: for each width and arm, total variation to the truth by depth."""

    tv: dict[str, dict[str, list[float]]]
    kept: float  # the least share of the paths' probability that the truth follows
    top_weight: dict[str, list[float]]  # of the most probable parent, mean over members, by depth

    def distance(self, arm: str) -> float:
        """Total variation to the truth, mean over depths from 2 on and over widths."""
        return float(np.mean([np.mean(of_width[arm][1:]) for of_width in self.tv.values()]))

    def distances(self, arms: Iterable[str]) -> dict[str, float]:
        return {arm: self.distance(arm) for arm in arms}

    def slope(self, arm: str) -> float:
        """How much the distance grows with each set that is read, mean over widths."""
        found = []
        for width, of_width in self.tv.items():
            found.append(np.polyfit(DEPTHS[int(width)], of_width[arm], 1)[0])
        return float(np.mean(found))


@study.measure
def lattices(prompt: Prompt, arms: Sequence[str] = (*ARMS, *CONTROLS)) -> Steps[Case]:
    """Each arm on the same sets of two and of three, at every depth; "posterior" is one of them."""
    prefix = prompt.lm.encode(prompt.given)
    steps = max(max(depths) for depths in DEPTHS.values()) + 2
    choosers = [_top(width) for width in DEPTHS]
    truths = yield from exact_runs(prompt.lm, prefix, choosers, steps, ALL_PATHS)
    tv, tops = {}, {}
    for (width, depths), truth in zip(DEPTHS.items(), truths, strict=True):
        sets = [tuple(members) for members in truth.sets[: depths.stop]]
        base = RunSpec(prompt=tuple(prefix), replay=(*sets, sets[-1][:1]), stop_at_eos=False)
        specs = {arm: base.but(weighting=arm) for arm in PLAINLY if arm in arms}
        if "key" in arms:
            specs |= {f"key {depth}": _by_key(base, truth, depth) for depth in depths}
        if "exact" in arms:
            specs["exact"] = base.but(weighting="posterior", replay_links=_exact_links(truth, base))
        asked = [base.but(weighting="posterior", capture=("logits",)), *specs.values()]
        posterior, *others = yield list(map(forced, asked))
        traces: dict[str, Trace] = dict(zip(specs, others, strict=True)) | {"posterior": posterior}
        links = {name: of(posterior) for name, of in WRONG_LINKS.items() if name in arms}
        controls = [base.but(weighting="posterior", replay_links=each) for each in links.values()]
        traces |= dict(zip(links, (yield list(map(forced, controls))), strict=True))
        tv[str(width)] = _by_depth(arms, traces, truth, depths)
        tops[str(width)] = _top_weights(posterior, depths)
        if prompt.store and width == min(DEPTHS):
            keep_log(prompt.store, posterior)
    if prompt.store:
        prompt.store.json("distances", {"total_variation_by_width_arm_depth": tv})
        prompt.store.text("analysis", _table(prompt.text, tv))
    kept = min(
        truth.followed[depths.stop - 1].kept
        for truth, depths in zip(truths, DEPTHS.values(), strict=True)
    )
    return Case(tv=tv, kept=kept, top_weight=tops)


def _top(width: int) -> Choose:
    """Chooses the most probable tokens, until the lattice of this width is deep enough."""

    def choose(exact: np.ndarray, step: int) -> list[int]:
        num_members = width if step < DEPTHS[width].stop else 1
        return np.argsort(-exact, kind="stable")[:num_members].tolist()

    return choose


def _by_key(base: RunSpec, truth: ExactRun, depth: int) -> RunSpec:
    """The sets up to a depth, each member weighing its exact posterior for all queries alike."""
    assert base.replay is not None
    replay = (*base.replay[: depth + 1], base.replay[depth][:1])
    weights = []
    for step, members in enumerate(replay[:-1]):
        found = truth.followed[depth].marginals(step, len(members))
        weights.append(np.maximum(found, np.finfo(np.float32).tiny).tolist())
    return base.but(replay=replay, replay_weights=(*weights, (1.0,)))


def _exact_links(truth: ExactRun, base: RunSpec) -> list[Any]:
    """The exact probability of each parent given each child, from all paths up to the child."""
    assert base.replay is not None
    widths = list(map(len, base.replay))
    links: list[Any] = []
    for step in range(len(widths) - 2):
        links.append(truth.followed[step + 1].links(step, widths))
    return [*links, np.full((widths[-2], 1), 1.0 / widths[-2])]  # the last token is not judged


def _rolled(trace: Trace) -> list[Any]:
    return [np.roll(step.links, 1, axis=0) for step in trace.steps[:-1] if step.links is not None]


def _unread(trace: Trace) -> list[Any]:
    """At each step the posterior given the most probable token outside the next set."""
    found: list[Any] = []
    log_weights = torch.tensor(trace.steps[0].probabilities).log()
    log_weights = log_weights - log_weights.logsumexp(dim=0)
    for step, after in zip(trace.steps, trace.steps[1:], strict=False):
        others = after.distribution.copy()
        others[after.tokens] = 0.0
        logits = torch.from_numpy(step.logits)
        elsewhere, _ = link(logits, log_weights, [int(others.argmax())])
        found.append(elsewhere.expand(-1, len(after.tokens)).numpy())
        _, log_weights = link(logits, log_weights, after.tokens)
    return found


WRONG_LINKS = {"rolled": _rolled, "unread": _unread}


def _by_depth(
    arms: Iterable[str], traces: Mapping[str, Trace], truth: ExactRun, depths: range
) -> dict[str, list[float]]:
    """Total variation to the truth by arm and depth."""
    found: dict[str, list[float]] = {}
    for arm in arms:
        values = []
        for depth in depths:
            trace = traces[f"key {depth}" if arm == "key" else arm]
            step = trace.steps[depth + 1]
            tv = total_variation(step.distribution, truth.distributions[depth + 1])
            values.append(round(tv, 9))
        found[arm] = values
    return found


def _top_weights(trace: Trace, depths: range) -> list[float]:
    found = []
    for depth in depths:
        links = trace.steps[depth - 1].links
        assert links is not None
        found.append(float(links.max(axis=0).mean()))
    return found


def _table(text: str, tv: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    lines = [f"{text!r}: total variation to the exact mixture, by depth"]
    for width, of_width in tv.items():
        lines.append(f"sets of {width}")
        for arm, values in of_width.items():
            lines.append(f"  {arm:12} " + " ".join(f"{value:.3f}" for value in values))
    return "\n".join(lines)


planned = partial(
    Planned, source="a prototype on 47 other prompts: none 0.25, posterior 0.055, best parent 0.07"
)


@study.claim(
    less_than=ANY_GAIN, because="two thirds are gone", planned=planned(-0.03, 0.1), control="rolled"
)
def test_posterior_removes_two_thirds(case: Case, arm: str = "posterior") -> float:
    """Posterior weighting leaves at most 35 % of the error that siblings as they are make.

    TV(truth, posterior) - 0.35 TV(truth, none), mean over depths from 2 on and both widths.
    Control: the same sets with each posterior given to the next member of its set.
    """
    return case.distance(arm) - THIRD * case.distance("none")


@study.claim(less_than=ANY_GAIN, because="any gain", planned=planned(-0.02, 0.05), control="rolled")
def test_posterior_beats_one_posterior_a_key(case: Case, arm: str = "posterior") -> float:
    """A weight for each pair of key and query is nearer to the truth than the best one a key.

    TV(truth, posterior) - TV(truth, one exact posterior a key), mean over depths from 2 on.
    Control: the same sets with each posterior given to the next member of its set.
    """
    return case.distance(arm) - case.distance("key")


@study.claim(less_than=ANY_GAIN, because="any gain", planned=planned(-0.02, 0.05), control="rolled")
def test_posterior_beats_best_parent(case: Case, arm: str = "posterior") -> float:
    """Weighing all parents is nearer to the truth than committing to the most probable one.

    TV(truth, posterior) - TV(truth, best parent), mean over depths from 2 on.
    Control: the same sets with each posterior given to the next member of its set.
    """
    return case.distance(arm) - case.distance("best_parent")


@study.claim(less_than=-BFLOAT16_TV, planned=planned(-0.1, 0.1), control="rolled")
def test_posterior_of_the_token_that_is_read(case: Case, arm: str = "posterior") -> float:
    """It is the posterior given the token that reads which helps, and not any sharpening.

    TV(truth, posterior) - TV(truth, posterior of the most probable token outside the set).
    Control: the same sets with each posterior given to the next member of its set.
    """
    return case.distance(arm) - case.distance("unread")


@study.claim(within=BFLOAT16_TV, planned=planned(0.005, 0.02), control="none")
def test_own_posterior_is_as_good_as_the_exact_one(case: Case, arm: str = "posterior") -> float:
    """The run's own links are as good as exact ones, within the bfloat16 margin.

    TV(truth, arm) - TV(truth, posterior by exact links), mean over depths from 2 on.
    Control: siblings as they are in the place of the run's own links.
    """
    return case.distance(arm) - case.distance("exact")


@study.claim(less_than=SLOPE, planned=planned(0.05, 0.05), control="planted")
def test_plain_error_does_not_grow_with_depth(case: Case, arm: str = "none") -> float:
    """The distance of siblings as they are to the truth does not grow with each set.

    Slope of TV(truth, none) on depth, per set (least squares), mean over both widths.
    Control: the slope with posterior weighting, and a tenth of the truth lost at each depth.
    """
    return case.slope("posterior") + PLANTED if arm == "planted" else case.slope(arm)


@study.claim(less_than=SLOPE, planned=planned(0.01, 0.03), control="planted")
def test_error_does_not_grow_with_depth(case: Case, arm: str = "posterior") -> float:
    """With posterior weighting, the distance to the truth does not grow with each set.

    Slope of TV(truth, posterior) on depth, per set (least squares), mean over both widths.
    Control: the same with a tenth of the truth lost at each depth.
    """
    return case.slope("posterior") + PLANTED if arm == "planted" else case.slope(arm)


@study.pictures
def pictures(store: Store, cases: Sequence[Case]) -> Iterator[Picture]:
    """The own sets; all arms from depth 2 on; the distance by depth for each width."""
    yield lattice(store)
    far = "total variation to the truth"
    arms = ARMS | CONTROLS
    found = [case.distances(arms) for case in cases]
    rows: Any = spreads_of(found, arms)
    rows["the exact mixture (perfect reader)"] = (0.0, 0.0, 0.0)
    kept = np.mean([case.kept for case in cases])
    caption = (
        "Total variation to the exact mixture of all paths, mean over depths from 2 on and over "
        f"sets of two and of three; mean and 95 % interval over {len(cases)} prompts. The mixture "
        f"follows {kept:.2%} of the paths' probability."
    )
    yield intervals(rows, far, "How near each way of reading a lattice comes", caption)
    shown = {arm: ARMS[arm] for arm in ("none", "probability", "key", "posterior", "best_parent")}
    for width, depths in DEPTHS.items():
        tops = np.mean([case.top_weight[str(width)] for case in cases], axis=0)
        caption = (
            f"Sets of {width}, read one after another; mean and 95 % interval over {len(cases)} "
            "prompts. The most probable parent of a member has a posterior of "
            f"{', '.join(f'{top:.2f}' for top in tops)} on average, by depth."
        )
        lines = lines_of([case.tv[str(width)] for case in cases], shown, list(depths))
        title = f"Distance to the truth by depth, sets of {width}"
        yield lines_by(lines, "sets read before", far, title, caption)


def test_the_truth_follows_nearly_all_paths(cases: list[Case]) -> None:
    """What the exact mixture leaves out is less than a tenth of the smallest margin."""
    assert min(case.kept for case in cases) > 0.99


def test_the_newest_members_have_read_before(store: Store) -> None:
    """Every judged set of the own prompt is wide, and so is the one before it."""
    steps = store.load_json("generation_log")["runs"][0]["steps"]
    assert all(len(step["tokens"]) == min(DEPTHS) for step in steps[:-1])
