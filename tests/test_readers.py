"""Several readers of one set, and the ways to read it that others proposed."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fixtures
import tempo
from fixtures.raw import spread
from fixtures.readers import (
    BANDS,
    Answers,
    Readers,
    after_each,
    after_readers,
    answers_of,
    by_top_weight,
)
from fixtures.rivals import (
    TUNING_TEXTS,
    _head_error,
    ape,
    by_head,
    inputs_mixed,
    read_as_one,
    read_changed,
    tuned,
    unchanged,
)
from fixtures.scenes import NUM_READERS, scene_after
from tempo import RunSpec
from tempo.harness.texts import now
from tempo.metrics import total_variation
from tempo.reporting.figures.intervals import interval_panels
from test_experiments import test_exp7_branch_mixture as exp7
from test_experiments import test_exp11_crowding as exp11
from tests.test_scenes import gemma
from tests.tiny_models import llama

pytestmark = pytest.mark.usefixtures("one_thread")

FIXTURES = Path(fixtures.__file__).parent
ROUNDING = 1e-5
TEXTS = ("The cat sat on the", "Once upon a time", "A list of", "Why is it")


def specs(texts=TEXTS):
    return tuple(
        RunSpec(prompt=text, threshold=0.05, max_steps=4, max_width=4, stop_at_eos=False)
        for text in texts
    )


def scene_of(lm, text=TEXTS[0], num_readers=NUM_READERS):
    free = tempo.generate_batch(lm, specs((text,)))[0]
    return now(lm, scene_after(lm, free, np.random.default_rng(0), num_readers))


@pytest.fixture
def scene(tiny):
    return scene_of(tiny)


def apart(ones, others):
    return max(map(total_variation, ones, others))


def test_readers_are_drawn_from_the_truth_without_replacement(tiny, scene):
    assert len(set(scene.readers)) == NUM_READERS and scene.readers[0] == scene.reader
    assert len(scene_of(tiny, num_readers=9).readers) == 9
    # the second reader follows the probabilities without the first
    excess, free = [], tempo.generate_batch(tiny, specs(TEXTS[:1]))[0]
    for seed in range(200):
        drawn = now(tiny, scene_after(tiny, free, np.random.default_rng(seed)))
        left = drawn.mixture.copy()
        left[drawn.reader] = 0
        left /= left.sum()
        excess.append((left[drawn.readers[1]] - left @ left, left @ left**2 - (left @ left) ** 2))
    difference, variance = np.sum(excess, axis=0)
    assert abs(difference) < 4 * np.sqrt(variance)


def test_all_readers_in_one_run_read_as_if_alone(tiny, scene):
    for changes in ({}, {"weighting": "probability"}, {"weighting": "posterior"}):
        together = tempo.generate_batch(tiny, [scene.read_by_all(scene.members, **changes)])[0]
        alone = tempo.generate_batch(tiny, scene.read_by_each(scene.members, **changes))
        assert apart(after_readers(together), after_each(alone)) < ROUNDING
    # where readers see each other they must read apart
    seen = {"visibility": "visible"}
    together = tempo.generate_batch(tiny, [scene.read_by_all(scene.members, **seen)])[0]
    alone = tempo.generate_batch(tiny, scene.read_by_each(scene.members, **seen))
    assert apart(after_readers(together), after_each(alone)) > 100 * ROUNDING


def test_answers_are_those_of_the_branches_run_one_by_one(tiny, scene):
    answers = now(tiny, answers_of(tiny, scene))
    for i, reader in enumerate(scene.readers):
        branches = replace(scene.branches, continuation=(reader,))
        traces = tempo.generate_batch(tiny, [request.spec for request in branches.runs()])
        posterior = np.exp(branches.log_posterior(traces, 2))
        assert total_variation(answers.posterior[i], posterior) < ROUNDING
        assert total_variation(answers.truth[i], branches.truth(traces, 2)) < ROUNDING
        late = branches.predictions(traces, 2)[posterior.argmax()]
        assert total_variation(answers.late[i], late) < ROUNDING
        assert answers.top_weight[i] == pytest.approx(posterior.max(), abs=ROUNDING)


@pytest.mark.parametrize("model", [llama, gemma])
def test_changed_attention_is_the_engines_where_it_should_be(model):
    """Grouped heads, and two kinds of layers with rotary tables of their own."""
    lm = model()
    (spec,) = specs(((5, 9, 2, 30),))
    free = tempo.generate_batch(lm, [spec.but(threshold=0.0, top_k=3)])[0]
    scene = now(lm, scene_after(lm, free, np.random.default_rng(0)))
    answers = now(lm, answers_of(lm, scene))
    flat = torch.zeros(lm.num_layers, lm.num_heads)
    asked = [scene.read_by_all(scene.members)]
    asked.append(scene.read_by_all(scene.members, weighting="posterior"))
    none, posterior = map(after_readers, tempo.generate_batch(lm, asked))
    same = {
        "unchanged": (unchanged, none),
        "T and S of one": (ape(1.0, 1.0), none),
        "no weights": (by_head(flat, flat, answers.posterior), none),
        "the posterior": (by_head(flat, flat + 1, answers.posterior), posterior),
    }
    for name, (change, expected) in same.items():
        assert apart(read_changed(lm, scene, change), expected) < ROUNDING, name
    for change in (ape(0.5, 0.7), by_head(flat - 3, flat, answers.posterior)):
        assert apart(read_changed(lm, scene, change), none) > 10 * ROUNDING


def test_one_head_can_be_changed_alone(tiny, scene):
    flat = torch.zeros(tiny.num_layers, tiny.num_heads)
    answers, seen = now(tiny, answers_of(tiny, scene)), []
    for layer, head in ((0, 0), (0, 1), (tiny.num_layers - 1, 0)):
        offsets = flat.clone()
        offsets[layer, head] = 4.0
        seen.append(read_changed(tiny, scene, by_head(offsets, flat, answers.posterior)))
    for one, other in itertools.combinations([*seen, read_changed(tiny, scene, unchanged)], 2):
        assert apart(one, other) > 1e-6


def test_ape_scales_the_log_sum_exp_and_sharpens_within():
    logits = torch.tensor([[[0.3, -1.0, 2.0]]])
    changed = ape(0.5, 0.8)(0, logits)
    assert changed.logsumexp(-1) == pytest.approx(0.8 * float((logits / 0.5).logsumexp(-1)))
    assert torch.allclose(changed.softmax(-1), (logits / 0.5).softmax(-1))


def test_one_mixed_token_of_one_member_is_that_member(tiny, scene):
    answers = now(tiny, answers_of(tiny, scene))
    first, last = np.eye(scene.width)[[0, -1]]
    mixes = np.stack([first] * NUM_READERS + [last] * NUM_READERS)
    found = read_as_one(tiny, scene, mixes)
    assert apart(found[:NUM_READERS], answers.branches[:, 0]) < ROUNDING
    assert apart(found[NUM_READERS:], answers.branches[:, -1]) < ROUNDING
    both = read_as_one(tiny, scene, np.full((NUM_READERS, scene.width), 1 / scene.width))
    assert apart(both, answers.branches[:, 0]) > 100 * ROUNDING


def test_inputs_are_mixed_as_in_the_paper():
    posterior = np.array([[0.1, 0.9], [0.8, 0.2]])
    even = inputs_mixed(np.array([0.5, 0.5]), posterior)  # entropy 1: half prior, half observed
    np.testing.assert_allclose(even, [[0.25, 0.75], [0.75, 0.25]])
    sure = inputs_mixed(np.array([1 - 1e-12, 1e-12]), posterior)  # entropy 0: what was observed
    np.testing.assert_allclose(sure, [[0, 1], [1, 0]], atol=1e-9)


def test_rivals_are_tuned_where_no_suite_looks():
    suites = sorted(FIXTURES.glob("*.yaml"))
    assert len(suites) >= 3
    for suite in suites:
        held = suite.read_text(encoding="utf-8")
        assert not any(text in held for text in TUNING_TEXTS), suite.name
    assert len(set(TUNING_TEXTS)) == len(TUNING_TEXTS)


def test_tuned_rivals_are_no_worse_than_untuned_ones_where_they_were_tuned(tiny):
    found = tuned(tiny, specs())
    assert found.tv["ape"] <= found.tv["none"] and found.tv["heads"] <= found.tv["posterior"]
    assert (found.num_steps == 0) == (found.tv["heads"] == found.tv["posterior"])
    assert found is tuned(tiny, specs()), "once for each model"
    narrow = tuple(spec.but(threshold=1.0) for spec in specs())
    untuned = tuned(tiny, narrow)
    assert (untuned.temperature, untuned.scale, untuned.tv) == (1.0, 1.0, {})


def test_the_fit_goes_downhill_and_its_gradient_is_by_head(tiny, scene):
    known = scene, now(tiny, answers_of(tiny, scene))
    offsets = torch.full((tiny.num_layers, tiny.num_heads), 3.0, requires_grad=True)
    powers = torch.ones(tiny.num_layers, tiny.num_heads, requires_grad=True)
    before = _head_error(tiny, known, offsets, powers, learn=True)
    assert offsets.grad is not None and bool((offsets.grad != 0).all())
    step = 0.5 * offsets.grad / offsets.grad.abs().max()
    assert _head_error(tiny, known, (offsets - step).detach(), powers) < before
    assert _head_error(tiny, known, (offsets + step).detach(), powers) > before


def read_as(**arms):
    """Readers with these top weights and distances."""
    weights = arms.pop("top_weight")
    return Readers(weights, *([arms] * 4))


def test_readers_are_told_apart_by_what_the_best_branch_weighs():
    readers = read_as(top_weight=[0.95, 0.9, 0.6, 0.59, 0.3], one=[1.0, 2.0, 3.0, 4.0, 6.0])
    kept = {band: readers.within(band).tv["one"] for band in BANDS}
    assert kept == {"above .9": [1.0, 2.0], ".6 to .9": [3.0], "below .6": [4.0, 6.0]}
    assert readers.distance("one") == pytest.approx(3.2)
    assert readers.open.distance("one") == 5.0
    assert read_as(top_weight=[0.7], one=[1.0]).open.distance("one") is None


OPEN = (
    exp11.test_posterior_beats_late_branch_where_open,
    exp11.test_posterior_removes_a_third_where_open,
    exp11.test_posterior_beats_its_square_where_open,
    exp11.test_posterior_beats_ape_where_open,
    exp11.test_posterior_beats_mixture_of_inputs_where_open,
)


def planted(arm):
    """An open reader after whom posterior weighting is perfect or broken, and all else is wrong."""
    rng = np.random.default_rng(0)
    truth, other = rng.dirichlet(np.ones(9), size=(2, 1))
    wrong = {name: 0.7 * truth + 0.3 * other for name in (*exp11.ARMS, *exp7.ARMS, "unread")}
    answers = Answers(np.array([[0.5, 0.5]]), np.stack([truth, truth], axis=1))
    given = {"perfect": truth, "broken": rng.dirichlet(np.ones(9), size=1)}[arm]
    return Readers.measure(answers, wrong | {"posterior": given})


def test_a_perfect_reader_meets_the_primary_claims_and_a_broken_one_does_not():
    """The exact mixture in the place of posterior weighting, and something unrelated."""
    for claim in OPEN:
        values = {}
        for arm in ("perfect", "broken"):
            case = replace_readers(planted(arm))
            values[arm] = claim(case)
        assert values["perfect"] < claim.margin < values["broken"], claim.id


def replace_readers(readers):
    """A case of exp11 with nothing but readers."""

    class Case:
        pass

    case = Case()
    case.readers = readers
    case.distance = readers.distance
    return case


def test_prompts_without_an_open_reader_say_nothing_of_the_primary_claims():
    sure = read_as(top_weight=[0.99], **{arm: [0.1] for arm in exp11.ARMS})
    for claim in OPEN:
        assert claim(replace_readers(sure)) is None


def test_the_bands_are_drawn_side_by_side():
    cases = []
    for far in (0.2, 0.3, 0.4):
        cases.append(read_as(top_weight=[0.95, 0.5], one=[far, 2 * far]))
    drawn = by_top_weight(cases, {"one": "the <first> arm"})
    assert "the &lt;first&gt; arm" in drawn.svg
    assert "above .9: 3 readers, 3 prompts" in drawn.alt and ".6 to .9" not in drawn.alt
    assert f"the <first> arm: {spread([0.4, 0.6, 0.8])[0]:.1f}" in drawn.alt
    assert interval_panels({}, "distance", "Nothing", "No reader at all.").svg
