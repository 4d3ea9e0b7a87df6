"""What a report shows is what was measured, whatever tokens, prompts and names contain."""

import base64
import io
import json
import math
import re
import warnings
import xml.etree.ElementTree as ET
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tempo.claims import SCHEMA, Finding
from tempo.errors import TraceError
from tempo.records import append_jsonl, plain, read_findings, read_jsonl
from tempo.reporting import figures
from tempo.reporting.figures import drawing, number, slug, to_html
from tempo.reporting.findings import findings_markdown, findings_summary, findings_table
from tempo.reporting.page import fragment
from tempo.reporting.report import Report, Section

HOSTILE = [
    "<script>alert(1)</script>",
    "\"quo'ted",
    "\x1b[31mred",
    "\x00",
    "a\u202eb",
    "$x$ _^{",
    "😀",
    "漢",
    " \n",
    "\uffff",
    "",
]
SHOWN = [
    "<script>alert",
    "\"quo'ted",
    r"\x1b[31mred",
    r"\x00",
    r"a\u202eb",
    "$x$ _^{",
    "😀",
    "漢",
    r"·\n",
    r"\uffff",
]
SLOTS = [8, 9, 10]


def attention(visible: bool, num_layers: int = 6, num_heads: int = 2) -> np.ndarray:
    """[L, H, 3, 11] with a sink at slot 0; siblings at SLOTS see each other only if `visible`."""
    weights = np.random.default_rng(0).gamma(0.5, 1.0, (num_layers, num_heads, 3, 11))
    weights[..., 0] += 20.0
    if not visible:
        weights[..., SLOTS] *= np.eye(3)
    return weights / weights.sum(-1, keepdims=True)


def finding(claim: str = "exp2.close", verdict: str = "SUPPORTED", **changes) -> Finding:
    base = Finding(
        claim=claim,
        statement="modes agree",
        kind="empirical",
        verdict=verdict,
        reason="within ±0.02",
        estimate=0.00312,
        low=0.0025,
        high=0.0039,
        effect_size=0.4,
        n=160,
        unit="prompt",
        statistic="TV",
        test="equivalent",
        margin=0.02,
        margin_reason="bfloat16",
        p=1e-4,
        p_corrected=4e-4,
        p_against=1.0,
        p_against_corrected=1.0,
        family="exp2",
        control="sequential positions",
        control_estimate=0.31,
        control_holds=True,
        context={"experiment": "exp2", "model": "tiny", "n_prompts": 161},
    )
    return replace(base, **changes)


def keys(shared: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Cached and raw keys [L, Hkv, N, D] of one frequency.

    The last three stand at position 8, or each at its own.
    """
    raw = np.random.default_rng(1).normal(size=(2, 1, 11, 4))
    angle = 0.3 * np.array([*range(8), 8, 8, 8] if shared else range(11))
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    first, second = raw[..., :2], raw[..., 2:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1), raw


def lattice_steps() -> list[dict]:
    return [
        {"texts": HOSTILE[:3], "probabilities": [0.5, 0.3, 0.1], "position": 4, "ended": []},
        {
            "texts": HOSTILE[3:],
            "probabilities": [0.1] * len(HOSTILE[3:]),
            "position": 5,
            "ended": [0],
        },
    ]


def findings_html(findings, pictures_by_experiment, about) -> str:
    """What a report says."""
    sections = [
        Section(name, name, name, "tiny", 3, tuple(shown), {name: name}, name, name)
        for name, shown in pictures_by_experiment.items()
    ]
    return fragment(Report(tuple(findings), "tiny", tuple(sections), about))


def pictures() -> dict[str, figures.Picture]:
    lines = {label: [(1, 0.2, 0.1, 0.3), (2, 0.0, 0.0, 0.0)] for label in HOSTILE[:4]}
    p, q = np.linspace(1, 2, 11) / 16.5, np.full(11, 1 / 11)
    return {
        "attention": figures.attention_heatmap(attention(True), HOSTILE, SLOTS, title=HOSTILE[0]),
        "map": figures.layer_head_map(np.eye(4) - 0.5, HOSTILE[0], HOSTILE[2], HOSTILE[3]),
        "lines": figures.lines_by(
            lines, HOSTILE[0], HOSTILE[5], HOSTILE[1], HOSTILE[2], log_y=True
        ),
        "bars": figures.distributions(p, q, HOSTILE.__getitem__, names=(HOSTILE[0], HOSTILE[5])),
        "positions": figures.position_map(
            range(11), [*range(8), 8, 8, 8], [*range(8), 8, 8, 8], HOSTILE
        ),
        "plain bars": figures.bars(
            {HOSTILE[0]: [1, 2], HOSTILE[2]: [0, 3]},
            HOSTILE[:2],
            HOSTILE[3],
            HOSTILE[5],
            HOSTILE[4],
            HOSTILE[1],
        ),
        "cells": figures.cell_table(
            [[0, 1], [0.5, 1]],
            [HOSTILE[:2], HOSTILE[2:4]],
            HOSTILE[4:6],
            HOSTILE[:2],
            HOSTILE[0],
            HOSTILE[1],
        ),
        "dots": figures.dots(
            {HOSTILE[0]: [(1, 0, 2)], HOSTILE[2]: [(0, 0, 0)]},
            [HOSTILE[3]],
            HOSTILE[5],
            HOSTILE[4],
            HOSTILE[1],
            0.5,
        ),
        "similarity": figures.key_similarity(*keys(), [*range(8), 8, 8, 8], HOSTILE),
        "lattice": figures.set_lattice(HOSTILE[0], lattice_steps()),
        "forest": figures.forest(
            [finding(claim=text) for text in HOSTILE] + [finding(test="always", margin=0.0)]
        ),
    }


PICTURES = pictures()


def texts(svg: str) -> str:
    return "\n".join(
        "".join(e.itertext()) for e in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    )


@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_is_self_contained_xml_without_active_content(kind):
    svg = PICTURES[kind].svg
    root = ET.fromstring(svg)
    tags = {element.tag.split("}")[1] for element in root.iter()}
    assert tags <= {
        "svg",
        "g",
        "path",
        "text",
        "use",
        "defs",
        "clipPath",
        "rect",
        "image",
        "pattern",
        "tspan",
        "title",
    }
    assert root.get("role") == "img"
    assert root.get("aria-label") == PICTURES[kind].alt
    references = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
    assert all(v.startswith(("#", "data:image/png;base64,")) for v in references)
    assert set(re.findall('http[^"]*', svg)) == {"http://www.w3.org/2000/svg"}
    drawing.check_svg(svg, "a record")
    assert svg.startswith("<svg ")
    assert len(svg.encode()) < 150_000


@pytest.mark.parametrize("kind", PICTURES)
def test_every_reference_in_a_picture_finds_its_id(kind):
    ids = re.findall(r' id="([^"]+)"', PICTURES[kind].svg)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', PICTURES[kind].svg))
    assert len(ids) == len(set(ids))
    assert set(ids) == used


@pytest.mark.parametrize("kind", PICTURES)
def test_ink_follows_the_page_and_the_sentinel_never_remains(kind):
    assert "currentColor" in PICTURES[kind].svg
    assert drawing.INK not in PICTURES[kind].svg
    assert "#000000" not in PICTURES[kind].svg


@pytest.mark.parametrize("kind", ["attention", "bars", "positions"])
def test_hostile_tokens_stand_in_the_picture_as_text(kind):
    said = texts(PICTURES[kind].svg)
    for text in SHOWN if kind != "attention" else SHOWN[:8]:
        assert text in said
    assert not set(said) & set("\x00\x1b\u202e")


def test_hostile_titles_and_captions_stand_in_the_page_as_text():
    page = to_html(PICTURES["lines"])
    assert "<script" not in page
    assert r"\x1b[31mred" in page
    assert "\x1b" not in page
    assert "&lt;script&gt;" in to_html(PICTURES["attention"])


def test_ids_of_two_pictures_of_one_kind_differ():
    first, second = (
        figures.attention_heatmap(attention(v), HOSTILE, SLOTS, title="same") for v in (True, False)
    )
    ids = [set(re.findall(r' id="([^"]+)"', picture.svg)) for picture in (first, second)]
    assert ids[0]
    assert ids[1]
    assert not ids[0] & ids[1]
    assert first.name == second.name == "same"


def test_the_same_arrays_give_the_same_picture_to_the_byte():
    assert pictures() == PICTURES
    assert figures.layer_head_map(np.eye(4), "t", "l", "c") != figures.layer_head_map(
        2 * np.eye(4), "t", "l", "c"
    )


def test_drawing_warns_of_nothing_and_leaves_no_settings_behind():
    import matplotlib

    before = dict(matplotlib.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures()
    assert dict(matplotlib.rcParams) == before


def test_the_heatmap_says_zero_for_isolated_siblings_and_not_for_visible_ones():
    isolated, seen = (
        figures.attention_heatmap(attention(v), [""] * 11, SLOTS, layers=[0, 5])
        for v in (False, True)
    )
    assert "layer 0: 0, layer 5: 0." in isolated.alt
    means = [float(x) for x in re.findall(r"layer \d+: ([\d.]+\d)", seen.alt)]
    expected = [
        attention(True)[layer][:, ~np.eye(3, 11, 8, dtype=bool) & (np.arange(11) >= 8)].mean()
        for layer in (0, 5)
    ]
    np.testing.assert_allclose(means, expected, rtol=5e-3)


def test_cells_are_grey_only_where_the_weight_is_exactly_zero():
    def num_grey(weights):
        svg = figures.attention_heatmap(weights, [""] * 11, SLOTS, layers=[0]).svg
        image = Image.open(
            io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", svg)[1]))
        ).convert("RGB")
        assert image.size == (11, 3)
        return int((np.asarray(image) == 0xB0).all(axis=-1).sum())

    assert num_grey(attention(False)) == 6
    assert num_grey(attention(True)) == 0


def test_the_colour_scale_ends_at_the_largest_weight_outside_the_sink():
    weights = attention(True)[[0, 2, 3, 5]].mean(1)
    assert f"ends at {number(weights[..., 1:].max())}," in PICTURES["attention"].caption
    assert number(weights.max()) not in PICTURES["attention"].caption


def test_a_map_with_negative_values_diverges_and_grey_is_explained_only_where_it_is():
    values = np.array([[1.0, -3.0], [np.nan, 2.0]])
    signed, unsigned = (
        figures.layer_head_map(v, "t", "score", "c") for v in (values, np.ones((2, 2)))
    )
    assert "from -3 to 2" in signed.alt
    assert "largest in layer 0, head 1" in signed.alt
    assert "Grey" in signed.caption
    assert "Grey" not in unsigned.caption
    assert "−2" in texts(signed.svg)
    assert "−" not in texts(unsigned.svg)


def test_a_zero_on_a_logarithmic_axis_is_marked_and_mentioned():
    points = {"a": [(1, 0.1, 0.05, 0.2), (2, 0.0, 0.0, 0.01)]}
    assert "Open triangles" in figures.lines_by(points, "x", "y", "t", "c", log_y=True).caption
    assert "Open triangles" not in figures.lines_by(points, "x", "y", "t", "c").caption
    points["a"][1] = (2, 0.01, 0.005, 0.02)
    assert "Open triangles" not in figures.lines_by(points, "x", "y", "t", "c", log_y=True).caption


def test_the_distance_of_two_distributions_counts_tokens_that_are_not_drawn():
    p, q = np.array([0.5, 0.3, 0.2, 0.0]), np.array([0.5, 0.3, 0.0, 0.2])
    picture = figures.distributions(p, q, str, k=2)
    assert "Total variation over all 4 tokens: 0.2." in picture.caption
    assert "0.2 (isolated)" in picture.caption
    assert "Total variation over all 4 tokens: 0." in figures.distributions(p, p, str).caption


def test_the_position_map_counts_what_is_not_where_it_was_expected():
    expected = [0, 1, 2, 2, 2]
    assert (
        "5 slots at 3 positions, of which 1 are shared; 0 slots"
        in figures.position_map(range(5), expected, expected, "abcde").alt
    )
    sequential = figures.position_map(range(5), range(5), expected, "abcde")
    assert "5 slots at 5 positions, of which 0 are shared; 2 slots" in sequential.alt
    assert "not as expected" in texts(sequential.svg)


def test_the_forest_prints_every_estimate_and_tells_verdicts_apart_by_more_than_colour():
    found = [
        finding("a", "SUPPORTED"),
        finding("b", "REFUTED", estimate=0.5),
        finding("c", "INCONCLUSIVE", low=math.nan, high=math.nan),
    ]
    picture = figures.forest(found)
    assert "1 supported, 1 refuted, 1 inconclusive" in picture.alt
    assert "0.00312 [0.0025, 0.0039]" in texts(picture.svg)
    assert "0.00312 [n/a, n/a]" in texts(picture.svg)
    verdicts = ("SUPPORTED", "REFUTED", "INCONCLUSIVE", "SUPPORTED")
    outlines = [
        tuple(re.findall(r' d="([^"]+)"', figures.forest([finding("a", v)]).svg)) for v in verdicts
    ]
    assert len(set(outlines)) == 3
    assert outlines[0] == outlines[3]


@pytest.mark.parametrize(
    "test", ["always", "greater", "less", "equivalent", "proportion", "somewhere"]
)
@pytest.mark.parametrize("value", [0.0, 1.0, -40.0, 7.5e307, math.nan, math.inf])
def test_the_forest_draws_any_finding(test, value):
    for margin in (0.0, 0.05):
        assert (
            ET.fromstring(
                figures.forest(
                    [finding(test=test, margin=margin, estimate=value, low=value, high=value)]
                ).svg
            )
            is not None
        )


def test_degenerate_data_are_drawn():
    ET.fromstring(figures.forest([]).svg)
    ET.fromstring(figures.lines_by({}, "x", "y", "t", "c", log_y=True).svg)
    ET.fromstring(figures.lines_by({"a": [(0.5, 1.0, math.nan, math.nan)]}, "x", "y", "t", "c").svg)
    ET.fromstring(figures.layer_head_map(np.full((2, 2), np.nan), "t", "l", "c").svg)
    ET.fromstring(figures.layer_head_map(np.zeros((1, 1)), "t", "l", "c").svg)
    ET.fromstring(figures.distributions(np.ones(1), np.ones(1), {0: "a"}).svg)
    ET.fromstring(figures.position_map([0], [0], [0], ["a"]).svg)
    alone = figures.attention_heatmap(np.ones((1, 1, 1, 1)), ["a"], [0])
    assert "layer 0: none" in alone.alt


def test_keys_of_one_position_keep_their_similarity_and_others_do_not():
    shared, apart = (
        figures.key_similarity(*keys(s), [*range(8), 8, 8, 8], [""] * 11).alt for s in (True, False)
    )
    within = [
        float(re.search(r"no similarity by more than ([\d.e-]+),", alt)[1])
        for alt in (shared, apart)
    ]
    assert within[0] < 1e-12
    assert within[1] > 1e-2  # sequential rotations under the pretence of one position


def test_a_member_of_the_lattice_shows_its_whole_set_when_pointed_at():
    root = ET.fromstring(PICTURES["lattice"].svg)
    titles = [e.text for e in root.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 3 + 8
    assert len(set(titles)) == 2
    assert "left out as end of sequence: 1" in titles[-1]
    assert all(f"{p:g}" in titles[0] for p in (0.5, 0.3, 0.1))
    fills = [float(x) for x in re.findall(r"<title>.*?opacity:([\d.]+)", PICTURES["lattice"].svg)]
    assert fills[:3] == sorted(fills[:3], reverse=True)
    assert len(set(fills[:3])) == 3


def test_a_very_wide_set_stays_small_and_readable():
    weights = np.random.default_rng(0).dirichlet(np.ones(240), (4, 9, 32)).astype(np.float32)
    picture = figures.attention_heatmap(
        weights, [f" token{i}" for i in range(240)], list(range(208, 240))
    )
    assert len(picture.svg.encode()) < 150_000
    assert len(texts(picture.svg).splitlines()) < 48 + 4 * 12 + 20


def test_a_saved_picture_has_a_background_of_its_own(tmp_path):
    path, raster = figures.save(PICTURES["attention"], tmp_path / "new")
    assert Image.open(raster).convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    root = ET.parse(path).getroot()
    assert path.name == "script-alert-1-script.svg"
    assert "background" in root.find("{*}style").text
    assert root.find("{*}title").text == HOSTILE[0]


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0.123456, "0.123"),
        (0, "0"),
        (1, "1"),
        (-0.00012345, "-0.000123"),
        (1.5e-7, "1.5e-7"),
        (12345.6, "12346"),
        (2.5e12, "2.5e12"),
        (math.nan, "n/a"),
        (None, "n/a"),
        (math.inf, "∞"),
        (np.float32(0.5), "0.5"),
    ],
)
def test_numbers_have_three_significant_digits(x, text):
    assert number(x) == text


def test_slugs_are_safe_in_ids_and_file_names():
    assert slug("../<b> Ü x") == "b-x"
    assert slug("漢") == "untitled"


def test_the_table_fits_a_small_window_and_puts_trouble_first():
    found = [finding(f"ok{i}") for i in range(20)]
    found += [
        finding("bad", "REFUTED"),
        finding("open", "INCONCLUSIVE"),
        finding("blind", control_holds=False),
    ]
    lines = findings_table(found)
    assert len(lines) == 20
    assert max(map(len, lines)) <= 80
    assert {line.split()[1] for line in lines[1:4]} == {"bad", "open", "blind"}
    assert lines[-1] == "... and 5 more supported"
    assert [line for line in lines if line.endswith(" control!")] == [
        next(line for line in lines if "blind" in line)
    ]


def test_a_table_of_eighteen_keeps_its_order_and_hides_none():
    found = [finding(f"ok{i}") for i in range(17)] + [finding("bad", "REFUTED")]
    lines = findings_table(found)
    assert len(lines) == 19
    assert "bad" in lines[-1]
    assert "ok0" in lines[1]


def test_the_table_names_what_it_hides_when_that_is_not_good_news():
    assert (
        findings_table([finding(f"b{i}", "REFUTED") for i in range(19)])[-1]
        == "... and 1 more (1 refuted)"
    )


def test_the_table_shows_control_characters_and_cuts_what_is_too_wide():
    lines = findings_table(
        [
            finding(
                "\x1b[31m" + "x" * 200,
                estimate=-1.234e-5,
                low=-1.234e-5,
                high=-1.2e-5,
                control_holds=False,
            )
        ]
    )
    assert r"\x1b[31mxxx" in lines[1]
    assert "…" in lines[1]
    assert len(lines[1]) <= 80


def test_a_markdown_row_has_its_columns_whatever_the_text():
    hostile = "a|b `c` *d* <img src=x> $e$ [f](g)\n| h"
    rows = findings_markdown([finding(hostile, statement=hostile)]).splitlines()
    assert len(rows) == 3
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {9}
    assert "<img" not in rows[2]
    assert "&lt;img" in rows[2]
    assert r"\`c\`" in rows[2]
    assert r"\[f\]" in rows[2]
    assert "0.00312" in rows[2]
    assert "160 prompts" in rows[2]


class Page(HTMLParser):
    """Every tag must close in order; collects tags, ids and text."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.ids, self.text = [], set(), [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.ids += [value for key, value in attrs if key == "id"]
        assert not any(key.startswith("on") for key, _ in attrs)
        if tag not in {"br", "img", "input", "meta"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def hostile_findings() -> list[Finding]:
    fields = (
        "claim",
        "statement",
        "reason",
        "unit",
        "statistic",
        "margin_reason",
        "control",
        "family",
    )
    attack = "</td></table><script>alert(1)</script><img src=x onerror=y>\x1b[2J\"'"
    context = {"experiment": attack, "model": attack, "n_prompts": 3}
    return [replace(finding(), **dict.fromkeys(fields, attack), context=context)]


def test_no_tag_of_hostile_findings_comes_alive():
    attack = hostile_findings()[0].claim
    page = Page(
        findings_html(hostile_findings(), {attack: list(PICTURES.values())}, {attack: attack})
    )
    harmless = Page(
        findings_html([finding()], {"exp2": list(PICTURES.values())}, {"model": "tiny"})
    )
    assert page.tags == harmless.tags
    assert not page.tags & {"script", "img"}
    assert "<script>alert(1)</script>" in page.text
    assert "\x1b" not in page.text
    assert len(page.ids) == len(set(page.ids))


def test_the_page_test_can_fail():
    with pytest.raises(AssertionError):
        Page("<table><tr></table>")
    assert "script" in Page("<p><script></script></p>").tags


def test_the_headline_counts_what_is_in_the_findings():
    found = [finding(), finding("b", "REFUTED"), finding("c", "REFUTED", control_holds=False)]
    text = Page(findings_html(found, {}, {})).text
    counted = "3 registered claims: 3 secondary (1 supported, 2 refuted)"
    assert f"{counted}; 2 of 3 negative controls" in text  # a word that is explained
    assert "tiny · 161 prompts" in text
    assert "Negative control did not behave: c." in text
    assert "did not behave" not in Page(findings_html(found[:2], {}, {})).text


def test_findings_without_context_and_no_findings_at_all_still_make_a_page():
    assert (
        "1 registered claim: 1 secondary (1 supported)"
        in Page(findings_html([finding(context={})], {}, {})).text
    )
    assert "0 registered claims: none" in Page(findings_html([], {}, {})).text


def test_a_control_that_misbehaves_or_was_not_measured_is_not_called_good():
    good, bad, none = ({}, {"control_holds": False}, {"control_estimate": math.nan})
    cells = [
        Page(findings_html([finding(**changes)], {}, {})).text for changes in (good, bad, none)
    ]
    assert ["does not support it, as it should" in cell for cell in cells] == [True, False, False]
    assert "SUPPORTS IT TOO" in cells[1]
    assert "not measured" in cells[2]


def test_every_class_is_ours_and_css_touches_nothing_else():
    page = findings_html([finding()], {"exp2": [PICTURES["map"]]}, {"a": "b"})
    names = " ".join(re.findall(r'class="([^"]+)"', page)).split()
    assert names
    assert all(name.startswith("tempo-") for name in names)
    css = re.sub(r":is\([^)]*\)", "", files("tempo.reporting").joinpath("report.css").read_text())
    selectors: list[str] = []
    for rule in re.findall(r"([^{}]+)\{", css):
        if "@media" not in rule and "@page" not in rule:
            selectors += [selector.strip() for selector in rule.split(",")]
    assert len(selectors) > 50
    others = {selector for selector in selectors if ".tempo-" not in selector}
    assert others == {":root", "html", "body"}


def test_an_invariant_has_no_p_value_and_a_missing_value_is_not_a_number_in_disguise():
    text = Page(
        findings_html(
            [finding(kind="invariant", test="always", p=math.nan, p_corrected=math.nan)], {}, {}
        )
    ).text
    assert "exactinvariant" in text
    assert not re.search(r"\bnan\b", text)
    assert "raw 0.0001" in Page(findings_html([finding()], {}, {})).text


def test_records_come_back_as_plain_json(tmp_path):
    path = tmp_path / "new" / "findings.jsonl"

    @dataclass
    class Point:
        x: float

    record = {
        "scalar": np.float32(0.5),
        "array": np.array([[1.0, np.nan]]),
        "path": Path("a/b"),
        "nan": math.nan,
        "inf": -math.inf,
        "flag": np.bool_(True),
        3: (1, {2}),
        "text": "\u2028\x00é\ud800",
        "none": None,
        "point": Point(math.nan),
    }
    append_jsonl(path, [record])
    append_jsonl(path, [{"n": np.int64(2)}])
    plainly = {
        "scalar": 0.5,
        "array": [[1.0, None]],
        "path": "a/b",
        "nan": None,
        "inf": None,
        "flag": True,
        "3": [1, [2]],
        "text": "\u2028\x00é\ud800",
        "none": None,
        "point": {"x": None},
    }
    assert read_jsonl(path) == ([plainly, {"n": 2}], [])
    assert len(path.read_text().splitlines()) == 2
    json.loads(path.read_text().splitlines()[0], parse_constant=pytest.fail)


def test_a_record_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "r.jsonl"
    with pytest.raises(TypeError, match="cannot record a object"):
        append_jsonl(path, [{"good": 1}, {"bad": object()}])
    assert not path.exists()


def test_a_finding_is_a_record(tmp_path):
    append_jsonl(tmp_path / "f.jsonl", [finding(p=math.nan).record(), plain(finding(p=math.nan))])
    first, second = read_jsonl(tmp_path / "f.jsonl").records
    assert first == {"schema": SCHEMA, **second}
    assert first["p"] is None
    assert first["n"] == 160


def test_a_line_cut_short_by_a_killed_run_is_told_wherever_the_cut_fell(tmp_path):
    path = tmp_path / "r.jsonl"
    append_jsonl(path, [{"a": 1}, {"b": "é"}])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole) - 1):
        path.write_bytes(whole[:cut])
        records, damaged = read_jsonl(path)
        assert records == [{"a": 1}]
        assert ["line 2 is damaged" in line for line in damaged] == ([True] if cut > first else [])
        append_jsonl(path, [{"c": 3}])
        assert read_jsonl(path).records == [{"a": 1}, {"c": 3}]
    path.write_bytes(whole[:-1])  # only the newline is missing: the record is whole
    append_jsonl(path, [{"c": 3}])
    assert read_jsonl(path) == ([{"a": 1}, {"b": "é"}, {"c": 3}], [])


@pytest.mark.parametrize(
    "garbage", [b"{oops\n", b"[1, 2]\n", b"\xff\xfe\n", b"{}{}\n", b"\x00\x00\n"]
)
def test_garbage_is_told_by_its_line_and_the_rest_is_kept(tmp_path, garbage):
    path = tmp_path / "r.jsonl"
    append_jsonl(path, [{"a": 1}, {"b": 2}])
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + garbage + second)
    records, damaged = read_jsonl(path)
    assert records == [{"a": 1}, {"b": 2}]
    assert len(damaged) == 1 and f"{path} line 2 is damaged: " in damaged[0]
    path.write_bytes(first + garbage)
    assert "line 2" in read_jsonl(path).damaged[0]


def test_a_changed_number_is_seen_in_a_line_that_is_still_json(tmp_path):
    path = tmp_path / "r.jsonl"
    append_jsonl(path, [{"a": 1}, {"a": 0.25}])
    path.write_bytes(path.read_bytes().replace(b"0.25", b"0.35"))
    records, (said,) = read_jsonl(path)
    assert records == [{"a": 1}]
    assert "line 2 is damaged: its checksum does not fit" in said
    path.write_text('{"a": 1}\n')
    assert "it has no checksum" in read_jsonl(path).damaged[0]


def test_no_file_is_no_records(tmp_path):
    assert read_jsonl(tmp_path / "none.jsonl") == ([], [])


def test_findings_come_back_from_their_record_the_last_of_each_claim(tmp_path):
    first, second = (
        finding(estimate=0.1),
        finding(estimate=math.nan, context={"config": "a", "model": "tiny"}),
    )
    append_jsonl(tmp_path / "f.jsonl", [f.record() for f in (first, second, replace(second, n=7))])
    (one, two), damaged = read_findings(tmp_path / "f.jsonl")
    assert damaged == []
    assert one == first
    assert (two.n, math.isnan(two.estimate)) == (7, True)


@pytest.mark.parametrize("schema", [1, 3, "2", None])
def test_a_record_of_another_schema_is_refused_with_what_to_do(tmp_path, schema):
    record = {**finding().record(), "schema": schema}
    append_jsonl(tmp_path / "f.jsonl", [finding().record(), record])
    with pytest.raises(
        TraceError, match=f"schema {schema!r}, this tempo reads 2; delete the file and run"
    ):
        read_findings(tmp_path / "f.jsonl")


def test_what_is_no_finding_is_told_and_the_others_kept(tmp_path):
    append_jsonl(tmp_path / "f.jsonl", [{"schema": 2, "claim": "c"}, finding().record()])
    found, (said,) = read_findings(tmp_path / "f.jsonl")
    assert found == [finding()]
    assert "holds no finding of c: statement: Field required" in said


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("verdict", "GOOD", "verdict"),
        ("verdict", 3, "verdict"),
        ("claim", 3, "claim"),
        ("estimate", "much", "estimate"),
        ("n", 1.5, "n"),
        ("n", -5, "n below 0"),
        ("p", 17, "a p outside 0 to 1"),
        ("low", 1e6, "low above high"),
        ("alpha", 0, "alpha outside 0 to 1"),
        ("kind", "guess", "kind 'guess'"),
        ("test", "hope", "test 'hope'"),
        ("estimand", "mode", "estimand 'mode'"),
        ("control_holds", "perhaps", "control_holds"),
        ("context", [], "context"),
        ("context", {"model": ["tiny"]}, "context.model is no text"),
        ("context", {"n_prompts": -1}, "context.n_prompts is no count"),
        ("surprise", 1, "surprise"),
    ],
)
def test_a_finding_that_cannot_be_is_told_in_one_line(tmp_path, field, value, why):
    append_jsonl(tmp_path / "f.jsonl", [{**finding().record(), field: value}])
    found, (said,) = read_findings(tmp_path / "f.jsonl")
    assert found == []
    assert why in said and "\n" not in said


def test_a_refutation_is_shown_with_the_p_against_the_claim():
    refuted = finding(
        verdict="REFUTED", p=0.9, p_corrected=1.0, p_against=0.001, p_against_corrected=0.0333
    )
    shown = (
        "\n".join(findings_table([refuted])),
        findings_markdown([refuted]),
        findings_html([refuted], {}, {}),
    )
    assert all("0.0333" in text for text in shown)
    assert not any(
        "0.0333" in text
        for text in (findings_markdown([replace(refuted, verdict="INCONCLUSIVE")]),)
    )


def test_the_summary_says_what_went_wrong_first():
    found = [
        finding(),
        finding("b", "REFUTED", control_holds=False),
        finding("i", "REFUTED", kind="invariant", reason="violated by 1 of 9"),
    ]
    summary = findings_summary(
        found, ["exp2.close: expected REFUTED,\n found SUPPORTED"], ["a notice"]
    )
    lines = summary.splitlines()
    assert lines[0] == "## tempo: 1 supported, 2 refuted"
    assert lines[2] == "- **regression** exp2.close: expected REFUTED, found SUPPORTED"
    assert lines[3] == "- **invariant** i: violated by 1 of 9"
    assert lines[4].startswith("- **control** b")
    assert lines[5] == "- a notice"
    assert findings_markdown(found).strip() in summary
    assert "regression" not in findings_summary(found, [])


def test_a_hostile_summary_stays_text():
    summary = findings_summary(hostile_findings(), ["<script>|</script>"])
    assert "<script>" not in summary
