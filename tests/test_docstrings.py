"""What help() tells: every setting by name, with its default, and examples that run."""

from __future__ import annotations

import doctest
import inspect
import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from types import ModuleType
from typing import get_type_hints

import pytest

import tempo
from tempo import engine, interpret, models, reference, spec, trace
from tempo.errors import SpecError
from tempo.inputs import checked
from tempo.spec import RunSpec

GENERATES = (tempo.generate, tempo.reference.generate)
PUBLIC = (
    tempo.generate,
    tempo.generate_batch,
    tempo.stream,
    tempo.load_model,
    tempo.wrap_model,
    tempo.load_trace,
    tempo.lens,
    tempo.patch,
    tempo.reference.generate,
    tempo.LanguageModel.encode,
    tempo.LanguageModel.chat,
    tempo.RunSpec,
    tempo.Trace,
    tempo.Step,
    tempo.LanguageModel,
)
# Of these, more types are taken than a spec holds.
WIDER = (
    "prompt",
    "schedule",
    "replay",
    "replay_positions",
    "replay_weights",
    "replay_links",
    "capture",
)
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Example")
# These modules are run by pytest or by a shell, and have nothing public.
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(tempo.__path__, "tempo.")
    if not module.name.endswith("__main__")
)


def entries(documented: object) -> dict[str, str]:
    """{name: explanation} of the arguments or attributes in a docstring."""
    lines = inspect.getdoc(documented).splitlines()
    found: dict[str, str] = {}
    inside, name = False, ""
    for line in lines:
        if heading := re.match(r"(\w+):$", line):
            inside = heading[1] in ("Args", "Attributes")
        elif inside and (entry := re.match(r"    (\w+): (.*)", line)):
            name = entry[1]
            found[name] = entry[2]
        elif inside and line.startswith("        "):
            found[name] += " " + line.strip()
    return found


def examples(documented: object) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(inspect.getdoc(documented) or "")


def failures(module: ModuleType) -> tuple[int, int, str]:
    """How many examples of a module fail, how many there are, and what is said about them."""
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in doctest.DocTestFinder().find(module):
        runner.run(test, out=said.append)
    return runner.failures, runner.tries, "".join(said)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_every_module_run(name: str) -> None:
    num_failed, _, said = failures(import_module(name))
    assert num_failed == 0, said


def test_an_example_that_is_wrong_would_be_seen() -> None:
    module = ModuleType("wrong", doc=">>> 1 + 1\n3")
    assert failures(module)[:2] == (1, 1)
    assert failures(ModuleType("right", doc=">>> 1 + 1\n2"))[:2] == (0, 1)


@pytest.mark.parametrize("module", [engine, interpret, models, reference, spec, trace])
def test_the_modules_of_the_public_names_have_examples(module: ModuleType) -> None:
    assert failures(module)[1] >= 3


@pytest.mark.parametrize("documented", PUBLIC, ids=lambda documented: documented.__qualname__)
def test_public_names_are_explained_with_an_example(documented: object) -> None:
    text = inspect.getdoc(documented)
    first, blank, *_ = text.split("\n")
    assert first.endswith(".")
    assert blank == ""
    assert max(map(len, text.split("\n"))) <= 100
    headings = re.findall(r"^(\w+):$", text, re.M)
    assert headings == [name for name in SECTIONS if name in headings]
    if documented is not tempo.Step:  # a part of a trace, which has one
        assert examples(documented)


@pytest.mark.parametrize("function", PUBLIC[:11], ids=lambda function: function.__qualname__)
def test_every_argument_is_in_the_signature_and_explained(function: object) -> None:
    parameters = dict(inspect.signature(function).parameters)
    parameters.pop("self", None)
    kinds = {parameter.kind for parameter in parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    assert all(parameter.annotation is not parameter.empty for parameter in parameters.values())
    if len(parameters) > 1 or function is tempo.load_model:
        assert list(entries(function)) == list(parameters)


@pytest.mark.parametrize("generate", GENERATES, ids=["engine", "oracle"])
def test_generate_has_the_settings_of_a_spec_with_their_defaults(generate) -> None:
    parameters = inspect.signature(generate).parameters
    own = {"lm", "memory_budget", "spool", "store", "hooks"}
    assert [name for name in parameters if name not in own] == list(RunSpec.model_fields)
    hints, fields = get_type_hints(generate), get_type_hints(RunSpec)
    for name, field in RunSpec.model_fields.items():
        default = parameters[name].default
        assert (
            default is parameters[name].empty if field.is_required() else default == field.default
        )
        assert hints[name] == fields[name] or name in WIDER


@pytest.mark.parametrize("generate", GENERATES, ids=["engine", "oracle"])
def test_a_setting_is_explained_in_the_same_words_everywhere(generate) -> None:
    explained, settings = entries(generate), entries(RunSpec)
    assert list(settings) == list(RunSpec.model_fields)
    assert {name: explained[name] for name in settings} == settings


@pytest.mark.parametrize("generate", GENERATES, ids=["engine", "oracle"])
def test_every_setting_that_is_given_arrives(generate, tiny) -> None:
    given = {
        "prompt": (65, 66),
        "threshold": 0.2,
        "schedule": (0.3, 0.2),
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.05,
        "sample": 2,
        "seed": 3,
        "max_steps": 2,
        "visibility": "causal",
        "positions": "sequential",
        "readout": "last",
        "weighting": "count",
        "prune": None,
        "prune_by": "posterior",
        "max_width": 3,
        "stop_at_eos": False,
        "replay": ((1, 2), (3,)),
        "replay_positions": ((5, 5), (6,)),
        "replay_weights": ((0.5, 1.0), (2.0,)),
        "replay_links": None,
        "weighting_layers": None,
        "isolated_layers": (0, 2),
        "isolated_mass": "self",
        "capture": ("logits",),
    }
    assert list(given) == list(RunSpec.model_fields)
    defaults = {name: field.default for name, field in RunSpec.model_fields.items()}
    # some settings exclude others, so two runs are needed to give everything
    other = given | {
        "readout": "mixture",
        "weighting": "posterior",
        "prune": 0.3,
        "prune_by": "attention",
        "replay_weights": None,
        "replay_links": (((0.25,), (0.75,)),),
        "weighting_layers": (0, 2),
        "isolated_layers": None,
        "isolated_mass": "spread",
    }
    for name, default in defaults.items():
        assert (given[name], other[name]) != (default, default)
    for settings in (given, other):
        run = generate(tiny, **settings)
        assert run.spec == RunSpec(**settings)
        again = generate(tiny, settings["prompt"], **run.spec.model_dump(exclude={"prompt"}))
        assert again.spec == run.spec


@pytest.mark.parametrize("generate", GENERATES, ids=["engine", "oracle"])
def test_a_misspelt_setting_is_told_what_was_meant(generate, tiny) -> None:
    with pytest.raises(SpecError, match="unknown key 'treshold'; did you mean 'threshold'"):
        generate(tiny, "ab", treshold=0.1)
    with pytest.raises(SpecError, match=r"unknown key 'temperature_scale'; valid keys: .*capture"):
        generate(tiny, "ab", temperature_scale=0.1)


def test_a_checked_function_is_the_same_otherwise() -> None:
    def add(first: int, *, second: int = 2) -> int:
        """The sum."""
        return first + second

    called = checked()(add)
    assert called(1) == 3
    assert called(1, second=4) == called(first=1, second=4) == 5
    assert inspect.signature(called) == inspect.signature(add)
    assert (called.__name__, called.__doc__) == ("add", "The sum.")
    with pytest.raises(TypeError):
        called()


def in_a_fresh_python(code: str, *arguments: str) -> list[str]:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_tempo_is_cheap() -> None:
    """A pytest plugin inside the package is imported at every start of pytest."""
    heavy = {"torch", "transformers", "numpy", "scipy", "pydantic", "rich"}
    loaded = in_a_fresh_python("import tempo, sys; tempo.TempoError; print(*sys.modules)")
    assert "tempo" in loaded
    assert not heavy & set(loaded)
    assert {"numpy", "scipy"} <= set(
        in_a_fresh_python("import tempo, sys; tempo.metrics; print(*sys.modules)")
    )


def test_every_public_name_is_there_after_import_tempo_alone() -> None:
    code = """
import sys
for name in sys.argv[1:]:
    for module in [module for module in sys.modules if module.split(".")[0] == "tempo"]:
        del sys.modules[module]
    import tempo
    assert name not in vars(tempo) or name.endswith("Error"), name
    assert getattr(tempo, name) is not None
    print(name)
"""
    names = [*tempo.__all__, "text", "trace"]
    assert in_a_fresh_python(code, *names) == names


def test_public_names_are_listed_and_others_are_not_there() -> None:
    assert set(tempo.__all__) <= set(dir(tempo))
    assert {"claims", "metrics", "reference"} <= set(tempo.__all__)
    assert sorted(tempo.__all__) == tempo.__all__
    with pytest.raises(AttributeError, match="module 'tempo' has no attribute 'generat'"):
        tempo.generat  # noqa: B018
    assert not hasattr(tempo, "nothing")
