"""Models and runs of a given size.

Random Llamas of any number of layers, texts of any length, and steps of any width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

import tempo
from fixtures.suite import suite_texts
from tempo import LanguageModel, RunSpec

# Below every probability that a float32 softmax gives here. So a step takes `max_width` tokens.
EVERY_TOKEN = 1e-30
SEED = 0

LLAMA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}


def random_llama(dtype: torch.dtype, device: str, **shape: Any) -> LanguageModel:
    """A Llama of this shape with random weights, made on the device where it will run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**shape))
    finally:
        torch.set_default_dtype(before)
    return tempo.wrap_model(model.requires_grad_(False), name="random Llama")


def layers_of(lm: LanguageModel, num_layers: int) -> LanguageModel:
    """A model like this one with `num_layers` layers and random weights."""
    config = copy.deepcopy(lm.model.config)
    config.num_hidden_layers = num_layers
    torch.manual_seed(SEED)
    model = type(lm.model)(config).to(lm.device, lm.dtype)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return tempo.wrap_model(model.requires_grad_(False), name=f"random, {num_layers} layers")


def text_of(lm: LanguageModel, length: int, start: int = 0) -> list[int]:
    """`length` tokens of text.

    They are the suite's prompts one after another, from number `start` on. Without a tokenizer
    they are random tokens, and `start` is the seed.
    """
    if lm.tokenizer is None:
        seeded = torch.Generator().manual_seed(start)
        return torch.randint(lm.vocab_size, (length,), generator=seeded).tolist()
    prompts = suite_texts()
    tokens: list[int] = []
    while len(tokens) < length:
        tokens += lm.encode(prompts[start % len(prompts)])
        start += 1
    return tokens[:length]


def wide(prompt: Sequence[int], width: int, num_steps: int, **settings: Any) -> RunSpec:
    """A free run of exactly `width` tokens a step."""
    threshold = EVERY_TOKEN if width > 1 else 1.0
    return RunSpec(
        prompt=list(prompt),
        threshold=threshold,
        max_width=width,
        max_steps=num_steps,
        stop_at_eos=False,
        **settings,
    )
