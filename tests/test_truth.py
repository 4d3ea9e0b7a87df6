"""The exact branch mixture against sums by hand and closed forms, and distances from it.

With the weights of a wrong theory it must miss them.
"""

import itertools

import numpy as np
import pytest
import torch

import tempo
from fixtures.truth import (
    Branches,
    at_lags,
    disagreement,
    distances,
    distances_by_lag,
    normalised,
    predict_after,
    read_spec,
)
from tempo import SpecError, metrics
from tempo.harness.texts import now
from tempo.metrics import total_variation
from tests.tiny_models import TWINS, VOCAB, WINDOW, llama, mistral

pytestmark = pytest.mark.usefixtures("one_thread")

PREFIX = (5, 9, 2)
SETS = ((7, 11, 30), (4, 50))
CONTINUATION = (12, 40)
ROUNDING = 1e-5  # of float32, in total variation
APART = 1e-2  # what a wrong theory must differ by, to be told from rounding


@torch.inference_mode()
def plain(lm, tokens):
    """What transformers predicts after every token of one text: float64 [tokens, V]."""
    return lm.model(input_ids=torch.tensor([list(tokens)])).logits[0].double().softmax(-1).numpy()


def by_hand(lm, sets, continuation, *, prior_only=False):
    """The mixture as its definition says, one text after another."""
    total, mass = np.zeros(VOCAB), 0.0
    for path in itertools.product(*sets):
        text = [*PREFIX, *path, *continuation]
        after = plain(lm, text)
        counted = len(PREFIX) + len(path) if prior_only else len(text)
        weight = np.prod([after[i - 1][text[i]] for i in range(len(PREFIX), counted)])
        total, mass = total + weight * after[-1], mass + weight
    return total / mass


def truth(lm, sets, continuation):
    branches = Branches(PREFIX, sets, continuation)
    traces = tempo.generate_batch(lm, [run.spec for run in branches.runs()])
    return branches, traces, branches.truth(traces, len(continuation) + 1)


@pytest.mark.parametrize("sets", [SETS[:1], SETS, (*SETS, (3, 8))], ids=len)
@pytest.mark.parametrize("num_read", [0, 1, 2])
def test_it_is_the_mixture_summed_by_hand(sets, num_read):
    _, _, found = truth(llama(), sets, CONTINUATION[:num_read])
    assert total_variation(found, by_hand(llama(), sets, CONTINUATION[:num_read])) < ROUNDING


@pytest.mark.parametrize("sets", [SETS[:1], SETS], ids=len)
def test_prior_weights_are_not_the_truth_once_a_token_is_read(sets):
    branches, traces, found = truth(llama(), sets, CONTINUATION)
    lag = len(CONTINUATION) + 1
    prior = np.exp(branches.log_posterior(traces, 1)) @ branches.predictions(traces, lag)
    assert total_variation(prior, by_hand(llama(), sets, CONTINUATION, prior_only=True)) < ROUNDING
    assert total_variation(prior, found) > APART


def test_uniform_weights_are_not_the_truth():
    branches, traces, found = truth(llama(), SETS, ())
    assert total_variation(branches.predictions(traces, 1).mean(axis=0), found) > APART


def test_every_lag_is_the_truth_of_the_shorter_continuation():
    branches, traces, _ = truth(llama(), SETS, CONTINUATION)
    for lag in (1, 2, 3):
        _, _, shorter = truth(llama(), SETS, CONTINUATION[: lag - 1])
        assert total_variation(branches.truth(traces, lag), shorter) < ROUNDING
    assert total_variation(branches.truth(traces, 2), branches.truth(traces, 3)) > APART


def test_the_mean_over_readers_is_the_marginal_without_a_reader():
    """The tower property: a sum over u of m(u) m(. | u) is one of plain products, without Bayes."""
    lm, (members, *_) = llama(), SETS
    paths = [(member,) for member in members]
    pairs = [(*path, u) for path in paths for u in range(VOCAB)]
    after = {
        path: d.astype(np.float64)
        for path, d in now(lm, predict_after(lm, PREFIX, [(), *paths, *pairs])).items()
    }
    weights = after[()][list(members)] / after[()][list(members)].sum()
    marginal = sum(
        w * after[p][u] * after[*p, u]
        for w, p in zip(weights, paths, strict=True)
        for u in range(VOCAB)
    )
    mixture = sum(w * after[p] for w, p in zip(weights, paths, strict=True))

    def mean_over_readers(lag_of_weights):
        total = np.zeros(VOCAB)
        for u in range(VOCAB):
            branches, traces, _ = truth(lm, (members,), (u,))
            total += mixture[u] * (
                np.exp(branches.log_posterior(traces, lag_of_weights))
                @ branches.predictions(traces, 2)
            )
        return total

    assert total_variation(mean_over_readers(2), marginal) < ROUNDING
    assert total_variation(mean_over_readers(1), marginal) > APART / 2


def test_one_member_is_the_plain_text():
    branches, traces, found = truth(llama(), ((7,), (4,)), CONTINUATION)
    assert branches.paths == [(7, 4)]
    assert branches.log_posterior(traces, 3) == 0.0
    assert total_variation(found, plain(llama(), [*PREFIX, 7, 4, *CONTINUATION])[-1]) < ROUNDING


def test_branches_that_are_one_text_to_the_model_keep_their_prior_weights():
    branches, traces, found = truth(llama(), (TWINS[:2],), CONTINUATION)
    np.testing.assert_allclose(
        branches.log_posterior(traces, 3), branches.log_posterior(traces, 1), atol=1e-5
    )
    assert total_variation(found, branches.predictions(traces, 3)[0]) < ROUNDING


def test_weights_are_the_priors_right_after_the_set_and_sum_to_one():
    branches, traces, _ = truth(llama(), SETS[:1], ())
    prior = plain(llama(), PREFIX)[-1][list(SETS[0])]
    np.testing.assert_allclose(
        np.exp(branches.log_posterior(traces, 1)), prior / prior.sum(), rtol=1e-4
    )


def test_weights_survive_probabilities_that_no_float_holds():
    logs = np.array([-2000.0, -2001.0, -5000.0])
    np.testing.assert_allclose(
        np.exp(normalised(logs)), [1 / (1 + np.exp(-1)), 1 / (1 + np.e), 0.0], atol=1e-12
    )


@pytest.mark.parametrize("model", [llama, lambda: llama(4, 1)], ids=["shallow", "deep"])
def test_a_tree_of_texts_predicts_what_each_text_does_alone(model):
    lm = model()
    paths = [(), (7,), (11,), (7, 4), (7, 50), (11, 4), (30, 50, 1), (7, 4, 12, 40)]
    found = now(lm, predict_after(lm, PREFIX, paths))
    assert list(found) == paths
    for path in paths:
        assert total_variation(found[path], plain(lm, [*PREFIX, *path])[-1]) < ROUNDING
    # as a plain sequence the second sibling would have read the first
    assert total_variation(found[11,], plain(lm, [*PREFIX, 7, 11])[-1]) > APART


def test_a_tree_of_texts_gives_the_branches_weights_and_truth():
    for num_read in range(3):
        branches, traces, found = truth(llama(), SETS, CONTINUATION[:num_read])
        tree, lag = now(llama(), branches.by_tree(llama())), num_read + 1
        expected = branches.log_posterior(traces, lag)
        np.testing.assert_allclose(tree.log_posterior, expected, atol=1e-4)
        for one, other in zip(tree.predictions, branches.predictions(traces, lag), strict=True):
            assert total_variation(one, other) < ROUNDING
        assert total_variation(tree.truth, found) < ROUNDING


def test_texts_that_outgrow_a_window_are_refused():
    assert len(now(mistral(), predict_after(mistral(), PREFIX, [(7,)]))) == 1
    with pytest.raises(SpecError, match=f"{WINDOW + 1} tokens do not fit the sliding window"):
        now(mistral(), predict_after(mistral(), PREFIX, [(7, 4)]))


def test_the_spec_of_a_reading_forces_sets_then_text():
    spec = read_spec(PREFIX, SETS, CONTINUATION, visibility="visible")
    assert spec.prompt == PREFIX
    assert spec.replay[:-1] == (*SETS, (12,), (40,))
    assert len(spec.replay) == 5
    assert spec.visibility == "visible"
    run = tempo.generate(llama(), PREFIX, replay=spec.replay)
    assert total_variation(run.steps[0].distribution, plain(llama(), PREFIX)[-1]) < ROUNDING


def test_distances_of_many_are_the_metrics_of_each():
    rng = np.random.default_rng(1)
    truth, others = rng.dirichlet(np.full(50, 0.1)), rng.dirichlet(np.full(50, 0.1), size=4)
    others[0], others[1, :25] = truth, 0.0
    others /= others.sum(axis=1, keepdims=True)
    found = distances(truth, others)
    for i, other in enumerate(others):
        assert found["tv"][i] == pytest.approx(metrics.total_variation(truth, other), abs=1e-12)
        assert found["js"][i] == pytest.approx(metrics.jensen_shannon(truth, other), abs=1e-12)
        kl = metrics.kl_divergence(truth, other)
        assert found["kl"][i] == pytest.approx(kl, rel=1e-9, abs=1e-12)
        assert found["top1"][i] == metrics.top_k_overlap(truth, other, 1)
    assert found["tv"][0] < 1e-12 and found["top1"][0] == 1 and found["tv"][2] > 0.1


def test_distances_by_lag_are_those_of_each_arm_at_each_lag():
    branches, traces, _ = truth(llama(), SETS, CONTINUATION)
    lags, arms = (2, 3), {}
    for name, trace in {"first": traces[0], "last": traces[-1]}.items():
        arms[name] = at_lags(trace, lags, num_sets=len(SETS))
    truths = [branches.truth(traces, lag) for lag in lags]
    found = distances_by_lag(lags, truths, arms)
    for i, lag in enumerate(lags):
        predictions = branches.predictions(traces, lag)
        expected = distances(truths[i], predictions[[0, -1]])
        for metric, (first, last) in expected.items():
            at = found.at(lag, metric)
            assert at == pytest.approx({"first": first, "last": last}, abs=1e-8)
    assert found.at(2) != found.at(3) and found.at(2)["first"] != found.at(2)["last"]


def test_branches_that_share_nothing_disagree_by_the_entropy_of_their_weights():
    apart, weights = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0.25, 0.75])
    entropy = -0.25 * np.log(0.25) - 0.75 * np.log(0.75)
    assert disagreement(weights, apart) == pytest.approx(entropy)
    assert disagreement(weights, apart[[0, 0]]) == pytest.approx(0.0, abs=1e-12), "they are one"
