"""retrieve on a GPU. `python -m benchmarks.speed.operators.gpu OUT` runs it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.speed.operators import bench_retrieve as cpu
from benchmarks.speed.operators.command import Ways
from benchmarks.speed.operators.gpu.compare import Rows, backends_of, checked, lines, measure, tensors_of
from benchmarks.speed.operators.gpu.timing import floor_ms, sets_of_inputs


@dataclass(frozen=True)
class Search(cpu.Shape):
    """One retrieval; `most` microseconds."""

    B: int = 32
    D: int = 384
    most: float = 0.0

    @property
    def size(self) -> str:
        return "few" if self.P <= 4096 else "many"


SEARCHES = [
    Search(P=512, most=3),
    Search(P=4096, most=6),
    Search(P=100_000, most=50),
    Search(P=1000, D=768, B=256),
    Search(P=20, D=768),
    Search(P=1000, D=768, vote=True),
]


def search_ways(shape: Search, device: str, seed: int) -> Ways:
    """Every way to one retrieval, over inputs drawn from the seed."""
    torch.manual_seed(seed)
    query, keys = torch.randn(shape.B, shape.D, device=device), torch.randn(shape.P, shape.D, device=device)
    unit_keys, aggregate = cpu.unit(keys, shape.G), "vote" if shape.vote else "mean"
    calls: Ways = {}
    for name in ("reference", *backends_of("retrieve", "other" if shape.vote else shape.size, device)):
        op = getattr(torch.ops.slm_fast, f"retrieve_{name}")
        arguments = (query, keys, shape.K, shape.G, None, None, "cosine", aggregate, "ratio", 1.0)
        calls[name] = partial(op, *arguments)
    if shape.vote:
        calls["bmm + topk a group"] = lambda: cpu.vote_by_topk(query, unit_keys, shape.G, shape.K)
    else:
        calls["gemm + topk"] = lambda: cpu.gemm_topk(query, unit_keys, shape.G, shape.K)
        if shape.B * shape.P * shape.D <= 1 << 30:
            calls["expanded cosine"] = lambda: cpu.expanded_cosine(query, keys, shape.G, shape.K)
    return calls


def retrieve_rows(shape: Search, device: str, seconds: float) -> Rows:
    """A row for each way and mode (CUDA graph, eager), each held against the reference first."""
    moved = (shape.P + shape.B) * shape.D * 4.0
    low = floor_ms(0.0, moved, torch.float32) if device == "cuda" else 0.0
    with torch.inference_mode():
        sets = sets_of_inputs(moved) if device == "cuda" else 1
        all_ways = [search_ways(shape, device, seed) for seed in range(sets)]
        expected = all_ways[0].pop("reference")()
        about = checked(
            all_ways[0], tensors_of(expected), 1e-2
        )  # in float32 another of nearly equal slots may be first
        timed = measure(all_ways, about, device, seconds)
    case: dict[str, Any] = {"B": shape.B, "P": shape.P, "D": shape.D, "G": shape.G, "K": shape.K}
    case |= {"aggregate": "vote" if shape.vote else "mean", "size": "other" if shape.vote else shape.size}
    return lines(case | {"target": shape.most or "-"}, timed, low, about)
