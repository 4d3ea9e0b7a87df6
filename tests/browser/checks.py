"""What must hold of a page in a browser, each as a question whose answer lists what is wrong."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

# Of the interactive parts of our page; pytest-html's list of tests is below and has its own.
INTERACTIVE = "a[href], button, input, summary, [tabindex]"

_CONTRAST = """() => {
  const parse = (text) => {
    const found = (text.match(/[\\d.]+/g) || []).map(Number);
    return found.length < 3 ? null : [found[0], found[1], found[2], found.length > 3 ? found[3] : 1];
  };
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const light = (colour) => {
    const [r, g, b] = colour.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour && colour[3] > 0) layers.push(colour);
      if (colour && colour[3] === 1) break;
    }
    const page = matchMedia("(prefers-color-scheme: dark)").matches ? [17, 17, 17, 1] : [255, 255, 255, 1];
    return layers.reverse().reduce((under, top) => over(top, under), page);
  };
  const bad = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element || element.closest("script, style, template, title")) continue;
    const box = element.getBoundingClientRect();
    if (!box.width || !box.height || getComputedStyle(element).visibility === "hidden") continue;
    const style = getComputedStyle(element), inSvg = element instanceof SVGElement;
    const under = ground(element), colour = parse(inSvg ? style.fill : style.color);
    if (!colour) continue;
    const [one, two] = [light(over(colour, under)), light(under)].sort((a, b) => b - a);
    const ratio = (one + 0.05) / (two + 0.05);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if (ratio < (large ? 3 : 4.5)) bad.push(`${ratio.toFixed(2)}: ${walker.currentNode.data.trim().slice(0, 40)}`);
  }
  return bad;
}"""

_LATE = """(height) => [...document.querySelectorAll(".tempo-brief dt, .tempo-brief dd, h1")]
  .filter((e) => e.getBoundingClientRect().bottom > height || e.getBoundingClientRect().top < 0).map((e) => e.textContent.slice(0, 40))"""

_DEAD_LINKS = """() => [...document.querySelectorAll('a[href^="#"]')]
  .filter((a) => !document.getElementById(decodeURIComponent(a.getAttribute("href").slice(1)))).map((a) => a.getAttribute("href"))"""


def low_contrast(page: Any) -> list[str]:
    """Text below WCAG's AA contrast, 4.5 to 1, or 3 to 1 where it is large."""
    return page.evaluate(_CONTRAST)


def below_the_fold(page: Any) -> list[str]:
    """What of question, answer, certainty and advice is not on the first screen."""
    return page.evaluate(_LATE, page.viewport_size["height"])


def dead_links(page: Any) -> list[str]:
    """Links within the page that lead nowhere."""
    return page.evaluate(_DEAD_LINKS)


def sideways(page: Any) -> int:
    """By how many pixels the page is wider than its window."""
    return page.evaluate(
        "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )


def column(page: Any, index: int) -> list[str]:
    """The values of a column of the claims table, as they stand now."""
    return page.evaluate(
        "(i) => [...document.querySelectorAll('.tempo-claims tbody tr')].map((r) => r.cells[i].dataset.value)",
        index,
    )


def unsorted(values: list[str]) -> list[tuple[float, float]]:
    """Neighbours out of numeric order; rows without a number come last."""
    numbers = [float(value) if value else float("inf") for value in values]
    return [(a, b) for a, b in pairwise(numbers) if a > b]


def unreachable(page: Any) -> list[str]:
    """Interactive parts of the page that the Tab key never reaches, or reaches without showing it."""
    page.evaluate(
        f"""() => document.querySelectorAll("main :is({INTERACTIVE})").forEach((e, i) => {{ e.dataset.stop = i; }})"""
    )
    visible = """() => [...document.querySelectorAll("[data-stop]")].filter((e) => e.checkVisibility()).map((e) => e.dataset.stop)"""
    wanted = set(page.evaluate(visible))
    state = """() => { const e = document.activeElement, s = getComputedStyle(e);
      return [e.dataset ? e.dataset.stop : null, s.outlineStyle !== "none" && parseFloat(s.outlineWidth) > 0]; }"""
    seen = set()
    page.evaluate("() => { document.activeElement.blur(); scrollTo(0, 0); }")
    for _ in range(len(wanted) + 5):
        page.keyboard.press("Tab")
        stop, outlined = page.evaluate(state)
        if stop is not None and outlined:
            seen.add(stop)
    name = "(i) => document.querySelector(`[data-stop='${i}']`).outerHTML.slice(0, 80)"
    return [page.evaluate(name, stop) for stop in sorted(wanted - seen, key=int)]
