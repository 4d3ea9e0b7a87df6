"""Models that were compiled, quantised, adapted or resized: right, or refused in one true line."""

import warnings

import pytest
import torch
from tokenizers import Regex, normalizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tempo
from tempo import ModelError, SpecError
from tempo.identity import model_sha256
from tempo.store import TraceStore
from tempo.tiny import build_tiny
from tests.test_models import Adapter

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = tempo.RunSpec(prompt="The cat", threshold=0.05, max_steps=3)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def agree(lm):
    """Whether engine and oracle choose the same sets."""
    run = tempo.generate(lm, **SPEC.model_dump(include={"prompt", "threshold", "max_steps"}))
    exact = tempo.reference.generate(lm, SPEC.prompt, threshold=0.05, max_steps=3)
    return run.sets == exact.sets


# --- compiled


def forbidden(graph, inputs):
    raise AssertionError("a run of tempo was compiled")


@pytest.mark.parametrize("part", [lambda model: model, lambda model: model.model.layers[1]])
def test_a_model_that_is_compiled_in_place_runs_as_it_is_written(part):
    """Case 26: before wrapping it was refused with a stack of Dynamo's."""
    plain, _ = build_tiny(torch.float32)
    model, tokenizer = build_tiny(torch.float32)
    part(model).compile(backend=forbidden)
    compiled = part(model)._compiled_call_impl
    with tempo.wrap_model(model, tokenizer) as lm, tempo.wrap_model(plain, tokenizer) as other:
        run = tempo.generate(lm, "The cat", threshold=0.05, max_steps=3)
        same = tempo.generate(other, "The cat", threshold=0.05, max_steps=3)
        assert run.sets == same.sets
        assert (run.steps[-1].distribution == same.steps[-1].distribution).all()
        assert model_sha256(lm) == model_sha256(other)
    assert part(model)._compiled_call_impl is compiled  # and is left as it was


def test_compiled_after_wrapping_it_runs_as_well_and_a_plain_pass_would_compile():
    model, tokenizer = build_tiny(torch.float32)
    with tempo.wrap_model(model, tokenizer) as lm:
        before = tempo.generate(lm, "The cat", threshold=0.05, max_steps=3)
        model.compile(backend=forbidden)
        after = tempo.generate(lm, "The cat", threshold=0.05, max_steps=3)
        assert before.sets == after.sets
    with pytest.raises(Exception, match="a run of tempo was compiled"):
        model(input_ids=torch.tensor([[1, 2]]))


# --- adapters that are switched


def adapted():
    model, tokenizer = build_tiny(torch.float32)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
    return tempo.wrap_model(model, tokenizer, "adapted")


def switch(lm):
    for layer in lm.model.model.layers:
        layer.self_attn.q_proj.active_adapters = ["other"]
        layer.self_attn.q_proj.scaling = {"default": 0.0}


def test_switched_adapters_are_another_model_to_a_store(tmp_path):
    lm = adapted()
    tempo.generate_batch(lm, [SPEC], store=tmp_path)
    assert TraceStore(lm, tmp_path).get(SPEC)
    switch(lm)
    assert TraceStore(lm, tmp_path).get(SPEC) is None


def test_adapters_that_are_switched_under_a_stream_end_it(tmp_path):
    """Case 26: what came after was stored under the name of the model before."""
    lm, specs = adapted(), [SPEC.but(prompt=text) for text in ("The cat", "Numbers", "def f(")]
    stream = tempo.stream(lm, specs, max_rows=1, store=tmp_path)
    next(stream)
    switch(lm)
    with pytest.raises(ModelError, match=r"adapters were switched .*\['other'\].*let all runs end"):
        next(stream)
    before = adapted()
    stored = [TraceStore(before, tmp_path).get(spec) for spec in specs]
    assert sum(trace is not None for trace in stored) == 1
    assert len(list(tempo.stream(lm, specs, max_rows=1, store=tmp_path))) == 3  # and anew it runs


# --- quantised


class Int8(torch.Tensor):
    """Stands for torchao's weight: eight bits and a scale, of which the numbers are made."""

    @staticmethod
    def __new__(cls, data, scale):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype)

    def __init__(self, data, scale):
        self.data8, self.scale = data, scale

    def __tensor_flatten__(self):
        return ["data8", "scale"], None

    def numbers(self):
        return self.data8.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        plain = torch.utils._pytree.tree_map_only(cls, cls.numbers, (args, kwargs or {}))
        if function is torch.ops.aten.detach.default:
            return cls(args[0].data8, args[0].scale)
        return function(*plain[0], **plain[1])


def quantised(change=0):
    model, tokenizer = build_tiny(torch.float32)
    for layer in model.model.layers:
        weight = layer.mlp.up_proj.weight.detach()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        eight = (weight / scale).round().to(torch.int8)
        eight[0, 0] += change
        layer.mlp.up_proj.weight = nn.Parameter(Int8(eight, scale), requires_grad=False)
    return tempo.wrap_model(model, tokenizer, "int8")


def test_weights_of_eight_bits_run_and_are_hashed_by_their_parts(tiny):
    """Case 25: `sha256` raised."""
    lm = quantised()
    assert agree(lm)
    assert lm.sha256 == quantised().sha256 not in (quantised(1).sha256, tiny.sha256)


def test_what_rounds_by_its_batch_mates_is_refused_for_that():
    """Case 26: an AttributeError, and with the plain output layer other sets than the oracle's."""
    whole, _ = build_tiny(torch.float32)
    inner, _ = build_tiny(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it will go
        whole = torch.ao.quantization.quantize_dynamic(whole, {nn.Linear})
        inner.model = torch.ao.quantization.quantize_dynamic(inner.model, {nn.Linear})
    for model in (whole, inner):
        with pytest.raises(ModelError, match=r"q_proj is quantised by quantize_dynamic") as told:
            tempo.wrap_model(model)
        assert "one scale for all tokens of a pass" in one_line(told)


def test_it_does_round_by_its_batch_mates():
    """The control: why it is refused."""
    linear = nn.Sequential(nn.Linear(8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it will go
        linear = torch.ao.quantization.quantize_dynamic(linear, {nn.Linear})
    token, loud = torch.linspace(-1, 1, 8)[None], torch.full((1, 8), 100.0)
    alone, beside = linear(token), linear(torch.cat([token, loud]))[:1]
    assert (alone - beside).abs().max() > 0.01


def test_layers_of_another_dtype_than_the_embedding_are_refused_for_that():
    """Case 25: it was refused for a rotary table."""
    model, _ = build_tiny(torch.bfloat16)
    model.model.embed_tokens.float()
    with pytest.raises(ModelError, match=r"same dtype.*float != c10::BFloat16") as told:
        tempo.wrap_model(model)
    one_line(told)


def test_a_run_under_autocast_is_refused_whatever_it_captures(tiny):
    """Case 25: a TypeError where attention was captured."""
    told = pytest.raises(ModelError, match=r"torch\.autocast is on")
    with torch.autocast("cpu", dtype=torch.bfloat16), told:
        tempo.generate(tiny, "The cat", max_steps=1, capture="attention")


# --- sizes that do not fit


def sized(embedding=258, head=258):
    config = LlamaConfig(
        vocab_size=embedding,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.lm_head = nn.Linear(32, head, bias=False)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return build_tiny(torch.float32)[1]


def test_a_tokenizer_larger_than_the_embedding_is_told_where_it_matters(tokenizer):
    """Case 26: an IndexError of the embedding."""
    with tempo.wrap_model(sized(100, 100), tokenizer, "small") as lm:
        assert len(tempo.generate(lm, "ABC", max_steps=2).steps) == 2
        with pytest.raises(SpecError, match=r"the tokenizer makes token 116 .*for 0 to 99") as told:
            tempo.generate(lm, "The cat")
        assert "resize_token_embeddings" in one_line(told)
        with pytest.raises(SpecError, match=r"token ids 0 to 99"):
            lm.encode([100])


def test_an_output_layer_larger_than_the_embedding_is_refused(tokenizer):
    """Case 26: it ran until a token was chosen that has no embedding."""
    with pytest.raises(ModelError, match=r"output layer knows 300 tokens .*embedding 258") as told:
        tempo.wrap_model(sized(head=300), tokenizer)
    assert "resize_token_embeddings" in one_line(told)


def test_a_smaller_output_layer_runs_and_a_prompt_may_hold_the_rest(tokenizer):
    with tempo.wrap_model(sized(head=50), tokenizer, "half") as lm:
        assert (lm.vocab_size, lm.num_embeddings) == (50, 258)
        trace = tempo.generate(lm, "The cat", threshold=0.05, max_steps=3)
        exact = tempo.reference.generate(lm, "The cat", threshold=0.05, max_steps=3)
        assert trace.sets == exact.sets
        assert trace.steps[0].distribution.shape == (50,)
        with pytest.raises(SpecError, match="outside the vocabulary"):
            tempo.generate(lm, "The cat", replay=[[60]])


def test_a_tokenizer_that_makes_no_token_of_a_text_is_told(tiny):
    """transformers reads some folders with another tokenizer than they hold."""
    model, tokenizer = build_tiny(torch.float32)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("."), "")
    with tempo.wrap_model(model, tokenizer) as lm:
        with pytest.raises(SpecError, match="makes no token of the prompt; it is another model's"):
            lm.encode("The cat")
        with pytest.raises(SpecError, match="the prompt is empty"):
            lm.encode("")
