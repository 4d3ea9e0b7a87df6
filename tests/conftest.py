"""Models shared by the tests: a tiny random one, and the real one that claims are about."""

from importlib.util import find_spec

import pytest

import tempo

# `make browser` installs what these need
collect_ignore = [] if find_spec("playwright") else ["browser"]


@pytest.fixture(scope="session")
def tiny():
    with tempo.load_model("tiny") as lm:
        yield lm


@pytest.fixture(scope="session")
def real():
    """SmolLM2-135M: downloaded once. A test that needs it and cannot have it is an error, not a skip."""
    with tempo.load_model("smollm2-135m") as lm:
        yield lm
