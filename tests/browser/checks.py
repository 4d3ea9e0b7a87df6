"""What must hold of a page in a browser, each as a question whose answer lists what is wrong."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

INTERACTIVE = "a[href], button, input, summary, [tabindex]"

_CONTRAST = """() => {
  const parse = (text) => {
    const found = (text.match(/[\\d.]+/g) || []).map(Number);
    return found.length < 3 ? null : [...found.slice(0, 3), found.length > 3 ? found[3] : 1];
  };
  const over = (top, under) =>
    [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const linear = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = (colour) => {
    const [r, g, b] = colour.map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const paper = dark ? [17, 17, 17, 1] : [255, 255, 255, 1];
  const ground = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour && colour[3] > 0) layers.push(colour);
      if (colour && colour[3] === 1) break;
    }
    return layers.reverse().reduce((under, top) => over(top, under), paper);
  };
  const unseen = (element) => {
    if (!element || element.closest("script, style, template, title")) return true;
    const box = element.getBoundingClientRect();
    return !box.width || !box.height || getComputedStyle(element).visibility === "hidden";
  };
  const bad = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
    if (!text || unseen(element)) continue;
    const style = getComputedStyle(element), under = ground(element);
    const colour = parse(element instanceof SVGElement ? style.fill : style.color);
    if (!colour) continue;
    const [one, two] = [light(over(colour, under)), light(under)].sort((a, b) => b - a);
    const ratio = (one + 0.05) / (two + 0.05), size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if (ratio < (large ? 3 : 4.5)) bad.push(`${ratio.toFixed(2)}: ${text.slice(0, 40)}`);
  }
  return bad;
}"""

_LATE = """(height) => [...document.querySelectorAll(".tempo-brief dt, .tempo-brief dd, h1")]
  .filter((e) => {
    const box = e.getBoundingClientRect();
    return box.bottom > height || box.top < 0;
  }).map((e) => e.textContent.slice(0, 40))"""

_DEAD_LINKS = """() => [...document.querySelectorAll('a[href^="#"]')]
  .map((a) => a.getAttribute("href"))
  .filter((link) => !document.getElementById(decodeURIComponent(link.slice(1))))"""

_WIDTHS = "document.documentElement.scrollWidth - document.documentElement.clientWidth"

_COLUMN = """(i) => [...document.querySelectorAll(".tempo-claims tbody tr")]
  .map((row) => row.cells[i].dataset.value)"""

_NUMBER_STOPS = f"""() => document.querySelectorAll("main :is({INTERACTIVE})")
  .forEach((e, i) => {{ e.dataset.stop = i; }})"""

_VISIBLE_STOPS = """() => [...document.querySelectorAll("[data-stop]")]
  .filter((e) => e.checkVisibility()).map((e) => e.dataset.stop)"""

_FOCUSED = """() => {
  const e = document.activeElement, s = getComputedStyle(e);
  const outlined = s.outlineStyle !== "none" && parseFloat(s.outlineWidth) > 0;
  return [e.dataset ? e.dataset.stop : null, outlined];
}"""


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
    return page.evaluate(_WIDTHS)


def column(page: Any, index: int) -> list[str]:
    """The values of a column of the claims table, as they stand now."""
    return page.evaluate(_COLUMN, index)


def unsorted(values: list[str]) -> list[tuple[float, float]]:
    """Neighbours out of numeric order; rows without a number come last."""
    numbers = [float(value) if value else float("inf") for value in values]
    return [(a, b) for a, b in pairwise(numbers) if a > b]


def unreachable(page: Any) -> list[str]:
    """Interactive parts of the page that the Tab key never reaches, or does not show."""
    page.evaluate(_NUMBER_STOPS)
    wanted = set(page.evaluate(_VISIBLE_STOPS))
    seen = set()
    page.evaluate("() => { document.activeElement.blur(); scrollTo(0, 0); }")
    for _ in range(len(wanted) + 5):
        page.keyboard.press("Tab")
        stop, outlined = page.evaluate(_FOCUSED)
        if stop is not None and outlined:
            seen.add(stop)
    name = "(i) => document.querySelector(`[data-stop='${i}']`).outerHTML.slice(0, 80)"
    return [page.evaluate(name, stop) for stop in sorted(wanted - seen, key=int)]
