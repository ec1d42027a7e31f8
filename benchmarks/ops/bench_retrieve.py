"""retrieve beside every alternative a user has, on a CPU.

    python -m benchmarks.ops.bench_retrieve            # all shapes; a million slots take 2 GB and some minutes

Each line: p20/p50/p80 of one way, its ratio to the best alternative and to the floor (all in the same run). The GEMM
alternatives are given keys that are normalised already; `native` normalises on the way and caches nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import RESULTS, Times, floor_ms, table, time_together, undisturbed, write_csv
from slm_fast import ops


@dataclass(frozen=True)
class Shape:
    """B queries of width D in G groups against P slots, the K best."""

    B: int = 256
    P: int = 1000
    D: int = 768
    G: int = 6
    K: int = 4
    vote: bool = False
    dtype: torch.dtype = torch.float32


SHAPES = [
    Shape(),
    Shape(B=32),
    Shape(B=1),
    *(Shape(B=B, P=20) for B in (1, 32, 256)),
    Shape(vote=True),
    Shape(dtype=torch.bfloat16),
    *(Shape(B=B, P=100_000) for B in (1, 32, 256)),
    Shape(B=32, P=1_000_000, D=384, G=1),
    Shape(B=1, P=1_000_000, D=384, G=1),
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


def candidates(shape: Shape) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    query, keys = torch.randn(shape.B, shape.D).to(shape.dtype), torch.randn(shape.P, shape.D).to(shape.dtype)
    unit_keys = unit(keys, shape.G)
    arguments = (query, unit_keys, shape.G, shape.K)
    aggregate = "vote" if shape.vote else "mean"
    calls: dict[str, Callable[[], object]] = {
        "native": lambda: ops.retrieve(query, keys, shape.K, groups=shape.G, aggregate=aggregate)
    }
    if shape.vote:
        return calls | {"bmm + topk a group": lambda: vote_by_topk(*arguments)}
    calls["gemm + topk"] = lambda: gemm_topk(*arguments)
    if shape.dtype == torch.float32:
        calls["onednn gemm + topk"] = lambda: gemm_topk_onednn(*arguments)
        try:
            import faiss  # type: ignore[import-not-found]

            index = faiss.IndexFlatIP(shape.D)
            index.add(unit_keys.numpy())
            calls["faiss flat"] = lambda: index.search(unit(query, shape.G).numpy(), shape.K)
        except ImportError:
            pass
    if shape.B * shape.P * shape.D <= 1 << 28:
        calls["expanded cosine"] = lambda: expanded_cosine(query, keys, shape.G, shape.K)
    return calls


def lines(shape: Shape, seconds: float, patience: float) -> list[dict[str, Any]]:
    # The larger of reading the keys once and the same product at the measured rate.
    size = shape.dtype.itemsize
    low = floor_ms(2.0 * shape.B * shape.P * shape.D, (shape.P + shape.B) * shape.D * size, torch.float32)
    with torch.inference_mode():
        calls = candidates(shape)
        times, others_share = undisturbed(lambda: time_together(calls, seconds=seconds), patience=patience)
    best = min(t.p50 for name, t in times.items() if name != "native")

    def line(name: str, t: Times) -> dict[str, Any]:
        return {
            "way": name,
            "B": shape.B, "P": shape.P, "D": shape.D, "G": shape.G, "K": shape.K,
            "aggregate": "vote" if shape.vote else "mean", "dtype": str(shape.dtype).removeprefix("torch."),
            "p20_ms": f"{t.p20:.3f}", "p50_ms": f"{t.p50:.3f}", "p80_ms": f"{t.p80:.3f}",
            "to_best_alternative": f"{t.p50 / best:.2f}",
            "to_floor": f"{t.p50 / low:.2f}",
            "other_load": f"{others_share:.2f}",
        }  # fmt: skip

    return [line(name, t) for name, t in times.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each way and shape")
    parser.add_argument("--patience", type=float, default=0.0, help="seconds to wait for a quiet machine, each shape")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the shapes to run")
    parser.add_argument("--output", type=Path, default=RESULTS / "retrieve.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for number, shape in enumerate(SHAPES):
        if options.only is None or number in options.only:
            found = lines(shape, options.seconds, options.patience)
            print(table(found), flush=True)
            rows += found
    write_csv(options.output, rows)


if __name__ == "__main__":
    main()
