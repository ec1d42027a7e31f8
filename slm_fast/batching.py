"""Which rows share a batch: length buckets, under a token budget for answering, shuffled for learning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Tokens of a batch unless told otherwise: what fills a GPU, and what a processor's caches like, fewer of wider states.
# Writing an answer passes one token a row at a time, so there more rows go together.
TOKEN_BUDGET = {"cpu": 2048, "cuda": 32768}
WIDTH, LEAST = 384, 512  # up to which width a processor likes so many, and how many it gets at the least
GENERATING = 4  # times as many
SORTED_TOGETHER = 16  # batches of training rows that are sorted by length together


def token_budget(device: str, kind: str, width: int) -> int:
    """Tokens of a batch, padding included, that suit a backbone of this kind and hidden width on "cpu" or "cuda"."""
    if kind != "encoder":
        return GENERATING * TOKEN_BUDGET[device]
    return TOKEN_BUDGET[device] if device != "cpu" else max(LEAST, TOKEN_BUDGET[device] * WIDTH // max(WIDTH, width))


def rounded(number: int, least: int, parts: int) -> int:
    """A number rounded up to one of a few: to a multiple of `least`, or of so many parts of the next power of two where
    that is more."""
    step = max(least, (1 << max(0, number - 1).bit_length()) // parts)
    return -(-number // step) * step


def few_shapes(rows: int, columns: int) -> tuple[int, int]:
    """What a batch of so many rows and columns is padded to where batches should be of few shapes."""
    return rounded(rows, 1, 8), rounded(columns, 16, 16)


def length_buckets(
    lengths: Sequence[int], budget: int, max_rows: int | None = None, *, few: bool = False
) -> list[list[int]]:
    """Rows of these lengths in batches, the longest first. Padded to its longest row, a batch holds at most `budget`
    tokens (or is one row that is longer) and at most `max_rows` rows. few: as many rows and columns as `few_shapes`
    leaves as they are, but where the rows end."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches = []
    while order:
        longest = max(1, lengths[order[0]])
        most = max(1, budget // (few_shapes(1, longest)[1] if few else longest))
        while few and few_shapes(most, longest)[0] > most:
            most -= 1
        rows = min(most, max_rows or len(order))
        batches.append(order[:rows])
        order = order[rows:]
    return batches


def shuffled_buckets(lengths: Tensor, size: int, generator: torch.Generator) -> list[Tensor]:
    """Row numbers in shuffled batches of `size` rows of like lengths [N].

    The rows are shuffled, sorted by length within windows of a few batches (at least four windows where there are
    enough rows, so that a row meets others in the next epoch), cut into batches, and the batches shuffled.
    """
    rows = torch.randperm(len(lengths), generator=generator)
    window = size * max(1, min(SORTED_TOGETHER, len(rows) // (4 * size)))
    found = [batch for part in rows.split(window) for batch in part[lengths[part].argsort(stable=True)].split(size)]
    return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]
