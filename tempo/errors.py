"""All errors that tempo raises on purpose.

Each message says what was seen, what was expected, and how to fix it.
"""


class TempoError(Exception):
    """Base class of every error that tempo raises on purpose."""


class SpecError(TempoError, ValueError):
    """A setting, prompt, token set or configuration file cannot be used."""


class ModelError(TempoError, RuntimeError):
    """A model cannot be loaded, cannot run TEMPO, or gives output that is not finite."""


class ChoiceError(ModelError, SpecError):
    """There is no such model, dtype or device: a mistake in the call, not in a model."""


class TraceError(TempoError, ValueError):
    """A saved trace is missing, incomplete, damaged, or of another format version."""


class MemoryBudgetError(TempoError, MemoryError):
    """A run would need more memory than its budget. Raised before anything is computed."""


class ResultsError(TempoError, OSError):
    """Results cannot be written or read. Earlier results on disk are left intact."""


class WorkerError(TempoError, RuntimeError):
    """Workers cannot be had, end before they begin, or are not what the session needs."""
