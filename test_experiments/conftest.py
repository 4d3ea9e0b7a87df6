"""What the experiments together conclude, for the report of a session."""

from __future__ import annotations

from collections.abc import Sequence

from tempo.claims import Finding
from tempo.reporting.answers import Conclusions


def pytest_tempo_conclusions(findings: Sequence[Finding]) -> Conclusions:
    """The answers to the key questions.

    The rules import every experiment, so they are imported late: an experiment that cannot be
    imported then fails its own collection and nothing else.
    """
    from test_experiments.questions import conclusions

    return conclusions(findings)
