"""Weights are rounded to sixteen steps a block, and hardly changed if they were so before."""

import torch

import tempo
from benchmarks.rounded import BLOCK, round_all, rounded

WEIGHTS = torch.randn(8, 4 * BLOCK, generator=torch.Generator().manual_seed(0))


def steps_of(weights):
    return [len(block.unique()) for block in weights.reshape(-1, BLOCK)]


def test_a_block_has_at_most_sixteen_values_and_rounding_again_changes_nothing():
    found = rounded(WEIGHTS)
    assert max(steps_of(found)) <= 16 < max(steps_of(WEIGHTS))
    assert torch.allclose(rounded(found), found)
    change = float((found - WEIGHTS).norm() / WEIGHTS.norm())
    assert 0.02 < change < 0.15


def test_zeros_stay_zero():
    assert rounded(torch.zeros(1, BLOCK)).eq(0).all()


def test_every_matrix_of_a_model_is_rounded():
    model = tempo.load_model("tiny").model
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert 0.01 < round_all(model) < 0.2
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2 and parameter.shape[-1] % BLOCK == 0
        assert bool((parameter != before[name]).any()) == is_matrix, name
