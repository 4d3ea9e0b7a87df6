"""tempo: how language models handle parallel tokens, tested with evidence.

TEMPO decoding appends, at each step, every token whose probability reaches a threshold.
All tokens of a step share one rotary position.

    lm = tempo.load_model("smollm2-135m")
    trace = tempo.generate(lm, "The cat sat on the", threshold=0.1)
    print(trace.text)

`import tempo` is cheap: torch and transformers are imported when a name that needs them is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from tempo.errors import (
    ChoiceError,
    MemoryBudgetError,
    ModelError,
    ResultsError,
    SpecError,
    TempoError,
    TraceError,
    WorkerError,
)

if TYPE_CHECKING:
    from tempo import claims, metrics, reference, viewing
    from tempo.engine import generate, generate_batch, stream
    from tempo.interpret import lens, patch
    from tempo.models import LanguageModel, load_model, wrap_model
    from tempo.spec import RunSpec
    from tempo.trace import Step, Trace, load_trace
    from tempo.viewing import View, view

__version__ = "0.1.0"

__all__ = [
    "ChoiceError",
    "LanguageModel",
    "MemoryBudgetError",
    "ModelError",
    "ResultsError",
    "RunSpec",
    "SpecError",
    "Step",
    "TempoError",
    "Trace",
    "TraceError",
    "View",
    "WorkerError",
    "claims",
    "generate",
    "generate_batch",
    "lens",
    "load_model",
    "load_trace",
    "metrics",
    "patch",
    "reference",
    "stream",
    "view",
    "viewing",
    "wrap_model",
]

# The module of each public name that is imported on first use (PEP 562).
_HOMES = {
    "LanguageModel": "models",
    "RunSpec": "spec",
    "Step": "trace",
    "Trace": "trace",
    "View": "viewing",
    "generate": "engine",
    "generate_batch": "engine",
    "lens": "interpret",
    "load_model": "models",
    "load_trace": "trace",
    "patch": "interpret",
    "stream": "engine",
    "view": "viewing",
    "wrap_model": "models",
}
# `tempo.metrics` and the like work after `import tempo` alone.
_MODULES = {
    "attention",
    "cache",
    "capture",
    "claims",
    "engine",
    "interpret",
    "layout",
    "metrics",
    "models",
    "records",
    "reference",
    "residual",
    "selection",
    "spec",
    "statistics",
    "store",
    "support",
    "text",
    "trace",
    "viewing",
    "wheels",
}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f"tempo.{name}")
    if name in _HOMES:
        value = getattr(import_module(f"tempo.{_HOMES[name]}"), name)
        globals()[name] = value  # the next use finds it without this function
        return value
    raise AttributeError(f"module 'tempo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(globals().keys() | _HOMES.keys() | _MODULES)
