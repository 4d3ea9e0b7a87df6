"""What exp7 and exp8 have in common: the scene they read, distances for many distributions at once; and exp7's soft token."""

import itertools

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import tempo
from fixtures.study import EXPERIMENTS, Context, Run, read_family
from tempo import metrics
from tempo.metrics import total_variation
from tempo.reporting.figures.intervals import intervals
from test_experiments import test_exp7_branch_mixture, test_exp8_position_or_company
from test_experiments.branching import LAGS, Scene, disagreement, distances, draw, find_scene
from test_experiments.depth import DEPTHS, depth_series
from test_experiments.test_exp7_branch_mixture import _soft_token
from test_experiments.truth import Branches
from tests.tiny_models import SHAPE, llama

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDING = 1e-5
PROMPT = "The cat sat on the"


@pytest.fixture(scope="module")
def config():
    return read_family(EXPERIMENTS / "exp7_branch_mixture.yaml").config


def drive(lm, steps):
    """(result, runs of each round) of a generator that asks for runs."""
    rounds, traces = [], None
    while True:
        try:
            wanted = [
                run if isinstance(run, Run) else Run(run)
                for run in (next(steps) if traces is None else steps.send(traces))
            ]
        except StopIteration as stop:
            return stop.value, rounds
        rounds.append([run.spec for run in wanted])
        traces = tempo.generate_batch(lm, rounds[-1])


def test_both_experiments_have_the_same_settings_and_share_their_runs(config, tiny):
    other = read_family(EXPERIMENTS / "exp8_position_or_company.yaml").config
    own = {"experiment", "results"}
    assert config.model_dump(exclude=own) == other.model_dump(exclude=own)
    rounds = []
    for module, settings in (
        (test_exp7_branch_mixture, config),
        (test_exp8_position_or_company, other),
    ):
        case, specs = drive(tiny, module.measure(Context(PROMPT, settings, tiny)))
        assert case["tv"]
        rounds.append(specs)
    assert rounds[0][:2] == rounds[1][:2], "prefix, set and text"
    width = case["width"]
    shared = {spec.key() for spec in rounds[0][2]} & {spec.key() for spec in rounds[1][2]}
    assert len(shared) == width + 4, (
        "branches, the three shared cells, and the isolated sequential one"
    )


def test_a_scene_is_the_first_wide_set_and_a_text_drawn_from_its_branches(config, tiny):
    scene, rounds = drive(tiny, find_scene(Context(PROMPT, config, tiny)))
    free = tempo.generate(tiny, PROMPT, **rounds[0][0].model_dump(exclude={"prompt"}))
    step = next(k for k, width in enumerate(free.widths) if width > 1)
    assert scene.members == tuple(free.steps[step].tokens)
    assert scene.prefix == (*free.prompt_tokens, *(s.tokens[0] for s in free.steps[:step]))
    np.testing.assert_allclose(
        scene.weights * scene.mass, free.steps[step].probabilities, rtol=1e-3
    )
    assert len(scene.continuation) == LAGS - 1
    assert len(set(scene.strangers) - set(scene.members)) == len(scene.members) - 1
    again, _ = drive(tiny, find_scene(Context(PROMPT, config, tiny)))
    assert again.continuation == scene.continuation and again.strangers == scene.strangers
    traces = tempo.generate_batch(tiny, [run.spec for run in scene.branches.runs()])
    assert total_variation(scene.branches.truth(traces, 1), scene.mixture) < ROUNDING
    # the rest of the text is what one branch would greedily say
    greedy = [
        [int(trace.steps[lag].distribution.argmax()) for lag in range(2, LAGS)] for trace in traces
    ]
    assert list(scene.continuation[1:]) in greedy


def test_readers_and_branches_are_drawn_from_the_truth_not_its_mode(config, tiny):
    """Over many prompts, the probability of what was drawn is on average what drawing from these probabilities gives."""
    excess: dict[str, list[tuple[float, float]]] = {"reader": [], "branch": []}
    for prompt in map("Once upon {} times".format, range(60)):
        scene, rounds = drive(tiny, find_scene(Context(prompt, config, tiny)))
        if scene is None:
            continue
        traces = tempo.generate_batch(tiny, [run.spec for run in scene.branches.runs()])
        posterior = np.exp(scene.branches.log_posterior(traces, 2))
        chosen = rounds[1][0].prompt[-2]
        for name, p, drawn in (
            ("reader", scene.mixture, scene.reader),
            ("branch", posterior, scene.members.index(chosen)),
        ):
            excess[name].append((p[drawn] - p @ p, p @ p**2 - (p @ p) ** 2))
    for found in excess.values():
        assert len(found) > 40
        difference, variance = np.sum(found, axis=0)
        assert abs(difference) < 4 * np.sqrt(variance)


def test_a_prompt_that_never_branches_has_no_scene_and_says_nothing(config, tiny):
    narrow = config.model_copy(update={"threshold": 1.0})
    for module in (test_exp7_branch_mixture, test_exp8_position_or_company):
        case, _ = drive(tiny, module.measure(Context(PROMPT, narrow, tiny)))
        assert case["tv"] is None
        for claim in module.CLAIMS:
            if "depth" not in claim.id:
                assert claim.values(case) is None and claim.control(case) is None


def test_draws_follow_the_probabilities():
    rng = np.random.default_rng(0)
    drawn = (
        np.bincount([draw(rng, np.array([0.5, 0.0, 0.3, 0.1])) for _ in range(20_000)], minlength=4)
        / 20_000
    )
    np.testing.assert_allclose(drawn, [5 / 9, 0, 3 / 9, 1 / 9], atol=0.015)
    assert drawn[1] == 0


def test_distances_of_many_are_the_metrics_of_each():
    rng = np.random.default_rng(1)
    truth, others = rng.dirichlet(np.full(50, 0.1)), rng.dirichlet(np.full(50, 0.1), size=4)
    others[0], others[1, :25] = truth, 0.0
    others /= others.sum(axis=1, keepdims=True)
    found = distances(truth, others)
    for i, other in enumerate(others):
        assert found["tv"][i] == pytest.approx(metrics.total_variation(truth, other), abs=1e-12)
        assert found["js"][i] == pytest.approx(metrics.jensen_shannon(truth, other), abs=1e-12)
        assert found["kl"][i] == pytest.approx(
            metrics.kl_divergence(truth, other), rel=1e-9, abs=1e-12
        )
        assert found["top1"][i] == metrics.top_k_overlap(truth, other, 1)
    assert found["tv"][0] < 1e-12 and found["top1"][0] == 1 and found["tv"][2] > 0.1


def test_disagreement_is_the_entropy_of_the_weights_if_branches_share_nothing_and_0_if_they_are_one():
    apart = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert disagreement(np.array([0.25, 0.75]), apart) == pytest.approx(
        -0.25 * np.log(0.25) - 0.75 * np.log(0.75)
    )
    assert disagreement(np.array([0.25, 0.75]), apart[[0, 0]]) == pytest.approx(0.0, abs=1e-12)


def gemma():
    """Scales its embeddings inside the embedding module, by more than rounding could hide."""
    shape = {
        **SHAPE,
        "tie_word_embeddings": True,
        "rope_parameters": None,
    }  # it has two tables of its own
    config = Gemma3TextConfig(
        num_hidden_layers=2, sliding_window=64, query_pre_attn_scalar=8, **shape
    )
    torch.manual_seed(0)
    return tempo.wrap_model(Gemma3ForCausalLM(config).eval().requires_grad_(False), name="gemma")


@pytest.mark.parametrize("model", [llama, gemma])
def test_a_soft_token_of_one_member_is_that_member(model):
    lm = model()
    text = tuple(range(20, 20 + LAGS - 1))
    scenes = [
        Scene((5, 9, 2), members, text, np.array(weights), 1.0, np.zeros(1), ())
        for members, weights in (((7,), [1.0]), ((7, 11), [1.0, 0.0]), ((7, 11), [0.5, 0.5]))
    ]
    one, weightless, both = (_soft_token(lm, scene) for scene in scenes)
    with torch.inference_mode():
        expected = (
            lm.model(input_ids=torch.tensor([[5, 9, 2, 7, *text]]))
            .logits[0, 3:]
            .softmax(-1)
            .numpy()
        )
    assert one.shape == expected.shape == (LAGS, lm.vocab_size)
    assert max(map(total_variation, one, expected)) < ROUNDING
    assert max(map(total_variation, weightless, expected)) < ROUNDING
    assert total_variation(both[0], expected[0]) > 100 * ROUNDING


def test_cells_of_a_set_stand_where_they_say():
    scene = Scene((5, 9, 2), (7, 11, 30), (12, 40), np.full(3, 1 / 3), 1.0, np.zeros(1), ())
    placed = {}
    for positions, visibility, reader in itertools.product(
        ("shared", "sequential"), ("isolated", "visible"), ("near", "far")
    ):
        spec = test_exp8_position_or_company._cell(
            scene, scene.members, positions, visibility, reader
        )
        run = tempo.generate(llama(), scene.prefix, **spec.model_dump(exclude={"prompt"}))
        assert run.spec.visibility == visibility
        placed[positions, reader] = run.slot_position[3:7].tolist()
    assert placed == {
        ("shared", "near"): [3, 3, 3, 4], ("shared", "far"): [3, 3, 3, 6],
        ("sequential", "near"): [3, 4, 5, 4], ("sequential", "far"): [3, 4, 5, 6],
    }  # fmt: skip


def test_the_series_by_depth_measures_distances_to_the_mixture_of_all_paths(config, tiny):
    found, rounds = drive(tiny, depth_series(Context(PROMPT, config, tiny)))
    free = tempo.generate(tiny, PROMPT, **rounds[0][0].model_dump(exclude={"prompt"}))
    assert set(free.widths) == {2}
    specs = {(len(spec.replay) - 2, spec.visibility, spec.weighting): spec for spec in rounds[1]}
    for depth in DEPTHS:
        isolated = specs[depth, "isolated", "none"]
        assert list(map(list, isolated.replay[:depth])) == free.sets[:depth]
        branches = Branches(isolated.prompt, isolated.replay[:depth], isolated.replay[depth])
        traces = tempo.generate_batch(tiny, [run.spec for run in branches.runs()])
        assert len(traces) == 2**depth
        truth, paths = branches.truth(traces, 2), branches.predictions(traces, 2)
        for way, spec in (("isolated", isolated), ("visible", specs[depth, "visible", "none"])):
            answer = tempo.generate_batch(tiny, [spec])[0].steps[depth + 1].distribution
            assert found[way][depth - 1] == pytest.approx(
                total_variation(truth, answer), abs=ROUNDING
            )
        for way, path in (("top_path", paths[0]), ("last_path", paths[-1])):
            assert found[way][depth - 1] == pytest.approx(
                total_variation(truth, path), abs=ROUNDING
            )
    assert np.all(np.diff(found["planted"]) > 0)


def test_intervals_are_drawn_with_their_numbers():
    drawn = intervals(
        {"one <arm>": (0.2, 0.1, 0.3), "another": (0.5, 0.4, 0.6)},
        "distance",
        "Arms",
        "What is seen",
        ["+0.3", ""],
        0.2,
    )
    assert "one &lt;arm&gt;" in drawn.svg
    assert "0.2 [0.1, 0.3]  +0.3" in drawn.alt and "another: 0.5 [0.4, 0.6]" in drawn.alt
    with pytest.raises(ValueError, match="longer"):
        intervals({"one": (0.2, 0.1, 0.3)}, "distance", "Arms", "", ["a", "b"])
