"""What a page links to beside it, and what keeps it small: nothing is dead, nothing is lost."""

import re
from dataclasses import replace

import pytest

import tempo
from fixtures.raw import spread
from tempo.records import append_jsonl
from tempo.reporting import figures
from tempo.reporting.beside import from_page, run_page, run_pages
from tempo.reporting.compact import compact
from tempo.reporting.figures.drawing import check_svg
from tempo.reporting.figures.intervals import interval_panels, intervals
from tempo.reporting.figures.spreads import DOTS, Spread
from tempo.reporting.page import WALK, report_html
from tempo.reporting.publish import publish
from tempo.reporting.report import read_report, write_section
from tempo.viewing.page import is_page
from tests.studies import CONFIG, PROMPTS, STUDY
from tests.test_report_prompts import of_four, report, section

NAME = "0123456789abcdef.html"


@pytest.fixture
def a_run(tiny):
    """The page of a run."""
    return tempo.view(tempo.generate(tiny, "Es war", threshold=0.05, max_steps=3)).page()


@pytest.fixture
def results(tmp_path, a_run):
    """A results folder with a run on a config's own prompt."""
    folder = tmp_path / "results"
    append_jsonl(folder / "findings.jsonl", [of_four().record()])
    write_section(folder, section(run=NAME))
    (folder / "runs").mkdir()
    (folder / "runs" / NAME).write_text(a_run)
    return folder


def test_a_published_page_links_to_the_run_that_lies_beside_it(results, tmp_path, a_run):
    out = tmp_path / "out"
    publish([read_report(results)], out)
    page = (out / "findings.html").read_text()
    assert f'<a href="runs/{NAME}">{WALK}</a>' in page
    assert (out / "runs" / NAME).read_text() == a_run
    publish([read_report(results)], tmp_path / "again")
    assert (tmp_path / "again/findings.html").read_bytes() == page.encode()


def test_without_the_run_there_is_no_link(results, tmp_path):
    (results / "runs" / NAME).unlink()
    publish([read_report(results)], tmp_path / "out")
    assert WALK not in (tmp_path / "out/findings.html").read_text()
    assert not (tmp_path / "out/runs").exists()
    assert WALK not in report_html(read_report(results))


def test_a_page_that_may_run_another_script_is_not_handed_on(results, tmp_path, a_run):
    assert is_page(a_run.encode())
    path = results / "runs" / NAME
    for hostile in (
        "<script>alert(1)</script>",
        a_run.replace("script-src 'sha256-", "script-src 'unsafe-inline' 'sha256-"),
        "<script>alert(1)</script>" + a_run,
        a_run[:-9],  # cut short
    ):
        path.write_text(hostile)
        assert run_page(path) == b""
        assert run_pages([read_report(results)]) == {}
    publish([read_report(results)], tmp_path / "out")
    assert WALK not in (tmp_path / "out/findings.html").read_text()


@pytest.mark.parametrize("name", ["../x.html", "a.html", "0123456789ABCDEF.html", NAME + "\n"])
def test_a_record_cannot_name_a_file_elsewhere(tmp_path, name):
    append_jsonl(tmp_path / "findings.jsonl", [of_four().record()])
    write_section(tmp_path, section(run=name))
    assert "run" in read_report(tmp_path).damaged[0]


def test_figures_of_a_page_of_pytest_are_where_they_were_recorded(results, tmp_path):
    picture = figures.bars({"a": [1, 2]}, ["1", "2"], "x", "y", "Bars", "See.")
    write_section(results, section(pictures=(picture,)))
    kept = read_report(results)
    address = from_page(tmp_path / "reports/findings.html", {})
    assert address(kept, "exp2_logits/figures/bars.svg") == (
        "../results/exp2_logits/figures/bars.svg"
    )
    assert address(kept, "exp2_logits/figures/none.svg") == ""


def test_a_session_leaves_the_run_of_each_own_prompt(pytester, monkeypatch):
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    for name, text in (("test_entropy.py", STUDY), ("entropy.yaml", CONFIG), ("p.txt", PROMPTS)):
        pytester.path.joinpath(name).write_text(text, encoding="utf-8")
    options = ("--model", "tiny", "-p", "no:cacheprovider", "--suite", "p.txt")
    pytester.runpytest_subprocess(*options)
    (kept,) = (pytester.path / "results/runs").iterdir()
    assert is_page(kept.read_bytes())
    page = (pytester.path / "reports/findings.html").read_text(encoding="utf-8")
    assert f'href="runs/{kept.name}"' in page
    assert (pytester.path / "reports/runs" / kept.name).read_bytes() == kept.read_bytes()
    text = kept.read_text(encoding="utf-8")
    assert "isolated" in text
    assert "visible" in text


STYLED = '<path d="M 0.5 1.0 L 9.25 2" style="{}"></path>'


def svg(inside: str) -> str:
    return f'<svg role="img">{inside}</svg>'


def test_styles_that_repeat_become_classes_and_say_the_same():
    page, rules = compact(svg(2 * STYLED.format("fill:none;stroke:#000")))
    assert rules == ".s0{fill:none;stroke:#000}"
    assert page.count('class="s0"') == 2
    assert "style" not in page
    alone, none = compact(svg(STYLED.format("fill:none")))
    assert 'style="fill:none"' in alone
    assert none == ""


@pytest.mark.parametrize(
    "style", ["fill:red}body{display:none", "fill:url(#a)", "fill:&quot;&lt;/style>"]
)
def test_no_style_of_a_record_ends_a_rule_of_the_page(style):
    page, rules = compact(svg(2 * STYLED.format(style)))
    assert rules == ""
    assert page.count(f'style="{style}"') == 2


def test_texts_that_look_like_markup_stay_as_they_are():
    said = ' style="fill:none" id="fig00000000-a" &lt;path d="M 1.00 2"></text'
    page, _ = compact(svg(2 * f"<text>{said}></text>"))
    assert page.count(said) == 2
    assert compact(f"<p>{said}</p>") == (f"<p>{said}</p>", "")


def test_ids_stay_apart_and_references_find_them():
    one = '<path id="fig{0}-m1" d="M 0 0"></path><use href="#fig{0}-m1"></use>'
    page, _ = compact("".join(svg(one.format(8 * digit)) for digit in "12"))
    assert re.findall(r' id="(\w+)"', page) == ["f0", "f1"]
    assert re.findall(r' href="#(\w+)"', page) == ["f0", "f1"]


def test_a_cloud_keeps_every_dot():
    dots = [(9, 5), (7, 6), (8, 6), (7, 1)]
    page, _ = compact(svg(f'<path d="{"".join(f"M{x} {y}h0" for x, y in dots)}"></path>'))
    x = y = 0
    found = []
    for right, down in re.findall(r"m(-?\d+) ?(-?\d+)h0", page):
        x, y = x + int(right), y + int(down)
        found.append((x, y))
    assert found == sorted(dots)


VALUES = [0.1, 0.2, 0.25, 0.4, 5.0, float("nan")]


def num_dots(picture) -> int:
    return picture.svg.count("h0")


def test_each_prompt_is_a_dot_behind_its_mean_in_every_figure_of_rows():
    mean = Spread.of((0.2, 0.1, 0.3), VALUES)
    drawn = (
        intervals({"a": mean, "b": mean}, "x", "t", "c"),
        interval_panels({"p": {"a": mean}, "q": {"a": mean}}, "x", "t", "c"),
        figures.dots({"g": [mean], "h": [mean]}, ["a"], "x", "t", "c"),
    )
    for picture in drawn:
        assert num_dots(picture) == 10  # of each mean five; one has no value
        assert DOTS in picture.caption
        check_svg(picture.svg, "here")
    plain = intervals({"a": (0.2, 0.1, 0.3)}, "x", "t", "c")
    assert num_dots(plain) == 0
    assert DOTS not in plain.caption


def test_dots_that_lie_far_off_stand_at_the_edge():
    rows = {"a": spread([*([0.1, 0.2] * 40), 1e6])}
    places = re.findall(r"M(-?\d+) -?\d+h0", intervals(rows, "x", "t", "c").svg)
    assert all(0 <= int(x) <= 8.4 * 72 for x in places)


def test_the_numbers_of_a_figure_have_equal_decimals():
    rows = {"a": (0.24, 0.174, 0.305), "b": (0.0396, 0.03, 0.05)}
    said = intervals(rows, "x", "t", "c").alt
    assert "a: 0.240 [0.174, 0.305]; b: 0.040 [0.030, 0.050]" in said


def test_a_claim_without_interval_says_so():
    nan = float("nan")
    found = replace(of_four(), low=nan, high=nan)
    assert "0.4 [too few prompts]" in report_html(replace(report(), findings=(found,)))
