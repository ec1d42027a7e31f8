"""Task identification: one interface for slm_fast's router and those of the rivals."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Identifier(Protocol):
    """Observes tasks one after another, each once, then says which of them queries belong to."""

    @property
    def names(self) -> list[str]:
        """The tasks, in the order of the indices that `identify` returns."""

    def observe(self, name: str, query: Tensor, labels: Tensor | None) -> None:
        """A task's training queries [N, D] float32 and label indices [N], None for free text."""

    def prepare(self) -> None:
        """Compute what depends on all tasks, before the first query is identified."""

    def identify(self, query: Tensor) -> Tensor:
        """Queries [B, D] -> the index of each one's task in `names`, [B] int64."""

    @property
    def nbytes(self) -> int:
        """Bytes kept for all tasks."""
