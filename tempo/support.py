"""Which transformers models can run TEMPO, and why the others cannot; what a config says about attention."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tempo.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Which architectures run, by transformers version: written by benchmarks/architectures.py, checked by the tests.
REGISTRY = Path(__file__).with_name("architectures.json")


# Layer types whose mask TEMPO can state. A chunked layer equals a full one inside its first chunk, and
# `context_length` ends there.
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}

# Rotary tables are made in float32 by pow(theta, x): relative error about ln(theta) * 1e-7 = 2e-6.
# A wrong theta is wrong by a factor of up to theta / theta', so anything between the two will do.
ROTARY_RTOL = 1e-5


def read_registry() -> dict[str, dict[str, dict[str, Any]]]:
    """{transformers version: {model type: what was measured}}; see benchmarks/architectures.py for the fields."""
    return json.loads(REGISTRY.read_text(encoding="utf-8")) if REGISTRY.exists() else {}


def check_can_run(model: Any) -> None:
    """Return if TEMPO can run the model, else raise ModelError with the reason and what would work."""
    from transformers import PreTrainedModel

    works = "A decoder-only model with rotary embeddings works, for example Llama, Qwen, Mistral or Gemma"
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"{kind} is not a transformers PreTrainedModel; wrap the model itself. {works}"
        )
    for reason in reasons_against(model):
        raise ModelError(f"{kind} cannot run TEMPO: {reason}. {works}")
    check_rotary_tables(model, _config_thetas(model.config.get_text_config()))


def reasons_against(model: PreTrainedModel) -> Iterator[str]:
    """What was seen, what is expected, and what would work instead; the plainest reason first."""
    text = model.config.get_text_config()
    strange = ", ".join(sorted(set(getattr(text, "layer_types", None) or ()) - ATTENTION_LAYERS))
    if getattr(model.config, "is_encoder_decoder", False):
        yield "it is an encoder-decoder: TEMPO needs one stack that reads the prompt and continues it"
    if getattr(model, "_is_stateful", False):
        yield "it keeps a recurrent state, in which siblings mix: expected attention layers only"
    if strange:
        yield f"it has layers of type {strange}: expected only {', '.join(sorted(ATTENTION_LAYERS))}"
    if not hasattr(text, "num_hidden_layers"):
        yield "its config has no num_hidden_layers: expected one stack of attention layers"
    if model.get_output_embeddings() is None:
        yield "it has no language-model head: use the ...ForCausalLM class, not the bare model"
    if getattr(text, "use_bidirectional_attention", False) in (True, "all"):
        yield "its tokens see later ones (config.use_bidirectional_attention): expected a causal model"
    if not rotary_tables(model):
        yield (
            "it has no rotary embedding (no buffer named inv_freq), so tokens cannot be put at one position: "
            "learned, absolute and ALiBi positions do not work"
        )
    if not model._can_set_attn_implementation():
        yield (
            "its attention cannot be exchanged (it does not go through transformers' AttentionInterface): a newer transformers may let it"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        yield "some of its weights are not in memory (meta device): load it without offloading"


def check_rotary_tables(model: PreTrainedModel, thetas: Mapping[str, float]) -> None:
    """Return if every rotary table named in `thetas` is theta^(-2i/D), else raise ModelError.

    transformers 4 drops the `rope_parameters` that transformers 5 saves and falls back to theta 10,000
    in silence; text stays plausible. So the tables are computed here again, in float64.
    """
    tables = rotary_tables(model)
    for prefix, theta in thetas.items():
        leaf = f"{prefix}_inv_freq" if prefix else "inv_freq"
        named = {name: table for name, table in tables.items() if name.rpartition(".")[2] == leaf}
        if not named:
            raise ModelError(
                f"expected a rotary table {leaf!r} with theta {theta:g}; the model has {sorted(tables)}. "
                "Another transformers version reads this config differently: upgrade transformers"
            )
        for name, table in named.items():
            size = 2 * table.numel()
            expected = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
            # A model cast as a whole has a rounded table: that is its owner's choice, and no wrong theta.
            rtol = max(ROTARY_RTOL, torch.finfo(table.dtype).eps)
            seen = table.detach().double().cpu()
            if not torch.allclose(seen, expected, rtol=rtol, atol=0):
                used = float(seen[-1]) ** (-size / (size - 2)) if size > 2 else math.nan
                raise ModelError(
                    f"rotary table {name!r} was made with theta {used:.6g}, expected {theta:g}: every "
                    "position would be wrong. transformers 4 does this to a config of transformers 5; use "
                    "transformers 5, or set rope_parameters in config.json"
                )


def rotary_tables(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """{name: table}; the last part of a name is `inv_freq`, or `<layer type>_inv_freq` in Gemma 3."""
    # First the text decoder, as image towers have tables of their own; then all, as get_decoder() may be the
    # output layer of a model that calls it "decoder" (ModernBERT).
    for root in (model.get_decoder(), model):
        tables = {
            name: buffer
            for name, buffer in root.named_buffers()
            if name.endswith("inv_freq") and not name.endswith("original_inv_freq")
        }
        if tables:
            return tables
    return {}


def _config_thetas(text: Any) -> dict[str, float]:
    """{prefix: theta} as the config says, for tables of the default kind (others are scaled by design)."""
    rope = getattr(text, "rope_parameters", None) or {}
    nested = {key: value for key, value in rope.items() if isinstance(value, Mapping)} or {"": rope}
    used = set(getattr(text, "layer_types", None) or nested) | {""}
    return {
        prefix: float(value["rope_theta"])
        for prefix, value in nested.items()
        if prefix in used and value.get("rope_type") == "default" and "rope_theta" in value
    }


def cache_keyword(model: PreTrainedModel) -> str:
    """What the model's forward calls its key-value cache: `cache` since transformers 5.24, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def context_length(text: Any) -> int:
    lengths = (
        getattr(text, key, None) for key in ("max_position_embeddings", "attention_chunk_size")
    )
    lengths = [int(length) for length in lengths if length]
    if not lengths:
        raise ModelError(
            "the config does not say how long a text may be; set config.max_position_embeddings"
        )
    return min(lengths)


def eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    ids: set[int] = set()
    for config in (model.generation_config, model.config, model.config.get_text_config()):
        eos = getattr(config, "eos_token_id", None)
        ids.update([] if eos is None else [eos] if isinstance(eos, int) else eos)
    return frozenset(ids)


def layer_windows(text: Any) -> tuple[int | None, ...]:
    window = getattr(text, "sliding_window", None)
    if not window:
        return (None,) * text.num_hidden_layers
    # Without layer types the whole model slides (Mistral).
    types = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def attention_implementations(model: PreTrainedModel) -> dict[str, str | None]:
    """What `set_attn_implementation` takes to bring back the present state."""
    subs = {key: getattr(model.config, key, None) for key in model.config.sub_configs}
    kept = {
        key: sub._attn_implementation
        for key, sub in subs.items()
        if sub is not None and sub._attn_implementation is not None
    }
    return {"": model.config._attn_implementation} | kept
