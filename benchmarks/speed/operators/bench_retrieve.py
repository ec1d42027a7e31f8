"""retrieve against its alternatives, on a CPU.

    python -m benchmarks.speed.operators.bench_retrieve            # the cases of the targets
    python -m benchmarks.speed.operators.bench_retrieve --sweep    # slots from 20 to a million, with the plot

A million slots take about 5 GB. Each line: p20/p50/p80 of one way, and its ratio to the best alternative and to the
floor (all in the same run). The GEMM alternatives, FAISS and `native prepared` have keys that are already normalised;
`native` has plain keys.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.figures import plot_times
from benchmarks.speed.operators.command import Ways, dtype_name, measure, run, times_of
from benchmarks.speed.roofline import floor_ms
from slm_fast import ops


@dataclass(frozen=True)
class Shape:
    """B queries of width D in G groups against P slots, of which the best K are returned. dot: by product and bias."""

    B: int = 256
    P: int = 1000
    D: int = 768
    G: int = 6
    K: int = 4
    vote: bool = False
    dot: bool = False
    dtype: torch.dtype = torch.float32


MILLION = Shape(B=32, P=1_000_000, D=384, G=1)
TARGETS = [
    Shape(),
    Shape(B=32),
    Shape(B=1),
    *(Shape(B=B, P=20) for B in (1, 32, 256)),
    Shape(vote=True),
    Shape(dtype=torch.bfloat16),
    MILLION,
    *(Shape(B=B, P=30_000, D=3168, G=1, K=2, dot=True) for B in (32, 96)),  # 10,000 tasks of three labels
]
SWEEP = [
    *(Shape(B=B, P=P) for P in (20, 100, 1000, 10_000, 100_000) for B in (1, 32, 256)),
    *(replace(MILLION, B=B) for B in (1, 256)),
    *(Shape(K=K) for K in (1, 16)),
    Shape(B=31, P=997, D=774, K=3),  # ragged: no size is a multiple of a tile
]


def unit(rows: Tensor, groups: int) -> Tensor:
    grouped = rows.unflatten(1, (groups, -1))
    return (grouped / grouped.norm(dim=-1, keepdim=True).clamp(min=1e-12)).flatten(1)


def finish(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    top, ids = scores.topk(k)
    positive = top.clamp(min=0)
    return ids, positive / positive.sum(1, keepdim=True)


def expanded_cosine(query: Tensor, keys: Tensor, groups: int, k: int) -> tuple[Tensor, Tensor]:
    """The paper's code: F.cosine_similarity on [B, P, G, d] expanded tensors."""
    q, key = query.unflatten(1, (groups, -1)), keys.unflatten(1, (groups, -1))
    return finish(torch.nn.functional.cosine_similarity(q[:, None], key[None], dim=-1).mean(-1), k)


def gemm_topk(query: Tensor, unit_keys: Tensor, groups: int, k: int) -> tuple[Tensor, Tensor]:
    return finish((unit(query, groups) @ unit_keys.T).float() / groups, k)


def gemm_topk_onednn(query: Tensor, unit_keys: Tensor, groups: int, k: int) -> tuple[Tensor, Tensor]:
    scores = torch.ops.mkldnn._linear_pointwise(unit(query, groups), unit_keys, None, "none", [], "")
    return finish(scores / groups, k)


def vote_by_topk(query: Tensor, unit_keys: Tensor, groups: int, k: int) -> tuple[Tensor, Tensor]:
    query_GBd = unit(query, groups).unflatten(1, (groups, -1)).transpose(0, 1)
    cosine = torch.bmm(query_GBd, unit_keys.unflatten(1, (groups, -1)).permute(1, 2, 0))  # [G, B, P]
    top, ids = cosine.topk(k)
    return finish(torch.zeros_like(cosine).scatter_(2, ids, top).sum(0) / groups, k)


def biased(query: Tensor, keys: Tensor, bias: Tensor, k: int, onednn: bool) -> tuple[Tensor, Tensor]:
    if onednn:
        scores = torch.ops.mkldnn._linear_pointwise(query, keys, bias, "none", [], "")
    else:
        scores = torch.addmm(bias, query, keys.T)
    top, ids = scores.topk(k)
    return ids, top.softmax(1)


def candidates_by_dot(shape: Shape, query: Tensor, keys: Tensor) -> Ways:
    bias = torch.randn(shape.P)
    prepared = ops.prepare_keys(keys, metric="dot")
    call = partial(ops.retrieve, query, k=shape.K, metric="dot", bias=bias, weighting="softmax")
    return {
        "native": partial(call, keys),
        "native prepared": partial(call, prepared),
        "gemm + topk": lambda: biased(query, keys, bias, shape.K, onednn=False),
        "onednn gemm + topk": lambda: biased(query, keys, bias, shape.K, onednn=True),
    }


def faiss_flat(query: Tensor, unit_keys: Tensor, groups: int, k: int) -> Ways:
    """FAISS's exact inner-product index. Its threads are not torch's."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(unit_keys.shape[1])
    index.add(unit_keys.numpy())

    def search() -> tuple[Tensor, Tensor]:
        scores, ids = index.search(unit(query, groups).numpy(), k)
        positive = torch.from_numpy(scores).clamp(min=0)
        return torch.from_numpy(ids), positive / positive.sum(1, keepdim=True)

    return {"faiss flat": search}


def candidates(shape: Shape, compiled: bool) -> Ways:
    torch.manual_seed(0)
    query, keys = torch.randn(shape.B, shape.D).to(shape.dtype), torch.randn(shape.P, shape.D).to(shape.dtype)
    if shape.dot:
        return candidates_by_dot(shape, query, keys)
    unit_keys = unit(keys, shape.G)
    arguments = (query, unit_keys, shape.G, shape.K)
    prepared = ops.prepare_keys(keys, groups=shape.G)
    call = partial(ops.retrieve, query, k=shape.K, groups=shape.G, aggregate="vote" if shape.vote else "mean")
    calls: Ways = {"native": partial(call, keys), "native prepared": partial(call, prepared)}
    if shape.vote:
        return calls | {"bmm + topk a group": lambda: vote_by_topk(*arguments)}
    calls["gemm + topk"] = lambda: gemm_topk(*arguments)
    if shape.dtype == torch.float32:
        calls["onednn gemm + topk"] = lambda: gemm_topk_onednn(*arguments)
        calls |= faiss_flat(query, unit_keys, shape.G, shape.K)
    if compiled:
        fast = torch.compile(gemm_topk)
        calls["gemm + topk compiled"] = lambda: fast(*arguments)
    if shape.B * shape.P * shape.D <= 1 << 28:
        calls["expanded cosine"] = lambda: expanded_cosine(query, keys, shape.G, shape.K)
    return calls


def lines(shape: Shape, options: argparse.Namespace) -> list[dict[str, Any]]:
    # The larger of reading the keys once and the product at the measured rate.
    size = shape.dtype.itemsize
    low = floor_ms(2.0 * shape.B * shape.P * shape.D, (shape.P + shape.B) * shape.D * size, torch.float32)
    with torch.inference_mode():
        times, others_share = measure(candidates(shape, options.compiled), options, apart=("faiss flat",))
    best = min(t.p50 for name, t in times.items() if not name.startswith("native"))
    return [
        {
            "way": name,
            "B": shape.B, "P": shape.P, "D": shape.D, "G": shape.G, "K": shape.K,
            "metric": "dot" if shape.dot else "cosine",
            "aggregate": "vote" if shape.vote else "mean", "dtype": dtype_name(shape.dtype),
            **times_of(t, best, low),
            "other_load": f"{others_share:.2f}",
        }
        for name, t in times.items()
    ]  # fmt: skip


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Time against slots, for a batch of 32."""
    shown = [row for row in rows if (row["B"], row["D"], row["K"]) == ("32", "768", "4")]
    labels = {
        "native prepared": "slm_fast, prepared keys",
        "native": "slm_fast",
        "onednn gemm + topk": "oneDNN product + topk",
        "gemm + topk": "MKL product + topk",
        "gemm + topk compiled": "product + topk, compiled",
        "faiss flat": "FAISS flat",
        "expanded cosine": "expanded cosine (the paper's code)",
    }
    plot_times(
        {"": shown},
        lambda row: int(row["P"]),
        labels,
        path,
        title="The 4 best slots of 32 queries, 6 groups of 128, float32",
        axis="slots",
    )


def main(arguments: Sequence[str]) -> int:
    return run(__doc__, "retrieve", TARGETS, SWEEP, lines, plot, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
