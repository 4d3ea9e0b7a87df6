"""Text from models and prompts, made safe and readable wherever it is shown."""

from __future__ import annotations

import math
import re
import unicodedata

# Controls, formats (direction marks, zero width), line and paragraph separators, surrogates, private use: characters
# that a terminal or browser obeys, or does not show, instead of printing them.
UNSEEN = {"Cc", "Cf", "Zl", "Zp", "Cs", "Co"}


def escaped(text: str) -> str:
    r"""`text` with every control, format, separator, surrogate and private-use character as an escape: `\n`, `\x1b`.

    For reading, not for decoding: a backslash stays as it is. Markup (of Rich, HTML) is not touched.
    """
    return "".join(_escape(char) if unicodedata.category(char) in UNSEEN else char for char in text)


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode()


def printable(text: str) -> str:
    """`escaped`, and without the two noncharacters that XML forbids."""
    return re.sub("[\ufffe\uffff]", lambda char: f"\\u{ord(char[0]):04x}", escaped(text))


def number(x: float | None) -> str:
    """x with three significant digits; 'n/a' for NaN and None."""
    if x is None or math.isnan(x):
        return "n/a"
    if math.isinf(x):
        return "∞" if x > 0 else "-∞"
    if x == 0 or 1e-4 <= abs(x) < 1e3:
        return f"{x:.3g}"
    return (
        f"{x:.0f}"
        if 1e3 <= abs(x) < 1e6
        else re.sub(r"e([+-])0?", r"e\1", f"{x:.3g}").replace("e+", "e")
    )


def slug(text: str) -> str:
    """The text as lower-case ASCII words joined by hyphens, for ids and file names."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "untitled"
