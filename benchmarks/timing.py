"""Timing of alternatives side by side, and the machine's own limits to hold them against.

Candidates are called in turns, round after round, so that a slow moment of the machine meets them all. What is reported
is the 20th, 50th and 80th percentile over calls; ratios are of medians within one run. A call during which the kernel
gave one of our cores to somebody else is left out, for every candidate alike, as long as five undisturbed ones remain.
"""

from __future__ import annotations

import csv
import functools
import os
import random
import resource
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.machine import describe

Result = TypeVar("Result")
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call."""

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
    """Calls the candidates in turns until each has had about `seconds`, and `least` calls at the least.

    A turn is a call that is not counted, which finds the caches and threads as another candidate left them, and calls
    for 10 ms. The order of turns is random. Those `apart` have threads of their own: before and after them all threads,
    which wait for more work by spinning, come to rest.
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
    """Whether the kernel gave our core to somebody else meanwhile, and the seconds that the call took."""
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
    """(of the whole machine, of this process) so far."""
    own = os.times()
    stat = Path("/proc/stat")
    if not stat.exists():
        return own.user + own.system, own.user + own.system
    user, nice, system, _idle, _wait, irq, soft, steal = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK"), own.user + own.system


class Others:
    """The share of the machine's processor time that other processes take inside the block."""

    share = 0.0

    def __enter__(self) -> Others:
        self._began, self._before = time.perf_counter(), _processor_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        after, cores = _processor_seconds(), os.cpu_count() or 1
        others = (after[0] - self._before[0]) - (after[1] - self._before[1])
        self.share = max(0.0, others / (cores * (time.perf_counter() - self._began)))


def undisturbed(measure: Callable[[], Result], *, patience: float) -> tuple[Result, float]:
    """measure()'s result on a machine that others leave alone, and their share of it.

    Waits for quiet and tries again for up to `patience` seconds; then the quietest try counts.
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


# ---- floors ----


def _fastest(call: Callable[[], object], rounds: int = 60) -> float:
    """Seconds of the fastest call: a limit is what the machine can do, not what it does on average."""
    fastest = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


@functools.cache
def gemm_rate(dtype: torch.dtype) -> float:
    """flop/s of a large matrix product: the faster of MKL's and oneDNN's where torch can reach both."""
    x, weight = torch.randn(4096, 768, dtype=dtype), torch.randn(768, 768, dtype=dtype)
    candidates: dict[str, Callable[[], object]] = {"linear": lambda: torch.nn.functional.linear(x, weight)}
    if dtype == torch.float32 and torch.backends.mkldnn.is_available():
        onednn = torch.ops.mkldnn._linear_pointwise
        candidates["onednn"] = lambda: onednn(x, weight, None, "none", [], "")
    return 2.0 * 4096 * 768 * 768 / min(_fastest(call) for call in candidates.values())


@functools.cache
def bandwidth(megabytes: int) -> float:
    """bytes/s of reading a buffer of this size again and again: a cache's where it fits one, else the memory's."""
    buffer = torch.ones(megabytes << 18)
    return (megabytes << 20) / _fastest(lambda: buffer.sum())


def floor_ms(flops: float, moved: float, dtype: torch.dtype) -> float:
    """The larger of the arithmetic at the measured GEMM rate and of moving the bytes at the measured bandwidth."""
    size = next((m for m in (1, 4, 16, 64) if m << 20 >= moved), 256)
    return 1e3 * max(flops / gemm_rate(dtype), moved / bandwidth(size))


# ---- results ----


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]], notes: Mapping[str, str] | None = None) -> None:
    """Rows under a head that says what they were measured on, and `notes` ({name: value}) that belong to them."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        measured = {"threads": str(torch.get_num_threads()), "date": time.strftime("%Y-%m-%d")}
        for name, value in (describe() | measured | dict(notes or {})).items():
            file.write(f"# {name}: {value}\n")
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def read_head(path: Path) -> dict[str, str]:
    """What the CSV's head says: {name: value}."""
    with path.open() as file:
        lines = [line[2:].rstrip("\n").split(": ", 1) for line in file if line.startswith("# ")]
    return dict(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a text table."""
    names = list(rows[0])
    cells = [names, *([str(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
