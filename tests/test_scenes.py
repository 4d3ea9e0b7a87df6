"""The scenes that several experiments read, what exp7, exp8 and exp11 build on them, and exp3's."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import tempo
from fixtures.claims import nearer
from fixtures.rows import at_members
from fixtures.scenes import LAGS, NUM_READERS, ExactScene, draw, exact_scene, first_scene
from fixtures.truth import Branches
from tempo.harness import Planned, Prompt, ReadRequest, RunRequest, Study, StudyConfig
from tempo.harness.texts import Texts
from tempo.metrics import kl_divergence, total_variation
from tempo.reporting.figures.intervals import intervals
from tempo.spec import load_yaml
from test_experiments import (
    test_exp3_cross_parallel_attention,
    test_exp7_branch_mixture,
    test_exp8_position_or_company,
    test_exp11_crowding,
)
from test_experiments.depth import DEPTHS, depth_series
from test_experiments.test_exp8_position_or_company import cell_spec
from tests.tiny_models import SHAPE, llama

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDING = 1e-5
TEXT = "The cat sat on the"
EXPERIMENTS = {
    "exp7_branch_mixture": test_exp7_branch_mixture.study,
    "exp8_position_or_company": test_exp8_position_or_company.study,
    "exp11_crowding": test_exp11_crowding.study,
}
FOLDER = Path(__file__).resolve().parent.parent / "test_experiments"
CONFIGS = {name: load_yaml(StudyConfig, FOLDER / f"{name}.yaml") for name in EXPERIMENTS}


@pytest.fixture
def prompt(tiny):
    return Prompt(TEXT, "own", CONFIGS["exp7_branch_mixture"], tiny)


def drive(lm, steps, change=lambda spec: spec):
    """(result, specs of each round) of a generator that asks for runs, which `change` may alter."""
    rounds, answer, texts = [], None, Texts(lm)
    while True:
        try:
            asked = next(steps) if answer is None else steps.send(answer)
        except StopIteration as stop:
            return stop.value, rounds
        if isinstance(asked, ReadRequest):
            (answer,) = texts.read([asked])
            continue
        alone = isinstance(asked, RunRequest)
        rounds.append([request.spec for request in ([asked] if alone else asked)])
        traces = tempo.generate_batch(lm, list(map(change, rounds[-1])))
        answer = traces[0] if alone else traces


def run_branches(lm, branches):
    """A trace of each branch."""
    return tempo.generate_batch(lm, [request.spec for request in branches.runs()])


def test_all_three_experiments_have_the_same_settings_and_share_their_runs(tiny):
    own = {"experiment", "results"}
    settings = [config.model_dump(exclude=own) for config in CONFIGS.values()]
    assert settings[0] == settings[1] == settings[2]
    rounds = []
    for name, study in EXPERIMENTS.items():
        case, specs = drive(tiny, study.measurement(Prompt(TEXT, "own", CONFIGS[name], tiny)))
        assert case.width > 1
        rounds.append(specs)
    assert rounds[0][:2] == rounds[1][:2] == rounds[2][:2], "prefix, set and text"
    keys = []
    for specs in rounds:
        keys.append({spec.key() for spec in itertools.chain(*specs[2:])})
    # branches, the three shared cells, and the isolated sequential one
    assert len(keys[0] & keys[1]) == case.width + 4
    # branches, three ways to read the text, and five in which all readers read
    assert len(keys[0] & keys[2]) == case.width + 3 + 5


def test_a_scene_is_the_first_wide_set_and_a_text_drawn_from_its_branches(prompt, tiny):
    scene, rounds = drive(tiny, exact_scene(prompt))
    free = tempo.generate_batch(tiny, rounds[0])[0]
    step = next(k for k, width in enumerate(free.widths) if width > 1)
    assert scene.members == tuple(free.steps[step].tokens)
    assert scene.prefix == (*free.prompt_tokens, *(s.tokens[0] for s in free.steps[:step]))
    prior = free.steps[step].probabilities
    np.testing.assert_allclose(scene.weights * scene.mass, prior, rtol=1e-3)
    assert len(scene.continuation) == LAGS - 1
    assert len(set(scene.strangers) - set(scene.members)) == scene.width - 1
    again, _ = drive(tiny, exact_scene(prompt))
    assert again.continuation == scene.continuation and again.strangers == scene.strangers
    assert again.readers == scene.readers and scene.readers[0] == scene.reader
    assert len(set(scene.readers)) == NUM_READERS
    traces = run_branches(tiny, scene.branches)
    assert total_variation(scene.branches.truth(traces, 1), scene.mixture) < ROUNDING
    # the rest of the text is what one branch would greedily say
    greedy = []
    for trace in traces:
        greedy.append([int(step.distribution.argmax()) for step in trace.steps[2:LAGS]])
    assert list(scene.continuation[1:]) in greedy


def test_readers_and_branches_are_drawn_from_the_truth_not_its_mode(prompt, tiny):
    """Over many prompts, what was drawn is on average as probable as drawing makes it."""
    excess: dict[str, list[tuple[float, float]]] = {"reader": [], "branch": []}
    for text in map("Once upon {} times".format, range(60)):
        scene, rounds = drive(tiny, exact_scene(prompt.but(text)))
        if scene is None:
            continue
        traces = run_branches(tiny, scene.branches)
        posterior = np.exp(scene.branches.log_posterior(traces, 2))
        chosen = scene.members.index(rounds[1][0].prompt[-2])
        drawn = {"reader": (scene.mixture, scene.reader), "branch": (posterior, chosen)}
        for name, (p, which) in drawn.items():
            excess[name].append((p[which] - p @ p, p @ p**2 - (p @ p) ** 2))
    for found in excess.values():
        assert len(found) > 40
        difference, variance = np.sum(found, axis=0)
        assert abs(difference) < 4 * np.sqrt(variance)


def test_the_first_scene_draws_its_reader_from_what_the_free_run_predicts(prompt, tiny):
    exact, rounds = drive(tiny, exact_scene(prompt))
    free = tempo.generate_batch(tiny, rounds[0])[0]
    scene = first_scene(free, prompt)
    assert (scene.prefix, scene.members) == (exact.prefix, exact.members)
    assert scene.reader == exact.reader, "one generator, and one distribution but for rounding"
    after = free.steps[len(scene.prefix) - len(free.prompt_tokens) + 1]
    assert first_scene(free, None).reader == after.tokens[0]
    narrow = tempo.generate(tiny, TEXT, threshold=1.0)
    assert first_scene(narrow, prompt) is None


def test_a_prompt_that_never_branches_has_no_scene_and_says_nothing(tiny):
    for name, study in EXPERIMENTS.items():
        narrow = CONFIGS[name].model_copy(update={"threshold": 1.0})
        case, _ = drive(tiny, study.measurement(Prompt(TEXT, "own", narrow, tiny)))
        for claim in study.claims.values():
            if "depth" not in claim.id:
                values, control = claim.claim.values(case), claim.claim.control(case)
                assert values is None and control is None


def test_draws_follow_the_probabilities():
    rng, probabilities = np.random.default_rng(0), np.array([0.5, 0.0, 0.3, 0.1])
    drawn = [draw(rng, probabilities) for _ in range(20_000)]
    shares = np.bincount(drawn, minlength=4) / 20_000
    np.testing.assert_allclose(shares, [5 / 9, 0, 3 / 9, 1 / 9], atol=0.015)
    assert shares[1] == 0


def gemma():
    """Scales its embeddings inside the embedding module, by more than rounding could hide."""
    # it has two rotary tables of its own
    shape = {**SHAPE, "tie_word_embeddings": True, "rope_parameters": None}
    config = Gemma3TextConfig(
        num_hidden_layers=2, sliding_window=64, query_pre_attn_scalar=8, **shape
    )
    torch.manual_seed(0)
    return tempo.wrap_model(Gemma3ForCausalLM(config).eval().requires_grad_(False), name="gemma")


def scene_of(members, text, weights):
    """A scene after a fixed prefix, with no more of the truth than the members' weights."""
    weights, mixture = np.array(weights), np.zeros(1)
    return ExactScene((5, 9, 2), members, text, weights, 1.0, mixture, (), text[:1], members[0])


@pytest.mark.parametrize("model", [llama, gemma])
def test_a_soft_token_of_one_member_is_that_member(model):
    lm, text = model(), tuple(range(20, 20 + LAGS - 1))
    one = np.stack(scene_of((7,), text, [1.0]).read_as_one(lm))
    weightless = scene_of((7, 11), text, [1.0, 0.0]).read_as_one(lm)
    both = scene_of((7, 11), text, [0.5, 0.5]).read_as_one(lm)
    with torch.inference_mode():
        logits = lm.model(input_ids=torch.tensor([[5, 9, 2, 7, *text]])).logits
    expected = logits[0, 3:].softmax(-1).numpy()
    assert one.shape == expected.shape == (LAGS, lm.vocab_size)
    assert max(map(total_variation, one, expected)) < ROUNDING
    assert max(map(total_variation, weightless, expected)) < ROUNDING
    assert total_variation(both[0], expected[0]) > 100 * ROUNDING


def test_cells_of_a_set_stand_where_they_say():
    scene = scene_of((7, 11, 30), (12, 40), np.full(3, 1 / 3))
    placed = {}
    for positions, visibility, reader in itertools.product(
        ("shared", "sequential"), ("isolated", "visible"), ("near", "far")
    ):
        spec = cell_spec(scene, scene.members, positions, visibility, reader)
        (trace,) = tempo.generate_batch(llama(), [spec])
        assert trace.spec.visibility == visibility
        placed[positions, reader] = trace.slot_position[3:7].tolist()
    assert placed == {
        ("shared", "near"): [3, 3, 3, 4],
        ("shared", "far"): [3, 3, 3, 6],
        ("sequential", "near"): [3, 4, 5, 4],
        ("sequential", "far"): [3, 4, 5, 6],
    }


def test_the_series_by_depth_measures_distances_to_the_mixture_of_all_paths(prompt, tiny):
    found, rounds = drive(tiny, depth_series(prompt))
    free = tempo.generate_batch(tiny, rounds[0])[0]
    assert set(free.widths) == {2}
    specs = {(len(spec.replay) - 2, spec.visibility, spec.weighting): spec for spec in rounds[1]}
    for depth in DEPTHS:
        isolated = specs[depth, "isolated", "none"]
        assert list(map(list, isolated.replay[:depth])) == free.sets[:depth]
        branches = Branches(isolated.prompt, isolated.replay[:depth], isolated.replay[depth])
        traces = run_branches(tiny, branches)
        assert len(traces) == 2**depth
        truth, paths = branches.truth(traces, 2), branches.predictions(traces, 2)
        pair = tempo.generate_batch(tiny, [isolated, specs[depth, "visible", "none"]])
        answers = dict(
            zip(
                ("isolated", "visible"),
                [t.steps[depth + 1].distribution for t in pair],
                strict=True,
            )
        )
        answers |= {"top_path": paths[0], "last_path": paths[-1]}
        for way, answer in answers.items():
            expected = total_variation(truth, answer)
            assert found[way][depth - 1] == pytest.approx(expected, abs=ROUNDING)
    assert np.all(np.diff(found["planted"]) > 0)


class Known:
    """A case whose distances are given."""

    def __init__(self, **far):
        self.far = far

    def distance(self, arm, metric="tv"):
        return self.far.get(arm) if metric == "tv" else 0.0


def test_nearer_compares_three_arms_and_says_so_in_words():
    study = Study("compared", title="Compared")
    arms = {"set": "the set", "top": "the top one", "none": "nothing"}
    claim = nearer(
        study,
        arms,
        "test_set_is_nearer",
        "The set is nearer.",
        ("set", "top", "none"),
        planned=Planned(-0.1, 0.1, "a guess"),
        share=2 / 3,
        part=lambda case: None if "left_out" in case.far else case,
        note="; some",
    )
    case = Known(set=0.5, top=0.3, none=0.9)
    assert claim(case) == pytest.approx(0.5 - 0.2)
    assert claim.claim.control(case) == pytest.approx(0.9 - 0.2)
    assert claim(Known(set=0.5)) is None, "nothing to compare with"
    assert claim(Known(set=0.5, top=0.3, left_out=1)) is None
    assert claim.id == "compared.set-is-nearer"
    said = "TV(truth, the set) - 2/3 TV(truth, the top one) at lag 2, mean over readers; some"
    assert claim.claim.statistic == said
    assert claim.claim.control_statement == "nothing, in the place of the set"


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


COMPANY = load_yaml(StudyConfig, FOLDER / "exp3_cross_parallel_attention.yaml")


def company_of(tiny, change=lambda spec: spec):
    """The case of exp3 and the specs of each of its rounds."""
    prompt = Prompt(TEXT, "suite", COMPANY, tiny, captures=("attention", "logits"))
    return drive(tiny, test_exp3_cross_parallel_attention.study.measurement(prompt), change)


def test_every_member_sees_random_tokens_in_its_siblings_slots(tiny):
    case, rounds = company_of(tiny)
    alone, *placebo = rounds[2]
    (members,) = alone.replay
    assert alone.visibility == "isolated" and len(members) > 1
    assert len(placebo) == 2 * len(members), "two draws for each member"
    for i, spec in enumerate(placebo):
        (company,) = spec.replay
        place = i % len(members)
        assert spec.visibility == "visible" and spec.prompt == alone.prompt
        assert company[place] == members[place] and len(company) == len(members)
        others = set(company) - {members[place]}
        assert len(others) == len(members) - 1 and not others & set(members)
    kl = case.company_kl
    assert kl["nobody"] < 1e-9 < 1e-4 < min(kl[name] for name in set(kl) - {"nobody"})
    by_hand = tempo.reference.generate(
        tiny, alone.prompt, replay=[members], visibility="visible", capture="logits"
    )
    nobody = tempo.reference.generate(tiny, alone.prompt, replay=[members], capture="logits")
    assert kl["siblings"] == pytest.approx(at_members(kl_divergence, by_hand, nobody, 0), rel=1e-3)


def test_company_does_nothing_where_nobody_is_seen(tiny):
    """The mode not wired: all that rests on an effect comes out as no effect."""
    case, _ = company_of(tiny, lambda spec: spec.but(visibility="isolated"))
    assert max(case.company_kl.values()) < 1e-9
    exp3 = test_exp3_cross_parallel_attention
    for claim in (exp3.test_does_something_at_once, exp3.test_it_matters_who_is_seen):
        assert claim(case) < claim.margin
