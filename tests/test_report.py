"""A report is a view of its records: made again from them it is the same to the byte."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from typer.testing import CliRunner

from tempo import files
from tempo.claims import Finding
from tempo.cli import app
from tempo.errors import ResultsError, SpecError, TraceError
from tempo.files import MANIFEST
from tempo.parsing import seal
from tempo.records import append_jsonl
from tempo.reporting import figures, sidebyside
from tempo.reporting.answers import Answer, Conclusions
from tempo.reporting.comparison import (
    UNCHANGED,
    compare_findings,
    comparison_markdown,
    what_changed,
)
from tempo.reporting.figures.drawing import SVG_TAGS, check_svg
from tempo.reporting.findings import PRIMARY, findings_markdown, findings_table
from tempo.reporting.page import POLICY, report_html
from tempo.reporting.publish import publish, report_markdown
from tempo.reporting.report import (
    Report,
    Section,
    Session,
    TestRow,
    findings_of,
    names_of,
    read_report,
    read_reports,
    write_section,
    write_session,
)
from tempo.reporting.table import claims_table, effect_svg
from tempo.text import escaped

ATTACK = (
    '</pre></td><script>alert(1)</script><img src="http://evil.example/x.png" onerror=y>'
    "\x00\x1b[2J\u202e😀\"'|`*[a](b)"
)
ROWS = (
    TestRow("test_a.py::test_one", "passed", "SUPPORTED", 0.25),
    TestRow("test_a.py::test_two", "failed", "REFUTED", 1.5, "assert 1 == 2\n  left: 1"),
    TestRow("test_a.py::test_three", "skipped", message="no GPU here"),
)


def finding(claim: str = "exp2.same-selection", verdict: str = "REFUTED", **changes) -> Finding:
    base = Finding(
        claim=claim,
        statement="a statement",
        kind="empirical",
        verdict=verdict,
        reason="why",
        estimate=0.4,
        low=0.3,
        high=0.5,
        effect_size=1.0,
        n=160,
        unit="prompt",
        statistic="a share",
        test="less",
        margin=0.05,
        margin_reason="one in twenty",
        p=1.0,
        p_corrected=1.0,
        p_against=0.001,
        p_against_corrected=0.002,
        family="exp2",
        control="a control",
        control_estimate=0.9,
        control_holds=True,
        context={
            "experiment": "exp2",
            "config": "exp2_logits",
            "model": "tiny",
            "n_prompts": 160,
            "dtype": "float32",
        },
    )
    return replace(base, **changes)


def conclusions(short: str = "Hardly", text: str = "", claim: str = "exp2.same-selection"):
    """Conclusions of all three places, whose every string holds `text`."""
    claims = (claim, "exp9.elsewhere")
    rule = f"a rule{text}"
    return Conclusions(
        f"Is it so?{text}",
        f"Whether it is so.{text}",
        (
            Answer(f"Is it so?{text}", short, f"On 4 of 9.{text}", rule, claims, "headline"),
            Answer(f"Which way?{text}", f"Up{text}", f"Much.{text}", rule, claims),
            Answer(f"What now?{text}", f"Wait{text}", f"A day.{text}", rule, (), "advice"),
        ),
    )


def picture(title: str = "A map") -> figures.Picture:
    return figures.layer_head_map(np.eye(3), title, "mass", "See the diagonal.")


def keep(results, findings=(), model="tiny", config="exp2_logits", text="a[b/c]", made=None):
    """A results folder as a session leaves it."""
    append_jsonl(results / "findings.jsonl", [f.record() for f in findings or [finding()]])
    section = Section(
        experiment="exp2",
        title="Logits",
        config=config,
        model=model,
        num_prompts=160,
        pictures=(picture(), picture()),
        settings={"prompt": text},
        text=text,
        analysis=text,
        files=("a.npz",),
        fingerprint="abc",
        folder="exp2_logits",
    )
    write_section(results, section)
    about = {"Made": "2026-11-24 16:02 UTC", "Command": text}
    rows = tuple(replace(row, name=f"{row.name} {text}", message=text) for row in ROWS)
    suite = "162 prompts of 11 categories (prompts.yaml)"
    write_session(results, Session(model, about, made or conclusions(), suite, tests=rows))
    return results


LOADING = ("src", "href", "xlink:href", "action", "poster", "data", "srcset")
INSIDE = ("#", "data:image/png")


class Outside(HTMLParser):
    """What a page would load or run; nothing of ours may."""

    def __init__(self, text: str):
        super().__init__()
        self.loads, self.tags, self.handlers = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        for name, value in attrs:
            if name in LOADING and not (value or "").startswith(INSIDE):
                self.loads.append(value)
            if name == "style" and "url(" in value and "url(#" not in value:
                self.loads.append(value)


def report_again(results, out, *more):
    """What `tempo report` prints; it must succeed."""
    command = ["report", "--results", str(results), "--out", str(out), *map(str, more)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_report_made_again_from_its_records_is_the_same_to_the_byte(tmp_path):
    results = keep(tmp_path / "results")
    first = report_html(read_report(results))
    report_again(results, tmp_path / "out")
    assert (tmp_path / "out/findings.html").read_text() == first
    append_jsonl(results / "findings.jsonl", [finding(estimate=0.41).record()])
    assert report_html(read_report(results)) != first


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_a_publication_holds_markdown_and_every_figure_once(tmp_path, kind):
    results, out = keep(tmp_path / "results"), tmp_path / "out"
    written = publish([read_report(results)], out, format=kind)
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names == {
        "findings.html",
        "findings.md",
        f"findings.{kind}",
        MANIFEST,
        f"figures/exp2-logits-a-map.{kind}",
        f"figures/exp2-logits-a-map-2.{kind}",
    }
    assert {path.relative_to(out).as_posix() for path in written} == names - {MANIFEST}
    linked = re.findall(rf"\]\((\S+?\.{kind})\)", (out / "findings.md").read_text())
    assert len(linked) == 3
    assert all((out / link).exists() for link in linked)


def test_a_publication_removes_what_an_earlier_one_wrote_and_nothing_else(tmp_path):
    results, out = keep(tmp_path / "results"), tmp_path / "out"
    report = read_report(results)
    publish([report], out)
    own = [out / "figures/photo.png", out / "figures/notes.txt", out / "findings-of-mine.svg"]
    for path in own:
        path.write_text("mine")
    changed = out / "figures/exp2-logits-a-map-2.svg"
    changed.write_text("mine as well")
    publish([replace(report, sections=())], out, format="png")
    assert [path for path in [*own, changed] if not path.exists()] == []
    assert {path.name for path in out.rglob("*.svg")} == {"findings-of-mine.svg", changed.name}
    assert listed(out) == {"findings.html", "findings.md", "findings.png"}


def listed(out):
    return set(json.loads((out / MANIFEST).read_text())["files"])


@pytest.mark.parametrize("name", ["findings.md", "findings.svg", "figures/exp2-logits-a-map.svg"])
def test_a_file_that_no_manifest_lists_is_never_replaced(tmp_path, name):
    """Whoever has a findings.md of their own keeps it, and nothing else is written."""
    results, out = keep(tmp_path / "results"), tmp_path / "out"
    (out / "figures").mkdir(parents=True)
    (out / name).write_text("mine")
    with pytest.raises(ResultsError, match="not from an earlier report; choose another folder"):
        publish([read_report(results)], out)
    assert (out / name).read_text() == "mine"
    assert [path for path in out.rglob("*") if path.is_file()] == [out / name]
    (out / name).unlink()
    publish([read_report(results)], out)
    publish([read_report(results)], out)


def test_a_page_that_pytest_wrote_is_replaced_and_another_page_is_not(tmp_path):
    results, out = keep(tmp_path / "results"), tmp_path / "out"
    out.mkdir()
    (out / "findings.html").write_text(report_html(Report((finding(),), "older")))
    publish([read_report(results)], out)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/findings.html").write_text("<title>my thesis</title>")
    with pytest.raises(ResultsError, match="not from an earlier report"):
        publish([read_report(results)], tmp_path / "other")


@pytest.mark.parametrize("name", ["../x.svg", "/etc/x.svg", "a/../../x.svg", "a\0b.svg", ""])
def test_no_file_is_published_outside_of_its_folder(tmp_path, name):
    with pytest.raises(ResultsError, match="no name of a file in a report"):
        files.publish(tmp_path / "out", {name: b"x"}, "choose another")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", ["../x.svg", "figures/../../x.svg", "TMP/x.svg", "notes.txt"])
def test_a_manifest_cannot_make_a_publication_remove_anything_else(tmp_path, name):
    results, out = keep(tmp_path / "results"), tmp_path / "out"
    (out / "figures").mkdir(parents=True)
    name = name.replace("TMP", str(tmp_path))
    (out / name).write_text("mine")
    hashes = [hashlib.sha256(b"mine").hexdigest()]
    (out / MANIFEST).write_text(json.dumps({"files": {name: hashes if ".." in name else [4]}}))
    publish([read_report(results)], out)
    assert (out / name).exists()


DAMAGED = ["{", "[]", "[1]", "3", '{"files": 3}', '{"files": {"x": 3}}']


@pytest.mark.parametrize("manifest", DAMAGED)
def test_of_a_damaged_manifest_nothing_is_believed(tmp_path, manifest):
    results, out = keep(tmp_path / "results"), tmp_path / "out"
    publish([read_report(results)], out)
    (out / MANIFEST).write_text(manifest)
    publish([read_report(results)], out, format="png")
    assert (out / "findings.svg").exists()
    assert "findings.png" in listed(out)


def test_an_unknown_format_and_a_missing_png_are_errors_before_anything_is_written(tmp_path):
    results, out = keep(tmp_path / "results"), tmp_path / "out"
    report = read_report(results)
    with pytest.raises(SpecError, match="format='gif', expected one of svg, png"):
        publish([report], out, format="gif")
    raster = results / "exp2_logits/figures/a-map.png"
    raster.write_bytes(raster.read_bytes() + b"<script>alert(1)</script>")
    with pytest.raises(ResultsError, match="is not the figure that was recorded; publish"):
        publish([report], out, format="png")
    raster.unlink()
    with pytest.raises(ResultsError, match="publish the figures as svg instead"):
        publish([report], out, format="png")
    assert not out.exists()


def test_a_page_refers_to_nothing_outside_and_the_check_can_fail():
    page = report_html(Report((finding(),), "tiny", tests=ROWS, recorded=conclusions()))
    assert Outside(page).loads == []
    for planted in (
        '<img src="http://evil.example/x.png">',
        '<link href="a.css">',
        '<p style="background:url(//e.x/y)">',
    ):
        assert Outside(page.replace("</main>", f"{planted}</main>")).loads


def test_the_policy_of_the_page_allows_nothing_from_outside():
    page = report_html(Report((finding(),), "tiny"))
    script = re.findall("<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert len(script) == 1
    assert f'content="{POLICY.format(script=digest)}"' in page
    assert page.index('<head>\n<meta http-equiv="Content-Security-Policy') < page.index("<style>")
    assert "http" not in POLICY
    assert "default-src 'none'" in POLICY and "script-src 'unsafe-inline'" not in POLICY


def hostile(tmp_path) -> Report:
    fields = (
        "claim",
        "statement",
        "reason",
        "unit",
        "statistic",
        "margin_reason",
        "control",
        "family",
        "refuted_by",
    )
    context = {
        "experiment": ATTACK,
        "config": ATTACK,
        "model": ATTACK,
        "variant": ATTACK,
        "n_prompts": 3,
        "dtype": ATTACK,
    }
    found = [finding(**dict.fromkeys(fields, ATTACK), context=context)]
    made = conclusions(ATTACK, ATTACK, ATTACK)
    results = keep(tmp_path / "results", found, ATTACK, ATTACK, ATTACK, made)
    return read_report(results)


def test_hostile_text_is_text_in_html_and_in_markdown(tmp_path):
    report = hostile(tmp_path)
    against = compare_findings(report.findings, [], (ATTACK, ATTACK), (ATTACK, ATTACK))
    page = report_html(report, against=against)
    harmless = report_html(replace(report, findings=(), sections=(), about={}), against=against)
    plain = report_html(Report((finding(),), "m", tests=ROWS, recorded=conclusions()))
    drawn = {"figure", "figcaption", "ul", "li", "span"} | {tag.lower() for tag in SVG_TAGS}
    known = {*Outside(harmless).tags, *Outside(plain).tags, *drawn}
    assert set(Outside(page).tags) - {"pre"} <= known
    assert Outside(page).tags.count("script") == 1
    assert "img" not in Outside(page).tags
    assert Outside(page).handlers == []
    assert Outside(page).loads == []
    assert not set(page) & set("\x00\x1b\u202e")
    assert "evil.example" in page  # it is there, as text
    markdown = report_markdown([report], [picture()]) + comparison_markdown(against)
    assert not set(markdown) & set("\x00\x1b\u202e")
    assert not re.search(r"<(?:script|img)", markdown)
    assert "](b)" not in markdown.replace(r"\](b)", "")
    rows = [line for line in markdown.splitlines() if line.startswith("| ✕")]
    assert rows
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 9 for row in rows)


def test_the_hostile_check_can_fail(tmp_path):
    head, main, body = report_html(hostile(tmp_path)).partition("<main")
    unescaped = head + main + body.replace("&lt;img", "<img", 1)
    assert "img" in Outside(unescaped).tags
    assert set(Outside(unescaped).handlers) == {"onerror"}
    assert "\\x1b" in escaped(ATTACK)
    assert "\x1b" in ATTACK


def test_hostile_names_make_no_path_outside(tmp_path):
    section = Section(
        "exp2", "t", "../../x", "tiny", 1, (picture("../../etc/\x00passwd"),), folder="exp2_logits"
    )
    write_section(tmp_path / "results", section)
    written = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert written == [
        f"results/exp2_logits/{name}"
        for name in (
            MANIFEST,
            "figures/etc-x00passwd.png",
            "figures/etc-x00passwd.svg",
            "report.json",
        )
    ]


def test_records_of_another_model_are_left_out(tmp_path):
    results = keep(
        tmp_path,
        [finding(context={"experiment": "exp2", "config": "c", "model": "older"})],
        model="older",
        config="c",
    )
    keep(results, [finding()])
    report = read_report(results)
    assert report.model == "tiny"
    assert {f.context["model"] for f in report.findings} == {"tiny"}
    assert [section.model for section in report.sections] == ["tiny"]


def test_experiments_stand_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 9, 2):
        write_section(
            tmp_path,
            Section(f"exp{number}", "t", f"exp{number}_c", "tiny", 1, folder=f"exp{number}"),
        )
    contexts = [{"experiment": f"exp{n}", "model": "tiny", "config": "c"} for n in (10, 2)]
    append_jsonl(
        tmp_path / "findings.jsonl",
        [finding(f"{c['experiment']}.a", context=c).record() for c in contexts],
    )
    report = read_report(tmp_path)
    assert [section.experiment for section in report.sections] == ["exp2", "exp9", "exp10"]
    assert [f.claim for f in report.findings] == ["exp2.a", "exp10.a"]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"pictures": []}', '{"pictures": [], "files": [], "nonsense": 1}']
)
def test_a_damaged_record_is_told_with_what_to_do_and_the_rest_is_kept(tmp_path, content):
    results = keep(tmp_path)
    whole = read_report(results)
    (results / "exp2_logits/report.json").write_text(content)
    report = read_report(results)
    assert len(report.sections) == len(whole.sections) - 1
    assert "pytest on the studies" in report.damaged[0]
    assert "Damaged and left out" in report_html(report)
    said = CliRunner().invoke(app, ["report", "--results", str(results), "--out", str(tmp_path)])
    assert said.exit_code == 0 and "Warning: " in said.stderr


@pytest.mark.parametrize(
    ("damage", "field"),
    [
        ({"model": 3}, "model"),
        ({"about": []}, "about"),
        ({"quick_look": "some"}, "quick_look"),
        ({"tests": [{"name": "a"}]}, "tests.0.outcome"),
        ({"tests": [{"name": "a", "outcome": "passed", "html": "<b>"}]}, "tests.0.html"),
        ({"conclusions": {"tiny": {"title": "a"}}}, "conclusions.tiny.asked"),
        ({"conclusions": {"tiny": "Just fine"}}, "conclusions.tiny"),
    ],
)
def test_a_damaged_record_of_a_session_is_an_error_that_names_the_field(tmp_path, damage, field):
    results = keep(tmp_path)
    record = json.loads((results / "report.json").read_text())
    (results / "report.json").write_text(json.dumps(seal(record | damage)))
    (said,) = read_report(results).damaged
    assert re.search(rf"report\.json is damaged \({field}: .*tempo doctor --repair", said)
    assert "\n" not in said
    keep(results)  # the next session writes it anew
    assert read_report(results).conclusions == conclusions()


@pytest.mark.parametrize(
    "planted",
    [
        "<script>alert(1)</script>",
        '<image href="http://evil.example/x.png"/>',
        '<path onclick="alert(1)"/>',
        '<rect style="fill: url(http://evil.example/x)"/>',
        '<use href="data:text/html,x"/>',
        "<foreignObject/>",
        "<!-- a comment -->",
        "<path",
    ],
)
def test_a_picture_that_does_more_than_show_is_refused(tmp_path, planted):
    results = keep(tmp_path)
    path = results / "exp2_logits/report.json"
    record = json.loads(path.read_text())
    check_svg(record["pictures"][0]["svg"], "a record")
    record["pictures"][1]["svg"] = record["pictures"][1]["svg"].replace(
        "</svg>", f"{planted}</svg>"
    )
    path.write_text(json.dumps(seal(record)))
    report = read_report(results)
    assert "is no drawing of tempo's" in report.damaged[0]
    assert "exp2_logits" not in {section.folder for section in report.sections}
    assert planted not in report_html(report) or planted == "<path"


def test_no_findings_are_an_error_and_a_folder_that_cannot_be_written_too(tmp_path):
    with pytest.raises(TraceError, match="no such file; run pytest on the studies"):
        read_report(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ResultsError, match="choose another folder with --out"):
        publish([Report((finding(),), "tiny")], tmp_path / "file")
    with pytest.raises(ResultsError, match="choose another folder with --results"):
        write_session(tmp_path / "file", Session("tiny", {}))
    result = CliRunner().invoke(app, ["report", "--results", str(tmp_path)])
    assert result.exit_code == 1


def test_an_invariant_that_is_violated_stands_above_everything():
    broken = finding("exp4.positions", kind="invariant", test="always")
    page = report_html(Report((broken,), "tiny"))
    assert "The harness is not sound" in page
    assert page.index("The harness is not sound") < page.index("<dt>Found")
    assert "not sound" not in report_html(Report((replace(broken, verdict="SUPPORTED"),), "tiny"))


def test_a_quick_look_is_called_one():
    assert "A quick look at 12 prompts" in report_html(Report((finding(),), "tiny", quick_look=12))
    assert "quick look" not in report_html(Report((finding(),), "tiny"))


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        (finding(), finding(), UNCHANGED),
        (finding(), finding(verdict="SUPPORTED"), "verdict"),
        (finding(), finding(estimate=0.45, low=0.35, high=0.55), UNCHANGED),
        (
            finding(),
            finding(estimate=0.8, low=0.7, high=0.9),
            "effect: the intervals do not overlap",
        ),
        (finding(), None, "only in the first"),
        (None, finding(), "only in the second"),
        (
            finding(kind="invariant", estimate=1.0),
            finding(kind="invariant", estimate=0.5),
            "effect, without intervals to compare",
        ),
    ],
)
def test_what_changed_between_two_records(one, two, expected):
    assert what_changed(one, two) == expected


def test_two_records_are_compared_claim_by_claim_whatever_their_models(tmp_path):
    a, b, out = (tmp_path / name for name in ("a", "b", "out"))
    keep(a, [finding(), finding("exp2.only-here")])
    changed = {"verdict": "SUPPORTED", "estimate": 0.01, "low": 0.0, "high": 0.02}
    keep(b, [finding(**changed, context={**finding().context, "model": "big"})], model="big")
    output = report_again(b, out, "--against", a).replace("\n", " ")
    text, page = (out / "comparison.md").read_text(), (out / "findings.html").read_text()
    for said in (output, text, page):
        assert "exp2.same-selection" in said
        assert "only in the first" in said.replace("  ", " ")
    assert "Of 2 claims 2 changed, 1 of them in verdict" in text
    assert "✕ refuted → ● supported" in text
    report_again(b, tmp_path / "none")
    assert not (tmp_path / "none/comparison.md").exists()


def test_a_comparison_says_what_each_record_answers():
    both = compare_findings([finding()], [finding()], ("old", "new"), ("Hardly", "Well"))
    assert "First: old (Hardly). Second: new (Well)." in comparison_markdown(both)
    assert "First: old. Second: new." in comparison_markdown(replace(both, answers=("", "")))


def test_a_claims_row_sorts_by_numbers_and_none_where_there_is_none():
    found = [
        finding(),
        finding(
            "exp2.b",
            kind="invariant",
            test="always",
            p=float("nan"),
            p_corrected=float("nan"),
            verdict="SUPPORTED",
        ),
    ]
    cells = re.findall(r'data-label="p" data-value="([^"]*)"', claims_table(found))
    assert cells == ["0.002", ""]
    assert re.findall(r'data-label="Effect" data-value="([^"]*)"', claims_table(found)) == [
        "0.4",
        "0.4",
    ]


@pytest.mark.parametrize(
    "test", ["always", "greater", "less", "equivalent", "proportion", "somewhere"]
)
def test_the_drawn_effect_stays_in_its_box_whatever_the_numbers(test):
    for value in (0.0, 1.0, -40.0, 1e-9, 1e9, 1.7e308, -1.7e308):
        svg = effect_svg(
            finding(test=test, estimate=value, low=value - 1, high=value + 1, margin=0.05)
        )
        drawn = [float(x) for x in re.findall(r' (?:x|x1|x2|cx)="([^"]+)"', svg)]
        assert drawn
        assert all(0 <= x <= 200 for x in drawn)
    assert effect_svg(finding(estimate=float("nan"), low=float("nan"), high=float("nan"))) == ""


def test_the_ids_of_a_page_are_unique_and_its_links_find_them():
    context = finding().context
    found = [
        finding("exp2.same-top-10", context={**context, "config": c, "variant": c})
        for c in ("one", "two")
    ] + [finding()]
    sections = tuple(
        Section("exp2", "t", c, "tiny", 1, (picture(c),), folder=c) for c in ("one", "two")
    )
    report = Report(tuple(found), "tiny", sections, tests=ROWS, recorded=conclusions())
    page = report_html(report)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    links = set(re.findall(r'href="#([^"]+)"', page))
    absent = {f"claim-{name}" for name in re.findall(r'href="#claim-([^"]+)"', page)} - set(ids)
    assert links - absent <= set(ids)
    assert "claim-exp2-same-top-10" in ids
    assert all(
        link.startswith("claim-") for link in absent
    )  # of claims that this record does not hold


def test_the_session_record_is_json_without_nan(tmp_path):
    json.loads((keep(tmp_path) / "exp2_logits/report.json").read_text(), parse_constant=pytest.fail)


def of_model(
    model: str, verdict: str = "REFUTED", claim: str = "exp2.same-selection", **changes
) -> Finding:
    return finding(claim, verdict, context={**finding().context, "model": model}, **changes)


def test_primary_claims_stand_first_and_are_told_from_secondary_ones_and_invariants():
    found = [
        finding("exp1.an-invariant", "SUPPORTED", kind="invariant", test="always"),
        finding("exp2.is-secondary"),
        finding("exp3.is-primary", family=PRIMARY),
    ]
    roles = {
        "exp3.is-primary": "primary, exploratory",
        "exp2.is-secondary": "secondary, exploratory",
        "exp1.an-invariant": "invariant",  # in a table of its own
    }
    rows = re.findall(r"<tr id=.*?</tr>", claims_table(found), re.DOTALL)
    assert [next(claim for claim in roles if claim in row) for row in rows] == list(roles)
    for row, role in zip(rows, roles.values(), strict=True):
        assert f'<small>{role}</small></td><td data-label="Claim' in row
        assert ("tempo-primary" in row) == role.startswith("primary")
    assert claims_table(found).count("<table") == 2
    lines = [line for line in findings_markdown(found).splitlines() if "exp" in line]
    shown = [re.split(r"(?<!\\)\|", line)[3].strip() for line in lines]
    assert sorted(shown) == sorted(roles.values())
    assert shown[0] == "primary, exploratory"
    table = findings_table(found)
    assert "* primary" in table[0]
    marked = [line[13:41].strip().endswith("*") for line in table[1:]]
    assert marked == [True, False, False]
    assert "primary" not in findings_table(found[:2])[0]
    drawn = figures.forest(found[1:])
    assert re.findall("★[^<]*", drawn.svg) == ["★ exp3.is-primary"]
    assert "★ marks the primary claims" in drawn.caption
    assert "★" not in figures.forest(found[:2]).svg + figures.forest(found[:2]).caption
    page = report_html(Report(tuple(found), "tiny"))
    counted = "1 primary (1 refuted), 1 secondary (1 refuted), 1 invariant (1 supported)"
    assert f"3 registered claims: {counted}" in page
    assert page.index(">exp3.is-primary</small>") < page.index(">exp1.an-invariant</small>")


def test_every_answer_shows_estimate_interval_n_and_control_of_its_claims():
    found = finding(
        "exp2.equivalent-at-reader",
        estimate=0.147,
        low=0.136,
        high=0.159,
        n=158,
        control_estimate=3e-7,
    )
    made = conclusions(claim="exp2.equivalent-at-reader")
    report = Report((found,), "tiny", recorded=made)
    page, markdown = report_html(report), report_markdown([report], [picture()])
    assert "<small>0.147 [0.136, 0.159], n 158, control 3e-7</small>" in page
    assert "exp2.equivalent-at-reader, secondary, exploratory" in page
    row = r"✕ refuted, secondary, exploratory | 0.147 \[0.136, 0.159\] | 158 | 3e-7 |"
    assert f"| exp2.equivalent-at-reader | {row}" in markdown
    assert "<code>exp9.elsewhere</code> not measured in this record" in page
    blind = replace(report, findings=(replace(found, control_holds=False),))
    assert "misbehaves" in report_markdown([blind], [picture()])


def two_folders(tmp_path):
    """Results of two models that disagree, with pictures of their own."""
    folders = tmp_path / "a", tmp_path / "b"
    for folder, model, verdict in zip(
        folders, ("first", "second"), ("REFUTED", "SUPPORTED"), strict=True
    ):
        found = [of_model(model, verdict), of_model(model, claim="exp2.alike")]
        append_jsonl(folder / "findings.jsonl", [f.record() for f in found])
        pictures = (picture(f"Of {model}"), picture("Alike"))
        section = Section(
            "exp2", "Logits", "exp2_logits", model, 160, pictures, folder="exp2_logits"
        )
        write_section(folder, section)
        short = {"REFUTED": "No", "SUPPORTED": "Yes"}[verdict]
        about = {"Made": f"by {model}"}
        write_session(folder, Session(model, about, conclusions(short), tests=ROWS))
    return folders


def test_two_models_stand_side_by_side_and_their_disagreement_is_marked(tmp_path):
    a, b = two_folders(tmp_path)
    out = tmp_path / "out"
    output = report_again(a, out, "--results", b).replace("\n", " ")
    page, markdown = (out / "findings.html").read_text(), (out / "findings.md").read_text()
    for text in (output, page, markdown):
        assert "Opposite verdicts on 1 of 2 claims" in text
        assert "exp2.same-selection" in text
        assert "answers differ on 1 of 3 questions" in text
        assert "first: No; second: Yes." in text
    lines = markdown[: markdown.index("# first")].splitlines()
    cells = [re.split(r"(?<!\\)\|", line) for line in lines]
    rows = {row[1].strip(): row for row in cells if len(row) == 7}
    assert rows["exp2.same-selection"][3:6] == [
        r" ✕ refuted 0.4 \[0.3, 0.5\], n 160 ",
        r" ● supported 0.4 \[0.3, 0.5\], n 160 ",
        " opposite verdicts ",
    ]
    assert rows["exp2.alike"][5].strip() == ""
    differing = re.findall(r'<tr class="tempo-differs">.*?</tr>', page)
    assert len(differing) == 2  # an answer and a claim
    assert "exp2.same-selection" in differing[1]
    assert differing[1].index("refuted") < differing[1].index("supported")
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {
        link for link in re.findall(r'href="#([^"]+)"', page) if not re.search("claim-|fig", link)
    } <= set(ids)
    assert "tempo-tests" not in ids  # neither session's tests speak for both
    assert page.count("by first") == 2  # above and under provenance
    assert Outside(page).loads == []


def test_the_pictures_of_two_models_are_not_mixed_up(tmp_path):
    folders, out = two_folders(tmp_path), tmp_path / "out"
    publish(read_reports(folders), out)
    each = ("findings-{0}", "{0}-exp2-logits-of-{0}", "{0}-exp2-logits-alike")
    names = [name.format(model) for model in ("first", "second") for name in each]
    assert {path.name for path in out.rglob("*.svg")} == {f"{name}.svg" for name in names}
    publish(read_reports(folders), tmp_path / "png", format="png")
    rasters = {path.name for path in (tmp_path / "png").rglob("*.png")}
    assert rasters == {f"{name}.png" for name in names}
    for model, folder in zip(("first", "second"), folders, strict=True):
        name = f"figures/{model}-exp2-logits-of-{model}"
        raster = folder / f"exp2_logits/figures/of-{model}.png"
        assert (tmp_path / f"png/{name}.png").read_bytes() == raster.read_bytes()
        assert f"Of {model}" in (out / f"{name}.svg").read_text()
    page, markdown = (out / "findings.html").read_text(), (out / "findings.md").read_text()
    start = page.index('id="m2-tempo-model"')
    assert page.index("<strong>Of first.") < start < page.index("<strong>Of second.")
    assert (
        markdown.index("# first")
        < markdown.index("figures/first-")
        < markdown.index("# second")
        < markdown.index("figures/second-")
    )
    assert all((out / link).exists() for link in re.findall(r"\]\((\S+?\.svg)\)", markdown))
    publish(read_reports(folders[:1]), out)  # of one model again: no leftovers
    assert {path.name for path in out.glob("*.svg")} == {"findings.svg"}


def test_one_folder_with_findings_of_two_models_shows_both_the_last_session_first(tmp_path):
    results = keep(
        tmp_path / "results",
        [of_model("older", "SUPPORTED")],
        model="older",
        config="exp1_attention",
    )
    keep(results, [of_model("tiny")])
    reports = read_reports([results])
    assert [report.model for report in reports] == ["tiny", "older"]
    assert [[f.verdict for f in report.findings] for report in reports] == [
        ["REFUTED"],
        ["SUPPORTED"],
    ]
    sections = [[section.model for section in report.sections] for report in reports]
    assert sections == [["tiny"], []]  # the later session used the same folder
    assert reports[1].about == {}
    page = report_html(*reports)
    assert "Tests of this session (tiny)" in page
    assert "Opposite verdicts on 1 of 1 claims" in page
    report_again(results, tmp_path / "out")
    assert (tmp_path / "out/findings.html").read_text() == page


def test_two_records_of_one_model_are_told_apart_by_their_folders(tmp_path):
    folders = keep(tmp_path / "a"), keep(tmp_path / "b", [finding(verdict="SUPPORTED")])
    reports = read_reports(folders)
    assert names_of(reports) == [f"tiny ({folder})" for folder in folders]
    publish(reports, tmp_path / "out")
    assert len({path.name for path in (tmp_path / "out").glob("findings-*.svg")}) == 2
    assert names_of(reports[:1]) == ["tiny"]


def test_a_comparison_wants_one_folder(tmp_path):
    a, b = map(str, two_folders(tmp_path))
    result = CliRunner().invoke(app, ["report", "--results", a, "--results", b, "--against", a])
    assert result.exit_code == 2
    assert "give --results once" in result.output


KNOWN = "smollm2-135m"
SMALL = {"estimate": 0.1, "low": 0.0, "high": 0.2}


@pytest.mark.parametrize(
    ("found", "marker"),
    [
        ((finding(), finding()), sidebyside.AGREE),
        ((finding(), finding(verdict="SUPPORTED")), sidebyside.OPPOSITE),
        ((finding(), None, finding(verdict="SUPPORTED")), sidebyside.OPPOSITE),
        ((finding(), finding(verdict="INCONCLUSIVE")), sidebyside.DECIDED),
        ((finding(), None), sidebyside.MISSING),
        ((finding(), finding(**SMALL)), sidebyside.AGREE),  # whether they differ is tested
        ((finding(kind="invariant", n=160), finding(kind="invariant", n=12)), sidebyside.AGREE),
    ],
)
def test_the_marker_of_a_row_says_how_the_models_disagree(found, marker):
    assert sidebyside.Row("a", "exploratory", "b", found).marker == marker


@pytest.mark.parametrize(
    ("shorts", "marker"),
    [
        (("Yes", "Yes"), sidebyside.AGREE),
        (("Yes", "No"), sidebyside.DIFFER),
        (("Yes", "Undetermined"), sidebyside.OPEN),
        (("Yes", "Undetermined", "No"), sidebyside.DIFFER),
        (("Undetermined", "Undetermined"), sidebyside.AGREE),
        (("Yes", None), sidebyside.UNASKED),
        (("Yes", None, "No"), sidebyside.DIFFER),
    ],
)
def test_an_open_answer_is_no_disagreement(shorts, marker):
    answers = tuple(Answer("q", short, "", "a rule") if short else None for short in shorts)
    assert sidebyside.Question("q", answers).marker == marker


def test_hostile_names_of_models_are_text_side_by_side(tmp_path):
    reports = [replace(hostile(tmp_path / name), model=f"{ATTACK}{name}") for name in "ab"]
    page = report_html(*reports)
    assert Outside(page).tags.count("script") == 1
    assert "img" not in Outside(page).tags
    assert Outside(page).handlers == []
    assert Outside(page).loads == []
    assert not set(page) & set("\x00\x1b\u202e")
    publish(reports, tmp_path / "out")
    assert {path.parent.name for path in (tmp_path / "out").rglob("*.svg")} == {"out", "figures"}
    markdown = (tmp_path / "out/findings.md").read_text()
    assert not re.search(r"<(?:script|img)", markdown)
    assert "](b)" not in markdown.replace(r"\](b)", "")


def test_what_the_prompts_were_is_said_by_the_record_and_not_by_heart(tmp_path):
    report = read_report(keep(tmp_path))
    for text in (said_in(report_html(report)), report_markdown([report], [picture()])):
        assert "95 % intervals over 162 prompts of 11 categories (prompts.yaml)." in text
    unknown = said_in(report_html(replace(report, suite="")))
    assert "95 % intervals over prompts." in unknown
    assert "prompts.yaml" not in unknown
    assert "English" not in unknown


def test_several_suites_are_counted_on_the_first_screen_and_described_below(tmp_path):
    suites = "5 prompts in English (a.yaml); 7 prompts in German (b.yaml)"
    text = said_in(report_html(replace(read_report(keep(tmp_path)), suite=suites)))
    assert "95 % intervals over the prompts that Provenance describes." in text
    assert text.count("7 prompts in German") == 1
    assert text.index("7 prompts in German") > text.rindex("Provenance")


def test_the_order_of_the_numbers_of_one_claim_is_said(tmp_path):
    report = read_report(keep(tmp_path))
    (behind, *_) = [claim for answer in report.conclusions.headlines for claim in answer.claims]
    found = next(f for f in report.findings if f.claim == behind)
    again = [replace(found, context={**found.context, "variant": name}) for name in ("one", "two")]
    others = [f for f in report.findings if f.claim != behind]
    twice = said_in(report_html(replace(report, findings=(*again, *others))))
    assert "Where one thing has several numbers: one, then two." in twice
    assert "several numbers" not in said_in(report_html(report))


def said_in(page: str) -> str:
    """The text of a page, without what explains its words."""
    return re.sub('<span class="tempo-tip".*?</span>|<[^>]+>', "", page)


def test_the_answers_stand_in_their_places(tmp_path):
    report = read_report(keep(tmp_path))
    page = report_html(report)
    brief, cards = page.split("The questions</h2>")
    assert "<h1>Is it so?</h1>" in page
    assert '<dd><b class="tempo-answer">Hardly.</b> On 4 of 9.</dd>' in brief
    assert '<dd><b class="tempo-answer">Wait.</b> A day.</dd>' in brief
    assert "Which way?" not in brief
    for question in ("Is it so?", "Which way?", "What now?"):
        assert f"<h3>{question}</h3>" in cards
    assert "<title>tempo: Hardly (tiny)</title>" in page


def test_a_folder_without_conclusions_shows_verdicts_and_asks_nothing(tmp_path):
    results = keep(tmp_path)
    record = json.loads((results / "report.json").read_text())
    older = {key: record[key] for key in ("model", "about", "quick_look")}
    (results / "report.json").write_text(json.dumps(seal(older)))
    report = read_report(results)
    assert report.conclusions.in_short == "1 refuted"
    page, markdown = report_html(report), report_markdown([report], [picture()])
    for text in (page, markdown):
        assert "Findings" in text
        assert "a statement: refuted, 0.4" in text
        assert "The questions" not in text
        assert "What to do" not in text
        assert "Asked" not in text
    assert "Tests of this session" not in page
    several = report_html(report, replace(report, root=tmp_path / "other"))
    assert "These records answer no question." in several


def test_conclusions_about_other_models_in_the_folder_stay(tmp_path):
    older = conclusions("Well")
    results = keep(
        tmp_path, [of_model("older", "SUPPORTED")], "older", "exp1_attention", made=older
    )
    keep(results, [of_model("tiny")], made=conclusions("Badly"))
    assert [r.conclusions.in_short for r in read_reports([results])] == ["Badly", "Well"]
    write_session(results, Session("tiny", {}))  # of a study that draws none
    shorts = [report.conclusions.in_short for report in read_reports([results])]
    assert shorts == ["1 refuted", "Well"]


def test_that_conclusions_about_other_models_are_lost_is_said(tmp_path):
    assert write_session(tmp_path, Session("one", {})) == ""
    (tmp_path / "report.json").write_text("{")
    assert "conclusions about other models are lost" in write_session(tmp_path, Session("two", {}))
    assert write_session(tmp_path, Session("two", {})) == ""


def test_conclusions_drawn_from_other_findings_are_left_out_and_that_is_said(tmp_path):
    results = keep(tmp_path)
    append_jsonl(results / "findings.jsonl", [finding("exp2.more").record()])  # a killed session
    report = read_report(results)
    assert report.outdated
    page = report_html(report)
    assert "Hardly" not in page
    assert "The recorded answers are left out" in page
    assert "2 refuted" in page
    write_session(results, Session("tiny", {}, conclusions()))
    assert not read_report(results).outdated
    assert "left out" not in report_html(read_report(results))


def test_findings_to_conclude_from_are_those_of_one_model_in_the_order_of_the_report(tmp_path):
    contexts = [{"experiment": f"exp{n}", "config": "c"} for n in (10, 2)]
    every = [
        finding(f"{context['experiment']}.a", context={**context, "model": model})
        for model in ("tiny", "big")
        for context in contexts
    ]
    assert findings_of(tmp_path, "tiny") == []
    append_jsonl(tmp_path / "findings.jsonl", [f.record() for f in every])
    assert [f.claim for f in findings_of(tmp_path, "tiny")] == ["exp2.a", "exp10.a"]
    assert {f.context["model"] for f in findings_of(tmp_path, "big")} == {"big"}


def test_the_tests_of_a_session_are_told_those_that_did_not_pass_first():
    page = report_html(Report((finding(),), "tiny", tests=ROWS))
    table = page[page.index('id="tempo-tests"') :]
    assert "1 passed, 1 failed, 1 skipped" in table
    names = re.findall(r'data-label="Test"><code>test_a.py::test_(\w+)', table)
    assert names == ["two", "three", "one"]
    assert "<pre>assert 1 == 2\n  left: 1</pre>" in table
    assert '<td data-label="Outcome" class="tempo-whole tempo-alarm">failed</td>' in table
    assert '<td data-label="Verdict" class="tempo-whole">supported</td>' in table
    assert '<td data-label="Seconds" class="tempo-number">1.50</td>' in table
    assert 'href="#tempo-tests"' in page
    without = report_html(Report((finding(),)))
    assert 'id="tempo-tests"' in page
    assert 'id="tempo-tests"' not in without
    assert 'href="#tempo-tests"' not in without


def test_rows_of_tests_come_back_from_the_record(tmp_path):
    results = keep(tmp_path, text="")
    rows = read_report(results).tests
    assert [row.outcome for row in rows] == ["passed", "failed", "skipped"]
    assert rows[0].name.startswith("test_a.py::test_one")
    assert rows[1].seconds == 1.5


def test_the_page_says_that_weights_were_dequantised():
    of = {name: report_html(Report((of_model(name),), name)) for name in (KNOWN, "my.gguf", "tiny")}
    assert f"{KNOWN} · SmolLM2 135M Instruct, Q4_1 dequantised · float32" in of[KNOWN]
    assert "my.gguf · a GGUF file, dequantised · " in of["my.gguf"]
    assert "dequantised" not in of["tiny"]
