"""Every error tempo raises on purpose; each message says what was seen, what was expected and how to fix it."""


class TempoError(Exception):
    """Base class of all errors raised by tempo."""


class SpecError(TempoError, ValueError):
    """A setting, prompt, token set or configuration file that cannot be run."""


class ModelError(TempoError, RuntimeError):
    """A model that cannot be loaded, or that cannot run TEMPO, or whose output is not finite."""


class TraceError(TempoError, ValueError):
    """A saved trace that is missing, incomplete, damaged or of another format version."""


class MemoryBudgetError(TempoError, MemoryError):
    """A run whose computed memory exceeds the budget; raised before anything is computed."""


class ResultsError(TempoError, OSError):
    """Results that cannot be written or read; what was there before is whole."""
