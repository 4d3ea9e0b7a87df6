"""What holds exactly of a lattice of sets: links, weightings by query, paths, pruning and draws.

One function an identity, as in identities.py. Each takes the mixture apart, so the readout is
always `mixture`.

Shapes: w members of a set, w' members of the next one, N slots, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

import tempo
from tempo import LanguageModel, Trace
from tempo.spec import BY_QUERY, WEIGHTINGS
from tests import tempo64
from tests.checks import (
    EVERYTHING,
    LOGITS,
    PROBABILITIES,
    Case,
    attention,
    expect,
    forced,
    lets_in,
    logits,
    near,
    plain,
    same,
    same_runs,
)
from tests.identities import copies_under_count_weigh_like_one
from tests.llama64 import softmax

MIXTURE = {"readout": "mixture", "positions": "shared"}
# Of free runs on the tiny models: sets of one to about eight tokens.
FREE = {"threshold": 0.05, "max_steps": 4}
# A share that no member of these models falls under. One is 1: all but the best fall under it.
NOBODY, EVERYBODY = 1e-30, 1.0
# Log probabilities of paths of float32 predictions, in nats: as logits.
NATS = LOGITS


def one_wide_set_is_replayed_with_the_readers_posterior(
    lm: LanguageModel,
    case: Case,
    visibilities: Sequence[str] = ("isolated", "causal"),
    rolled: int = 0,
) -> None:
    """After one wide set, a reader under `posterior` reads the set weighted by its own posterior.

    Under `visible` given weights also reach the set itself.
    """
    k = case.first_wide
    sets = (*case.sets[: k + 1], case.sets[k + 1][:1])
    for visibility in visibilities:
        common = {**MIXTURE, "visibility": visibility, "replay": sets}
        run = forced(lm, case, weighting="posterior", **common)
        chosen = np.array(run.steps[k].probabilities, np.float64)
        joint = chosen / chosen.sum() * softmax(logits(run, k).astype(np.float64))[:, sets[-1][0]]
        weights = [[1.0] * len(members) for members in sets]
        weights[k] = np.roll(joint / joint.sum(), rolled).tolist()
        other = forced(lm, case, weighting="none", replay_weights=weights, **common)
        near(
            logits(run, k + 1), logits(other, k + 1), LOGITS, f"{visibility}: logits of the reader"
        )


def width_one_is_the_plain_run_in_every_setting(
    lm: LanguageModel, case: Case, capped: int = 1
) -> None:
    """Weightings and pruning change no bit of a run of width one, and it drops nothing."""
    settings = case.settings | MIXTURE | FREE | {"max_width": capped, "capture": EVERYTHING}
    run = tempo.generate(lm, case.prompt, **settings | {"weighting": "none"})
    prunings = ({}, {"prune": 1.0}, {"prune": 1.0, "prune_by": "attention"})
    for i, weighting in enumerate(WEIGHTINGS):
        pruning = prunings[(i + case.pick) % len(prunings)]
        changed = settings | {"weighting": weighting} | pruning
        other = tempo.generate(lm, case.prompt, **changed)
        same_runs(other, run, f"{weighting}, {pruning}")


def copies_under_posterior_weigh_like_one(
    lm: LanguageModel,
    case: Case,
    visibilities: Sequence[str] = ("isolated",),
    weightings: Sequence[str] = BY_QUERY,
) -> None:
    """n ids of one embedding share their posterior, or one has it all: they weigh as the token.

    Under `visible` they also see each other, unweighted.
    """
    for weighting in weightings:
        copies_under_count_weigh_like_one(lm, case, visibilities, weighting, readout="mixture")


def best_parents_make_plain_text(
    lm: LanguageModel,
    case: Case,
    visibility: str = "isolated",
    weighting: str = "best_parent",
) -> None:
    """Each member of any set gives what transformers gives to its path as plain text."""
    run = forced(lm, case, visibility=visibility, weighting=weighting, **MIXTURE)
    parents = [links_of(run, k).argmax(axis=0) for k in range(len(case.sets) - 1)]
    _is_plain_text(lm, case, run, parents)


def links_of_zero_and_one_make_plain_text(
    lm: LanguageModel, case: Case, visibility: str = "isolated", blurred: float = 0.0
) -> None:
    """Where every posterior is 0 or 1, `posterior` is `best_parent` to the bit, and plain text."""
    parents, links = [], []
    for k, (members, of_next) in enumerate(zip(case.sets, case.sets[1:], strict=False)):
        chosen = (np.arange(len(of_next)) + case.pick + k) % len(members)
        parents.append(chosen)
        sure = np.eye(len(members))[:, chosen]
        links.append((1 - blurred) * sure + blurred / len(members))
    common = {**MIXTURE, "visibility": visibility, "replay_links": links}
    run = forced(lm, case, weighting="posterior", **common)
    if not blurred:
        other = forced(lm, case, weighting="best_parent", **common)
        for k in range(len(case.sets)):
            same(logits(other, k), logits(run, k), f"logits of set {k} by best parent")
    _is_plain_text(lm, case, run, parents)


def _is_plain_text(
    lm: LanguageModel, case: Case, run: Trace, parents: Sequence[np.ndarray]
) -> None:
    """Nothing if each member's logits are transformers' along its parents, else a Violation."""
    paths = [[(token,) for token in case.sets[0]]]
    for chosen, members in zip(parents, case.sets[1:], strict=True):
        paths.append([(*paths[-1][chosen[u]], token) for u, token in enumerate(members)])
    for k, of_set in enumerate(paths):
        expected = plain(lm, [[*case.prompt, *path] for path in of_set])
        near(logits(run, k), expected, LOGITS, f"logits of set {k} and of plain text")


def links_are_bayes_rule(lm: LanguageModel, case: Case, turned: int = 0) -> None:
    """Links are shares of paths by the members' own logits; each column sums to one."""
    run = forced(lm, case, readout="mixture")
    predicted = predictions(run)
    for k in range(len(case.sets) - 1):
        found = np.roll(links_of(run, k), turned, axis=0)
        expected = tempo64.came_before(predicted, case.sets[: k + 2], k)
        near(found, expected, PROBABILITIES, f"links of set {k}")
        sums = links_of(run, k).sum(axis=0)
        near(sums, np.ones_like(sums), PROBABILITIES, f"columns of the links of set {k}")
    expect(run.steps[-1].links is None, "the last set has links")


def paths_are_all_paths_by_share(lm: LanguageModel, case: Case, num_left_out: int = 0) -> None:
    """`paths` lists every path once and best first, with its share and its log probability."""
    run = forced(lm, case, readout="mixture")
    for k in range(len(case.sets) - 1):
        links_of(run, k)
    probability = tempo64.all_paths(predictions(run), case.sets)
    found = run.paths(probability.size + 1 - num_left_out)
    expect(
        sorted(tuple(path.members) for path in found) == list(np.ndindex(*probability.shape)),
        f"{len(found)} paths, of which there are {probability.size}",
    )
    shares = [path.share for path in found]
    near(sum(shares), 1.0, PROBABILITIES, "the sum of all shares")
    expect(shares == sorted(shares, reverse=True), "paths do not come best first")
    for path in found:
        of_path = probability[tuple(path.members)]
        near(path.share, of_path / probability.sum(), PROBABILITIES, f"share of {path.members}")
        near(path.log_probability, math.log(of_path), NATS, f"log probability of {path.members}")
        tokens = [members[i] for members, i in zip(case.sets, path.members, strict=True)]
        expect(path.tokens == tokens, f"{path.members} has tokens {path.tokens}")


def a_best_path_is_as_probable_as_plain_text(
    lm: LanguageModel, case: Case, weighting: str = "best_parent", visibility: str = "isolated"
) -> None:
    """The log probability of the best path is transformers' of that text, under `best_parent`.

    So is that of a run of width one, under any weighting.
    """
    # one more set, so that a path is read that leads through the wide set
    sets = (*case.sets, case.sets[0])
    run = forced(lm, case, visibility=visibility, weighting=weighting, replay=sets, **MIXTURE)
    narrow = tuple(members[:1] for members in sets)
    single = forced(lm, case, **MIXTURE, replay=narrow)
    for each, num_paths in ((run, math.prod(run.widths)), (single, 1)):
        (best,) = (path for path in each.paths(num_paths) if path.tokens == each.best_path)
        text, total = list(case.prompt), 0.0
        for token in best.tokens:
            total += math.log(softmax(plain(lm, [text])[0])[token])
            text.append(token)
        near(best.log_probability, total, NATS, f"log probability of {best.tokens}")
        expect(each.best_text == best.text, f"best text {each.best_text!r}, path {best.text!r}")


def links_of(run: Trace, k: int) -> np.ndarray:
    """The links of set k of a run, [w, w']."""
    links, shape = run.steps[k].links, (run.widths[k], run.widths[k + 1])
    assert links is not None
    expect(links.shape == shape, f"links of set {k}: {links.shape}, expected {shape}")
    return links.astype(np.float64)


def predictions(run: Trace) -> list[np.ndarray]:
    """What the last prompt token and then each member predicts, from what was captured."""
    of_members = [softmax(logits(run, k).astype(np.float64)) for k in range(len(run.steps))]
    return [run.steps[0].distribution[None].astype(np.float64), *of_members]


def dropped_slots_get_no_attention(lm: LanguageModel, case: Case, steps_early: int = 0) -> None:
    """A dropped slot's weight is 0.0 from the step on that the trace says, and above 0 before.

    A set keeps at least one member that is seen.
    """
    wide = len(case.prompt) + sum(map(len, case.sets[: case.first_wide]))
    for prune_by in ("posterior", "attention"):
        pruning = {"prune": EVERYBODY, "prune_by": prune_by, "weighting": "none"}
        # one more set, so that members of the wide set are judged by attention in time
        sets = (*case.sets, case.sets[0])
        run = forced(lm, case, readout="mixture", replay=sets, **pruning)
        slots = tempo64.lattice(case.prompt, sets)
        may = tempo64.allowed(slots, case.visibility)
        gone: dict[int, int] = {}
        for k, step in enumerate(run.steps):
            gone |= dict.fromkeys(step.dropped, k - steps_early)
        expect(any(slot >= wide for slot in gone), f"{prune_by}: nothing of a wide set is dropped")
        for k, step in enumerate(run.steps):
            seen = may[step.slots][:, : step.slots[-1] + 1].copy()
            seen[:, [slot for slot, since in gone.items() if since <= k]] = False
            weights = attention(run, k)
            forbidden = weights[..., ~seen]
            same(forbidden, np.zeros_like(forbidden), f"{prune_by}: set {k}, dropped or forbidden")
            expect(
                bool((weights[..., seen] > 0).all()),
                f"{prune_by}: set {k} gives nothing to a slot that was not dropped",
            )
        for k, step in enumerate(run.steps):
            expect(not set(step.slots) <= set(gone), f"{prune_by}: set {k} is dropped as a whole")


def dropped_is_what_falls_below_the_bound(
    lm: LanguageModel, case: Case, bound: float | None = None, judged_at: float | None = None
) -> None:
    """Dropped are members below the bound, by enumerated paths or by captured attention."""
    bound = bound or (0.2, 0.4, 1.0)[case.pick % 3]
    judged_at = judged_at or bound
    sets = (*case.sets, case.sets[0])
    for prune_by in ("posterior", "attention"):
        pruning = {"prune": bound, "prune_by": prune_by}
        run = forced(lm, case, readout="mixture", replay=sets, **pruning)
        gone: set[int] = set()
        for k in range(1, len(sets)):
            judged = _shares_by_path(run, k) if prune_by == "posterior" else _by_attention(run, k)
            expected: list[int] = []
            for j, shares in enumerate(judged):
                slots = run.steps[j].slots
                left = [i for i, slot in enumerate(slots) if slot not in gone]
                best = max(left, key=lambda i: (shares[i], -i))
                expected += [slots[i] for i in left if i != best and shares[i] < judged_at]
            dropped = run.steps[k].dropped
            expect(dropped == expected, f"{prune_by}: step {k} drops {dropped}, not {expected}")
            gone |= set(expected)


def _shares_by_path(run: Trace, k: int) -> list[np.ndarray]:
    """The posterior of each member of the sets before set k, over the members of set k.

    Under `best_parent` only the best path to each member of set k counts.
    """
    predicted, sets = predictions(run), run.sets[: k + 1]
    paths = tempo64.all_paths(predicted, sets)
    weights = paths.sum(axis=tuple(range(k))) / paths.sum()
    before = tempo64.BY_QUERY.get(run.spec.weighting, tempo64.came_before)
    return [before(predicted, sets, j) @ weights for j in range(k)]


def _by_attention(run: Trace, k: int) -> list[np.ndarray]:
    """The share of each member of the sets before set k - 1, of what that set gives to its own."""
    if k < 2:
        return []
    paths = tempo64.all_paths(predictions(run), run.sets[:k])
    weights = paths.sum(axis=tuple(range(k - 1))) / paths.sum()
    given = weights @ attention(run, k - 1).mean(axis=(0, 1)).astype(np.float64)
    of_sets = [given[run.steps[j].slots] for j in range(k - 1)]
    return [shares / shares.sum() for shares in of_sets]


def a_bound_that_nobody_falls_under_changes_no_bit(
    lm: LanguageModel, case: Case, bound: float = NOBODY
) -> None:
    """Pruning with a bound that is too low for anyone is no pruning.

    Under `best_parent` those on no best path are at 0, and fall under any bound.
    """
    settings = case.settings | FREE | {"readout": "mixture", "capture": EVERYTHING}
    if case.weighting == "best_parent":
        settings["weighting"] = "posterior"
    run = tempo.generate(lm, case.prompt, **settings)
    for prune_by in ("posterior", "attention"):
        other = tempo.generate(lm, case.prompt, prune=bound, prune_by=prune_by, **settings)
        same_runs(other, run, f"pruned by {prune_by} below {bound}")


# Rules of which each changes the sets of some run on the tiny models.
RULES: tuple[dict[str, Any], ...] = (
    {"threshold": 0.05, "top_k": 2},
    {"threshold": 0.02, "top_p": 0.25},
    {"threshold": 0.0, "min_p": 0.5},
    {"schedule": (0.3, 0.1, 0.02)},
    {"threshold": 0.0, "top_k": 6, "top_p": 0.8, "min_p": 0.1},
    {"threshold": 0.0, "sample": 4, "top_p": 0.9, "seed": 5, "max_width": 3},
)


def sets_are_what_all_rules_let_in(
    lm: LanguageModel, case: Case, but: dict[str, Any] | None = None
) -> None:
    """A set is what all rules let in of its distribution; a draw takes distinct ones of these.

    but: settings of the runs that the statement does not know of.
    """
    for rules in RULES:
        changed = case.settings | {"max_steps": 3} | rules | (but or {})
        run = tempo.generate(lm, case.prompt, **changed)
        by_rank = {name: rules[name] for name in ("top_k", "top_p", "min_p") if name in rules}
        for k, step in enumerate(run.steps):
            where = f"{rules}, step {k}"
            threshold = rules.get("threshold", 0.0)
            if "schedule" in rules:
                threshold = rules["schedule"][min(k, len(rules["schedule"]) - 1)]
            admitted = lets_in(step.distribution, threshold, **by_rank)
            if "sample" in rules:
                drawn = min(rules["sample"], len(admitted))
                num = min(drawn, rules.get("max_width", drawn))
                kept = [token for token in admitted if token in step.tokens]
                expect(len(step.tokens) == num, f"{where}: {step.tokens}, expected {num} tokens")
                expect(step.tokens == kept, f"{where}: {step.tokens} are not {num} of {admitted}")
            else:
                expect(step.tokens == admitted, f"{where}: {step.tokens}, expected {admitted}")


def a_draw_depends_on_nothing_but_its_seed(
    lm: LanguageModel, case: Case, seeds: Sequence[int] = (0, 0)
) -> None:
    """A run that draws has the same sets again, in a batch, and with everything captured."""
    drawing = {"threshold": 0.0, "sample": 3, "max_steps": 4}
    one, other = (
        tempo.RunSpec(prompt=case.prompt, seed=seed, **case.settings | drawing) for seed in seeds
    )
    (alone,) = tempo.generate_batch(lm, [one])
    company = [other.but(prompt=case.prompt[::-1]), other.but(sample=2), other.but(capture="kv")]
    for each in ([other], [*company, other], [other.but(capture=EVERYTHING)]):
        run = tempo.generate_batch(lm, each)[-1]
        expect(run.sets == alone.sets, f"drew {run.sets}, before {alone.sets}")


def other_seeds_draw_other_sets(
    lm: LanguageModel, case: Case, seeds: Sequence[int] = (0, 1, 2, 3)
) -> None:
    """Of four seeds not all draw the same first set."""
    settings = case.settings | {"threshold": 0.0, "sample": 3, "max_steps": 1}
    drawn = [tempo.generate(lm, case.prompt, seed=seed, **settings).sets[0] for seed in seeds]
    expect(any(tokens != drawn[0] for tokens in drawn), f"all seeds drew {drawn[0]}")
