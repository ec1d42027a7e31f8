"""A memory of earlier tasks' rows, their mixing into a task's batches, and a base class with such a memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from benchmarks.continual.methods.finetune import Finetune
from benchmarks.continual.methods.method import Setup, State
from slm_fast.data import Row
from slm_fast.tasks import name_seed

SHARE = 0.01  # share of a task's rows that is kept
EVERY = 10  # batches per replay: kept rows are mixed into the last


class Memory:
    """Rows by task, in the order the tasks were learned."""

    def __init__(self) -> None:
        self.tasks: dict[str, list[Row]] = {}

    def keep(self, name: str, rows: Sequence[Row]) -> None:
        self.tasks[name] = list(rows)

    @property
    def rows(self) -> list[Row]:
        """All of them."""
        return [row for rows in self.tasks.values() for row in rows]

    def numbers(self, first: int) -> list[Tensor]:
        """The indices of each task's rows, [rows], when all `rows` follow `first` other rows."""
        numbers = torch.arange(first, first + len(self.rows))
        return list(numbers.split([len(rows) for rows in self.tasks.values()]))

    def state(self) -> State:
        return {name: [[row.text, row.target, row.instruction] for row in rows] for name, rows in self.tasks.items()}

    def restore(self, state: State) -> None:
        self.tasks = {name: [Row(*row) for row in rows] for name, rows in state.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of the texts."""
        return sum(len(f"{row.text}{row.target}{row.instruction}".encode()) for row in self.rows)


def shared(rows: int, share: float) -> int:
    """How many of `rows` rows are kept: this share, rounded down, and at least one."""
    return max(1, int(share * rows))


def sample(name: str, rows: Sequence[Row], share: float, seed: int) -> list[Row]:
    """A uniform random share of a task's rows, seeded by its name."""
    generator = Generator().manual_seed(name_seed(f"{name}/memory", seed))
    chosen = torch.randperm(len(rows), generator=generator)[: shared(len(rows), share)]
    return [rows[i] for i in chosen.tolist()]


def mix(
    batches: Sequence[Tensor], kept: Sequence[Tensor], size: int, every: int, generator: Generator
) -> tuple[list[Tensor], list[bool]]:
    """Mix kept rows into the batches as IDBR and its Replay baseline do (Huang et al. 2021).

    The last of every `every` batches gets up to `size` rows of each earlier task, drawn without replacement. These rows
    are shuffled together and split into batches of `size`, which are additional steps.

    Args:
        batches: row numbers.
        kept: row numbers of each earlier task.

    Returns the batches, and which of them are mixed.
    """
    found: list[Tensor] = []
    mixed: list[bool] = []
    for count, batch in enumerate(batches, 1):
        parts: Sequence[Tensor] = [batch]
        replays = bool(kept) and count % every == 0
        if replays:
            drawn = [rows[torch.randperm(len(rows), generator=generator)[:size]] for rows in kept]
            pool = torch.cat([batch, *drawn])
            parts = pool[torch.randperm(len(pool), generator=generator)].split(size)
        found += parts
        mixed += [replays] * len(parts)
    return found, mixed


class Remembering(Finetune):
    """One model trained in sequence, with a memory of rows."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.memory = Memory()

    def state(self) -> State:
        return {**super().state(), "memory": self.memory.state()}

    def restore(self, state: State) -> None:
        super().restore(state)
        self.memory.restore(state["memory"])

    @property
    def kept(self) -> int:
        return super().kept + self.memory.nbytes
