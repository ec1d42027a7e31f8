"""Text from anywhere, made safe for HTML and for files."""

from __future__ import annotations

import html
import unicodedata


def clean(text: str) -> str:
    """A text without what no file or page can hold: control characters and half of a surrogate pair."""
    return "".join(
        " "
        if c in "\t\n\r\v\f\x1c\x1d\x1e\x1f\x85\u2028\u2029"
        else "\ufffd"
        if unicodedata.category(c) in ("Cc", "Cs")
        else c
        for c in text
    )


def escape(text: str) -> str:
    """For text and attributes."""
    return html.escape(clean(text), quote=True)


def bdi(text: str, *, breaks: bool = True) -> str:
    """A text of any language whose direction is its own. breaks: a line may end behind an underscore."""
    inside = escape(text)
    return f"<bdi>{inside.replace('_', '_<wbr>') if breaks else inside}</bdi>"


def isolated(text: str) -> str:
    """A text within a sentence of ours, whose direction stays its own (Unicode's isolates)."""
    return f"\u2068{text}\u2069"


def cut(text: str, most: int) -> str:
    """The first `most` characters, with an ellipsis where there are more."""
    return text if len(text) <= most else f"{text[: most - 1].rstrip()}…"
