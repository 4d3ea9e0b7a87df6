"""What is claimed of the engine, on SmolLM2-135M.

It agrees with the oracle and with transformers' greedy decoding, and isolation is exact.
"""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tempo
from benchmarks.conformance import (
    BOUNDS,
    LATTICES,
    SETTINGS,
    TIE,
    _from_a_tie,
    deviations,
    specs,
)
from fixtures.floors import rounding
from fixtures.suite import suite_texts

PROMPTS = suite_texts()
STEPS = 8  # of greedy decoding
ALL = SETTINGS + LATTICES


@pytest.fixture(scope="module")
def greedy_by_transformers(real):
    """transformers' own greedy tokens for every prompt of the suite, one prompt at a time."""
    found = {}
    for prompt in PROMPTS:
        tokens = torch.tensor([real.encode(prompt)])
        out = real.model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=STEPS, do_sample=False
        )
        found[prompt] = out[0, tokens.shape[1] :].tolist()
    return found


def test_capped_at_width_one_it_is_transformers_greedy_on_every_prompt_of_the_suite(
    real, greedy_by_transformers
):
    specs = [tempo.RunSpec(prompt=prompt, max_width=1, max_steps=STEPS) for prompt in PROMPTS]
    wrong = []
    for prompt, run in zip(PROMPTS, tempo.generate_batch(real, specs), strict=True):
        if [step.tokens[0] for step in run.steps] != greedy_by_transformers[prompt]:
            wrong.append(prompt)
    assert not wrong, (
        f"{len(wrong)} of {len(PROMPTS)} prompts differ from transformers: {wrong[:3]}"
    )


def test_without_the_cap_it_is_not_greedy(real, greedy_by_transformers):
    prompts = PROMPTS[:10]
    specs = [tempo.RunSpec(prompt=prompt, max_steps=STEPS) for prompt in prompts]
    differ = []
    for prompt, run in zip(prompts, tempo.generate_batch(real, specs), strict=True):
        if [step.tokens[0] for step in run.steps] != greedy_by_transformers[prompt]:
            differ.append(prompt)
    assert differ


# Here each setting meets one prompt; `make conformance` lets each meet twenty.
@pytest.mark.parametrize("index", range(0, len(ALL), 4))
def test_engine_equals_oracle(real, index):
    chosen = specs(PROMPTS[index % len(PROMPTS)], ALL[index : index + 4])
    for run in tempo.generate_batch(real, chosen):
        found = deviations(real, run)
        assert found["same_sets"], run.spec
        over = {name: found[name] for name, bound in BOUNDS.items() if found[name] > bound}
        assert not over, (run.spec, over)
        assert found["forbidden"] == 0.0


@pytest.mark.parametrize(
    ("tokens", "exact", "is_a_tie"),
    [
        ([0, 1, 2], [0, 2, 1], True),  # 1 and 2 are as probable, but for rounding
        ([0, 1, 2], [1, 0, 2], False),
        ([0, 1, 2, 3], [0, 1, 2], True),  # 3 is on the threshold
        ([0, 1], [0, 1, 2], False),
        ([0, 1], [0, 1], False),  # nothing differs, so no tie explains it
    ],
)
def test_only_a_tie_excuses_another_set_than_the_oracles(tokens, exact, is_a_tie):
    distribution = np.array([0.5, 0.2, 0.2 - 1e-6, 0.1 - 1e-6], np.float32)
    spec = tempo.RunSpec(prompt="a", threshold=0.1)
    run = SimpleNamespace(steps=[SimpleNamespace(tokens=tokens)], spec=spec, prompt_tokens=[1])
    oracle = SimpleNamespace(steps=[SimpleNamespace(tokens=exact, distribution=distribution)])
    assert (_from_a_tie(run, oracle) <= TIE) == is_a_tie


@pytest.mark.parametrize(
    ("found", "tokens", "is_a_tie"),
    [
        ([0.4, 0.3, 0.2, 0.1], [0, 1], True),  # the oracle needs three to reach 0.7
        ([0.4, 0.3, 0.2, 0.1], [0, 1, 2], False),  # it does not follow from what was found
        ([0.5, 0.3, 0.1, 0.1], [0, 1], False),  # what was found is not what the oracle has
    ],
)
def test_another_rule_excuses_another_set_only_if_the_distributions_are_the_same(
    found, tokens, is_a_tie
):
    exact = np.array([0.4, 0.3 - 2e-6, 0.2, 0.1], np.float32)
    step = SimpleNamespace(tokens=tokens, distribution=np.array(found, np.float32))
    spec = tempo.RunSpec(prompt="a", threshold=0.0, top_p=0.7 - 1e-6)
    run = SimpleNamespace(steps=[step], spec=spec, prompt_tokens=[1])
    other = [0, 1, 2] if tokens == [0, 1] else [0, 1]
    oracle = SimpleNamespace(steps=[SimpleNamespace(tokens=other, distribution=exact)])
    assert (_from_a_tie(run, oracle) <= TIE) == is_a_tie


def test_changing_one_isolated_sibling_leaves_the_others_bit_identical(real):
    sets = tempo.generate(real, PROMPTS[0], threshold=0.05, max_steps=2).sets
    assert len(sets[1]) >= 3
    changed = [sets[0], [sets[1][0], 1234, *sets[1][2:]]]
    others = [i for i in range(len(sets[1])) if i != 1]
    for visibility, same in (("isolated", True), ("visible", False)):
        common = {"visibility": visibility, "capture": "logits"}
        one = tempo.generate(real, PROMPTS[0], replay=sets, **common)
        other = tempo.generate(real, PROMPTS[0], replay=changed, **common)
        assert (one.steps[1].logits[others] == other.steps[1].logits[others]).all() == same


def test_modes_agree_bitwise_until_a_wide_set_has_been_read(real):
    for prompt in PROMPTS[:6]:
        source = tempo.generate(real, prompt, max_steps=6)
        common = {"replay": source.sets, "capture": "kv"}
        isolated = tempo.generate(real, prompt, visibility="isolated", **common)
        visible = tempo.generate(real, prompt, visibility="visible", **common)
        wide = [k for k, width in enumerate(source.widths) if width > 1]
        first = wide[0] if wide else 5
        for k in range(first + 1):
            assert (isolated.steps[k].distribution == visible.steps[k].distribution).all()
        assert (isolated.keys[0] == visible.keys[0]).all()
        assert (isolated.values[0] == visible.values[0]).all()
        if wide:
            assert (isolated.keys[1] != visible.keys[1]).any()


def test_capture_never_changes_a_distribution(real):
    settings = {"threshold": 0.05, "max_steps": 4}
    plain = tempo.generate(real, PROMPTS[1], **settings)
    rich = tempo.generate(real, PROMPTS[1], capture=("attention", "logits", "kv"), **settings)
    for one, other in zip(plain.steps, rich.steps, strict=True):
        assert (one.distribution == other.distribution).all()


def test_a_batch_gives_what_single_runs_give(real):
    settings = itertools.product(("isolated", "visible"), (0.05, 0.1, 0.3))
    specs = [
        tempo.RunSpec(prompt=prompt, visibility=visibility, threshold=threshold, max_steps=4)
        for prompt, (visibility, threshold) in zip(PROMPTS[10:16], settings, strict=True)
    ]
    for spec, run in zip(specs, tempo.generate_batch(real, specs), strict=True):
        (alone,) = tempo.generate_batch(real, [spec])
        assert run.sets == alone.sets
        for one, other in zip(run.steps, alone.steps, strict=True):
            gap = np.abs(one.distribution - other.distribution).max()
            assert gap < rounding("probability")


def test_a_wrapped_model_runs_and_comes_back_as_it_was(real):
    before = real.model.config._attn_implementation
    real.model.set_attn_implementation("eager")
    try:
        with tempo.wrap_model(real.model, real.tokenizer, name="mine") as lm:
            run = tempo.generate(lm, PROMPTS[0], threshold=0.1, max_steps=3)
            assert run.provenance["model"] == "mine"
        assert real.model.config._attn_implementation == "eager"
    finally:
        real.model.set_attn_implementation(before)
    assert run.sets == tempo.generate(real, PROMPTS[0], threshold=0.1, max_steps=3).sets
