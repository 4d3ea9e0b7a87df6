"""The oracle: TEMPO by brute force, one full forward pass a step, no cache and no batch.

It shares with the engine nothing but spec, selection and trace, so that it cannot inherit the
engine's mistakes. Every mask entry is decided by asking the definition for one pair of slots, and
transformers' own eager attention does the rest. docs/semantics.md states the definition.

Shapes: N slots, L layers, H query heads, Hkv key heads, w set width, D head size, V vocabulary.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tempo.inputs import checked, conform, model
from tempo.models import LanguageModel
from tempo.residual import Change, Hooks, hooks_by_place
from tempo.run import Run
from tempo.selection import Selection, member_weights, read_out, select
from tempo.spec import (
    Capture,
    IsolatedMass,
    Positions,
    Prompt,
    PruneBy,
    Readout,
    RunSpec,
    Visibility,
    Weighting,
)
from tempo.trace import Step, Trace

# The log probability of a token that a model rules out, which a replay may force all the same.
_IMPOSSIBLE = -1e4


class _Slot(NamedTuple):
    token: int
    position: int
    step: int  # -1 for the prompt
    set_id: int
    bias: float  # what the weighting adds to the attention logits of this key
    log_weight: float  # of this member among those of its set
    ancestors: dict[int, float]  # how probably each earlier generated slot came before this one


@checked(lm=model)
def generate(
    lm: LanguageModel,
    prompt: Prompt,
    *,
    threshold: float = 0.1,
    schedule: Sequence[float] | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    sample: int | None = None,
    seed: int = 0,
    max_steps: int = 10,
    visibility: Visibility = "isolated",
    positions: Positions = "shared",
    readout: Readout = "mixture",
    weighting: Weighting = "none",
    prune: float | None = None,
    prune_by: PruneBy = "posterior",
    max_width: int | None = None,
    stop_at_eos: bool = True,
    replay: Sequence[Sequence[int]] | Trace | None = None,
    replay_positions: Sequence[Sequence[int]] | None = None,
    replay_weights: Sequence[Sequence[float]] | None = None,
    replay_links: Sequence[Sequence[Sequence[float]]] | None = None,
    weighting_layers: tuple[int, int] | None = None,
    isolated_layers: tuple[int, int] | None = None,
    isolated_mass: IsolatedMass = "spread",
    capture: Capture | Iterable[Capture] = (),
    hooks: Hooks | None = None,
) -> Trace:
    """The trace that `tempo.generate` gives, to rounding, by brute force.

    It has no cache, no batch and no attention function of tempo's. It is slow: one forward pass
    over all slots a step. Use it to check the engine on a model of your own.

    Args:
        lm: The model, from `load_model` or `wrap_model`.
        prompt: Text, or token ids in any form that a tokenizer or `lm.chat` returns: a list, an
            array or tensor [P] or [1, P], a list of one list, or a mapping with `input_ids`.
        threshold: Every token with at least this probability joins the set. If no token reaches
            it, the most probable one joins alone. 0 lets every token in, for another rule to
            choose from.
        schedule: Thresholds by step, instead of `threshold`; the last one holds for later steps.
        top_k: Only the k most probable tokens may join a set.
        top_p: Only the most probable tokens that together first reach this probability may join.
        min_p: Only tokens with at least this share of the top probability may join.
        sample: Draw so many of the tokens that may join, without replacement, each in proportion
            to its probability. None takes all of them.
        seed: Of the draws. The same seed, prompt and step give the same draw.
        max_steps: A free run generates at most this many sets. A replay runs all its sets.
        visibility: Which siblings a sibling attends to: none (`isolated`), all (`visible`), or
            those in earlier slots (`causal`).
        positions: One rotary position for a whole set (`shared`), or the next position for each
            token (`sequential`, the control).
        readout: How the members' logits become the one next distribution: the mixture of their
            softmaxes by probability (`mixture`), the softmax of their mean (`mean_logits`), or
            the softmax of one member (`last`, `first`).
        weighting: What is added to the attention logits of keys in sets wider than one: nothing
            (`none`), -log n for n members (`count`), the log of the member's share
            (`probability`), or the log of the probability that this member came before the one
            that attends (`posterior`; `best_parent` keeps only the most probable path to it).
        prune: Drop an earlier member for all later queries once its posterior, over the members
            of the newest set, is below this. The most probable one of each set stays.
        prune_by: What is compared with `prune`: the `posterior`, or the member's share of the
            `attention` that its set got from the newest forwarded set, over layers and heads.
        max_width: Only this many of the most probable tokens join a set; None sets no limit.
        stop_at_eos: Whether a run ends after a set that an end-of-sequence token leads. Such a
            token that does not lead is then never appended.
        replay: Token sets to force, one a step, instead of choosing; or a Trace, whose sets are
            taken. Their order is the order of the slots. A set may hold one token twice.
        replay_positions: With a replay, the rotary position of each member of each set, instead
            of what `positions` gives.
        replay_weights: With a replay, the weight of each member of each set (1 leaves it as it
            is), instead of what `weighting` gives. Its log is added to that key's attention
            logits.
        replay_links: With a replay and weighting `posterior` or `best_parent`, the probability
            that each member came before each member of the next set, [w, w'] for every set but
            the last, instead of what the members predict. Columns sum to one.
        weighting_layers: The layers (first, end), end excluded, in which `weighting` or
            `replay_weights` count. None means all. It excludes `isolated_layers`.
        isolated_layers: The layers (first, end), end excluded, in which siblings are isolated
            whatever `visibility` says.
        isolated_mass: Where a sibling's attention goes in those layers: to all it still sees
            (`spread`), or to itself (`self`: its own key counts for all n members, +log n).
        capture: What to record beside the sets, one name or several: "attention" [L, H, w, N],
            "siblings" (the set's own columns of attention, [L, H, w, w]), "logits" [w, V], "kv"
            (keys and values [L, Hkv, N, D]), "residual" (the stream before each layer and after
            the last, [L + 1, w, E]).
        hooks: Functions by (step, member, layer). Each gets the residual [E] of that member before
            that layer (L: after the last one) and returns what takes its place.

    Returns:
        A `Trace` with the arrays that `capture` names, in the shapes of `tempo.generate`. Its
        provenance says `oracle`, and its `peak_bytes` is 0.

    Raises:
        SpecError: if a setting is unknown or cannot be run.

    Example:
        >>> import tempo
        >>> lm = tempo.load_model("tiny")
        >>> exact = tempo.reference.generate(lm, "The cat", threshold=0.05, max_steps=3)
        >>> exact.sets == tempo.generate(lm, "The cat", threshold=0.05, max_steps=3).sets
        True
    """
    settings: dict[str, Any] = {
        "prompt": prompt,
        "threshold": threshold,
        "schedule": schedule,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "sample": sample,
        "seed": seed,
        "max_steps": max_steps,
        "visibility": visibility,
        "positions": positions,
        "readout": readout,
        "weighting": weighting,
        "prune": prune,
        "prune_by": prune_by,
        "max_width": max_width,
        "stop_at_eos": stop_at_eos,
        "replay": replay,
        "replay_positions": replay_positions,
        "replay_weights": replay_weights,
        "replay_links": replay_links,
        "weighting_layers": weighting_layers,
        "isolated_layers": isolated_layers,
        "isolated_mass": isolated_mass,
        "capture": capture,
    }
    spec, began = RunSpec(**settings), time.perf_counter()
    changed: Hooks = conform(hooks_by_place, "hooks", hooks)
    # refused for what the engine refuses
    prompt_tokens = Run(lm, 0, spec, hooks=changed).prompt
    slots = [_Slot(token, i, -1, i, 0.0, 0.0, {}) for i, token in enumerate(prompt_tokens)]
    dropped: dict[int, int] = {}  # from which step on a slot is not seen any more
    steps: list[dict[str, Any]] = []
    read, probabilities, stop_reason = [len(slots) - 1], [1.0], ""
    num_steps = len(spec.replay) if spec.replay else spec.max_steps
    while not stop_reason:
        k = len(steps)
        output = _full_forward(lm, spec, slots, dropped, changed)
        _record(steps, output, read, spec)
        distribution = read_out(output.logits[read], probabilities, spec.readout)
        if spec.replay:
            forced = list(spec.replay[k])
            chosen = Selection(forced, distribution[forced].tolist(), [], False)
        else:
            eos = lm.eos_token_ids if spec.stop_at_eos else frozenset()
            chosen = select(distribution, **spec.rules(k, prompt_tokens), eos=eos)
        probabilities, before = chosen.probabilities, read
        read = list(range(len(slots), len(slots) + len(chosen.tokens)))
        slots += _new_slots(spec, chosen, k, len(prompt_tokens), len(slots))
        if spec.readout == "mixture":
            links = _links(slots, output.logits, before, read)
            if k and spec.replay_links:
                links = [list(row) for row in spec.replay_links[k - 1]]
            if k:
                steps[-1]["links"] = np.array(links, dtype=np.float32)
            _add_ancestors(slots, links, before, read, spec)
            gone = _improbable(slots, output.attention, before, read, spec, dropped)
            dropped |= dict.fromkeys(sorted(gone), k)
        steps.append(
            {
                "tokens": chosen.tokens,
                "probabilities": probabilities,
                "position": slots[read[0]].position,
                "slots": read,
                "texts": lm.token_texts(chosen.tokens),
                "ended": chosen.ended,
                "dropped": [slot for slot, step in dropped.items() if step == k],
                "distribution": distribution.numpy(),
            }
        )
        if chosen.stops or k + 1 == num_steps:
            stop_reason = "eos" if chosen.stops else "replay" if spec.replay else "max_steps"
    output = _full_forward(lm, spec, slots, dropped, changed)
    _record(steps, output, read, spec)
    return Trace(
        spec=spec,
        prompt_tokens=prompt_tokens,
        steps=[Step(**step) for step in steps],
        slot_token=np.array([slot.token for slot in slots]),
        slot_position=np.array([slot.position for slot in slots]),
        slot_step=np.array([slot.step for slot in slots]),
        stop_reason=stop_reason,
        seconds=time.perf_counter() - began,
        peak_bytes=0,
        provenance=lm.provenance() | {"oracle": True},
        prompt_texts=[lm.token_text(token) for token in prompt_tokens],
        **output.kv,
    )


def _new_slots(
    spec: RunSpec, chosen: Selection, step: int, num_prompt: int, num_slots: int
) -> list[_Slot]:
    """The slots of one set: their positions, and what `weighting` adds to their keys."""
    slots = []
    for i, token in enumerate(chosen.tokens):
        position = num_prompt + step if spec.positions == "shared" else num_slots + i
        if spec.replay_positions:
            position = spec.replay_positions[step][i]
        bias = 0.0
        if spec.replay_weights:
            bias = math.log(spec.replay_weights[step][i])
        elif len(chosen.tokens) > 1 and spec.weighting == "count":
            bias = -math.log(len(chosen.tokens))
        elif len(chosen.tokens) > 1 and spec.weighting == "probability":
            bias = math.log(float(member_weights(chosen.probabilities)[i]))
        slots.append(_Slot(token, position, step, num_prompt + step, bias, 0.0, {}))
    return slots


def _links(
    slots: list[_Slot], logits: Tensor, before: Sequence[int], read: Sequence[int]
) -> list[list[float]]:
    """How probably each of the slots `before` came before each of the slots `read`, by Bayes.

    Gives the slots `read` their weights: the sum over `before` of weight times prediction.
    """
    predicted = logits[list(before)].double().log_softmax(dim=-1).clamp_min(_IMPOSSIBLE)
    joint = []
    for i, slot in enumerate(before):
        weight = slots[slot].log_weight
        joint.append([weight + float(predicted[i, slots[member].token]) for member in read])
    totals = [_log_sum(column) for column in zip(*joint, strict=True)]
    for member, total in zip(read, totals, strict=True):
        slots[member] = slots[member]._replace(log_weight=total - _log_sum(totals))
    return [[math.exp(log - totals[u]) for u, log in enumerate(row)] for row in joint]


def _log_sum(logs: Sequence[float]) -> float:
    most = max(logs)
    return most + math.log(sum(math.exp(log - most) for log in logs))


def _add_ancestors(
    slots: list[_Slot],
    links: list[list[float]],
    before: Sequence[int],
    read: Sequence[int],
    spec: RunSpec,
) -> None:
    """Give each of the slots `read` the probability that each earlier slot came before it.

    It is the sum over all parents, or, with `best_parent`, what the most probable parent has.
    """
    for u, member in enumerate(read):
        parents = [row[u] for row in links]
        if spec.weighting == "best_parent":
            best = parents.index(max(parents))
            parents = [float(i == best) for i in range(len(parents))]
        ancestors: dict[int, float] = {}
        for parent, probability in zip(before, parents, strict=True):
            if slots[parent].step >= 0:
                ancestors[parent] = probability
            for older, weight in slots[parent].ancestors.items():
                ancestors[older] = ancestors.get(older, 0.0) + weight * probability
        slots[member] = slots[member]._replace(ancestors=ancestors)


def _improbable(
    slots: Sequence[_Slot],
    attention: np.ndarray | None,
    before: Sequence[int],
    read: Sequence[int],
    spec: RunSpec,
    dropped: Mapping[int, int],
) -> set[int]:
    """The slots of earlier sets that `prune` drops now."""
    if spec.prune is None:
        return set()
    shares: dict[int, float] = {}
    if spec.prune_by == "posterior":
        for member in read:
            for older, weight in slots[member].ancestors.items():
                added = math.exp(slots[member].log_weight) * weight
                shares[older] = shares.get(older, 0.0) + added
    elif attention is not None:
        newest = slots[before[0]].step
        for older in (i for i, slot in enumerate(slots) if 0 <= slot.step < newest):
            for member in before:
                given = float(attention[:, :, member, older].mean())
                added = math.exp(slots[member].log_weight) * given
                shares[older] = shares.get(older, 0.0) + added
    found = set()
    for older, share in shares.items():
        of_set = [slot for slot in shares if slots[slot].step == slots[older].step]
        total = sum(shares[slot] for slot in of_set)
        if older in dropped or not total > 0 or share / total >= spec.prune:
            continue
        seen = [slot for slot in of_set if slot not in dropped]
        if older != max(seen, key=lambda slot: (shares[slot], -slot)):
            found.add(older)
    return found


def _may_attend(
    query: int,
    key: int,
    slots: Sequence[_Slot],
    visibility: str,
    window: int | None,
    dropped: Mapping[int, int],
) -> bool:
    """Whether slot `query` attends to slot `key`."""
    if key in dropped and slots[query].step >= dropped[key]:
        return False
    if window is not None and slots[query].position - slots[key].position >= window:
        return False
    if slots[key].set_id < slots[query].set_id or key == query:
        return True
    same_set = slots[key].set_id == slots[query].set_id
    return same_set and (visibility == "visible" or (visibility == "causal" and key < query))


def _weighs(spec: RunSpec, layer: int) -> bool:
    """Whether members are weighted in this layer."""
    layers = spec.weighting_layers
    return layers is None or layers[0] <= layer < layers[1]


def _bias(query: int, key: int, slots: Sequence[_Slot], visibility: str, weighting: str) -> float:
    """What is added to the attention logit of an allowed pair of slots.

    Later queries get it, and the key's own set only if its members all see each other. What
    depends on the query is never added within a set.
    """
    later = slots[key].set_id < slots[query].set_id
    if weighting in ("posterior", "best_parent"):
        weight = slots[query].ancestors.get(key, 1.0)  # a prompt token is in no one's ancestors
        return math.log(weight) if weight > 0 else -math.inf
    return slots[key].bias if later or visibility == "visible" else 0.0


def _isolates(spec: RunSpec, layer: int) -> bool:
    """Whether this layer isolates siblings whatever the visibility is."""
    return (
        spec.isolated_layers is not None
        and spec.isolated_layers[0] <= layer < spec.isolated_layers[1]
    )


def _mask(
    slots: Sequence[_Slot],
    spec: RunSpec,
    isolates: bool,
    weighs: bool,
    window: int | None,
    dropped: Mapping[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """The additive mask [1, 1, N, N] of a layer, pair by pair."""
    visibility = "isolated" if isolates else spec.visibility

    def entry(query: int, key: int) -> float:
        if _may_attend(query, key, slots, visibility, window, dropped):
            return _bias(query, key, slots, visibility, spec.weighting) if weighs else 0.0
        return -math.inf

    num_slots = len(slots)
    rows = [[entry(query, key) for key in range(num_slots)] for query in range(num_slots)]
    if isolates and spec.isolated_mass == "self":
        for query, slot in enumerate(slots):
            rows[query][query] += math.log(sum(other.set_id == slot.set_id for other in slots))
    return torch.tensor(rows, dtype=dtype)[None, None]


class _Output(NamedTuple):
    logits: Tensor  # [N, V]
    attention: np.ndarray | None  # [L, H, N, N]
    # keys, values and, where a projection gives them, raw_keys [L, Hkv, N, D], if captured
    kv: dict[str, np.ndarray]
    residual: np.ndarray | None  # [L + 1, N, E]


@torch.inference_mode()
def _full_forward(
    lm: LanguageModel,
    spec: RunSpec,
    slots: Sequence[_Slot],
    dropped: Mapping[int, int],
    hooks: Hooks,
) -> _Output:
    """Every slot from scratch, by eager attention under an explicit mask and positions."""
    kinds = [
        (_isolates(spec, layer), _weighs(spec, layer), window)
        for layer, window in enumerate(lm.layer_windows)
    ]
    made = {kind: _mask(slots, spec, *kind, dropped, lm.dtype).to(lm.device) for kind in set(kinds)}
    masks = [made[kind] for kind in kinds]
    cache: Any = DynamicCache()  # new for each pass, read afterwards and thrown away
    captured = "attention" in spec.capture or "siblings" in spec.capture
    wanted = captured or spec.prune_by == "attention"
    with ExitStack() as stack:
        stack.enter_context(_eager(lm))
        if any(lm.layer_windows) or spec.isolated_layers or spec.weighting_layers:
            stack.enter_context(_masks_by_layer(lm, masks))
        raw = stack.enter_context(_raw_keys(lm)) if "kv" in spec.capture else None
        last = stack.enter_context(_last_residual(lm)) if "residual" in spec.capture else None
        changed = stack.enter_context(_hooked(lm, slots, hooks))
        output = lm.model(
            input_ids=torch.tensor([[slot.token for slot in slots]], device=lm.device),
            position_ids=torch.tensor([[slot.position for slot in slots]], device=lm.device),
            attention_mask=masks[0],
            use_cache=True,
            output_attentions=wanted,
            output_hidden_states=last is not None,
            **{lm.cache_keyword: cache},
        )
    logits, attention = output.logits[0], None
    if logits.dtype != torch.float64:
        logits = logits.float()
    if wanted:
        attention = torch.cat([weights.float().cpu() for weights in output.attentions]).numpy()
    kv = {} if raw is None else _cached(cache)
    before = torch.cat(raw).numpy() if raw else None
    # those of a norm that comes after the rotation are none (NanoChat)
    if before is not None and (before != kv["keys"]).any():
        kv["raw_keys"] = before
    residual = None
    if last is not None:  # transformers' own last one has been through the final norm
        states = [*output.hidden_states[: lm.num_layers], *last]
        residual = torch.cat([state.float().cpu() for state in states]).numpy()
        for layer, slot, state in changed:  # transformers looks before the hooks do
            residual[layer, slot] = state.float().cpu().numpy()
    return _Output(logits.cpu(), attention, kv, residual)


def _cached(cache: Any) -> dict[str, np.ndarray]:
    layers = {
        name: [getattr(layer, name).float().cpu() for layer in cache.layers]
        for name in ("keys", "values")
    }
    return {name: torch.cat(tensors).numpy() for name, tensors in layers.items()}


def _record(steps: list[dict[str, Any]], output: _Output, slots: list[int], spec: RunSpec) -> None:
    """Keep what the members of the last set gave in this pass."""
    if not steps:
        return
    if "logits" in spec.capture:
        steps[-1]["logits"] = output.logits[slots].float().numpy()
    if output.residual is not None:
        steps[-1]["residual"] = output.residual[:, slots]
    if "attention" in spec.capture and output.attention is not None:
        steps[-1]["attention"] = output.attention[:, :, slots]
    if "siblings" in spec.capture and output.attention is not None:
        steps[-1]["siblings"] = output.attention[:, :, slots][..., slots]


@contextmanager
def _eager(lm: LanguageModel) -> Iterator[None]:
    before: Any = lm.model.config._attn_implementation
    lm.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        lm.model.set_attn_implementation(before)


def _self_attention(lm: LanguageModel) -> list[Any]:
    """The model's attention modules by layer, found by what transformers calls them."""
    found: list[Any] = [
        m
        for m in lm.model.modules()
        # that of an image tower has no number
        if getattr(m, "layer_idx", None) is not None and type(m).__name__.endswith("Attention")
    ]
    return sorted(found, key=lambda module: module.layer_idx)


def _blocks(lm: LanguageModel) -> list[nn.Module]:
    """The decoder layers: the numbered modules that the attention modules are parts of, by name."""
    names = {module: name for name, module in lm.model.named_modules()}
    found = []
    for attention in _self_attention(lm):
        numbered = re.match(r".*?\.\d+(?=\.)", names[attention])
        assert numbered is not None, names[attention]
        found.append(lm.model.get_submodule(numbered[0]))
    return found


@contextmanager
def _last_residual(lm: LanguageModel) -> Iterator[list[Tensor]]:
    """What the last decoder layer gives, [1, N, E], once a pass is made."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])

    handle = _blocks(lm)[-1].register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def _hooked(
    lm: LanguageModel, slots: Sequence[_Slot], hooks: Hooks
) -> Iterator[list[tuple[int, int, Tensor]]]:
    """Every slot of a hooked member gets its changed residual, whichever pass it is in.

    Yields a list that the pass fills with layer, slot and changed residual [E].
    """
    blocks, changed = _blocks(lm) if hooks else [], []
    first = {slot.step: i for i, slot in reversed(list(enumerate(slots)))}

    def put(states: Tensor, layer: int, slot: int, change: Change) -> Tensor:
        states = states.clone()
        states[0, slot] = torch.as_tensor(change(states[0, slot].clone()))
        changed.append((layer, slot, states[0, slot]))
        return states

    def before(put: Any, module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (put(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": put(kwargs["hidden_states"])}

    def after(put: Any, module: Any, args: Any, output: Any) -> Any:
        return put(output) if isinstance(output, Tensor) else (put(output[0]), *output[1:])

    with ExitStack() as stack:
        for (step, member, layer), change in hooks.items():
            if step not in first:
                continue  # that set has not been chosen yet
            own = partial(put, layer=layer, slot=first[step] + member, change=change)
            if layer < len(blocks):
                hook = partial(before, own)
                handle = blocks[layer].register_forward_pre_hook(hook, with_kwargs=True)
            else:
                handle = blocks[-1].register_forward_hook(partial(after, own))
            stack.callback(handle.remove)
        yield changed


@contextmanager
def _masks_by_layer(lm: LanguageModel, masks: Sequence[Tensor]) -> Iterator[None]:
    """Give each layer its own mask: a ready-made 4-D mask bypasses transformers' windows."""

    def replace(
        module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs | {"attention_mask": masks[module.layer_idx]}

    handles = [m.register_forward_pre_hook(replace, with_kwargs=True) for m in _self_attention(lm)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# What attention modules call a norm of keys that may come after their rotation: Llama 4, HunYuan.
OTHER_NORMS = ("qk_norm", "key_layernorm", "k_layernorm")


@contextmanager
def _raw_keys(lm: LanguageModel) -> Iterator[list[Tensor]]:
    """The keys [1, Hkv, N, D] of each layer, as the projection or the norm after it gives them.

    None of a model that makes queries, keys and values in one projection, or that has a norm of
    keys of another name. These may be normalised after their rotation.
    """
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if output.dim() == 3:  # a projection: heads side by side
            output = output.unflatten(-1, (lm.num_key_value_heads, lm.head_dim)).transpose(1, 2)
        elif output.shape[1] != lm.num_key_value_heads:
            # a norm that comes before heads and slots change places
            output = output.transpose(1, 2)
        found.append(output.float().cpu())

    handles, modules = [], _self_attention(lm)
    is_plain = not any(hasattr(module, name) for module in modules for name in OTHER_NORMS)
    for module in modules if is_plain else ():
        source = getattr(module, "k_norm", None) or getattr(module, "k_proj", None)
        if source is not None:
            handles.append(source.register_forward_hook(keep))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
