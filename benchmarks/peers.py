"""Greedy decoding with attention and logits captured, in tempo and in the libraries beside it.

Every peer takes prompts and returns `Captured`. nnsight and TransformerLens are
optional (the extra `peers`). Both change the modules they wrap, so each gets a copy of the model.
The copy shares the model's weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tempo
from tempo import LanguageModel, RunSpec
from tempo.attention import installed

Prompts = Sequence[Sequence[int]]
# Tokens of a page of keys in continuous batching.
PAGE = 32


class Captured(NamedTuple):
    """What one way of decoding gave, in whatever shape it captures."""

    tokens: list[list[int]]  # the new tokens, [runs][steps]
    attention: list[Any]
    logits: list[Any]


Peer = Callable[[Prompts], Captured]


def same_runs(one: Sequence[list[int]], other: Sequence[list[int]]) -> str:
    """How many runs chose the same tokens, in words."""
    return f"{sum(a == b for a, b in zip(one, other, strict=True))} of {len(one)}"


def greedy(prompt: Sequence[int], num_steps: int, **settings: Any) -> RunSpec:
    """A greedy run of exactly `num_steps` tokens."""
    return RunSpec(
        prompt=list(prompt), max_width=1, max_steps=num_steps, stop_at_eos=False, **settings
    )


def with_tempo(lm: LanguageModel, num_steps: int) -> Peer:
    """All runs in one batch."""

    def decode(prompts: Prompts) -> Captured:
        specs = [greedy(prompt, num_steps, capture=("attention", "logits")) for prompt in prompts]
        traces = tempo.generate_batch(lm, specs, max_rows=len(specs))
        found = Captured([], [], [])
        for trace in traces:
            found.tokens.append([step.tokens[0] for step in trace.steps])
            found.attention.extend(step.attention for step in trace.steps)
            found.logits.extend(step.logits for step in trace.steps)
        return found

    return decode


def generate(
    lm: LanguageModel, implementation: str, prompts: Prompts, num_steps: int, **options: Any
) -> Any:
    """What transformers' own greedy generate gives for prompts, padded on the left to one length.

    Each run has exactly `num_steps` new tokens.
    """
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    rows = [[0] * few + list(prompt) for few, prompt in zip(padding, prompts, strict=True)]
    seen = [[0] * few + [1] * (longest - few) for few in padding]
    with installed(lm.model, implementation):
        return lm.model.generate(
            torch.tensor(rows, device=lm.device),
            attention_mask=torch.tensor(seen, device=lm.device),
            max_new_tokens=num_steps,
            min_new_tokens=num_steps,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            **options,
        )


def with_generate(
    lm: LanguageModel,
    num_steps: int,
    *,
    capture: bool = True,
    together: bool = False,
    last: bool = False,
) -> Peer:
    """transformers' generate, one run after another or all in one batch.

    With `capture` it is eager and keeps attentions and logits. Without, it is sdpa and keeps none.
    With `last` it makes one step more, as it captures of a token only once the next one is chosen.
    """
    implementation = "eager" if capture else "sdpa"
    options = {"output_attentions": True, "output_logits": True} if capture else {}

    def decode(prompts: Prompts) -> Captured:
        batches = [prompts] if together else [[prompt] for prompt in prompts]
        more = num_steps + last
        found = [generate(lm, implementation, batch, more, **options) for batch in batches]
        tokens = [row[-more:] for output in found for row in output.sequences.tolist()]
        tokens = [row[:num_steps] for row in tokens]
        attentions = [output.attentions for output in found]
        return Captured(tokens, attentions, [output.logits for output in found])

    return decode


def with_continuous(lm: LanguageModel, num_steps: int) -> Peer:
    """transformers' continuous batching of all runs, which captures nothing. Keys lie in pages."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    settings: dict[str, Any] = {"max_new_tokens": num_steps, "min_new_tokens": num_steps}
    # no token has this id, so that nothing ends early
    config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=-1, **settings)

    def decode(prompts: Prompts) -> Captured:
        tokens = len(prompts) * (len(prompts[0]) + num_steps)
        # as much as is needed: by itself it takes most of the memory that is free
        size = {"num_blocks": PAGE + tokens // PAGE + len(prompts), "max_batch_tokens": tokens}
        batching = ContinuousBatchingConfig(page_size=PAGE, **size)
        with installed(lm.model, "sdpa"):
            found = lm.model.generate_batch(
                list(map(list, prompts)),
                generation_config=config,
                continuous_batching_config=batching,
            )
        # in the order in which they were asked for, whichever ended first
        runs = sorted(found.values(), key=lambda run: int(run.request_id.rpartition("_")[2]))
        return Captured([list(run.generated_tokens) for run in runs], [], [])

    return decode


def with_nnsight(lm: LanguageModel, num_steps: int) -> Peer:
    """nnsight's traced generate, one run after another.

    The trace of each step keeps the weights of every layer and the logits.
    """
    from nnsight.modeling.transformers import TransformersModel  # pyright: ignore[reportMissingImports]

    own = _copy(lm.model)
    own.set_attn_implementation("eager")
    model = TransformersModel(own, tokenizer=_tokenizer(lm), task="text-generation")

    def one(prompt: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        ids = torch.tensor([prompt], device=lm.device)
        options = {
            "max_new_tokens": num_steps,
            "min_new_tokens": num_steps,
            "do_sample": False,
            "pad_token_id": 0,
        }
        with model.generate(ids, attention_mask=torch.ones_like(ids), **options) as tracer:
            attention, logits = list().save(), list().save()
            for _ in tracer.iter[:num_steps]:
                for layer in model.model.layers:
                    attention.append(layer.self_attn.output[1])
                logits.append(model.lm_head.output[:, -1])
        return attention, logits

    def decode(prompts: Prompts) -> Captured:
        found = [one(prompt) for prompt in prompts]
        tokens = [torch.cat(logits).argmax(dim=-1).tolist() for _, logits in found]
        attentions = [attention for attention, _ in found]
        return Captured(tokens, attentions, [logits for _, logits in found])

    return decode


def with_transformer_lens(lm: LanguageModel, num_steps: int) -> Peer:
    """A loop of TransformerLens' `run_with_cache`, one run after another.

    Each step runs the whole text so far and keeps the attention pattern of every layer.
    """
    from transformer_lens.model_bridge import TransformerBridge  # pyright: ignore[reportMissingImports]

    bridge = TransformerBridge.boot_transformers(
        lm.name,
        hf_model=_copy(lm.model),
        tokenizer=_tokenizer(lm),
        device=str(lm.device),
        dtype=lm.dtype,
    )

    def one(prompt: Sequence[int]) -> tuple[list[int], list[Any], list[Tensor]]:
        ids = torch.tensor([prompt], device=lm.device)
        patterns, kept = [], []
        with torch.inference_mode():
            for _ in range(num_steps):
                logits, activations = bridge.run_with_cache(
                    ids, names_filter=lambda name: name.endswith("attn.hook_pattern")
                )
                patterns.append(activations)
                kept.append(logits[:, -1].clone())
                ids = torch.cat([ids, kept[-1].argmax(dim=-1, keepdim=True)], dim=1)
        return ids[0, -num_steps:].tolist(), patterns, kept

    def decode(prompts: Prompts) -> Captured:
        tokens, patterns, logits = zip(*(one(prompt) for prompt in prompts), strict=True)
        return Captured(list(tokens), list(patterns), list(logits))

    return decode


# name: (package, what makes it a peer)
OPTIONAL = {
    "nnsight": ("nnsight", with_nnsight),
    "TransformerLens": ("transformer-lens", with_transformer_lens),
}


def versions() -> dict[str, str | None]:
    """The release of each optional peer, or None where it is not installed."""
    found: dict[str, str | None] = {}
    for name, (package, _) in OPTIONAL.items():
        try:
            found[name] = version(package)
        except PackageNotFoundError:
            found[name] = None
    return found


def optional_peers(lm: LanguageModel, num_steps: int) -> dict[str, Peer]:
    """The installed ones of `OPTIONAL`, around this model."""
    return {name: make(lm, num_steps) for name, (_, make) in OPTIONAL.items() if versions()[name]}


def _copy(model: Any) -> Any:
    """The same model with modules of its own and shared weights."""
    return copy.deepcopy(model, memo={id(parameter): parameter for parameter in model.parameters()})


def _tokenizer(lm: LanguageModel) -> Any:
    """A tokenizer that the constructors accept. Nothing is tokenized here.

    It has no beginning-of-text token. With one, TransformerLens would load it again from the hub.
    """
    tokenizer = copy.deepcopy(lm.tokenizer or tempo.load_model("tiny").tokenizer)
    tokenizer.bos_token = None
    return tokenizer
