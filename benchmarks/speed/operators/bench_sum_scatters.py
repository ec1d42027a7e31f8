"""sum_scatters against its alternatives, on a CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.operators.bench_sum_scatters

The exact sum of the scatters of several tasks, as opening or verifying a store without a kept sum needs it. The
reference expands each task by float32 products and rounds its elements to the two planes. `int8 product` does the same
from torch's own product of eight-bit integers. `one product`, the float32 product of all tasks' directions at once, is
not exact: it is there as a bound. `to_best_alternative` is the ratio to the best that is exact.
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
from slm_fast.ops.sum_scatters import in_units, sum_scatters

BOUND = "one product"


@dataclass(frozen=True)
class Shape:
    """`tasks` tasks of R directions of D features."""

    tasks: int
    R: int = 240
    D: int = 3200


SHAPES = [Shape(1), Shape(8), Shape(32), Shape(32, R=50), Shape(32, D=1024)]


def candidates(shape: Shape) -> Ways:
    draw = torch.Generator().manual_seed(0)
    factor = torch.randint(-127, 128, (shape.tasks * shape.R, shape.D), generator=draw).to(torch.int8)
    rows = torch.full((shape.tasks,), shape.R)
    exponent = torch.randint(-14, -6, (shape.tasks, shape.D), generator=draw).to(torch.int8)
    diagonal = torch.rand(shape.tasks, shape.D, generator=draw)
    unit = exponent.double().exp2()
    upper = torch.ones(shape.D, shape.D, dtype=torch.bool).triu()

    def reference() -> tuple[Tensor, Tensor]:
        with ops.use_backend("reference"):
            return sum_scatters(factor, rows, exponent, diagonal)

    def integers() -> tuple[Tensor, Tensor]:
        planes = torch.zeros(2, shape.D * (shape.D + 1) // 2, dtype=torch.int64)
        for own, of_task, more in zip(factor.split(shape.R), unit, diagonal, strict=True):
            product = torch._int_mm(own.T.contiguous(), own).double().mul_(of_task).mul_(of_task[:, None])
            product.diagonal().add_(more)
            for plane, part in zip(planes, in_units(product[upper]), strict=True):
                plane += part
        return planes[0], planes[1]

    def product() -> Tensor:
        scaled = torch.cat([own * of_task for own, of_task in zip(factor.split(shape.R), unit.float(), strict=True)])
        return scaled.T @ scaled

    return {
        "native": lambda: sum_scatters(factor, rows, exponent, diagonal),
        "reference": reference,
        "int8 product": integers,
        BOUND: product,
    }


def lines(shape: Shape, options: argparse.Namespace) -> list[dict[str, Any]]:
    elements = shape.D * (shape.D + 1) // 2
    # As float32 products. The planes are written once; integer instructions may be faster than this floor.
    low = floor_ms(2.0 * shape.tasks * shape.R * elements, 16 * elements, torch.float32)
    times, others_share = measure(candidates(shape), options)
    best = min(t.p50 for name, t in times.items() if name not in ("native", BOUND))
    return [
        {
            "way": name,
            "tasks": shape.tasks, "R": shape.R, "D": shape.D,
            **times_of(t, best, low),
            "other_load": f"{others_share:.2f}",
        }
        for name, t in times.items()
    ]  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    return run(__doc__, "sum_scatters", SHAPES, [], lines, None, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
