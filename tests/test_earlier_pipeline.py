"""The replica of the earlier pipeline: right without artefacts, wrong as recorded with each."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import tempo
from fixtures.floors import rounding
from tempo.metrics import softmax
from test_experiments.earlier_pipeline import CELLS, CORRECT, Cell, Pass, reported_score, run_cells
from tests.checks import EVERYTHING, LOGITS, WEIGHTS, Violation, near, plain, violated
from tests.tiny_models import llama, mistral

pytestmark = pytest.mark.usefixtures("one_thread")

PREFIX = (3, 17, 42, 8, 25)
SETS = ((11, 30, 7), (50, 2), (9, 33, 21, 40))
MODES = ("isolated", "visible")
LAST_ONLY, DROPPED = Cell("last only", "delivered"), Cell("all siblings", "dropped")
LAST_BY_LIST = Cell("last only", "by list index")


@pytest.fixture(scope="module")
def cells():
    """Every cell's passes in both modes, on sets of 3, 2 and 4."""
    return {mode: run_cells(llama(), PREFIX, SETS, mode) for mode in MODES}


def equals(found: list[Pass], run: tempo.Trace) -> None:
    """Nothing if the passes are those of a run, else a Violation."""
    before = softmax(found[0].logits[0])
    near(before, run.steps[0].distribution, rounding("tv"), "the pass of the prefix")
    for seen, step in zip(found[1:], run.steps, strict=True):
        near(seen.logits, step.logits, LOGITS, "logits of a set")
        near(seen.attention, step.attention, WEIGHTS, "attention of a set")


@pytest.mark.parametrize(
    "generate", [tempo.generate, tempo.reference.generate], ids=["engine", "oracle"]
)
@pytest.mark.parametrize("mode", MODES)
def test_without_artefacts_it_is_tempo(cells, mode, generate):
    run = generate(llama(), PREFIX, replay=SETS, visibility=mode, capture=EVERYTHING)
    equals(cells[mode][CORRECT], run)
    for cell in (DROPPED, LAST_ONLY):
        with pytest.raises(Violation):
            equals(cells[mode][cell], run)


def test_a_mask_by_list_index_is_the_right_one_while_every_sibling_is_cached(cells):
    for mode in MODES:
        by_list = cells[mode][Cell("all siblings", "by list index")]
        for one, other in zip(cells[mode][CORRECT], by_list, strict=True):
            # not to the last bit: they are other rows of one batch
            near(one.logits, other.logits, LOGITS, "logits")


def test_a_dropped_mask_is_plain_causal_attention_over_the_cache(cells):
    run = tempo.generate(llama(), PREFIX, replay=SETS, visibility="causal", capture=EVERYTHING)
    for mode in MODES:
        equals(cells[mode][DROPPED], run)


def test_the_last_only_cache_is_plain_decoding_of_the_last_siblings(cells):
    last = [members[-1] for members in SETS]
    for mode in MODES:
        for k in range(len(SETS) + 1):
            text = plain(llama(), [[*PREFIX, *last[:k]]])[0]
            near(cells[mode][LAST_ONLY][k].logits[0], text, LOGITS, f"after {k} sets")
            # isolated members of the first wide set are plain decoding too
            if k > 1 or (k == 1 and mode == "visible"):
                sibling = cells[mode][CORRECT][k].logits[-1]
                with violated(by=100):
                    near(sibling, text, LOGITS, "the last sibling of the correct cell")


def test_the_cache_grows_by_the_width_or_by_one(cells):
    for mode in MODES:
        for cell in CELLS:
            lengths = [seen.attention.shape[-1] for seen in cells[mode][cell]]
            last_slots = [seen.slots[-1] for seen in cells[mode][cell]]
            assert lengths == ([5, 8, 10, 14] if cell.cache == "all siblings" else [5, 6, 7, 8])
            assert last_slots == [length - 1 for length in lengths]


def differs(cells, cell: Cell) -> list[bool]:
    """Whether the modes differ in any bit of the logits, for each pass."""
    pairs = zip(*(cells[mode][cell] for mode in MODES), strict=True)
    return [bool((one.logits != other.logits).any()) for one, other in pairs]


def test_which_cells_are_identical_in_both_modes(cells):
    for mask in ("delivered", "by list index"):
        assert differs(cells, Cell("all siblings", mask)) == [False, True, True, True]
    for cell in (DROPPED, LAST_ONLY, Cell("last only", "dropped")):
        assert differs(cells, cell) == [False] * 4
    assert differs(cells, LAST_BY_LIST) == [False, False, True, True]


def test_a_mask_by_list_index_over_a_shorter_cache_deletes_the_context_just_before(cells):
    def hidden(mode, cell):
        found = []
        for seen in cells[mode][cell][1:]:
            keys = np.argwhere(seen.attention.max(axis=(0, 1)) == 0.0)[:, 1]
            found.append(sorted(set(keys.tolist())))
        return found

    assert hidden("isolated", LAST_BY_LIST) == [[], [5], [5, 6]]
    assert hidden("visible", LAST_BY_LIST) == [[], [], []]
    assert hidden("isolated", LAST_ONLY) == [[], [], []]


def test_the_reported_score_is_zero_in_every_pass_but_the_siblings_own(cells):
    siblings = range(5, 8)  # the first set, once it is in the cache
    scores = {}
    for mode in MODES:
        scores[mode] = [reported_score(seen, siblings) for seen in cells[mode][CORRECT]]
    assert scores["isolated"] == [0.0] * 4
    assert [score == 0.0 for score in scores["visible"]] == [True, False, True, True]
    own = cells["visible"][CORRECT][1].attention[..., 5:8]
    assert scores["visible"][1] == pytest.approx(own[..., ~np.eye(3, dtype=bool)].mean(), rel=1e-5)
    assert reported_score(cells["isolated"][DROPPED][1], siblings) > 0.0


@torch.inference_mode()
def test_a_last_prompt_token_fed_twice_is_a_prompt_that_ends_in_it_twice(tiny):
    cache, tokens = DynamicCache(), [5, 6, 7]
    tiny.model(torch.tensor([tokens]), past_key_values=cache)  # the logits are dropped
    again = tiny.model(torch.tensor([tokens[-1:]]), past_key_values=cache).logits[0, -1]
    prompts = ([5, 6, 7, 7], tokens)
    runs = [tempo.generate(tiny, prompt, max_steps=1) for prompt in prompts]
    twice, once = (run.steps[0].distribution for run in runs)
    near(twice, softmax(again.numpy()), rounding("tv"), "the first distribution")
    with violated(by=100):
        near(once, softmax(again.numpy()), rounding("tv"), "the prompt's own first distribution")


def test_the_model_is_left_as_it_was_and_a_window_that_cuts_is_refused():
    before = llama().model.config._attn_implementation
    run_cells(llama(), PREFIX, SETS[:1], "isolated")
    assert llama().model.config._attn_implementation == before
    with pytest.raises(tempo.ModelError, match="window of 4 positions"):
        run_cells(mistral(), PREFIX, SETS[:1], "isolated")
