"""How much work a fixed set of runs and one experiment take, in counts that no machine changes.

A change that raises one of these numbers makes everything slower. Lower one only with a reason.
"""

from collections import Counter
from pathlib import Path

import pytest

import tempo
from tempo import engine
from tempo.capture import trace_bytes
from tempo.harness import Plan, Prompt, StudyConfig
from tempo.harness.execute import Task, execute
from tempo.harness.texts import Texts
from tempo.spec import load_yaml
from test_experiments import test_exp15_free_lattices as exp15

PROMPTS = ("The cat sat on the", "A dog", "Numbers: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13")
SETS = ((65, 66, 67), (68,), (69, 70))


@pytest.fixture
def counts(monkeypatch):
    """Tokens, passes and places of the passes of the engine and of the plain model so far."""
    found, make, forward = Counter(), engine._pass_context, Texts._forward

    def spied(*args):
        context = make(*args)
        rows, width, _ = context.allowed.shape
        found.update(tokens=len(context.rows), passes=1, places=rows * width)
        return context

    def read(self, taken, *others):
        found.update(texts=len(taken), readings=1)
        forward(self, taken, *others)

    monkeypatch.setattr(engine, "_pass_context", spied)
    monkeypatch.setattr(Texts, "_forward", read)
    return found


def sweep(lm):
    """Free and forced runs of three prompts in three modes; the bytes that their traces keep."""
    common = {"threshold": 0.03, "max_steps": 5, "stop_at_eos": False, "capture": ("logits",)}
    specs = []
    for prompt in PROMPTS:
        for mode in ("isolated", "visible", "causal"):
            spec = tempo.RunSpec(prompt=prompt, visibility=mode, **common)
            specs += [spec, spec.but(replay=SETS), spec.but(replay=SETS, weighting="posterior")]
    kept = 0
    for _, trace in tempo.stream(lm, specs, max_rows=64):
        sizes = trace_bytes(lm, trace.spec, len(trace.prompt_tokens), trace.widths)
        kept += sum(size for name, size in sizes.items() if name != "cache")
    return kept


def experiment(lm):
    """exp15 on three prompts, as a session measures it."""
    module = Path(exp15.__file__)
    config = load_yaml(StudyConfig, module.with_name("exp15_free_lattices.yaml"))
    plan = Plan(exp15.study, "exp15", config, module, ())
    tasks = [Task(plan, Prompt(text, "own", config, lm)) for text in PROMPTS]
    for _, case in execute(lm, [tasks], lambda task: True):
        assert isinstance(case, exp15.Case), case


SWEEP, KEPT = {"tokens": 326, "passes": 7, "places": 565}, 364_824
EXPERIMENT = {"tokens": 481, "passes": 23, "places": 876, "texts": 3130, "readings": 28}


def test_a_sweep_takes_as_many_tokens_passes_and_bytes_as_before(tiny, counts):
    assert sweep(tiny) == KEPT
    assert counts == SWEEP


def test_an_experiment_takes_as_many_tokens_and_passes_as_before(tiny, counts):
    experiment(tiny)
    assert counts == EXPERIMENT


@pytest.mark.parametrize("name", ["_same_so_far", "SATURATED", "MAX_NEW_TOKENS"])
def test_an_engine_that_shares_or_packs_less_is_told(tiny, counts, monkeypatch, name):
    """Negative control: each part that saves work can be seen in the counts."""
    worse = {
        "_same_so_far": lambda runs: [[run] for run in runs],
        "SATURATED": 10**6,
        "MAX_NEW_TOKENS": 20,
    }[name]
    monkeypatch.setattr(engine, name, worse)
    sweep(tiny)
    assert any(counts[what] > number for what, number in SWEEP.items())
