"""tempo: how language models handle parallel tokens, tested with evidence.

TEMPO decoding appends at each step every token whose probability reaches a threshold, all at one rotary position.
"""

from tempo import reference
from tempo.engine import generate, generate_batch, stream
from tempo.errors import (
    MemoryBudgetError,
    ModelError,
    ResultsError,
    SpecError,
    TempoError,
    TraceError,
)
from tempo.models import LanguageModel, load_model, wrap_model
from tempo.spec import RunSpec
from tempo.trace import Step, Trace, load_trace

__version__ = "0.1.0"

__all__ = [
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
    "generate",
    "generate_batch",
    "load_model",
    "load_trace",
    "reference",
    "stream",
    "wrap_model",
]
