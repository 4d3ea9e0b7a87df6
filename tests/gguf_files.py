"""A GGUF file of the model `tiny`, written as llama.cpp's converter writes a Llama."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tempo import LanguageModel

NORMAL, CONTROL = 1, 3  # kinds of tokens


def write_gguf(
    path: Path,
    lm: LanguageModel,
    *,
    theta: float = 1e4,
    without: Collection[str] = (),
    extra: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """The file, which holds the weights of `lm` but `without`, and `extra` tensors by GGUF name."""
    config = lm.model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(theta)
    writer.add_vocab_size(config.vocab_size)
    # a byte-level tokenizer without merges: every byte is a token, as for `tiny`
    byte = bytes_to_unicode()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([byte[b] for b in range(256)] + ["<bos>", "<eos>"])
    writer.add_token_types([NORMAL] * 256 + [CONTROL] * 2)
    writer.add_token_scores([0.0] * 258)  # transformers looks for scores where there are no merges
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_chat_template(lm.tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors = dict(extra or {})
    for name, tensor in lm.model.state_dict().items():
        if name not in without:
            key = names.get_name(name, try_suffixes=(".weight",))
            tensors[key] = _interleaved(name, tensor, config).numpy()
    for key, array in tensors.items():
        writer.add_tensor(key, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _interleaved(name: str, tensor: torch.Tensor, config) -> torch.Tensor:
    """Queries and keys in llama.cpp's order: the two halves of a rotary pair side by side."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for kind, num_heads in heads.items():
        if kind in name:
            halves = tensor.unflatten(0, (num_heads, 2, -1))
            return halves.transpose(1, 2).reshape(tensor.shape)
    return tensor
