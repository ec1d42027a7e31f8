"""retrieve on a GPU. Run it with `python -m benchmarks.speed.operators.gpu OUT`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.operators import bench_retrieve as cpu
from benchmarks.speed.operators.command import Ways
from benchmarks.speed.operators.gpu.compare import Rows, backends_of, checked, lines, measure, tensors_of
from benchmarks.speed.operators.gpu.timing import floor_ms, sets_of_inputs
from slm_fast import ops


@dataclass(frozen=True)
class Search(cpu.Shape):
    """One retrieval.

    Attributes:
        most: target in microseconds.
        keys: per slot, for the default router's case, which has plain dot products and a bias; 0 for one key and
            cosine.
    """

    B: int = 32
    D: int = 384
    most: float = 0.0
    keys: int = 0

    @property
    def size(self) -> str:
        return "other" if self.vote else "few" if self.P * max(1, self.keys) <= 4096 else "many"


SEARCHES = [
    Search(P=512, most=5),
    Search(P=4096, most=8),
    Search(P=100_000, most=60),
    Search(P=10, D=3072, G=1, K=2, keys=30),
    Search(P=1000, D=768, B=256),
    Search(P=20, D=768),
    Search(P=1000, D=768, vote=True),
]


def search_ways(shape: Search, device: str, seed: int) -> Ways:
    """Every way to do one retrieval, on inputs drawn from the seed."""
    torch.manual_seed(seed)
    query, keys = torch.randn(shape.B, shape.D, device=device), torch.randn(shape.P, shape.D, device=device)
    if shape.keys:
        return routing_ways(shape, query)
    unit_keys, aggregate = cpu.unit(keys, shape.G), "vote" if shape.vote else "mean"
    calls: Ways = {}
    for name in ("reference", *backends_of("retrieve", shape.size, device)):
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


def routing_ways(shape: Search, query: Tensor) -> Ways:
    """Every way to find the best slots if slots have several keys."""
    slot = torch.arange(shape.P, device=query.device).repeat_interleave(shape.keys)
    keys = torch.randn(len(slot), shape.D, device=query.device) * shape.D**-0.5
    bias, prepared = -keys.square().sum(1), ops.prepare_keys(keys, key_slot=slot, metric="dot")

    def by(name: str) -> tuple[Tensor, ...]:
        with ops.use_backend(name):
            return ops.retrieve(query, prepared, shape.K, bias=bias, metric="dot", weighting="softmax")

    def gemm_amax_topk() -> tuple[Tensor, ...]:
        scores = torch.addmm(bias, query, keys.T)
        best = scores.new_full((shape.B, shape.P), -torch.inf).scatter_reduce(1, slot.expand_as(scores), scores, "amax")
        found, ids = best.topk(shape.K)
        return ids, found.softmax(1)

    names = ("reference", *backends_of("retrieve", shape.size, query.device.type))
    return {**{name: partial(by, name) for name in names}, "gemm + topk": gemm_amax_topk}


def retrieve_rows(shape: Search, device: str, seconds: float) -> Rows:
    """One row per way and mode (CUDA graph, eager), each first checked against the reference."""
    moved = (shape.P * max(1, shape.keys) + shape.B) * shape.D * 4.0
    low = floor_ms(0.0, moved, torch.float32) if device == "cuda" else 0.0
    with torch.inference_mode():
        sets = sets_of_inputs(moved) if device == "cuda" else 1
        all_ways = [search_ways(shape, device, seed) for seed in range(sets)]
        expected = all_ways[0].pop("reference")()
        about = checked(all_ways[0], tensors_of(expected), 1e-2)  # in float32, nearly equal slots may change places
        timed = measure(all_ways, about, device, seconds)
    case: dict[str, Any] = {"B": shape.B, "P": shape.P, "D": shape.D, "G": shape.G, "K": shape.K}
    case |= {"keys": max(1, shape.keys), "aggregate": "vote" if shape.vote else "dot" if shape.keys else "mean"}
    case |= {"size": shape.size}
    return lines(case | {"target": shape.most or "-"}, timed, low, about)
