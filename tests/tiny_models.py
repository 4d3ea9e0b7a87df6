"""Small random models built in code, each once a session, with what the exactness checks need of them."""

from __future__ import annotations

import math
from functools import cache

import torch
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

import tempo
from tempo import LanguageModel
from tests.llama64 import Llama64

VOCAB = 64  # small, so that several tokens reach a threshold and a full marginal can be summed
# Token ids with one and the same embedding: to the model they are copies of one token, to a set they are different ones.
TWINS = (60, 61, 62, 63)
WINDOW = 4  # positions a sliding layer sees: less than a prompt and its sets
THETA = 1e4
# Weights this much above 1 / sqrt(fan-in) spread attention logits by about 1.5^2, so that attention is far from uniform.
GAIN = 1.5
SINK = 1.0  # about the largest attention logit of a query: the sink takes a good part of the mass

SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 256, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None, "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
}  # fmt: skip


@cache
def llama(num_layers: int = 2, seed: int = 0) -> LanguageModel:
    return _wrapped(LlamaForCausalLM(LlamaConfig(num_hidden_layers=num_layers, **SHAPE)), seed)


@cache
def mistral() -> LanguageModel:
    """Llama with a sliding window in every layer."""
    return _wrapped(
        MistralForCausalLM(MistralConfig(num_hidden_layers=2, sliding_window=WINDOW, **SHAPE)),
        seed=0,
    )


@cache
def gpt_oss() -> LanguageModel:
    """Attention sinks, one sliding layer in two, and a mixture of experts that drops no token."""
    config = GptOssConfig(
        num_hidden_layers=2,
        sliding_window=WINDOW,
        num_local_experts=4,
        num_experts_per_tok=2,
        **SHAPE,
    )
    lm = _wrapped(GptOssForCausalLM(config), seed=0)
    for name, parameter in lm.model.named_parameters():
        if name.endswith("sinks"):
            parameter.fill_(SINK)
    return lm


@cache
def exact(lm: LanguageModel) -> Llama64:
    """The true float64 reference with the weights of a model made above."""
    return Llama64(lm.model)


def _wrapped(model: PreTrainedModel, seed: int) -> LanguageModel:
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:  # norms stay at one, biases at zero
            std = 1.0 if "embed_tokens" in name else GAIN / math.sqrt(parameter.shape[-1])
            parameter.normal_(std=std, generator=generator)
        elif "norm" not in name:
            parameter.zero_()
    embedding = model.get_input_embeddings().weight
    embedding[list(TWINS)] = embedding[TWINS[0]].clone()
    return tempo.wrap_model(model.eval(), name=f"{type(model).__name__} {seed}")
