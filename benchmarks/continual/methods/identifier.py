"""What names the task of a row: one face for slm_fast's router and for those of the rivals."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Identifier(Protocol):
    """Observes tasks one after another, each once, and then says which of them queries belong to."""

    @property
    def names(self) -> list[str]:
        """Of the tasks, in the order that `identify` counts in."""

    def observe(self, name: str, query: Tensor, labels: Tensor | None) -> None:
        """A task's training queries [N, D] float32 and the numbers of their labels [N], None for free text."""

    def prepare(self) -> None:
        """Compute what follows from all tasks, before the first query is identified."""

    def identify(self, query: Tensor) -> Tensor:
        """Queries [B, D] -> the place of each one's task in `names`, [B] int64."""

    @property
    def nbytes(self) -> int:
        """What is kept of all tasks, in bytes."""
