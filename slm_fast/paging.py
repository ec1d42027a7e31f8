"""Values of more tasks than fit the device: those used last are there, the others lie in their files.

A page is what a slot's values take of the pool's buffers. A pass asks for the pages of its routes (`rows`); those that
are not there are read from the tasks' files (mapped: the kernel keeps what it has room for) over those that were not
used for longest. What is answered does not show it, as the same numbers enter the same products; but rows of a batch
that passes in parts (`parts`) have others beside them, which the last bits of a score may show.
"""

from __future__ import annotations

import threading
from bisect import bisect
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from slm_fast.errors import InputError, WorkError, some_of
from slm_fast.ops import Route
from slm_fast.pool import Buffers, Pool, page_rank, rows_of
from slm_fast.tasks import LearnedTask, in_name_order

Place = tuple[int, int]  # the place of a task in a pool, and of a slot in the task


class TooManySlots(WorkError):
    """A pass asks for the values of more slots than there is room for."""


class Unreadable(WorkError):
    """The values of a task cannot be read, which some `rows` of a pass ask for."""

    def __init__(self, message: str, rows: Sequence[int]) -> None:
        super().__init__(message)
        self.rows = rows


@dataclass
class Counts:
    """Slots that passes asked for and found, and those that were read."""

    hits: int = 0
    misses: int = 0


class PagedPool(Pool):
    """A pool that has room for the values of some of its slots. Joint learning, which trains over those of all tasks,
    needs one that has room for all.

    Pools that follow from one another share buffers and pages, unless the rank or the modules of their tasks change.
    """

    def __init__(
        self, tasks: Sequence[LearnedTask], device: torch.device, dtype: torch.dtype, *, capacity: int
    ) -> None:
        """capacity: how many rows the buffers have room for."""
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
        """Rows that the buffers have room for."""
        return self._buffers.capacity

    @property
    def most_slots(self) -> int:
        """How many slots a pass may ask for at least."""
        return self.capacity // self._page

    @property
    def counts(self) -> Counts:
        return self._pages.counts

    def parts(self, route: Route) -> list[list[int]]:
        """Rows of the same slots lie together, so that each slot is read once; those whose values are there come first,
        before what is read takes their places."""
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
        """The route with the rows of `values` in the place of slot ids. Waits for the device.

        Raises TooManySlots, or Unreadable where a task's file is damaged.
        """
        slots, place = route.slot_ids.unique(return_inverse=True)  # [U] in rising order, [B, K]
        known = [slot for slot in slots.tolist() if slot >= 0]
        try:
            pages = self._pages.of([(self.tasks[i], slot) for i, slot in map(self._place.__getitem__, known)])
        except _Damaged as error:
            slot = known[error.number]
            asking = (route.slot_ids == slot).any(1).nonzero()[:, 0].tolist()
            raise Unreadable(f"task {self.slot_names[slot]!r}: {error}", asking) from None
        found = [[-1] * self._page] * (len(slots) - len(known)) + [
            page + [-1] * (self._page - len(page)) for page in pages
        ]
        rows = torch.tensor(found, device=place.device)[place]  # [B, K, page]
        return Route(rows.flatten(1), route.weights.repeat_interleave(self._page, 1))


class _Damaged(WorkError):
    """The page of this `number` among those that are asked for cannot be read."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class _Pages:
    """Which slots' values lie in which rows of some buffers."""

    def __init__(self, buffers: Buffers) -> None:
        self.buffers, self.counts = buffers, Counts()
        self._free = list(range(buffers.capacity))
        # By the identity of a task, which is held, and the number of its slot; the last is the one used last.
        self._held: OrderedDict[tuple[int, int], tuple[LearnedTask, list[int]]] = OrderedDict()
        self._lock = threading.Lock()

    def held(self, slots: Sequence[tuple[LearnedTask, int]]) -> list[bool]:
        """Whether these slots' values are there."""
        with self._lock:
            return [(id(task), slot) in self._held for task, slot in slots]

    def of(self, slots: Sequence[tuple[LearnedTask, int]]) -> list[list[int]]:
        """The rows of these slots' values, which are all there then."""
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
    """A pool of these tasks' values, paged where they take more than `budget` bytes. k: slots of a route.

    Raises InputError for a budget that a single row's route may not fit.
    """
    page, one = page_rank(tasks), _row_bytes(tasks, device, dtype)
    if budget is None or sum(rows_of(task, page) for task in tasks) * one <= budget:
        return Pool(tasks, device, dtype)
    least = _least_rows(tasks, k) * one
    if budget < least:
        raise InputError(f"device_memory: expected at least {least} bytes, for the slots of one row, got {budget}")
    return PagedPool(tasks, device, dtype, capacity=budget // one)


def within(pool: Pool, budget: int | None, k: int) -> Pool:
    """The pool, or where it has outgrown the budget a paged one, which has room for one row's slots at least."""
    if budget is None or pool.room <= budget:
        return pool
    capacity = max(budget // _row_bytes(pool.tasks, pool.device, pool.dtype), _least_rows(pool.tasks, k))
    if isinstance(pool, PagedPool) and pool.capacity == capacity:
        return pool
    return PagedPool(pool.tasks, pool.device, pool.dtype, capacity=capacity)


def _row_bytes(tasks: Sequence[LearnedTask], device: torch.device, dtype: torch.dtype) -> int:
    return Buffers(tasks, 1, device, dtype).row_bytes


def _least_rows(tasks: Sequence[LearnedTask], k: int) -> int:
    page = page_rank(tasks)
    return k * max(rows_of(task, page) // task.slots for task in tasks)
