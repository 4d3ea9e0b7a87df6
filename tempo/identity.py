"""What determines a result, as one hash: what was kept is used again only if it is the same.

Everything is looked at anew each time it is asked for, since a model can be changed in place. That
costs what reading its weights once costs: 0.26 s for the 540 MB of SmolLM2.
"""

from __future__ import annotations

import hashlib
import json
import sys
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

if TYPE_CHECKING:
    from tempo.models import LanguageModel

# Files that read results but make none. A change in one of them must not discard measurements.
JUDGING = {"claims.py", "statistics.py", "cli.py", "doctor.py"}
# What a config says of itself and not of the model: where it came from, the dtype, which saving
# writes into it and weights say themselves, and which attention is installed just now, as the
# engine chooses it for each run.
_INCIDENTAL = ("_name_or_path", "transformers_version", "_attn_implementation", "architectures")
_INCIDENTAL += ("dtype", "torch_dtype")
# Their code is known by their versions.
_LIBRARIES = ("torch.", "transformers.", "accelerate.", "peft.")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# The hooks that transformers leaves in a model once attentions were asked for. They only look.
_OBSERVING = "transformers.utils.output_capturing"
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")
DEEPEST = 6  # functions that a hook calls, and what these call


def maker_sha256(lm: LanguageModel) -> str:
    """A hash of everything that a result depends on beside its spec.

    That is the model (`model_sha256`), the dtype and device, the versions, the number of threads,
    and tempo's own code.
    """
    return hashlib.sha256(json.dumps(maker_parts(lm), sort_keys=True).encode()).hexdigest()


def maker_parts(lm: LanguageModel) -> dict[str, str]:
    """What `maker_sha256` covers, part by part, each under the name that a message calls it.

    Of a GPU its kind counts, not its number: `cuda:0` and `cuda:1` of one kind are the same.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name not in JUDGING:
            digest.update(path.read_bytes())
    made = lm.provenance()
    return {
        "model": made["model"],
        "weights or settings of the model": model_sha256(lm),
        "dtype": made["dtype"],
        "device": made["device"],
        **{f"version of {name}": version for name, version in made["versions"].items()},
        "Python": sys.version,
        "number of threads": str(torch.get_num_threads()),
        "code of tempo": digest.hexdigest(),
    }


def model_sha256(lm: LanguageModel) -> str:
    """A hash of the model as it is now: all that can change a token, a number, or a text.

    Covered are weights, buffers and rotary tables, configs, the settings of every layer (such as
    the scaling of its attention), forward hooks and replaced methods, end-of-sequence tokens, and
    the tokenizer. A hook whose effect cannot be told, because it holds an object, is like no other:
    then each hash differs.
    """
    digest = hashlib.sha256(lm.sha256.encode())
    for line in _lines(lm):
        digest.update(line.encode(errors="surrogatepass"))
        digest.update(b"\n")
    return digest.hexdigest()


def unnamed_hooks(lm: LanguageModel) -> list[str]:
    """The modules with a hook or a replaced method whose effect cannot be told."""
    found = []
    for name, module in lm.model.named_modules():
        if any(described is None for described in map(_described, _foreign(module))):
            found.append(name or type(module).__name__)
    return found


def warn_of_hooks(lm: LanguageModel) -> None:
    """Warn, once a place, of hooks that would see the tokens of several runs in one row."""
    named = lm.model.named_modules()
    hooked = [name or type(module).__name__ for name, module in named if _hooks(module)]
    if hooked:
        warnings.warn(
            f"{len(hooked)} modules have hooks of yours (first: {hooked[0]}). A batch puts "
            "the new tokens of all runs into one row, so that a hook on one position, such as "
            "out[:, -1], sees one run's. A hook that treats every position alike is fine; for any "
            "other run one spec at a time",
            stacklevel=4,
        )


def _lines(lm: LanguageModel) -> Iterator[str]:
    model = lm.model
    # Weights are in `lm.sha256`; so are saved buffers. Rotary tables are not saved.
    for name, buffer in sorted(model.named_buffers()):
        yield f"{name} {_tensor(buffer)}"
    for config in (model.config, model.generation_config):
        yield _config(config)
    for name, module in model.named_modules():
        kind = type(module)
        yield f"{name} {kind.__module__}.{kind.__qualname__} {_code(kind.forward)}"
        yield from (f"{name} {line}" for line in sorted(_settings(module)))
        for function in _foreign(module):
            yield f"{name} calls {_described(function) or uuid.uuid4()}"
    for name in _GLOBAL_HOOKS:
        for function in getattr(torch_module, name, {}).values():
            yield f"{name} {_described(function) or uuid.uuid4()}"
    yield f"eos {sorted(lm.eos_token_ids)} {lm.vocab_size} {lm.context_length} {lm.layer_windows}"
    yield _tokenizer(lm.tokenizer)


def _tensor(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(content).hexdigest()}"


def _config(config: Any) -> str:
    if config is None:
        return "no config"
    settings = config.to_dict()
    kept = {key: value for key, value in settings.items() if key not in _INCIDENTAL}
    return json.dumps(kept, sort_keys=True, default=str)


def _settings(module: nn.Module) -> Iterator[str]:
    """The plain values of a module: the scaling of its attention, the epsilon of its norm."""
    for name, value in vars(module).items():
        if name in ("training", "name_or_path") or (
            name.startswith("_") and not isinstance(value, float)
        ):
            continue
        if isinstance(value, Tensor):
            yield f"{name} {_tensor(value)}"
        elif callable(value) and not isinstance(value, nn.Module):
            if not _is_foreign(value):
                yield f"{name} {_name(value)}"
        elif (plain := _plain(value)) is not None:
            yield f"{name} {plain}"


def _foreign(module: nn.Module) -> list[Any]:
    """The hooks of a module, and methods put in place of its own."""
    replaced = [
        value
        for value in vars(module).values()
        if callable(value) and not isinstance(value, nn.Module) and _is_foreign(value)
    ]
    return [*_hooks(module), *replaced]


def _hooks(module: nn.Module) -> list[Any]:
    """The hooks of a module, without those with which transformers or another run looks."""
    return [
        hook
        for name in _HOOKS
        for hook in getattr(module, name).values()
        if getattr(hook, "__module__", "") not in (_OBSERVING, "tempo.capture")
    ]


def _is_foreign(function: Any) -> bool:
    if isinstance(function, partial):  # its arguments count
        return True
    home = getattr(function, "__module__", None) or type(function).__module__
    return not f"{home}.".startswith((*_LIBRARIES, "builtins.", "functools."))


def _name(function: Any) -> str:
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _plain(value: Any) -> str | None:
    """A value as text, None if it is no plain one."""
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype):
        return repr(value)
    if isinstance(value, list | tuple | set | frozenset):
        items: Iterable[Any] = sorted(value, key=repr) if isinstance(value, set) else value
        parts = [_plain(item) for item in items]
        return None if None in parts else f"{type(value).__name__}({', '.join(map(str, parts))})"
    if isinstance(value, Mapping):
        return _plain([[key, value[key]] for key in sorted(value, key=repr)])
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    return None


def _described(value: Any, depth: int = 0) -> str | None:
    """A function, or what one refers to, by all that determines its effect; None if that is open.

    A function is known by its code and by the values of its defaults, its closure and the global
    names that it uses. An object with a state of its own is not.
    """
    if depth > DEEPEST:
        return None
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, partial):
        parts = [value.func, *value.args, *value.keywords.items()]
        return _described_all("partial", parts, depth)
    if (plain := _plain(value)) is not None:
        return plain
    # A class is known by its name, and a library's function by the library's version.
    if isinstance(value, BuiltinFunctionType | type):
        return _name(value)
    if not isinstance(value, FunctionType):
        return None
    if not _is_foreign(value):
        return _name(value)
    parts: list[Any] = [value.__defaults__, sorted((value.__kwdefaults__ or {}).items())]
    try:
        parts += [cell.cell_contents for cell in value.__closure__ or ()]
    except ValueError:  # a name that is not bound yet
        return None
    names = [name for code in _codes(value.__code__) for name in code.co_names]
    parts += [value.__globals__[name] for name in names if name in value.__globals__]
    return _described_all(f"{_name(value)} {_code(value)}", parts, depth)


def _described_all(what: str, parts: Iterable[Any], depth: int) -> str | None:
    described = [_described(part, depth + 1) for part in parts]
    return None if None in described else f"{what} {described}"


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code, and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _code(function: Callable[..., Any]) -> str:
    """A hash of what a function does, without the values it refers to."""
    code = getattr(getattr(function, "__wrapped__", function), "__code__", None)
    if code is None:
        return "built in"
    digest = hashlib.sha256()
    for each in _codes(code):
        constants = [c for c in each.co_consts if not isinstance(c, CodeType)]
        digest.update(each.co_code + repr([each.co_names, constants]).encode())
    return digest.hexdigest()[:16]


def _tokenizer(tokenizer: Any) -> str:
    """The tokenizer by its whole state, as far as it has one that can be written down."""
    if tokenizer is None:
        return "no tokenizer"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = backend.to_str()
    else:
        state = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    settings = {
        name: _plain(value)
        for name, value in {**getattr(tokenizer, "init_kwargs", {}), **vars(tokenizer)}.items()
        if name not in ("name_or_path", "init_kwargs", "deprecation_warnings", "verbose")
    }
    special = getattr(tokenizer, "special_tokens_map", {})
    chat = getattr(tokenizer, "chat_template", None)
    kept = [_name(type(tokenizer)), state, str(special), str(chat), sorted(settings.items())]
    return hashlib.sha256(json.dumps(kept, default=str).encode()).hexdigest()
