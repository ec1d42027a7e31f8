"""Values of more tasks than fit on the device: the most recently used ones; the others stay in their files.

A page is the space of one slot's values in the pool's buffers. A pass requests the pages of its routes (`rows`).
Missing ones are read from the tasks' files (memory-mapped, so the kernel caches what it has room for) and replace the
least recently used. Answers do not depend on this, since the same numbers enter the same products; but in a batch that
passes in parts (`parts`), rows are combined differently, which may change the last bits of a score.
"""

from __future__ import annotations

import threading
from bisect import bisect
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from slm_fast.errors import InputError, RowsFailed, WorkError, some_of, warn
from slm_fast.ops import Route
from slm_fast.pool import Buffers, Pool, page_rank, rows_of
from slm_fast.tasks import LearnedTask, in_name_order

Place = tuple[int, int]  # index of a task in a pool, and of a slot in the task


class TooManySlots(WorkError):
    """A pass requests the values of more slots than fit."""


class Unreadable(RowsFailed):
    """The values of a task, which some rows of a pass request, cannot be read."""


@dataclass
class Counts:
    """Number of requested slots that were present, and that had to be read."""

    hits: int = 0
    misses: int = 0


class PagedPool(Pool):
    """A pool with space for the values of only some of its slots. It cannot be used for joint learning, which trains
    over the values of all tasks.

    Pools derived from one another share buffers and pages, unless the rank or the modules of their tasks change.
    """

    def __init__(
        self, tasks: Sequence[LearnedTask], device: torch.device, dtype: torch.dtype, *, capacity: int
    ) -> None:
        """capacity: number of rows of the buffers."""
        tasks = in_name_order(tasks)
        self._follow(tasks, _Pages(Buffers(tasks, capacity, device, dtype)))

    def with_task(self, task: LearnedTask) -> PagedPool:
        if task.name in self.place:
            raise InputError(f"task {task.name!r}: the pool has it already")
        i = bisect(self.names, task.name)
        return self._with([*self.tasks[:i], task, *self.tasks[i:]])

    def without(self, name: str) -> PagedPool:
        if name not in self.place:
            raise InputError(f"task {name!r}: the pool does not have it; tasks: {some_of(self.names)}")
        return self._with([task for task in self.tasks if task.name != name])

    def _with(self, tasks: list[LearnedTask]) -> PagedPool:
        buffers = self._buffers
        if not buffers.suit(tasks):
            return PagedPool(tasks, buffers.device, buffers.dtype, capacity=buffers.capacity)
        pool = PagedPool.__new__(PagedPool)
        pool._follow(tasks, self._pages)
        return pool

    def _follow(self, tasks: list[LearnedTask], pages: _Pages) -> None:
        buffers = pages.buffers
        self._know(tasks, buffers)
        self._pages, self.values = pages, buffers.values
        self._place: list[Place] = [(i, slot) for i, task in enumerate(tasks) for slot in range(task.slots)]
        self._page = max((rows_of(task, buffers.page) // task.slots for task in tasks), default=1)

    @property
    def capacity(self) -> int:
        """Number of rows of the buffers."""
        return self._buffers.capacity

    @property
    def most_slots(self) -> int:
        """Number of slots that any pass may request."""
        return self.capacity // self._page

    @property
    def counts(self) -> Counts:
        return self._pages.counts

    def parts(self, route: Route) -> list[list[int]]:
        """Rows with the same slots stay together, so that each slot is read once. Those whose values are present come
        first, before values that are read replace them."""
        asked = [sorted({slot for slot in row if slot >= 0}) for row in route.slot_ids.tolist()]
        slots = sorted({slot for row in asked for slot in row})
        held = self._pages.held([(self.tasks[i], slot) for i, slot in map(self._place.__getitem__, slots)])
        there = dict(zip(slots, held, strict=True))
        order = sorted(range(len(asked)), key=lambda row: (not all(there[slot] for slot in asked[row]), asked[row]))
        parts: list[list[int]] = []
        together: set[int] = set()
        for row in order:
            if not parts or len(together.union(asked[row])) > self.most_slots:
                parts.append([])
                together = set()
            parts[-1].append(row)
            together.update(asked[row])
        return parts

    def rows(self, route: Route) -> Route:
        """The route with rows of `values` instead of slot ids. Waits for the device.

        Raises:
            TooManySlots: the route has more slots than fit.
            Unreadable: a task's file is damaged.
        """
        slots, place = route.slot_ids.unique(return_inverse=True)  # [U] ascending, [B, K]
        known = [slot for slot in slots.tolist() if slot >= 0]
        try:
            pages = self._pages.of([(self.tasks[i], slot) for i, slot in map(self._place.__getitem__, known)])
        except _Damaged as error:
            slot = known[error.number]
            asking = (route.slot_ids == slot).any(1).nonzero()[:, 0].tolist()
            raise Unreadable(f"task {self.slot_names[slot]!r}: {error}", asking, len(route.weights)) from None
        found = [[-1] * self._page] * (len(slots) - len(known)) + [
            page + [-1] * (self._page - len(page)) for page in pages
        ]
        rows = torch.tensor(found, device=place.device)[place]  # [B, K, page]
        return Route(rows.flatten(1), route.weights.repeat_interleave(self._page, 1))


class _Damaged(WorkError):
    """The requested page of index `number` cannot be read."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class _Pages:
    """Which rows of the buffers hold which slots' values."""

    def __init__(self, buffers: Buffers) -> None:
        self.buffers, self.counts = buffers, Counts()
        self._free = list(range(buffers.capacity))
        # By id of the task (kept alive here) and index of the slot, least recently used first.
        self._held: OrderedDict[tuple[int, int], tuple[LearnedTask, list[int]]] = OrderedDict()
        self._lock = threading.Lock()

    def held(self, slots: Sequence[tuple[LearnedTask, int]]) -> list[bool]:
        """Whether these slots' values are present."""
        with self._lock:
            return [(id(task), slot) in self._held for task, slot in slots]

    def of(self, slots: Sequence[tuple[LearnedTask, int]]) -> list[list[int]]:
        """The rows of these slots' values, after reading those that are missing."""
        page = self.buffers.page
        sizes = [rows_of(task, page) // task.slots for task, _ in slots]
        if sum(sizes) > self.buffers.capacity:
            one = self.buffers.row_bytes
            raise TooManySlots(
                f"device_memory: the tasks of one batch take {sum(sizes) * one} bytes, there is room for "
                f"{self.buffers.bytes}; pass fewer rows at once"
            )
        with self._lock:
            for task, slot in slots:
                if (id(task), slot) in self._held:
                    self._held.move_to_end((id(task), slot))
            return [self._rows(i, *slots[i], sizes[i]) for i in range(len(slots))]

    def _rows(self, number: int, task: LearnedTask, slot: int, size: int) -> list[int]:
        found = self._held.get((id(task), slot))
        if found is not None:
            self.counts.hits += 1
            return found[1]
        self.counts.misses += 1
        while len(self._free) < size:
            _, (_, rows) = self._held.popitem(last=False)
            self._free += rows
        rows, rest = self._free[:size], self._free[size:]
        try:
            self.buffers.write_slot(task, slot, rows)
        except WorkError as error:
            raise _Damaged(str(error), number) from None
        self._free = rest
        self._held[id(task), slot] = task, rows
        return rows


def pool_of(
    tasks: Sequence[LearnedTask], device: torch.device, dtype: torch.dtype, budget: int | None = None, k: int = 1
) -> Pool:
    """A pool of these tasks' values, paged if they take more than `budget` bytes. k: number of slots in a route.

    Raises:
        InputError: the budget is too small for the route of one row.
    """
    one = _row_bytes(tasks, device, dtype)
    if budget is None or _rows(tasks) * one <= budget:
        return Pool(tasks, device, dtype)
    least = _least_rows(tasks, k) * one
    if budget < least:
        raise InputError(f"device_memory: expected at least {least} bytes, for the slots of one row, got {budget}")
    return PagedPool(tasks, device, dtype, capacity=budget // one)


def within(pool: Pool, budget: int | None, k: int, before: Pool) -> Pool:
    """The pool or, if it exceeds the budget, a paged one, with space for at least one row's slots. A paged pool becomes
    a plain one again once its tasks take half of the budget, since buffers may double as they grow."""
    if budget is None or (not isinstance(pool, PagedPool) and pool.room <= budget):
        return pool
    tasks, device, dtype = pool.tasks, pool.device, pool.dtype
    one = _row_bytes(tasks, device, dtype)
    if isinstance(pool, PagedPool) and 2 * one * _rows(tasks) <= budget:
        return Pool(tasks, device, dtype)
    if pool.room <= budget and (pool.most_slots is None or pool.most_slots >= k):
        return pool
    least = _least_rows(tasks, k)
    capacity = max(budget // one, least)
    if budget < least * one and before.room <= budget:  # else it was said before
        taken = least * one
        warn(f"device_memory: the slots of one row take {taken} bytes, more than the {budget} given; they get them")
    if isinstance(pool, PagedPool) and pool.capacity == capacity:
        return pool
    return PagedPool(tasks, device, dtype, capacity=capacity)


def _rows(tasks: Sequence[LearnedTask]) -> int:
    """Rows of the values of all these tasks."""
    page = page_rank(tasks)
    return sum(rows_of(task, page) for task in tasks)


def _row_bytes(tasks: Sequence[LearnedTask], device: torch.device, dtype: torch.dtype) -> int:
    return Buffers(tasks, 1, device, dtype).row_bytes


def _least_rows(tasks: Sequence[LearnedTask], k: int) -> int:
    page = page_rank(tasks)
    return k * max(rows_of(task, page) // task.slots for task in tasks)
