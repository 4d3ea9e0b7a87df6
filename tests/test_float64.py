"""The engine in true float64 against the float64 reference: nothing of a weighting is lost.

transformers computes norms and rotary angles of a float64 model in float32. Here both are replaced
by float64 ones, and logits are read before a trace rounds them to float32.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import tempo
from tempo import attention
from tempo import run as one_run
from tempo.layout import Layout
from tempo.spec import VISIBILITIES, WEIGHTINGS
from tests.checks import Case, near, replayed64, violated
from tests.exactness import FIXED_CASES
from tests.llama64 import rotary_frequencies
from tests.tiny_models import SHAPE, THETA, TWINS, llama

pytestmark = pytest.mark.usefixtures("one_thread")

# Both sides are float64. The largest difference seen is 1e-13.
BOUND = 1e-10
DEPTH = 4
# Of these a key's weight is rounded to float32 with the set's probabilities.
ROUNDED = ("probability",)


@pytest.fixture(autouse=True)
def true_float64(monkeypatch):
    """Norms and rotary angles of transformers' Llama in the dtype of the model."""

    def norm(module, hidden):
        size = torch.sqrt(hidden.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
        return module.weight * (hidden / size)

    def rotary(module, states, position_ids):
        frequencies = torch.tensor(rotary_frequencies(THETA, SHAPE["head_dim"]))
        angles = position_ids[..., None].double() * frequencies  # [1, T, D/2]
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(states.dtype), angles.sin().to(states.dtype)

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", rotary)


@cache
def wide_llama():
    """The tiny Llama of the other checks, in float64. Its weights are those of float32."""
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=DEPTH, **SHAPE)).double()
    model.load_state_dict(llama(DEPTH).model.state_dict())
    return tempo.wrap_model(model.requires_grad_(False).eval(), name="float64")


@pytest.fixture
def logits64(monkeypatch):
    """The logits [w, V] of each set of the last run, as the pass gave them."""
    found = []

    original = one_run.Run._record

    def record(run, slots, logits, *captured):
        found.append(logits.numpy())
        original(run, slots, logits, *captured)

    monkeypatch.setattr(one_run.Run, "_record", record)
    return found


def compare(case: Case, logits64: list) -> None:
    """Raise a Violation unless all logits of the case's replay are the reference's."""
    logits64.clear()
    spec = tempo.RunSpec(prompt=case.prompt, replay=case.sets, capture="logits", **case.settings)
    tempo.generate_batch(wide_llama(), [spec])
    exact = replayed64(llama(DEPTH), case)
    assert len(logits64) == len(case.sets)
    for k, found in enumerate(logits64):
        assert found.dtype == np.float64
        expected = exact.out.logits[exact.slots.slots(k, len(case.prompt))]
        near(found, expected, BOUND, f"logits of set {k}")


def of(index: int, weighting: str, visibility: str) -> Case:
    """A fixed case under another weighting and visibility."""
    case = FIXED_CASES[index]
    return Case(case.prompt, case.sets, visibility, case.positions, "mixture", weighting)


@pytest.mark.parametrize("weighting", [name for name in WEIGHTINGS if name not in ROUNDED])
@pytest.mark.parametrize("visibility", VISIBILITIES)
@pytest.mark.parametrize("index", range(len(FIXED_CASES)))
def test_the_engine_is_the_reference_in_float64(index, visibility, weighting, logits64):
    compare(of(index, weighting, visibility), logits64)


def test_given_weights_and_a_kept_mass_are_not_rounded(logits64):
    """Copies of a token are one key of their number, in float64 as well."""

    def both(one, other):
        found = []
        for spec in (one, other):
            logits64.clear()
            tempo.generate_batch(wide_llama(), [spec])
            found.append([logits64[0][0], logits64[1][0]])  # of a copy, and of the reader
        return found

    spec = tempo.RunSpec(prompt=(3, 17, 8), replay=[TWINS[:1], [21]], capture="logits")
    weighted = spec.but(replay_weights=[[3.0], [1.0]])
    near(*both(weighted, spec.but(replay=[TWINS[:3], [21]])), BOUND, "one that weighs three")
    seeing = spec.but(replay=[TWINS[:3], [21]], visibility="visible")
    kept = seeing.but(isolated_layers=(0, DEPTH), isolated_mass="self")
    near(*both(kept, seeing), BOUND, "copies that weigh three to themselves")
    with violated(by=1e6):
        near(*both(kept.but(isolated_mass="spread"), seeing), BOUND, "copies that weigh one")


@pytest.mark.parametrize("rounded", ["ancestors", "bias", "links"])
def test_a_weight_that_passes_through_float32_would_be_seen(rounded, logits64, monkeypatch):
    """Each of these is the kind of cast that costs five digits."""
    case = of(3, "posterior", "isolated")
    compare(case, logits64)
    if rounded == "bias":
        original = attention.PassContext._make_mask
        monkeypatch.setattr(
            attention.PassContext,
            "_make_mask",
            lambda *args: original(*args[:-1], torch.float32).double(),
        )
    elif rounded == "ancestors":
        by_query = Layout._bias_by_query
        monkeypatch.setattr(
            Layout, "_bias_by_query", lambda layout, shares: by_query(layout, shares.float())
        )
    else:
        link = tempo.lattice.link
        monkeypatch.setattr(
            tempo.lattice, "link", lambda logits, *rest: link(logits.float(), *rest)
        )
    with violated(by=10):
        compare(case, logits64)
