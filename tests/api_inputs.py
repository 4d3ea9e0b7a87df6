"""Wrong inputs of every kind to the public functions, and what each of them gets for an answer.

`run(lm, folder)` tries them all and counts. Right is a TempoError that says in one line what was
seen and what to do, or a TypeError of Python's own where a call does not fit its signature. A raw
exception is wrong, and so is silence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tempo
from tempo import claims, metrics, reference, statistics
from tempo.spec import RunSpec
from tempo.store import TraceStore
from tests.tiny_models import SHAPE

PROMPT = "The cat"
# A message of a wrong input must not flood the terminal; the longest lists all valid settings.
LONGEST_MESSAGE = 1200


class Kind(NamedTuple):
    """One kind of wrong input: its name, and the call that must be refused."""

    name: str
    call: Callable[[], object]


class Counts(NamedTuple):
    """How many kinds were tried, and those that were not refused in words."""

    tried: int
    refused: int
    raw: list[str]
    silent: list[str]
    wordy: list[str]


class Odd:
    """An object that is nothing in particular."""

    def __repr__(self) -> str:
        return "<odd\nobject>"


def strange_values() -> dict[str, Any]:
    """Values of many types, of which a setting takes few."""
    return {
        "nothing": None,
        "true": True,
        "word": "banana",
        "empty text": "",
        "digits": "3",
        "minus one": -1,
        "zero": 0,
        "huge": 10**30,
        "half": 0.5,
        "nan": math.nan,
        "infinity": math.inf,
        "complex": 1 + 2j,
        "bytes": b"ab",
        "list": [1, "a"],
        "nested": [[1, 2], ["a"]],
        "ragged": [[[1]], 2],
        "mapping": {"a": 1},
        "array": np.zeros((2, 2)),
        "object": Odd(),
        "function": len,
    }


# Which of the strange values a setting takes; all others must be refused.
TAKES = {
    "prompt": {"word", "digits"},
    "threshold": {"half"},
    "schedule": {"nothing"},
    "top_k": {"nothing", "huge"},
    "top_p": {"nothing", "half"},
    "min_p": {"nothing", "half"},
    "sample": {"nothing", "huge"},
    "seed": {"zero", "huge"},
    "max_steps": {"huge"},
    "visibility": set(),
    "positions": set(),
    "readout": set(),
    "weighting": set(),
    "prune": {"nothing", "half"},
    "prune_by": set(),
    "max_width": {"nothing", "huge"},
    "stop_at_eos": {"true"},
    "replay": {"nothing"},
    "replay_positions": {"nothing"},
    "replay_weights": {"nothing"},
    "replay_links": {"nothing"},
    "weighting_layers": {"nothing"},
    "isolated_layers": {"nothing"},
    "isolated_mass": set(),
    "capture": set(),
}
# What the engine takes beside the spec's settings.
ENGINE = {
    "memory_budget": {"nothing", "huge"},
    "spool": {"nothing", "word", "digits"},
    "store": {"nothing", "word", "digits"},
    "hooks": {"nothing"},
}
LOADING = {
    "name": set(),
    "dtype": set(),
    "device": set(),
    "cache_dir": {"nothing", "word", "digits", "empty text"},
    "revision": {"nothing"},
}


def of_settings(lm: tempo.LanguageModel) -> Iterator[Kind]:
    """Each strange value for each setting, and for what the engine takes beside them."""
    values = strange_values()
    for setting, taken in TAKES.items():
        for name in values.keys() - taken:
            given = {"prompt": PROMPT, "max_steps": 1} | {setting: values[name]}
            yield Kind(f"RunSpec {setting}: {name}", lambda given=given: RunSpec(**given))
            if name in ("nan", "object", "ragged", "word", "huge"):
                yield Kind(
                    f"generate {setting}: {name}", lambda given=given: tempo.generate(lm, **given)
                )
                yield Kind(
                    f"oracle {setting}: {name}", lambda given=given: reference.generate(lm, **given)
                )
    specs = [RunSpec(prompt=PROMPT, max_steps=1)]
    for setting, taken in ENGINE.items():
        for name in values.keys() - taken:
            given = {setting: values[name]}
            yield Kind(
                f"generate_batch {setting}: {name}",
                lambda given=given: tempo.generate_batch(lm, specs, **given),
            )
            yield Kind(
                f"stream {setting}: {name}",
                lambda given=given: list(tempo.stream(lm, specs, **given)),
            )
    for name in values.keys() - {"nothing"}:
        yield Kind(f"specs: {name}", lambda name=name: tempo.generate_batch(lm, values[name]))
    for name in values.keys() - {"huge"}:
        yield Kind(
            f"max_rows: {name}",
            lambda value=values[name]: list(tempo.stream(lm, specs, max_rows=value)),
        )


def of_models(lm: tempo.LanguageModel, folder: Path) -> Iterator[Kind]:
    """What is no model, no name of one, or no text for one."""
    values = strange_values()
    closed = tempo.wrap_model(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **SHAPE)))
    closed.close()
    spec = RunSpec(prompt=[1], max_steps=1)
    models = values | {"closed": closed, "module": torch.nn.Linear(2, 2), "model": lm.model}
    for name, value in models.items():
        yield Kind(f"generate lm: {name}", lambda v=value: tempo.generate(v, PROMPT))
        yield Kind(f"batch lm: {name}", lambda v=value: tempo.generate_batch(v, [spec]))
        yield Kind(f"stream lm: {name}", lambda v=value: list(tempo.stream(v, [spec])))
        yield Kind(f"oracle lm: {name}", lambda v=value: reference.generate(v, PROMPT))
        if name != "model":
            yield Kind(f"wrap_model: {name}", lambda v=value: tempo.wrap_model(v))
    for name in values.keys() - {"nothing"}:
        yield Kind(
            f"wrap_model tokenizer: {name}",
            lambda v=values[name]: tempo.wrap_model(lm.model, tokenizer=v).encode("a"),
        )
    for name in values.keys() - {"nothing", "word", "digits"}:
        yield Kind(
            f"wrap_model name: {name}", lambda v=values[name]: tempo.wrap_model(lm.model, name=v)
        )
    for setting, taken in LOADING.items():
        for name in values.keys() - taken:
            given = {"name": "tiny"} | {setting: values[name]}
            yield Kind(f"load_model {setting}: {name}", lambda g=given: tempo.load_model(**g))
    (folder / "empty").mkdir()
    (folder / "file.txt").write_text("x")
    (folder / "broken.gguf").write_bytes(b"GGUF\x00\x01\x02")
    (folder / "config").mkdir()
    (folder / "config" / "config.json").write_text('{"model_type": "llama"')
    (folder / "strange").mkdir()
    (folder / "strange" / "config.json").write_text('{"model_type": 5, "vocab_size": -1}')
    names = (" ", "\0", "a\nb", "x" * 5000, "../nowhere", "~nobody/x", "a/b/c", "https://x/y")
    files = ("empty", "file.txt", "broken.gguf", "config", "strange", "missing.gguf")
    for name in (*names, *(str(folder / file) for file in files)):
        yield Kind(f"load_model {name[-12:]!r}", lambda name=name: tempo.load_model(name))
    for name in values.keys() - {"word", "digits"}:
        yield Kind(f"encode: {name}", lambda v=values[name]: lm.encode(v))
        if name != "empty text":  # an empty message is one
            yield Kind(f"chat: {name}", lambda v=values[name]: lm.chat(v))
    for tokens in ([10**30], [-1], ["a"], 5, None, [math.nan], [[1]], "ab", [True]):
        yield Kind(f"decode: {tokens}", lambda v=tokens: lm.decode(v))
    for token in (10**30, -1, "a", None, math.nan, [1], 0.5, True):
        yield Kind(f"token_text: {token}", lambda v=token: lm.token_text(v))


def of_files(lm: tempo.LanguageModel, folder: Path) -> Iterator[Kind]:
    """What is no place of a trace or a config."""
    values = strange_values()
    trace = tempo.generate(lm, PROMPT, max_steps=1)
    (folder / "taken").write_text("x")
    for name in values.keys() - {"word", "digits"}:
        yield Kind(f"load_trace: {name}", lambda v=values[name]: tempo.load_trace(v))
        yield Kind(f"Trace.save: {name}", lambda v=values[name]: trace.save(v))
        if name != "empty text":  # YAML without content
            yield Kind(f"from_yaml: {name}", lambda v=values[name]: RunSpec.from_yaml(v))
        yield Kind(f"TraceStore: {name}", lambda v=values[name]: TraceStore(lm, v))
    for place in ("\0", "x" * 5000, folder / "taken", folder / "taken" / "below", folder / "none"):
        yield Kind(f"load_trace {str(place)[-6:]!r}", lambda v=place: tempo.load_trace(v))
    for place in ("\0", "x" * 5000, folder / "taken", folder / "taken" / "below"):
        yield Kind(f"save {str(place)[-6:]!r}", lambda v=place: trace.save(v))
        for way in ("spool", "store"):
            yield Kind(
                f"{way} {str(place)[-6:]!r}",
                lambda way=way, v=place: tempo.generate(lm, PROMPT, **{way: v}),
            )
    for text in ("", "[", "a: b: c", "- 1", "prompt: [", "prompt: x\nthreshold: 1e", "\t", "5"):
        yield Kind(f"YAML {text!r}", lambda v=text: RunSpec.from_yaml(v))
    for place in (Path("\0"), folder, folder / "none.yaml", Path("x" * 5000)):
        yield Kind(f"YAML file {str(place)[-6:]!r}", lambda v=place: RunSpec.from_yaml(v))
    spec = RunSpec(prompt=PROMPT)
    for changes in ({"treshold": 1}, {"threshold": "x"}, {"": 1}, {"self": 1}, {"prompt": None}):
        yield Kind(f"but {changes}", lambda v=changes: spec.but(**v))


P = np.array([0.5, 0.25, 0.25])


def of_metrics() -> Iterator[Kind]:
    """What is no distribution, no attention, no keys."""
    wrong = strange_values() | {
        "negative": np.array([1.5, -0.25, -0.25]),
        "not a number": np.array([0.5, math.nan, 0.5]),
        "none left": np.zeros(3),
        "another length": np.array([0.5, 0.5]),
        "words": np.array(["a", "b", "c"]),
        "no tokens": np.zeros(0),
    }
    del wrong["half"]
    pairs = ("total_variation", "kl_divergence", "jensen_shannon", "cosine", "compare")
    for function in pairs:
        call = getattr(metrics, function)
        for name, value in wrong.items():
            yield Kind(f"{function} q: {name}", lambda f=call, v=value: f(P, v))
            yield Kind(f"{function} p: {name}", lambda f=call, v=value: f(v, P))
    for name, value in wrong.items():
        if name != "another length":
            yield Kind(f"entropy: {name}", lambda v=value: metrics.entropy(v))
        if name not in ("negative", "none left"):  # any numbers can be ranked
            yield Kind(f"top_k_overlap p: {name}", lambda v=value: metrics.top_k_overlap(v, P, 1))
    for k in (0, -1, 4, 1.5, "1", None, True, math.nan):
        yield Kind(f"top_k_overlap k: {k}", lambda k=k: metrics.top_k_overlap(P, P, k))
        yield Kind(f"compare ks: {k}", lambda k=k: metrics.compare(P, P, ks=(k,)))
    words = strange_values()
    for name in ("nothing", "word", "bytes", "mapping", "object", "ragged", "list", "empty text"):
        yield Kind(f"softmax: {name}", lambda v=words[name]: metrics.softmax(v))
        yield Kind(f"log_mean_exp: {name}", lambda v=words[name]: metrics.log_mean_exp(v))
        yield Kind(
            f"sibling_attention: {name}", lambda v=words[name]: metrics.sibling_attention(v, [1, 2])
        )
    weights = np.full((1, 1, 2, 3), 1 / 3)
    for slots in ([], [1], [1, 5], [-1, 0], ["a", "b"], None, 5, [2, 1], [0, 1], [[1, 2]]):
        yield Kind(
            f"sibling_attention slots: {slots}",
            lambda v=slots: metrics.sibling_attention(weights, v),
        )
    for start in (0, -1, 9, "a", None, 1.5):
        yield Kind(
            f"context_distance start: {start}",
            lambda v=start: metrics.context_distance(weights, weights, v),
        )
    for other in (None, "a", np.zeros((2, 1, 2, 3)), np.zeros(3), Odd()):
        yield Kind(
            f"context_distance: {other!r:.20}",
            lambda v=other: metrics.context_distance(weights, v, 1),
        )
    keys = np.ones((1, 1, 2, 4))
    good = {"keys": keys, "raw_keys": keys, "frequencies": [np.ones(2)], "num_candidates": 3}
    bad = {
        "keys": (None, "a", np.ones(3), np.ones((2, 1, 2, 4)), np.full_like(keys, math.nan)),
        "raw_keys": (None, "a", np.ones((1, 1, 3, 4)), Odd()),
        "frequencies": (None, [], [np.ones(9)], ["a"], [np.ones(2)] * 3, 5),
        "num_candidates": (0, -1, "a", None, 1.5, math.inf),
    }
    for argument, values in bad.items():
        for value in values:
            given = good | {argument: value}
            yield Kind(
                f"recover_positions {argument}: {value!r:.20}",
                lambda g=given: metrics.recover_positions(**g),
            )


def of_claims() -> Iterator[Kind]:
    """What is no claim, no case, no data for a test, no family."""
    good = {
        "id": "x",
        "statement": "s",
        "statistic": "t",
        "values": lambda case: case["x"],
        "test": "greater",
        "refuted_by": "r",
        "control": lambda case: 0.0,
        "control_statement": "c",
    }
    odd = strange_values()
    for field, names in {
        "id": ("nothing", "zero", "empty text", "object"),
        "statement": ("nothing", "zero", "object"),
        "values": ("nothing", "word", "zero", "list"),
        "control": ("nothing", "word", "zero"),
        "test": ("nothing", "word", "zero", "list", "array", "object"),
        "estimand": ("nothing", "word", "zero", "list", "array"),
        "margin": ("nothing", "word", "nan", "infinity", "list", "array", "complex", "true"),
        "alpha": ("nothing", "word", "nan", "zero", "minus one", "list", "array"),
        "cells": ("nothing", "word", "zero", "minus one", "half", "nan"),
        "planned_effect": ("word", "nan", "list", "array", "half", "true"),
        "planned_sd": ("word", "nan", "minus one", "list"),
        "family": ("nothing", "zero", "list"),
    }.items():
        for name in names:
            given = good | {field: odd[name]}
            yield Kind(f"Claim {field}: {name}", lambda g=given: claims.Claim(**g))
    claim = claims.Claim(**good)
    cases = [{"x": 0.1 * i} for i in range(12)]
    for name in ("nothing", "zero", "object", "word", "function"):
        yield Kind(f"judge claim: {name}", lambda v=odd[name]: claims.judge(v, cases))
        yield Kind(f"num_needed claim: {name}", lambda v=odd[name]: claims.num_needed(v))
        yield Kind(f"correct: {name}", lambda v=odd[name]: claims.correct(v, {}))
        yield Kind(f"correct declared: {name}", lambda v=odd[name]: claims.correct([], v))
        yield Kind(f"declared_sizes: {name}", lambda v=odd[name]: claims.declared_sizes(v))
    for name in ("nothing", "zero", "object"):
        yield Kind(f"judge cases: {name}", lambda v=odd[name]: claims.judge(claim, v))
    for value in ("a", [1], {}, Odd(), 1j):
        found = [{"x": value}] * 12
        yield Kind(f"judge values: {value!r:.20}", lambda v=found: claims.judge(claim, v))
    planned = claims.Claim(**good, planned_effect=0.5, planned_sd=1.0, planned_from="a pilot")
    for size in (0, -1, 1.5, "a", None, math.nan):
        yield Kind(f"num_needed family: {size}", lambda v=size: claims.num_needed(planned, v))
    for power in (0, 1, -1, 2, "a", None, math.nan):
        yield Kind(f"num_needed power: {power}", lambda v=power: claims.num_needed(planned, 1, v))
    yield from of_statistics()


def of_statistics() -> Iterator[Kind]:
    """What is no data for a test."""
    values, maps = np.linspace(0.1, 1, 12), np.ones((12, 2, 2)) + np.arange(12)[:, None, None]
    wrong = {name: value for name, value in strange_values().items() if name not in ("array",)} | {
        "one": values[:1],
        "none": values[:0],
        "not finite": np.append(values, math.nan),
    }
    for name, value in wrong.items():
        for function in (statistics.mean_test, statistics.pseudomedian_test):
            yield Kind(
                f"{function.__name__}: {name}", lambda f=function, v=value: f(v, "greater", 0.0)
            )
        yield Kind(f"map_test: {name}", lambda v=value: statistics.map_test(v, 0.0))
    for name in ("nothing", "word", "nan", "infinity", "object", "list", "true", "digits"):
        margin = wrong[name]
        yield Kind(
            f"mean_test margin: {name}", lambda v=margin: statistics.mean_test(values, "less", v)
        )
        yield Kind(f"map_test margin: {name}", lambda v=margin: statistics.map_test(maps, v))
        yield Kind(f"share_test margin: {name}", lambda v=margin: statistics.share_test(1, 2, v))
    for direction in ("up", None, 5, ""):
        yield Kind(
            f"direction: {direction}",
            lambda v=direction: statistics.mean_test(values, v, 0.0),
        )
    for held, n in ((3, 2), (-1, 2), (0, 0), (1.5, 2), ("a", 2), (1, None), (True, 2), (1, 2.5)):
        yield Kind(f"share_test {held}/{n}", lambda h=held, n=n: statistics.share_test(h, n, 0.5))
    for margin in (-0.1, 1.1):
        yield Kind(f"share_test margin {margin}", lambda v=margin: statistics.share_test(1, 2, v))
    for ps, size in (([2.0], 1), ([math.nan], 1), (["a"], 1), (5, 1), ([0.1], -1), ([0.1], "a")):
        yield Kind(f"holm {ps} {size}", lambda p=ps, s=size: statistics.holm(p, s))
    good = {"distance": 0.5, "sd": 1.0, "alpha": 0.05, "power": 0.8}
    shares = {"planned": 0.9, "margin": 0.5, "alpha": 0.05, "power": 0.8}
    for argument, odd in {
        "distance": (0, "a", math.nan, None, math.inf),
        "sd": (-1, "a", math.nan, None, 0),
        "alpha": (0, 1, -1, 2, "a", None, math.nan),
        "power": (0, 1, -1, 2, "a", None, math.nan),
        "planned": (-1, 2, "a", math.nan, 0.5),
        "margin": (-1, 2, "a", math.nan, 0.9),
    }.items():
        for value in odd:
            if argument in good:
                given = good | {argument: value}
                yield Kind(
                    f"num_for_mean {argument}: {value}",
                    lambda g=given: statistics.num_for_mean(**g),
                )
            if argument in shares:
                given = shares | {argument: value}
                yield Kind(
                    f"num_for_share {argument}: {value}",
                    lambda g=given: statistics.num_for_share(**g),
                )


def kinds(lm: tempo.LanguageModel, folder: Path) -> list[Kind]:
    """All kinds of wrong input to the library."""
    return [
        *of_settings(lm),
        *of_models(lm, folder),
        *of_files(lm, folder),
        *of_metrics(),
        *of_claims(),
    ]


def answer(kind: Kind) -> tuple[str, str]:
    """What the input got: "refused", "raw", "silent" or "wordy", with the message."""
    try:
        kind.call()
    except tempo.TempoError as error:
        message = str(error)
        shape = len(message) <= LONGEST_MESSAGE and "\n" not in message and len(message) > 20
        return ("refused" if shape else "wordy"), message
    except TypeError as error:
        # of Python itself: the call does not fit the signature
        fits = "required argument" in str(error) or "unexpected keyword" in str(error)
        return ("refused" if fits else "raw"), f"TypeError: {error}"
    except Exception as error:
        return "raw", f"{type(error).__name__}: {error}"
    return "silent", "accepted"


def run(lm: tempo.LanguageModel, folder: Path) -> Counts:
    """Try every kind, and count."""
    found: dict[str, list[str]] = {"refused": [], "raw": [], "silent": [], "wordy": []}
    for kind in kinds(lm, folder):
        how, message = answer(kind)
        found[how].append(f"{kind.name}: {message}")
    tried = sum(map(len, found.values()))
    return Counts(tried, len(found["refused"]), found["raw"], found["silent"], found["wordy"])
