"""What exp13 reads: a search that finds the best path and says what it costs, and facts.

Facts are asked for where their answers begin.
"""

from itertools import product

import numpy as np
import pytest
import torch

import tempo
from tempo import SpecError
from tempo.harness.texts import now
from test_experiments.reading import KINDS, Facts, Search, bigrams, coverage, parted_at, search
from test_experiments.test_exp13_reading import LONE, RUNS, _equal_but_for_ties, _searches
from tests.tiny_models import llama, mistral

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = [3, 14, 15, 9, 26, 5]
SETS = [[7, 8, 40], [1, 2], [9, 50, 33], [4, 5]]
NUM_PATHS = 36
NATS = 1e-4  # a sum of float32 logarithms with a cache against one without


def exhaustive(lm, prompt, sets):
    """Every path through `sets` with its log probability, best first: a pass each, no cache."""
    found = {}
    for path in product(*sets):
        text = torch.tensor([[*prompt, *path]])
        logits = lm.model(input_ids=text, use_cache=False).logits[0, len(prompt) - 1 : -1]
        logs = logits.double().log_softmax(dim=-1)
        found[path] = float(logs.gather(1, torch.tensor(path)[:, None]).sum())
    return sorted(found.items(), key=lambda item: -item[1])


def test_with_a_beam_for_every_path_the_search_is_exhaustive():
    lm = llama()
    expected = exhaustive(lm, PROMPT, SETS)
    (beams,) = now(lm, search(lm, PROMPT, [Search(NUM_PATHS, SETS)], len(SETS)))
    assert [beam.tokens for beam in beams] == [path for path, _ in expected]
    logs = [beam.log_probability for beam in beams]
    assert logs == pytest.approx([log for _, log in expected], abs=NATS)
    assert beams[0].nll == pytest.approx(-expected[0][1] / len(SETS), abs=NATS)


def test_a_search_that_keeps_one_beam_misses_the_best_path_somewhere():
    """Negative control: were every width exhaustive, the test above could not fail."""
    greedy, best = zip(*(_one_and_all([seed, *PROMPT]) for seed in range(10)), strict=True)
    assert all(b >= g - NATS for g, b in zip(greedy, best, strict=True))
    assert any(b > g + NATS for g, b in zip(greedy, best, strict=True))


def _one_and_all(prompt):
    one, every = now(
        llama(), search(llama(), prompt, [Search(1, SETS), Search(NUM_PATHS, SETS)], len(SETS))
    )
    return one[0].log_probability, every[0].log_probability


def test_texts_that_outgrow_a_window_are_refused():
    with pytest.raises(SpecError, match="do not fit the sliding window"):
        now(mistral(), search(mistral(), PROMPT, [Search()], 1))


@pytest.mark.parametrize("num_beams", [1, 4])
def test_without_sets_it_is_the_beam_search_of_transformers(num_beams):
    lm = llama()
    tokens = torch.tensor([PROMPT])
    out = lm.model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=6,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        do_sample=False,
        pad_token_id=0,
    )
    # beside other searches, whose rows it must not take for its own
    searches = [Search(3, [[1, 2, 3]] * 6), Search(num_beams), Search(1, [[5]] * 6)]
    found = now(lm, search(lm, PROMPT, searches, 6))
    assert [list(beam.tokens) for beam in found[1]] == out[:, len(PROMPT) :].tolist()
    assert found[2][0].tokens == (5,) * 6


def test_a_run_of_single_tokens_is_the_plain_models_greedy_text():
    lm = llama()
    greedy = now(lm, search(lm, PROMPT, [Search()], 8))[0][0].tokens
    lone = tempo.generate(lm, PROMPT, threshold=LONE, max_steps=8)
    assert _equal_but_for_ties(lone, greedy)
    assert not _equal_but_for_ties(lone, (*greedy[:-1], (greedy[-1] + 1) % lm.vocab_size))
    assert not _equal_but_for_ties(tempo.generate(lm, PROMPT, threshold=0.05, max_steps=8), greedy)


def test_paths_through_sets_are_members_of_each_set():
    searches = _searches(dict.fromkeys((*RUNS, "exact"), SETS))
    beams = now(llama(), search(llama(), PROMPT, list(searches.values()), len(SETS)))
    found = dict(zip(searches, beams, strict=True))
    assert found["isolated naive"][0].tokens == (7, 1, 9, 4)
    assert found["last members"][0].tokens == (40, 2, 33, 5)
    assert all(t in s for t, s in zip(found["isolated best"][0].tokens, SETS, strict=True))
    assert all(t in s for t, s in zip(found["reversed best"][0].tokens, SETS[::-1], strict=True))
    assert len(found["isolated best"]) == len(found["beam"]) == 4


def test_bigrams_are_covered_by_consecutive_sets_only():
    wanted = bigrams([[7, 2, 50, 4], [7, 2, 9, 60]])
    assert wanted == {(7, 2), (2, 50), (50, 4), (2, 9), (9, 60)}
    assert coverage(wanted, SETS) == 4 / 5
    assert coverage(wanted, SETS[::-1]) == 0
    assert coverage(wanted, [[7], [2], [9], [60]]) == 3 / 5


def test_runs_part_where_their_sets_first_differ_not_where_their_order_does():
    assert parted_at(SETS, [s[::-1] for s in SETS]) is None
    assert parted_at(SETS, [*SETS[:2], [9, 50], SETS[3]]) == 2


def test_facts_differ_between_prompts_and_not_between_sessions():
    texts = ("The cat", "The cat", "The dog")
    drawn = [Facts.draw(np.random.default_rng([1, *text.encode()])) for text in texts]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(set(facts.people)) == len(KINDS) for facts in drawn)


def test_questions_end_where_the_answers_begin(real):
    facts = Facts(("Clara", "David", "Maria", "Simon"), ("Paris", "blue", "seven", "dog"))
    before = facts.before("The cat sat on the")
    assert before.startswith(
        "Clara lives in Paris. David drives a blue car. Maria owns seven horses. Simon wants a dog."
    )
    assert before.endswith("\n\nThe cat sat on the")
    tokens, answers_at = facts.questions(real)
    assert real.decode(tokens) == (
        "\n\nSimon wants a dog. Maria owns seven horses. David drives a blue car. "
        "Clara lives in Paris."
    )
    answers = [real.token_text(tokens[at]) for at in answers_at]
    assert answers == [" dog", " seven", " blue", " Paris"]
    # the pieces are the tokens of the whole text, so nothing is asked in a way no text would be
    assert tokens == real.encode(real.decode(tokens))


def test_the_first_token_tells_the_answers_apart(real):
    for _, _, values in KINDS:
        assert len({real.encode(f" {value}")[0] for value in values.split()}) == len(values.split())


def test_a_plainly_stated_fact_is_found_and_an_unstated_one_is_not(real):
    facts = Facts(("Clara", "David", "Maria", "Simon"), ("Paris", "blue", "seven", "dog"))
    tokens, answers_at = facts.questions(real)

    def found(prompt):
        steps = tempo.generate(real, prompt, replay=[[token] for token in tokens]).steps
        return sum(steps[at].tokens[0] == steps[at].distribution.argmax() for at in answers_at)

    assert found(facts.before("")) >= 3
    assert found("The cat sat on the") <= 1
