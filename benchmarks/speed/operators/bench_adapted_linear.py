"""adapted_linear against a linear layer followed by its increments, on a CPU with AMX.

    python -m benchmarks.speed.operators.bench_adapted_linear --output benchmarks/results/adapted_linear_amx.csv

Each line: p20/p50/p80 of one way, and its ratio to the best alternative, to the linear layer alone (oneDNN's product,
as slm_fast calls it) and to the floor, all in the same run. All ways give the layer's output with the increments.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.speed.operators.bench_multi_lora import Shape as Route
from benchmarks.speed.operators.bench_multi_lora import gather_bmm_, route
from benchmarks.speed.operators.command import Ways, measure, run, times_of
from benchmarks.speed.roofline import floor_ms
from slm_fast.ops import dispatch
from slm_fast.ops.adapted_linear import adapted_linear, size_of
from slm_fast.ops.multi_lora import multi_lora_

LINEAR = "linear"


@dataclass(frozen=True)
class Shape:
    """One case: B samples of T tokens, I features in and O out, K of P slots of rank r; bfloat16."""

    B: int
    T: int
    I: int
    O: int
    K: int = 2
    r: int = 8
    P: int = 10


SHAPES = [
    *(Shape(B, T, *size) for B, T in ((41, 49), (8, 256)) for size in ((384, 384), (384, 1536), (1536, 384))),
    *(Shape(B, T, *size) for B, T in ((20, 50), (4, 256)) for size in ((768, 768), (768, 3072), (3072, 768))),
    *(Shape(8, 256, *size) for size in ((1024, 1024), (1024, 4096), (4096, 1024), (2048, 2048))),
    *(Shape(32, 128, H, H, K=4, r=12, P=20) for H in (384, 768)),
    *(Shape(B, T, 768, 768) for B, T in ((16, 16), (1, 256), (64, 32))),
]


def candidates(shape: Shape) -> Ways:
    torch.manual_seed(0)
    x, weight, bias, lora_a, lora_b = (
        torch.randn(size, dtype=torch.bfloat16) * 0.02
        for size in (
            (shape.B, shape.T, shape.I),
            (shape.O, shape.I),
            (shape.O,),
            (shape.P, shape.r, shape.I),
            (shape.P, shape.r, shape.O),
        )
    )
    ids, weights = route(Route(B=shape.B, P=shape.P, K=shape.K))
    arguments = (x, lora_a, lora_b, ids, weights)

    def linear() -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y

    def native() -> torch.Tensor:
        if size_of(x, weight, lora_a, ids) == "blocks":
            return adapted_linear(x, weight, bias, lora_a, lora_b, ids, weights)
        y: torch.Tensor = torch.ops.slm_fast.adapted_linear_native(x, weight, bias, lora_a, lora_b, ids, weights)
        return y  # layers of this shape do not take it

    return {
        LINEAR: linear,
        "native": native,
        "linear, multi_lora": lambda: multi_lora_(*arguments, linear()),
        "linear, gather bmm": lambda: gather_bmm_(linear(), *arguments),
    }


def lines(shape: Shape, options: argparse.Namespace) -> list[dict[str, Any]]:
    rows, rank = shape.B * shape.T, shape.K * shape.r
    flops = 2.0 * rows * (shape.I * (shape.O + rank) + rank * shape.O)
    low = floor_ms(flops, 2 * (rows * (shape.I + shape.O) + shape.I * shape.O), torch.bfloat16)
    with torch.inference_mode():
        times, others_share = measure(candidates(shape), options)
    best = min(t.p50 for name, t in times.items() if name not in ("native", LINEAR))
    return [
        {
            "way": name,
            **{axis: getattr(shape, axis) for axis in ("B", "T", "I", "O", "P", "K", "r")},
            **times_of(t, best, low),
            "to_linear": f"{t.p50 / times[LINEAR].p50:.2f}",
            "other_load": f"{others_share:.2f}",
        }
        for name, t in times.items()
    ]


def main(arguments: Sequence[str]) -> int:
    if not dispatch.has_amx():
        print("adapted_linear: it needs a CPU with AMX; `slm-fast doctor` says what this one has", file=sys.stderr)
        return 2
    return run(__doc__, "adapted_linear", SHAPES, [], lines, None, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
