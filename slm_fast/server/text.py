"""Written texts: where they are cut, and what of one that is being written is sure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]


def cut_at(text: str, stops: Sequence[str]) -> str | None:
    """The text before the first of some stop texts; None where none stands in it."""
    places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return text[: min(places)].rstrip() if places else None


class TextStream:
    """A text as it comes, in parts that together are the whole text.

    What may still change is held back: bytes that are not a letter yet, blanks at the end, and as many letters as a
    stop text that has begun may have.

    Args:
        decode: tokens to text, without blanks around it.
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = ()) -> None:
        self._decode, self._held = decode, max((len(stop) for stop in stops), default=1) - 1
        self._sent = ""

    def so_far(self, tokens: Sequence[int]) -> str:
        """What can be said more after these tokens, all there are."""
        text = self._decode(tokens).rstrip("\ufffd").rstrip()
        return self._more(text[: max(0, len(text) - self._held)].rstrip())  # a stop text may follow the blanks

    def end(self, text: str) -> str:
        """What is left of the whole text."""
        return self._more(text)

    def _more(self, text: str) -> str:
        if len(text) <= len(self._sent) or not text.startswith(self._sent):
            return ""
        more, self._sent = text[len(self._sent) :], text
        return more
