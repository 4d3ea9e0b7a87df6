"""Text from models and prompts, made safe and readable wherever it is shown."""

from __future__ import annotations

import hashlib
import html
import math
import re
import unicodedata
from collections.abc import Iterable
from functools import cache

LONGEST_SLUG = 60  # characters: ids and file names stay readable
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


# A byte of UTF-8 as tokenizers and this project write it.
BYTE = re.compile("<0x([0-9A-F]{2})>")
SPACE = "\u2581"  # how SentencePiece writes a space
UNKNOWN = "\ufffd"  # what decoders make of bytes that are no whole character


def piece_text(piece: str, decoded: str) -> str:
    r"""The text of one token, from its piece of the vocabulary and what the decoder makes of it.

    A decoder is made for whole texts. It drops the space that a text begins with, and makes one
    sign of all bytes that are no whole character.

    >>> piece_text("\u2581\u2581", " "), piece_text("<0x20>", ""), piece_text("<0xE2>", "\ufffd")
    ('  ', ' ', '<0xE2>')
    """
    if byte := BYTE.fullmatch(piece):
        value = int(byte[1], 16)
        return chr(value) if value < 0x80 else piece
    if UNKNOWN in decoded and UNKNOWN not in piece:
        return _with_bytes(piece) or decoded
    spaces = len(piece) - len(piece.lstrip(SPACE))
    written = decoded.lstrip(" ")
    return " " * spaces + written if spaces > len(decoded) - len(written) else decoded


@cache
def _byte_of() -> dict[str, int]:
    """The byte behind each character of a byte-level vocabulary (GPT-2's)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    table = {chr(byte): byte for byte in shown}
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


def _with_bytes(piece: str) -> str:
    """A piece of a byte-level vocabulary, its broken bytes as `<0xE2>`; "" if it is no such piece.

    >>> _with_bytes("\u0120\u00e2\u0122")
    ' <0xE2><0x80>'
    """
    if not set(piece) <= set(_byte_of()):
        return ""
    return _characters(bytes(_byte_of()[char] for char in piece))


def joined(texts: Iterable[str]) -> str:
    """The texts of consecutive tokens as one text; bytes that make characters together do so.

    >>> joined(["caf", "<0xC3>", "<0xA9>", "<0xC3>"])
    'café<0xC3>'
    """
    text = "".join(texts)

    def together(found: re.Match[str]) -> str:
        return _characters(bytes(int(byte, 16) for byte in BYTE.findall(found[0])))

    return re.sub(f"(?:{BYTE.pattern})+", together, text)


def _characters(values: bytes) -> str:
    """Bytes of UTF-8 as text; those that make no character as `<0xE2>`."""
    text = values.decode("utf-8", errors="surrogateescape")
    # a byte that does not decode comes out as U+DC00 plus itself
    return re.sub("[\udc80-\udcff]", lambda char: f"<0x{ord(char[0]) - 0xDC00:02X}>", text)


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


def alike(*numbers: float) -> list[str]:
    """Numbers that stand together, with equal decimals: three digits that count of the largest.

    >>> alike(0.24, 0.174, 0.305), alike(0.4, 0.1), alike(2.0, 0.0155, 12.5)
    (['0.240', '0.174', '0.305'], ['0.4', '0.1'], ['2.0', '0.0', '12.5'])
    >>> alike(1.5e-7, 0.2), alike(3.0, math.nan)
    (['0.0', '0.2'], ['3', 'n/a'])
    """
    finite = [x for x in numbers if math.isfinite(x)]
    largest = max(map(abs, finite), default=0.0)
    if not 1e-3 <= largest < 1e3:
        return [number(x) for x in numbers]
    most = 2 - math.floor(math.log10(largest))
    shown = [len(f"{x:.{most}f}".rstrip("0").partition(".")[2]) for x in finite]
    return [f"{x:.{max(shown)}f}" if math.isfinite(x) else number(x) for x in numbers]


def slug(text: str) -> str:
    """The text as lower-case ASCII words joined by hyphens, for ids and file names.

    A long text is cut, and ends in a hash, so that two of them do not become one.

    >>> slug("../<b> X")
    'b-x'
    """
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "untitled"
    if len(words) <= LONGEST_SLUG:
        return words
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    return f"{words[: LONGEST_SLUG - len(digest) - 1].strip('-')}-{digest}"
