"""What a run records beyond its sets, and how much memory that takes, computed before it starts.

Shapes: L layers, H query heads, Hkv key heads, w set width, N_k slots once set k is in,
N slots at the end, D key size, Dv value size, V vocabulary, P prompt.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
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

# The probabilities of a float32 softmax may sum to slightly more than one. One more token can then
# reach the threshold.
SUM_SLACK = 1e-5
# Unless a budget is given, runs may take this share of the memory that is free when they start.
FREE_MEMORY_SHARE = 0.5
# The arrays that go to a spool: those recorded at each step, but for the small ones.
SPOOLED = tuple(name for name in STEP_ARRAYS if name != "links")


def widest_set(spec: RunSpec, vocab_size: int) -> int:
    """The most tokens that can join one set: floor(1 / threshold), capped.

    The caps are the vocabulary, `top_k`, `sample` and `max_width`.
    """
    threshold = min(spec.schedule or (spec.threshold,))
    bound = max(1, math.floor((1.0 + SUM_SLACK) / threshold)) if threshold else vocab_size
    caps = [cap for cap in (spec.top_k, spec.sample, spec.max_width) if cap is not None]
    return min(bound, vocab_size, *caps)


def trace_bytes(
    lm: LanguageModel, spec: RunSpec, num_prompt: int, widths: Sequence[int] | None = None
) -> dict[str, int]:
    """Bytes of each array that a run's trace and cache hold, by name.

    The bytes are exact for given `widths`, and for a replay. For a free run they are an upper
    bound: every set is taken to be as wide as the threshold allows.

    - `distribution`: steps * V * 4
    - `links`: sum over steps of w * w of the next step * 4, with readout `mixture`
    - `cache`: L * Hkv * N * (D + Dv) * bytes of the model's dtype
    - `attention`: sum over steps of L * H * w * N_k * 4, if captured
    - `siblings`: sum over steps of L * H * w * w * 4, if captured
    - `logits`: sum over steps of w * V * 4, if captured
    - `kv`: L * Hkv * N * (2 * D + Dv) * 4, if captured

    Args:
        lm: The model.
        spec: The settings of the run.
        num_prompt: P, the number of prompt tokens.
        widths: The width of each set. If not given, those of the replay, or the widest possible.
    """
    if widths is None and spec.replay:
        widths = [len(tokens) for tokens in spec.replay]
    elif widths is None:
        widths = [widest_set(spec, lm.vocab_size)] * spec.max_steps
    slots = num_prompt + np.cumsum(np.asarray(widths, dtype=np.int64))
    num_slots = int(slots[-1])
    # how many numbers one slot takes, over all layers
    keys = sum(num_heads * key_size for num_heads, key_size, _ in lm.key_value_sizes)
    values = sum(num_heads * value_size for num_heads, _, value_size in lm.key_value_sizes)
    sizes = {
        "distribution": len(widths) * lm.vocab_size * 4,
        "links": int(np.dot(widths[:-1], widths[1:])) * 4 * (spec.readout == "mixture"),
        "cache": (keys + values) * num_slots * lm.dtype.itemsize,
        "attention": lm.num_layers * lm.num_heads * int(np.dot(widths, slots)) * 4,
        "siblings": lm.num_layers * lm.num_heads * int(np.dot(widths, widths)) * 4,
        "logits": sum(widths) * lm.vocab_size * 4,
        "kv": (2 * keys + values) * num_slots * 4,
    }
    # distribution, links and cache are held whatever is captured
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
    """How many of these runs, at most `max_rows`, fit into memory at once, whichever they are.

    Args:
        lm: The model.
        specs: The settings of each run.
        num_prompts: The number of prompt tokens of each run.
        max_rows: At most this many runs are under way at once.
        budget: Bytes that the runs may take. None means a share of the free memory.
        spool: The folder for the arrays of each step, if they go to disk.

    Raises:
        MemoryBudgetError: if not even one run fits.
    """
    budget = memory_budget(budget)
    sizes = [
        _needed(lm, spec, num_prompt, spool)
        for spec, num_prompt in zip(specs, num_prompts, strict=True)
    ]
    # the worst case: the largest runs are under way together
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
    """Bytes that one run takes in memory, without what goes to the spool."""
    sizes = trace_bytes(lm, spec, num_prompt)
    return sum(size for name, size in sizes.items() if not (spool and name in SPOOLED))


def check_budget(
    lm: LanguageModel,
    specs: Sequence[RunSpec],
    num_prompts: Sequence[int],
    budget: int | None,
    spool: str | Path | None = None,
) -> None:
    """None if these runs fit into the budget together. Otherwise an error names what would fit.

    Args:
        lm: The model.
        specs: The settings of each run.
        num_prompts: The number of prompt tokens of each run.
        budget: Bytes that the runs may take. None means a share of the free memory.
        spool: The folder for the arrays of each step, if they go to disk.

    Raises:
        MemoryBudgetError: if the runs need more memory than the budget, or if the spool's disk has
            no room for what goes there.
    """
    budget = memory_budget(budget)
    parts: dict[str, int] = {}
    for spec, num_prompt in zip(specs, num_prompts, strict=True):
        for name, size in trace_bytes(lm, spec, num_prompt).items():
            parts[name] = parts.get(name, 0) + size
    if spool:
        _check_disk(len(specs), sum(parts.pop(name, 0) for name in SPOOLED), spool)
    needed = sum(parts.values())
    if needed <= budget:
        return
    remedies = _remedies(lm, specs, num_prompts, budget, spool, parts)
    by_size = sorted(parts.items(), key=lambda part: -part[1])
    detail = ", ".join(f"{name} {_gib(size)}" for name, size in by_size)
    raise MemoryBudgetError(
        f"{len(specs)} run(s) may need {_gib(needed)} ({needed} bytes: {detail}), the budget is "
        f"{_gib(budget)}. What would fit: {'; '.join(remedies)}"
    )


def _check_disk(num_runs: int, spooled: int, spool: str | Path) -> None:
    """MemoryBudgetError if the spool's disk has no room for `spooled` bytes."""
    free = shutil.disk_usage(made_folder(spool)).free
    if spooled > free:
        raise MemoryBudgetError(
            f"{num_runs} run(s) may spool {_gib(spooled)} ({spooled} bytes) to {spool}, where "
            f"{_gib(free)} are free; capture less, lower max_width or max_steps, or name a folder "
            "on a larger disk"
        )


def _remedies(
    lm: LanguageModel,
    specs: Sequence[RunSpec],
    num_prompts: Sequence[int],
    budget: int,
    spool: str | Path | None,
    parts: Mapping[str, int],
) -> list[str]:
    """Changes of a setting each of which would make the runs fit.

    parts: the bytes of each array over all runs, without what goes to the spool.
    """
    needed = sum(parts.values())

    def fits_with(name: str, value: int) -> bool:
        changed = [spec.but(**{name: value}) for spec in specs]
        sizes = [_needed(lm, s, p, spool) for s, p in zip(changed, num_prompts, strict=True)]
        return sum(sizes) <= budget

    remedies = []
    if all(spec.replay is None for spec in specs):
        most = {
            "max_width": max(widest_set(spec, lm.vocab_size) for spec in specs),
            "max_steps": max(spec.max_steps for spec in specs),
        }
        for name, current in most.items():
            largest = _largest_that_fits(partial(fits_with, name), current)
            if largest:
                remedies.append(f"{name}={largest}")
    # the largest captured array whose omission is enough
    captured = [name for name in CAPTURES if name in parts]
    for name in sorted(captured, key=lambda name: -parts[name]):
        if needed - parts[name] <= budget:
            remedies.append(f"capture without '{name}'")
            break
    if not spool and needed - sum(parts.get(name, 0) for name in SPOOLED) <= budget:
        remedies.append("spool=FOLDER (attention, logits and distributions on its disk)")
    if len(specs) > 1:
        at_a_time = max(1, len(specs) * budget // needed)
        remedies.append(f"{at_a_time} of the {len(specs)} runs at a time (tempo.stream keeps none)")
    remedies.append(f"memory_budget={needed}")
    return remedies


class _Stored(NamedTuple):
    """Where an array is in a spool's file, counted in numbers."""

    start: int
    shape: tuple[int, ...]


class Spool:
    """A temporary file that takes float32 arrays as they are recorded.

    Once the run is over, the arrays are read as parts of one memory map. The system writes the file
    to disk while computing goes on. It frees the disk when the last of the arrays is gone.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.size = Path(folder), 0
        # Opened by the first array, so that runs that wait hold no file.
        self.file: Any = None

    def write(self, array: np.ndarray) -> _Stored:
        """Where the array is, once it is appended.

        Raises:
            TraceError: if the disk is full.
        """
        try:
            if self.file is None:
                # It stays open as long as its arrays are in use.
                self.file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115
            self.file.write(np.ascontiguousarray(array, dtype=np.float32).data)
        except OSError as error:
            raise TraceError(
                f"cannot spool {array.nbytes} bytes to {self.folder}: {error.strerror or error}; "
                "give a folder on a disk with room"
            ) from error
        stored = _Stored(self.size, array.shape)
        self.size += array.size
        return stored

    def read(self, steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The steps, with each `_Stored` replaced by its array. Closes the file."""
        self.file.flush()
        whole = np.memmap(self.file, dtype=np.float32, mode="r")
        self.close()  # the map keeps the file

        def array(value: Any) -> Any:
            if not isinstance(value, _Stored):
                return value
            return whole[value.start :][: math.prod(value.shape)].reshape(value.shape)

        return [{name: array(value) for name, value in step.items()} for step in steps]

    def close(self) -> None:
        """Close the file. Arrays that were read from it stay valid."""
        if self.file is not None:
            self.file.close()


def _largest_that_fits(fits: Callable[[int], bool], most: int) -> int:
    """The largest n from 1 to `most` for which `fits(n)`, or 0.

    If a number fits, every smaller one must fit as well.
    """
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


class _Reached(Exception):
    """Carries the keys out of an attention module as soon as they reach the cache."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


class _KeyTrap:
    """Takes the place of the cache, and stops the module that writes to it."""

    def update(self, key_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise _Reached(key_states)


@contextmanager
def raw_keys(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """A list that a forward pass within the block fills with each module's keys before rotation.

    Each entry is [1, Hkv, T, D], for T tokens of the pass.

    Just before a module runs, its own forward is called once more on the same hidden states. The
    rotation of that call is the identity (cos 1, sin 0). The call stops when the keys reach the
    cache. The pass itself is not changed.

    Args:
        modules: The attention modules of the model.

    Raises:
        ModelError: if a module does not take its rotation as an argument.
    """
    found: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache_names = ("cache", "past_key_values", "past_key_value")
        cache_name = next((name for name in cache_names if name in kwargs), None)
        if kwargs.get("position_embeddings") is None or cache_name is None:
            raise ModelError(
                f"{type(module).__name__} does not take its rotation as position_embeddings, so "
                "keys before rotation cannot be captured; leave 'kv' out of capture for this model"
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
