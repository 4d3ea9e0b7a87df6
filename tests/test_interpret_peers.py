"""The exports are what transformers, TransformerLens and nnsight hold of the same plain text.

`make speed` installs the last two into an environment of their own, and sets TEMPO_PEERS.
"""

import os

import pytest
import torch

import tempo
from benchmarks import peers
from tempo.interpret import as_nnsight, as_transformer_lens

pytestmark = pytest.mark.usefixtures("one_thread")

INSTALLED = peers.OPTIONAL if os.environ.get("TEMPO_PEERS") else {}
# float32 on a model of three layers: about a hundred roundings.
ROUNDING = 1e-4


def transformer_lens(lm, text):
    """The residuals of plain text by TransformerLens, by its own names."""
    from transformer_lens import ActivationCache
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(
        lm.name,
        hf_model=peers._copy(lm.model),
        tokenizer=peers._tokenizer(lm),
        device="cpu",
        dtype=lm.dtype,
    )
    with torch.inference_mode():
        _, cache = bridge.run_with_cache(torch.tensor([text]))

    def exported(trace):
        return ActivationCache(as_transformer_lens(trace), bridge)

    names = [
        f"blocks.{layer}.hook_resid_{where}" for layer in range(3) for where in ("pre", "post")
    ]
    return {name: cache[name] for name in names}, exported


def nnsight(lm, text):
    """The residuals of plain text by nnsight, by the paths of its modules."""
    from nnsight.modeling.transformers import TransformersModel

    own = peers._copy(lm.model)
    model = TransformersModel(own, tokenizer=peers._tokenizer(lm), task="text-generation")
    with model.trace(torch.tensor([text])):
        saved = list().save()
        for layer in model.model.layers:
            saved.append(layer.output)
    found = {f"model.layers.{layer}.output": states for layer, states in enumerate(saved)}
    return found, lambda trace: as_nnsight(lm, trace)


def by_transformers(lm, text):
    """The residuals of plain text as transformers returns them; its last one is no residual."""
    with torch.inference_mode():
        states = lm.model(torch.tensor([text]), output_hidden_states=True).hidden_states
    found = {f"model.layers.{layer}.input": states[layer] for layer in range(lm.num_layers)}
    return found, lambda trace: as_nnsight(lm, trace)


LIBRARIES = {"TransformerLens": transformer_lens, "nnsight": nnsight}


@pytest.mark.parametrize("name", ["transformers", *INSTALLED])
def test_an_export_is_what_the_library_holds_of_the_same_text(tiny, name):
    prompt, sets = [65, 66, 67], [[68], [69]]
    expected, exported = (LIBRARIES | {"transformers": by_transformers})[name](
        tiny, [*prompt, 68, 69]
    )
    cache = exported(tempo.generate(tiny, prompt, replay=sets, capture="residual"))
    for path, states in expected.items():
        own = cache[path]
        assert own.shape == (1, 2, 64)
        assert (own - states[:, len(prompt) :]).abs().max() < ROUNDING, path
        assert (own - states[:, len(prompt) - 1 : -1]).abs().max() > 100 * ROUNDING, path


def test_both_libraries_are_tested_where_they_are_installed():
    assert set(LIBRARIES) == set(peers.OPTIONAL)
