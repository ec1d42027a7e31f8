"""Makes arbitrary text safe for HTML and for files."""

from __future__ import annotations

import html
import unicodedata


def clean(text: str) -> str:
    """Replace what no file or page can contain: control characters and lone surrogates."""
    return "".join(
        " "
        if c in "\t\n\r\v\f\x1c\x1d\x1e\x1f\x85\u2028\u2029"
        else "\ufffd"
        if unicodedata.category(c) in ("Cc", "Cs")
        else c
        for c in text
    )


def escape(text: str) -> str:
    """Escape for HTML text and attributes."""
    return html.escape(clean(text), quote=True)


def bdi(text: str, *, breaks: bool = True) -> str:
    """Text in any language, isolated so that its direction is its own. breaks: allow line breaks after underscores."""
    inside = escape(text)
    return f"<bdi>{inside.replace('_', '_<wbr>') if breaks else inside}</bdi>"


def isolated(text: str) -> str:
    """Text within a sentence, isolated so that its direction is its own (Unicode isolates)."""
    return f"\u2068{text}\u2069"


def cut(text: str, most: int) -> str:
    """At most `most` characters, with an ellipsis if the text is longer."""
    return text if len(text) <= most else f"{text[: most - 1].rstrip()}…"
