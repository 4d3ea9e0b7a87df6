"""A report of all experiments, two models and 162 prompts stays under 4 MB."""

import functools

import pytest

from tempo.reporting.page import report_html
from tempo.reporting.publish import publish
from tests.full_record import (
    FIGURE_BYTES,
    FIGURES_A_CONFIG,
    NUM_CLAIMS,
    NUM_CONFIGS,
    NUM_PROMPTS,
    two_full_reports,
)
from tests.test_report_prompts import data

MOST_BYTES = 4_000_000


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folder of a report of both models."""
    folder = tmp_path_factory.mktemp("report")
    publish(two_full_reports(), folder)
    return folder


@functools.cache
def standing_alone() -> str:
    """The page of both models that holds every figure itself."""
    return report_html(*two_full_reports())


def test_the_record_is_as_large_as_that_of_a_full_run():
    for report in two_full_reports():
        assert len(report.findings) == NUM_CLAIMS
        assert len(report.sections) == NUM_CONFIGS
        assert all(len(section.prompts) == NUM_PROMPTS for section in report.sections)
        pictures = [picture for section in report.sections for picture in section.pictures]
        assert len(pictures) == NUM_CONFIGS * FIGURES_A_CONFIG
        assert sum(len(picture.svg) for picture in pictures) > FIGURE_BYTES


def test_a_page_of_two_models_is_small_and_holds_every_prompt(published):
    page = (published / "findings.html").read_text(encoding="utf-8")
    assert len(page.encode()) < MOST_BYTES
    found = data(page)
    assert len(found["claims"]) == 2 * NUM_CLAIMS
    for claim in found["claims"].values():
        assert len(found["numbers"][claim["values"]]) == 1 + NUM_PROMPTS
        assert len(found["lists"][claim["sets"]["isolated"]]) == NUM_PROMPTS
    assert len(found["prompts"]) == NUM_PROMPTS  # each text once, for all claims and models


def test_without_links_to_figures_the_same_page_would_be_too_large():
    assert len(standing_alone().encode()) > MOST_BYTES


def test_every_figure_of_the_second_model_is_in_the_page_or_linked(published):
    page = (published / "findings.html").read_text(encoding="utf-8")
    second = two_full_reports()[1]
    for section in second.sections:
        for picture in section.pictures:
            file = f"figures/gemma3-270m-{section.folder.replace('_', '-')}-{picture.name}.svg"
            is_linked = f'href="{file}"' in page
            assert (published / file).is_file()
            assert is_linked != (f'data-name="{picture.name}"' in page.partition('id="m2-')[2])
