"""The float64 reference agrees with transformers and keeps the identities it is used to check."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tempo64
from tests.checks import EXACT, near, plain, violated
from tests.exactness import TOKENS, cases
from tests.llama64 import Llama64
from tests.tiny_models import TWINS, exact, llama

pytestmark = pytest.mark.usefixtures("one_thread")

# As a share of the largest logit: what float32 arithmetic in four layers does to an exact result.
# The largest seen is 1.2e-6.
FLOAT32 = 1e-5
EXAMPLES = 20
# Both sides are float64. What is no identity is off by ten orders of magnitude more than what is.
BEYOND_ROUNDING = 1e8
reproducible = {"deadline": None, "derandomize": True, "database": None, "max_examples": EXAMPLES}
MODELS = st.sampled_from([(depth, seed) for depth in (1, 2, 4) for seed in (0, 1)])


def causal(model, tokens, first_position=0):
    """A forward pass over ordinary text."""
    size = len(tokens)
    return model(tokens, range(first_position, first_position + size), np.tri(size, dtype=bool))


@given(st.lists(TOKENS, min_size=1, max_size=12), MODELS)
@settings(**reproducible)
def test_plain_text_is_transformers(tokens, model):
    lm = llama(*model)
    expected = plain(lm, [tokens])[0]
    bound = FLOAT32 * np.abs(expected).max()
    near(causal(exact(lm), tokens).logits[-1], expected, bound, "logits of plain text")
    other = causal(exact(lm), [*tokens[:-1], TWINS[0]]).logits[-1]
    with violated(by=100):
        near(other, expected, bound, "another token")


def test_plain_text_of_the_tiny_model_is_transformers(tiny):
    tokens = tiny.encode("The cat sat on the mat")
    expected = plain(tiny, [tokens])[0]
    found = causal(Llama64(tiny.model), tokens).logits[-1]
    near(found, expected, FLOAT32 * np.abs(expected).max(), "logits of plain text")


@given(cases(), MODELS)
@settings(**reproducible)
def test_isolated_siblings_are_branches_and_visible_ones_are_not(case, model):
    model, k = exact(llama(*model)), case.first_wide
    path = [*case.prompt, *(members[0] for members in case.sets[:k])]
    branches = np.stack([causal(model, [*path, token]).logits[-1] for token in case.sets[k]])
    for visibility in ("isolated", "visible"):
        run = tempo64.replay(model, case.prompt, case.sets[: k + 1], visibility=visibility)
        found = run.out.logits[run.slots.slots(k, len(case.prompt))]
        if visibility == "isolated":
            near(found, branches, EXACT, "siblings and branches")
        else:
            with violated(by=BEYOND_ROUNDING):
                near(found, branches, EXACT, "siblings and branches")


@given(cases(), MODELS)
@settings(**reproducible)
def test_the_order_of_siblings_matters_only_under_a_causal_mask(case, model):
    model, turned = exact(llama(*model)), [members[::-1] for members in case.sets]
    for visibility in ("isolated", "visible", "causal"):
        common = {"visibility": visibility, "weighting": "count"}
        one = tempo64.replay(model, case.prompt, case.sets, **common)
        other = tempo64.replay(model, case.prompt, turned, **common)
        members = one.slots.slots(case.first_wide, len(case.prompt))
        found, expected = other.out.logits[members[::-1]], one.out.logits[members]
        if visibility == "causal":
            with violated(by=BEYOND_ROUNDING):
                near(found, expected, EXACT, "members under a causal mask")
        else:
            near(found, expected, EXACT, f"{visibility} members")
            found, expected = other.distributions[-1], one.distributions[-1]
            near(found, expected, EXACT, f"{visibility}: last distribution")


def copies(model, case, visibility, log_k, own_set):
    """Logits after copies of one token, and after one token with a bias on its key.

    Copies or token stand in the first wide set. The logits are of that set and of the next one.
    """
    k, width = case.first_wide, len(case.sets[case.first_wide])
    outs = []
    for count in (width, 1):
        slots = tempo64.lattice(case.prompt, (*case.sets[:k], TWINS[:count], *case.sets[k + 1 :]))
        key = slots.slots(k, len(case.prompt))[0]
        bias = np.zeros((len(slots.tokens),) * 2)
        if count == 1:
            bias[key + (not own_set) :, key] = log_k(width)
        out = model(slots.tokens, slots.positions, tempo64.allowed(slots, visibility), bias)
        later = slots.slots(k + 1, len(case.prompt))
        outs.append(out.logits[[key, *later]])
    return outs


@given(cases(), MODELS)
@settings(**reproducible)
def test_k_copies_are_one_with_log_k_for_later_queries_and_for_a_visible_set_itself(case, model):
    model = exact(llama(*model))
    for visibility in ("isolated", "visible"):
        right = visibility == "visible"
        pair = copies(model, case, visibility, np.log, own_set=right)
        near(*pair, EXACT, f"{visibility}: copies")
        wrong_scope = copies(model, case, visibility, np.log, own_set=not right)
        with violated(by=BEYOND_ROUNDING):
            near(*wrong_scope, EXACT, f"{visibility}: bias in the wrong scope")
        unbiased = copies(model, case, visibility, lambda width: 0.0, own_set=right)
        with violated(by=BEYOND_ROUNDING):
            near(*unbiased, EXACT, f"{visibility}: no bias")


@given(st.lists(TOKENS, min_size=2, max_size=8), MODELS)
@settings(**reproducible)
def test_doubling_every_key_changes_nothing_if_twins_see_each_other(tokens, model):
    model = exact(llama(*model))
    slots = tempo64.lattice((), [(token, token) for token in tokens])
    expected = causal(model, tokens).logits.repeat(2, axis=0)
    doubled = model(slots.tokens, slots.positions, tempo64.allowed(slots, "visible")).logits
    near(doubled, expected, EXACT, "every key twice")
    if len(set(tokens)) > 1:  # one token alone has only one value to attend to
        isolated = model(slots.tokens, slots.positions, tempo64.allowed(slots, "isolated")).logits
        with violated(by=BEYOND_ROUNDING):
            near(isolated, expected, EXACT, "every key twice, but the own one once")


@given(cases(), MODELS, st.integers(1, 5000))
@settings(**reproducible)
def test_only_differences_of_positions_matter(case, model, shift):
    model, slots = exact(llama(*model)), tempo64.lattice(case.prompt, case.sets)
    mask, positions = tempo64.allowed(slots, case.visibility), np.array(slots.positions)
    still = model(slots.tokens, positions, mask).logits
    moved = model(slots.tokens, positions + shift, mask).logits
    # the rounding of an angle grows with its size, which may be some thousand radians
    near(moved, still, EXACT * (1 + shift / 100), "all positions moved")
    positions[slots.slots(case.first_wide, len(case.prompt))[0]] += 1
    one_moved = model(slots.tokens, positions, mask).logits
    with violated(by=BEYOND_ROUNDING):
        near(one_moved, still, EXACT, "one sibling moved")


@given(cases(), MODELS)
@settings(**reproducible)
def test_appending_never_changes_what_was_there(case, model):
    model = exact(llama(*model))
    names = ("visibility", "weighting", "readout")
    common = {name: case.settings[name] for name in names}
    long = tempo64.replay(model, case.prompt, case.sets, **common)
    short = tempo64.replay(model, case.prompt, case.sets[:-1], **common)
    size = len(short.slots.tokens)
    near(long.out.logits[:size], short.out.logits, EXACT, "logits of earlier slots")
    near(long.out.values[:, :, :size], short.out.values, EXACT, "values of earlier slots")


@pytest.mark.parametrize(
    ("visibility", "window", "rows"),
    [
        ("isolated", None, ["1000", "1100", "1110", "1101"]),
        ("visible", None, ["1000", "1100", "1111", "1111"]),
        ("causal", None, ["1000", "1100", "1110", "1111"]),
        ("visible", 2, ["1000", "1100", "0111", "0111"]),
    ],
)
def test_the_mask_is_the_one_by_hand(visibility, window, rows):
    slots = tempo64.lattice((5, 6), ((7, 8),))
    assert slots == ([5, 6, 7, 8], [0, 1, 2, 2], [0, 1, 2, 2])
    by_hand = np.array([list(row) for row in rows]) == "1"
    assert np.array_equal(tempo64.allowed(slots, visibility, window), by_hand)
    assert tempo64.lattice((5, 6), ((7, 8),), "sequential").positions == [0, 1, 2, 3]
