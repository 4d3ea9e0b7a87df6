"""Hooks that the harness offers to conftest files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


@pytest.hookspec(firstresult=True)
def pytest_tempo_conclusions(findings: Sequence[Any]) -> Any:
    """What the findings of one model say about the questions that the studies were made for.

    findings: every `tempo.claims.Finding` on record. Return `tempo.reporting.answers.Conclusions`.
    Without an implementation the report lists verdicts and draws no conclusion.
    """
