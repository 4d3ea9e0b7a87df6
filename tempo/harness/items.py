"""A claim as a pytest item: it asserts what the evidence, gathered before any test, says."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tempo.claims import Finding
from tempo.harness.plan import Plan
from tempo.harness.study import ClaimTest

if TYPE_CHECKING:
    from tempo.harness.session import Session

# Of a finding, what JUnit records hold as separate properties; `finding` holds all of it as JSON.
PROPERTIES = (
    "estimate",
    "low",
    "high",
    "effect_size",
    "n",
    "p",
    "p_corrected",
    "p_against",
    "p_against_corrected",
)


class ClaimFailed(Exception):
    """Why the test of a claim fails, in words that need no traceback."""


class ClaimItem(pytest.Item):
    """The test of one claim on one config.

    It fails if the claim could not be decided, if its control is supported as well, if an invariant
    is violated, or if the finding is not the expected one. A refuted claim does not fail it, unless
    --strict-claims asks for that: results must not be tuned until they are green.
    """

    def __init__(
        self, *, claim: ClaimTest, plan: Plan, session_of: Session, line: int, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.claim, self.plan, self.session_of, self.line = claim, plan, session_of, line
        self.extra_keyword_matches.add(claim.id)  # -k takes the claim's id as well

    def runtest(self) -> None:
        finding = self.session_of.finding(self.plan, self.claim)
        if isinstance(finding, str):
            raise ClaimFailed(finding)
        record = finding.record()
        known = {name: record[name] for name in PROPERTIES if record[name] is not None}
        ours = {"verdict": finding.verdict, **known, "finding": json.dumps(record)}
        # a test that is run again has them already
        kept = [pair for pair in self.user_properties if pair[0] not in ours]
        self.user_properties[:] = [*kept, *ours.items()]
        regression = self.session_of.regression(finding, self.plan)
        if problem := self._problem(finding) or regression:
            raise ClaimFailed(problem)

    def _problem(self, finding: Finding) -> str:
        """What is wrong with the finding itself; empty if nothing."""
        if not finding.control_holds:
            return (
                f"{finding.claim}: the check supports its own control as well ({finding.control}: "
                f"{finding.control_estimate:.3g}), so it can prove nothing; the study is at fault, "
                "not the model"
            )
        refuted = finding.verdict == "REFUTED"
        if finding.kind == "invariant" and refuted:
            return (
                f"{finding.claim}: {finding.statement} {finding.reason} "
                f"(refuted by {finding.refuted_by})"
            )
        if refuted and self.config.getoption("strict_claims"):
            return f"--strict-claims: {finding.claim} is REFUTED: {finding.reason}"
        return ""

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, ClaimFailed):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, self.line, self.name


def line_of(claim: ClaimTest, name: str, path: Path) -> int:
    """The line (from 0) of the module that makes the claim: its function, or its assignment."""
    code = claim.function.__code__
    if Path(code.co_filename) == path:
        return code.co_firstlineno - 1
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node.lineno - 1
    return 0


def marks_of(claim: ClaimTest) -> list[Any]:
    """The pytest marks that stand above a claim."""
    found = getattr(claim, "pytestmark", [])
    return list(found) if isinstance(found, list) else [found]
