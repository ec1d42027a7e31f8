"""The throughput of a replica with many tasks, and how long a row waits, from the costs of the parts.

Tasks are requested independently, with Zipf-distributed frequencies. The values of the `device` most recently used
tasks are on the device, those of the `host` most recently used ones in memory, the rest on disk. How often a row's
values are missing follows from Che's approximation (Che, Tung & Wang 2002; Fricker, Robert & Roberts 2012): a task is
cached if it was requested within the last T rows, where T is such that as many tasks are cached as there is room for.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Costs:
    """Seconds, for one replica.

    Attributes:
        batch: per pass, whatever its rows. row: per row of it. part: per part beyond the first, if a batch needs more
            tasks than there is room for.
        page: to copy a task's values from memory to the device. disk: to read them into memory first, in addition.
        keys: to route a batch, per key. scores: per key and row.
        request: per request, in addition to its row's answer, as seen by the client.
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
    """What is simulated.

    Attributes:
        tasks: number of tasks.
        exponent: of Zipf's law (0: uniform).
        device, host: tasks whose values fit on the device and in memory.
        rows: per batch, at most.
        keys: per task.
        replicas: each is asked for all tasks.
    """

    tasks: int
    exponent: float = 1.0
    device: int = 1 << 40
    host: int = 1 << 40
    rows: int = 128
    keys: int = 3
    replicas: int = 1


def shares(tasks: int, exponent: float) -> Numbers:
    """How often each task is requested, [tasks] float64, most frequent first; they sum to 1."""
    found: Numbers = np.arange(1, tasks + 1, dtype=np.float64) ** -exponent
    return found / found.sum()


def missed(share: Numbers, room: int) -> float:
    """The share of rows whose task is not among the `room` most recently used ones, by Che's approximation."""
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
    """Expected number of distinct tasks among `rows` rows."""
    return float(-np.expm1(rows * np.log1p(-share)).sum()) if len(share) > 1 else 1.0


def seconds_of(costs: Costs, setting: Setting, rows: int, pages: float, disk: float, tasks: float) -> float:
    """Seconds of a pass over `rows` rows of `tasks` tasks: `pages` are not on the device, `disk` of these not in
    memory."""
    keys = setting.tasks * setting.keys
    parts = max(1, -(-round(tasks) // max(1, setting.device)))
    passing = costs.batch + costs.row * rows + costs.part * (parts - 1)
    return passing + costs.page * pages + costs.disk * disk + keys * (costs.keys + costs.scores * rows)


def rate(costs: Costs, setting: Setting) -> float:
    """Rows per second of all replicas with full batches."""
    share, rows = shares(setting.tasks, setting.exponent), setting.rows
    pages, disk = (rows * missed(share, room) for room in (setting.device, max(setting.host, setting.device)))
    return setting.replicas * rows / seconds_of(costs, setting, rows, pages, disk, distinct(share, rows))


class Recent:
    """The most recently used tasks, as many as there is room for."""

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
    """Seconds from a row's arrival to its answer, [count] float64, in one of the replicas, with one row per request.

    Rows arrive independently at random, at `load` times the rate at which full batches could be answered. An idle
    replica takes the rows that wait, at most one batch (one event per batch, with exact caches).
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
