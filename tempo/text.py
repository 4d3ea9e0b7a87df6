"""Text from models and prompts, made safe and readable wherever it is shown."""

from __future__ import annotations

import html
import math
import re
import unicodedata

# Categories of characters that a terminal or browser obeys, or does not show, instead of printing
# them: controls, formats (direction marks, zero width), line and paragraph separators, surrogates,
# private use.
UNSEEN = {"Cc", "Cf", "Zl", "Zp", "Cs", "Co"}


def escaped(text: str) -> str:
    r"""The text with every character that would not show itself as an escape.

    For reading, not for decoding: a backslash stays as it is. Markup of Rich and HTML stays, too.

    >>> print(escaped("red: \x1b[31m"))
    red: \x1b[31m
    """
    return "".join(_escape(char) if unicodedata.category(char) in UNSEEN else char for char in text)


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode()


def printable(text: str) -> str:
    """The text `escaped`, and without the two characters that XML forbids."""
    return re.sub("[\ufffe\uffff]", lambda char: f"\\u{ord(char[0]):04x}", escaped(text))


def html_text(value: object) -> str:
    """Any value as text for HTML: `escaped`, and without markup.

    >>> html_text("<b>")
    '&lt;b&gt;'
    """
    return html.escape(escaped(str(value)))


def number(x: float | None) -> str:
    """x with three significant digits; 'n/a' for NaN and None.

    >>> number(0.123456), number(12345.6), number(1.5e-7), number(None)
    ('0.123', '12346', '1.5e-7', 'n/a')
    """
    if x is None or math.isnan(x):
        return "n/a"
    if math.isinf(x):
        return "∞" if x > 0 else "-∞"
    if x == 0 or 1e-4 <= abs(x) < 1e3:
        return f"{x:.3g}"
    if 1e3 <= abs(x) < 1e6:
        return f"{x:.0f}"
    return re.sub(r"e([+-])0?", r"e\1", f"{x:.3g}").replace("e+", "e")


def slug(text: str) -> str:
    """The text as lower-case ASCII words joined by hyphens, for ids and file names.

    >>> slug("../<b> X")
    'b-x'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "untitled"
