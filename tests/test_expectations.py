"""What counts as a regression, over the same prompts and over a part of them."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tempo import SpecError
from tempo.claims import Claim, judge
from tempo.harness.expectations import (
    Check,
    Expectation,
    Expectations,
    check,
    circumstances,
    file_of,
    read,
    update,
)

MADE = {"config threshold": 0.1, "torch": "2.13.0", "code and threads": "abc", "suite": "160"}
VALUES = np.linspace(0.5, 1.5, 100)
COMMITTED = Path(__file__).resolve().parent.parent / "test_experiments/test_exp1.py"


@pytest.fixture
def path(tmp_path):
    return file_of(tmp_path / "test_exp9.py", "mine", "float32")


def found(
    values=VALUES, claim="exp9.more", n_prompts=None, model="mine", test="greater", config="exp9_a"
):
    registered = Claim(
        claim,
        "more",
        "x",
        lambda case: case,
        test,
        "less",
        lambda case: 0 * case,
        "nothing",
        margin=0.2,
    )
    context = {"model": model, "config": config, "n_prompts": n_prompts or len(values)}
    return judge(registered, list(values), context)


@pytest.fixture
def expected(path):
    update(path, "mine", [found()], {"exp9_a": MADE})
    return read(path)


@pytest.fixture
def checked(expected, path):
    """A finding against the expectations, in the same circumstances but for some."""
    return lambda finding, **changed: check(finding, expected, MADE | changed, path)


def test_an_expectation_holds_verdict_estimate_tolerance_and_its_reason(expected):
    entry = expected.families["exp9_a"].claims["exp9.more"]
    assert (entry.verdict, entry.n, entry.estimate) == ("SUPPORTED", 100, 1.0)
    assert math.isclose(entry.tolerance, (found().high - found().low) / 2 + 1e-3, rel_tol=0.01)
    assert "half its 95 % interval" in entry.reason
    assert expected.families["exp9_a"].made == MADE


def test_the_same_finding_is_no_regression_and_nor_is_rounding(checked):
    assert checked(found()) == Check()
    assert checked(found(VALUES + 1e-5)) == Check()


def test_a_verdict_that_flips_shows_both_and_what_may_have_caused_it(checked):
    message = checked(found(VALUES - 1), torch="2.14.0").failure
    assert "exp9.more: expected SUPPORTED (1, n = 100), found REFUTED (" in message
    assert "torch 2.13.0 -> 2.14.0" in message
    assert "config threshold" not in message
    assert "pytest --update-expectations and commit" in message
    lost = checked(found(np.linspace(-3, 5, 100) - 0.8)).failure
    assert "found INCONCLUSIVE" in lost
    assert "none on record" in lost


def test_an_estimate_that_leaves_its_tolerance_is_a_regression_though_the_verdict_holds(checked):
    moved = found(VALUES + 0.1)
    assert moved.verdict == "SUPPORTED"
    assert "expected SUPPORTED, 1 within 0.0" in checked(moved).failure
    assert "found SUPPORTED, 1.1 [" in checked(moved).failure


def test_a_quick_look_may_be_undecided_but_not_the_opposite(checked):
    few = found(VALUES[::20])
    assert few.verdict == "INCONCLUSIVE"
    assert checked(few) == Check()
    opposite = checked(found(VALUES[::8] - 1)).failure
    assert "found the opposite, REFUTED" in opposite
    assert "This run has 13 prompts, the expectation 100: only opposite verdicts" in opposite


def test_a_quick_look_has_a_tolerance_of_its_own_size(checked):
    part = VALUES[::8]
    assert checked(found(part + 0.1)) == Check()
    beyond = checked(found(part + 1.0)).failure
    assert "widened to so few prompts), found SUPPORTED, 1.98" in beyond
    assert checked(found(VALUES + 0.1)).failure  # which over all prompts is too much


def test_what_is_seen_for_the_first_time_is_a_notice_that_says_how_to_accept_it(
    expected, checked, path
):
    for new in (check(found(), None, MADE, path), checked(found(claim="exp9.other"))):
        assert "seen for the first time" in new.notice
        assert "run pytest --update-expectations to accept it" in new.notice
        assert not new.failure
    own = check(found(VALUES - 1), expected, MADE, path, own_config=True)
    assert "a config of your own is compared with no expectation" in own.notice
    assert not own.failure


def test_other_prompts_are_not_compared(checked):
    other = checked(found(VALUES - 1), suite="another")
    assert "other prompts than its expectation's" in other.notice
    assert not other.failure
    assert checked(found(VALUES - 1)).failure  # with the same ones it is


def test_an_update_rewrites_the_claims_it_was_given_and_no_others(path):
    newer = MADE | {"torch": "2.14.0"}
    three = [found(), found(claim="exp9.other"), found(config="exp9_b")]
    update(path, "mine", three, {"exp9_a": MADE, "exp9_b": MADE})
    update(path, "mine", [found(VALUES + 1)], {"exp9_a": newer})
    now = read(path).families
    assert [entry.estimate for entry in now["exp9_a"].claims.values()] == [2.0, 1.0]
    assert now["exp9_b"].claims["exp9.more"].estimate == 1.0
    # each knows where it comes from
    assert now["exp9_a"].made == MADE
    assert now["exp9_a"].claims["exp9.more"].made == {"torch": "2.14.0"}
    assert "torch 2.13.0 -> 2.14.0" not in check(found(), read(path), newer, path).failure
    both = [found(VALUES + 1), found(VALUES + 1, claim="exp9.other")]
    update(path, "mine", both, {"exp9_a": newer})
    assert read(path).families["exp9_a"].made["torch"] == "2.14.0"


def test_a_tolerance_with_a_reason_of_ones_own_survives_an_update(expected, path):
    entry = expected.families["exp9_a"].claims["exp9.more"]
    text = path.read_text().replace(f"tolerance: {entry.tolerance}", "tolerance: 0.5")
    path.write_text(text.replace(entry.reason, "two machines differ by this"))
    update(path, "mine", [found(VALUES + 0.1)], {"exp9_a": MADE})
    kept = read(path).families["exp9_a"].claims["exp9.more"]
    assert (kept.estimate, kept.tolerance, kept.reason) == (1.1, 0.5, "two machines differ by this")


def test_a_quick_look_replaces_no_expectation_over_more_prompts(expected, path):
    with pytest.raises(SpecError, match=r"made with 100 prompts; 20 cannot replace that"):
        update(path, "mine", [found(VALUES[::5])], {"exp9_a": MADE})
    update(path, "mine", [found(np.tile(VALUES, 2))], {"exp9_a": MADE})
    assert read(path).families["exp9_a"].prompts == 200


def test_what_is_unsound_is_no_expectation(path):
    blind = replace(found(), control_holds=False)
    broken = found([True] * 9 + [False], claim="exp9.always", test="always")
    said = update(path, "mine", [blind, broken, found(claim="exp9.good")], {"exp9_a": MADE})
    assert "1 expectations written" in said
    assert list(read(path).families["exp9_a"].claims) == ["exp9.good"]


def test_a_damaged_file_is_said_with_file_and_key(path):
    update(path, "mine", [found()], {"exp9_a": MADE})
    path.write_text(path.read_text().replace("verdict: SUPPORTED", "verdict: MAYBE"))
    with pytest.raises(SpecError, match=r"mine\.yaml: .*MAYBE"):
        read(path)
    assert read(path.with_name("other.yaml")) is None


def test_each_dtype_has_a_file_of_its_own(tmp_path):
    names = {file_of(tmp_path / "x.py", "mine", dtype).name for dtype in ("float32", "bfloat16")}
    assert names == {"mine.yaml", "mine-bfloat16.yaml"}


def test_circumstances_name_all_that_numbers_depend_on():
    provenance = {"dtype": "float32", "device": "cpu", "versions": {"torch": "2"}}
    settings = {"threshold": 0.1, "capture": ["kv"]}
    made = circumstances(settings, provenance, "f" * 64, "abc", "160 prompts")
    assert set(made) >= {
        "config threshold",
        "weights",
        "dtype",
        "torch",
        "python",
        "machine",
        "suite",
        "code and threads",
    }


@pytest.mark.parametrize("model", ["smollm2-135m", "gemma3-270m"])
def test_the_committed_expectations_are_whole(model):
    committed = read(file_of(COMMITTED, model, "float32"))
    assert isinstance(committed, Expectations)
    for family in committed.families.values():
        assert family.made["weights"]
        for claim, entry in family.claims.items():
            assert isinstance(entry, Expectation)
            assert entry.verdict != "REFUTED" or entry.tolerance is not None, claim
            assert (entry.tolerance is None) or entry.reason
