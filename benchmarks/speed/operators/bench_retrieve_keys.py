"""retrieve with several keys per slot, against the same number of slots with one key each, on a CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.operators.bench_retrieve_keys

All ways of a case search the same keys and are called in turns. `to_best_alternative` is the ratio to the same call
with one key per slot. With the dot metric, keys and bias are like the gaussian router's. The largest case takes 0.5 GB.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.speed.operators.command import Ways, measure, run, times_of
from benchmarks.speed.roofline import floor_ms
from slm_fast import ops

KEYS = (4, 16, 64)  # per slot


@dataclass(frozen=True)
class Shape:
    """B queries of width D in G groups against N keys; the best K slots are returned."""

    B: int
    N: int
    D: int = 384
    G: int = 1
    K: int = 2
    metric: str = "dot"


SHAPES = [
    shape
    for N in (200, 3600, 36_000)
    for B in (1, 32, 256)
    for shape in (Shape(B, N), Shape(B, N, D=3200), Shape(B, N, G=6, K=4, metric="cosine"))
]


def candidates(shape: Shape) -> Ways:
    torch.manual_seed(0)
    query, keys = torch.randn(shape.B, shape.D), torch.randn(shape.N, shape.D)
    bias = -keys.square().sum(1) / 2 if shape.metric == "dot" else None
    call = partial(ops.retrieve, query, k=shape.K, groups=shape.G, bias=bias, metric=shape.metric)
    prepare = partial(ops.prepare_keys, keys, groups=shape.G)
    calls: Ways = {"1 key": partial(call, keys)}
    if shape.metric == "cosine":
        calls["1 key prepared"] = partial(call, prepare())
    for count in KEYS:
        key_slot = torch.arange(shape.N) // count
        calls[f"{count} keys"] = partial(call, keys, key_slot=key_slot)
        if shape.metric == "cosine":
            calls[f"{count} keys prepared"] = partial(call, prepare(key_slot=key_slot))
    return calls


def lines(shape: Shape, options: argparse.Namespace) -> list[dict[str, Any]]:
    # The larger of reading the keys once and the product at the measured rate, for any number of keys per slot.
    low = floor_ms(2.0 * shape.B * shape.N * shape.D, (shape.N + shape.B) * shape.D * 4, torch.float32)
    with torch.inference_mode():
        times, others_share = measure(candidates(shape), options)
    return [
        {
            "way": name,
            "B": shape.B, "N": shape.N, "D": shape.D, "G": shape.G, "K": shape.K, "metric": shape.metric,
            **times_of(t, times["1 key prepared" if name.endswith("prepared") else "1 key"].p50, low),
            "other_load": f"{others_share:.2f}",
        }
        for name, t in times.items()
    ]  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    return run(__doc__, "retrieve_keys", SHAPES, [], lines, None, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
