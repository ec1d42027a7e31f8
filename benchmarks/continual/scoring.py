"""Whether an answer is right: a share of 0 to 1 for each row."""

from __future__ import annotations

from collections.abc import Sequence

from slm_fast.data import Row

MOST_WORDS = 3  # of an answer that is compared as a word; longer ones are texts


def scores(texts: Sequence[str], rows: Sequence[Row], free_text: Sequence[bool]) -> list[float]:
    """1 for a label that is the row's, or an answer in free text that begins as the row's does, word for word.

    Of free text as many words are compared as the row's answer has, at most three, without case and what is neither
    letter nor digit (first-word accuracy, as Raffel et al. 2020 for one word). free_text: of each row.
    """
    return [
        float(_words(text)[: len(_words(right))] == _words(right) if free else text == right)
        for text, right, free in zip(texts, (row.target or "" for row in rows), free_text, strict=True)
    ]


def _words(text: str) -> list[str]:
    kept = "".join(letter if letter.isalnum() else " " for letter in text.casefold())
    return kept.split()[:MOST_WORDS]
