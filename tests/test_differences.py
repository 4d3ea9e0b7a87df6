"""Two records are compared prompt by prompt, and a difference is found where there is one."""

from dataclasses import replace

import numpy as np
import pytest

from tempo.claims import Claim, Finding, judge
from tempo.reporting.differences import (
    FEWEST,
    MOST_MOVED,
    NOT_SHOWN,
    SHOWN,
    compared,
    differences,
    differences_html,
    differences_markdown,
)
from tempo.reporting.report import PromptRow, Report, Section, Values

NUM = 40
RNG = np.random.default_rng(0)
# Prompts vary far more than models do: intervals of the two means overlap.
BASE = RNG.normal(1.0, 0.5, NUM)
NOISE = RNG.normal(0.0, 0.05, NUM)
SHIFT = 0.1


def report(model: str, values, claim: str = "exp16.a", prompts=None, **changes) -> Report:
    """A record of one claim with these values, one for each prompt."""
    rule = Claim(claim, "it is so", "a number", float, "greater", "less", float, "none")
    known = [value for value in values if value is not None]
    context = {"experiment": "exp16", "config": "c", "model": model}
    found: Finding = replace(judge(rule, known, context), family="primary", **changes)
    rows = tuple(PromptRow(text) for text in prompts or [f"prompt {i}" for i in range(len(values))])
    of_claim = Values(tuple(values), tuple(0.0 for _ in values))
    section = Section(
        "exp16", "t", "c", model, len(rows), prompts=rows, values={claim: of_claim}, folder="c"
    )
    return Report((found,), model, sections=(section,))


def one(first: Report, other: Report):
    (found,) = differences(first, other)
    return found


def test_a_shift_that_intervals_hide_is_found_by_pairs():
    first, other = report("a", BASE.tolist()), report("b", (BASE + SHIFT + NOISE).tolist())
    (f,), (g,) = first.findings, other.findings
    assert f.low < g.estimate < f.high
    found = one(first, other)
    assert found.short == SHOWN
    assert found.finding.estimate == pytest.approx(SHIFT, abs=0.03)
    assert found.finding.n == NUM
    assert found.finding.control_holds


@pytest.mark.parametrize("other", [BASE, BASE + NOISE - NOISE.mean()])
def test_no_difference_is_shown_where_there_is_none(other):
    assert one(report("a", BASE.tolist()), report("b", other.tolist())).short == NOT_SHOWN


def test_prompts_are_paired_by_their_text_and_not_by_their_place():
    order = RNG.permutation(NUM)
    texts = [f"prompt {i}" for i in order]
    turned = report("b", (BASE + SHIFT)[order].tolist(), prompts=texts)
    found = one(report("a", BASE.tolist()), turned)
    assert found.finding.estimate == pytest.approx(SHIFT)
    by_place = report("b", (BASE + SHIFT)[order].tolist())  # the control: as if by place
    assert abs(one(report("a", BASE.tolist()), by_place).moved[0].by) > 2 * SHIFT


def test_only_prompts_with_a_value_in_both_count():
    values = BASE.tolist()
    values[0] = None
    assert one(report("a", values), report("b", (BASE + 1).tolist())).finding.n == NUM - 1
    few = [f"other {i}" for i in range(NUM - FEWEST + 1)]
    few += [f"prompt {i}" for i in range(FEWEST - 1)]
    assert differences(report("a", BASE.tolist()), report("b", BASE.tolist(), prompts=few)) == []


def test_the_prompts_that_moved_most_come_first():
    values = BASE.copy()
    values[7] -= 5
    found = one(report("a", BASE.tolist()), report("b", values.tolist()))
    assert len(found.moved) == MOST_MOVED
    assert found.moved[0].prompt == "prompt 7"
    assert found.moved[0].by == pytest.approx(-5)


def test_p_is_corrected_over_all_rows():
    first, other = report("a", BASE.tolist()), report("b", (BASE + SHIFT + NOISE).tolist())
    many = [first, other]
    for i, each in enumerate(many):
        (f,), (section,) = each.findings, each.sections
        names = [f"exp16.{k}" for k in range(30)]
        values = dict.fromkeys(names, section.values["exp16.a"])
        section = replace(section, values=values)
        many[i] = replace(
            each, findings=tuple(replace(f, claim=name) for name in names), sections=(section,)
        )
    found = differences(*many)
    assert len(found) == 30
    assert found[0].p == pytest.approx(min(1.0, 30 * one(first, other).p))


def test_the_page_says_what_differs_and_hostile_prompts_are_inert():
    texts = [f"<script>alert({i})</script>|`x`\x1b[2J" for i in range(NUM)]
    first = report("a", BASE.tolist(), prompts=texts)
    other = report("b", (BASE + SHIFT + NOISE).tolist(), prompts=texts)
    assert [heading for heading, _ in compared([first, other])] == ["b less a"]
    page, lines = differences_html([first, other]), differences_markdown([first, other])
    assert "1 of 1 claims differ, paired on 40 prompts each." in page
    assert "<script>" not in page and "\x1b" not in page + "".join(lines)
    assert any(SHOWN in line for line in lines)
    assert differences_html([first]) == "" and differences_markdown([first]) == []
