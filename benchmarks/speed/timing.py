"""Side-by-side timing of alternatives.

Candidates are called in turns, round after round, so that a slow moment of the machine affects all of them. Results are
the 20th, 50th and 80th percentile over calls; ratios are of medians within one run. Calls during which the kernel gave
one of our cores to another process are left out, for every candidate, as long as five undisturbed ones remain.
"""

from __future__ import annotations

import os
import random
import resource
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class Times:
    """Milliseconds per call."""

    p20: float
    p50: float
    p80: float


def time_together(
    candidates: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    least: int = 5,
    most: int = 400,
    apart: Collection[str] = (),
) -> dict[str, Times]:
    """Call the candidates in turns until each has had about `seconds` and at least `least` calls.

    A turn is one uncounted call (the previous candidate has left its own state in caches and threads), then calls for
    10 ms. The order of turns is random. Candidates in `apart` have threads of their own: a pause before and after them
    lets all threads, which spin while they wait for work, come to rest.
    """
    order, last = random.Random(0), ""
    calls: dict[str, list[tuple[bool, float]]] = {name: [] for name in candidates}
    spent = dict.fromkeys(candidates, 0.0)
    for call in candidates.values():
        call()
    waiting = list(candidates)
    while waiting:
        order.shuffle(waiting)
        for name in waiting:
            if last and (name in apart or last in apart):
                time.sleep(0.02)
            last = name
            if not spent[name] or spent[name] / len(calls[name]) < 0.1:
                candidates[name]()
            until = spent[name] + 0.01
            while spent[name] < until and len(calls[name]) < most:
                disturbed, took = _timed(candidates[name])
                calls[name].append((disturbed, took * 1e3))
                spent[name] += took
        waiting = [n for n in waiting if len(calls[n]) < least or (len(calls[n]) < most and spent[n] < seconds)]
    return {name: _undisturbed(timed) for name, timed in calls.items()}


def _timed(call: Callable[[], object]) -> tuple[bool, float]:
    """Whether the kernel gave our core to another process meanwhile, and the seconds of the call."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    start = time.perf_counter()
    call()
    took = time.perf_counter() - start
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw != before, took


def _undisturbed(calls: list[tuple[bool, float]]) -> Times:
    quiet = [milliseconds for disturbed, milliseconds in calls if not disturbed]
    return percentiles(quiet if len(quiet) >= 5 else [milliseconds for _, milliseconds in calls])


def percentiles(milliseconds: list[float]) -> Times:
    ordered = sorted(milliseconds)
    p20, p50, p80 = (ordered[int(share * (len(ordered) - 1))] for share in (0.2, 0.5, 0.8))
    return Times(p20, p50, p80)


def _processor_seconds() -> tuple[float, float]:
    """CPU seconds so far (of the whole machine, of this process)."""
    own = os.times()
    stat = Path("/proc/stat")
    if not stat.exists():
        return own.user + own.system, own.user + own.system
    user, nice, system, _idle, _wait, irq, soft, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK"), own.user + own.system


class Others:
    """The share of the machine's CPU time that other processes use inside the block."""

    share = 0.0

    def __enter__(self) -> Others:
        self._began, self._before = time.perf_counter(), _processor_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        after, cores = _processor_seconds(), os.cpu_count() or 1
        others = (after[0] - self._before[0]) - (after[1] - self._before[1])
        self.share = max(0.0, others / (cores * (time.perf_counter() - self._began)))


def undisturbed(measure: Callable[[], Result], *, patience: float) -> tuple[Result, float]:
    """The result of `measure` on a machine that other processes leave alone, and their share of it.

    Waits for an idle machine and retries for up to `patience` seconds; then the least disturbed try counts.
    """
    best: tuple[Result, float] | None = None
    began = time.perf_counter()
    while best is None or (best[1] > 0.05 and time.perf_counter() - began < patience):
        while time.perf_counter() - began < patience:
            with Others() as waiting:
                time.sleep(0.5)
            if waiting.share < 0.05:
                break
        with Others() as during:
            result = measure()
        if best is None or during.share < best[1]:
            best = result, during.share
    return best
