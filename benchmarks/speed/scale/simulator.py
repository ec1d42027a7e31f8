"""What a replica of many tasks answers in a second, and how long a row waits, from what its parts cost.

Tasks are asked for independently, with frequencies as Zipf's law has them. Values of `device` tasks lie on the device
and those of `host` in the memory beside it, both those used last; the rest are on disk. How often the values of a row's
task are not there follows from Che's approximation (Che, Tung & Wang 2002; Fricker, Robert & Roberts 2012): a task is
there if it was asked for within the last T rows, and T is what makes as many tasks be there as there is room for.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Costs:
    """Seconds of one replica.

    Attributes:
        batch: of a pass, whatever its rows. row: of each of its rows. part: of each part beyond the first, where a
            batch needs more tasks than there is room for.
        page: a task's values copied from the memory to the device. disk: read from there before, beside that.
        keys: of routing a batch, for each key. scores: for each key and row.
        request: of a request, beside its row's answer, that the row's client waits for.
    """

    batch: float
    row: float
    part: float
    page: float
    disk: float
    keys: float
    scores: float
    request: float = 0.0


@dataclass(frozen=True)
class Setting:
    """Tasks, their keys each, the exponent of Zipf's law (0: all alike), how many tasks' values fit the device and the
    memory beside it, rows of a batch at the most, and replicas, each of which is asked for all tasks."""

    tasks: int
    exponent: float = 1.0
    device: int = 1 << 40
    host: int = 1 << 40
    rows: int = 128
    keys: int = 3
    replicas: int = 1


def shares(tasks: int, exponent: float) -> Numbers:
    """How often each task is asked for, [tasks] float64, the most frequent first; they sum to 1."""
    found: Numbers = np.arange(1, tasks + 1, dtype=np.float64) ** -exponent
    return found / found.sum()


def missed(share: Numbers, room: int) -> float:
    """The share of rows whose task is not among the `room` ones used last: Che's approximation."""
    if room >= len(share):
        return 0.0
    low, high = 0.0, 1.0
    while -np.expm1(-share * high).sum() < room:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if -np.expm1(-share * middle).sum() < room else (low, middle)
    return float((share * np.exp(-share * high)).sum())


def distinct(share: Numbers, rows: int) -> float:
    """How many tasks so many rows are of."""
    return float(-np.expm1(rows * np.log1p(-share)).sum()) if len(share) > 1 else 1.0


def seconds_of(costs: Costs, setting: Setting, rows: int, pages: float, disk: float, tasks: float) -> float:
    """Seconds of a pass of so many rows, of so many tasks, of which `pages` are not on the device and `disk` of these
    nowhere in memory."""
    keys = setting.tasks * setting.keys
    parts = max(1, -(-round(tasks) // max(1, setting.device)))
    passing = costs.batch + costs.row * rows + costs.part * (parts - 1)
    return passing + costs.page * pages + costs.disk * disk + keys * (costs.keys + costs.scores * rows)


def rate(costs: Costs, setting: Setting) -> float:
    """Rows a second of all replicas, whose batches are full."""
    share, rows = shares(setting.tasks, setting.exponent), setting.rows
    pages, disk = (rows * missed(share, room) for room in (setting.device, max(setting.host, setting.device)))
    return setting.replicas * rows / seconds_of(costs, setting, rows, pages, disk, distinct(share, rows))


class Recent:
    """The tasks used last, as many as there is room for."""

    def __init__(self, room: int) -> None:
        self.room, self._there = room, OrderedDict[int, None]()

    def ask(self, task: int) -> bool:
        """Whether the task was there; it is from then on."""
        found = task in self._there
        self._there[task] = None
        self._there.move_to_end(task)
        if len(self._there) > self.room:
            self._there.popitem(last=False)
        return found


def waits(costs: Costs, setting: Setting, load: float, count: int = 20_000, seed: int = 0) -> Numbers:
    """Seconds from a row's arrival to its answer, [count] float64, in one of the replicas, each row a request.

    Rows arrive at random, independently of each other, `load` times as often as full batches could be answered. When
    the replica is idle it takes those that wait, at most a batch of them (an event a batch; caches as they are).
    """
    draw = np.random.default_rng(seed)
    share = shares(setting.tasks, setting.exponent)
    edges = np.cumsum(share)
    device, host = (Recent(min(room, setting.tasks)) for room in (setting.device, max(setting.host, setting.device)))
    before = [*range(host.room - 1, -1, -1), *np.searchsorted(edges, draw.random(4 * host.room) * edges[-1]).tolist()]
    for task in before:
        device.ask(task)
        host.ask(task)
    arrivals = np.cumsum(draw.exponential(setting.replicas / (load * rate(costs, setting)), count))
    tasks = np.searchsorted(edges, draw.random(count) * edges[-1]).tolist()
    found, free, first = np.empty(count), 0.0, 0
    while first < count:
        free = max(free, float(arrivals[first]))
        last = min(int(np.searchsorted(arrivals, free, side="right")), first + setting.rows)
        asked = set(tasks[first:last])
        there = [(device.ask(task), host.ask(task)) for task in asked]
        pages, disk = sum(not one for one, _ in there), sum(not one for _, one in there)
        free += seconds_of(costs, setting, last - first, pages, disk, len(asked))
        found[first:last] = free - arrivals[first:last] + costs.request
        first = last
    return found
