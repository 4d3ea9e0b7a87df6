"""What stands in the residual stream: read through the unembedding, put elsewhere, handed on.

Shapes: L layers, w members of a set, w' members of the next one, E size of a residual, G slots of
all sets, N slots in all, H query heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tempo.engine import generate_batch
from tempo.errors import ModelError, SpecError
from tempo.inputs import checked, conform, instance, model, seen
from tempo.models import LanguageModel
from tempo.residual import Change, Place, place_of
from tempo.spec import RunSpec
from tempo.trace import Trace

# Residuals that are unembedded at once, which bounds the memory of their logits.
ROWS = 256
_trace = instance("Trace", "tempo.generate")


@dataclass(frozen=True, eq=False)
class LensStep:
    """What each layer would predict at the members of one set.

    Row l is read from the residual before layer l, row L from that after the last, which is what
    the model predicts.

    Attributes:
        tokens: [L + 1, w], the most probable token.
        texts: The text of each of them.
        probabilities: [L + 1, w], of the most probable token.
        kl: [L + 1, w], KL(row L || row l) in nats: how far a layer is from what is predicted.
        ranks: [L + 1, w, w'], how many tokens are more probable than each token of the next set. A
            last set has no next one, and w' is 0.
        shares: [L + 1, w, w'], the probability of each token of the next set.
    """

    tokens: np.ndarray
    texts: list[list[str]]
    probabilities: np.ndarray
    kl: np.ndarray
    ranks: np.ndarray
    shares: np.ndarray


@dataclass(frozen=True, eq=False)
class Lens:
    """What each layer would predict at every member of a run, by the model's own unembedding.

    Attributes:
        trace: The run that was read.
        steps: One `LensStep` for each set.
    """

    trace: Trace = field(repr=False)
    steps: list[LensStep] = field(repr=False)

    def __repr__(self) -> str:
        return f"<Lens of {len(self.steps)} sets, layers 0 to {len(self.steps[0].kl) - 1}>"


@checked(lm=model, trace=_trace)
def lens(lm: LanguageModel, trace: Trace) -> Lens:
    """What each layer would predict at each member: the logit lens over a whole run.

    A residual goes through all that the model does after its last layer: final norm, output
    weights, and scaling or capping of logits (nostalgebraist 2020, "interpreting GPT: the logit
    lens"). Early layers do not write for the unembedding. So a large distance there need not mean
    that nothing is known.

    Args:
        lm: The model of the run.
        trace: A run with "residual" captured.

    Raises:
        SpecError: if residuals were not captured, or are those of another model.
        ModelError: if the model does something else after its last layer.

    Example:
        >>> import tempo
        >>> lm = tempo.load_model("tiny")
        >>> trace = tempo.generate(lm, "The cat", threshold=0.05, max_steps=3, capture="residual")
        >>> found = tempo.lens(lm, trace)
        >>> found.steps[0].kl.shape  # (layers + 1, members)
        (4, 3)
        >>> float(found.steps[0].kl[-1].max())  # after the last layer stands what is predicted
        0.0
        >>> bool(found.steps[0].ranks[-1].min() == 0)  # the next set's first token leads somewhere
        True
    """
    steps = []
    for k, residual in enumerate(_residuals(lm, trace)):
        after = trace.steps[k + 1].tokens if k + 1 < len(trace.steps) else []
        steps.append(_lens_step(lm, residual, after))
    return Lens(trace, steps)


def _residuals(lm: LanguageModel, trace: Trace) -> list[np.ndarray]:
    """The residuals [L + 1, w, E] of each set; SpecError unless they are this model's."""
    size = _size(lm)
    found = []
    for step in trace.steps:
        if step.residual is None:
            raise SpecError("the run holds no residuals; generate it with capture='residual'")
        if (len(step.residual), step.residual.shape[2]) != (lm.num_layers + 1, size):
            raise SpecError(
                f"the run's residuals are {list(step.residual.shape)}; expected those of "
                f"{lm.name}, [{lm.num_layers + 1}, w, {size}]"
            )
        found.append(step.residual)
    return found


def _size(lm: LanguageModel) -> int:
    try:
        return lm.residual_stream.size
    except ModelError as error:
        raise SpecError(f"{error}; residuals of this model cannot be used") from None


def _lens_step(lm: LanguageModel, residual: np.ndarray, after: Sequence[int]) -> LensStep:
    """What each layer would predict at the members of a set, given residuals [L + 1, w, E]."""
    num_layers, width, _ = residual.shape
    at_once = max(1, ROWS // num_layers)
    parts: list[tuple[np.ndarray, ...]] = []
    for first in range(0, width, at_once):
        logits = unembed(lm, residual[:, first : first + at_once])
        logs = logits.double().log_softmax(dim=-1)  # [L + 1, members, V]
        final = logs[-1:]
        kl = (final.exp() * (final - logs).nan_to_num(0.0)).sum(dim=-1).clamp_min(0.0)
        top = logs.max(dim=-1)
        of_next = logs[..., list(after)]
        ranks = [(logs > of_next[..., i : i + 1]).sum(dim=-1) for i in range(len(after))]
        ranked = torch.stack(ranks, dim=-1) if ranks else of_next.long()
        found = (top.indices, top.values.exp(), kl, ranked, of_next.exp())
        parts.append(tuple(each.cpu().numpy() for each in found))
    joined = [np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True)]
    tokens, probabilities, kl, ranks_found, shares = joined
    texts = [[lm.token_text(int(token)) for token in row] for row in tokens]
    return LensStep(tokens, texts, probabilities, kl, ranks_found, shares)


@checked(lm=model)
@torch.inference_mode()
def unembed(lm: LanguageModel, residual: np.ndarray | Tensor) -> Tensor:
    """The logits [..., V] that the model makes of residuals [..., E] after its last layer.

    One token is forwarded, and the residuals take the place of what its last layer gives. So final
    norm, output weights, scaling and capping are the model's own.

    Raises:
        SpecError: if these are no residuals of this model.
        ModelError: if the model does something else after its last layer.
    """
    try:
        given = torch.as_tensor(residual, dtype=lm.dtype, device=lm.device)
    except (TypeError, ValueError, RuntimeError):
        raise SpecError(
            f"unembed: residual is {seen(residual)}; expected an array [..., E]"
        ) from None
    if given.ndim == 0 or given.shape[-1] != _size(lm):
        raise SpecError(
            f"unembed: residual has the shape {list(given.shape)}; expected [..., {_size(lm)}]"
        )
    rows = given.reshape(1, -1, given.shape[-1])
    with _ending_in(lm.residual_stream.layers[-1], rows):
        token = torch.zeros(1, 1, dtype=torch.long, device=lm.device)
        logits = lm.model(input_ids=token, position_ids=token, use_cache=False).logits
    if logits.shape != (1, rows.shape[1], lm.vocab_size):
        raise ModelError(
            f"{type(lm.model).__name__} gives logits {list(logits.shape)} for {rows.shape[1]} "
            "residuals, so that it does more after its last layer than unembed them"
        )
    return logits[0].reshape(*given.shape[:-1], -1)


@contextmanager
def _ending_in(layer: nn.Module, rows: Tensor) -> Iterator[None]:
    """Within the block, a layer gives these residuals [1, n, E] whatever enters it."""

    def instead(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return rows if isinstance(output, Tensor) else (rows, *output[1:])

    handle = layer.register_forward_hook(instead)
    try:
        yield
    finally:
        handle.remove()


@checked(lm=model, source=_trace)
def patch(
    lm: LanguageModel,
    source: Trace,
    target: RunSpec | Trace,
    at: Iterable[Place] | Mapping[Place, Place],
) -> Trace:
    """The target's run with residuals of another run in the places of its own.

    The target is run alone. A run that was made alone stays the same to the bit if its own
    residuals are put back.

    Args:
        lm: The model of both runs.
        source: A run with "residual" captured.
        target: The settings of the run that is patched. Of a trace, its sets are replayed under its
            settings, so that places stay what they are.
        at: The places (step, member, layer), the same in both runs; or a mapping from a place of
            the target to one of the source, such as from a member to its sibling. Layer l is before
            layer l, and L after the last one.

    Raises:
        SpecError: if the source has no residual at a place, or the target no such place.

    Example:
        >>> import tempo
        >>> lm = tempo.load_model("tiny")
        >>> spec = tempo.RunSpec(prompt="ab", replay=[[1, 2], [3]], capture=("logits", "residual"))
        >>> plain = tempo.generate_batch(lm, [spec])[0]
        >>> other = tempo.generate_batch(lm, [spec.but(prompt="xy")])[0]
        >>> itself = tempo.patch(lm, plain, spec, at=[(1, 0, 2)])
        >>> bool((itself.steps[1].logits == plain.steps[1].logits).all())  # to the bit
        True
        >>> patched = tempo.patch(lm, other, spec, at=[(1, 0, 3)])  # 3: after the last layer
        >>> bool(abs(patched.steps[1].logits - other.steps[1].logits).max() < 1e-4)
        True
        >>> swapped = tempo.patch(lm, plain, spec, at={(0, 0, 1): (0, 1, 1)})  # a sibling's
    """
    if isinstance(target, Trace):
        target = target.spec.but(replay=target)
    if not isinstance(target, RunSpec):
        raise SpecError(f"patch: target is {seen(target)}; expected a RunSpec or a Trace")
    residuals = _residuals(lm, source)
    hooks = {}
    for place, taken in _pairs(at):
        step, member, layer = taken
        fits = step < len(residuals) and member < residuals[step].shape[1]
        if not fits or layer > lm.num_layers:
            raise SpecError(
                f"patch: the source has no residual at {taken} (step, member, layer); it has the "
                f"widths {source.widths} and the layers 0 to {lm.num_layers}"
            )
        hooks[place] = _constant(residuals[step][layer, member])
    return generate_batch(lm, [target], hooks=[hooks])[0]


def _pairs(at: Any) -> list[tuple[Place, Place]]:
    """Places of the target, each with the place of the source; SpecError if they are none."""
    if isinstance(at, str | bytes) or not isinstance(at, Iterable):
        raise SpecError(f"patch: at is {seen(at)}; expected places such as [(1, 0, 12)]")
    pairs = at.items() if isinstance(at, Mapping) else ((place, place) for place in at)
    rule = "patch: at"
    return [(conform(place_of, rule, one), conform(place_of, rule, other)) for one, other in pairs]


def _constant(residual: np.ndarray) -> Change:
    """A hook that puts this residual [E] in the place of any."""
    return lambda _: residual


@checked(trace=_trace)
def as_transformer_lens(trace: Trace) -> dict[str, Tensor]:
    """What a run captured, by the names of TransformerLens' hooks, with a batch of one.

    `ActivationCache(as_transformer_lens(trace), model)` makes a cache of it. Its positions are the
    slots of the sets, in order (G); the prompt's are not recorded. All that is there is given:

    - "residual": `blocks.0.hook_resid_pre` and `blocks.0.hook_resid_post`, [1, G, E]
    - "attention": `blocks.0.attn.hook_pattern`, [1, H, G, N], zero where slots come later
    - "kv": `blocks.0.attn.hook_k` before and `hook_rot_k` after rotation, and `hook_v`,
      [1, N, Hkv, D], of all slots

    Example:
        >>> import tempo
        >>> from tempo.interpret import as_transformer_lens
        >>> lm = tempo.load_model("tiny")
        >>> trace = tempo.generate(lm, "The cat", threshold=0.05, max_steps=3, capture="residual")
        >>> cache = as_transformer_lens(trace)
        >>> cache["blocks.2.hook_resid_post"].shape  # six tokens in three sets
        torch.Size([1, 6, 64])
    """
    cache: dict[str, Tensor] = {}
    for layer, states in enumerate(_joined(trace, "residual", 1)):
        tensor = torch.from_numpy(states)[None]
        cache[f"blocks.{layer}.hook_resid_pre"] = tensor
        if layer:
            cache[f"blocks.{layer - 1}.hook_resid_post"] = tensor
    # what comes out of the last layer enters none
    cache.pop(f"blocks.{len(cache) // 2}.hook_resid_pre", None)
    for layer, weights in enumerate(_joined(trace, "attention", 2)):
        cache[f"blocks.{layer}.attn.hook_pattern"] = torch.from_numpy(weights)[None]
    for name, kept in (("k", "raw_keys"), ("rot_k", "keys"), ("v", "values")):
        for layer, states in enumerate(getattr(trace, kept) if trace.keys is not None else ()):
            by_slot = torch.from_numpy(states).transpose(0, 1)
            cache[f"blocks.{layer}.attn.hook_{name}"] = by_slot[None]
    if not cache:
        raise SpecError(
            "the run holds no residuals, attention or keys; capture 'residual' to export it"
        )
    return cache


@checked(lm=model, trace=_trace)
def as_nnsight(lm: LanguageModel, trace: Trace) -> dict[str, Tensor]:
    """The residuals of a run by module, as nnsight names what enters and leaves it: [1, G, E].

    `found["model.layers.0.output"]` is laid out as `model.model.layers[0].output` of nnsight is,
    with the slots of the sets as its tokens.

    Example:
        >>> import tempo
        >>> from tempo.interpret import as_nnsight
        >>> lm = tempo.load_model("tiny")
        >>> trace = tempo.generate(lm, "The cat", threshold=0.05, max_steps=3, capture="residual")
        >>> sorted(as_nnsight(lm, trace))[:2]
        ['model.layers.0.input', 'model.layers.0.output']
    """
    _residuals(lm, trace)
    names = {module: name for name, module in lm.model.named_modules()}
    states = torch.from_numpy(_joined(trace, "residual", 1))[:, None]
    found = {}
    for layer, module in enumerate(lm.residual_stream.layers):
        found[f"{names[module]}.input"] = states[layer]
        found[f"{names[module]}.output"] = states[layer + 1]
    return found


def _joined(trace: Trace, name: str, axis: int) -> np.ndarray:
    """An array of all steps, joined along its members; nothing if it was not captured.

    Attention is widened to all slots by zeros.
    """
    arrays = [getattr(step, name) for step in trace.steps]
    if any(array is None for array in arrays):
        return np.zeros(0, np.float32)
    if name == "attention":
        later = [trace.num_slots - array.shape[-1] for array in arrays]
        arrays = [
            np.pad(array, ((0, 0), (0, 0), (0, 0), (0, more)))
            for array, more in zip(arrays, later, strict=True)
        ]
    return np.concatenate(arrays, axis=axis)
