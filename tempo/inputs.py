"""What a public function takes: arguments are checked when it is called, and refused in words.

Each rule takes a value and returns it in the form that the function computes with, or raises
`ValueError` with what was expected. `checked` puts the function, the argument and what was seen in
front of that.
"""

from __future__ import annotations

import difflib
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from inspect import signature
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from tempo.errors import SpecError
from tempo.text import escaped

if TYPE_CHECKING:
    import numpy as np

LONGEST_PART = 255  # bytes of one name in a path
LONGEST_SEEN = 80  # characters of a refused value that a message shows

P = ParamSpec("P")
R = TypeVar("R")
Rule = Callable[[Any], Any]


def checked(**rules: Rule) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: the function's arguments go through the rules of their names.

    A keyword that the function does not know is refused with the nearest name. A call that does
    not fit the signature is Python's own TypeError.

    Example:
        >>> @checked(width=whole(low=1))
        ... def doubled(width):
        ...     return 2 * width
        >>> doubled(3)
        6
        >>> doubled(0.5)
        Traceback (most recent call last):
        tempo.errors.SpecError: doubled: width is 0.5; expected a whole number from 1
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        called = signature(function)

        @wraps(function)
        def call(*args: P.args, **keywords: P.kwargs) -> R:
            for name in keywords:
                if name not in called.parameters:
                    hint = unknown_key(name, list(called.parameters))
                    raise SpecError(f"{function.__name__}: {hint}")
            bound = called.bind(*args, **keywords)
            for name, rule in rules.items():
                if name in bound.arguments:
                    given = bound.arguments[name]
                    bound.arguments[name] = conform(rule, f"{function.__name__}: {name}", given)
            return function(*bound.args, **bound.kwargs)

        return call

    return decorate


def conform(rule: Rule, what: str, value: Any) -> Any:
    """The value as the rule gives it. A SpecError says what was seen and expected."""
    try:
        return rule(value)
    except SpecError as error:
        raise SpecError(f"{what} {error}") from None
    except (ValueError, TypeError, OverflowError) as error:
        raise SpecError(f"{what} is {seen(value)}; {error}") from None


def seen(value: object) -> str:
    """A refused value as one line of a message."""
    try:
        text = repr(value)
    except Exception as error:  # of a class that is not ours
        text = f"a {type(value).__name__} whose repr fails ({type(error).__name__})"
    text = escaped(" ".join(text.split()))
    return text if len(text) <= LONGEST_SEEN else text[: LONGEST_SEEN - 3] + "..."


def unknown_key(key: str, known: Sequence[str]) -> str:
    """What is said of a key that is not known, with the nearest one."""
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(known)}"
    return f"unknown key '{key}'; {hint}"


def number(
    low: float = -math.inf, high: float = math.inf, *, inside: bool = False, other: float = math.nan
) -> Rule:
    """A finite number from low to high, or between them if `inside`; and not `other`."""
    ends = [f"{'above' if inside else 'from'} {low:g}"] if low > -math.inf else []
    ends += [f"{'below' if inside else 'to'} {high:g}"] if high < math.inf else []
    ends += [f"other than {other:g}"] if other == other else []
    expected = " ".join(["expected a number", *ends])

    def rule(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(expected)
        found = float(value)
        fits = low < found < high if inside else low <= found <= high
        if not fits or found == other:
            raise ValueError(expected)
        return found

    return rule


def whole(low: int, high: int | None = None) -> Rule:
    """An integer of any library from low to high."""
    expected = f"expected a whole number from {low}" + (f" to {high}" if high is not None else "")

    def rule(value: Any) -> int:
        try:
            found = low - 1 if isinstance(value, bool) else operator.index(value)
        except TypeError:
            raise ValueError(expected) from None
        if found < low or (high is not None and found > high):
            raise ValueError(expected)
        return found

    return rule


def optional(rule: Rule) -> Rule:
    """None, or what the rule takes."""
    return lambda value: None if value is None else rule(value)


def one_of(*words: str) -> Rule:
    """One of these words."""

    def rule(value: Any) -> str:
        if not isinstance(value, str) or value not in words:
            raise ValueError(f"expected one of {', '.join(words)}")
        return value

    return rule


def text(value: Any) -> str:
    """Text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError("expected a text that is not empty")
    return value


def words(value: Any) -> str:
    """Text, which may be empty."""
    if not isinstance(value, str):
        raise ValueError("expected a text")
    return value


def mapping(value: Any) -> Any:
    """A mapping from names to values."""
    if not isinstance(value, Mapping):
        raise ValueError("expected a mapping from names to values")
    return value


def place(value: Any) -> Path:
    """The path of a file or folder."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ValueError("expected the path of a folder or file, such as 'results'")
    if not isinstance(os.fspath(value), str) or "\0" in os.fspath(value):
        raise ValueError("expected a path without null characters")
    if any(len(os.fsencode(part)) > LONGEST_PART for part in Path(value).parts):
        raise ValueError(f"expected names of at most {LONGEST_PART} bytes, as file systems have")
    return Path(value)


def instance(kind: str, made_by: str) -> Rule:
    """An object of the class of this name, which need not be imported to ask."""

    def rule(value: Any) -> Any:
        if kind not in (base.__name__ for base in type(value).__mro__):
            raise ValueError(f"expected a {kind}, from {made_by}")
        return value

    return rule


def model_name(value: Any) -> str:
    """The name of a model, or the path of one."""
    name = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise ValueError(
            "expected the name of a model such as 'smollm2-135m', a folder, a .gguf file, or a "
            "hub id"
        )
    return name


model = instance("LanguageModel", "tempo.load_model or tempo.wrap_model")


def function(value: Any) -> Any:
    """What can be called."""
    if not callable(value):
        raise ValueError("expected a function of one case")
    return value


def several(rule: Rule, of: str) -> Rule:
    """A list of what the rule takes."""

    def listed(value: Any) -> list[Any]:
        if isinstance(value, str | bytes) or not isinstance(value, Iterable):
            raise ValueError(f"expected a list of {of}")
        return [rule(item) for item in value]

    return listed


def array(ndim: int | None = None, least: int = 1, *, finite: bool = True) -> Rule:
    """A float64 array of `ndim` dimensions, the first of which has `least` entries or more."""
    shape = "of numbers" if ndim is None else f"of numbers with {ndim} dimension(s)"
    expected = f"expected an array {shape}" + (f", {least} or more" if least > 1 else "")

    def rule(value: Any) -> np.ndarray:
        import numpy as np  # `tempo --help` must not import it

        try:
            plain = np.asarray(value)
            is_number = plain.dtype.kind in "biuf" and not isinstance(value, str | bytes)
        except (ValueError, TypeError, RuntimeError):  # ragged, or a tensor that cannot be read
            is_number, plain = False, np.zeros(())
        fits = plain.ndim > 0 and (ndim is None or plain.ndim == ndim)
        if not is_number or not fits or len(plain) < least or not plain.size:
            raise ValueError(expected)
        if finite and not np.isfinite(plain).all():
            raise ValueError("expected finite numbers; leave out what is NaN or infinite")
        return plain.astype(np.float64)

    return rule


def distribution(value: Any) -> np.ndarray:
    """Probabilities, [V]: finite, none negative, and not all of them zero."""
    found = array(1)(value)
    if found.min() < 0 or found.max() <= 0:
        raise ValueError("expected probabilities: none negative, and not all of them zero")
    return found
