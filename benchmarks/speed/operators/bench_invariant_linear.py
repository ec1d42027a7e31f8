"""invariant_linear against its alternatives, on a CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.operators.bench_invariant_linear

The keys of several tasks: their means, of D elements, times a [D, D] inverse. A task's result must have the same bits
whatever other tasks are computed with it. A product for each task fulfils this (in blocks: all tasks' products with one
block of the inverse at a time, which stays in the caches), and so does one for each row (up to 64 rows, since it reads
the inverse for each). `one product` does not: it is there as a bound. `to_best_alternative` is the ratio to the best
that does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.operators.command import Ways, measure, run, times_of
from benchmarks.speed.roofline import floor_ms
from slm_fast import ops
from slm_fast.ops.invariant_linear import invariant_linear

BOUND = "one product"
BLOCK = 256
MOST_ROWS = 64  # for a product for each row


@dataclass(frozen=True)
class Shape:
    """The keys of `tasks` tasks of M means of width D."""

    tasks: int
    M: int = 3
    D: int = 3200


SHAPES = [Shape(1), Shape(1, M=10), Shape(10), Shape(64), Shape(64, M=10)]


def in_blocks(tasks: Sequence[Tensor], inverse: Tensor) -> list[Tensor]:
    found = [torch.empty_like(rows) for rows in tasks]
    for begin in range(0, len(inverse), BLOCK):
        block = inverse[begin : begin + BLOCK].T
        for rows, y in zip(tasks, found, strict=True):
            y[:, begin : begin + BLOCK] = rows @ block
    return found


def candidates(shape: Shape) -> Ways:
    torch.manual_seed(0)
    rows = torch.randn(shape.tasks * shape.M, shape.D, dtype=torch.float64)
    inverse = torch.randn(shape.D, shape.D, dtype=torch.float64)
    tasks = rows.split(shape.M)

    def reference() -> Tensor:
        with ops.use_backend("reference"):
            return invariant_linear(rows, inverse)

    ways: Ways = {
        "native": lambda: invariant_linear(rows, inverse),
        "each task, in blocks": lambda: torch.cat(in_blocks(tasks, inverse)),
        "each task": lambda: torch.cat([own @ inverse.T for own in tasks]),
        BOUND: lambda: rows @ inverse.T,
    }
    return ways | {"each row": reference} if len(rows) <= MOST_ROWS else ways


def lines(shape: Shape, options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = shape.tasks * shape.M
    low = floor_ms(2.0 * rows * shape.D**2, 8 * shape.D * (shape.D + 2 * rows), torch.float64)
    times, others_share = measure(candidates(shape), options)
    best = min(t.p50 for name, t in times.items() if name not in ("native", BOUND))
    return [
        {
            "way": name,
            "tasks": shape.tasks, "M": shape.M, "D": shape.D,
            **times_of(t, best, low),
            "other_load": f"{others_share:.2f}",
        }
        for name, t in times.items()
    ]  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    return run(__doc__, "invariant_linear", SHAPES, [], lines, None, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
