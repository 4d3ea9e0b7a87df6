"""What a model is expected to show, and whether it still does: the regression behind CI.

One YAML file a model and dtype, in `expectations/` beside the study, written by
`--update-expectations`.
Expectations made with all prompts are not applied to a quick look as if its findings were equal: a
part of the suite can contradict them, but not confirm them.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tempo import files
from tempo.claims import Finding, Verdict
from tempo.errors import ResultsError, SpecError
from tempo.parsing import dump_yaml
from tempo.spec import Strict, load_yaml
from tempo.text import slug

FOLDER = "expectations"
TOLERANCE_REASON = (
    "half its 95 % interval: less is what another draw of prompts would do, and changes no "
    "conclusion"
)
# Sums in another order, on another machine, move an estimate far less than a thousandth of itself.
ROUNDING = 1e-3
# A quick look's estimate may be off by this many half intervals of its own number of prompts: 3.9
# standard errors, so that some thirty claims stay quiet at any number of prompts, while what a
# fault does is larger.
WIDER = 2.0
HEADER = """\
# What {model} is expected to show. Written by pytest --update-expectations; commit changes with
# their reason. A tolerance with a reason of your own survives an update. Invariants have none:
# they hold for every prompt.
"""


class Expectation(Strict):
    """The verdict on one claim; the estimate over `n` prompts, how far it may move, and why so far.

    made: what its numbers depend on, where it differs from that of its config's other claims.
    """

    verdict: Verdict
    n: int = Field(ge=0)
    estimate: float | None = Field(default=None, allow_inf_nan=False)
    tolerance: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    reason: str = ""
    made: dict[str, Any] | None = None


class FamilyExpectations(Strict):
    """The claims of one config: over how many prompts, and what they depend on (`made`)."""

    prompts: int = Field(ge=1)
    made: dict[str, Any]
    claims: dict[str, Expectation]


class Expectations(Strict):
    """The file of one model in one dtype."""

    version: Literal[1] = 1
    model: str
    families: dict[str, FamilyExpectations] = Field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """What comparing a finding with its expectation gave: a failure, or a notice, or neither."""

    failure: str = ""
    notice: str = ""


def file_of(module: Path, model: str, dtype: str) -> Path:
    """Where the expectations of a study's model are kept: beside the module, by model and dtype."""
    suffix = "" if dtype == "float32" else f"-{dtype}"
    return module.parent / FOLDER / f"{slug(model)}{suffix}.yaml"


def read(path: Path) -> Expectations | None:
    """The expectations in a file, None if there is none. Raises SpecError if it is damaged."""
    return load_yaml(Expectations, path) if path.exists() else None


def circumstances(
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    model_sha256: str,
    fingerprint: str,
    suite: str,
) -> dict[str, Any]:
    """What a config's numbers depend on, flat, to be compared with the same of another run."""
    settings = {
        f"config {key}": list(value) if isinstance(value, tuple) else value
        for key, value in config.items()
    }
    return {
        **settings,
        WEIGHTS: model_sha256[:16],
        "dtype": provenance["dtype"],
        "device": provenance["device"],
        **provenance["versions"],
        "python": platform.python_version(),
        "machine": platform.machine(),
        SUITE: suite,
        "code and threads": fingerprint,
    }


SUITE, WEIGHTS = "suite", "weights"
ACCEPT = "look at its verdict, then run pytest --update-expectations to accept it"


def check(
    finding: Finding,
    expectations: Expectations | None,
    now: Mapping[str, Any],
    path: Path,
    own_config: bool = False,
) -> Check:
    """Whether a finding is the expected one.

    now: the circumstances it was made in; path: the file of the expectations; own_config: its
    config was given by --config. What is new, or was made with other prompts, is a notice and no
    failure.
    """
    if own_config:
        return Check(
            notice=f"{finding.label}: a config of your own is compared with no expectation"
        )
    config = str(finding.context["config"])
    family = expectations.families.get(config) if expectations else None
    expected = family.claims.get(finding.claim) if family else None
    if finding.verdict == "INAPPLICABLE" and expected is None:
        return Check()  # there is nothing to expect
    if family is None or expected is None:
        return Check(notice=f"{finding.label}: seen for the first time; {ACCEPT}")
    if family.made.get(SUITE, now.get(SUITE)) != now.get(SUITE):
        return Check(notice=f"{finding.label}: other prompts than its expectation's; not compared")
    whole = finding.context["n_prompts"] == family.prompts or finding.verdict == "INAPPLICABLE"
    wrong = _whole(finding, expected) if whole else _part(finding, expected)
    if not wrong:
        return Check()
    numbers = (
        f"This run has {finding.context['n_prompts']} prompts, the expectation {family.prompts}"
    )
    look = "" if whole else f" {numbers}: {QUICK_LOOK}."
    causes = _causes({**family.made, **(expected.made or {})}, now)
    return Check(
        failure=f"{finding.label}: {wrong}.{look} Likely causes: {causes}. {_remedy(path)}"
    )


def other_weights(
    expectations: Expectations | None, config: str, now: Mapping[str, Any], path: Path
) -> str:
    """A line if the expectations are those of other weights; empty if not, or if there are none.

    They are found by the model's name, which says nothing of its weights.
    """
    family = expectations.families.get(config) if expectations else None
    made, seen = family.made.get(WEIGHTS) if family else None, now.get(WEIGHTS)
    if made is None or made == seen:
        return ""
    return (
        f"the expectations in {_shown(path)} are of other weights (sha256 {made}, now {seen}): "
        "that they are met says nothing of those; --update-expectations makes new ones"
    )


QUICK_LOOK = (
    "only opposite verdicts and estimates beyond a tolerance widened to so few are failures"
)


def _whole(finding: Finding, expected: Expectation) -> str:
    """What is wrong with a finding over the same prompts; empty if nothing."""
    if finding.verdict != expected.verdict:
        found = f"found {finding.verdict} ({_found(finding)}): {finding.reason}"
        return f"expected {expected.verdict} ({_seen(expected)}), {found}"
    return _estimate_moved(finding, expected, 1.0)


def _part(finding: Finding, expected: Expectation) -> str:
    """What is wrong with a finding over other prompts, for which INCONCLUSIVE says nothing."""
    if {finding.verdict, expected.verdict} == {"SUPPORTED", "REFUTED"}:
        found = f"found the opposite, {finding.verdict} ({_found(finding)})"
        return f"expected {expected.verdict} ({_seen(expected)}), {found}"
    if math.isnan(finding.estimate):
        return ""
    fewer = max(1.0, expected.n / max(1, finding.n))
    return _estimate_moved(finding, expected, WIDER * math.sqrt(fewer))


def _estimate_moved(finding: Finding, expected: Expectation, widened: float) -> str:
    if expected.estimate is None or expected.tolerance is None:
        return ""
    allowed = expected.tolerance * widened
    if abs(finding.estimate - expected.estimate) <= allowed:
        return ""
    reason = expected.reason + (", widened to so few prompts" if widened != 1.0 else "")
    wanted = f"{expected.verdict}, {expected.estimate:.4g} within {allowed:.2g} ({reason})"
    return f"expected {wanted}, found {finding.verdict}, {_found(finding)}"


def _seen(expected: Expectation) -> str:
    estimate = "" if expected.estimate is None else f"{expected.estimate:.4g}, "
    return f"{estimate}n = {expected.n}"


def _found(finding: Finding) -> str:
    return f"{finding.estimate:.4g} [{finding.low:.4g}, {finding.high:.4g}], n = {finding.n}"


def _causes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between the two runs, the config first, as it is the most telling."""
    changed = [
        f"{key} {before.get(key)} -> {now.get(key)}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]
    same = "config, weights, prompts, versions, machine, code and threads are the same"
    return "; ".join(changed) or f"none on record: {same}"


def _remedy(path: Path) -> str:
    return (
        "If the change is meant, run pytest --update-expectations and commit "
        f"{_shown(path)} with the reason"
    )


def _shown(path: Path) -> str:
    return os.path.relpath(path)


def update(
    path: Path,
    model: str,
    findings: Sequence[Finding],
    circumstances_of: Mapping[str, Mapping[str, Any]],
) -> str:
    """Rewrite the expectations of these findings' claims and no others; says what was done.

    circumstances_of: those of each config. A finding whose control misbehaves, a broken invariant,
    or one that is not applicable, becomes no expectation. Raises SpecError where a part of the
    suite would replace more of it, ResultsError if the file cannot be written.
    """
    known = read(path) or Expectations(model=model)
    families = {name: family.model_dump() for name, family in known.families.items()}
    sound = [f for f in findings if _is_sound(f)]
    for config in dict.fromkeys(str(f.context["config"]) for f in sound):
        members = [f for f in sound if f.context["config"] == config]
        now = dict(circumstances_of[config])
        families[config] = _updated(families.get(config), config, members, now)
    _write(path, Expectations(model=model, families=families))  # type: ignore[arg-type]
    left_out = sum(f.verdict != "INAPPLICABLE" and not _is_sound(f) for f in findings)
    said = f"{len(sound)} expectations written to {_shown(path)}"
    return said + (f"; {left_out} unsound findings left out" if left_out else "")


def _is_sound(finding: Finding) -> bool:
    broken = finding.kind == "invariant" and finding.verdict == "REFUTED"
    return finding.control_holds and not broken and finding.verdict != "INAPPLICABLE"


def _updated(
    old: dict[str, Any] | None, config: str, findings: Sequence[Finding], now: dict[str, Any]
) -> dict[str, Any]:
    """A config's expectations with those of these findings rewritten."""
    prompts = int(findings[0].context["n_prompts"])
    same_suite = old is not None and old["made"].get(SUITE) == now.get(SUITE)
    if old and same_suite and prompts < old["prompts"]:
        raise SpecError(
            f"{config} was made with {old['prompts']} prompts; {prompts} cannot replace that, "
            "run without --prompts"
        )
    # expectations over other prompts are not kept beside these
    kept = old["claims"] if old and same_suite and prompts == old["prompts"] else {}
    whole = set(kept) <= {f.claim for f in findings}
    made = now if whole or not old else old["made"]
    changed = {key: value for key, value in now.items() if made.get(key) != value}
    fresh = {}
    for f in findings:
        fresh[f.claim] = _expectation(f, kept.get(f.claim)) | ({"made": changed} if changed else {})
    return {"prompts": prompts, "made": made, "claims": kept | fresh}


def _expectation(finding: Finding, old: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a finding makes one expect; a tolerance with a reason of somebody's own is kept."""
    expected: dict[str, Any] = {"verdict": finding.verdict, "n": finding.n}
    half = (finding.high - finding.low) / 2
    if finding.kind == "empirical" and not math.isnan(finding.estimate):
        expected["estimate"] = float(f"{finding.estimate:.6g}")
    if "estimate" in expected and math.isfinite(half):
        tolerance = float(f"{half + ROUNDING * abs(finding.estimate):.3g}")
        expected |= {"tolerance": tolerance, "reason": TOLERANCE_REASON}
        old = old or {}
        if (
            old.get("reason", TOLERANCE_REASON) != TOLERANCE_REASON
            and old.get("tolerance") is not None
        ):
            expected |= {"tolerance": old["tolerance"], "reason": old["reason"]}
    return expected


def _write(path: Path, expectations: Expectations) -> None:
    content = {"version": expectations.version, **expectations.model_dump(exclude_defaults=True)}
    text = dump_yaml(content, width=140)
    try:
        files.write(path, HEADER.format(model=expectations.model) + text)
    except OSError as error:
        raise ResultsError(
            f"cannot write {_shown(path)}: {files.reason(error)}; make that folder writable, or "
            "copy the studies to one that is"
        ) from None
