"""What holds of residuals and hooks, beside their agreement with the oracle in other checks.

Each function raises Violation where its statement does not hold.
"""

from __future__ import annotations

from typing import Any

import tempo
from tempo import LanguageModel, Trace
from tempo.residual import Hooks
from tests.checks import EVERYTHING, Case, expect, forced, same, same_runs
from tests.tiny_models import TWINS, VOCAB


def some_hooks(lm: LanguageModel, case: Case) -> Hooks:
    """Hooks at a member of the first wide set, in some layer, and at the last set after all layers.

    Each member and layer gets another change, so that no two can be mistaken for each other.
    """
    wide, last = case.first_wide, len(case.sets) - 1
    member, layer = case.pick % len(case.sets[wide]), case.pick % lm.num_layers
    places = [(wide, member, layer), (last, 0, lm.num_layers)]
    changes: dict[Any, Any] = {}
    for i, place in enumerate(places):
        changes[place] = lambda residual, i=i: residual.flip(0) * (1.5 + i) + 0.25
    return changes


def hooked(lm: LanguageModel, case: Case, hooks: Hooks, **changes: Any) -> Trace:
    """The case's run under these hooks, everything captured."""
    common = {"prompt": case.prompt, "replay": case.sets, "capture": EVERYTHING, **case.settings}
    return tempo.generate_batch(lm, [tempo.RunSpec(**common | changes)], hooks=[hooks])[0]


def residuals_of(run: Trace, first: int = 0) -> Hooks:
    """Hooks that put the residuals of a run, from a layer on, into the places that they are of."""
    hooks: dict[Any, Any] = {}
    for k, step in enumerate(run.steps):
        assert step.residual is not None
        for layer in range(first, len(step.residual)):
            for member, residual in enumerate(step.residual[layer]):
                hooks[k, member, layer] = lambda _, residual=residual: residual
    return hooks


def a_hooked_run_equals_the_oracle(lm: LanguageModel, case: Case) -> None:
    """A run with hooks equals tempo.reference with the same hooks, and no run without them."""
    hooks = some_hooks(lm, case)
    run = hooked(lm, case, hooks)
    oracle = tempo.reference.generate(lm, **run.spec.model_dump(), hooks=hooks)
    same_runs(run, oracle, "engine and oracle", rounded=True)
    plain, wide = forced(lm, case), case.first_wide
    changed = run.steps[wide].residual != plain.steps[wide].residual
    expect(bool(changed.any()), "the hooks changed nothing")


def own_residuals_change_nothing(lm: LanguageModel, case: Case) -> None:
    """A run into which its own residuals are put, in all layers, is the same to the bit."""
    run = forced(lm, case)
    same_runs(hooked(lm, case, residuals_of(run)), run, "its own residuals put in")


def a_layer_of_residuals_is_all_that_follows(lm: LanguageModel, case: Case) -> None:
    """A run that gets all residuals of one layer from another run equals that one from there on.

    The other run has other tokens in its sets. So below that layer the two differ.
    """
    others = [tuple((t + 1) % (VOCAB - len(TWINS)) for t in members) for members in case.sets]
    # what members weigh by posterior depends on their tokens, and not only on residuals
    plain = {"weighting": "none", "readout": "mean_logits"}
    source = forced(lm, case, replay=others, **plain)
    layer = 1 + case.pick % lm.num_layers
    at_layer = {
        place: change for place, change in residuals_of(source).items() if place[2] == layer
    }
    run = hooked(lm, case, at_layer, **plain)
    for k, (step, other) in enumerate(zip(run.steps, source.steps, strict=True)):
        assert step.residual is not None
        assert other.residual is not None
        same(step.residual[layer:], other.residual[layer:], f"residuals of set {k}")
        same(step.logits, other.logits, f"logits of set {k}")
        below = bool((step.residual[:layer] != other.residual[:layer]).any())
        expect(below, f"below layer {layer}, set {k} is the source's as well")


def hooks_reach_no_other_run(lm: LanguageModel, case: Case) -> None:
    """Beside a hooked run, runs without hooks and with other hooks are what they are alone.

    They have the same sets. So without any hooks they would share all passes.
    """
    hooks = some_hooks(lm, case)
    place = next(iter(hooks))
    others: list[Hooks] = [{}, hooks, {}, {place: lambda residual: -residual}]
    spec = forced(lm, case).spec
    alone = [tempo.generate_batch(lm, [spec], hooks=[each])[0] for each in others]
    for order in (range(4), range(3, -1, -1)):
        given = [others[i] for i in order]
        batch = tempo.generate_batch(lm, [spec] * len(given), hooks=given)
        for i, run in zip(order, batch, strict=True):
            same_runs(run, alone[i], f"run {i} of the batch", rounded=True)
