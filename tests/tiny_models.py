"""Small random models built in code, each once a session, and the float64 reference of each."""

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
# Token ids with one and the same embedding. The model cannot tell them apart, but a set can.
TWINS = (60, 61, 62, 63)
# Positions that a sliding layer sees: fewer than a prompt and its sets have.
WINDOW = 4
THETA = 1e4
# Weights are this much above 1 / sqrt(fan-in). Attention logits then spread by about 1.5^2, and
# attention is far from uniform.
GAIN = 1.5
# About the largest attention logit of a query, so that the sink takes much of the mass.
SINK = 1.0

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
}


@cache
def llama(num_layers: int = 2, seed: int = 0) -> LanguageModel:
    """A plain Llama."""
    return _wrapped(LlamaForCausalLM(LlamaConfig(num_hidden_layers=num_layers, **SHAPE)), seed)


@cache
def mistral() -> LanguageModel:
    """A Llama with a sliding window in every layer."""
    config = MistralConfig(num_hidden_layers=2, sliding_window=WINDOW, **SHAPE)
    return _wrapped(MistralForCausalLM(config), seed=0)


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
    """The model with random weights, ready to run."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            std = 1.0 if "embed_tokens" in name else GAIN / math.sqrt(parameter.shape[-1])
            parameter.normal_(std=std, generator=generator)
        elif "norm" not in name:  # norms stay at one, biases become zero
            parameter.zero_()
    embedding = model.get_input_embeddings().weight
    embedding[list(TWINS)] = embedding[TWINS[0]].clone()
    return tempo.wrap_model(model.eval(), name=f"{type(model).__name__} {seed}")
