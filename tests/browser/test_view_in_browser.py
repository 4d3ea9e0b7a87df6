"""A run's page in a real browser: pointer, touch, keyboard, screen reader, hostile tokens.

Every check is also shown a page on which it must fail. Screenshots go to reports/screenshots/.
"""

import re
from functools import cache

import pytest

import tempo
from tests.browser.checks import low_contrast, sideways, unreachable
from tests.browser.test_report_in_browser import (  # noqa: F401
    SHOTS,
    browser,
    show,
    without_policy,
)
from tests.viewing import hostile, two_modes

WINDOWS = {"phone": (390, 844), "tablet": (768, 1024), "desktop": (1400, 900)}
CHIPS = ".tempo-member"


@cache
def pages():
    with tempo.load_model("tiny") as lm:
        modes = two_modes(lm)
        free = tempo.generate(lm, modes[0].spec.prompt, threshold=0.03, max_steps=4)
        views = {
            "run": tempo.view(modes[0], lm=lm),
            "run-modes": tempo.view(*modes, lm=lm),
            "run-free": tempo.view(*modes, free, lm=lm),
            "run-bare": tempo.view(free),
            "run-hostile": tempo.view(*map(hostile, modes), lm=lm),
        }
        found = {name: view.page() for name, view in views.items()}
        return found | {"notebook": notebook(*views.values())}


def notebook(*views):
    """Several views in one document that styles all tables and text, as a notebook does."""
    style = "<style>table { width: 10px } li { color: red } h1 { color: #00558a }</style>"
    cells = "".join(f"<div>{view._repr_html_()}</div>" for view in views)
    return f"<!DOCTYPE html><html lang='en'><head>{style}</head><body><h1>Mine</h1>{cells}</body>"


NAMES = ("run", "run-modes", "run-free", "run-bare", "run-hostile")


def plant(html, what):
    assert "</h1>" in html
    return html.replace("</h1>", f"</h1>{what}", 1)


def shown(page):
    """What the panel says, without what is hidden."""
    return page.locator(".tempo-panel").first.inner_text()


@pytest.mark.parametrize("name", [*NAMES, "notebook"])
def test_it_opens_without_a_message_and_asks_for_nothing(show, name):  # noqa: F811
    page = show(pages()[name])
    for chip in page.locator(CHIPS).all()[:3]:
        chip.hover()
        chip.click()
    assert page.log == []
    assert page.evaluate("window.hacked") is None
    image = '<img src="http://127.0.0.1:9/x.png">'
    assert show(plant(pages()[name], image)).log != []


def test_the_policy_stops_a_script_that_is_not_its_own(show):  # noqa: F811
    script = "<script>window.hacked=1</script>"
    assert show(plant(pages()["run"], script)).evaluate("window.hacked") is None
    assert show(plant(without_policy(pages()["run"]), script)).evaluate("window.hacked") == 1


@pytest.mark.parametrize("name", [*NAMES, "notebook"])
def test_no_window_needs_sideways_scrolling(show, name):  # noqa: F811
    page = show(pages()[name])
    page.locator(CHIPS).nth(5).click()
    for width, height in WINDOWS.values():
        page.set_viewport_size({"width": width, "height": height})
        assert sideways(page) <= 0, width
    page.evaluate(
        """document.body.insertAdjacentHTML("beforeend", "<p style='width: 3000px'>wide</p>")"""
    )
    assert sideways(page) > 1000


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", NAMES)
def test_text_has_contrast(show, name, scheme):  # noqa: F811
    page = show(pages()[name], scheme=scheme)
    assert low_contrast(page) == []
    page.locator(CHIPS).nth(5).click()
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert low_contrast(page) == []
    planted = plant(pages()[name], '<p style="color: #888; background: #777">hardly there</p>')
    found = low_contrast(show(planted, scheme=scheme))
    assert [line.split(": ")[1] for line in found] == ["hardly there"]


def colours(page):
    """Text and bar of every row that is a bar with a number in it, as (r, g, b)."""
    found = page.evaluate(
        """() => [...document.querySelectorAll("b, td.tempo-n")]
          .filter((e) => e.closest(".tempo-n") && e.checkVisibility())
          .map((e) => [getComputedStyle(e).color,
                       getComputedStyle(e.closest(".tempo-n")).backgroundImage])"""
    )
    pairs = set()
    for text, bar in found:
        ends = [tuple(map(int, re.findall(r"\d+", colour))) for colour in (text, *_rgb(bar)[:1])]
        pairs.add(tuple(ends))
    return pairs


def _rgb(text):
    return re.findall(r"rgb\([^)]*\)", text)


def contrast(one, other):
    def light(colour):
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for c in (part / 255 for part in colour)
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_numbers_have_contrast_to_the_bars_below_them(show, scheme):  # noqa: F811
    page = show(pages()["run-modes"], scheme=scheme)
    page.locator(CHIPS).nth(5).click()
    found = colours(page)
    assert len(found) >= 2  # a hue for each run
    assert min(contrast(*pair) for pair in found) >= 4.5
    assert contrast((119, 119, 119), (136, 136, 136)) < 4.5


# --- by pointer, touch and keys


def test_pointing_shows_and_leaving_hides_again_unless_it_is_held(show):  # noqa: F811
    page = show(pages()["run"])
    before = page.locator(".tempo-lattice").inner_text()
    chip = page.locator(CHIPS).nth(6)
    chip.hover()
    assert "Attends to" in shown(page)
    assert "%" in page.locator(".tempo-lattice").inner_text()
    assert page.locator(".tempo-now").count() == 1
    page.mouse.move(2, 2)
    assert "Attends to" not in shown(page)
    assert page.locator(".tempo-lattice").inner_text() == before
    chip.click()
    page.mouse.move(2, 2)
    assert "Attends to" in shown(page)
    assert chip.get_attribute("aria-pressed") == "true"
    chip.click()
    assert chip.get_attribute("aria-pressed") == "false"


def test_a_tap_is_enough(browser, tmp_path):  # noqa: F811
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True)
    path = tmp_path / "run.html"
    path.write_text(pages()["run-modes"])
    page = context.new_page()
    page.goto(path.as_uri())
    page.locator(CHIPS).nth(6).tap()
    assert "Attends to" in shown(page)
    boxes = page.evaluate(
        """() => [...document.querySelectorAll(".tempo-member")]
          .map((e) => e.getBoundingClientRect()).filter((b) => b.width < 24 || b.height < 24)"""
    )
    assert boxes == []  # WCAG 2.2: a target of 24 by 24 pixels
    context.close()


def test_the_arrow_keys_walk_through_all_members(show):  # noqa: F811
    page = show(pages()["run-modes"])
    widths = page.evaluate(
        """() => [...document.querySelectorAll(".tempo-set")]
          .map((set) => set.querySelectorAll(".tempo-member").length)"""
    )
    focused = "() => { const d = document.activeElement.dataset; return [+d.k, +d.i]; }"
    page.locator(CHIPS).first.focus()
    seen = []
    for k, width in enumerate(widths):
        for i in range(width):
            seen.append(page.evaluate(focused))
            assert f"set {k}, member {i + 1} of {width}" in shown(page)
            page.keyboard.press("ArrowDown")
        for _ in range(width):
            page.keyboard.press("ArrowUp")
        page.keyboard.press("ArrowRight")
    assert seen == [[k, i] for k, width in enumerate(widths) for i in range(width)]
    page.keyboard.press("Home")
    assert page.evaluate(focused) == [0, 0]
    page.keyboard.press("End")
    assert page.evaluate(focused) == [len(widths) - 1, 0]
    page.keyboard.press("Enter")
    assert page.locator(".tempo-held").count() == 1
    page.keyboard.press("Escape")
    assert page.locator(".tempo-held").count() == 0
    assert "Attends to" not in shown(page)


def test_tab_reaches_everything_and_a_lattice_is_one_stop(show):  # noqa: F811
    page = show(pages()["run-modes"])
    page.locator(CHIPS).first.click()
    assert page.locator(f"{CHIPS}[tabindex='0']").count() == 1
    # the other members are reached by arrow keys
    rest = page.evaluate(
        """() => { for (const e of document.querySelectorAll(".tempo-member[tabindex='-1']")) {
          e.removeAttribute("tabindex"); } }"""
    )
    assert rest is None
    assert unreachable(page) == []
    lost = show(plant(pages()["run-modes"], '<button tabindex="-1">lost</button>'))
    assert any("lost" in line for line in unreachable(lost))


def test_a_screen_reader_is_told_what_a_member_does(show):  # noqa: F811
    page = show(pages()["run-modes"])
    said = page.locator("[role=status]")
    assert said.get_attribute("aria-live") == "polite"
    assert said.text_content() == ""
    chip = page.locator(CHIPS).nth(6)
    chip.focus()
    told = said.text_content()
    for words in ("isolated: attends most to", "visible: ", "predicts", "came most probably after"):
        assert words in told
    label = chip.get_attribute("aria-label")
    assert re.search(r"set \d+, member \d of \d, probability isolated [\d.]+ %, visible", label)
    assert chip.get_attribute("role") == "button"
    unnamed = """() => [...document.querySelectorAll("select, canvas, [role=button], [role=img]")]
      .filter((e) => !(e.labels?.[0]?.textContent.trim() || e.getAttribute("aria-label")
                       || (e.matches(".tempo-path") && e.textContent.trim())))
      .map((e) => e.outerHTML.slice(0, 80))"""
    assert page.evaluate(unnamed) == []
    assert show(plant(pages()["run"], "<select></select>")).evaluate(unnamed) != []


# --- what it tells


def chosen(page, name):
    """The control of this name."""
    return page.locator(f"label:has-text('{name}') select")


def number(text):
    return float(text.replace("%", "").replace("<", "")) / 100


def test_a_chosen_layer_and_head_show_what_was_recorded(show):  # noqa: F811
    with tempo.load_model("tiny") as lm:
        trace = two_modes(lm)[0]
    page = show(pages()["run"])
    k, i = 3, 1
    page.locator(f"{CHIPS}[data-k='{k}'][data-i='{i}']").click()
    for layer, head in (("2", "1"), ("0", "3")):
        chosen(page, "Layer").select_option(layer)
        chosen(page, "Head").select_option(head)
        expected = trace.steps[k].attention[int(layer), int(head), i]
        for slot in (0, 4, len(expected) - 1):
            told = page.locator(f"[data-slot='{slot}'] .tempo-n").text_content()
            assert number(told) == pytest.approx(expected[slot], abs=0.006)
    # a tap on the map chooses as well: the middle layer, the first head
    box = page.locator("canvas").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + 2)
    assert chosen(page, "Layer").input_value() == "1"
    assert chosen(page, "Head").input_value() == "0"


def test_posterior_and_path_are_those_of_the_trace(show):  # noqa: F811
    with tempo.load_model("tiny") as lm:
        trace = two_modes(lm)[0]
    k = next(k for k in range(1, len(trace.widths)) if trace.widths[k - 1] > 1)
    page = show(pages()["run"])
    page.get_by_label("Numbers on the tokens").select_option("posterior")
    page.locator(f"{CHIPS}[data-k='{k}'][data-i='0']").click()
    for parent in range(trace.widths[k - 1]):
        told = page.locator(f"[data-k='{k - 1}'][data-i='{parent}'] .tempo-n").text_content()
        assert number(told) == pytest.approx(trace.steps[k - 1].links[parent, 0], abs=0.006)
    traced = page.locator(".tempo-traced").evaluate_all("(all) => all.map((e) => +e.dataset.i)")
    assert traced[k - 1 :] == [trace.parents(k)[0], 0]
    page.keyboard.press("Escape")
    page.locator(".tempo-path").first.click()
    traced = page.locator(".tempo-traced").evaluate_all("(all) => all.map((e) => +e.dataset.i)")
    assert traced == trace.paths(1)[0].members
    second = trace.paths(2)[1].members
    page.locator(".tempo-path").nth(1).click()
    traced = page.locator(".tempo-traced").evaluate_all("(all) => all.map((e) => +e.dataset.i)")
    assert traced == second != trace.paths(1)[0].members


def rows_by_layer(page):
    """The rows of the panel's table of layers, as texts."""
    rows = page.locator(".tempo-layers tbody tr").all()
    return [row.locator("th, td").all_inner_texts() for row in rows]


def test_a_member_shows_what_each_layer_would_predict(show):  # noqa: F811
    page = show(pages()["run-modes"])
    page.locator(CHIPS).nth(5).click()
    rows = rows_by_layer(page)
    assert rows[0][0].startswith("0")
    assert rows[-1][0] == "output"
    assert all(cell.endswith(", 0 nats") for cell in rows[-1][1:])
    assert len(rows[-1]) == 3
    bare = show(pages()["run-bare"])
    bare.locator(CHIPS).first.click()
    assert rows_by_layer(bare) == []
    assert 'capture="residual"' in shown(bare)


def test_what_was_not_captured_is_said(show):  # noqa: F811
    page = show(pages()["run-bare"])
    page.locator(CHIPS).first.click()
    assert 'Generate with capture="attention"' in shown(page)
    assert 'Generate with capture="logits"' in shown(page)
    whole = show(pages()["run"])
    whole.locator(CHIPS).first.click()
    assert "Not captured" not in shown(whole)


def test_without_scripts_the_lattice_reads_and_no_control_is_dead(show):  # noqa: F811
    page = show(pages()["run-modes"], script=False)
    assert page.locator(CHIPS).count() > 8
    assert page.locator(f"{CHIPS} b").first.is_visible()
    assert page.locator(".tempo-differs tbody tr").count() == 8
    dead = page.locator("select, [role=button], button, .tempo-panel, .tempo-steering")
    assert [e for e in dead.all() if e.is_visible()] == []


def test_several_in_one_notebook_keep_apart_and_leave_the_rest_alone(show):  # noqa: F811
    page = show(pages()["notebook"])
    views = page.locator(".tempo-view")
    assert views.count() == 5
    for number_of in (0, 3):
        view = views.nth(number_of)
        view.locator(CHIPS).first.click()
        assert view.locator(".tempo-now").count() == 1
    assert page.locator(".tempo-now").count() == 2
    assert page.locator(".tempo-view select").count() == page.evaluate(
        "[...document.querySelectorAll('select')].length"
    )
    assert page.locator("h1").evaluate("(e) => getComputedStyle(e).color") == "rgb(0, 85, 138)"
    # a theme that the notebook says is taken, whatever the system prefers
    dark = pages()["notebook"].replace("<body>", "<body data-jp-theme-light='false'>")
    ground = "(e) => getComputedStyle(e).backgroundColor"
    assert show(dark).locator(".tempo-view").first.evaluate(ground) == "rgb(17, 17, 17)"
    assert page.locator(".tempo-view").first.evaluate(ground) == "rgb(255, 255, 255)"


def test_hostile_texts_are_shown_as_text(show):  # noqa: F811
    page = show(without_policy(pages()["run-hostile"]))
    for chip in page.locator(CHIPS).all():
        chip.hover()
        chip.focus()
    assert page.evaluate("window.hacked") is None
    assert page.log == []
    assert page.locator("main :is(img, svg, iframe, a, form)").count() == 0
    assert r"\x1b[31m" in page.evaluate("document.body.innerText")
    # the same text put in as HTML would run
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=hacked=1>')")
    page.wait_for_function("window.hacked === 1")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", ["run", "run-modes", "run-hostile"])
def test_screenshots_are_kept(show, name, window, scheme):  # noqa: F811
    page = show(pages()[name], WINDOWS[window], scheme)
    page.locator(CHIPS).nth(5).click()
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}-{window}-{scheme}.png", full_page=True, timeout=120_000)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(17, 17, 17)")
