"""The pool: the slots of all tasks, on the device."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from slm_fast.errors import InputError, some_of
from slm_fast.heads import Heads
from slm_fast.layers import Values
from slm_fast.memory import zeros
from slm_fast.ops import Route
from slm_fast.tasks import LearnedTask, MappedValues, in_name_order


class Pool:
    """Values and heads of the given tasks. Slots are numbered in the order of the tasks' names.

    A pool does not change. `with_task` and `without` return another one that shares its buffers, at the cost of that
    one task's values (and of lists and two tensors as long as the number of slots). So a slot's values need not be in
    the row of its id: `rows` tells where. Rows become free once no pool that uses them is held.

    An imported task may have a larger rank than the others. Its slot then takes several rows, each a page of its rank,
    all with the slot's weight. A module that a task does not adapt has zeros in the task's rows.

    Attributes:
        slot_task: [P] int64, index in `tasks` of each slot's task.
        row_of_slot: [P + 1] or, with pages, [P + 1, pages] int64, rows of each slot's values, -1 for no more. The last
            entry is -1, so that slot -1 has row -1.
        values: module name -> (lora_a [rows, r, I], lora_b [rows, r, O]) in the backbone's dtype. Smaller ranks are
            padded with zeros.
    """

    def __init__(
        self, tasks: Sequence[LearnedTask], device: torch.device, dtype: torch.dtype, *, capacity: int = 0
    ) -> None:
        """Create a pool whose slots have their ids as rows, in buffers of at least `capacity` rows and 1/64 more than
        needed, so that learning the first task does not move everything."""
        tasks = in_name_order(tasks)
        page = page_rank(tasks)
        rows = sum(rows_of(task, page) for task in tasks)
        buffers = Buffers(tasks, max(capacity, rows + rows // 64), device, dtype)
        slots = iter(range(buffers.capacity))
        ids = [list(islice(slots, rows_of(task, page))) for task in tasks]
        self._hold(tasks, buffers.write(tasks, ids), buffers)

    def with_task(self, task: LearnedTask) -> Pool:
        """A pool with one more task.

        If the task has a larger rank than the others, or no row is free, all values are moved to new buffers, with room
        for twice as many slots. This is rare, and does not affect answers.

        Raises:
            InputError: the name is taken.
        """
        if task.name in self.place:
            raise InputError(f"task {task.name!r}: the pool has it already")
        i = bisect(self.names, task.name)
        tasks = [*self.tasks[:i], task, *self.tasks[i:]]
        rows = self._buffers.free(rows_of(task, self._buffers.page))
        if rows is None or not self._buffers.suit(tasks):
            return self._laid_out_anew(tasks)
        held = [*self._held[:i], *self._buffers.write([task], [rows]), *self._held[i:]]
        return self._sharing(tasks, held)

    def without(self, name: str) -> Pool:
        """A pool with one task less.

        If it was the last one of the largest rank, or less than a quarter of the buffers is used, all values are moved
        to new ones: a product's last bits may depend on the rank, and memory is freed.

        Raises:
            InputError: there is no task of this name.
        """
        if name not in self.place:
            raise InputError(f"task {name!r}: the pool does not have it; tasks: {some_of(self.names)}")
        i = self.place[name]
        tasks = self.tasks[:i] + self.tasks[i + 1 :]
        rows = sum(rows_of(task, self._buffers.page) for task in tasks)
        if 4 * rows < self._buffers.capacity or not self._buffers.suit(tasks):
            return self._laid_out_anew(tasks)
        return self._sharing(tasks, self._held[:i] + self._held[i + 1 :])

    def _laid_out_anew(self, tasks: list[LearnedTask]) -> Pool:
        rows = sum(rows_of(task, page_rank(tasks)) for task in tasks)
        return Pool(tasks, self._buffers.device, self._buffers.dtype, capacity=2 * rows)

    def _sharing(self, tasks: list[LearnedTask], held: list[_Rows]) -> Pool:
        pool = Pool.__new__(Pool)
        pool._hold(tasks, held, self._buffers)
        return pool

    def _know(self, tasks: list[LearnedTask], buffers: Buffers) -> None:
        """Set everything except where the values are."""
        self.tasks, self._buffers = tasks, buffers
        self.device, self.dtype = buffers.device, buffers.dtype
        self.names = [task.name for task in tasks]
        self.place = {name: i for i, name in enumerate(self.names)}
        owner = [i for i, task in enumerate(tasks) for _ in range(task.slots)]
        self.slot_names = [self.names[i] for i in owner]  # task of each slot
        self.slot_task = torch.tensor(owner, dtype=torch.int64, device=self.device)
        imported = [tasks[i].adapter is not None for i in owner]
        self.imported = torch.tensor([*imported, False], device=self.device) if any(imported) else None
        self.ahead: bool | None = None  # `AdaptedModel.ahead` for these tasks, once known

    def _hold(self, tasks: list[LearnedTask], held: list[_Rows], buffers: Buffers) -> None:
        self._know(tasks, buffers)
        rows = [row for own in held for row in own.ids]
        own_pages = [len(own.ids) // task.slots for task, own in zip(tasks, held, strict=True)]
        pages = max(own_pages, default=1)
        placed = [
            own.ids[at : at + count] + [-1] * (pages - count)
            for own, count in zip(held, own_pages, strict=True)
            for at in range(0, len(own.ids), count)
        ]
        row_of_slot = torch.tensor([*placed, [-1] * pages], device=buffers.device)
        self.row_of_slot = row_of_slot[:, 0] if pages == 1 else row_of_slot
        # Views, so that passes with this pool find its values unmoved, whatever is learned meanwhile.
        used = max(rows, default=-1) + 1
        self.values: Values = {module: (a[:used], b[:used]) for module, (a, b) in buffers.values.items()}
        self._held = held

    @property
    def slots(self) -> int:
        return len(self.slot_task)

    @property
    def room(self) -> int:
        """Bytes of the buffers."""
        return self._buffers.bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self._buffers.row_bytes

    @property
    def most_slots(self) -> int | None:
        """Number of slots that any pass may request; None: all."""
        return None

    def parts(self, route: Route) -> list[list[int]]:
        """Row numbers of the route, in groups that can pass together."""
        return [list(range(len(route.slot_ids)))]

    @cached_property
    @torch.inference_mode(False)
    def heads(self) -> Heads | None:
        """All tasks' heads, if any. They are combined on first use, since the order of all tasks' words decides ties.
        For 2,000 tasks of four labels and 768 features that copies 25 MB."""
        return Heads.of(self.tasks, self.device) if any(task.head for task in self.tasks) else None

    def heads_for(self, route: Route) -> Heads | None:
        """Heads for the rows of a route [B, K]: on a CPU with more than MANY_LABELS labels, those of its tasks
        alone."""
        heads = self.heads
        if heads is None or self.device.type != "cpu" or len(heads.bias) <= MANY_LABELS:
            return heads
        return heads.only(self.slot_task[route.slot_ids.clamp(min=0)].unique())

    def rows(self, route: Route) -> Route:
        """The route with rows of `values` instead of slot ids, for the adapted layers. Does not wait for the device."""
        rows = self.row_of_slot[route.slot_ids]
        if rows.dim() == 2:
            return Route(rows, route.weights)
        return Route(rows.flatten(1), route.weights.repeat_interleave(rows.shape[2], 1))

    def settled(self, route: Route) -> Route:
        """Final form of a router's route: an imported task gets all of the weight if it is first, else none."""
        if self.imported is None:
            return route
        imported = self.imported[route.slot_ids]  # [B, K]; False for slot -1
        first = torch.arange(imported.shape[1], device=imported.device) == 0
        kept = torch.where(imported[:, :1], first, ~imported)
        weights = route.weights * kept
        total = weights.sum(1, keepdim=True)
        weights = torch.where(imported[:, :1], first.float(), weights / total.clamp(min=1e-30))
        weights = torch.where(kept.all(1, keepdim=True), route.weights, weights)  # bit-identical if nothing is removed
        return Route(route.slot_ids.masked_fill(~kept, -1), weights)

    def slots_of(self, name: str) -> Tensor:
        """[P] bool: slots of one task."""
        return self.slot_task == self.place[name]

    def task_weights(self, route: Route) -> Tensor:
        """A route's weights summed over each task's slots, p(t) of each row: [B, tasks] float32."""
        weights = torch.zeros(len(route.slot_ids), len(self.tasks), device=route.weights.device)
        return weights.scatter_add_(1, self.slot_task[route.slot_ids.clamp(min=0)], route.weights)


PAGE = 8  # rank of a page, if no learned task has a larger one
MANY_LABELS = 1024  # above this only the heads needed are multiplied; below, selecting them takes longer


def page_rank(tasks: Sequence[LearnedTask]) -> int:
    """Rank of a row of values: the largest of the learned tasks. Larger ranks of imported tasks are split into
    pages."""
    learned = max((task.rank for task in tasks if task.adapter is None), default=0)
    imported = max((task.rank for task in tasks if task.adapter is not None), default=0)
    return max(learned, min(imported, PAGE))


def rows_of(task: LearnedTask, page: int) -> int:
    """Number of rows that a task's values take."""
    return task.slots * -(-task.rank // page) if task.adapter is not None and page else task.slots


class _Rows:
    """The rows of a task's values. They are taken while this object exists."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids


class Buffers:
    """Space for `capacity` rows of values, with the rank `page` that suits the tasks they are created for.

    They are shared by pools derived from one another. Only weak references say which rows are taken, so a row is free
    as soon as no pool uses it, and a change that fails half-way needs no undoing.
    """

    @torch.inference_mode(False)  # inference tensors could not be written to outside of it
    def __init__(self, tasks: Sequence[LearnedTask], capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        widths = {module: pair for task in tasks for module, pair in task.shape.widths.items()}
        page = self.page = page_rank(tasks)
        self.capacity, self.device, self.dtype = capacity, device, dtype
        self.values = {
            module: (
                zeros(capacity, page, features_in, device=device, dtype=dtype),
                zeros(capacity, page, features_out, device=device, dtype=dtype),
            )
            for module, (features_in, features_out) in widths.items()
        }
        self._arrays = device.type == "cpu" and dtype == torch.float32
        # Through NumPy's views a slot is written in half to two thirds of the time.
        self._writable = {
            module: tuple(half.numpy() if self._arrays else half for half in pair)
            for module, pair in self.values.items()
        }
        self.row_bytes = page * sum(map(sum, widths.values())) * dtype.itemsize
        self.bytes = capacity * self.row_bytes
        self.taken: WeakSet[_Rows] = WeakSet()

    def free(self, count: int) -> list[int] | None:
        """The lowest free rows; None if there are too few."""
        taken = {row for rows in self.taken for row in rows.ids}
        rows = list(islice((row for row in range(self.capacity) if row not in taken), count))
        return rows if len(rows) == count else None

    def suit(self, tasks: Sequence[LearnedTask]) -> bool:
        """Whether these tasks need rows of this rank, for these modules."""
        modules = {module for task in tasks for module in task.values}
        return page_rank(tasks) == self.page and modules == self.values.keys()

    @torch.no_grad()
    def write(self, tasks: Sequence[LearnedTask], ids: Sequence[list[int]]) -> list[_Rows]:
        """Take rows for each of the tasks and fill them, overwriting their contents."""
        held = [_Rows(own) for own in ids]
        self.taken.update(held)
        if self._arrays:
            for task, rows in zip(tasks, ids, strict=True):
                size = len(rows) // task.slots
                for slot in range(task.slots):
                    self.write_slot(task, slot, rows[slot * size : (slot + 1) * size])
            return held
        index = torch.tensor([row for own in ids for row in own], dtype=torch.int64, device=self.device)
        for module, pair in self.values.items():
            given = [task.values.get(module) for task in tasks]
            for which, buffer in enumerate(pair):
                parts = [
                    self._in_rows(buffer, own and own[which], task.slots, len(rows))
                    for task, own, rows in zip(tasks, given, ids, strict=True)
                ]
                buffer[index] = torch.cat(parts).to(device=self.device, dtype=self.dtype)
        for task in tasks:
            _unmap(task)
        return held

    @torch.no_grad()
    def write_slot(self, task: LearnedTask, slot: int, rows: Sequence[int]) -> None:
        """Fill these rows with one of a task's slots. Raises WorkError if its file is damaged."""
        for module, pair in self._writable.items():
            for buffer, half in zip(pair, self._halves(task, module, slot), strict=True):
                for i, row in enumerate(rows):
                    room = buffer[row]
                    part = half[i * self.page : (i + 1) * self.page]
                    if len(part):
                        room[: len(part)] = part
                    if len(part) < self.page:
                        room[len(part) :] = 0
        _unmap(task)

    def _halves(self, task: LearnedTask, module: str, slot: int) -> Sequence[Any]:
        """A slot's values of a module, [r, F] each, as what `_writable` is made of; without rows if it has none."""
        if module not in task.shape.widths:
            return [()] * 2
        if self._arrays and isinstance(task.values, MappedValues):
            return [half[slot] for half in task.values.arrays(module)]
        return [half[slot].numpy() if self._arrays else half[slot] for half in task.values[module]]

    def _in_rows(self, buffer: Tensor, half: Tensor | None, slots: int, rows: int) -> Tensor:
        """One half of a task's values for a module, [slots, r, F], as rows of its buffer, [rows, page, F]; zeros if it
        has none."""
        if half is None:
            return torch.zeros(rows, *buffer.shape[1:])
        whole = rows // slots * self.page
        if whole != half.shape[1]:
            half = nn.functional.pad(half, (0, 0, 0, whole - half.shape[1]))
        return half.reshape(rows, self.page, half.shape[2])


def _unmap(task: LearnedTask) -> None:
    """After a task's values were copied."""
    if isinstance(task.values, MappedValues):
        task.values.unmap()


def emptied(route: Route, rows: Tensor) -> Route:
    """The route without slots for some rows, given as [B] bool, which the bare backbone then answers."""
    return Route(route.slot_ids.masked_fill(rows[:, None], -1), route.weights.masked_fill(rows[:, None], 0.0))
