"""tempo.layout: the blocks an engine asks for at each step, against the whole mask's definition."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tempo.layout import Layout, allowed
from tempo.spec import BY_QUERY, POSITIONS, VISIBILITIES, WEIGHTINGS

# Of these the number that is added depends on the key alone.
BY_KEY = [weighting for weighting in WEIGHTINGS if weighting not in BY_QUERY]
WIDTHS = st.lists(st.integers(1, 5), min_size=1, max_size=6)
PROMPTS = st.integers(1, 6)


def grow(
    num_prompt,
    widths,
    visibility="isolated",
    positions="shared",
    weighting="none",
    probabilities=None,
):
    """A layout after its prompt and after each set: the states an engine sees, one at a time."""
    layout = Layout(visibility, positions, weighting)
    layout.append_prompt(range(100, 100 + num_prompt))
    yield layout
    for step, width in enumerate(widths):
        falling = [0.5 / (i + 1) for i in range(width)]
        of_set = probabilities[step] if probabilities else falling
        layout.append_set([1000 + 10 * step + i for i in range(width)], of_set)
        yield layout


def final(*args, **kwargs):
    """The layout after the last set."""
    return list(grow(*args, **kwargs))[-1]


def by_definition(sets, visibility):
    """The mask of docs/semantics.md, one pair at a time."""
    siblings = {
        "isolated": lambda query, key: False,
        "visible": lambda query, key: True,
        "causal": lambda query, key: key < query,
    }[visibility]
    mask = torch.zeros(len(sets), len(sets), dtype=torch.bool)
    for query, key in itertools.product(range(len(sets)), repeat=2):
        related = sets[key] == sets[query] and siblings(query, key)
        mask[query, key] = sets[key] < sets[query] or key == query or related
    return mask


def incremental(num_prompt, widths, visibility, block=Layout.block):
    """The whole mask made from what each pass sees: everything before, and its block."""
    rows = []
    for layout in grow(num_prompt, widths, visibility):
        new = layout.num_slots - layout.start
        before = torch.ones(new, layout.start, dtype=torch.bool)
        rows.append(torch.cat([before, block(layout)], dim=1))
    size = rows[-1].shape[1]
    return torch.cat([torch.nn.functional.pad(row, (0, size - row.shape[1])) for row in rows])


@given(PROMPTS, WIDTHS)
@settings(max_examples=60, deadline=None)
def test_the_blocks_of_all_passes_make_up_the_whole_mask(num_prompt, widths):
    for visibility in VISIBILITIES:
        layout = final(num_prompt, widths, visibility)
        whole = allowed(layout.slot_set, visibility)
        assert torch.equal(whole, by_definition(layout.slot_set, visibility))
        assert torch.equal(incremental(num_prompt, widths, visibility), whole)


@given(PROMPTS, WIDTHS.filter(lambda widths: max(widths) > 1))
@settings(max_examples=40, deadline=None)
def test_the_visibilities_differ_as_soon_as_a_set_is_wide(num_prompt, widths):
    for seen, expected in itertools.permutations(VISIBILITIES, 2):
        whole = allowed(final(num_prompt, widths, expected).slot_set, expected)
        assert not torch.equal(incremental(num_prompt, widths, seen), whole)


@given(PROMPTS, st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_the_visibilities_are_one_causal_mask_while_every_set_is_of_width_one(
    num_prompt, num_steps
):
    layout = final(num_prompt, [1] * num_steps)
    causal = torch.ones(layout.num_slots, layout.num_slots, dtype=torch.bool).tril()
    for visibility in VISIBILITIES:
        assert torch.equal(allowed(layout.slot_set, visibility), causal)
    wide = allowed(final(num_prompt, [2]).slot_set, "isolated")
    assert not torch.equal(wide, causal[: num_prompt + 2, : num_prompt + 2])


FAULTS = {
    "off by one": lambda block: block.roll(1, 0),
    "transposed": lambda block: block.T,
    "blind to itself": lambda block: block & ~torch.eye(len(block), dtype=torch.bool),
    "one sibling too many": lambda block: block | torch.ones_like(block).triu(1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_sees_a_fault(fault):
    def broken(layout):
        return FAULTS[fault](Layout.block(layout))

    for visibility in ("isolated", "causal"):
        whole = allowed(final(3, [2, 1, 3], visibility).slot_set, visibility)
        assert torch.equal(incremental(3, [2, 1, 3], visibility), whole)
        assert not torch.equal(incremental(3, [2, 1, 3], visibility, broken), whole)


@given(PROMPTS, WIDTHS)
@settings(max_examples=60, deadline=None)
def test_a_set_shares_one_position_or_takes_one_for_each_slot(num_prompt, widths):
    shared, sequential = (final(num_prompt, widths, positions=positions) for positions in POSITIONS)
    assert shared.slot_position == sets_of_slots(num_prompt, widths)
    assert sequential.slot_position == list(range(num_prompt + sum(widths)))
    same = shared.slot_position == sequential.slot_position
    assert same == (widths[:-1] == [1] * (len(widths) - 1) and widths[-1] == 1)


def sets_of_slots(num_prompt, widths):
    """The set of each slot. Every prompt token is a set of its own."""
    found = list(range(num_prompt))
    for step, width in enumerate(widths):
        found += [num_prompt + step] * width
    return found


@given(PROMPTS, WIDTHS)
@settings(max_examples=40, deadline=None)
def test_slots_hold_their_tokens_and_sets_and_never_move(num_prompt, widths):
    before = []
    for step, layout in enumerate(grow(num_prompt, widths, "causal", "sequential", "count")):
        fields = (layout.slot_token, layout.slot_position, layout.slot_set, layout.slot_bias)
        columns = list(zip(*fields, strict=True))
        assert columns[: len(before)] == before
        assert layout.start == len(before)
        assert layout.num_slots == len(columns) == num_prompt + sum(widths[:step])
        assert layout.new_tokens_are_prompt() == (step == 0)
        before = columns
    tokens = list(range(100, 100 + num_prompt))
    for step, width in enumerate(widths):
        tokens += range(1000 + 10 * step, 1000 + 10 * step + width)
    assert layout.slot_token == tokens
    assert layout.slot_set == sets_of_slots(num_prompt, widths)


def bias_by_definition(layout, widths, num_prompt, probabilities):
    """The bias of the last pass by docs/semantics.md, from the widths alone."""
    keys = [0.0] * num_prompt
    for step, width in enumerate(widths):
        own = step == len(widths) - 1
        total = sum(probabilities[step])
        weights = {
            "count": [1 / width] * width,
            "probability": [p / total for p in probabilities[step]],
            "none": [1.0] * width,
        }
        silent = width == 1 or (own and layout.visibility != "visible")
        keys += [0.0 if silent else math.log(w) for w in weights[layout.weighting]]
    return np.array([keys] * widths[-1])


@given(PROMPTS, WIDTHS, st.data())
@settings(max_examples=60, deadline=None)
def test_bias_is_the_logarithm_of_each_share_for_later_queries_and_for_visible_siblings(
    num_prompt, widths, data
):
    probabilities = [
        data.draw(st.lists(st.floats(0.01, 1.0), min_size=w, max_size=w)) for w in widths
    ]
    for visibility, weighting in itertools.product(VISIBILITIES, BY_KEY):
        chosen = {"weighting": weighting, "probabilities": probabilities}
        layout = final(num_prompt, widths, visibility, **chosen)
        bias = layout.bias()
        assert bias.dtype == torch.float64
        expected = bias_by_definition(layout, widths, num_prompt, probabilities)
        assert np.allclose(bias.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_bias_has_the_values_of_a_set_by_hand():
    widths, first = [3, 1, 2], [0.5, 0.3, 0.1]
    probabilities = [first, [0.9], [0.2, 0.2]]
    layout = final(2, widths, "isolated", weighting="count", probabilities=probabilities)
    third = -math.log(3)
    expected = [[0, 0, third, third, third, 0, 0, 0]] * 2
    assert np.allclose(layout.bias().numpy(), expected)
    assert not np.allclose(layout.bias().numpy(), 0)
    probabilities = [first, [0.9], [0.3, 0.1]]
    layout = final(2, widths, "visible", weighting="probability", probabilities=probabilities)
    shares = np.array([1, 1, 5 / 9, 3 / 9, 1 / 9, 1, 3 / 4, 1 / 4])
    assert np.allclose(layout.bias().numpy(), [np.log(shares)] * 2)
    layout = final(2, widths, "visible", weighting="none")
    assert (layout.bias() == 0).all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_prompt_and_sets_of_one_carry_no_bias(weighting):
    for layout in grow(3, [1, 1], "visible", weighting=weighting, probabilities=[[0.3], [0.0]]):
        assert (layout.bias() == 0).all()
    wide = final(3, [2], "visible", weighting=weighting)
    assert (wide.bias() == 0).all() == (weighting not in ("count", "probability"))


@given(PROMPTS, WIDTHS, st.data())
@settings(max_examples=40, deadline=None)
def test_weights_by_query_are_added_to_earlier_sets_and_nowhere_else(num_prompt, widths, data):
    visibility, weighting = (
        data.draw(st.sampled_from(VISIBILITIES)),
        data.draw(st.sampled_from(BY_QUERY)),
    )
    layout = final(num_prompt, widths, visibility, weighting=weighting)
    shape = (1 + sum(widths[:-1]), widths[-1])  # from the last prompt token on
    shares = data.draw(hnp.arrays(np.float64, shape, elements=st.floats(0.0, 1.0)))
    layout.ancestors = torch.tensor(shares)
    bias = layout.bias()
    assert bias.dtype == torch.float64
    expected = np.zeros((widths[-1], layout.num_slots))
    for query, slot in itertools.product(range(widths[-1]), range(shape[0])):
        share = shares[slot, query]
        expected[query, num_prompt - 1 + slot] = math.log(share) if share > 0 else -math.inf
    assert np.allclose(bias.numpy(), expected, rtol=1e-12, atol=0.0)
    # in the layers that isolate siblings it is the same, since nothing is added within a set
    assert torch.equal(layout.bias("isolated"), bias)
    assert layout.slot_bias == [0.0] * layout.num_slots


def test_a_set_weighs_like_one_token():
    probabilities = [[0.4, 0.1, 0.1, 0.05]]
    for weighting in ("count", "probability"):
        layout = final(2, [4], "visible", weighting=weighting, probabilities=probabilities)
        assert abs(np.exp(layout.slot_bias[2:]).sum() - 1) < 1e-12
    layout = final(2, [4], "visible", weighting="none")
    assert np.exp(layout.slot_bias[2:]).sum() == 4


def test_bias_of_a_member_that_underflows_is_finite():
    layout = final(2, [2, 1], weighting="probability", probabilities=[[0.5, 0.0], [1.0]])
    assert torch.isfinite(layout.bias()).all()
    assert layout.bias()[0, 3] < -80
    assert layout.bias()[0, 2] == 0


@pytest.mark.parametrize("visibility", VISIBILITIES)
def test_the_own_set_is_biased_only_where_all_siblings_see_each_other(visibility):
    layouts = [layout.bias() for layout in grow(2, [3], visibility, weighting="count")]
    own = layouts[-1][:, 2:]
    assert (own != 0).all() == (visibility == "visible")
    assert (own == 0).all() == (visibility != "visible")
    later = final(2, [3, 1], visibility, weighting="count").bias()[:, 2:5]
    assert (later != 0).all()


def test_asking_for_the_bias_does_not_change_the_slots():
    layout = final(2, [3], "isolated", weighting="count")
    before = list(layout.slot_bias)
    assert (layout.bias() == 0).all()
    assert layout.slot_bias == before == [0.0] * 2 + [-math.log(3)] * 3
    layout.append_set([7], [1.0])
    assert (layout.bias() != 0).any()


@pytest.mark.parametrize("visibility", ["Isolated", "none", ""])
def test_the_whole_mask_knows_three_visibilities(visibility):
    with pytest.raises(KeyError):
        allowed([0, 1, 1], visibility)
    assert allowed([0, 1, 1], "visible").tolist() == [
        [True, False, False],
        [True, True, True],
        [True, True, True],
    ]
