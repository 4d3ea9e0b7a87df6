"""Which transformers models can run TEMPO, and why the others cannot.

Also what a config says about attention: windows, rotary tables, context length.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tempo.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Which architectures run, by transformers version: written by benchmarks/architectures.py and
# checked by the tests.
REGISTRY = Path(__file__).with_name("architectures.json")


# Layer types whose mask TEMPO can state. A chunked layer equals a full one inside its first
# chunk, and `context_length` ends there.
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}

# Rotary tables are made in float32 by pow(theta, x): relative error about ln(theta) * 1e-7 = 2e-6.
# A wrong theta is wrong by a factor of up to theta / theta', so anything between the two will do.
ROTARY_RTOL = 1e-5

# What a model in place of a refused one should be.
WORKS = (
    "A decoder-only model with rotary embeddings works, for example Llama, Qwen, Mistral or Gemma"
)
ONE_DEVICE = "load it whole on one device, without device_map or with device_map='cuda:0'"
NUM_TRIED = 4  # tokens of the pass that shows whether a wrapper only forwards


def read_registry() -> dict[str, dict[str, dict[str, Any]]]:
    """{transformers version: {model type: what benchmarks/architectures.py measured}}."""
    return json.loads(REGISTRY.read_text(encoding="utf-8")) if REGISTRY.exists() else {}


def unwrapped(model: Any) -> Any:
    """The transformers model inside a wrapper that only forwards to it; any other model as it is.

    A wrapper is a module around a causal language model: peft's `PeftModel` (its LoRA layers lie
    inside the model), `torch.nn.DataParallel`, or what `torch.compile` returns. Whether it only
    forwards is found by trying: a few tokens must get the very same logits from both.

    Raises:
        ModelError: if the wrapper does something of its own, as prompt tuning does, or if TEMPO
            cannot run the model inside.
    """
    from transformers import PreTrainedModel

    # torch promises that a compiled model computes the same; trying it would compile it
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PreTrainedModel) or not isinstance(model, nn.Module):
        return model
    inside = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    inner = next((found for found in inside if found.get_output_embeddings() is not None), None)
    if inner is None:
        return model
    check_can_run(inner)
    if not _only_forwards(model, inner):
        raise ModelError(
            f"{type(model).__name__} does more than forward to the {type(inner).__name__} inside "
            f"it: {NUM_TRIED} tokens get other logits from it. If its adapters can be merged, wrap "
            "what model.merge_and_unload() returns. Virtual tokens (prompt or prefix tuning) "
            f"cannot run TEMPO; without them, wrap the {type(inner).__name__} itself"
        )
    return inner


@torch.inference_mode()
def _only_forwards(wrapper: nn.Module, inner: Any) -> bool:
    """Whether both give the same logits, to the bit, for a few tokens; both stay as they were."""
    embedding: Any = inner.get_input_embeddings()
    index = torch.arange(NUM_TRIED, device=embedding.weight.device)
    tokens = (index % embedding.weight.shape[0])[None]
    training = [(module, module.training) for module in wrapper.modules()]
    wrapper.eval()  # else dropout would make them differ
    try:
        ours = inner(input_ids=tokens, use_cache=False).logits
        theirs = wrapper(input_ids=tokens, use_cache=False)
        # a wrapper may give a tuple, logits first
        return torch.equal(ours, theirs.logits if hasattr(theirs, "logits") else theirs[0])
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False  # a wrapper that takes other arguments does not forward these
    finally:
        for module, was_training in training:
            module.training = was_training


def adapter_settings(model: nn.Module) -> list[str]:
    """What adapter layers (of peft) do beyond their weights; empty for a model without adapters.

    One line a layer: which adapters are active, how strong they are, and whether they are off.
    """
    lines = []
    for name, module in model.named_modules():
        active = getattr(module, "active_adapters", None)
        if isinstance(active, Sequence) and not isinstance(active, str):
            scaling = getattr(module, "scaling", None)
            scaling = sorted(scaling.items()) if isinstance(scaling, Mapping) else scaling
            off, merged = (
                getattr(module, what, None) for what in ("disable_adapters", "merged_adapters")
            )
            lines.append(f"{name} {type(module).__name__} {list(active)} {scaling} {off} {merged}")
    return lines


def check_adapters(model: nn.Module, before: Sequence[str]) -> None:
    """Raises ModelError if adapters were switched, merged or scaled since `adapter_settings`."""
    now = adapter_settings(model)
    if now != before:
        changed = [line for line in now if line not in before] or list(before)
        raise ModelError(
            f"adapters were switched while runs were under way (now: {changed[0]}), so that a run "
            "would be of two models; let all runs end first, or give each adapter a model"
        )


def check_can_run(model: Any) -> None:
    """Return if TEMPO can run the model.

    Raises:
        ModelError: if it cannot, with the reason and with what would work.
    """
    from transformers import PreTrainedModel

    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"{kind} is not a transformers PreTrainedModel; wrap the model itself. {WORKS}"
        )
    for reason in reasons_against(model):
        raise ModelError(f"{kind} cannot run TEMPO: {reason}. {WORKS}")
    check_rotary_tables(model, _config_thetas(model.config.get_text_config()))


def reasons_against(model: PreTrainedModel) -> Iterator[str]:
    """What was seen, what was expected, and what would work; the plainest reason first."""
    text = model.config.get_text_config()
    strange = ", ".join(sorted(set(getattr(text, "layer_types", None) or ()) - ATTENTION_LAYERS))
    if getattr(model.config, "is_encoder_decoder", False):
        yield (
            "it is an encoder-decoder: TEMPO needs one stack that reads the prompt and continues it"
        )
    if getattr(model, "_is_stateful", False):
        yield "it keeps a recurrent state, in which siblings mix: expected attention layers only"
    if strange:
        expected = ", ".join(sorted(ATTENTION_LAYERS))
        yield f"it has layers of type {strange}: expected only {expected}"
    if not hasattr(text, "num_hidden_layers"):
        yield "its config has no num_hidden_layers: expected one stack of attention layers"
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if head is None:
        yield "it has no language-model head: use the ...ForCausalLM class, not the bare model"
    elif name := _dynamically_quantised(model):
        yield (
            f"{name} is quantised by quantize_dynamic, which rounds by one scale for all tokens of "
            "a pass, so that a token's numbers depend on those beside it: leave it as it was, or "
            "quantise its weights only, for example with torchao's Int8WeightOnlyConfig"
        )
    elif head.weight.shape[0] > embedding.weight.shape[0]:
        yield (
            f"its output layer knows {head.weight.shape[0]} tokens and its embedding "
            f"{embedding.weight.shape[0]}: one that is chosen could not be read; give both one "
            "size (model.resize_token_embeddings)"
        )
    if getattr(text, "use_bidirectional_attention", False) in (True, "all"):
        yield (
            "its tokens see later ones (config.use_bidirectional_attention): "
            "expected a causal model"
        )
    if not rotary_tables(model):
        yield (
            "it has no rotary embedding (no buffer named inv_freq), so tokens cannot be put at one "
            "position: learned, absolute and ALiBi positions do not work"
        )
    if not model._can_set_attn_implementation():
        yield (
            "its attention cannot be exchanged (it does not go through transformers' "
            "AttentionInterface): a newer transformers may let it"
        )
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if "meta" in devices:
        yield f"some of its weights are not in memory (meta device, by offloading): {ONE_DEVICE}"
    elif len(devices) > 1:
        yield f"its weights are spread over {', '.join(devices)}: {ONE_DEVICE}"
    elif any(hasattr(module, "_hf_hook") for module in model.modules()):
        yield f"accelerate moves its weights or inputs between devices: {ONE_DEVICE}"


def _dynamically_quantised(model: nn.Module) -> str:
    """The first module that torch has quantised with its activations, "" if there is none."""
    home = "torch.ao.nn.quantized."
    modules = model.named_modules()
    return next((name for name, each in modules if type(each).__module__.startswith(home)), "")


def check_rotary_tables(model: PreTrainedModel, thetas: Mapping[str, float]) -> None:
    """Return if every rotary table named in `thetas` is theta^(-2i/D), else raise ModelError.

    transformers 4 drops the `rope_parameters` that transformers 5 saves, and falls back to theta
    10,000 in silence; text stays plausible. So the tables are computed again here, in float64.
    """
    tables = rotary_tables(model)
    for prefix, theta in thetas.items():
        leaf = f"{prefix}_inv_freq" if prefix else "inv_freq"
        named = {name: table for name, table in tables.items() if name.rpartition(".")[2] == leaf}
        if not named:
            raise ModelError(
                f"expected a rotary table {leaf!r} with theta {theta:g}; the model has "
                f"{sorted(tables)}. Another transformers version reads this config differently: "
                "upgrade transformers"
            )
        for name, table in named.items():
            size = 2 * table.numel()
            expected = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
            # A model cast as a whole has a rounded table, by its owner's choice: no wrong theta.
            rtol = max(ROTARY_RTOL, torch.finfo(table.dtype).eps)
            seen = table.detach().double().cpu()
            if not torch.allclose(seen, expected, rtol=rtol, atol=0):
                used = float(seen[-1]) ** (-size / (size - 2)) if size > 2 else math.nan
                raise ModelError(
                    f"rotary table {name!r} was made with theta {used:.6g}, expected {theta:g}: "
                    "every position would be wrong. transformers 4 does this to a config of "
                    "transformers 5; use transformers 5, or set rope_parameters in config.json"
                )


def check_stated_rotary(model: PreTrainedModel, theta: float | None, scaled: bool) -> None:
    """Return if the model's config has the rotary table that its GGUF file states.

    transformers takes some of a GGUF file's metadata over, by architecture, and the rest silently
    not. `theta` is the stated base, None if there is none; `scaled` whether the table is scaled.

    Raises:
        ModelError: if the config has another theta, or no scaling where the file states one.
    """
    tables = list(_rope_settings(model.config.get_text_config()).values())
    thetas = [float(table["rope_theta"]) for table in tables if "rope_theta" in table]
    if theta is not None and not any(math.isclose(theta, found, rel_tol=1e-6) for found in thetas):
        raise ModelError(
            f"the GGUF file states rotary theta {theta:g}, but transformers read {thetas}: every "
            "position would be wrong; use a folder with safetensors of that model"
        )
    if scaled and all(table.get("rope_type", "default") == "default" for table in tables):
        raise ModelError(
            "the GGUF file scales its rotary table, which transformers does not read: every "
            "position would be wrong; use a folder with safetensors of that model"
        )


def rotary_tables(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """{name: table}; a name ends in `inv_freq`, in Gemma 3 in `<layer type>_inv_freq`."""
    # First the text decoder, as image towers have tables of their own. Then all, as get_decoder()
    # may be the output layer of a model that calls it "decoder" (ModernBERT).
    for root in (model.get_decoder(), model):
        tables = {
            name: buffer
            for name, buffer in root.named_buffers()
            if name.endswith("inv_freq") and not name.endswith("original_inv_freq")
        }
        if tables:
            return tables
    return {}


def _rope_settings(text: Any) -> dict[str, Mapping[str, Any]]:
    """{prefix: settings of its rotary table}, for the layer types that the config uses."""
    rope = getattr(text, "rope_parameters", None) or {}
    nested = {key: value for key, value in rope.items() if isinstance(value, Mapping)} or {"": rope}
    used = set(getattr(text, "layer_types", None) or nested) | {""}
    return {prefix: value for prefix, value in nested.items() if prefix in used}


def _config_thetas(text: Any) -> dict[str, float]:
    """{prefix: theta} as the config says, for default tables (others are scaled by design)."""
    return {
        prefix: float(table["rope_theta"])
        for prefix, table in _rope_settings(text).items()
        if table.get("rope_type") == "default" and "rope_theta" in table
    }


def cache_keyword(model: PreTrainedModel) -> str:
    """What the model's forward calls its key-value cache: `cache` since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def context_length(text: Any) -> int:
    """The longest text in tokens that the config allows; ModelError if it does not say.

    A LongRoPE model has two rotary tables, and takes for a whole pass the one that its longest text
    needs. So texts end where it would switch: up to there each is computed as if it were alone.
    Llama 4 scales queries by a position that it counts itself, from `floor_scale` on.
    """
    lengths = [
        getattr(text, key, None) for key in ("max_position_embeddings", "attention_chunk_size")
    ]
    for table in _rope_settings(text).values():
        if table.get("rope_type") == "longrope":
            own = getattr(text, "original_max_position_embeddings", None)
            lengths.append(table.get("original_max_position_embeddings") or own)
    if getattr(text, "attn_temperature_tuning", False):
        lengths.append(getattr(text, "floor_scale", None))
    lengths = [int(length) for length in lengths if length]
    if not lengths:
        raise ModelError(
            "the config does not say how long a text may be; set config.max_position_embeddings"
        )
    return min(lengths)


def token_width(model: PreTrainedModel) -> int:
    """About how many numbers one token takes on its way through a layer, at most.

    They are a few hidden states, and what the widest matrix gives and the product made of it. A
    token that goes to several experts takes that much in each.
    """
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    outer = {id(weight) for end in ends if end is not None for weight in end.parameters()}
    inner = [weight for weight in model.parameters() if weight.ndim > 1 and id(weight) not in outer]
    widest = max((max(weight.shape[-2:]) for weight in inner), default=0)
    text: Any = model.config.get_text_config()
    experts = getattr(text, "num_experts_per_tok", None) or 1
    return 8 * ends[0].weight.shape[-1] + 4 * widest * experts


# Whose numbers round so little that two ways of computing agree.
_FINE = (torch.float32, torch.float64)


def coarse_dtypes(model: PreTrainedModel) -> set[torch.dtype]:
    """The dtypes of weights that are coarser than float32; int8 stands for quantised ones."""
    found = set()
    for weight in model.parameters():
        if type(weight) is not nn.Parameter or not weight.dtype.is_floating_point:
            found.add(torch.int8)
        elif weight.dtype not in _FINE:
            found.add(weight.dtype)
    # modules that keep quantised weights as buffers
    buffers = {buffer.dtype for buffer in model.buffers()}
    return found | ({torch.int8} & buffers)


def check_autocast(device: torch.device) -> None:
    """Raises ModelError under `torch.autocast`, which rounds on the way what should be compared."""
    if torch.is_autocast_enabled(device.type):
        raise ModelError(
            "torch.autocast is on, which computes some layers in another dtype than the model's; "
            "leave its block, and choose the dtype when the model is loaded"
        )


def has_experts(model: PreTrainedModel) -> bool:
    """Whether some layers send each token to a few of several experts, as their modules are called.

    Rows that go to one expert share its matrix product. So a row's last bits depend on its mates.
    """
    for name, module in model.named_modules():
        called = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
        if "expert" in called or "moe" in called.replace(str(model.config.model_type), ""):
            return True
    return False


def eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """The end-of-sequence tokens that any of the model's configs names."""
    ids: set[int] = set()
    for config in (model.generation_config, model.config, model.config.get_text_config()):
        eos = getattr(config, "eos_token_id", None)
        ids.update([] if eos is None else [eos] if isinstance(eos, int) else eos)
    return frozenset(ids)


def layer_windows(text: Any) -> tuple[int | None, ...]:
    """The sliding window of each layer in positions, None for a full layer, as the config says."""
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
