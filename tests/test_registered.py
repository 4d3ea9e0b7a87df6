"""What all experiments register together: a primary family, and claims told apart."""

from pathlib import Path

import pytest

from benchmarks.registered import plans
from fixtures.margins import PRIMARY
from tempo.claims import moment
from tempo.harness.expectations import file_of, read
from tempo.harness.plan import check_together, family_sizes
from test_experiments.questions import PARTS, conclusions


@pytest.fixture(scope="module")
def found():
    return plans()


def test_the_primary_family_is_as_large_as_it_is_corrected_for(found):
    decided = [
        (claim.id, plan.name) for plan in found for claim in plan.claims if claim.family == PRIMARY
    ]
    assert len(decided) == PRIMARY.size == len(set(decided)), decided
    assert family_sizes(found)[PRIMARY.name] == PRIMARY.size


def test_the_primary_claims_are_those_that_the_answers_rest_on(found):
    primary = {claim.id for plan in found for claim in plan.claims if claim.family == PRIMARY}
    cited = {claim for answer in conclusions([]).answers for claim in answer.claims}
    assert primary == {claim for claim in cited if claim.startswith("exp16.")}
    decisive = {str(claim) for part in PARTS for claim in (*part.plain, *part.weighted)}
    assert decisive <= primary


def test_what_decides_is_measured_on_prompts_drawn_after_it_was_registered(found):
    drawn = {plan.name: plan.suite.drawn for plan in found if plan.study.name == "exp16"}
    assert set(drawn) == {"exp16_confirmatory", "exp16_replication"}
    for plan in found:
        for claim in plan.claims if plan.name in drawn else ():
            written, then = moment(claim.registered, end=True), moment(drawn[plan.name])
            assert written and then and written < then, (claim.id, claim.registered)


def test_experiments_can_be_run_together(found):
    check_together(found)
    assert len({plan.study.name for plan in found}) == 17


def test_every_other_family_belongs_to_one_experiment(found):
    for plan in found:
        families = {c.claim.family for c in plan.claims if c.test != "always"}
        assert families <= {plan.study.name, PRIMARY.name}, families


# Claims that were registered from here on have not been measured on the whole suite yet.
MEASURED_BEFORE = "2026-11-28"


def test_every_claim_has_a_committed_expectation_for_the_default_model(found):
    """For a new claim a run gives a notice only; here it is an error, so that none is forgotten."""
    expected = read(file_of(found[0].module, "smollm2-135m", "float32"))
    assert expected is not None
    for plan in found:
        known = expected.families[plan.name].claims if plan.name in expected.families else {}
        claims = {claim.id: claim.registered for claim in plan.claims}
        assert set(known) <= set(claims), plan.name
        forgotten = [name for name in claims if name not in known]
        assert all(claims[name] >= MEASURED_BEFORE for name in forgotten), forgotten


def test_no_two_experiments_share_a_margin_that_each_writes_down(found):
    """Margins that several experiments use stand in fixtures/margins.py, each with its reason."""
    for path in {plan.module for plan in found}:
        text = Path(path).read_text(encoding="utf-8")
        assert "TV_MARGIN =" not in text
        assert "KL_MARGIN =" not in text
