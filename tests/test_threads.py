"""One model in several threads: runs wait for each other, and nothing is silently wrong."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import tempo
from tempo import attention
from tempo.attention import installed

PROMPTS = ("The cat", "Numbers: 1", "def f(", "She said")


@pytest.fixture
def lm():
    with tempo.load_model("tiny") as lm:
        yield lm


def run(lm, prompt):
    return tempo.generate(lm, prompt, threshold=0.05, max_steps=6)


def test_runs_in_four_threads_are_those_of_one_and_the_model_stays_as_it_was(lm):
    before = lm.model.config._attn_implementation
    alone = [run(lm, prompt).sets for prompt in PROMPTS * 3]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda prompt: run(lm, prompt).sets, PROMPTS * 3))
    assert together == alone
    assert lm.model.config._attn_implementation == before


def test_without_the_lock_threads_would_disturb_each_other(lm, monkeypatch):
    monkeypatch.setattr(attention, "_lock_of", lambda model: threading.RLock())
    inside, done = threading.Event(), threading.Event()

    def other():
        with installed(lm.model):
            inside.set()
            done.wait(10)

    before = lm.model.config._attn_implementation
    thread = threading.Thread(target=other)
    with installed(lm.model, "eager"):
        thread.start()
        inside.wait(10)
    seen = lm.model.config._attn_implementation
    done.set()
    thread.join()
    assert (seen, lm.model.config._attn_implementation) != (before, before)


def test_a_plain_pass_in_another_thread_meanwhile_is_refused_and_never_wrong(lm):
    tokens = torch.tensor([[1, 2, 3]])
    told = []

    def plain():
        try:
            lm.model(input_ids=tokens)
        except tempo.ModelError as error:
            told.append(str(error))

    thread = threading.Thread(target=plain)
    with installed(lm.model):
        thread.start()
        thread.join()
    assert "another thread runs tempo on this model" in told[0]
    plain()  # afterwards it runs
    assert len(told) == 1


def test_a_hook_of_ones_own_in_a_batch_is_told(lm):
    layer = lm.model.model.layers[0]
    specs = [tempo.RunSpec(prompt=prompt, max_steps=1) for prompt in PROMPTS[:2]]
    with layer.register_forward_hook(lambda module, args, out: None):
        with pytest.warns(UserWarning, match=r"1 modules have hooks of yours.*layers\.0.*one row"):
            tempo.generate_batch(lm, specs)
        run(lm, PROMPTS[0])  # alone: no warning, which would be an error here
    tempo.generate_batch(lm, specs)
