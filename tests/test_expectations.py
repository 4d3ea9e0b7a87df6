"""fixtures.expectations: what counts as a regression, over the same prompts and over a part of them."""

import math
from dataclasses import replace

import numpy as np
import pytest

from fixtures import expectations
from fixtures.expectations import (
    Expectation,
    Expectations,
    check,
    circumstances,
    file_of,
    read,
    update,
)
from tempo import SpecError
from tempo.claims import Claim, judge

MADE = {"config threshold": 0.1, "torch": "2.13.0", "code and threads": "abc"}
VALUES = np.linspace(0.5, 1.5, 100)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(expectations, "FOLDER", tmp_path / "expectations")
    return tmp_path / "expectations"


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
    return judge(
        registered,
        list(values),
        {"model": model, "config": config, "n_prompts": n_prompts or len(values)},
    )


@pytest.fixture
def expected():
    update("mine", [found()], {"exp9_a": MADE})
    return read("mine")


def test_an_expectation_holds_verdict_estimate_tolerance_and_its_reason(expected):
    entry = expected.families["exp9_a"].claims["exp9.more"]
    assert (entry.verdict, entry.n, entry.estimate) == ("SUPPORTED", 100, 1.0)
    assert math.isclose(entry.tolerance, (found().high - found().low) / 2 + 1e-3, rel_tol=0.01)
    assert "half its 95 % interval" in entry.reason
    assert expected.families["exp9_a"].made == MADE


def test_the_same_finding_is_no_regression_and_nor_is_rounding(expected):
    assert check(found(), expected, MADE) == expectations.Check()
    assert check(found(VALUES + 1e-5), expected, MADE) == expectations.Check()


def test_a_verdict_that_flips_shows_both_and_what_may_have_caused_it(expected):
    message = check(found(VALUES - 1), expected, MADE | {"torch": "2.14.0"}).failure
    assert "exp9.more: expected SUPPORTED (1, n = 100), found REFUTED (" in message
    assert "torch 2.13.0 -> 2.14.0" in message
    assert "config threshold" not in message
    assert "pytest test_experiments --update-expectations and commit" in message
    lost = check(found(np.linspace(-3, 5, 100) - 0.8), expected, MADE).failure
    assert "found INCONCLUSIVE" in lost
    assert "none on record" in lost


def test_an_estimate_that_leaves_its_tolerance_is_a_regression_though_the_verdict_holds(expected):
    moved = found(VALUES + 0.1)
    assert moved.verdict == "SUPPORTED"
    assert "expected SUPPORTED, 1 within 0.0" in check(moved, expected, MADE).failure
    assert "found SUPPORTED, 1.1 [" in check(moved, expected, MADE).failure


def test_a_quick_look_may_be_undecided_but_not_the_opposite(expected):
    few = found(VALUES[::20])
    assert few.verdict == "INCONCLUSIVE"
    assert check(few, expected, MADE) == expectations.Check()
    opposite = check(found(VALUES[::8] - 1), expected, MADE).failure
    assert "found the opposite, REFUTED" in opposite
    assert "This run has 13 prompts, the expectation 100: only opposite verdicts" in opposite


def test_a_quick_look_has_a_tolerance_of_its_own_size(expected):
    part = VALUES[::8]
    assert check(found(part + 0.1), expected, MADE) == expectations.Check()
    beyond = check(found(part + 1.0), expected, MADE).failure
    assert "widened to so few prompts), found SUPPORTED, 1.98" in beyond
    assert check(found(VALUES + 0.1), expected, MADE).failure  # which over all prompts is too much


def test_a_model_without_expectations_is_a_notice_and_a_published_one_a_failure(expected):
    new, published = (check(found(model=model), None, MADE) for model in ("mine", "smollm2-135m"))
    assert "no expectation" in new.notice
    assert not new.failure
    assert "no expectation" in published.failure
    unknown = found(claim="exp9.other")
    assert "no expectation" in check(unknown, expected, MADE).failure
    own = check(found(VALUES - 1), expected, MADE, own_config=True)
    assert "a config of one's own is compared with no expectation" in own.notice
    assert not own.failure


def test_an_update_rewrites_the_claims_it_was_given_and_no_others():
    update(
        "mine",
        [found(), found(claim="exp9.other"), found(config="exp9_b")],
        {"exp9_a": MADE, "exp9_b": MADE},
    )
    update("mine", [found(VALUES + 1)], {"exp9_a": MADE | {"torch": "2.14.0"}})
    now = read("mine").families
    assert [entry.estimate for entry in now["exp9_a"].claims.values()] == [2.0, 1.0]
    assert now["exp9_b"].claims["exp9.more"].estimate == 1.0
    # each knows where it comes from
    assert now["exp9_a"].made == MADE
    assert now["exp9_a"].claims["exp9.more"].made == {"torch": "2.14.0"}
    assert (
        "torch 2.13.0 -> 2.14.0"
        not in check(found(), read("mine"), MADE | {"torch": "2.14.0"}).failure
    )
    update(
        "mine",
        [found(VALUES + 1), found(VALUES + 1, claim="exp9.other")],
        {"exp9_a": MADE | {"torch": "2.14.0"}},
    )
    assert read("mine").families["exp9_a"].made["torch"] == "2.14.0"


def test_a_tolerance_with_a_reason_of_ones_own_survives_an_update(expected):
    path = file_of("mine")
    text = path.read_text()
    entry = expected.families["exp9_a"].claims["exp9.more"]
    path.write_text(
        text.replace(f"tolerance: {entry.tolerance}", "tolerance: 0.5").replace(
            entry.reason, "two machines differ by this"
        )
    )
    update("mine", [found(VALUES + 0.1)], {"exp9_a": MADE})
    kept = read("mine").families["exp9_a"].claims["exp9.more"]
    assert (kept.estimate, kept.tolerance, kept.reason) == (1.1, 0.5, "two machines differ by this")


def test_a_quick_look_replaces_no_expectation_over_more_prompts(expected):
    with pytest.raises(SpecError, match=r"made with 100 prompts; 20 cannot replace that"):
        update("mine", [found(VALUES[::5])], {"exp9_a": MADE})
    update("mine", [found(np.tile(VALUES, 2))], {"exp9_a": MADE})
    assert read("mine").families["exp9_a"].prompts == 200


def test_what_is_unsound_is_no_expectation():
    blind = replace(found(), control_holds=False)
    broken = found([True] * 9 + [False], claim="exp9.always", test="always")
    assert "1 expectations written" in update(
        "mine", [blind, broken, found(claim="exp9.good")], {"exp9_a": MADE}
    )
    assert list(read("mine").families["exp9_a"].claims) == ["exp9.good"]


def test_a_damaged_file_is_said_with_file_and_key(folder):
    update("mine", [found()], {"exp9_a": MADE})
    path = file_of("mine")
    path.write_text(path.read_text().replace("verdict: SUPPORTED", "verdict: MAYBE"))
    with pytest.raises(SpecError, match=r"mine\.yaml: .*MAYBE"):
        read("mine")
    assert read("other") is None


def test_circumstances_name_all_that_numbers_depend_on():
    provenance = {"dtype": "float32", "device": "cpu", "versions": {"torch": "2"}}
    made = circumstances({"threshold": 0.1, "capture": ["kv"]}, provenance, "f" * 64, "abc")
    assert {
        "config threshold",
        "weights",
        "dtype",
        "torch",
        "python",
        "machine",
        "prompts.yaml",
        "code and threads",
    } <= set(made)


def test_the_committed_expectations_are_whole(monkeypatch):
    monkeypatch.undo()
    committed = read("smollm2-135m")
    assert isinstance(committed, Expectations)
    for family in committed.families.values():
        assert family.made["weights"]
        for claim, entry in family.claims.items():
            assert isinstance(entry, Expectation)
            assert entry.verdict != "REFUTED" or entry.tolerance is not None, claim
            assert (entry.tolerance is None) or entry.reason
