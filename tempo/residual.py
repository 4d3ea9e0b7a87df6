"""The residual stream of a pass: what its decoder layers hand on, read and changed on the way.

Nothing of the model is replaced. Hooks of torch are registered on its decoder layers for one pass
and removed again. Residual l is what enters layer l. Residual L is what the last layer gives,
before the final norm.

Shapes: L layers, T packed tokens, n tokens that are read, E numbers of a residual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from tempo.errors import ModelError, SpecError
from tempo.inputs import seen, whole

NUM_TRIED = 4  # tokens of the pass that shows what layers hand on

# Step, member and layer of a residual: which set, which token of it, before which layer (L: after
# the last).
Place: TypeAlias = tuple[int, int, int]
# From the residual of one token, [E], to what takes its place.
Change: TypeAlias = Callable[[Tensor], Any]
Hooks: TypeAlias = Mapping[Place, Change]


def hooks_by_place(value: Any) -> dict[Place, Change]:
    """Hooks by (step, member, layer) as a dict of plain numbers and functions; {} of None.

    Raises:
        ValueError: if they are something else.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError("expected a mapping from (step, member, layer) to a function")
    found = {}
    for at, change in value.items():
        if not callable(change):
            raise ValueError(f"expected a function of a residual at {seen(at)}")
        found[place_of(at)] = change
    return found


def place_of(value: Any) -> Place:
    """A place as three plain numbers.

    Raises:
        ValueError: if it is something else.
    """
    try:
        step, member, layer = (whole(0)(number) for number in value)
    except (ValueError, TypeError):
        raise ValueError(
            f"expected places as (step, member, layer), whole numbers from 0, not {seen(value)}"
        ) from None
    return step, member, layer


class Stream(NamedTuple):
    """The decoder layers of a model, [L], and E, the size of what they hand on."""

    layers: tuple[nn.Module, ...]
    size: int


@dataclass
class Tap:
    """What one pass does to its residual stream.

    Attributes:
        rows: The packed tokens whose residuals are read, [n]. None reads nothing.
        changes: By layer, packed tokens and the function that changes the residual of each.
        found: Filled by the pass: the residuals that were read, [n, E] for each of L + 1 layers.
    """

    rows: Tensor | None
    changes: Mapping[int, Sequence[tuple[int, Change]]]
    found: list[Tensor]

    def at(self, layer: int, hidden: Tensor) -> Tensor:
        """The residuals [1, T, E] at a layer, changed where asked for; they are read after that."""
        if changes := self.changes.get(layer):
            hidden = hidden.clone()
            for token, change in changes:
                hidden[0, token] = _changed(change, hidden[0, token], layer)
        if self.rows is not None:
            self.found.append(hidden[0].index_select(0, self.rows))
        return hidden


def _changed(change: Change, residual: Tensor, layer: int) -> Tensor:
    """What a hook puts in the place of a residual [E], checked."""
    given = change(residual.clone())
    try:
        found = torch.as_tensor(given, dtype=residual.dtype, device=residual.device)
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None or found.shape != residual.shape:
        what = f"shape {list(found.shape)}" if found is not None else seen(given)
        raise SpecError(
            f"a hook at layer {layer} returned {what}; expected the changed residual, a tensor or "
            f"array of {len(residual)} numbers"
        )
    return found


@contextmanager
def tapped(stream: Stream, tap: Tap) -> Iterator[None]:
    """Within the block, a pass reads and changes its residual stream as `tap` says."""
    changes = set(tap.changes)

    def before(layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = tap.at(layer, _entering(args, kwargs))
            if layer not in changes:
                return None  # the layer gets the very arguments that it would get without a hook
            if args:
                return (hidden, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": hidden}

        return hook

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = tap.at(len(stream.layers), _leaving(output))
        if len(stream.layers) not in changes:
            return None
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    with ExitStack() as stack:
        for number, layer in enumerate(stream.layers):
            handle = layer.register_forward_pre_hook(before(number), with_kwargs=True)
            stack.callback(handle.remove)
        stack.callback(stream.layers[-1].register_forward_hook(after).remove)
        yield


def _entering(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The residuals among the arguments of a decoder layer."""
    return args[0] if args else kwargs.get("hidden_states")


def _leaving(output: Any) -> Any:
    """The residuals among what a decoder layer returns: alone, or first of several."""
    return output[0] if isinstance(output, tuple | list) else output


@torch.inference_mode()
def find_stream(model: Any, attention_modules: Sequence[nn.Module], num_layers: int) -> Stream:
    """The decoder layers of a model, found by its attention modules, and the size of a residual.

    A few tokens are forwarded to see what the layers hand on.

    Raises:
        ModelError: if there is no residual stream that each layer takes whole from the one before.
    """
    kind = type(model).__name__
    layers = _decoder_layers(model, attention_modules, num_layers)
    if layers is None:
        raise ModelError(
            f"{kind} has no list of {num_layers} decoder layers with one attention each, so what "
            "stands between its layers cannot be told"
        )
    called: list[nn.Module] = []
    entered: list[Any] = []
    left: list[Any] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called.append(module)
        entered.append(_entering(args, kwargs))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        left.append(_leaving(output))

    embedding: Any = model.get_input_embeddings()
    index = torch.arange(NUM_TRIED, device=embedding.weight.device)
    with ExitStack() as stack:
        for layer in layers:
            hook = layer.register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(hook.remove)
            stack.callback(layer.register_forward_hook(after).remove)
        tokens = (index % embedding.weight.shape[0])[None]
        model(input_ids=tokens, position_ids=index[None], use_cache=False)
    is_plain = all(isinstance(hidden, Tensor) and hidden.ndim == 3 for hidden in (*entered, *left))
    shapes = {hidden.shape[:-1] for hidden in (*entered, *left)} if is_plain else set()
    if called != list(layers) or len(left) != num_layers or shapes != {(1, NUM_TRIED)}:
        raise ModelError(
            f"the decoder layers of {kind} do not each hand on one state a token, [1, T, E], so "
            "that there is no residual stream to read"
        )
    for number, (given, taken) in enumerate(zip(left, entered[1:], strict=False)):
        if given.shape != taken.shape or not torch.equal(given, taken):
            raise ModelError(
                f"{kind} changes the state between its layers {number} and {number + 1}, so that "
                "no one residual stands there"
            )
    return Stream(layers, entered[0].shape[-1])


def _decoder_layers(
    model: nn.Module, attention_modules: Sequence[nn.Module], num_layers: int
) -> tuple[nn.Module, ...] | None:
    """The modules of a list whose i-th one holds the attention of layer i, and of no other."""
    wanted = set(attention_modules)
    for listed in model.modules():
        if not isinstance(listed, nn.ModuleList) or len(listed) < num_layers:
            continue
        layers = tuple(listed)[:num_layers]
        held = []
        for layer in layers:
            held.append([module for module in layer.modules() if module in wanted])
        if held == [[attention] for attention in attention_modules]:
            return layers
    return None
