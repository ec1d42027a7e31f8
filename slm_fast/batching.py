"""Batching of rows by length: under a token budget for prediction, shuffled for learning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Default tokens per batch: enough to fill a GPU; on a CPU, what suits its caches, fewer for wider hidden states.
# Generation passes one token per row at a time, so its batches are larger.
TOKEN_BUDGET = {"cpu": 2048, "cuda": 32768}
WIDTH, LEAST = 384, 512  # CPU: hidden width up to which the full budget applies, and the minimum budget
GENERATING = 4  # factor for generation
SORTED_TOGETHER = 16  # number of batches of training rows that are sorted by length together


def token_budget(device: str, kind: str, width: int) -> int:
    """Default tokens per batch, including padding, for a backbone's kind and hidden width on "cpu" or "cuda"."""
    if kind != "encoder":
        return GENERATING * TOKEN_BUDGET[device]
    return TOKEN_BUDGET[device] if device != "cpu" else max(LEAST, TOKEN_BUDGET[device] * WIDTH // max(WIDTH, width))


def rounded(number: int, least: int, parts: int) -> int:
    """Round up to a multiple of `least` or, if larger, of 1/`parts` of the next power of two: few values occur."""
    step = max(least, (1 << max(0, number - 1).bit_length()) // parts)
    return -(-number // step) * step


def few_shapes(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns that a batch is padded to if batches should have few different shapes."""
    return rounded(rows, 1, 8), rounded(columns, 16, 16)


def length_buckets(
    lengths: Sequence[int], budget: int, max_rows: int | None = None, *, few: bool = False
) -> list[list[int]]:
    """Group rows by length into batches of row numbers, longest first.

    Args:
        lengths: length of each row.
        budget: maximum tokens per batch, padded to its longest row. A row longer than this is a batch by itself.
        max_rows: maximum rows per batch.
        few: batches will be padded by `few_shapes`. The budget then includes that padding, and batches that it limits
            have a number of rows that needs none.
    """
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
    """Group rows of lengths [N] into shuffled batches of `size` row numbers of similar length.

    Rows are shuffled, sorted by length within windows of a few batches (at least four windows if there are enough rows,
    so that batches differ between epochs) and cut into batches, which are shuffled.
    """
    rows = torch.randperm(len(lengths), generator=generator)
    window = size * max(1, min(SORTED_TOGETHER, len(rows) // (4 * size)))
    found = [batch for part in rows.split(window) for batch in part[lengths[part].argsort(stable=True)].split(size)]
    return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]
