"""What a run records beyond its sets, and how much memory that takes, computed before it starts.

Shapes: L layers, H query heads, Hkv key heads, w set width, N_k slots once set k is in,
N slots at the end, D key size, Dv value size, E residual size, V vocabulary, P prompt.
"""

from __future__ import annotations

import errno
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

from tempo.attention import WAITING
from tempo.cache import capacity
from tempo.errors import MemoryBudgetError, ModelError, TraceError
from tempo.layout import MAX_NEW_TOKENS, MAX_PADDED
from tempo.models import LanguageModel
from tempo.spec import BY_QUERY, CAPTURES, RunSpec
from tempo.trace import STEP_ARRAYS, check_writable

try:
    import resource
except ImportError:  # Windows, which has no such limit
    resource = None

# The probabilities of a float32 softmax may sum to slightly more than one. One more token can then
# reach the threshold.
SUM_SLACK = 1e-5
# Unless a budget is given, runs may take this share of the memory that is free when they start.
FREE_MEMORY_SHARE = 0.5
# The arrays that go to a spool: those recorded at each step, but for the small ones.
SPOOLED = tuple(name for name in STEP_ARRAYS if name != "links")
# Files that are left to the rest of the process: libraries, models, the user's own.
SPARE_FILES = 16


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
    - `residual`: sum over steps of (L + 1) * w * E * 4, if captured

    Args:
        lm: The model.
        spec: The settings of the run.
        num_prompt: P, the number of prompt tokens.
        widths: The width of each set. If not given, those of the replay, or the widest possible.
    """
    wide = _widths(lm, spec) if widths is None else np.asarray(widths, dtype=np.int64)
    slots = num_prompt + np.cumsum(wide)
    num_slots = int(slots[-1])
    keys, values = _numbers_a_slot(lm)
    sizes = {
        "distribution": len(wide) * lm.vocab_size * 4,
        "links": int(np.dot(wide[:-1], wide[1:])) * 4 * (spec.readout == "mixture"),
        "cache": (keys + values) * num_slots * lm.dtype.itemsize,
        "attention": lm.num_layers * lm.num_heads * int(np.dot(wide, slots)) * 4,
        "siblings": lm.num_layers * lm.num_heads * int(np.dot(wide, wide)) * 4,
        "logits": int(wide.sum()) * lm.vocab_size * 4,
        "kv": (2 * keys + values) * num_slots * 4,
    }
    if "residual" in spec.capture:  # a model without such a stream has no size of it
        sizes["residual"] = (lm.num_layers + 1) * int(wide.sum()) * lm.residual_stream.size * 4
    # distribution, links and cache are held whatever is captured
    return {
        name: size for name, size in sizes.items() if name not in CAPTURES or name in spec.capture
    }


def _widths(lm: LanguageModel, spec: RunSpec) -> np.ndarray:
    """The width of each set of a replay; of a free run the widest possible."""
    if spec.replay:
        return np.array([len(tokens) for tokens in spec.replay], dtype=np.int64)
    return np.full(spec.max_steps, widest_set(spec, lm.vocab_size), dtype=np.int64)


def _numbers_a_slot(lm: LanguageModel) -> tuple[int, int]:
    """How many numbers the keys and the values of one slot take, over all layers."""
    keys = sum(num_heads * key_size for num_heads, key_size, _ in lm.key_value_sizes)
    values = sum(num_heads * value_size for num_heads, _, value_size in lm.key_value_sizes)
    return keys, values


class _Demand(NamedTuple):
    """What one run may ask of memory.

    Attributes:
        kept: Bytes of each array of its trace that is kept in memory, by name.
        spooled: Bytes that go to the spool.
        num_slots: N at the end.
        part: The most tokens that it gives to one pass.
        sets_part: The same of sets alone.
        read: The most tokens whose logits are in memory at once.
        spec: Its settings.
    """

    kept: dict[str, int]
    spooled: int
    num_slots: int
    part: int
    sets_part: int
    read: int
    spec: RunSpec


def _demand(lm: LanguageModel, spec: RunSpec, num_prompt: int, spool: object) -> _Demand:
    sizes, widths = trace_bytes(lm, spec, num_prompt), _widths(lm, spec)
    del sizes["cache"]  # counted by rows, see `_working_bytes`
    spooled = sum(sizes.pop(name, 0) for name in SPOOLED) if spool else 0
    read = int(widths.max())
    if spec.replay:  # its sets share passes
        read = max(read, min(int(widths.sum()), MAX_NEW_TOKENS))
    # only members that all see each other cannot be forwarded in parts
    sets_part = read if spec.visibility == "visible" else min(read, MAX_NEW_TOKENS)
    part = max(sets_part, min(num_prompt, MAX_NEW_TOKENS))
    return _Demand(sizes, spooled, num_prompt + int(widths.sum()), part, sets_part, read, spec)


def _working_bytes(lm: LanguageModel, demands: Sequence[_Demand], num_rows: int) -> dict[str, int]:
    """Bytes that any `num_rows` of these runs take while they are under way, beside what is kept.

    An upper bound, by name: the cache as it grows, and what the largest pass needs at its peak. All
    rows of a pass are as long as the longest. A pass of several runs has at most `MAX_NEW_TOKENS`
    tokens, and rows with at most `MAX_PADDED` places.
    """
    specs = [demand.spec for demand in demands]
    captured = {name for spec in specs for name in spec.capture}
    itemsize, wide = lm.dtype.itemsize, max(lm.dtype.itemsize, 4)
    num_slots = max(demand.num_slots for demand in demands)
    width = max(demand.part for demand in demands)  # w, of prompts too
    sets = max(demand.sets_part for demand in demands)
    read = max(demand.read for demand in demands)
    keys, values = _numbers_a_slot(lm)
    # all rows have room for the longest run, and one layer is copied: as it grows, or for a pass
    # whose rows do not follow one another
    slots_held = num_rows * capacity(num_slots)
    layers = lm.num_layers
    cache = (keys + values) * itemsize * slots_held * (layers + 1) // layers
    places, of_sets = (max(w, min(num_rows * w, MAX_PADDED)) for w in (width, sets))
    # logits of one pass as the model gives them and once more, as capping or joining needs; then
    # one set's in float32 and their softmax
    logits = 2 * min(num_rows * read, max(MAX_NEW_TOKENS, read)) * wide + read * 8
    # which member of a set led to which of the next one, in float64; and to them from any slot
    links = 5 * 8 * read**2 * any(spec.readout == "mixture" for spec in specs)
    if any(spec.weighting in BY_QUERY or spec.prune is not None for spec in specs):
        links += 3 * 8 * num_rows * read * num_slots
    groups = max(call.num_heads // call.num_key_value_heads for call in lm.attention_calls)
    kinds = len({call.window for call in lm.attention_calls})
    isolates = any(spec.isolated_layers for spec in specs)
    # For each query and key: the finished mask of each kind of layer, by group; the steps in which
    # it is made; flags and bias of all rows, and of the row that is being made.
    pair = (1 + isolates) * kinds * groups * itemsize + 2 * itemsize + 24 + 9 * isolates
    masks = (places * pair + 40 * width) * num_slots
    packed = min(num_rows * width, max(MAX_NEW_TOKENS, width))
    head = max(max(call.key_size, call.value_size) for call in lm.attention_calls)
    attention = 4 * places * lm.num_heads * head * itemsize
    if any(call.forms_weights for call in lm.attention_calls):
        attention += 4 * places * lm.num_heads * num_slots * wide
    recording = 0
    if any(spec.prune_by == "attention" for spec in specs):
        captured.add("attention")
    if captured & {"attention", "siblings"}:
        # products that wait, joined, and their softmax; then the arrays of one pass
        recording = 3 * (WAITING + of_sets * lm.num_heads * num_slots) * wide
        columns = of_sets * max(sets, read)
        if "attention" in captured:
            columns = min(num_rows * read, max(MAX_NEW_TOKENS, read)) * num_slots
        recording += layers * lm.num_heads * columns * 4
    if "kv" in captured:
        recording += (3 * keys + values) * num_slots * 4  # joined when a run ends
    if "residual" in captured:
        # of all tokens whose sets are read: by layer, stacked, and in float32
        rows = min(num_rows * read, max(MAX_NEW_TOKENS, read))
        recording += (layers + 1) * rows * lm.residual_stream.size * (2 * itemsize + 4)
    return {
        "cache": cache,
        "logits of a pass": logits * lm.vocab_size + links,
        "masks of a pass": masks,
        "attention of a pass": attention + recording,
        "layers": packed * lm.token_width * itemsize,
    }


def _needed(
    lm: LanguageModel, demands: Sequence[_Demand], kept: Sequence[_Demand], num_rows: int
) -> dict[str, int]:
    """Bytes by name of the traces `kept` and of any `num_rows` of these runs under way."""
    parts = _working_bytes(lm, demands, num_rows)
    for demand in kept:
        for name, size in demand.kept.items():
            parts[name] = parts.get(name, 0) + size
    return parts


def rows_that_fit(
    lm: LanguageModel,
    specs: Sequence[RunSpec],
    num_prompts: Sequence[int],
    max_rows: int,
    budget: int | None = None,
    spool: str | Path | None = None,
    *,
    keep_all: bool = False,
) -> int:
    """How many of these runs, at most `max_rows`, can be under way at once, whichever they are.

    Args:
        lm: The model.
        specs: The settings of each run.
        num_prompts: The number of prompt tokens of each run.
        max_rows: At most this many runs are under way at once.
        budget: Bytes that the runs may take. None means a share of the free memory.
        spool: The folder for the arrays of each step, if they go to disk.
        keep_all: Whether the traces of all runs are kept, not only of those under way.

    Raises:
        MemoryBudgetError: if not even one run fits, or if the spool's disk has no room. It names
            what would fit.
    """
    budget = memory_budget(budget, lm.device)
    if not specs:
        return max_rows
    demands = [
        _demand(lm, spec, num_prompt, spool)
        for spec, num_prompt in zip(specs, num_prompts, strict=True)
    ]
    # the worst case: the largest runs are under way together
    largest = sorted(demands, key=lambda demand: -sum(demand.kept.values()))
    for num_rows in range(min(max_rows, len(specs)), 0, -1):
        kept = demands if keep_all else largest[:num_rows]
        if sum(_needed(lm, demands, kept, num_rows).values()) <= budget:
            if spool:
                _check_disk(len(kept), sum(demand.spooled for demand in kept), spool)
            return num_rows
    together = specs, num_prompts
    if not keep_all:  # the one run that asks for most
        first = max(
            range(len(specs)),
            key=lambda i: sum(_needed(lm, [demands[i]], [demands[i]], 1).values()),
        )
        together = [specs[first]], [num_prompts[first]]
    raise _over_budget(lm, *together, budget, spool)


def memory_budget(
    given: int | None = None, device: torch.device | None = None, weights: int = 0, workers: int = 1
) -> int:
    """Bytes that the runs of one process may take: `given`, or a share of the memory free now.

    On a GPU it is a share of what is free there, if that is less: what is computed lies there, and
    what is recorded in the machine's memory. Nothing is added up over the two.

    Args:
        given: Returned as it is.
        device: Of the model.
        weights: Bytes of the weights that each of several workers is going to load.
        workers: How many processes share this machine.

    Raises:
        MemoryBudgetError: if the weights of all workers leave nothing.
    """
    if given is not None:
        return given
    free = psutil.virtual_memory().available
    left = free - weights * workers
    if left <= 0:
        raise MemoryBudgetError(
            f"{workers} workers load {gib(weights)} of weights each, and {gib(free)} are free; "
            f"at most {free // weights} fit"
        )
    if device is not None and device.type == "cuda":
        left = min(left, torch.cuda.mem_get_info(device)[0])
    return int(left * FREE_MEMORY_SHARE / workers)


def needed_bytes(
    lm: LanguageModel,
    specs: Sequence[RunSpec],
    num_prompts: Sequence[int],
    num_rows: int = 1,
    spool: str | Path | None = None,
) -> dict[str, int]:
    """Bytes by name that these runs may take if all traces are kept: an upper bound.

    Args:
        lm: The model.
        specs: The settings of each run.
        num_prompts: The number of prompt tokens of each run.
        num_rows: So many runs are under way at once.
        spool: The folder for the arrays of each step, if they go to disk.
    """
    demands = [_demand(lm, s, p, spool) for s, p in zip(specs, num_prompts, strict=True)]
    return _needed(lm, demands, demands, num_rows)


def check_budget(
    lm: LanguageModel,
    specs: Sequence[RunSpec],
    num_prompts: Sequence[int],
    budget: int | None,
    spool: str | Path | None = None,
) -> None:
    """None if the traces of these runs fit into the budget together, made one at a time.

    Raises:
        MemoryBudgetError: if not. It names what would fit.
    """
    rows_that_fit(lm, specs, num_prompts, 1, budget, spool, keep_all=True)


def _over_budget(
    lm: LanguageModel,
    specs: Sequence[RunSpec],
    num_prompts: Sequence[int],
    budget: int,
    spool: str | Path | None,
) -> MemoryBudgetError:
    """The error that says what these runs need, one under way at a time, and what would fit."""
    parts = needed_bytes(lm, specs, num_prompts, 1, spool)
    needed = sum(parts.values())
    remedies = _remedies(lm, specs, num_prompts, budget, spool, needed)
    by_size = sorted(parts.items(), key=lambda part: -part[1])
    detail = ", ".join(f"{name} {gib(size)}" for name, size in by_size if size)
    would = "; ".join(remedies) or "nothing here: take a machine with more memory"
    return MemoryBudgetError(
        f"{len(specs)} run(s) may need {gib(needed)} ({needed} bytes: {detail}), the budget is "
        f"{gib(budget)}. What would fit: {would}"
    )


def _check_disk(num_runs: int, spooled: int, spool: str | Path) -> None:
    """None if the spool can be written and has room for `spooled` bytes; an error otherwise."""
    check_writable(spool)
    free = shutil.disk_usage(spool).free
    if spooled > free:
        raise MemoryBudgetError(
            f"{num_runs} run(s) may spool {gib(spooled)} ({spooled} bytes) to {spool}, where "
            f"{gib(free)} are free; capture less, lower max_width or max_steps, or name a folder "
            "on a larger disk"
        )


def _remedies(
    lm: LanguageModel,
    specs: Sequence[RunSpec],
    num_prompts: Sequence[int],
    budget: int,
    spool: str | Path | None,
    needed: int,
) -> list[str]:
    """Changes of a setting each of which would make the runs fit. `needed` bytes do not."""

    def fits(changed: Sequence[RunSpec], disk: object = spool) -> bool:
        demands = [_demand(lm, s, p, disk) for s, p in zip(changed, num_prompts, strict=True)]
        return sum(_needed(lm, demands, demands, 1).values()) <= budget

    def fits_with(name: str, value: int) -> bool:
        # a run whose setting is lower already keeps it
        lowered = [min(value, getattr(spec, name) or value) for spec in specs]
        return fits([s.but(**{name: low}) for s, low in zip(specs, lowered, strict=True)])

    remedies = []
    if all(spec.replay is None for spec in specs):
        steps = min(lm.context_length - max(num_prompts), max(spec.max_steps for spec in specs))
        most = {
            "max_width": max(widest_set(spec, lm.vocab_size) for spec in specs),
            "max_steps": steps,
        }
        for name, current in most.items():
            largest = _largest_that_fits(partial(fits_with, name), current)
            if largest:
                remedies.append(f"{name}={largest}")
    # the largest captured array whose omission is enough
    sizes = [trace_bytes(lm, s, p) for s, p in zip(specs, num_prompts, strict=True)]
    captured = {name: sum(size.get(name, 0) for size in sizes) for name in CAPTURES}
    for name in sorted(captured, key=lambda name: -captured[name]):
        if captured[name] and fits([s.but(capture={*s.capture} - {name}) for s in specs]):
            remedies.append(f"capture without '{name}'")
            break
    if not spool and fits(specs, disk=True):
        remedies.append("spool=FOLDER (attention, logits and distributions on its disk)")
    if len(specs) > 1:
        largest = _largest_that_fits(
            lambda count: _any_fit(lm, specs, num_prompts, budget, spool, count), len(specs)
        )
        if largest:
            remedies.append(
                f"{largest} of the {len(specs)} runs at a time (tempo.stream keeps none)"
            )
    if needed <= psutil.virtual_memory().available:
        remedies.append(f"memory_budget={needed}")
    return remedies


def _any_fit(
    lm: LanguageModel,
    specs: Sequence[RunSpec],
    num_prompts: Sequence[int],
    budget: int,
    spool: str | Path | None,
    count: int,
) -> bool:
    """Whether any `count` of these runs fit together, made one at a time."""
    demands = [_demand(lm, s, p, spool) for s, p in zip(specs, num_prompts, strict=True)]
    largest = sorted(demands, key=lambda demand: -sum(demand.kept.values()))[:count]
    return sum(_needed(lm, demands, largest, 1).values()) <= budget


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
            raise self._refused(error, f"{array.nbytes} bytes to ") from error
        stored = _Stored(self.size, array.shape)
        self.size += array.size
        return stored

    def read(self, steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The steps, with each `_Stored` replaced by its array. Closes the file."""
        try:
            self.file.flush()
            whole = np.memmap(self.file, dtype=np.float32, mode="r")
        except OSError as error:
            raise self._refused(error) from error
        finally:
            self.close()  # the map keeps the file

        def array(value: Any) -> Any:
            if not isinstance(value, _Stored):
                return value
            return whole[value.start :][: math.prod(value.shape)].reshape(value.shape)

        return [{name: array(value) for name, value in step.items()} for step in steps]

    def _refused(self, error: OSError, what: str = "") -> TraceError:
        remedy = "give a folder on a disk with room"
        if error.errno in (errno.EMFILE, errno.ENFILE):
            remedy = "let go of traces that are no longer needed, or raise the limit: ulimit -n"
        return TraceError(f"cannot spool {what}{self.folder}: {error.strerror or error}; {remedy}")

    def close(self) -> None:
        """Close the file. Arrays that were read from it stay valid."""
        if self.file is not None:
            self.file.close()


def check_files(count: int, folder: str | Path) -> None:
    """None if so many files may be open at once, beside those that are open now.

    Raises:
        TraceError: if the system's limit is lower. It names the limit that would do.
    """
    if resource is None:
        return
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    others = psutil.Process().num_fds() + SPARE_FILES
    if limit != resource.RLIM_INFINITY and others + count > limit:
        raise TraceError(
            f"{count} runs that spool to {folder} keep {count} files open, and the system allows "
            f"{max(0, limit - others)} more (its limit is {limit}); raise it with "
            f"'ulimit -n {others + count}', or use tempo.stream and let go of each trace"
        )


def _largest_that_fits(fits: Callable[[int], bool], most: int) -> int:
    """The largest n from 1 to `most` for which `fits(n)`, or 0.

    If a number fits, every smaller one must fit as well.
    """
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def gib(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


class _Reached(Exception):
    """Carries the keys out of an attention module as soon as they reach the cache."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


class _KeyTrap:
    """Takes the place of the cache, and stops the module that writes to it."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # some modules scale their queries by it, which are not looked at

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
        cache_names = ("cache", "past_key_values", "past_key_value", "layer_past")
        cache_name = next((name for name in cache_names if name in kwargs), None)
        if "position_embeddings" not in kwargs or cache_name is None:
            raise ModelError(
                f"{type(module).__name__} does not take its rotation as position_embeddings, so "
                "keys before rotation cannot be captured; leave 'kv' out of capture for this model"
            )
        given = kwargs["position_embeddings"]
        unturned: Any = None  # a layer that does not rotate
        if isinstance(given, Tensor):  # cos + i sin
            unturned = torch.ones_like(given)
        elif given is not None:
            unturned = (torch.ones_like(given[0]), torch.zeros_like(given[1]))
        identity = {"position_embeddings": unturned, cache_name: _KeyTrap()}
        try:
            module.forward(*args, **{**kwargs, **identity})
        except _Reached as reached:
            found.append(reached.keys)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ModelError(
                f"{type(module).__name__} does not hand its keys to the cache as expected "
                f"({type(error).__name__}: {error}); leave 'kv' out of capture for this model"
            ) from error

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
