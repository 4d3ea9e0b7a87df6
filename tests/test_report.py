"""A report is a view of its records: made again from them it is the same to the byte, and it refers to nothing outside."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from typer.testing import CliRunner

from tempo.claims import Finding
from tempo.cli import app
from tempo.errors import ResultsError, TraceError
from tempo.records import append_jsonl
from tempo.reporting import figures, sidebyside
from tempo.reporting.answers import Answer
from tempo.reporting.comparison import (
    UNCHANGED,
    compare_findings,
    comparison_markdown,
    what_changed,
)
from tempo.reporting.findings import CONFIRMATORY, findings_markdown, findings_table
from tempo.reporting.page import POLICY, report_html
from tempo.reporting.publish import publish, report_markdown
from tempo.reporting.report import (
    Report,
    Section,
    names_of,
    read_report,
    read_reports,
    write_section,
    write_session,
)
from tempo.reporting.table import claims_table, effect_svg
from tempo.text import escaped

ATTACK = '</pre></td><script>alert(1)</script><img src="http://evil.example/x.png" onerror=y>\x00\x1b[2J\u202e😀"\'|`*[a](b)'
TESTS = (
    '<!DOCTYPE html>\n<html>\n<head>\n<title id="head-title">findings.html</title>\n</head>\n<body>\n<h1 id="title">t</h1>'
    '<p>by <a href="https://pypi.python.org/pypi/pytest-html">pytest-html</a></p><table id="results-table"></table>\n</body>\n</html>\n'
)


def finding(claim: str = "exp2.same-selection", verdict: str = "REFUTED", **changes) -> Finding:
    base = Finding(
        claim=claim, statement="a statement", kind="empirical", verdict=verdict, reason="why", estimate=0.4, low=0.3, high=0.5,
        effect_size=1.0, n=160, unit="prompt", statistic="a share", test="less", margin=0.05, margin_reason="one in twenty", p=1.0,
        p_corrected=1.0, p_against=0.001, p_against_corrected=0.002, family="exp2", control="a control", control_estimate=0.9,
        control_holds=True, context={"experiment": "exp2", "config": "exp2_logits", "model": "tiny", "n_prompts": 160, "dtype": "float32"},
    )  # fmt: skip
    return replace(base, **changes)


def picture(title: str = "A map") -> figures.Picture:
    return figures.layer_head_map(np.eye(3), title, "mass", "See the diagonal.")


def keep(results, findings=(), model="tiny", config="exp2_logits", text="a[b/c]"):
    """A results folder as a session leaves it."""
    append_jsonl(results / "findings.jsonl", [f.record() for f in findings or [finding()]])
    section = Section(
        "exp2",
        "Logits",
        config,
        model,
        160,
        (picture(), picture()),
        {"prompt": text},
        text,
        text,
        ("a.npz",),
        "abc",
        "",
        "exp2_logits",
    )
    write_section(results, section)
    write_session(results, model, {"Made": "2026-11-24 16:02 UTC", "Command": text}, None, TESTS)
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


def test_the_report_made_again_from_its_records_is_the_same_to_the_byte(tmp_path):
    results = keep(tmp_path / "results")
    first = report_html(read_report(results))
    assert (
        CliRunner()
        .invoke(app, ["report", "--results", str(results), "--out", str(tmp_path / "out")])
        .exit_code
        == 0
    )
    assert (tmp_path / "out/findings.html").read_text() == first
    append_jsonl(results / "findings.jsonl", [finding(estimate=0.41).record()])
    assert report_html(read_report(results)) != first


def test_a_publication_holds_markdown_and_every_figure_twice_and_no_leftovers(tmp_path):
    results, out = keep(tmp_path / "results"), tmp_path / "out"
    (out / "figures").mkdir(parents=True)
    (out / "figures/of-an-earlier-one.svg").touch()
    (out / "figures/notes.txt").touch()
    written = publish([read_report(results)], out)
    assert {p.name for p in out.iterdir()} == {
        "findings.html",
        "findings.md",
        "findings.svg",
        "findings.png",
        "figures",
    }
    names = {p.name for p in (out / "figures").iterdir()}
    assert names == {
        "exp2-logits-a-map.svg",
        "exp2-logits-a-map.png",
        "exp2-logits-a-map-2.svg",
        "exp2-logits-a-map-2.png",
        "notes.txt",
    }
    assert all(path.exists() for path in written)
    text = (out / "findings.md").read_text()
    linked = re.findall(r"\]\((\S+?\.svg)\)", text)
    assert len(linked) == 3
    assert all((out / link).exists() for link in linked)


def test_a_page_refers_to_nothing_outside_and_the_check_can_fail():
    page = report_html(Report((finding(),), "tiny", (), {}, None, TESTS))
    assert Outside(page).loads == []
    assert "https://pypi" not in page
    assert "https://pypi" in TESTS
    for planted in (
        '<img src="http://evil.example/x.png">',
        '<link href="a.css">',
        '<p style="background:url(//e.x/y)">',
    ):
        assert Outside(page.replace("</main>", f"{planted}</main>")).loads


def test_the_policy_of_the_page_allows_nothing_from_outside():
    page = report_html(Report((finding(),), "tiny"))
    assert f'content="{POLICY}"' in page
    assert page.index("Content-Security-Policy") < page.index("<style>") < page.index("<body>")
    assert "http" not in POLICY
    assert "default-src 'none'" in POLICY


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
    return read_report(keep(tmp_path / "results", found, model=ATTACK, config=ATTACK, text=ATTACK))


def test_hostile_text_is_text_in_html_and_in_markdown(tmp_path):
    report = hostile(tmp_path)
    against = compare_findings(report.findings, [], (ATTACK, ATTACK))
    page = report_html(report, against=against)
    harmless = report_html(replace(report, findings=(), sections=(), about={}), against=against)
    assert set(Outside(page).tags) - {"pre"} <= {*Outside(harmless).tags, *Outside(report_html(Report((finding(),), "m"))).tags, "figure",
        "figcaption", "svg", "g", "path", "text", "use", "defs", "clippath", "rect", "image", "ul", "li", "span"}  # fmt: skip
    assert Outside(page).tags.count("script") == 1
    assert "img" not in Outside(page).tags
    assert Outside(page).handlers == []
    assert Outside(page).loads == []
    assert not set(page) & set("\x00\x1b\u202e")
    assert "evil.example" in page  # it is there, as text
    markdown = report_markdown([report], [picture()], [""]) + comparison_markdown(against)
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
    files = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert files == [
        f"results/exp2_logits/{name}"
        for name in ("figures/etc-x00passwd.png", "figures/etc-x00passwd.svg", "report.json")
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
def test_a_damaged_record_is_an_error_that_says_what_to_do(tmp_path, content):
    results = keep(tmp_path)
    (results / "exp2_logits/report.json").write_text(content)
    with pytest.raises(TraceError, match="pytest test_experiments"):
        read_report(results)


def test_no_findings_are_an_error_and_a_folder_that_cannot_be_written_too(tmp_path):
    with pytest.raises(TraceError, match="holds no findings"):
        read_report(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ResultsError, match="choose another folder with --out"):
        publish([Report((finding(),), "tiny")], tmp_path / "file")
    with pytest.raises(ResultsError, match="choose another folder with --results"):
        write_session(tmp_path / "file", "tiny", {}, None)
    result = CliRunner().invoke(app, ["report", "--results", str(tmp_path)])
    assert result.exit_code == 1


def test_an_invariant_that_is_violated_stands_above_everything():
    broken = finding("exp4.positions", kind="invariant", test="always")
    page = report_html(Report((broken,), "tiny"))
    assert "The harness is not sound" in page
    assert page.index("The harness is not sound") < page.index("Asked")
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
    keep(tmp_path / "a", [finding(), finding("exp2.only-here")])
    other = finding(
        verdict="SUPPORTED",
        estimate=0.01,
        low=0.0,
        high=0.02,
        context={**finding().context, "model": "big"},
    )
    keep(tmp_path / "b", [other], model="big")
    command = [
        "report",
        "--results",
        str(tmp_path / "b"),
        "--against",
        str(tmp_path / "a"),
        "--out",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    text = (tmp_path / "out/comparison.md").read_text()
    for said in (
        result.output.replace("\n", " "),
        text,
        (tmp_path / "out/findings.html").read_text(),
    ):
        assert "exp2.same-selection" in said
        assert "only in the first" in said.replace("  ", " ")
    assert "Of 2 claims 2 changed, 1 of them in verdict" in text
    assert "✕ refuted → ● supported" in text
    assert not (tmp_path / "none/comparison.md").exists()
    CliRunner().invoke(
        app, ["report", "--results", str(tmp_path / "b"), "--out", str(tmp_path / "none")]
    )
    assert not (tmp_path / "none/comparison.md").exists()


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
        assert all(0 <= x <= 150 for x in drawn)
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
    page = report_html(Report(tuple(found), "tiny", sections, {}, None, TESTS))
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


def test_the_confirmatory_family_of_the_harness_is_that_of_the_report():
    from fixtures import study
    from tempo.reporting import findings

    assert findings.CONFIRMATORY == study.CONFIRMATORY


def test_confirmatory_claims_stand_first_and_are_told_from_exploratory_ones_and_invariants():
    found = [finding("exp1.an-invariant", "SUPPORTED", kind="invariant", test="always"), finding("exp2.explores"),
             finding("exp3.confirms", family=CONFIRMATORY)]  # fmt: skip
    roles = {
        "exp3.confirms": "confirmatory",
        "exp1.an-invariant": "invariant",
        "exp2.explores": "exploratory",
    }
    rows = re.findall(r"<tr id=.*?</tr>", claims_table(found), re.DOTALL)
    assert [next(claim for claim in roles if claim in row) for row in rows] == list(roles)
    for row, role in zip(rows, roles.values(), strict=True):
        assert (
            re.findall(
                "confirmatory|exploratory|invariant(?=</small></td><td data-label=.Claim)", row
            )[-1]
            == role
        )
        assert ("tempo-confirmatory" in row) == (role == "confirmatory")
    lines = [line for line in findings_markdown(found).splitlines() if "exp" in line]
    assert [re.split(r"(?<!\\)\|", line)[3].strip() for line in lines] == list(roles.values())
    table = findings_table(found)
    assert "* confirmatory" in table[0]
    assert [line.endswith("*") for line in (line[13:53].strip() for line in table[1:])] == [
        True,
        False,
        False,
    ]
    assert "confirmatory" not in findings_table(found[:2])[0]
    drawn = figures.forest(found[1:])
    assert re.findall("★[^<]*", drawn.svg) == ["★ exp3.confirms"]
    assert "★ marks the confirmatory claims" in drawn.caption
    assert "★" not in figures.forest(found[:2]).svg + figures.forest(found[:2]).caption
    page = report_html(Report(tuple(found), "tiny"))
    assert (
        "3 registered claims: 1 confirmatory (1 refuted), 1 exploratory (1 refuted), 1 invariant (1 supported)"
        in page
    )
    assert page.index("exp3.confirms</code><br>") < page.index("exp1.an-invariant</code><br>")


def test_every_answer_shows_estimate_interval_n_and_control_of_its_claims():
    found = finding(
        "exp2.equivalent-at-reader",
        estimate=0.147,
        low=0.136,
        high=0.159,
        n=158,
        control_estimate=3e-7,
    )
    report = Report((found,), "tiny")
    page, markdown = report_html(report), report_markdown([report], [picture()], [""])
    assert "✕ refuted, exploratory: 0.147 [0.136, 0.159], n 158, control 3e-7" in page
    assert (
        r"| exp2.equivalent-at-reader | ✕ refuted, exploratory | 0.147 \[0.136, 0.159\] | 158 | 3e-7 |"
        in markdown
    )
    assert "<code>exp7.not-worse-than-top-branch</code> not measured in this record" in page
    assert "misbehaves" in report_markdown(
        [replace(report, findings=(replace(found, control_holds=False),))], [picture()], [""]
    )


def two_folders(tmp_path):
    """Results of two models that disagree, with pictures of their own."""
    folders = tmp_path / "a", tmp_path / "b"
    for folder, model, verdict in zip(
        folders, ("first", "second"), ("REFUTED", "SUPPORTED"), strict=True
    ):
        append_jsonl(
            folder / "findings.jsonl",
            [of_model(model, verdict).record(), of_model(model, claim="exp2.alike").record()],
        )
        section = Section(
            "exp2",
            "Logits",
            "exp2_logits",
            model,
            160,
            (picture(f"Of {model}"), picture("Alike")),
            folder="exp2_logits",
        )
        write_section(folder, section)
        write_session(folder, model, {"Made": f"by {model}"}, None, TESTS)
    return folders


def test_two_models_stand_side_by_side_and_their_disagreement_is_marked(tmp_path):
    a, b = two_folders(tmp_path)
    out = tmp_path / "out"
    result = CliRunner().invoke(
        app, ["report", "--results", str(a), "--results", str(b), "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    page, markdown = (out / "findings.html").read_text(), (out / "findings.md").read_text()
    for text in (result.output.replace("\n", " "), page, markdown):
        assert "Opposite verdicts on 1 of 2 claims" in text
        assert "exp2.same-selection" in text
    rows = {
        row[1].strip(): row
        for row in (
            re.split(r"(?<!\\)\|", line)
            for line in markdown[: markdown.index("# first")].splitlines()
        )
        if len(row) == 7
    }
    assert rows["exp2.same-selection"][3:6] == [
        r" ✕ refuted 0.4 \[0.3, 0.5\], n 160 ",
        r" ● supported 0.4 \[0.3, 0.5\], n 160 ",
        " opposite verdicts ",
    ]
    assert rows["exp2.alike"][5].strip() == ""
    differing = re.findall(r'<tr class="tempo-differs">.*?</tr>', page)
    assert len(differing) == 1
    assert "exp2.same-selection" in differing[0]
    assert differing[0].index("refuted") < differing[0].index("supported")
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
    names = {path.name for path in out.rglob("*.svg")} | {path.name for path in out.rglob("*.png")}
    each = ("findings-{}", "{}-exp2-logits-of-{}", "{}-exp2-logits-alike")
    assert names == {
        f"{name.format(m, m)}.{kind}"
        for m in ("first", "second")
        for name in each
        for kind in ("svg", "png")
    }
    for model, folder in zip(("first", "second"), folders, strict=True):
        raster = folder / f"exp2_logits/figures/of-{model}.png"
        assert (
            out / f"figures/{model}-exp2-logits-of-{model}.png"
        ).read_bytes() == raster.read_bytes()
        assert f"Of {model}" in (out / f"figures/{model}-exp2-logits-of-{model}.svg").read_text()
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
    assert [[s.model for s in report.sections] for report in reports] == [
        ["tiny"],
        [],
    ]  # the later session used the same folder
    assert reports[1].about == {}
    page = report_html(*reports)
    assert "Tests of this session (tiny)" in page
    assert "Opposite verdicts on 1 of 1 claims" in page
    assert (
        CliRunner()
        .invoke(app, ["report", "--results", str(results), "--out", str(tmp_path / "out")])
        .exit_code
        == 0
    )
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


SMALL = {"estimate": 0.1, "low": 0.0, "high": 0.2}


@pytest.mark.parametrize(
    ("found", "marker"),
    [
        ((finding(), finding()), sidebyside.AGREE),
        ((finding(), finding(verdict="SUPPORTED")), sidebyside.OPPOSITE),
        ((finding(), None, finding(verdict="SUPPORTED")), sidebyside.OPPOSITE),
        ((finding(), finding(verdict="INCONCLUSIVE")), sidebyside.DECIDED),
        ((finding(), None), sidebyside.MISSING),
        ((finding(), finding(**SMALL)), sidebyside.SIZE),
        ((finding(), finding(low=0.35), finding(**SMALL)), sidebyside.SIZE),
        ((finding(kind="invariant", n=160), finding(kind="invariant", n=12)), sidebyside.AGREE),
    ],
)
def test_the_marker_of_a_row_says_how_the_models_disagree(found, marker):
    assert sidebyside.Row("a", "exploratory", "b", found).marker == marker


@pytest.mark.parametrize(
    ("shorts", "marker"),
    [(("Yes", "Yes"), sidebyside.AGREE), (("Yes", "No"), sidebyside.DIFFER), (("Yes", "Undetermined"), sidebyside.OPEN),
     (("Yes", "Undetermined", "No"), sidebyside.DIFFER), (("Undetermined", "Undetermined"), sidebyside.AGREE)],
)  # fmt: skip
def test_an_open_answer_is_no_disagreement(shorts, marker):
    assert sidebyside.answer_marker([Answer("q", short, "", "") for short in shorts]) == marker


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
