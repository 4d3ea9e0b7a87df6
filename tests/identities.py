"""What holds exactly in TEMPO decoding: one function an identity, which raises Violation where it does not hold.

Keyword arguments undo a precondition, so that the same function shows that the identity fails outside of it. "To rounding"
means the bounds of checks.py, "to the bit" equality of every float.

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
    same,
)
from tests.llama64 import softmax
from tests.tiny_models import TWINS, VOCAB, exact

GREEDY_STEPS = 6
SHIFT = 97  # positions; more than any run here has, far from any period of the rotary table
# Divergences of float32 distributions may break an inequality that is an equality in theory by this much.
SLACK = 1e-5


def width_one_is_greedy_decoding(lm: LanguageModel, case: Case, capped: int = 1) -> None:
    """A cap of one, or a threshold nothing else reaches: transformers' own greedy tokens, and its distributions."""
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
    """Each member of any set, to rounding, as if it alone had been appended to the same cache."""
    common = {"visibility": visibility, "positions": "shared"}
    together = forced(lm, case, **common)
    for k, members in enumerate(case.sets):
        alone = forced_each(
            lm, case, [{**common, "replay": (*case.sets[:k], (token,))} for token in members]
        )
        for i, run in enumerate(alone):
            near(
                logits(together, k)[i],
                logits(run, k)[0],
                LOGITS,
                f"logits of member {i} of set {k}",
            )


def isolated_siblings_of_the_first_wide_set_are_branches(
    lm: LanguageModel, case: Case, visibility: str = "isolated", sets_later: int = 0
) -> None:
    """Members of the first wide set, to rounding, as transformers continues prompt + [t_i]; later sets are a lattice."""
    k = case.first_wide + sets_later
    path = [*case.prompt, *(members[0] for members in case.sets[:k])]
    run = forced(lm, case, visibility=visibility, positions="shared")
    near(
        logits(run, k),
        plain(lm, [[*path, token] for token in case.sets[k]]),
        LOGITS,
        f"siblings of set {k} and branches",
    )


def changing_a_sibling_leaves_the_others_bit_identical(
    lm: LanguageModel, case: Case, visibilities: Sequence[str] = ("isolated", "causal")
) -> None:
    """No bit of an isolated sibling depends on another; under a causal mask, none depends on a later one."""
    k = case.first_wide
    members = list(case.sets[k])
    other = next(token for token in range(VOCAB - len(TWINS)) if token not in members)
    for visibility in visibilities:
        run = forced(lm, case, visibility=visibility)
        for i in range(len(members)):
            changed = forced(
                lm,
                case,
                visibility=visibility,
                replay=(
                    *case.sets[:k],
                    [*members[:i], other, *members[i + 1 :]],
                    *case.sets[k + 1 :],
                ),
            )
            untouched = (
                range(i) if visibility == "causal" else [j for j in range(len(members)) if j != i]
            )
            same(
                logits(changed, k)[untouched],
                logits(run, k)[untouched],
                f"{visibility}: logits beside member {i}",
            )


def the_order_of_siblings_changes_nothing(
    lm: LanguageModel,
    case: Case,
    visibilities: Sequence[str] = ("isolated", "visible"),
    positions: str = "shared",
    readout: str = "mixture",
) -> None:
    """Each token's own logits, and every later distribution, to rounding; not under a causal mask or own positions."""
    orders = [_another_order(len(members), case.pick) for members in case.sets]
    for visibility in visibilities:
        common = {"visibility": visibility, "positions": positions, "readout": readout}
        run = forced(lm, case, **common)
        reordered = [
            [members[i] for i in order] for members, order in zip(case.sets, orders, strict=True)
        ]
        other = forced(lm, case, replay=reordered, **common)
        for k, order in enumerate(orders):
            near(
                logits(other, k),
                logits(run, k)[order],
                LOGITS,
                f"{visibility}: logits of set {k} reordered",
            )
            near(
                other.steps[k].distribution,
                run.steps[k].distribution,
                PROBABILITIES,
                f"{visibility}: distribution of step {k}",
            )


def _another_order(width: int, pick: int) -> list[int]:
    """One of the permutations of a set that are not the identity."""
    others = list(itertools.permutations(range(width)))[1:]
    return list(others[pick % len(others)]) if others else [0]


def copies_under_count_weigh_like_one(
    lm: LanguageModel,
    case: Case,
    visibilities: Sequence[str] = ("isolated", "visible"),
    weighting: str = "count",
) -> None:
    """A set of n ids of one embedding, each with -log n, does to everything what the one token does."""
    k = case.first_wide
    for visibility in visibilities:
        common = {"visibility": visibility, "positions": "shared", "weighting": weighting}
        copies, single = (
            forced(lm, case, replay=(*case.sets[:k], TWINS[:count], *case.sets[k + 1 :]), **common)
            for count in (len(case.sets[k]), 1)
        )
        for step in range(k, len(case.sets)):
            expected = (
                np.broadcast_to(logits(single, step), logits(copies, step).shape)
                if step == k
                else logits(single, step)
            )
            near(logits(copies, step), expected, LOGITS, f"{visibility}: logits of set {step}")


def copies_equal_one_with_log_k(
    lm: LanguageModel,
    case: Case,
    visibilities: Sequence[str] = ("isolated", "visible"),
    per_copy: float = 1.0,
) -> None:
    """n copies equal one key with +log n: for later queries, and if visible for the set itself. Against float64."""
    k, width = case.first_wide, len(case.sets[case.first_wide])
    before, after = case.sets[:k], case.sets[k + 1 :]
    slots = tempo64.lattice(case.prompt, (*before, TWINS[:1], *after))
    (key,) = slots.slots(k, len(case.prompt))
    for visibility in visibilities:
        run = forced(
            lm,
            case,
            replay=(*before, TWINS[:width], *after),
            visibility=visibility,
            positions="shared",
            weighting="none",
        )
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
    """Dilution: in the first layer, keys of mass A leave a later query (1 - A) times each weight it had without them.

    So siblings share attention by their keys alone, whatever the probabilities they were chosen with.
    """
    k, members = case.first_wide, case.sets[case.first_wide]
    reader, first = case.sets[k + 1][:1], len(case.prompt) + sum(map(len, case.sets[:k]))
    common = {"visibility": "isolated", "positions": "shared", "weighting": "none"}
    of_set = [members, *((token,) for token in members)]
    runs = forced_each(
        lm, case, [common | {"replay": (*case.sets[:k], given, reader)} for given in of_set]
    )
    together, *alone = (
        attention(run, k + 1)[layer, :, 0] for run in runs
    )  # [H, N] each, of the one reader
    for i, narrow in enumerate(alone):
        others = [first + j for j in range(len(members)) if j != i]
        mass = together[:, others].sum(axis=-1, keepdims=True)
        near(
            np.delete(together, others, axis=-1),
            (1 - mass) * narrow,
            WEIGHTS,
            f"weights of layer {layer} with member {i} alone, scaled",
        )


def the_first_layer_caches_the_same_in_all_modes(
    lm: LanguageModel, case: Case, layer: int = 0
) -> None:
    """Keys and values of the first layer depend on token and position alone: equal to the bit."""
    runs = [
        forced(lm, case, visibility=visibility) for visibility in ("isolated", "visible", "causal")
    ]
    for name in ("keys", "values", "raw_keys"):
        for run in runs[1:]:
            same(
                getattr(run, name)[layer],
                getattr(runs[0], name)[layer],
                f"{run.spec.visibility}: {name} of layer {layer}",
            )


def one_layer_shows_siblings_to_each_other_alone(lm: LanguageModel, case: Case) -> None:
    """In a model of one layer a set of width one gives the same in all modes, to the bit, whatever came before it."""
    sets = (*case.sets, case.sets[0][:1])
    runs = [
        forced(lm, case, visibility=v, weighting="none", replay=sets)
        for v in ("isolated", "visible", "causal")
    ]
    for k, members in enumerate(sets):
        if len(members) == 1:
            for run in runs[1:]:
                same(
                    logits(run, k), logits(runs[0], k), f"{run.spec.visibility}: logits of set {k}"
                )


def modes_agree_until_a_wide_set_is_read(
    lm: LanguageModel, case: Case, sets_later: int = 0
) -> None:
    """All distributions up to the one that chose the first wide set are equal to the bit: no sibling existed yet."""
    runs = [
        forced(lm, case, visibility=visibility) for visibility in ("isolated", "visible", "causal")
    ]
    for k in range(case.first_wide + 1 + sets_later):
        for run in runs[1:]:
            same(
                run.steps[k].distribution,
                runs[0].steps[k].distribution,
                f"{run.spec.visibility}: distribution of step {k}",
            )


def forbidden_weights_are_exactly_zero(
    lm: LanguageModel, case: Case, read_as: str | None = None
) -> None:
    """Between siblings that may not see each other 0.0, elsewhere more, and every row sums to one."""
    for visibility in ("isolated", "visible", "causal"):
        run = forced(lm, case, visibility=visibility)
        slots = tempo64.lattice(case.prompt, case.sets)
        may = tempo64.allowed(slots, read_as or visibility)
        for k in range(len(case.sets)):
            rows = may[slots.slots(k, len(case.prompt))][
                :, : attention(run, k).shape[-1]
            ]  # [w, N_k]
            same(
                attention(run, k)[..., ~rows],
                np.zeros((*attention(run, k).shape[:2], (~rows).sum())),
                f"{visibility}: set {k}, forbidden",
            )
            expect(
                bool((attention(run, k)[..., rows] > 0).all()),
                f"{visibility}: set {k} has no weight on a slot it may see",
            )
            near(
                attention(run, k).sum(axis=-1),
                np.ones(attention(run, k).shape[:3]),
                WEIGHTS,
                f"{visibility}: sums of set {k}",
            )


def only_differences_of_positions_matter(lm: LanguageModel, case: Case, moved: str = "all") -> None:
    """The same logits, to rounding, from float64 and from transformers' branches with every position SHIFT further."""
    run, slots = (
        forced(lm, case, weighting="none"),
        tempo64.lattice(case.prompt, case.sets, case.positions),
    )
    shift = np.where(np.array(slots.sets) >= (0 if moved == "all" else len(case.prompt)), SHIFT, 0)
    shifted = exact(lm)(
        slots.tokens, slots.positions + shift, tempo64.allowed(slots, case.visibility)
    )
    for k in range(len(case.sets)):
        near(
            logits(run, k),
            shifted.logits[slots.slots(k, len(case.prompt))],
            LOGITS,
            f"logits of set {k}, {moved} moved",
        )
    path = [*case.prompt, *(members[0] for members in case.sets[: case.first_wide])]
    branches = plain(
        lm, [[*path, token] for token in case.sets[case.first_wide]], first_position=SHIFT
    )
    first = forced(lm, case, visibility="isolated", positions="shared")
    near(
        logits(first, case.first_wide),
        branches,
        LOGITS,
        "siblings and branches of transformers, moved",
    )


def a_mixture_is_the_truncated_marginal(
    lm: LanguageModel,
    case: Case,
    visibility: str = "isolated",
    readout: str = "mixture",
    sets_later: int = 0,
) -> None:
    """After the first wide set: sum_i w_i p(. given c, t_i), within 1 - sum_i p(t_i) of the whole marginal; not after later ones."""
    k = case.first_wide + sets_later
    run = forced(
        lm,
        case,
        visibility=visibility,
        readout=readout,
        positions="shared",
        replay=(*case.sets, case.sets[0]),
    )
    path = [*case.prompt, *(members[0] for members in case.sets[:k])]
    chosen_from = softmax(plain(lm, [path])[0])
    branches = softmax(plain(lm, [[*path, token] for token in range(VOCAB)]))
    members = list(case.sets[k])
    mass = chosen_from[members].sum()
    found = run.steps[k + 1].distribution
    near(
        found,
        chosen_from[members] / mass @ branches[members],
        PROBABILITIES,
        "the distribution after the first wide set",
    )
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
        mixture, weights = (
            run.steps[k + 1].distribution,
            np.array(step.probabilities) / sum(step.probabilities),
        )
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
    """Every p >= threshold by falling p (the argmax if none), at most 1 / threshold, and more for a lower threshold."""
    larger: set[int] = set()
    for threshold in thresholds:
        run = tempo.generate(lm, case.prompt, threshold=threshold, max_steps=3, **case.settings)
        for k, step in enumerate(run.steps):
            order = np.argsort(-step.distribution, kind="stable")
            reach = [int(token) for token in order if step.distribution[token] >= threshold] or [
                int(order[0])
            ]
            expect(
                step.tokens == reach,
                f"threshold {threshold}, step {k}: {step.tokens}, expected {reach}",
            )
            expect(
                len(reach) <= 1 / threshold + SLACK,
                f"threshold {threshold}, step {k}: {len(reach)} tokens",
            )
        expect(
            larger <= set(run.steps[0].tokens),
            f"threshold {threshold} loses tokens that a higher one lets in",
        )
        larger = set(run.steps[0].tokens)


def the_cache_holds_the_prompt_and_every_sibling(lm: LanguageModel, case: Case) -> None:
    """P + sum of widths slots, each token once, in order."""
    run, slots = forced(lm, case), tempo64.lattice(case.prompt, case.sets)
    assert run.keys is not None
    expect(
        run.keys.shape[2] == len(slots.tokens),
        f"{run.keys.shape[2]} slots in the cache, P + sum of widths is {len(slots.tokens)}",
    )
    same(run.slot_token, slots.tokens, "the token of each slot")
    same(
        run.slot_step,
        np.maximum(np.array(slots.sets) - len(case.prompt), -1),
        "the step of each slot",
    )


def cached_keys_stand_at_their_positions(
    lm: LanguageModel, case: Case, positions: str | None = None, read_as: str | None = None
) -> None:
    """The position recovered from each cached key, with a rotary table made here, is P + k for every member of set k."""
    positions = positions or case.positions
    run = forced(lm, case, positions=positions)
    expected = np.array(tempo64.lattice(case.prompt, case.sets, read_as or positions).positions)
    assert run.keys is not None and run.raw_keys is not None
    found = recover_positions(
        run.keys, run.raw_keys, [exact(lm).frequencies] * lm.num_layers, int(expected.max()) + 3
    )
    same(found.position, expected, "positions recovered from the cache")
    same(run.slot_position, expected, "positions the trace reports")
    near(
        found.residual,
        np.zeros(len(expected)),
        STATES,
        "what recovered positions leave unexplained of the keys",
    )
    expect(bool((found.runner_up > 10 * STATES).all()), "another position fits the keys as well")
