"""Texts that many measurements want to be read: each token once, together, and as if alone."""

import pytest
import torch

from tempo import SpecError
from tempo.harness import read, texts
from tempo.harness.texts import Texts
from tests.tiny_models import llama, mistral

ROUNDING = 2e-5  # of a logit, between passes of other shapes
PREFIX, OTHER = (3, 14, 15, 9, 26), (3, 14, 8)
PATHS = [(), (7,), (7, 4), (7, 4, 12), (11, 4), (30, 50, 1)]


@pytest.fixture
def forwarded(monkeypatch):
    """The number of tokens of each pass of the plain model so far."""
    found, original = [], Texts._forward

    def spied(self, taken, *others):
        found.append(len(taken))
        original(self, taken, *others)

    monkeypatch.setattr(Texts, "_forward", spied)
    return found


def alone(lm, text):
    return lm.model(input_ids=torch.tensor([list(text)]), use_cache=False).logits[0, -1]


def check(lm, logits, prefix, paths):
    for found, path in zip(logits, paths, strict=True):
        assert (found - alone(lm, (*prefix, *path))).abs().max() < ROUNDING


def test_what_follows_each_text_is_what_follows_it_alone(forwarded):
    lm = llama(4, 1)
    ours, others = Texts(lm).read([read(PREFIX, PATHS), read(OTHER, PATHS[:2])])
    check(lm, ours, PREFIX, PATHS)
    check(lm, others, OTHER, PATHS[:2])
    # one pass; both prefixes begin with the same two tokens, and paths share their beginnings
    assert forwarded == [5 + 8 + 1 + 1]


def test_one_text_is_not_seen_by_another():
    """Negative control: were they one text, the second member would have read the first."""
    lm = llama()
    (logits,) = Texts(lm).read([read(PREFIX, [(7,), (11,)])])
    assert (logits[1] - alone(lm, (*PREFIX, 7, 11))).abs().max() > 100 * ROUNDING


def test_what_was_read_is_not_read_again(forwarded):
    lm = llama()
    reader = Texts(lm)
    reader.read([read(PREFIX, PATHS[:3])])
    (again, longer) = reader.read([read(PREFIX, PATHS[:3]), read((*PREFIX, 7), [(4, 12), (5,)])])
    check(lm, again, PREFIX, PATHS[:3])
    check(lm, longer, (*PREFIX, 7), [(4, 12), (5,)])
    assert forwarded == [7, 2]


@pytest.mark.parametrize("limit", ["MOST_TOKENS", "MOST_PAIRS", "MOST_KEYS", "MOST_LOGITS"])
def test_small_passes_and_forgotten_texts_change_nothing(monkeypatch, forwarded, limit):
    monkeypatch.setattr(texts, limit, {"MOST_TOKENS": 2, "MOST_PAIRS": 9}.get(limit, 0))
    lm = llama()
    reader = Texts(lm)
    for paths in (PATHS[:3], PATHS, PATHS[::-1]):
        check(lm, reader.read([read(PREFIX, paths)])[0], PREFIX, paths)
    assert sum(forwarded) > 13 or len(forwarded) > 2


def test_texts_that_outgrow_a_window_are_refused():
    lm = mistral()
    texts.check_fits(lm, 4)
    with pytest.raises(SpecError, match="texts of 5 tokens do not fit the sliding window"):
        texts.check_fits(lm, 5)


def test_steps_that_ask_for_texts_alone_can_be_taken_now():
    lm = llama()

    def steps():
        first = yield read(PREFIX, [()])
        token = int(first[0].argmax())
        second = yield read(PREFIX, [(token,)])
        return token, second[0]

    token, logits = texts.now(lm, steps())
    assert (logits - alone(lm, (*PREFIX, token))).abs().max() < ROUNDING
