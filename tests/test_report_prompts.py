"""Every prompt of a claim is on record and in the page, and so is what the first screen needs."""

import csv
import io
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from tempo.errors import TraceError
from tempo.harness.report import _value
from tempo.harness.watch import watched
from tempo.parsing import seal
from tempo.records import append_jsonl
from tempo.reporting import figures
from tempo.reporting.answers import Answer, Conclusions, Hero, HeroRow, headline_lines
from tempo.reporting.figures.drawing import csv_of
from tempo.reporting.figures.intervals import intervals
from tempo.reporting.figures.mechanism import mechanism
from tempo.reporting.figures.strips import Strip, strips
from tempo.reporting.findings import findings_table
from tempo.reporting.glossary import TERMS, explained
from tempo.reporting.hero import hero_of
from tempo.reporting.page import report_html
from tempo.reporting.prompts import DATA, data_html, values_of
from tempo.reporting.report import (
    PromptRow,
    Report,
    Section,
    Values,
    read_report,
    write_section,
)
from tests.test_report import ATTACK, finding

NUMBERS = (0.1, 0.4, None, 0.7)
SETS = {"isolated": ((" cat",), ("'s", "/]")), "visible": ((" cat",),)}


def section(**changes) -> Section:
    prompts = tuple(PromptRow(f"prompt {i}", "plain", SETS if i else {}) for i in range(4))
    values = {"exp2.same-selection": Values(NUMBERS, (0.0, 1.0, None, 1.0))}
    base = Section(
        "exp2", "Logits", "exp2_logits", "tiny", 4, folder="exp2_logits", prompts=prompts,
        values=values,
    )  # fmt: skip
    return replace(base, **changes)


def of_four(**changes):
    return finding(n=3, estimate=0.4, low=0.1, high=0.7, **changes)


def report(**changes) -> Report:
    return replace(Report((of_four(),), "tiny", (section(),)), **changes)


def data(page: str) -> dict:
    """The JSON of a page, as its script reads it."""
    return json.loads(re.search(rf'id="{DATA}">(.*?)</script>', page, flags=re.S)[1])


def test_prompts_values_and_sets_come_back_from_the_record(tmp_path):
    append_jsonl(tmp_path / "findings.jsonl", [of_four().record()])
    write_section(tmp_path, section())
    assert read_report(tmp_path).sections == (section(),)


def test_a_record_of_before_has_no_prompts_and_is_read(tmp_path):
    append_jsonl(tmp_path / "findings.jsonl", [of_four().record()])
    write_section(tmp_path, section())
    path = tmp_path / "exp2_logits/report.json"
    record = json.loads(path.read_text())
    for name in ("prompts", "values", "checksum"):
        del record[name]
    path.write_text(json.dumps(seal(record)))
    old = read_report(tmp_path)
    assert old.damaged == ()
    assert old.sections == (section(prompts=(), values={}),)
    assert DATA not in re.sub("<script>.*", "", report_html(old), flags=re.S)


def test_values_that_do_not_fit_the_prompts_are_damage(tmp_path):
    append_jsonl(tmp_path / "findings.jsonl", [of_four().record()])
    write_section(tmp_path, section(prompts=section().prompts[:3]))
    assert "4 values of 'exp2.same-selection' for 3 prompts" in read_report(tmp_path).damaged[0]


@pytest.mark.parametrize("changes", [{"n": 4}, {"estimate": 0.41}, {"claim": "exp2.other"}])
def test_values_of_another_run_are_not_shown(changes):
    assert values_of(report(), of_four()) is not None
    assert values_of(report(), replace(of_four(), **changes)) is None


def test_a_statistic_is_kept_as_a_number_of_six_digits():
    assert _value(1.23456789, ()) == 1.23457
    assert _value(True, ()) == 1.0
    assert _value(np.array([[1.0, 2.0], [3.0, 4.0]]), (1, 0)) == 3.0
    assert _value(None, ()) is None
    assert _value(float("nan"), ()) is None


def test_the_page_holds_every_prompt_with_value_control_and_sets():
    found = data(report_html(report()))
    claim = found["claims"]["claim-exp2-same-selection"]
    assert found["numbers"][claim["values"]] == [3, 100, 400, None, 700]  # 0.100 and so on
    assert found["numbers"][claim["control"]] == [0, 0, 1, None, 1]
    rows = [found["prompts"][i] for i in found["lists"][claim["prompts"]]]
    assert rows == [[f"prompt {i}", "plain"] for i in range(4)]
    runs = found["lists"][claim["sets"]["isolated"]]
    assert runs[0] == -1
    members = [text.split(" ") for text in found["runs"][runs[1]].split("/")]
    sets = [[found["tokens"][int(i, 36)] for i in each] for each in members]
    assert sets == [[" cat"], ["'s", "/]"]]
    assert len(found["runs"]) == 2  # each run once


def test_the_script_is_told_whose_prompts_to_draw_as_dots():
    effect = r'<svg class="tempo-effect[^>]* data-claim="[.]" data-scale="[-.0-9]+ [.0-9]+"'
    assert len(re.findall(effect, report_html(report()))) == 1
    assert re.findall(effect, report_html(replace(report(), sections=()))) == []


def test_hostile_prompts_and_tokens_are_data_and_no_markup():
    prompts = (PromptRow(ATTACK, ATTACK, {ATTACK: ((ATTACK,),)}),) * 4
    hostile = report(sections=(section(prompts=prompts),))
    inside = data_html([hostile], [""])
    assert inside.count("<") == 2  # of the element itself
    assert inside.count(">") == 2
    found = data(report_html(hostile))
    assert "\x1b" not in json.dumps(found, ensure_ascii=False)
    assert "<script>alert(1)</script>" in found["prompts"][0][0]


def conclusions(**changes) -> Conclusions:
    answer = Answer(
        "Is it so?", "No", "A long text.", "a rule", ("exp2.same-selection",), "headline",
        sentence="The total variation is 0.4.", figure="A map",
        options=(("No", "nothing is"), ("Yes", "all is")),
    )  # fmt: skip
    return Conclusions("Is it so?", "Whether.", (replace(answer, **changes),))


def test_terminal_and_first_screen_say_the_same_sentence():
    drawn = conclusions()
    line = headline_lines(drawn)[0]
    assert line == "Is it so? No. The total variation is 0.4."
    top = re.sub("<[^>]+>", "", report_html(report(recorded=drawn)))
    assert "The total variation" in top
    assert "A long text." in headline_lines(conclusions(sentence=""))[0]


def test_an_answer_shows_its_figure_once_and_what_else_was_possible():
    picture = figures.layer_head_map(np.eye(3), "A map", "mass", "See the diagonal.")
    page = report_html(report(recorded=conclusions(), sections=(section(pictures=(picture,)),)))
    card, _, rest = page.partition('id="tempo-claims"')
    assert card.count("<strong>A map.</strong>") == 1
    assert "<strong>A map.</strong>" not in rest
    assert 'href="#figure-exp2-logits-a-map"' in rest
    assert '<div class="tempo-given"><dt>No</dt>' in card
    elsewhere = report_html(
        report(recorded=conclusions(figure=""), sections=(section(pictures=(picture,)),))
    )
    assert "<strong>A map.</strong>" in elsewhere.partition('id="tempo-claims"')[2]


HERO = Hero(
    "Ways to read",
    "total variation",
    (
        HeroRow("as they are", "exp2.same-selection"),
        HeroRow("weighted", row="weighting count"),
        HeroRow("a control", "exp2.same-selection", is_control=True),
        HeroRow("not measured", "exp9.elsewhere", row="no such row"),
    ),
    picture="Distances",
    perfect="a perfect reader",
)


def test_the_hero_takes_its_rows_from_findings_and_recorded_tables():
    table = intervals({"weighting count": (0.2, 0.1, 0.3)}, "TV", "Distances", "c", ["n 4"])
    drawn = report(
        recorded=replace(conclusions(), hero=HERO), sections=(section(pictures=(table,)),)
    )
    hero = hero_of(drawn)
    assert hero is not None
    assert "as they are: 0.4 [0.1, 0.7] (n 3)" in hero.alt
    assert "weighted: 0.2 [0.1, 0.3]" in hero.alt
    assert "a control: 0.9" in hero.alt
    assert "not measured" not in hero.alt
    assert "Zero is a perfect reader." in hero.alt
    rows = list(csv.DictReader(io.StringIO(hero.csv)))
    prompts = [row["estimate"] for row in rows if row["kind"] == "prompt"]
    assert prompts[:3] == ["0.1", "0.4", "0.7"]
    assert Conclusions.from_record(drawn.conclusions.record()) == drawn.conclusions


def test_without_a_hero_of_its_own_a_study_shows_the_claims_behind_its_answer():
    hero = hero_of(report(recorded=conclusions()))
    assert hero is not None
    assert "a statement: 0.4 [0.1, 0.7]" in hero.alt
    assert hero_of(Report((), "tiny")) is None


@pytest.mark.parametrize("value", [0.0, 1e300, -1e300, float("nan"), float("inf")])
def test_strips_draw_any_number(value):
    row = Strip("a", value, value, value, (value, 1.0), holds=(-value, value))
    for shares in (True, False):
        svg = strips([row, Strip(ATTACK, 0.1)], ATTACK, ATTACK, ATTACK, "", shares).svg
        places = [float(x) for x in re.findall(r' c?x[12]?="([-\d.a-z]+)"', svg)]
        assert all(0 <= x <= 470 for x in places)
        assert "<script" not in svg


def test_the_mechanism_says_in_words_what_it_draws():
    lattice, positions = mechanism()
    for word in ("set", "sibling", "reader"):
        assert word in lattice.alt
        assert word in lattice.caption.lower()
    assert "slots 6, 7 and 8 all at position 6" in positions.alt


def test_terms_are_explained_once_a_text_and_lead_to_the_list_of_words():
    said = explained("A set of siblings; another set. <b>KL</b> n = 3, in-set, n-gram, a control")
    linked = re.findall(r'href="#tempo-term-([a-z-]+)"', said)
    assert linked == ["set", "sibling", "kl", "n", "control"]
    assert "&lt;b&gt;" in said
    page = report_html(report())
    assert page.count('<dt id="tempo-term-') == len(TERMS)


def test_a_table_is_csv_in_which_nothing_is_a_formula():
    table = csv_of([("row", "value"), ("=1+1", -0.5), ('a,"b', float("nan")), ("@x", 3.0)])
    assert list(csv.reader(io.StringIO(table))) == [
        ["row", "value"], ["'=1+1", "-0.5"], ['a,"b', ""], ["'@x", "3"],
    ]  # fmt: skip
    lines = figures.lines_by({"a": [(1, 2, 1, 3)]}, "step", "KL", "t", "c")
    assert lines.csv == "line,step,estimate,low,high\na,1,2,1,3\n"


def test_of_many_lines_each_has_a_panel_and_of_a_few_each_a_label():
    points = [(1, 0.2, 0.1, 0.3), (2, 0.1, 0.05, 0.2)]
    few, many = (
        figures.lines_by({f"way {i}": points for i in range(n)}, "x", "y", "t", "c") for n in (3, 6)
    )
    assert "Grey: the lines of the other panels." in many.caption
    assert "Grey" not in few.caption
    for picture, n in ((few, 3), (many, 6)):
        assert re.findall(r">(way \d)<", picture.svg) == [f"way {i}" for i in range(n)]


def test_no_line_of_the_table_is_wider_than_eighty_columns():
    names = ("exp15.best-path-reads-as-well-as-the-perfect-readers", "a.b")
    found = [finding(name, estimate=-0.0726, low=-0.0991, high=-0.0478) for name in names]
    found.append(finding("a.c", control_holds=False, n=4162))
    lines = findings_table(found)
    assert max(map(len, lines)) <= 80
    assert any("exp15.best-pa…" in line and "fect-readers" in line for line in lines)


def test_what_a_wide_window_has_more_goes_to_the_names_of_claims():
    name = "exp15.best-path-reads-as-well-as-the-perfect-readers"
    lines = findings_table([finding(name)], columns=110)
    assert name in lines[1] and name not in findings_table([finding(name)])[1]
    assert 80 < max(map(len, lines)) <= 110
    assert max(map(len, findings_table([finding(name)], columns=1000))) <= 120
    assert findings_table([finding(name)], columns=40) == findings_table([finding(name)])


def test_a_watched_measurement_is_the_same_and_tells_what_it_is_given():
    def measurement(prompt):
        one = yield "asked"
        return [prompt, one]

    from tempo.harness.config import StudyConfig
    from tempo.harness.execute import Task
    from tempo.harness.plan import Plan
    from tempo.harness.study import Study

    study = Study("entropy", title="t")
    study.measurement = measurement
    config = StudyConfig(experiment="entropy", prompt="The cat")
    plan = Plan(study, "entropy", config, None, ())
    given = []
    task = watched(Task(plan, SimpleNamespace(text="a")), given.extend)
    steps = task.plan.study.measurement("a prompt")
    assert next(steps) == "asked"
    with pytest.raises(StopIteration) as stop:
        steps.send(["a trace"])
    assert stop.value.value == ["a prompt", ["a trace"]]
    assert given == ["a trace"]
    assert steps.gi_code.co_name == "measurement"  # an error names the study's own source
    assert study.measurement is measurement


def test_a_damaged_section_is_told(tmp_path):
    append_jsonl(tmp_path / "findings.jsonl", [of_four().record()])
    write_section(tmp_path, section())
    path = tmp_path / "exp2_logits/report.json"
    path.write_text(path.read_text().replace("0.7", "0.8"))
    assert read_report(tmp_path).damaged
    with pytest.raises(TraceError):
        read_report(tmp_path / "nowhere")
