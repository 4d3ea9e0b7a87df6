"""A model may mask tokens with logits of -inf; NaN and +inf are errors that name their cause."""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tempo
from tempo.spec import READOUTS, RunSpec
from tests.tiny_models import SHAPE

PADDING = range(50, 64)  # of the vocabulary of 64: tokens that only fill it up
PROMPT = [2, 3, 5, 7, 11]
CLOSE = 1e-5  # engine and oracle, in probability


class Masking(LlamaForCausalLM):
    """A Llama whose padding tokens have logits of -inf, or of what `filled` says."""

    filled = -math.inf
    skipped = 0  # so many passes are left as they are

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if self.skipped:
            self.skipped -= 1
        else:
            output.logits[..., PADDING.start :] = self.filled
        return output


def masking(**attributes):
    """A wrapped `Masking` with random weights."""
    torch.manual_seed(0)
    model = Masking(LlamaConfig(num_hidden_layers=2, **SHAPE))
    for name, value in attributes.items():
        setattr(model, name, value)
    return tempo.wrap_model(model)


@pytest.mark.parametrize("readout", READOUTS)
def test_a_masked_vocabulary_runs_and_equals_the_oracle(readout):
    settings = {
        "threshold": 0.02,
        "max_steps": 3,
        "readout": readout,
        "capture": ("logits", "attention"),
    }
    with masking() as lm:
        trace = tempo.generate(lm, PROMPT, **settings)
        exact = tempo.reference.generate(lm, PROMPT, **settings)
    assert trace.sets == exact.sets
    assert max(trace.widths) > 1
    assert not set(PADDING) & {token for tokens in trace.sets for token in tokens}
    for step, other in zip(trace.steps, exact.steps, strict=True):
        assert (step.distribution[PADDING.start :] == 0).all()
        assert np.abs(step.distribution - other.distribution).max() < CLOSE
        assert (step.logits[:, PADDING.start :] == -math.inf).all()


def test_a_masked_vocabulary_can_be_saved_replayed_and_weighed(tmp_path):
    with masking() as lm:
        trace = tempo.generate(lm, PROMPT, threshold=0.02, capture="logits", weighting="posterior")
        again = tempo.load_trace(trace.save(tmp_path / "trace"))
        forced = tempo.generate(lm, PROMPT, replay=[[50, 3], [51]], weighting="probability")
    assert (again.steps[1].logits == trace.steps[1].logits).all()
    assert forced.steps[0].probabilities[0] == 0.0


@pytest.mark.parametrize("filled", [math.nan, math.inf])
def test_nan_and_plus_infinity_are_errors_that_do_not_ask_for_the_dtype_at_hand(filled):
    with (
        masking(filled=filled) as lm,
        pytest.raises(tempo.ModelError, match=r"runs in float32.*load it in float64$") as refused,
    ):
        tempo.generate(lm, PROMPT)
    assert "try float32" not in str(refused.value)


def test_a_vocabulary_that_is_masked_whole_is_an_error():
    with masking() as lm:
        lm.model.filled = -math.inf
        head = lm.model.lm_head.register_forward_hook(lambda *args: args[2] * 0 - math.inf)
        with pytest.raises(tempo.ModelError, match="logits that are not finite"):
            tempo.generate(lm, PROMPT)
        head.remove()


def test_the_error_names_the_weight_that_is_not_finite():
    with masking() as lm:
        lm.model.model.layers[1].mlp.down_proj.weight.data[0, 0] = math.nan
        with pytest.raises(tempo.ModelError, match=r"layers\.1\.mlp\.down_proj\.weight is not fin"):
            tempo.generate(lm, PROMPT)


def test_a_masked_model_is_still_compared_with_its_own_attention_at_load():
    # the first two passes at load are the model's own, the others tempo's
    with pytest.raises(tempo.ModelError, match="gives other logits under tempo's attention"):
        masking(skipped=2)


def test_specs_hold_no_threshold_that_lets_a_masked_token_in():
    with masking() as lm:
        spec = RunSpec(prompt=PROMPT, threshold=1e-40, max_steps=1)
        (trace,) = tempo.generate_batch(lm, [spec])
    assert trace.widths == [PADDING.start]
