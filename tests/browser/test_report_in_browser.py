"""The findings report in a real browser. Every check is also shown a page on which it must fail.

`make browser` runs it on reports made from records at the size of a full run. TEMPO_REPORT=FILE
adds a report of one's own. Screenshots go to reports/screenshots/.
"""

import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import sync_playwright

from tempo import generate, load_model, view
from tempo.claims import Finding
from tempo.reporting import figures
from tempo.reporting.answers import Answer, Conclusions, verdicts_alone
from tempo.reporting.page import WALK, report_html
from tempo.reporting.publish import publish
from tempo.reporting.report import PromptRow, Report, Section, TestRow, Values
from tests.browser.checks import (
    below_the_fold,
    column,
    dead_links,
    low_contrast,
    sideways,
    unreachable,
    unsorted,
)
from tests.full_record import NUM_CLAIMS, NUM_CONFIGS, NUM_PROMPTS, two_full_reports

ROOT = Path(__file__).resolve().parent.parent.parent
SHOTS = ROOT / "reports/screenshots"
DESKTOP, TABLET, PHONE, ZOOMED = (
    (1400, 900),
    (768, 1024),
    (390, 844),
    (320, 225),
)  # 1280 by 900 at 400 % is 320 by 225 CSS pixels
MOST_BYTES, MOST_SECONDS = 4_000_000, 2.0
MOST_PAGES = 25  # of A4
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOSTILE = (
    '<script>window.hacked=1</script><img src="http://127.0.0.1:9/x.png" '
    'onerror="window.hacked=1">\x00\x1b\u202e😀"\'&שלום'
)
INSIDE = ("file://", "data:")
SUITE = "162 prompts in English of 11 categories, 3 to 24 tokens (prompts.yaml)"
EFFECT, N = 2, 3  # columns of the claims table


def finding(
    i: int, experiment: int, verdict: str, text: str = "A claim about parallel tokens", **changes
) -> Finding:
    effect, name = (i - 60) * 0.9, f"exp{experiment}"
    texts = dict.fromkeys(("statement", "reason", "statistic", "margin_reason", "control"), text)
    base = Finding(
        claim=f"{name}.claim-{i}",
        kind="empirical",
        verdict=verdict,
        estimate=effect,
        low=effect - 1,
        high=effect + 1,
        effect_size=0.5,
        n=9 if i % 7 == 0 else 160,
        unit="prompt",
        test="greater",
        margin=0.5,
        p=0.01,
        p_corrected=0.02,
        p_against=0.9,
        p_against_corrected=1.0,
        family="primary" if i % 20 == 0 else name,
        control_estimate=0.0,
        control_holds=True,
        context={
            "experiment": name,
            "config": f"{name}_config",
            "model": "tiny",
            "n_prompts": 160,
            "dtype": "float32",
        },
        **texts,
    )
    return replace(base, **changes)


def conclusions(found: list[Finding], short: str = "Not fine") -> Conclusions:
    """Answers as long as those to this repository's key questions, resting on all these claims."""
    title = "Does a language model handle several tokens at the same position just fine?"
    asked = (
        "At each step every token that reaches a probability threshold is appended, all at one "
        "position. Does the model cope, and does it matter whether such siblings attend to each "
        "other (visible) or not (isolated)?"
    )
    text = (
        "Met: no growth of the error with depth (-0.0121 [-0.0388, 0.0119]). Failed: as near to "
        "the truth as the most probable branch (0.0361 [-0.0111, 0.0811]); reads as well as greedy "
        "(1.52 [1.33, 1.73]); facts still found (0.4 [0.35, 0.46]). With reweighting met: no "
        "growth of the error with depth; failed: reads as well as greedy, facts still found."
    )
    advice = (
        "The modes are not interchangeable: name the one used with every result, and never mix "
        "runs of both. Where the text matters, decode greedily (max_width=1). Total variation to "
        "the truth, visible less isolated: 0.0122 [-0.0104, 0.036]. Weighted by probability less "
        "unweighted: -0.0726 [-0.099, -0.0478]."
    )
    rule = "Yes: exp1.claim-1 and exp1.claim-2 supported. No: exp1.claim-1 refuted."
    claims = [f.claim for f in found] or ["exp1.claim-0"]
    shares = [tuple(claims[i::7]) for i in range(7)]
    questions = (
        ("Do parallel tokens attend to each other in visible mode?", "Yes"),
        ("Are the distributions identical, or just the top-k?", "Neither"),
        ("How does the model handle several tokens at one position?", "Undetermined"),
        ("Why did both modes give identical results?", "Artefacts of the pipeline, not the model"),
    )
    mode = "Visibility undetermined, weighting by probability"
    scenario = "D: fundamental difference"
    return Conclusions(
        title,
        asked,
        (
            Answer(title, short, text, rule, shares[0], "headline"),
            Answer("Which scenario is it?", scenario, text, rule, shares[1], "headline"),
            *(Answer(*questions[i], text, rule, shares[2 + i]) for i in range(4)),
            Answer("Which mode should one use?", mode, advice, rule, shares[6], "advice"),
        ),
    )


def rows(number: int) -> tuple[TestRow, ...]:
    """Tests of a session, some of which failed with a long message."""
    message = "E       assert 1 == 2\n" + "a very long line of a traceback " * 12
    found = []
    for i in range(number):
        failed = i % 40 == 7
        name = f"test_experiments/test_exp{i % 13}.py::test_claim_{i}[exp{i % 13}_config]"
        outcome, text = ("failed", message) if failed else ("passed", "")
        found.append(TestRow(name, outcome, "REFUTED" if i % 3 else "SUPPORTED", i / 100, text))
    return tuple(found)


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


PROMPTS = tuple(
    PromptRow(
        f"Prompt {i} of a suite, as long as most",
        f"category {i % 11}",
        {
            mode: tuple((f" {mode}{i}", f" b{k}") if k % 3 else (" a",) for k in range(12))
            for mode in ("isolated", "visible")
        },
    )
    for i in range(160)
)


def values_for(findings: list[Finding]) -> dict[str, Values]:
    """Values with the mean and the number that each finding says."""
    found = {}
    for f in findings:
        spread = np.random.default_rng(1).normal(0, 4, f.n)
        values = [float(x) for x in f.estimate + spread - spread.mean()]
        padded = (*values, *[None] * (160 - f.n))
        found[f.claim] = Values(padded, tuple(None if x is None else 0.0 for x in padded))
    return found


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
        Section(
            f"exp{k}",
            "An experiment",
            f"exp{k}_config",
            "tiny",
            160,
            pictures,
            prompts=PROMPTS,
            values=values_for([f for f in found if f.context["experiment"] == f"exp{k}"]),
            **evidence,
        )
        for k in range(1, 14)
    )
    return Report(
        tuple(found),
        "tiny",
        sections,
        {"Made": "2026-11-24 16:02 UTC", "Command": "pytest test_experiments"},
        suite=SUITE,
        tests=rows(200),
        recorded=conclusions(found),
    )


def hostile_report() -> Report:
    context = {
        "experiment": HOSTILE,
        "config": HOSTILE,
        "model": HOSTILE,
        "n_prompts": 3,
        "dtype": HOSTILE,
    }
    found = finding(1, 1, "SUPPORTED", HOSTILE, claim=HOSTILE, unit=HOSTILE, context=context, n=1)
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
        prompts=(PromptRow(HOSTILE, HOSTILE, {HOSTILE: ((HOSTILE, "]/["),)}),),
        values={HOSTILE: Values((found.estimate,), (0.0,))},
    )
    answers = [
        Answer(HOSTILE, HOSTILE, HOSTILE, HOSTILE, (HOSTILE,), place)
        for place in ("headline", "question", "advice")
    ]
    return Report(
        (found,),
        HOSTILE,
        (section,),
        {HOSTILE: HOSTILE},
        suite=HOSTILE,
        tests=(TestRow(HOSTILE, HOSTILE, HOSTILE, 1.0, HOSTILE),),
        recorded=Conclusions(HOSTILE, HOSTILE, tuple(answers)),
    )


def two_models() -> tuple[Report, Report]:
    """Two models that disagree, with pictures of their own."""
    verdicts = {
        "small-model-135m": ("SUPPORTED", "REFUTED"),
        "another-model-270m": ("SUPPORTED", "SUPPORTED", "INCONCLUSIVE"),
    }
    reports = []
    for name, cycle in verdicts.items():
        found = []
        for i in range(40):
            context = {**finding(i, 1 + i // 10, "SUPPORTED").context, "model": name}
            changes = {"kind": "invariant", "test": "always"} if i % 8 == 5 else {}
            verdict = "SUPPORTED" if changes else cycle[i % len(cycle)]
            found.append(finding(i, 1 + i // 10, verdict, context=context, **changes))
        pictures = (
            figures.set_lattice(name, steps_of(1, 3, 2)),
            figures.bars({"a": [1, 2]}, ["1", "2"], "width", "share", "Bars", "See."),
        )
        section = Section(
            "exp2", "Logits", "exp2_config", name, 160, pictures, folder="exp2_logits"
        )
        report = Report(
            tuple(found),
            name,
            (section,),
            {"Made": "2026-11-24 16:02 UTC"},
            suite=SUITE,
            tests=rows(20),
            recorded=conclusions(found, "Not fine" if "135m" in name else "Just fine"),
            root=Path(name),
        )
        reports.append(report)
    return reports[0], reports[1]


def own_study() -> Report:
    """Somebody's own study of two claims, which draws no conclusions."""
    found = [
        finding(64, 1, "SUPPORTED", "Seeing siblings makes the next distribution flatter"),
        finding(58, 1, "REFUTED", "Seeing siblings makes the text longer"),
    ]
    section = Section(
        "entropy", "Is it sobering?", "entropy", "tiny", 6, settings={"threshold": 0.1}
    )
    return Report(
        tuple(found),
        "tiny",
        (section,),
        {"Made": "2026-11-24 16:02 UTC"},
        suite="6 prompts (prompts.txt)",
        tests=rows(3),
        recorded=verdicts_alone(found),
    )


PAGES = {
    "full": report_html(full_report()),
    "hostile": report_html(hostile_report()),
    "one": report_html(two_models()[0]),
    "models": report_html(*two_models()),
    "study": report_html(own_study()),
}
# Of a study without conclusions nothing was asked, and nothing follows.
BRIEF = {"study": ["Found", "How sure"]}
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
    """Opens HTML in a window; what the page logged and asked for is in its `log`."""
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


def without_policy(html: str) -> str:
    """The page as it would be if nothing but its own making kept it harmless."""
    bare = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    assert bare != html
    return bare


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
    bare = without_policy(PAGES["full"])
    assert any(
        line.startswith("request: http://127.0.0.1:9") for line in show(plant(bare, image)).log
    )
    script = "<script>throw new Error('planted')</script>"
    assert any("planted" in line for line in show(plant(bare, script)).log)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("name", PAGES)
def test_screenshots_are_kept(show, name, size, scheme):
    page = show(PAGES[name], size, scheme)
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}-{'desktop' if size == DESKTOP else 'phone'}-{scheme}.png")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(17, 17, 17)")


@pytest.mark.parametrize("name", [name for name in PAGES if name != "hostile"])
def test_question_answer_certainty_advice_and_a_figure_are_on_the_first_screen(show, name):
    page = show(PAGES[name], DESKTOP)
    whole = ["Asked", "Found", "How sure", "What to do"]
    assert page.locator(".tempo-brief dt").all_text_contents() == BRIEF.get(name, whole)
    assert below_the_fold(page) == []
    figure = page.locator(".tempo-hero svg").first.bounding_box()
    assert figure["y"] + figure["height"] < DESKTOP[1]
    page.add_style_tag(content="body { font-size: 150px } .tempo-brief * { font-size: 150px }")
    assert below_the_fold(page) != []


@pytest.mark.parametrize("name", [name for name in PAGES if name != "hostile"])
def test_on_a_phone_question_and_answer_are_on_the_first_screen(show, name):
    page = show(PAGES[name], PHONE)
    answer = page.locator(".tempo-answer").first.bounding_box()
    assert answer["y"] + answer["height"] < PHONE[1]


def num_pages(page) -> int:
    """How many sheets of A4 a page prints on."""
    return len(re.findall(rb"/Type\s*/Page[^s]", page.pdf(prefer_css_page_size=True)))


@pytest.mark.parametrize("name", PAGES)
def test_it_prints_on_a_few_sheets(show, name):
    assert num_pages(show(PAGES[name])) <= MOST_PAGES
    assert num_pages(show(plant(PAGES[name], '<p style="height: 900cm"></p>'))) > MOST_PAGES


def test_from_a_claim_one_comes_to_a_prompt_and_its_sets_in_two_clicks(show):
    page = show(PAGES["full"])
    claim = page.locator("#claim-exp1-claim-1")
    claim.get_by_role("button", name="160 prompts, one by one").click()
    prompts = page.locator(".tempo-list tbody tr")
    assert prompts.count() == 160
    page.get_by_role("button", name="Prompt 7 of a suite").click()
    shown = page.locator(".tempo-sets").all_text_contents()
    first = "[ a][ isolated7/ b1][ isolated7/ b2][ a]"
    assert shown[0].startswith(f"isolated: {first}")
    assert shown[1].startswith("visible: [ a][ visible7/ b1]")
    page.locator(".tempo-list thead button").nth(2).click()
    cells = page.locator(".tempo-list tbody tr td:nth-child(3)")
    values = cells.evaluate_all("cells => cells.map((cell) => cell.dataset.value)")
    assert unsorted(values) == []
    assert len(set(values)) > 100
    assert page.log == []


def dots_in(page, where: str) -> list[int]:
    """How many dots each small picture of an effect has."""
    count = "all => all.map((e) => e.getAttribute('d').split('h0').length - 1)"
    return page.locator(f"{where} .tempo-effect .tempo-dots").evaluate_all(count)


def test_every_prompt_is_a_dot_behind_each_mean(show):
    page = show(PAGES["full"])
    assert sorted(set(dots_in(page, ".tempo-claims"))) == [9, 160]
    assert len(dots_in(page, ".tempo-claims")) == 130
    assert len(dots_in(page, ".tempo-grounds")) == page.locator(".tempo-grounds li").count()
    inside = """all => all.every((e) => [...e.getAttribute("d").matchAll(/M(-?\\d+) (-?\\d+)/g)]
      .every(([, x, y]) => x >= 0 && x <= 200 && y >= 0 && y <= 26))"""
    assert page.locator(".tempo-dots").evaluate_all(inside)
    assert page.locator(".tempo-scripted").first.is_visible()
    without = show(PAGES["full"], script=False)
    assert dots_in(without, ".tempo-claims") == []
    assert not without.locator(".tempo-scripted").first.is_visible()


def test_the_values_of_a_column_have_equal_decimals(show):
    page = show(PAGES["full"])
    page.locator("#claim-exp1-claim-1").get_by_role("button", name="160 prompts").click()
    values = page.locator(".tempo-list tbody td:nth-child(3)").all_text_contents()
    assert len({len(value.partition(".")[2]) for value in values}) == 1


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folder of a report of two models at full size, with a run to walk through."""
    results, folder = (tmp_path_factory.mktemp(name) for name in ("results", "report"))
    run = view(generate(load_model("tiny"), "Es war", threshold=0.05, max_steps=3))
    run.save(results / "runs/0123456789abcdef.html")
    first, second = two_full_reports()
    sections = tuple(replace(s, run="0123456789abcdef.html") for s in first.sections)
    publish([replace(first, root=results, sections=sections), second], folder)
    return folder


def test_a_page_of_two_models_opens_at_full_size_and_its_links_lead_to_files(browser, published):
    context = browser.new_context(viewport={"width": DESKTOP[0], "height": DESKTOP[1]})
    page = context.new_page()
    log = []
    page.on("console", lambda said: log.append(said.text))
    page.on("pageerror", lambda error: log.append(str(error)))
    page.on(
        "request", lambda asked: None if asked.url.startswith(INSIDE) else log.append(asked.url)
    )
    began = time.perf_counter()
    page.goto((published / "findings.html").as_uri(), wait_until="load")
    assert time.perf_counter() - began < 2 * MOST_SECONDS  # of two models
    assert (published / "findings.html").stat().st_size < MOST_BYTES
    assert sideways(page) <= 0
    assert below_the_fold(page) == []
    assert sum(dots_in(page, ".tempo-claims")) == 2 * NUM_CLAIMS * NUM_PROMPTS
    files = page.locator("a[href]:not([href^='#'])").evaluate_all(
        "links => links.map((link) => link.getAttribute('href'))"
    )
    assert len(files) > NUM_CONFIGS
    assert [name for name in files if not (published / name).is_file()] == []
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    page.get_by_role("link", name=WALK).first.click()
    page.wait_for_selector(".tempo-lattice")
    assert [line for line in log if not line.startswith(INSIDE)] == []
    context.close()


def test_a_saved_figure_looks_as_it_does_in_the_page(show, browser):
    page = show(PAGES["full"])
    page.evaluate("location.hash = 'tempo-exp1-config'")
    figure = page.locator("#tempo-exp1-config .tempo-figure").nth(3)
    assert "class=" in figure.locator("svg").first.inner_html()
    with page.expect_download() as download:
        figure.get_by_role("button", name="SVG").click()
    saved = Path(download.value.path()).read_text(encoding="utf-8")
    assert "class=" not in saved
    assert 'aria-label="KL in nats against step' in saved
    line = "e => { const s = getComputedStyle(e); return [s.stroke, s.strokeWidth, s.fill]; }"
    alone = browser.new_page()
    alone.set_content(saved)
    shapes = "svg path:not(defs path)"
    drawn = figure.locator(shapes).evaluate_all(f"all => all.map({line})")
    again = alone.locator(shapes).evaluate_all(f"all => all.map({line})")
    assert len(drawn) > 10
    plain = [str(of).replace("rgb(34, 34, 34)", "ink") for of in (drawn, again)]
    assert plain[0] == plain[1]
    alone.close()


def test_every_figure_can_be_had_as_a_file(show):
    page = show(PAGES["full"])
    figure = page.locator(".tempo-hero .tempo-figure")
    begins = {"SVG": b"<svg", "PNG": b"\x89PNG", "CSV": b"row,kind,estimate"}
    for kind, begin in begins.items():
        with page.expect_download() as download:
            figure.get_by_role("button", name=kind).click()
        content = Path(download.value.path()).read_bytes()
        assert content.startswith(begin)
        assert download.value.suggested_filename.endswith(f".{kind.lower()}")
    assert page.log == []


def test_a_word_is_explained_where_the_focus_is(show):
    page = show(PAGES["full"])
    term = page.locator(".tempo-term").first
    assert not term.locator(".tempo-tip").is_visible()
    term.focus()
    assert term.locator(".tempo-tip").is_visible()
    assert sideways(page) <= 0


@pytest.mark.parametrize("size", [TABLET, PHONE, ZOOMED], ids=["tablet", "phone", "400 %"])
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
    assert dead_links(page) == []
    top = """() => document.getElementById(decodeURIComponent(location.hash.slice(1)))
      .getBoundingClientRect().top"""
    for link in page.locator("nav a").all():
        link.click()
        target = page.evaluate(top)
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
    # a link to a claim that is filtered out shows it
    page.evaluate("location.hash = 'claim-exp1-claim-1'")
    shown_rows = "document.querySelectorAll('.tempo-claims tbody tr:not([hidden])').length"
    page.wait_for_function(f"{shown_rows} === 130")


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


def test_the_list_of_tests_is_folded_until_it_is_asked_for(show):
    page = show(PAGES["full"])
    folded = page.locator("#tempo-tests details")
    table_rows = page.locator("#tempo-tests tbody tr:visible")
    assert table_rows.count() == 0
    page.locator("nav a[href='#tempo-tests']").click()
    page.wait_for_function("document.querySelector('#tempo-tests details').open")
    assert table_rows.count() == 200
    assert page.locator("#tempo-tests td.tempo-alarm").count() == 5
    folded.locator("summary").focus()
    page.keyboard.press("Enter")
    assert table_rows.count() == 0


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
    script = "<script>window.hacked=1</script>"
    planted = show(plant(PAGES["hostile"], script))
    assert planted.evaluate("window.hacked") is None  # no script runs but the page's own
    assert any("Content Security Policy" in line for line in planted.log)
    bare = show(plant(without_policy(PAGES["hostile"]), script))
    assert bare.evaluate("window.hacked") == 1


def test_pointing_at_a_member_of_a_set_shows_its_alternatives(show):
    page = show(PAGES["full"])
    titles = page.locator("#tempo-exp1-config svg title").all_text_contents()
    assert any("Step 2, position 2: 'a' 0.5, 'b' 0.2." in title for title in titles)
    assert "none" in page.locator("#tempo-exp1-config svg text").first.evaluate(
        "e => getComputedStyle(e).pointerEvents"
    )
