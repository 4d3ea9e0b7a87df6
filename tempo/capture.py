"""What a run records beyond its sets, and exactly how much memory that takes before it starts.

Shapes: L layers, H query heads, Hkv key heads, w set width, N_k slots once set k is in, N slots at the end,
D head size, V vocabulary, P prompt.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from tempo.errors import MemoryBudgetError, ModelError, TraceError
from tempo.models import LanguageModel
from tempo.spec import CAPTURES, RunSpec
from tempo.trace import STEP_ARRAYS, made_folder

# Rounding may let the probabilities of a float32 softmax sum to slightly more than one, and so one more token in.
SUM_SLACK = 1e-5
# A run may take this part of the memory that is free when it starts, unless a budget is given.
FREE_MEMORY_SHARE = 0.5
# What a spool takes: what is recorded of each step.
SPOOLED = STEP_ARRAYS


def widest_set(spec: RunSpec, vocab_size: int) -> int:
    """The most tokens that can reach the threshold at one step: floor(1 / threshold), capped."""
    bound = max(1, math.floor((1.0 + SUM_SLACK) / spec.threshold))
    return min(bound, vocab_size, spec.max_width or bound)


def trace_bytes(
    lm: LanguageModel, spec: RunSpec, num_prompt: int, widths: Sequence[int] | None = None
) -> dict[str, int]:
    """Bytes of every array a run's trace and cache hold, by name.

    Exact for given `widths` (taken from the replay if there is one); otherwise for the widest sets the threshold
    allows, an upper bound. attention: sum over steps of L*H*w*N_k*4; siblings: of L*H*w*w*4; logits: sum of w*V*4; kv: L*Hkv*N*(2*D+Dv)*4;
    distribution: steps*V*4; cache: L*Hkv*N*(D+Dv)*size of the model's dtype (keys of size D, values of size Dv).
    """
    if widths is None:
        free = [widest_set(spec, lm.vocab_size)] * spec.max_steps
        widths = [len(tokens) for tokens in spec.replay] if spec.replay else free
    slots = num_prompt + np.cumsum(np.asarray(widths, dtype=np.int64))
    num_slots = int(slots[-1])
    keys, values = (
        sum(sizes[0] * sizes[i] for sizes in lm.key_value_sizes) for i in (1, 2)
    )  # numbers a slot, all layers
    sizes = {
        "distribution": len(widths) * lm.vocab_size * 4,
        "cache": (keys + values) * num_slots * lm.dtype.itemsize,
        "attention": lm.num_layers * lm.num_heads * int(np.dot(widths, slots)) * 4,
        "siblings": lm.num_layers * lm.num_heads * int(np.dot(widths, widths)) * 4,
        "logits": sum(widths) * lm.vocab_size * 4,
        "kv": (2 * keys + values) * num_slots * 4,
    }
    return {
        name: size for name, size in sizes.items() if name not in CAPTURES or name in spec.capture
    }


def rows_that_fit(
    lm: LanguageModel,
    specs: Sequence[RunSpec],
    num_prompts: Sequence[int],
    max_rows: int,
    budget: int | None = None,
    spool: str | Path | None = None,
) -> int:
    """How many of these runs, at most `max_rows`, can be under way at once, whichever they are; MemoryBudgetError if not even one."""
    budget = memory_budget(budget)
    sizes = [
        _needed(lm, spec, num_prompt, spool)
        for spec, num_prompt in zip(specs, num_prompts, strict=True)
    ]
    largest = sorted(range(len(specs)), key=lambda i: -sizes[i])[:max_rows]
    fitting = int((np.cumsum([sizes[i] for i in largest]) <= budget).sum())
    together = largest[: max(1, fitting)]
    check_budget(
        lm, [specs[i] for i in together], [num_prompts[i] for i in together], budget, spool
    )
    return fitting


def memory_budget(given: int | None = None) -> int:
    """Bytes that runs may take: `given`, or a share of the memory that is free now."""
    return int(psutil.virtual_memory().available * FREE_MEMORY_SHARE) if given is None else given


def _needed(lm: LanguageModel, spec: RunSpec, num_prompt: int, spool: str | Path | None) -> int:
    return sum(
        size
        for name, size in trace_bytes(lm, spec, num_prompt).items()
        if not (spool and name in SPOOLED)
    )


def check_budget(
    lm: LanguageModel,
    specs: Sequence[RunSpec],
    num_prompts: Sequence[int],
    budget: int | None,
    spool: str | Path | None = None,
) -> None:
    """Nothing, or MemoryBudgetError with the bytes these runs need together and the settings that would fit.

    With a spool, the disk must have room for what goes there.
    """
    budget = memory_budget(budget)

    def total(**changes: Any) -> int:
        changed = [spec.but(**changes) if changes else spec for spec in specs]
        return sum(_needed(lm, s, p, spool) for s, p in zip(changed, num_prompts, strict=True))

    needed = total()
    parts: dict[str, int] = {}
    for spec, num_prompt in zip(specs, num_prompts, strict=True):
        for name, size in trace_bytes(lm, spec, num_prompt).items():
            parts[name] = parts.get(name, 0) + size
    if spool:
        spooled, free = (
            sum(parts.pop(name, 0) for name in SPOOLED),
            shutil.disk_usage(made_folder(spool)).free,
        )
        if spooled > free:
            raise MemoryBudgetError(
                f"{len(specs)} run(s) may spool {_gib(spooled)} ({spooled} bytes) to {spool}, where {_gib(free)} are free; "
                "capture less, lower max_width or max_steps, or name a folder on a larger disk"
            )
    if needed <= budget:
        return
    remedies = []
    if all(spec.replay is None for spec in specs):
        for name, most in (
            ("max_width", max(widest_set(spec, lm.vocab_size) for spec in specs)),
            ("max_steps", max(spec.max_steps for spec in specs)),
        ):
            fits = _largest_that_fits(lambda n, name=name: total(**{name: n}) <= budget, most)
            if fits:
                remedies.append(f"{name}={fits}")
    captured = [name for name in CAPTURES if name in parts]
    for name in sorted(captured, key=lambda name: -parts[name]):
        if needed - parts[name] <= budget:
            remedies.append(f"capture without '{name}'")
            break
    if not spool and needed - sum(parts.get(name, 0) for name in SPOOLED) <= budget:
        remedies.append("spool=FOLDER (attention, logits and distributions on its disk)")
    if len(specs) > 1:
        remedies.append(
            f"{max(1, len(specs) * budget // needed)} of the {len(specs)} runs at a time (tempo.stream keeps none)"
        )
    remedies.append(f"memory_budget={needed}")
    detail = ", ".join(
        f"{name} {_gib(size)}" for name, size in sorted(parts.items(), key=lambda part: -part[1])
    )
    raise MemoryBudgetError(
        f"{len(specs)} run(s) may need {_gib(needed)} ({needed} bytes: {detail}), the budget is {_gib(budget)}. "
        f"What would fit: {'; '.join(remedies)}"
    )


class _Stored(NamedTuple):
    """Where in a spool's file an array is, in numbers."""

    start: int
    shape: tuple[int, ...]


class Spool:
    """A file without a name that float32 arrays go to as they are recorded, read as one memory map when the run is over.

    The system writes it to disk while computing goes on, and frees it when the last of the arrays is gone.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.size = Path(folder), 0
        self.file: Any = None  # opened by the first array, so that runs that wait hold no file

    def write(self, array: np.ndarray) -> _Stored:
        """Append an array; TraceError if the disk is full."""
        try:
            if self.file is None:
                self.file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115  open as long as its arrays are in use
            self.file.write(np.ascontiguousarray(array, dtype=np.float32).data)
        except OSError as error:
            raise TraceError(
                f"cannot spool {array.nbytes} bytes to {self.folder}: {error.strerror or error}; give a folder on a disk with room"
            ) from error
        stored = _Stored(self.size, array.shape)
        self.size += array.size
        return stored

    def read(self, steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The steps with the arrays that were written for them, as parts of one memory map."""
        self.file.flush()
        whole = np.memmap(self.file, dtype=np.float32, mode="r")
        self.close()  # the map keeps the file

        def array(value: Any) -> Any:
            return (
                whole[value.start :][: math.prod(value.shape)].reshape(value.shape)
                if isinstance(value, _Stored)
                else value
            )

        return [{name: array(value) for name, value in step.items()} for step in steps]

    def close(self) -> None:
        """Let go of the file; what has been read of it stays."""
        if self.file is not None:
            self.file.close()


def _largest_that_fits(fits: Any, most: int) -> int:
    """The largest n in 1..most for which `fits(n)`, 0 if none; `fits` is monotone."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


class _Reached(Exception):
    """Carries the keys out of an attention module the moment they reach the cache."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


class _KeyTrap:
    """Stands in for the cache and takes what would be written to it."""

    def update(self, key_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise _Reached(key_states)


@contextmanager
def raw_keys(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Within the block, a forward pass appends each attention module's keys before rotation, [1, Hkv, T, D].

    Just before a module runs, its own forward is called once more on the same hidden states with the identity as
    rotation (cos 1, sin 0) and stopped when the keys reach the cache. The pass itself is untouched.
    """
    found: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache_name = next(
            (name for name in ("cache", "past_key_values", "past_key_value") if name in kwargs),
            None,
        )
        if kwargs.get("position_embeddings") is None or cache_name is None:
            raise ModelError(
                f"{type(module).__name__} does not take its rotation as position_embeddings, so keys before rotation "
                "cannot be captured; leave 'kv' out of capture for this model"
            )
        cos, sin = kwargs["position_embeddings"]
        identity = {
            "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin)),
            cache_name: _KeyTrap(),
        }
        try:
            module.forward(*args, **{**kwargs, **identity})
        except _Reached as reached:
            found.append(reached.keys)

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
