"""The tasks that a model knows at one moment: their pool and router, which change together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from slm_fast.paging import within
from slm_fast.pool import Pool
from slm_fast.router import Router
from slm_fast.tasks import LearnedTask


class Known(NamedTuple):
    """Pool and router. Neither changes, so passes can go on with them while new ones are made."""

    pool: Pool
    router: Router
    budget: int | None = None  # maximum bytes for values; None: no limit

    @property
    def most_rows(self) -> int | None:
        """How many rows can pass together whatever their tasks; None if the values of all tasks are on the device."""
        slots = self.pool.most_slots
        return None if slots is None else max(1, slots // self.router.k)

    def changed(self, *, add: Sequence[LearnedTask] = (), remove: Sequence[str] = ()) -> Known:
        """Add and remove tasks, at the cost of those tasks alone. Passes may run meanwhile, but no second thread may
        call this.

        Raises:
            InputError: a name to add is taken, or one to remove is not there.
        """
        if not (add or remove):
            return self
        pool, router, budget = self
        for name in remove:
            pool = pool.without(name)
        for task in add:
            pool = pool.with_task(task)
        router = router.changed({task.name: task.router for task in add}, remove)
        return Known(within(pool, budget, router.k, self.pool), router, budget)
