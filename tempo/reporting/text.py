"""Text from models and prompts, made safe and readable wherever it is shown."""

from __future__ import annotations

import unicodedata

# Controls, formats (direction marks, zero width), line and paragraph separators, surrogates, private use: characters
# that a terminal or browser obeys, or does not show, instead of printing them.
UNSEEN = {"Cc", "Cf", "Zl", "Zp", "Cs", "Co"}


def visible(text: str) -> str:
    r"""`text` with every control, format, separator, surrogate and private-use character as an escape: `\n`, `\x1b`.

    For reading, not for decoding: a backslash stays as it is. Markup (of Rich, HTML) is not touched.
    """
    return "".join(_escape(char) if unicodedata.category(char) in UNSEEN else char for char in text)


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode()
