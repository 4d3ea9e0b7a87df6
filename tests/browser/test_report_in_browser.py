"""The findings report in a real browser, Debian's Chromium. Every check is also shown a page on which it must fail.

`make browser` runs it on a report made from records at the size of the full plan; TEMPO_REPORT=FILE on a report of one's own
as well. Screenshots go to reports/screenshots/.
"""

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import sync_playwright

from tempo.claims import Finding
from tempo.reporting import figures
from tempo.reporting.answers import ARTEFACTS, EXACT, SCENARIO_CLAIMS, SHARING, STORED
from tempo.reporting.conclusion import HELPS, PLAIN, VISIBLE_NOT_WORSE, WEIGHTED
from tempo.reporting.page import POLICY, report_html
from tempo.reporting.report import Report, Section
from tests.browser.checks import (
    below_the_fold,
    column,
    dead_links,
    low_contrast,
    sideways,
    unreachable,
    unsorted,
)

ROOT = Path(__file__).resolve().parent.parent.parent
SHOTS = ROOT / "reports/screenshots"
DESKTOP, PHONE, ZOOMED = (
    (1280, 800),
    (390, 844),
    (320, 200),
)  # 1280 by 800 at 400 % is 320 by 200 CSS pixels
MOST_BYTES, MOST_SECONDS = 5_000_000, 2.0
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
HOSTILE = '<script>window.hacked=1</script><img src="http://127.0.0.1:9/x.png" onerror="window.hacked=1">\x00\x1b\u202e😀"\'&שלום'
INSIDE = ("file://", "data:")
CONFIRMED = ("exp2.equivalent-at-reader", "exp3.does-something", "exp6.correct-engine-differs", "exp7.not-worse-than-top-branch",
             "exp11.probability-weighting-helps", "exp13.reads-as-well-as-greedy")  # fmt: skip
EFFECT, N = 2, 3  # columns of the claims table


def finding(
    i: int, experiment: int, verdict: str, text: str = "A claim about parallel tokens", **changes
) -> Finding:
    effect, name = (i - 60) * 0.9, f"exp{experiment}"
    texts = dict.fromkeys(("statement", "reason", "statistic", "margin_reason", "control"), text)
    base = Finding(
        claim=f"{name}.claim-{i}", kind="empirical", verdict=verdict, estimate=effect, low=effect - 1, high=effect + 1, effect_size=0.5,
        n=9 if i % 7 == 0 else 160, unit="prompt", test="greater", margin=0.5, p=0.01, p_corrected=0.02, p_against=0.9,
        p_against_corrected=1.0, family="f", control_estimate=0.0, control_holds=True, **texts,
        context={"experiment": name, "config": f"{name}_config", "model": "tiny", "n_prompts": 160, "dtype": "float32"},
    )  # fmt: skip
    return replace(base, **changes)


def steps_of(*widths: int) -> list[dict]:
    """Sets of these widths for a lattice."""
    members = [("a", 0.5), ("b", 0.2), (HOSTILE, 0.1)]
    return [
        {
            "texts": [text for text, _ in members[:w]],
            "probabilities": [p for _, p in members[:w]],
            "position": k,
            "ended": [],
        }
        for k, w in enumerate(widths)
    ]


def full_report() -> Report:
    """As large as thirteen experiments over 160 prompts: 130 claims, 65 pictures."""
    rng = np.random.default_rng(0)
    verdicts = ("SUPPORTED", "REFUTED", "INCONCLUSIVE")
    found = [finding(i, 1 + i // 10, verdicts[i % 3]) for i in range(130)]
    attention = rng.dirichlet(np.ones(40), (30, 9, 6))
    lines = {"KL": [(x, 0.2 / x, 0.1 / x, 0.3 / x) for x in range(1, 9)]}
    pictures = (
        figures.set_lattice("The cat sat on the", steps_of(1, 3, 2, 1, 3, 2, 1)),
        figures.attention_heatmap(
            attention, [f" token{i}" for i in range(40)], list(range(34, 40))
        ),
        figures.layer_head_map(rng.random((30, 9)), "A map", "mass", "See where it is bright."),
        figures.lines_by(lines, "step", "KL in nats", "A curve", "See it fall."),
        figures.bars(
            {"a": [1, 2], "b": [2, 1]}, ["1", "2"], "width", "share", "Bars", "See which is higher."
        ),
    )
    evidence = {
        "settings": {"prompt": "The cat"},
        "text": "[a/b]",
        "analysis": "numbers",
        "files": ("a.npz",),
    }
    sections = tuple(
        Section(f"exp{k}", "An experiment", f"exp{k}_config", "tiny", 160, pictures, **evidence)
        for k in range(1, 14)
    )
    return Report(
        tuple(found),
        "tiny",
        sections,
        {"Made": "2026-11-24 16:02 UTC", "Command": "pytest test_experiments"},
    )


def hostile_report() -> Report:
    context = {
        "experiment": HOSTILE,
        "config": HOSTILE,
        "model": HOSTILE,
        "n_prompts": 3,
        "dtype": HOSTILE,
    }
    found = finding(1, 1, "SUPPORTED", HOSTILE, claim=HOSTILE, unit=HOSTILE, context=context)
    picture = figures.set_lattice(HOSTILE, steps_of(3), title=HOSTILE)
    section = Section(
        HOSTILE,
        HOSTILE,
        HOSTILE,
        HOSTILE,
        3,
        (picture,),
        {HOSTILE: HOSTILE},
        HOSTILE,
        HOSTILE,
        (HOSTILE,),
        HOSTILE,
        HOSTILE,
    )
    return Report((found,), HOSTILE, (section,), {HOSTILE: HOSTILE})


CONCLUSIVE = (
    *SCENARIO_CLAIMS,
    *STORED,
    EXACT,
    SHARING,
    *ARTEFACTS,
    *PLAIN,
    HELPS,
    *WEIGHTED,
    VISIBLE_NOT_WORSE,
    *CONFIRMED,
)


def two_models() -> tuple[Report, Report]:
    """Two models that disagree, with every claim that an answer rests on, and pictures of their own."""
    verdicts = {
        "small-model-135m": ("SUPPORTED", "REFUTED"),
        "another-model-270m": ("SUPPORTED", "SUPPORTED", "INCONCLUSIVE"),
    }
    reports = []
    for name, cycle in verdicts.items():
        found = []
        for i, claim in enumerate(dict.fromkeys(CONCLUSIVE)):
            experiment, kind = (
                claim.split(".")[0],
                "invariant" if claim in (*STORED, EXACT, *ARTEFACTS) else "empirical",
            )
            context = {
                "experiment": experiment,
                "config": f"{experiment}_config",
                "model": name,
                "n_prompts": 160,
                "dtype": "float32",
            }
            verdict = "SUPPORTED" if kind == "invariant" else cycle[i % len(cycle)]
            family = "confirmatory" if claim in CONFIRMED else experiment
            test = "always" if kind == "invariant" else "greater"
            found.append(
                finding(
                    i + 60,
                    1,
                    verdict,
                    claim=claim,
                    kind=kind,
                    context=context,
                    family=family,
                    test=test,
                )
            )
        pictures = (
            figures.set_lattice(name, steps_of(1, 3, 2)),
            figures.bars({"a": [1, 2]}, ["1", "2"], "width", "share", "Bars", "See."),
        )
        section = Section(
            "exp2", "Logits", "exp2_config", name, 160, pictures, folder="exp2_logits"
        )
        reports.append(
            Report(
                tuple(found), name, (section,), {"Made": "2026-11-24 16:02 UTC"}, root=Path(name)
            )
        )
    return reports[0], reports[1]


PAGES = {
    "full": report_html(full_report()),
    "hostile": report_html(hostile_report()),
    "one": report_html(two_models()[0]),
    "models": report_html(*two_models()),
}
if own := os.environ.get("TEMPO_REPORT"):
    PAGES["own"] = Path(own).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser():
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    assert found, "no Chromium here; `make browser` installs Debian's"
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def show(browser, tmp_path):
    """Opens HTML in a window: the page, with what it logged and asked for in `log`; pages are closed afterwards."""
    contexts = []

    def show(html: str, size=DESKTOP, scheme="light", script=True):
        window = {"width": size[0], "height": size[1]}
        context = browser.new_context(
            viewport=window, color_scheme=scheme, java_script_enabled=script
        )
        contexts.append(context)
        path = tmp_path / "findings.html"
        path.write_text(html, encoding="utf-8")
        page = context.new_page()
        page.log = []
        page.on(
            "console",
            lambda said: (
                page.log.append(f"{said.type}: {said.text}")
                if said.type in ("error", "warning")
                else None
            ),
        )
        page.on("pageerror", lambda error: page.log.append(f"error: {error}"))
        page.on(
            "dialog",
            lambda dialog: (page.log.append(f"dialog: {dialog.message}"), dialog.dismiss()),
        )
        page.on(
            "request",
            lambda asked: (
                None if asked.url.startswith(INSIDE) else page.log.append(f"request: {asked.url}")
            ),
        )
        began = time.perf_counter()
        page.goto(path.as_uri(), wait_until="load")
        page.seconds = time.perf_counter() - began
        return page

    yield show
    for context in contexts:
        context.close()


def plant(html: str, what: str) -> str:
    """The page with something wrong right below its heading."""
    assert "</h1>" in html
    return html.replace("</h1>", f"</h1>{what}", 1)


@pytest.mark.parametrize("name", PAGES)
def test_it_opens_in_two_seconds_without_error_and_asks_for_nothing(show, name):
    page = show(PAGES[name])
    assert page.log == []
    assert page.seconds < MOST_SECONDS
    assert len(PAGES[name].encode()) < MOST_BYTES
    assert page.title().startswith("tempo: ")


def test_a_request_and_an_error_would_be_seen(show):
    image = '<img src="http://127.0.0.1:9/x.png">'
    assert any("Content Security Policy" in line for line in show(plant(PAGES["full"], image)).log)
    without_policy = PAGES["full"].replace(POLICY, "")
    assert without_policy != PAGES["full"]
    assert any(
        line.startswith("request: http://127.0.0.1:9")
        for line in show(plant(without_policy, image)).log
    )
    assert any(
        "planted" in line
        for line in show(plant(PAGES["full"], "<script>throw new Error('planted')</script>")).log
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("name", PAGES)
def test_screenshots_are_kept(show, name, size, scheme):
    page = show(PAGES[name], size, scheme)
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}-{'desktop' if size == DESKTOP else 'phone'}-{scheme}.png")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(17, 17, 17)")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("name", [name for name in PAGES if name != "hostile"])
def test_question_answer_certainty_and_advice_are_on_the_first_screen(show, name, size):
    page = show(PAGES[name], size)
    assert page.locator(".tempo-brief dt").all_text_contents() == [
        "Asked",
        "Found",
        "How sure",
        "What to do",
    ]
    assert below_the_fold(page) == []
    page.add_style_tag(content="body { font-size: 60px !important }")
    assert below_the_fold(page) != []


@pytest.mark.parametrize("size", [PHONE, ZOOMED], ids=["phone", "400 %"])
@pytest.mark.parametrize("name", PAGES)
def test_a_narrow_window_needs_no_sideways_scrolling(show, name, size):
    assert sideways(show(PAGES[name], size)) <= 0
    assert sideways(show(plant(PAGES[name], '<div style="width: 2000px">wide</div>'), size)) > 1000


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_text_has_contrast(show, name, scheme):
    page = show(PAGES[name], scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert low_contrast(page) == []
    planted = show(
        plant(PAGES[name], '<p style="color: #888; background: #777">hardly there</p>'),
        scheme=scheme,
    )
    assert [line.split(": ")[1] for line in low_contrast(planted)] == ["hardly there"]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_where_they_say(show, name):
    page = show(PAGES[name])
    absent = [
        link for link in dead_links(page) if not link.startswith("#claim-")
    ]  # claims that this record does not hold
    assert absent == []
    for link in page.locator("nav a").all():
        link.click()
        target = page.evaluate(
            "document.getElementById(decodeURIComponent(location.hash.slice(1))).getBoundingClientRect().top"
        )
        assert -5 <= target < page.viewport_size["height"]
    assert "#nowhere" in dead_links(show(plant(PAGES[name], '<a href="#nowhere">x</a>')))


def sort_by(page, index):
    page.locator(".tempo-claims thead button").nth(index).click()


@pytest.mark.parametrize("index", [EFFECT, N])
def test_numbers_are_sorted_as_numbers_both_ways(show, index):
    page = show(PAGES["full"])
    sort_by(page, index)
    values = column(page, index)
    assert unsorted(values) == []
    assert unsorted(sorted(values)) != []  # as strings they would stand otherwise
    assert (
        page.locator(".tempo-claims thead th").nth(index).get_attribute("aria-sort") == "ascending"
    )
    sort_by(page, index)
    assert unsorted(column(page, index)[::-1]) == []
    as_text = show(PAGES["full"].replace('data-sort="number"', 'data-sort="text"'))
    sort_by(as_text, index)
    assert unsorted(column(as_text, index)) != []


def test_filters_show_the_verdicts_that_are_asked_for(show):
    page = show(PAGES["full"])
    shown = page.locator(".tempo-claims tbody tr:visible")
    assert shown.count() == 130
    page.locator(".tempo-filters input[value=refuted]").uncheck()
    page.locator(".tempo-filters input[value=inconclusive]").uncheck()
    assert shown.count() == 44
    assert page.locator(".tempo-filters output").text_content() == "44 of 130 claims"
    assert set(page.locator(".tempo-claims tbody tr:visible .tempo-badge").all_text_contents()) == {
        "● supported"
    }
    page.evaluate(
        "location.hash = 'claim-exp1-claim-1'"
    )  # a link to a claim that is filtered out shows it
    page.wait_for_function(
        "document.querySelectorAll('.tempo-claims tbody tr:not([hidden])').length === 130"
    )


def test_the_keyboard_reaches_everything_and_sorts_and_unfolds(show):
    page = show(PAGES["hostile"])
    assert unreachable(page) == []
    page.locator(".tempo-claims thead button").nth(N).focus()
    page.keyboard.press("Enter")
    assert page.locator(".tempo-claims thead th").nth(N).get_attribute("aria-sort") == "ascending"
    page.locator(".tempo-card summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator(".tempo-card details").first.get_attribute("open") is not None
    assert (
        len(unreachable(show(plant(PAGES["hostile"], '<button tabindex="-1">lost</button>')))) == 1
    )


def test_without_scripts_everything_is_there_and_no_control_is_dead(show):
    page = show(PAGES["full"], script=False)
    assert page.locator(".tempo-claims tbody tr:visible").count() == 130
    assert page.locator(".tempo-filters:visible, .tempo-claims button").count() == 0


def test_hostile_text_is_shown_as_text_and_never_run(show):
    page = show(PAGES["hostile"])
    assert page.evaluate("window.hacked") is None
    assert page.log == []
    text = page.evaluate("document.body.innerText")
    assert "<script>window.hacked=1</script>" in text
    assert r"\x00\x1b\u202e😀" in text
    assert page.locator("main img").count() == 0
    assert (
        show(plant(PAGES["hostile"], "<script>window.hacked=1</script>")).evaluate("window.hacked")
        == 1
    )


def test_pointing_at_a_member_of_a_set_shows_its_alternatives(show):
    page = show(PAGES["full"])
    titles = page.locator("#tempo-exp1-config svg title").all_text_contents()
    assert any("Step 2, position 2: 'a' 0.5, 'b' 0.2." in title for title in titles)
    assert "none" in page.locator("#tempo-exp1-config svg text").first.evaluate(
        "e => getComputedStyle(e).pointerEvents"
    )
