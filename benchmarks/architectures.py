"""Compare the engine with the oracle on every causal-LM architecture of transformers.

The result is the registry tempo/architectures.json, which says what runs. Each architecture is
built tiny and at random from its own config class. Weights are large enough that attention matters.
A sliding window, where there is one, is shorter than the text.
`python -m benchmarks.architectures` measures all and rewrites the entries of the installed version.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import transformers
from packaging.version import Version
from rich.progress import track
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import tempo
from tempo import LanguageModel, ModelError, RunSpec, Trace
from tempo.spec import VISIBILITIES
from tempo.support import REGISTRY, read_registry, reasons_against

WINDOW = 6  # positions
# Every config gets the sizes it knows. They are small, with grouped queries, several experts,
# and a window shorter than the text.
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 128, "sliding_window": WINDOW,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "ffn_dim": 96, "decoder_ffn_dim": 96, "encoder_ffn_dim": 96,
}  # fmt: skip
# Latent attention: a latent narrower than the heads, and values of another size than keys.
LATENT: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}
# The parts of a multimodal config that are not its text model.
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "num_blocks": 1,
    "nemo_conv_channels": 8,
    "ext_pw_out_channel": 16,
    "input_size": 16,
}
FULL, SLIDING = "full_attention", "sliding_attention"
SHARED_KEYS: dict[str, Any] = {
    "num_kv_shared_layers": 2,
    "layer_types": [SLIDING, FULL] * 2,
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 16,
}
GEMMA_4 = SHARED_KEYS | {"per_layer_config": {"1": {"head_dim": 24}, "3": {"head_dim": 24}}}
# The default of 1 makes attention so sharp that rounding errors grow.
GRANITE = {"attention_multiplier": 0.25}
GRANITES = ("granite", "granitemoe", "granitemoeshared", "granite_swa", "granitemoe_swa")
GEMMAS_4 = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")
# What a config needs beside `SIZES`: its own rules, or features that its defaults leave out.
# `...` removes a size.
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(GRANITES, GRANITE),
    **dict.fromkeys(GEMMAS_4, GEMMA_4),
    "lfm2": {"layer_types": ["conv", FULL] * 2},
    "lfm2_moe": {"layer_types": ["conv", FULL] * 2},
    "cohere_compass_text": {
        "layer_types": [SLIDING, FULL] * 2,
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": 1e6},
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "dbrx": {
        "d_model": 64, "n_heads": 4, "n_layers": 4, "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {
            "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64,
        },
    },
    "gemma3n_text": SHARED_KEYS | {"activation_sparsity_pattern": [0.0] * 4},
    "longcat_flash": {
        "num_layers": 2, "num_hidden_layers": ..., "zero_expert_num": 2, "head_dim": 8,
        "expert_ffn_hidden_size": 32, "ffn_hidden_size": 96, "qk_head_dim": 16, "moe_topk": 2,
    },
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "mimo_v2_flash": {"head_dim": 24},
    "zamba": {"num_hidden_layers": 12},
    "zamba2": {"num_hidden_layers": ...},
}  # fmt: skip
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
# These are refused whatever their size, and `SIZES` would break their rules.
# Their own defaults are enough to show the refusal.
AS_THEY_COME: dict[str, dict[str, Any]] = {
    "dots3_note": {},
    "gpt_neo": {},
    "plbart": {},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "reformer": {"is_decoder": True},
    "whisper": {},
    "xlnet": {},
    "zaya": {},
}
_DRAFTER = "it drafts from the hidden states of another model and is no language model of its own"
_AUDIO = "an encoder-decoder for audio whose config AutoModelForCausalLM cannot build"
# Types that cannot be built here as a language model of their own, and why.
NOT_BUILT = {
    "gemma3n": "its image tower needs the timm package, so it was not measured; "
    "its text model is gemma3n_text",
    "gemma4_assistant": _DRAFTER,
    "gemma4_unified_assistant": _DRAFTER,
    "musicgen": _AUDIO,
    "musicgen_melody": _AUDIO,
}

# Two prompts, so that a batch mixes lengths. The longer one and its sets exceed the window by far.
PROMPTS = (list(range(20, 32)), [7, 41, 9])
SETS = ((5, 6, 7), (8,), (9, 10, 11, 12, 13), (14, 15), (16,), (17, 18), (19,), (20, 21, 22), (23,))
# In units of the logit range, float32: a hundred roundings.
MAX_DEVIATION = 1e-5
# In units of the logit range, between modes. Below it, attention does not matter in the model,
# and the comparison would test nothing.
MIN_EFFECT = 1e-3
MAX_ATTENTION_DEVIATION = 1e-4


@dataclass(frozen=True)
class Entry:
    """What is known of one architecture under one transformers version."""

    # The name of the class.
    architecture: str
    # "supported"; "refused" at load; "not measured" if transformers cannot build a small one here.
    status: str
    # Empty if supported.
    reason: str
    # The largest difference of a logit from the oracle's, in units of the logit range.
    deviation: float | None = None
    # The largest difference of an attention weight from the oracle's. Rows are renormalised first,
    # because conventions about sinks differ.
    attention_deviation: float | None = None
    # The largest difference of a logit between two visibilities, in units of the logit range.
    effect: float | None = None
    # The experiments, and single claims, that are not applicable to it; None if none was tried on
    # it. `benchmarks.families` tries them.
    inapplicable: list[str] | None = None


def build(model_type: str, device: str = "cpu", **sizes: int) -> Any:
    """A tiny random model of this type in which attention matters.

    On the "meta" device it has no weights. `sizes` go before `SIZES` and `OVERRIDES`.
    """
    with quiet():
        config = tiny_config(model_type, **sizes)
        # transformers 5.0 asks for a padding token where its configs lack one
        for part in (config, config.get_text_config(decoder=True)):
            if not hasattr(part, "pad_token_id"):
                part.pad_token_id = None
        with torch.device(device), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = AutoModelForCausalLM.from_config(config).eval()
    if device != "meta":
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim >= 2:
                    std = 1.0 if "embed" in name else 1.5 / math.sqrt(weight.shape[-1])
                    weight.normal_(std=std, generator=generator)
                elif "sink" in name:
                    weight.normal_(generator=generator)
    return model


def tiny_config(model_type: str, **others: int) -> Any:
    """The type's own config class, at `SIZES`, or `others` where they name the same."""
    kind: Any = CONFIG_MAPPING[model_type]
    if model_type in AS_THEY_COME:
        return kind(**AS_THEY_COME[model_type])
    default = kind()
    text = default.get_text_config(decoder=True)
    sizes = {key: value for key, value in (SIZES | others).items() if knows(text, key)}
    if knows(text, "qk_rope_head_dim"):
        sizes |= {key: value for key, value in LATENT.items() if knows(text, key)}
        sizes.pop("head_dim", None)  # in latent attention, the size of the rotated part
    sizes |= OVERRIDES.get(model_type, {})
    sizes |= {key: value for key, value in others.items() if knows(text, key)}
    sizes = {key: value for key, value in sizes.items() if value is not ...}
    parts = {key: getattr(default, key, None) for key in default.sub_configs}
    small: dict[str, Any] = {}
    for key, part in parts.items():
        if part is not None and part is not text:
            tower = {name: size for name, size in TOWER.items() if knows(part, name)}
            small[key] = part.to_dict() | tower
    own = next((key for key, part in parts.items() if part is text), None)
    if own is None:
        # the text config is the config itself, or (in encoder-decoders) a view of it
        return kind(**small | {key: value for key, value in sizes.items() if knows(default, key)})
    return kind(**small | {own: sizes})


def knows(config: Any, key: str) -> bool:
    """Whether the config has this key, per layer or for all."""
    return key in config.to_dict() or key in getattr(config, "attribute_map", {})


def measure(model_type: str) -> Entry:
    """Whether tempo runs the type, and how far it is from the oracle."""
    name = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    if model_type in NOT_BUILT:
        return Entry(name, "not measured", NOT_BUILT[model_type])
    try:
        shell = build(model_type, "meta")
    # these come from transformers' own code
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}".partition("\n")[0]
        reason = f"transformers {transformers.__version__} cannot build it here: {problem}"
        return Entry(name, "not measured", reason)
    try:
        refuse_without_weights(shell)
        with quiet(), tempo.wrap_model(build(model_type), name=model_type) as lm:
            return compare(lm, name)
    except ModelError as error:
        return Entry(name, "refused", str(error))


def refuse_without_weights(shell: Any) -> None:
    """ModelError if the architecture cannot run, whatever its weights.

    This comes before any weights are made, so that no large model is built to be refused.
    """
    reasons = [reason for reason in reasons_against(shell) if "meta device" not in reason]
    if reasons:
        tempo.wrap_model(shell)  # raises as it would for a user
        raise AssertionError(
            f"{type(shell).__name__} has reasons against it but was not refused: {reasons}"
        )
    size = sum(parameter.numel() for parameter in shell.parameters())
    if size > 2e7:
        largest = sorted(shell.named_parameters(), key=lambda pair: -pair[1].numel())[:3]
        shapes = [(name, tuple(parameter.shape)) for name, parameter in largest]
        raise AssertionError(f"not tiny: {size / 1e6:.0f}M parameters, such as {shapes}")


def specs() -> list[RunSpec]:
    """Runs of both prompts in every visibility, and one under posteriors, with the same sets.

    Its posteriors are given. Those that a model predicts feed its rounding back from set to set.
    After five wide sets two random models were then 1e-4 of the logit range from the oracle.
    """
    capture = ("attention", "logits")
    plain = [
        RunSpec(prompt=prompt, replay=SETS, visibility=visibility, capture=capture)
        for prompt in PROMPTS
        for visibility in VISIBILITIES
    ]
    links = [_links(len(before), len(after)) for before, after in itertools.pairwise(SETS)]
    return [*plain, plain[0].but(weighting="posterior", replay_links=links)]


def _links(width: int, next_width: int) -> list[list[float]]:
    """Unequal shares of a set's members before each member of the next set, [w, w']."""
    weights = 1.0 + (np.arange(width)[:, None] + np.arange(next_width)) % 3
    return (weights / weights.sum(axis=0)).tolist()


def compare(lm: LanguageModel, architecture: str) -> Entry:
    """An entry from comparing the engine's batch with the oracle's single runs.

    AssertionError if they differ too much, or if the modes differ too little to test anything.
    """
    runs = tempo.generate_batch(lm, specs())
    pairs = [(run, tempo.reference.generate(lm, **run.spec.model_dump())) for run in runs]
    spread = max(float(np.ptp(step.logits)) for _, exact in pairs for step in exact.steps)
    logits = significant(max(difference(run, exact, "logits") for run, exact in pairs) / spread)
    attention = significant(max(difference(run, exact, "attention") for run, exact in pairs))
    # each prompt's first two runs are two visibilities
    firsts = (0, len(VISIBILITIES))
    between_modes = min(difference(runs[i], runs[i + 1], "logits") for i in firsts)
    effect = significant(between_modes / spread)
    entry = Entry(architecture, "supported", "", logits, attention, effect)
    exact_enough = logits <= MAX_DEVIATION and attention <= MAX_ATTENTION_DEVIATION
    if not (exact_enough and effect >= MIN_EFFECT):
        raise AssertionError(f"silently wrong, or not tested: {entry}")
    return entry


def difference(one: Trace, other: Trace, name: str) -> float:
    """The largest difference of any entry of this array in any step."""
    gaps = []
    for step, other_step in zip(one.steps, other.steps, strict=True):
        a, b = getattr(step, name), getattr(other_step, name)
        if name == "attention":
            # conventions about sinks differ
            a, b = (weights / weights.sum(-1, keepdims=True) for weights in (a, b))
        gaps.append(float(np.abs(a - b).max()))
    return max(gaps)


def significant(value: float) -> float:
    """The value to two digits. The rest differs between processors."""
    return float(f"{value:.1e}")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' remarks on unusual sizes."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(before)


def write(entries: Mapping[str, Entry]) -> None:
    """Replace the registry's entries of the installed transformers.

    What experiments found on an architecture is kept.
    """
    registry = read_registry()
    before = registry.get(transformers.__version__, {})
    kept = {name: before.get(name, {}).get("inapplicable") for name in entries}
    found = {
        name: asdict(entry) | {"inapplicable": kept[name]}
        for name, entry in sorted(entries.items())
    }
    save_registry(registry | {transformers.__version__: found})


def save_registry(registry: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the registry, a line an architecture."""
    blocks = []
    for release in sorted(registry, key=Version):
        lines = [
            f"  {json.dumps(name)}: {json.dumps(entry, ensure_ascii=False)}"
            for name, entry in registry[release].items()
        ]
        blocks.append(f" {json.dumps(release)}: {{\n" + ",\n".join(lines) + "\n }")
    REGISTRY.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")


def main() -> int:
    """Measure all, print what is wrong, write the registry; 1 if something is wrong."""
    torch.set_num_threads(1)  # the matrices are tiny: a second thread only waits
    names = sys.argv[1:] or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    entries, wrong = {}, {}
    for name in track(names, description="architectures", disable=not sys.stderr.isatty()):
        try:
            entries[name] = measure(name)
        except Exception as error:
            if len(names) == 1:
                raise
            wrong[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
    for name, entry in entries.items():
        supported = entry.status == "supported"
        result = f"deviation {entry.deviation:.1e}" if supported else entry.reason[:150]
        print(f"{name:28}", entry.status, result)
    for name, problem in wrong.items():
        print(f"{name:28} PROBLEM {problem[:300]}")
    counts = Counter(entry.status for entry in entries.values())
    print(f"transformers {transformers.__version__}: {dict(counts)}, {len(wrong)} problems")
    if not wrong and not sys.argv[1:]:
        write(entries)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
