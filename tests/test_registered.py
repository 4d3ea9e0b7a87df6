"""What all experiments register together: one confirmatory family of a fixed size, and claims that can be told apart."""

import importlib.util
from pathlib import Path

import pytest

from fixtures.study import CONFIRMATORY, EXPERIMENTS, NUM_CONFIRMATORY, families

MODULES = sorted(EXPERIMENTS.glob("test_exp*.py"))


def study_of(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.STUDY


@pytest.fixture(scope="module")
def studies():
    return [study_of(path) for path in MODULES]


def test_the_confirmatory_family_is_as_large_as_it_is_corrected_for(studies):
    decided = [
        claim.id
        for study in studies
        for _ in families(study.experiment)
        for claim in study.claims
        if claim.family == CONFIRMATORY
    ]
    assert len(decided) == NUM_CONFIRMATORY == len(set(decided)), decided


def test_every_claim_has_a_name_of_its_own_that_begins_with_its_experiment(studies):
    ids = [(study.experiment, claim.id) for study in studies for claim in study.claims]
    assert len(set(ids)) == len(ids)
    assert all(claim.startswith(f"{experiment}.") for experiment, claim in ids)


def test_every_experiment_has_a_config_beside_it(studies):
    assert all(families(study.experiment) for study in studies)


def test_every_other_family_belongs_to_one_experiment(studies):
    for study in studies:
        of_claims = {claim.family for claim in study.claims if claim.kind == "empirical"} - {
            CONFIRMATORY
        }
        assert of_claims <= {study.experiment}, of_claims
