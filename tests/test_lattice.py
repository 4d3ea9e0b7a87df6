"""tempo.lattice and tempo.paths: Bayes along sets, and paths, against enumerating all paths."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo.lattice import IMPOSSIBLE, Lattice, best_parents, dropped, link
from tempo.paths import best_members, most_probable
from tests import tempo64
from tests.llama64 import softmax

VOCAB = 5
# float64 products along up to four sets: a hundred times the largest difference seen.
ROUNDING = 1e-12


@st.composite
def lattices(draw):
    """Sets of a few tokens, and random logits of the last prompt token and of every member."""
    widths = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sets = [rng.choice(VOCAB, size=width, replace=False).tolist() for width in widths]
    logits = [rng.normal(0, 3, (width, VOCAB)) for width in (1, *widths)]
    return sets, logits


def extended(weighting, sets, logits):
    """A lattice through all sets, and the links of each but the last."""
    lattice = Lattice(weighting)
    links = [
        lattice.extend(torch.tensor(of_set), tokens).numpy()
        for of_set, tokens in zip(logits, sets, strict=False)
    ]
    return lattice, links[1:]


def enumerated(sets, logits):
    """The probability of every path, [w_0, w_1, ...], one at a time."""
    predicted = [softmax(each) for each in logits]
    paths = np.zeros([len(tokens) for tokens in sets])
    for members in np.ndindex(*paths.shape):
        probability = predicted[0][0, sets[0][members[0]]]
        for k, (i, u) in enumerate(itertools.pairwise(members)):
            probability *= predicted[k + 1][i, sets[k + 1][u]]
        paths[members] = probability
    assert np.allclose(paths, tempo64.all_paths(predicted, sets), rtol=1e-12)
    return paths


@given(lattices())
@settings(max_examples=60, deadline=None)
def test_links_weights_and_ancestors_are_sums_over_all_paths(drawn):
    sets, logits = drawn
    lattice, links = extended("posterior", sets, logits)
    paths, last = enumerated(sets, logits), len(sets) - 1
    predicted = [softmax(each) for each in logits]
    for k, found in enumerate(links):
        expected = tempo64.came_before(predicted, sets[: k + 2], k)
        assert np.abs(found - expected).max() < ROUNDING
        assert np.abs(found.sum(axis=0) - 1).max() < ROUNDING
    weights = paths.sum(axis=tuple(range(last))) / paths.sum()
    assert np.abs(lattice.log_weights.exp().numpy() - weights).max() < ROUNDING
    ancestors = lattice.ancestors.numpy()
    # everything came after the last prompt token
    assert np.abs(ancestors[0] - 1).max() < ROUNDING
    rows = np.split(ancestors[1:], np.cumsum([len(tokens) for tokens in sets[:-1]]))
    for j, found in enumerate(rows[:-1]):
        expected = tempo64.came_before(predicted, sets, j)
        assert np.abs(found - expected).max() < ROUNDING
        over_all = paths.sum(axis=tuple(axis for axis in range(last + 1) if axis != j))
        first = 1 + sum(len(tokens) for tokens in sets[:j])
        posterior = lattice.posterior.numpy()[first : first + len(sets[j])]
        assert np.abs(posterior - over_all / paths.sum()).max() < ROUNDING


@given(lattices())
@settings(max_examples=60, deadline=None)
def test_best_parents_make_one_path_a_member(drawn):
    sets, logits = drawn
    lattice, links = extended("best_parent", sets, logits)
    rows = np.cumsum([1, *(len(tokens) for tokens in sets[:-1])])
    for u in range(len(sets[-1])):
        member, ancestors = u, lattice.ancestors[:, u].numpy()
        for k in range(len(sets) - 2, -1, -1):
            member = int(links[k][:, member].argmax())
            one_hot = np.eye(len(sets[k]))[member]
            assert (ancestors[rows[k] : rows[k + 1]] == one_hot).all()


def test_of_equal_parents_the_first_counts():
    assert best_parents(torch.tensor([[0.4, 0.2], [0.4, 0.2], [0.2, 0.6]])).tolist() == [
        [1, 0],
        [0, 0],
        [0, 1],
    ]


def test_a_token_that_every_member_rules_out_still_has_parents():
    logits = torch.tensor([[0.0, -math.inf, 0.0], [0.0, -math.inf, -math.inf]])
    posterior, log_weights = link(logits, torch.tensor([0.75, 0.25]).log(), [1, 2])
    assert torch.allclose(posterior[:, 0], torch.tensor([0.75, 0.25], dtype=torch.float64))
    assert posterior[:, 1].tolist() == [1.0, 0.0]
    assert torch.isfinite(log_weights).all()
    assert log_weights[0] < IMPOSSIBLE / 2


@given(lattices(), st.integers(1, 70))
@settings(max_examples=60, deadline=None)
def test_paths_are_those_of_enumeration_best_first(drawn, num_paths):
    sets, logits = drawn
    lattice, links = extended("none", sets, logits)
    shares = enumerated(sets, logits)
    shares = shares / shares.sum()
    found = most_probable(links, lattice.log_weights.exp().numpy(), num_paths)
    order = sorted(np.ndindex(*shares.shape), key=lambda path: (-shares[path], path))
    assert [tuple(members) for _, members in found] == order[:num_paths]
    for log_share, members in found:
        assert abs(math.exp(log_share) - shares[tuple(members)]) < ROUNDING


def test_the_best_path_fixes_its_last_member_first():
    # the last member's weight is spread over two paths, and the best whole path ends elsewhere
    links, last = [np.array([[0.5, 1.0], [0.5, 0.0]])], np.array([0.6, 0.4])
    assert best_members(links, last) == [0, 0]
    assert most_probable(links, last, 1)[0][1] == [0, 1]


def test_equal_paths_come_by_earlier_members():
    links = [np.array([[0.5, 0.5], [0.5, 0.5]])]
    found = most_probable(links, np.array([0.5, 0.5]), 9)
    assert [members for _, members in found] == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_a_set_never_loses_its_most_probable_member_that_is_left():
    shares = np.array([0.6, 0.3, 0.1])
    for seen in itertools.product([False, True], repeat=3):
        if any(seen):
            gone = dropped(shares, np.array(seen), 0.9)
            left = [i for i in range(3) if seen[i] and i not in gone]
            assert left == [seen.index(True)]  # the most probable one comes first


@pytest.mark.parametrize(
    ("shares", "least", "gone"),
    [
        ([0.6, 0.3, 0.1], 0.1, []),  # exactly at the bound is not below it
        ([0.6, 0.3, 0.1], 0.11, [2]),
        ([6.0, 3.0, 1.0], 0.31, [1, 2]),  # in any unit
        ([0.1, 0.3, 0.6], 1.0, [0, 1]),
        ([0.5, 0.5], 1.0, [1]),
        ([1.0], 1.0, []),
        ([0.0, 0.0], 1.0, []),
    ],
)
def test_members_below_the_bound_are_dropped(shares, least, gone):
    assert dropped(np.array(shares), np.ones(len(shares), bool), least) == gone
