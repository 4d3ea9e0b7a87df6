"""The words of a report that a newcomer does not know, explained where they stand and in a list."""

from __future__ import annotations

import re

from tempo.text import html_text, slug

TERMS = {
    "set": "All tokens that were appended at one step. They stand at one position.",
    "sibling": "A member of a set that has other members.",
    "reader": "A token of the next set. It attends to every member of the set before it.",
    "isolated": "The mode in which siblings cannot see each other.",
    "visible": "The mode in which siblings attend to each other.",
    "total variation": "How far two distributions are apart: the probability that would have to be "
    "moved. 0: the same; 1: nothing in common.",
    "KL": "Kullback-Leibler divergence: how far a distribution is from another one, in nats. "
    "0: the same.",
    "nats": "The unit of log probability with the natural logarithm. 0.69 nats are a factor of 2.",
    "posterior": "The probability that a member came before the token that reads it, as the "
    "model's own outputs tell it.",
    "best path": "The most probable way through the sets, one member of each: the text of a run.",
    "exact mixture": "The next-token distributions of all paths through the sets, each read as "
    "plain text, weighted by how probable the paths are.",
    "interval": "95 % interval: where the mean of all such prompts lies. Of few prompts it is "
    "too narrow.",
    "control": "The same statistic where the claim must not hold. If it held there too, the check "
    "would prove nothing.",
    "margin": "The smallest effect that matters. It was fixed with the claim.",
    "n": "How many prompts have a value. Each prompt counts once.",
    "confirmatory": "The prompts were drawn after the claim was registered.",
    "exploratory": "The prompts were known when the claim was written, so it is not yet confirmed.",
}
_OTHERS = {
    "sets": "set",
    "siblings": "sibling",
    "readers": "reader",
    "controls": "control",
    "intervals": "interval",
    "margins": "margin",
    "posteriors": "posterior",
    "nat": "nats",
}
_EVERY = sorted([*TERMS, *_OTHERS], key=len, reverse=True)
_WORDS = re.compile(rf"(?<![\w.\[-])(?:{'|'.join(map(re.escape, _EVERY))})(?![\w/-])")


def explained(text: str) -> str:
    """Plain text as HTML, in which the first use of each term shows what it means.

    It is shown where a pointer rests on it, and where the keyboard's focus is.
    """
    seen: set[str] = set()
    parts, end = [], 0
    for match in _WORDS.finditer(text):
        term = _OTHERS.get(match[0], match[0])
        if term in seen:
            continue
        seen.add(term)
        parts += [html_text(text[end : match.start()]), _link(term, match[0])]
        end = match.end()
    return "".join([*parts, html_text(text[end:])])


def _link(term: str, word: str) -> str:
    return (
        f'<a class="tempo-term" href="#tempo-term-{slug(term)}">{html_text(word)}'
        f'<span class="tempo-tip" role="tooltip">{html_text(TERMS[term])}</span></a>'
    )


def glossary_html() -> str:
    """The list of all terms."""
    entries = [
        f'<dt id="tempo-term-{slug(term)}">{html_text(term)}</dt><dd>{html_text(meaning)}</dd>'
        for term, meaning in TERMS.items()
    ]
    return (
        '<section id="tempo-glossary"><h2>Words</h2>'
        f'<dl class="tempo-about">{"".join(entries)}</dl></section>'
    )
