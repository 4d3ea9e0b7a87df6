"""What holds exactly in TEMPO decoding: one function an identity.

A function raises Violation where its identity does not hold. Its keyword arguments undo a
precondition, to show that the identity fails outside of it. "To rounding" means the bounds of
checks.py, "to the bit" means equality of every float.

Shapes: L layers, H query heads, w set width, N slots, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

import tempo
from tempo import LanguageModel
from tempo.metrics import entropy, kl_divergence, recover_positions, total_variation
from tempo.spec import VISIBILITIES
from tests import tempo64
from tests.checks import (
    LOGITS,
    PROBABILITIES,
    STATES,
    WEIGHTS,
    Case,
    attention,
    expect,
    forced,
    forced_each,
    logits,
    near,
    plain,
    replayed64,
    same,
)
from tests.llama64 import softmax
from tests.tiny_models import TWINS, VOCAB, exact

GREEDY_STEPS = 6
# In positions: more than any run here has, and far from any period of the rotary table.
SHIFT = 97
# An inequality between divergences that holds in theory may miss by this much in float32.
SLACK = 1e-5


def width_one_is_greedy_decoding(lm: LanguageModel, case: Case, capped: int = 1) -> None:
    """Runs of width one choose transformers' greedy tokens from transformers' distributions.

    The width is one through a cap of one, and through a threshold that no second token reaches.
    """
    tokens = torch.tensor([case.prompt])
    greedy = lm.model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=GREEDY_STEPS,
        do_sample=False,
        pad_token_id=0,
    )[0].tolist()
    for setting in ({"max_width": capped, "threshold": 0.01}, {"threshold": 1.0}):
        run = tempo.generate(lm, case.prompt, max_steps=GREEDY_STEPS, **case.settings | setting)
        chosen = [[token] for token in greedy[len(case.prompt) :]]
        expect(
            run.sets == chosen,
            f"{setting}: sets {run.sets}, transformers' greedy decoding gives {chosen}",
        )
        for k, step in enumerate(run.steps):
            expected = softmax(plain(lm, [greedy[: len(case.prompt) + k]])[0])
            near(step.distribution, expected, PROBABILITIES, f"{setting}: distribution of step {k}")


def an_isolated_sibling_is_what_it_would_be_alone(
    lm: LanguageModel, case: Case, visibility: str = "isolated"
) -> None:
    """Each member of any set gives, to rounding, what it would give alone after the same cache."""
    common = {"visibility": visibility, "positions": "shared"}
    together = forced(lm, case, **common)
    for k, members in enumerate(case.sets):
        narrowed = [{**common, "replay": (*case.sets[:k], (token,))} for token in members]
        for i, run in enumerate(forced_each(lm, case, narrowed)):
            found, expected = logits(together, k)[i], logits(run, k)[0]
            near(found, expected, LOGITS, f"logits of member {i} of set {k}")


def isolated_siblings_of_the_first_wide_set_are_branches(
    lm: LanguageModel, case: Case, visibility: str = "isolated", sets_later: int = 0
) -> None:
    """Members of the first wide set give, to rounding, what transformers gives to prompt + [t_i].

    Later sets are a lattice and have no such branches.
    """
    k = case.first_wide + sets_later
    path = [*case.prompt, *(members[0] for members in case.sets[:k])]
    run = forced(lm, case, visibility=visibility, positions="shared")
    branches = plain(lm, [[*path, token] for token in case.sets[k]])
    near(logits(run, k), branches, LOGITS, f"siblings of set {k} and branches")


def changing_a_sibling_leaves_the_others_bit_identical(
    lm: LanguageModel, case: Case, visibilities: Sequence[str] = ("isolated", "causal")
) -> None:
    """No bit of an isolated sibling depends on another; causal ones depend on earlier ones only."""
    k = case.first_wide
    members = list(case.sets[k])
    other = next(token for token in range(VOCAB - len(TWINS)) if token not in members)
    for visibility in visibilities:
        run = forced(lm, case, visibility=visibility)
        for i in range(len(members)):
            exchanged = [*members[:i], other, *members[i + 1 :]]
            replay = (*case.sets[:k], exchanged, *case.sets[k + 1 :])
            changed = forced(lm, case, visibility=visibility, replay=replay)
            untouched = list(range(i))
            if visibility != "causal":
                untouched += range(i + 1, len(members))
            found, expected = logits(changed, k)[untouched], logits(run, k)[untouched]
            same(found, expected, f"{visibility}: logits beside member {i}")


def the_order_of_siblings_changes_nothing(
    lm: LanguageModel,
    case: Case,
    visibilities: Sequence[str] = ("isolated", "visible"),
    positions: str = "shared",
    readout: str = "mixture",
) -> None:
    """Another order changes each token's own logits and every later distribution only by rounding.

    It does matter under a causal mask, and where siblings have positions of their own.
    """
    orders = [_another_order(len(members), case.pick) for members in case.sets]
    reordered = []
    for members, order in zip(case.sets, orders, strict=True):
        reordered.append([members[i] for i in order])
    for visibility in visibilities:
        common = {"visibility": visibility, "positions": positions, "readout": readout}
        run = forced(lm, case, **common)
        other = forced(lm, case, replay=reordered, **common)
        for k, order in enumerate(orders):
            what = f"{visibility}: logits of set {k} reordered"
            near(logits(other, k), logits(run, k)[order], LOGITS, what)
            found, expected = other.steps[k].distribution, run.steps[k].distribution
            near(found, expected, PROBABILITIES, f"{visibility}: distribution of step {k}")


def _another_order(width: int, pick: int) -> list[int]:
    """One of the permutations of a set other than the identity."""
    others = list(itertools.permutations(range(width)))[1:]
    return list(others[pick % len(others)]) if others else [0]


def copies_under_count_weigh_like_one(
    lm: LanguageModel,
    case: Case,
    visibilities: Sequence[str] = ("isolated", "visible"),
    weighting: str = "count",
    readout: str | None = None,
) -> None:
    """n ids of one embedding, each with -log n, have the effect of the one token."""
    k = case.first_wide
    before, after = case.sets[:k], case.sets[k + 1 :]
    for visibility in visibilities:
        common = {"visibility": visibility, "positions": "shared", "weighting": weighting}
        common["readout"] = readout or case.readout
        width = len(case.sets[k])
        copies = forced(lm, case, replay=(*before, TWINS[:width], *after), **common)
        single = forced(lm, case, replay=(*before, TWINS[:1], *after), **common)
        for step in range(k, len(case.sets)):
            expected = logits(single, step)
            if step == k:
                expected = np.broadcast_to(expected, logits(copies, step).shape)
            near(logits(copies, step), expected, LOGITS, f"{visibility}: logits of set {step}")


def copies_equal_one_with_log_k(
    lm: LanguageModel,
    case: Case,
    visibilities: Sequence[str] = ("isolated", "visible"),
    per_copy: float = 1.0,
) -> None:
    """n copies equal one key with +log n for later queries, and if visible for their own set.

    The one key is computed in float64.
    """
    k, width = case.first_wide, len(case.sets[case.first_wide])
    before, after = case.sets[:k], case.sets[k + 1 :]
    slots = tempo64.lattice(case.prompt, (*before, TWINS[:1], *after))
    (key,) = slots.slots(k, len(case.prompt))
    common = {"positions": "shared", "weighting": "none"}
    for visibility in visibilities:
        copies = (*before, TWINS[:width], *after)
        run = forced(lm, case, replay=copies, visibility=visibility, **common)
        bias = np.zeros((len(slots.tokens),) * 2)
        bias[key + (visibility == "isolated") :, key] = per_copy * np.log(width)
        one = exact(lm)(slots.tokens, slots.positions, tempo64.allowed(slots, visibility), bias)
        for step in range(k, len(case.sets)):
            expected = one.logits[slots.slots(step, len(case.prompt))]
            expected = expected.repeat(width, axis=0) if step == k else expected
            near(logits(run, step), expected, LOGITS, f"{visibility}: logits of set {step}")


def added_siblings_scale_all_other_weights_alike(
    lm: LanguageModel, case: Case, layer: int = 0
) -> None:
    """Keys of mass A in the first layer scale a later query's other weights by 1 - A (dilution).

    So siblings share attention by their keys alone. The probabilities they were chosen with do not
    matter.
    """
    k, members = case.first_wide, case.sets[case.first_wide]
    reader, first = case.sets[k + 1][:1], len(case.prompt) + sum(map(len, case.sets[:k]))
    common = {"visibility": "isolated", "positions": "shared", "weighting": "none"}
    of_set = [members, *((token,) for token in members)]
    replays = [common | {"replay": (*case.sets[:k], given, reader)} for given in of_set]
    runs = forced_each(lm, case, replays)
    # of the one reader, [H, N] each
    together, *alone = (attention(run, k + 1)[layer, :, 0] for run in runs)
    for i, narrow in enumerate(alone):
        others = [first + j for j in range(len(members)) if j != i]
        mass = together[:, others].sum(axis=-1, keepdims=True)
        found, expected = np.delete(together, others, axis=-1), (1 - mass) * narrow
        near(found, expected, WEIGHTS, f"weights of layer {layer} with member {i} alone, scaled")


def the_first_layer_caches_the_same_in_all_modes(
    lm: LanguageModel, case: Case, layer: int = 0
) -> None:
    """Keys and values of the first layer are equal to the bit in all modes.

    They depend on token and position alone.
    """
    runs = [forced(lm, case, visibility=visibility) for visibility in VISIBILITIES]
    for name in ("keys", "values", "raw_keys"):
        expected = getattr(runs[0], name)[layer]
        for run in runs[1:]:
            what = f"{run.spec.visibility}: {name} of layer {layer}"
            same(getattr(run, name)[layer], expected, what)


def one_layer_shows_siblings_to_each_other_alone(lm: LanguageModel, case: Case) -> None:
    """In a model of one layer, sets of width one give the same in all modes, to the bit.

    This holds whatever came before them.
    """
    sets = (*case.sets, case.sets[0][:1])
    common = {"weighting": "none", "replay": sets}
    runs = [forced(lm, case, visibility=visibility, **common) for visibility in VISIBILITIES]
    for k, members in enumerate(sets):
        if len(members) == 1:
            for run in runs[1:]:
                what = f"{run.spec.visibility}: logits of set {k}"
                same(logits(run, k), logits(runs[0], k), what)


def modes_agree_until_a_wide_set_is_read(
    lm: LanguageModel, case: Case, sets_later: int = 0
) -> None:
    """All distributions up to the one that chose the first wide set are equal to the bit.

    No sibling existed yet.
    """
    runs = [forced(lm, case, visibility=visibility) for visibility in VISIBILITIES]
    for k in range(case.first_wide + 1 + sets_later):
        expected = runs[0].steps[k].distribution
        for run in runs[1:]:
            what = f"{run.spec.visibility}: distribution of step {k}"
            same(run.steps[k].distribution, expected, what)


def forbidden_weights_are_exactly_zero(
    lm: LanguageModel, case: Case, read_as: str | None = None
) -> None:
    """Weights are 0.0 between siblings that may not see each other, elsewhere above 0.

    Forbidden are also members that are on no best path to the query, under `best_parent`. Every
    row sums to one.
    """
    for visibility in VISIBILITIES:
        run = forced(lm, case, visibility=visibility)
        slots, bias = replayed64(lm, case, visibility=visibility)[::3]
        # a member that came before another one with probability 0 is masked as well
        may = tempo64.allowed(slots, read_as or visibility) & (bias > -np.inf)
        for k in range(len(case.sets)):
            weights = attention(run, k)
            queries = may[slots.slots(k, len(case.prompt))]
            seen = queries[:, : weights.shape[-1]]  # [w, N_k]
            forbidden = weights[..., ~seen]
            same(forbidden, np.zeros_like(forbidden), f"{visibility}: set {k}, forbidden")
            expect(
                bool((weights[..., seen] > 0).all()),
                f"{visibility}: set {k} has no weight on a slot it may see",
            )
            sums = weights.sum(axis=-1)
            near(sums, np.ones(sums.shape), WEIGHTS, f"{visibility}: sums of set {k}")


def only_differences_of_positions_matter(lm: LanguageModel, case: Case, moved: str = "all") -> None:
    """Logits are the same, to rounding, with every position SHIFT further.

    The moved ones are computed in float64, and as branches by transformers.
    """
    run = forced(lm, case, weighting="none")
    slots = tempo64.lattice(case.prompt, case.sets, case.positions)
    first_moved = 0 if moved == "all" else len(case.prompt)
    positions = slots.positions + np.where(np.array(slots.sets) >= first_moved, SHIFT, 0)
    shifted = exact(lm)(slots.tokens, positions, tempo64.allowed(slots, case.visibility))
    for k in range(len(case.sets)):
        expected = shifted.logits[slots.slots(k, len(case.prompt))]
        near(logits(run, k), expected, LOGITS, f"logits of set {k}, {moved} moved")
    wide = case.first_wide
    path = [*case.prompt, *(members[0] for members in case.sets[:wide])]
    branches = plain(lm, [[*path, token] for token in case.sets[wide]], first_position=SHIFT)
    first = forced(lm, case, visibility="isolated", positions="shared")
    near(logits(first, wide), branches, LOGITS, "siblings and branches of transformers, moved")


def a_mixture_is_the_truncated_marginal(
    lm: LanguageModel,
    case: Case,
    visibility: str = "isolated",
    readout: str = "mixture",
    sets_later: int = 0,
) -> None:
    """The distribution after the first wide set is sum_i w_i p(. given c, t_i).

    It is within 1 - sum_i p(t_i) of the whole marginal. Neither holds after later sets.
    """
    k = case.first_wide + sets_later
    common = {"visibility": visibility, "readout": readout, "positions": "shared"}
    run = forced(lm, case, replay=(*case.sets, case.sets[0]), **common)
    path = [*case.prompt, *(members[0] for members in case.sets[:k])]
    chosen_from = softmax(plain(lm, [path])[0])
    branches = softmax(plain(lm, [[*path, token] for token in range(VOCAB)]))
    members = list(case.sets[k])
    mass = chosen_from[members].sum()
    found = run.steps[k + 1].distribution
    mixture = chosen_from[members] / mass @ branches[members]
    near(found, mixture, PROBABILITIES, "the distribution after the first wide set")
    distance = total_variation(found, chosen_from @ branches)
    expect(
        distance <= 1 - mass + SLACK,
        f"total variation to the whole marginal {distance:.4f}, at most {1 - mass:.4f} in theory",
    )


def members_diverge_from_their_mixture_by_no_more_than_their_weight(
    lm: LanguageModel, case: Case, readout: str = "mixture"
) -> None:
    """KL(b_i || m) <= -log w_i, and H(m) - sum_i w_i H(b_i) >= 0."""
    run = forced(lm, case, readout=readout)
    for k, step in enumerate(run.steps[:-1]):
        mixture = run.steps[k + 1].distribution
        weights = np.array(step.probabilities) / sum(step.probabilities)
        members = softmax(logits(run, k).astype(np.float64))
        for i, weight in enumerate(weights):
            found = kl_divergence(members[i], mixture)
            expect(
                found <= -np.log(weight) + SLACK,
                f"member {i} of set {k}: {found:.4f} nats from the mixture, weight {weight:.4f}",
            )
        gain = entropy(mixture) - weights @ [entropy(member) for member in members]
        expect(
            gain >= -SLACK,
            f"the mixture of set {k} has {-gain:.2g} nats less entropy than its members",
        )


def sets_are_what_reaches_the_threshold(
    lm: LanguageModel, case: Case, thresholds: Sequence[float] = (0.3, 0.1, 0.05)
) -> None:
    """A set is every token with p >= threshold by falling p, or the argmax if there is none.

    It has at most 1 / threshold members. A lower threshold keeps all members of a higher one.
    """
    larger: set[int] = set()
    for threshold in thresholds:
        run = tempo.generate(lm, case.prompt, threshold=threshold, max_steps=3, **case.settings)
        for k, step in enumerate(run.steps):
            where = f"threshold {threshold}, step {k}"
            order = np.argsort(-step.distribution, kind="stable").tolist()
            reach = [token for token in order if step.distribution[token] >= threshold]
            reach = reach or order[:1]
            expect(step.tokens == reach, f"{where}: {step.tokens}, expected {reach}")
            expect(len(reach) <= 1 / threshold + SLACK, f"{where}: {len(reach)} tokens")
        expect(
            larger <= set(run.steps[0].tokens),
            f"threshold {threshold} loses tokens that a higher one lets in",
        )
        larger = set(run.steps[0].tokens)


def the_cache_holds_the_prompt_and_every_sibling(lm: LanguageModel, case: Case) -> None:
    """The cache has P + sum of widths slots, with each token once and in order."""
    run, slots = forced(lm, case), tempo64.lattice(case.prompt, case.sets)
    assert run.keys is not None
    found, expected = run.keys.shape[2], len(slots.tokens)
    expect(
        found == expected,
        f"{found} slots in the cache, P + sum of widths is {expected}",
    )
    same(run.slot_token, slots.tokens, "the token of each slot")
    steps = np.maximum(np.array(slots.sets) - len(case.prompt), -1)
    same(run.slot_step, steps, "the step of each slot")


def cached_keys_stand_at_their_positions(
    lm: LanguageModel, case: Case, positions: str | None = None, read_as: str | None = None
) -> None:
    """The position recovered from each cached key is P + k for every member of set k.

    It is recovered with a rotary table made here.
    """
    positions = positions or case.positions
    run = forced(lm, case, positions=positions)
    expected = np.array(tempo64.lattice(case.prompt, case.sets, read_as or positions).positions)
    assert run.keys is not None and run.raw_keys is not None
    tables = [exact(lm).frequencies] * lm.num_layers
    found = recover_positions(run.keys, run.raw_keys, tables, int(expected.max()) + 3)
    same(found.position, expected, "positions recovered from the cache")
    same(run.slot_position, expected, "positions the trace reports")
    what = "what recovered positions leave unexplained of the keys"
    near(found.residual, np.zeros(len(expected)), STATES, what)
    expect(bool((found.runner_up > 10 * STATES).all()), "another position fits the keys as well")
