"""The model `tiny`: random weights, built in code, the same everywhere; for tests and first steps.

Its texts mean nothing, but everything runs on it in an instant and without a download.
"""

from __future__ import annotations

import math
from typing import Any

import torch

TINY_SEED = 20240229  # any fixed value: the weights of `tiny` are part of the tests' meaning
# Above 1, so that attention logits spread by about 1.5^2 and attention is far from uniform.
TINY_GAIN = 1.5
# One line a message, `role: content`, then the role that is to speak.
TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def build_tiny(dtype: torch.dtype) -> tuple[Any, Any]:
    """A random Llama, whose weights are large enough that attention matters, and its tokenizer."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    # Every byte of UTF-8 is a token, so every text has ids and comes back exactly.
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=TINY_CHAT_TEMPLATE,
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        tie_word_embeddings=False,
        bos_token_id=256,
        eos_token_id=257,
    )
    with torch.random.fork_rng(devices=[]):  # the constructor draws numbers
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(TINY_SEED)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:  # norms stay at one
                std = 1.0 if "embed_tokens" in name else TINY_GAIN / math.sqrt(weight.shape[1])
                weight.normal_(std=std, generator=generator)
            # Not model.to(dtype): that would round the rotary table too, unlike loading a folder.
            weight.data = weight.to(dtype)
    return model, tokenizer
