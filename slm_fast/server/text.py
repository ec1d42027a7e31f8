"""Generated text: where to cut it, and which part of an unfinished text is final."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile

Decode = Callable[[Sequence[int]], str]


def cut_at(text: str, stops: Sequence[str]) -> str | None:
    """The text before the first stop string; None if it contains none."""
    places = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return text[: min(places)].rstrip() if places else None


class TextStream:
    """A text in parts, as it is generated, which together make up the whole text.

    What may still change is held back: incomplete characters, trailing blanks, and as many characters as the beginning
    of a stop string may have.

    Args:
        decode: converts tokens to text without surrounding blanks.
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = ()) -> None:
        self._decode, self._held = decode, max((len(stop) for stop in stops), default=1) - 1
        self._sent = ""

    def so_far(self, tokens: Sequence[int]) -> str:
        """The next part, given all tokens so far."""
        text = self._decode(tokens).rstrip("\ufffd").rstrip()
        return self._more(text[: max(0, len(text) - self._held)].rstrip())  # a stop string may follow the blanks

    def end(self, text: str) -> str:
        """The rest of the whole text. If later tokens have changed what was sent, what follows the part they left."""
        left = sum(1 for _ in takewhile(lambda letters: letters[0] == letters[1], zip(text, self._sent, strict=False)))
        return text[left:]

    def _more(self, text: str) -> str:
        if len(text) <= len(self._sent) or not text.startswith(self._sent):
            return ""
        more, self._sent = text[len(self._sent) :], text
        return more
