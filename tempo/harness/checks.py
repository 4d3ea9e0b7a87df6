"""What can be wrong with a study, found before any model is loaded and said in one line each.

Fields are looked up in the source: a claim that reads `case.gpa` where the case has `gap` would
else fail after an hour of measuring.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tempo.errors import SpecError
from tempo.harness.config import StudyConfig
from tempo.harness.runs import Prompt, RunRequest
from tempo.harness.study import Study, syntax_of
from tempo.harness.texts import ReadRequest


def check_study(study: Study, config: StudyConfig) -> None:
    """Nothing, or SpecError in one line: what is missing, misspelt or asked for wrongly."""
    if study.measurement is None:
        raise SpecError(
            f"study {study.name!r} measures nothing; decorate a generator with @study.measure"
        )
    case = case_class(study)
    fields = [field.name for field in dataclasses.fields(case)]
    _check_made(study, case, fields)
    known = {*fields, *(name for name in dir(case) if not name.startswith("__"))}
    for claim in study.claims.values():
        claim.claim  # noqa: B018 -- made here, so that what is wrong with it is found here
        for function in filter(None, (claim.function, claim.control_function)):
            _check_read(function, f"claim {claim.id}", case, known)
    _check_first_yield(study, config)


def case_class(study: Study) -> type[Any]:
    """The dataclass that a measurement returns: as annotated, or as its return statements say."""
    measurement = study.measurement
    assert measurement is not None
    try:
        returned = typing.get_type_hints(measurement).get("return")
    except (NameError, TypeError):  # a name that only the type checker knows
        returned = None
    candidates = [a for a in _flat(typing.get_args(returned)[2:]) if a is not type(None)]
    if not candidates:
        candidates = [
            inspect.unwrap(measurement).__globals__.get(call.func.id)
            for call in _calls_returned(measurement)
            if isinstance(call.func, ast.Name)
        ]
    for candidate in candidates:
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    raise SpecError(
        f"{measurement.__name__} of study {study.name!r} returns no dataclass; expected "
        f"'return Case(...)' with a frozen dataclass, or the annotation '-> Steps[Case]'"
    )


def _flat(types: Sequence[Any]) -> Iterator[Any]:
    """The members of unions among these types, and the others as they are."""
    for found in types:
        yield from typing.get_args(found) or (found,)


def _calls_returned(function: Callable[..., Any]) -> list[ast.Call]:
    returns = [node.value for node in ast.walk(syntax_of(function)) if isinstance(node, ast.Return)]
    return [value for value in returns if isinstance(value, ast.Call)]


def _check_made(study: Study, case: type[Any], fields: Sequence[str]) -> None:
    """Wherever the measurement makes a case, it gives known fields, and all that it must."""
    measurement = study.measurement
    assert measurement is not None
    needed = {
        field.name
        for field in dataclasses.fields(case)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    for call in ast.walk(syntax_of(measurement)):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            continue
        if call.func.id != case.__name__:
            continue
        keywords = [keyword.arg for keyword in call.keywords]
        for keyword in keywords:
            if keyword is not None and keyword not in fields:
                raise SpecError(
                    f"{measurement.__name__} of study {study.name!r} gives its case {keyword!r}; "
                    f"{_hint(keyword, fields)}"
                )
        missing = needed - set(keywords)
        if missing and None not in keywords and not call.args:
            raise SpecError(
                f"{measurement.__name__} of study {study.name!r} makes a case without "
                f"{', '.join(sorted(missing))}"
            )


def _check_read(function: Callable[..., Any], what: str, case: type[Any], known: set[str]) -> None:
    """The function reads only fields that a case has."""
    parameters = list(inspect.signature(function).parameters)
    if not parameters:
        raise SpecError(f"{what}: {function.__name__} takes no case; expected one parameter")
    if function.__name__ == "<lambda>":
        return
    for node in ast.walk(syntax_of(function)):
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
            continue
        if node.value.id == parameters[0] and node.attr not in known:
            raise SpecError(
                f"{what}: {function.__name__} reads {parameters[0]}.{node.attr}; "
                f"{_hint(node.attr, sorted(known), case.__name__)}"
            )


def _hint(name: str, known: Sequence[str], owner: str = "the case") -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"{owner} has {', '.join(known)}"


class _NotYetError(Exception):
    """The measurement needs its model before it asks for the first run."""


class _NoModel:
    """Stands for the model while none is loaded."""

    def __getattr__(self, name: str) -> Any:
        raise _NotYetError


def _check_first_yield(study: Study, config: StudyConfig) -> None:
    """The measurement first asks for a run, as far as it can be told without a model.

    Later ones are checked when they are asked for. Other errors are left for then, too: they may
    come from the missing model.
    """
    assert study.measurement is not None
    absent: Any = _NoModel()
    prompt = Prompt(config.prompt, "own", config, absent, captures=study.captures)
    steps = study.measurement(prompt)
    try:
        asked = next(steps)
    except Exception:
        return
    requests(study, asked, steps)


def requests(study: Study, asked: Any, steps: Any) -> list[RunRequest] | ReadRequest:
    """What a measurement asked for: a list of runs, or texts. Raises SpecError if it is neither."""
    if isinstance(asked, ReadRequest):
        return asked
    found = [asked] if isinstance(asked, RunRequest) else asked
    if isinstance(found, list | tuple) and all(isinstance(each, RunRequest) for each in found):
        return list(found)
    kind = type(asked).__name__
    if isinstance(found, list | tuple):
        other = next(each for each in found if not isinstance(each, RunRequest))
        kind += f" with a {type(other).__name__} in it"
    code, line = steps.gi_code, steps.gi_frame.f_lineno if steps.gi_frame else "?"
    name = code.co_filename.rpartition("/")[2]
    raise SpecError(
        f"{code.co_name} of study {study.name!r} yields a {kind} ({name}, line {line}); expected "
        "run(prompt, ...), a list of such runs, or read(prefix, paths)"
    )
