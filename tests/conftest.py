"""Models shared by the tests: a tiny random one, and the real one that claims are about."""

from importlib.util import find_spec

import pytest
import torch

import tempo

# These tests need what `make browser`, `make notebook` and `make ray` install.
collect_ignore = [] if find_spec("playwright") else ["browser"]
collect_ignore += [] if find_spec("nbclient") and find_spec("pandas") else ["notebook"]
collect_ignore += [] if find_spec("ray") else ["on_ray"]


@pytest.fixture(scope="session")
def tiny():
    """A random Llama of three layers."""
    with tempo.load_model("tiny") as lm:
        yield lm


@pytest.fixture(scope="session")
def real():
    """SmolLM2-135M, downloaded once.

    A test that needs it and cannot have it is an error, not a skip.
    """
    with tempo.load_model("smollm2-135m") as lm:
        yield lm


@pytest.fixture(scope="module")
def one_thread():
    """One thread, for modules of tiny models whose matrices are too small to share out.

    On busy cores two threads took four times the processor time of one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
