"""Batches of rows of like lengths, for learning and for answering."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Generator, Tensor

from slm_fast.examples import batches
from slm_fast.predict import plan


def length_buckets(lengths: Sequence[int], token_budget: int, max_rows: int | None = None) -> list[list[int]]:
    """Row numbers in batches, the longest first: at most `token_budget` tokens, padding included, and `max_rows`."""
    return plan(lengths, token_budget, max_rows)


def shuffled_buckets(lengths: Tensor, size: int, generator: Generator) -> list[Tensor]:
    """Row numbers in shuffled batches of `size` rows of like lengths."""
    return batches(lengths, size, generator)
