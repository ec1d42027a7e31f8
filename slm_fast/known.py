"""The tasks a model knows at one moment: their pool and their router, which change together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from slm_fast.paging import within
from slm_fast.pool import Pool
from slm_fast.router import Router
from slm_fast.tasks import LearnedTask


class Known(NamedTuple):
    """Neither of the two changes, so that a pass may go on with them while others are made."""

    pool: Pool
    router: Router
    budget: int | None = None  # bytes that the values may take; None: whatever they need

    @property
    def most_rows(self) -> int | None:
        """How many rows may pass together whatever their tasks; None where all tasks' values are there."""
        slots = self.pool.most_slots
        return None if slots is None else max(1, slots // self.router.k)

    def changed(self, *, add: Sequence[LearnedTask] = (), remove: Sequence[str] = ()) -> Known:
        """Some tasks more or less, at the cost of those tasks. Beside passes that run; by one thread at a time.

        Raises InputError for a name that is taken, or not there.
        """
        pool, router, budget = self
        for name in remove:
            pool, router = pool.without(name), router.without(name)
        for task in add:
            pool, router = pool.with_task(task), router.with_part(task.name, task.router)
        return Known(within(pool, budget, router.k), router, budget)
