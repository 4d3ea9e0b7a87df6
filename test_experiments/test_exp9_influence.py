"""exp9: influence, not attention: what does leaving one sibling out, or replacing it, change?

It may change the other siblings (isolated: exactly nothing) and the next step. An exact reader
weighs a sibling with its posterior: the probability that it was the token written, given the token
that follows. Leaving it out moves the next distribution by about that weight times how far its own
prediction is from the rest. Influence is total variation, which is proportional to such a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from fixtures import rows
from fixtures.floors import rounding, same_row
from fixtures.margins import BFLOAT16_KL, BFLOAT16_TV
from fixtures.raw import grouped_means, keep_log, keep_table, lattice
from fixtures.scenes import READER, Scene, draw, first_scene
from fixtures.truth import Branches, forced, read_spec
from tempo import LanguageModel, Trace
from tempo.harness import (
    Margin,
    Planned,
    Prompt,
    RunRequest,
    Space,
    Steps,
    Store,
    Study,
    average,
    run,
)
from tempo.harness.study import ClaimTest, Statistic
from tempo.metrics import kl_divergence, total_variation
from tempo.reporting.figures import Picture, bars, lines_by

# A slope or a rank correlation over two members says nothing about proportion.
MIN_MEMBERS = 3
# Weights and influences below this count as this much. Leaving out a member of posterior weight p
# moves an exact reader by at most p, and what bfloat16's rounding changes makes no order or slope.
FLOOR = float(BFLOAT16_TV)
# Of log posterior weights over members: over less, a slope divides noise by nearly nothing.
MIN_LOG_SPREAD = 0.5
SLOPE_MARGIN = Margin(0.25, "a quarter of the way from uniform (0) to proportional influence (1)")
TAU_MARGIN = Margin(0.2, "six pairs in ten in the same order, which is hardly better than a coin")
BETTER_ORDER = Margin(0.1, "one pair in twenty more in the right order")
NO_DATA = "no earlier data; the spread that three to five members give if half of it is noise"
slopes, taus = (partial(Planned, sd=sd, source=NO_DATA) for sd in (0.6, 0.5))

study = Study(
    "exp9", title="Influence, not attention", registered="2026-11-24", space=Space(widest=32)
)


@dataclass(frozen=True)
class Case:
    """What one prompt gives that has a wide set and a reader of it."""

    same: float  # the largest difference of a logit of one row computed twice
    shift: int  # moves weights round among the members, for controls
    others: dict[str, dict[str, float]]  # by mode: `_change` of the members that were not replaced
    floor_tv: float  # the whole set twice, in different batches
    members: dict[str, list[float]]  # influences and weights by name, of each member [w]

    def weights(self, name: str, shifted: bool = False) -> np.ndarray:
        """What `name` weighs each member with [w]; `shifted`: moved round among them."""
        found = np.maximum(self.members[name], FLOOR if name == "posterior" else 0.0)
        return np.roll(found, self.shift) if shifted else found

    def slope(self, name: str, shifted: bool = False) -> float | None:
        """Of log influence on log posterior weight, if enough members spread enough."""
        logs = np.log(self.weights("posterior", shifted))
        if len(logs) < MIN_MEMBERS or logs.std() < MIN_LOG_SPREAD:
            return None
        return float(np.polyfit(logs, np.log(np.maximum(self.members[name], FLOOR)), 1)[0])

    def tau(self, name: str, shifted: bool = False) -> float | None:
        """Kendall's tau of influence with these weights, if enough members have an order."""
        if name not in self.members or len(self.members[name]) < MIN_MEMBERS:
            return None
        found: Any = kendalltau(self.members["influence"], self.weights(name, shifted))
        return float(found.statistic) if np.isfinite(found.statistic) else None


@study.measure
def leave_one_out(prompt: Prompt) -> Steps[Case | None]:
    """The first wide set and a reader: whole, with one member replaced, without each in turn."""
    free: Trace = yield run(prompt)
    scene = first_scene(free, prompt)
    if prompt.store:
        keep_log(prompt.store, free)
    if scene is None:
        return None
    lm, rng, members = prompt.lm, prompt.rng(), scene.members
    place = int(rng.integers(scene.width))
    rest = free.steps[len(scene.prefix) - len(free.prompt_tokens)].distribution.astype(np.float64)
    rest[list(members)] = 0.0
    # drawn from what the set was chosen from: as good a text as rare members are
    replaced = [*members[:place], draw(rng, rest), *members[place + 1 :]]
    shift = int(rng.integers(1, scene.width))
    capture = ("attention", "logits", *(() if lm.reason_against_kv else ("kv",)))
    # one of each name on every prompt, so that a difference of one bit is no rounding
    full, isolated, visible, other_visible = yield [
        run(scene.force(tokens, visibility=mode, capture=capture), batch=f"exp9.{name}")
        for mode in ("isolated", "visible")
        for name, tokens in (("full", members), ("replaced", replaced))
    ]
    others = [i for i in range(scene.width) if i != place]
    changes = {
        "isolated": _change(full, isolated, others),
        "visible": _change(visible, other_visible, others),
    }
    del isolated, visible, other_visible  # they hold rows of the whole vocabulary
    branches = Branches(scene.prefix, (members,), scene.continuation)
    alone = yield branches.runs()
    smaller = [(*members[:i], *members[i + 1 :]) for i in range(scene.width)]
    again, *without = yield [_reading(scene, tokens) for tokens in (members, *smaller)]
    weights = [scene.width / len(others)] * len(others)  # the rest weighs what the whole set did
    same_mass = yield [_reading(scene, tokens, weights) for tokens in smaller]
    reader = rows.predictions(full, 1)[0]
    next_without = [trace.steps[2].distribution for trace in without]
    next_same_mass = [trace.steps[2].distribution for trace in same_mass]
    prior = np.array([trace.steps[0].probabilities[0] for trace in alone])
    values = rows.reader_on_values(full)
    of_members = {
        "influence": [total_variation(reader, other) for other in next_without],
        "influence_kl": [kl_divergence(reader, other) for other in next_without],
        "influence_same_mass": [total_variation(reader, other) for other in next_same_mass],
        "influence_exact": _exact_influence(branches, alone),
        "posterior": np.exp(branches.log_posterior(alone, READER)),
        "prior": prior / prior.sum(),
        "attention": rows.reader_on_set(full).mean(axis=(0, 1)),
    }
    if values is not None:
        of_members["attention_value_norm"] = values.mean(axis=(0, 1))
    floor_tv = total_variation(reader, again.steps[2].distribution)
    if store := prompt.store:
        attention = rows.attention_of(full, 1)[:, :, 0]
        arrays = {"without": np.stack(next_without), "reader_attention": attention}
        store.arrays("influence", full=reader.astype(np.float32), **arrays)
        columns = {"texts": full.steps[0].texts, **of_members}
        store.json("influence", {"reader": lm.token_text(scene.reader), "members": columns})
        lines = zip(*columns.values(), strict=True)
        table = [dict(zip(columns, line, strict=True)) for line in lines]
        keep_table(store, f"{lm.decode(scene.prefix)!r} + {full.text}", table, list(columns))
    same = same_row(lm, "logit")
    return Case(same=same, shift=shift, others=changes, floor_tv=floor_tv, members=of_members)


def _change(one: Trace, other: Trace, members: Sequence[int]) -> dict[str, float]:
    """What differs in these members' outputs: the largest of any logit, and mean KL in nats."""
    logits = rows.logits_of(one, 0)[members] - rows.logits_of(other, 0)[members]
    before, after = (rows.predictions(trace, 0)[members] for trace in (one, other))
    kl = np.mean([kl_divergence(p, q) for p, q in zip(before, after, strict=True)])
    return {"logit": float(np.abs(logits).max()), "kl": float(kl)}


def _reading(scene: Scene, tokens: Sequence[int], weights: Sequence[float] = ()) -> RunRequest:
    """A run that reads these tokens in the set's place, with weights if any, then the reader."""
    spec = read_spec(scene.prefix, [tokens], scene.continuation)
    return forced(spec.but(replay_weights=[weights, [1.0], [1.0]]) if weights else spec)


def _exact_influence(branches: Branches, alone: Sequence[Trace]) -> list[float]:
    """Total variation between the exact mixture of all branches and that without each of them."""
    members, whole, found = branches.sets[0], branches.truth(alone, READER), []
    for i in range(len(members)):
        rest = replace(branches, sets=((*members[:i], *members[i + 1 :]),))
        found.append(total_variation(whole, rest.truth([*alone[:i], *alone[i + 1 :]], READER)))
    return found


@study.claim(always=True, control="visible")
def test_isolated_siblings_do_not_influence(case: Case, mode: str = "isolated") -> bool:
    """Replacing an isolated sibling leaves what the others give unchanged to the last bit.

    The largest difference of any logit of any other member is exactly 0; on a mixture of experts,
    whose rows share matrix products, at most ten times the rounding floor.
    Control: the same replacement in visible mode.
    """
    return case.others[mode]["logit"] <= case.same


FIFTH = Planned(0.05, 0.1, "a fifth of what siblings changed in a pilot, spread twice as much")
TRIPLE = Planned(0.06, 0.1, "three times the margin, with a spread as large as such a distance has")


@study.claim(more_than=BFLOAT16_KL, planned=FIFTH, control="isolated")
def test_visible_siblings_influence(case: Case, mode: str = "visible") -> float:
    """Replacing a visible sibling changes what the others predict.

    KL in nats of the other members' own outputs before and after one was replaced, mean over them.
    Control: the same replacement in isolated mode.
    """
    return case.others[mode]["kl"]


@study.claim(more_than=BFLOAT16_TV, planned=TRIPLE)
def test_least_probable_matters(case: Case) -> float:
    """Even the least probable sibling matters to the next step.

    Total variation of what the reader predicts with and without the set's least probable member.
    """
    return case.members["influence"][-1]


@test_least_probable_matters.control
def whole_set_twice(case: Case) -> float:
    """the whole set twice, in different batches"""
    return case.floor_tv


SLOPE = (
    f"slope of log influence on log posterior weight over the members, at least {MIN_MEMBERS}; "
    "influence is the total variation of what the reader predicts with and without the member; "
    f"both count as {FLOOR} where they are less"
)
KEPT = "the members that stay weigh n / (n - 1) each, so that the set does not get lighter"
TAU = "Kendall's tau between the members' influence on the next step and their"


def over_members(statistic: str, planned: Planned, **claim: Any) -> Callable[[Any], ClaimTest]:
    """A claim whose control is the same statistic with the members' weights moved round."""

    def decorate(function: Statistic) -> ClaimTest:
        register = study.claim(statistic=statistic, planned=planned, control=True, **claim)
        claimed = register(function)
        claimed.control_statement = "the members' weights moved round by a random number of places"
        return claimed

    return decorate


@over_members(SLOPE, slopes(0.5), more_than=SLOPE_MARGIN, typical=True)
def test_influence_follows_posterior(case: Case, shifted: bool = False) -> float | None:
    """The more probable a sibling is, given what follows, the more it influences the next step."""
    return case.slope("influence", shifted)


@over_members(f"{SLOPE}; minus the exact mixture's", slopes(0.0), within=SLOPE_MARGIN, typical=True)
def test_influence_as_of_exact_reader(case: Case, shifted: bool = False) -> float | None:
    """Influence grows with posterior weight as it does for an exact reader."""
    return rows.minus(case.slope("influence", shifted), case.slope("influence_exact"))


@study.claim(within=SLOPE_MARGIN, planned=slopes(0.0), typical=True, control="influence_exact")
def test_influence_is_uniform(case: Case, name: str = "influence") -> float | None:
    """All siblings influence the next step alike, however probable they are.

    Slope of log influence on log posterior weight over the members.
    Control: the exact mixture of the branches, which weighs them with their posterior.
    """
    return case.slope(name)


@over_members(f"{SLOPE}; {KEPT}", slopes(0.5), more_than=SLOPE_MARGIN, typical=True)
def test_follows_posterior_at_same_mass(case: Case, shifted: bool = False) -> float | None:
    """Influence follows the posterior also if those who stay weigh as much as the whole set did."""
    return case.slope("influence_same_mass", shifted)


@over_members(f"{TAU} attention from the reader, mean over heads", taus(0.4), more_than=TAU_MARGIN)
def test_attention_predicts_influence(case: Case, shifted: bool = False) -> float | None:
    """The siblings that the reader attends to more are those with more influence."""
    return case.tau("attention", shifted)


@over_members(f"{TAU} attention, minus posterior weight's", taus(0.3), more_than=BETTER_ORDER)
def test_attention_tells_more_than_posterior(case: Case, shifted: bool = False) -> float | None:
    """Attention orders the siblings' influence better than their posterior weights do."""
    return rows.minus(case.tau("attention", shifted), case.tau("posterior"))


@over_members(f"{TAU} posterior weight, minus prior weight's", taus(0.3), more_than=BETTER_ORDER)
def test_posterior_tells_more_than_prior(case: Case, shifted: bool = False) -> float | None:
    """What follows matters: posterior weights order influence better than prior ones do."""
    return rows.minus(case.tau("posterior", shifted), case.tau("prior"))


CURVES = {
    "in the model": "influence",
    "in the model, same mass": "influence_same_mass",
    "in the exact mixture": "influence_exact",
}
WEIGHTS = ("posterior", "prior", "attention", "attention_value_norm")
LAST_BIN = 3  # doublings from the members' geometric mean; what lies further out counts here


@study.pictures
def pictures(store: Store, cases: Sequence[Case]) -> Iterator[Picture]:
    """The own prompt's sets, influence against posterior weight, and what orders influence."""
    yield lattice(store)
    enough = [case for case in cases if case.slope("influence") is not None]
    groups = {}
    for label, name in CURVES.items():
        groups[label] = grouped_means(_doublings(case, name) for case in enough)
    if any(groups.values()):
        ends = (-float(LAST_BIN), float(LAST_BIN))
        groups["slope 1: proportional"] = [(x, x, x, x) for x in ends]
        groups["slope 0: uniform"] = [(x, 0.0, 0.0, 0.0) for x in ends]
        caption = (
            "How the influence of siblings grows with their posterior weight, both in doublings "
            f"from their geometric mean over the set. Mean and 95 % interval over {len(enough)} "
            f"prompts; beyond {LAST_BIN} doublings counted at the ends, less than {FLOOR} as "
            f"{FLOOR}. An exact reader lies near slope 1, but for siblings that predict the same; "
            "one that heeds all alike lies at slope 0."
        )
        labels = ("doublings of posterior weight", "doublings of influence")
        yield lines_by(groups, *labels, "Influence against posterior weight", caption)
    orders = {}
    for name in WEIGHTS:
        if found := [tau for case in cases if (tau := case.tau(name)) is not None]:
            orders[name.replace("_", " ")] = average(found)
    if orders:
        caption = (
            "Kendall's tau with the influence of the siblings on the next step, mean over prompts: "
            "1 is the same order, 0 none."
        )
        heights, labels = {"tau": list(orders.values())}, ("weight", "tau with influence")
        yield bars(heights, list(orders), *labels, "What orders influence", caption)


def _doublings(case: Case, name: str) -> list[tuple[float, float]]:
    """Each member's doublings of posterior weight, to a whole number, and those of influence."""
    x, y = (np.log2(np.maximum(case.members[key], FLOOR)) for key in ("posterior", name))
    bins = np.clip(np.rint(x - x.mean()), -LAST_BIN, LAST_BIN)
    return list(zip(bins.tolist(), (y - y.mean()).tolist(), strict=True))


def test_rounding_is_far_below_influence(cases: list[Case], lm: LanguageModel) -> None:
    """The whole set in another batch gives the same next distribution: an influence is real."""
    floor = rounding("tv", lm.provenance()["dtype"])
    assert all(case.floor_tv < floor for case in cases)


def test_weights_of_members_sum_to_one(cases: list[Case]) -> None:
    """Prior and posterior are distributions over the members."""
    for case in cases:
        for name in ("posterior", "prior"):
            assert abs(sum(case.members[name]) - 1) < 1e-9


def test_influence_of_own_prompt_is_on_disk(store: Store, own_case: Case) -> None:
    """Each member left out has a next distribution, as far from the whole set's as is reported."""
    arrays = store.load("influence")
    found = [total_variation(arrays["full"], row) for row in arrays["without"]]
    assert np.allclose(found, own_case.members["influence"], atol=1e-6)
