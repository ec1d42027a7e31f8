"""multi_lora and retrieve on a GPU beside every alternative a user has.

    python -m benchmarks.ops.bench_gpu OUT               # all shapes; writes OUT/{multi_lora,retrieve}_gpu.csv
    python -m benchmarks.ops.bench_gpu OUT --dry-run     # tiny shapes on a CPU, to see that all of it works

Every way is the frozen linear followed by its increments, so that the ratio to the linear is what a user pays. Times
are of CUDA graphs that go through as many sets of inputs as keep the cache cold, and of eager calls on the same sets.
Each way's result is compared with the others' before it is timed. OUT/preference.csv is the order that this run would
have dispatch use: slm_fast/ops/preference.csv, if committed, decides.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu
from benchmarks.ops import bench_multi_lora as cpu
from benchmarks.ops import bench_retrieve
from benchmarks.timing import Times, table, time_together, write_csv
from slm_fast import ops
from slm_fast.ops import dispatch

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Shape(cpu.Shape):
    """One case; `out` features where they are not H. `most`: what the frozen linear and the increments may take
    together, as a multiple of the linear alone."""

    dtype: torch.dtype = BF16
    out: int = 0
    most: float = 0.0

    @property
    def features_out(self) -> int:
        return self.out or self.H

    @property
    def size(self) -> str:
        return "decode" if self.T == 1 else "tokens"


SEVEN_B = Shape(B=8, T=512, H=4096, P=20, K=4, r=8)
SHAPES = [
    replace(SEVEN_B, most=1.08),
    Shape(most=1.35),
    Shape(T=1, H=4096, K=2, r=8, most=1.20),
    Shape(T=1, H=4096, P=64, K=2, r=8, slots="distinct", most=1.45),
    replace(SEVEN_B, backward=True, most=1.12),
    replace(SEVEN_B, out=11008),
    replace(SEVEN_B, H=11008, out=4096),
    Shape(H=1024),
    Shape(B=256, P=1000),
    Shape(dtype=torch.float32),
    Shape(backward=True),
    *(Shape(B=B, T=1, H=4096, K=2, r=8) for B in (1, 256)),
    Shape(B=256, T=1, H=4096, P=1000, K=2, r=8),
    Shape(T=1, H=768),
]


@dataclass(frozen=True)
class Search(bench_retrieve.Shape):
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
Ways = dict[str, Callable[[], object]]


def vllm_times_k(
    x: Tensor, lora_a: Tensor, lora_b: Tensor, ids: Tensor, weights: Tensor
) -> Callable[[Tensor], Tensor] | None:
    """vLLM's LoRA kernels, which know one adapter a token and no weights: shrink, scale and expand for each k."""
    try:
        from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink
    except Exception:
        return None
    (B, T, I), (P, r, O), K = x.shape, lora_b.shape, ids.shape[1]
    rows, down, up = x.view(B * T, I), lora_a.unsqueeze(1), lora_b.transpose(1, 2).contiguous().unsqueeze(1)
    metas = []
    for k in range(K):
        meta = LoRAKernelMeta.make(P, B * T, device=x.device)
        meta.prepare_tensors(ids[:, k].repeat_interleave(T).int())
        metas.append(meta.meta_args(B * T))
    scale = weights.repeat_interleave(T, 0)  # [N, K]

    def add(y: Tensor) -> Tensor:
        for k in range(K):
            shrunk = torch.zeros(1, B * T, r, dtype=torch.float32, device=x.device)
            lora_shrink(rows, [down], shrunk, *metas[k], 1.0)
            lora_expand(shrunk * scale[None, :, k, None], [up], y.view(B * T, O), *metas[k], add_inputs=True)
        return y

    return add


def backends_of(stem: str, size: str, device: str) -> list[str]:
    return [b.name for b in ops.backends(device) if b.serves(stem, size) and b.name != "reference"]


def inputs(shape: Shape, device: str, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device).to(shape.dtype)

    ids, weights = cpu.route(shape)
    return {
        "x": normal(shape.B, shape.T, shape.H),
        "matrix": normal(shape.features_out, shape.H) * shape.H**-0.5,
        "lora_a": normal(shape.P, shape.r, shape.H) * shape.H**-0.5,
        "lora_b": normal(shape.P, shape.r, shape.features_out) * shape.r**-0.5,
        "ids": ids.to(device),
        "weights": weights.to(device),
    }


def _onto_linear(op: Callable[..., Tensor], arguments: tuple[Tensor, ...], matrix: Tensor) -> Tensor:
    return op(*arguments, torch.nn.functional.linear(arguments[0], matrix))


def forward_ways(shape: Shape, given: dict[str, Tensor], compiled: Callable[..., Tensor] | None) -> Ways:
    """Each is the whole adapted layer: the frozen linear, then the increments."""
    x, matrix, lora_a, lora_b, ids, weights = given.values()
    device, arguments = x.device.type, (x, lora_a, lora_b, ids, weights)
    linear = torch.nn.functional.linear
    size, biggest = shape.dtype.itemsize, 1 << (22 if device == "cpu" else 34)
    calls: Ways = {"linear": lambda: linear(x, matrix)}
    for name in backends_of("multi_lora", shape.size, device):
        op = getattr(torch.ops.slm_fast, f"multi_lora_{name}")
        calls[name] = partial(_onto_linear, op, arguments, matrix)
    widest = 256 // size
    if dispatch.TRITON_MISSING is None and max(shape.H, shape.features_out) <= 2048 and shape.K * shape.r <= widest:
        fused = torch.ops.slm_fast.adapted_linear_triton
        calls["triton with base"] = lambda: fused(x, matrix, None, *arguments[1:])
    calls["gather bmm"] = lambda: cpu.gather_bmm_(linear(x, matrix), *arguments)
    if compiled is not None:
        calls["gather bmm compiled"] = lambda: compiled(linear(x, matrix), *arguments)
    if shape.B * shape.H * shape.features_out * size <= biggest:
        calls["materialised"] = lambda: cpu.materialised(linear(x, matrix), *arguments)
    if find_spec("peft"):
        mixed = cpu.peft_mixed(x, lora_a, lora_b, ids)
        calls["peft mixed"] = lambda: mixed(linear(x, matrix))
        if shape.B * shape.T * shape.P * shape.features_out * size <= biggest and shape.K <= shape.P:
            with x.device:
                routed = cpu.arrow(x, lora_a, lora_b, ids)
            calls["arrow"] = lambda: routed(linear(x, matrix))
    if device == "cuda" and shape.features_out == shape.H and (add := vllm_times_k(*arguments)):
        calls["vllm x K"] = lambda: add(linear(x, matrix))
    return calls


def backward_ways(shape: Shape, given: dict[str, Tensor]) -> Ways:
    """The base's gradient of its input, then what the increments add to it: all four gradients."""
    x, matrix, lora_a, lora_b, ids, weights = given.values()
    grad = torch.randn(shape.B, shape.T, shape.features_out, device=x.device).to(shape.dtype)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, lora_a, lora_b, weights)]
    y = torch.zeros_like(grad)
    calls: Ways = {"linear": lambda: grad @ matrix}

    def gradients(result: Tensor) -> Callable[[], object]:
        return lambda: (grad @ matrix, *torch.autograd.grad(result, leaves, grad, retain_graph=True))

    for name in backends_of("multi_lora", "tokens", x.device.type):
        op = getattr(torch.ops.slm_fast, f"multi_lora_{name}")
        calls[name] = gradients(op(leaves[0], leaves[1], leaves[2], ids, leaves[3], y))
    calls["gather bmm"] = gradients(cpu.gather_bmm(y, leaves[0], leaves[1], leaves[2], ids, leaves[3]))
    return calls


def search_ways(shape: Search, device: str, seed: int) -> Ways:
    torch.manual_seed(seed)
    query, keys = torch.randn(shape.B, shape.D, device=device), torch.randn(shape.P, shape.D, device=device)
    unit_keys, aggregate = bench_retrieve.unit(keys, shape.G), "vote" if shape.vote else "mean"
    calls: Ways = {}
    for name in backends_of("retrieve", "other" if shape.vote else shape.size, device):
        op = getattr(torch.ops.slm_fast, f"retrieve_{name}")
        arguments = (query, keys, shape.K, shape.G, None, None, "cosine", aggregate, "ratio", 1.0)
        calls[name] = partial(op, *arguments)
    if shape.vote:
        calls["bmm + topk a group"] = lambda: bench_retrieve.vote_by_topk(query, unit_keys, shape.G, shape.K)
    else:
        calls["gemm + topk"] = lambda: bench_retrieve.gemm_topk(query, unit_keys, shape.G, shape.K)
        if shape.B * shape.P * shape.D <= 1 << 30:
            calls["expanded cosine"] = lambda: bench_retrieve.expanded_cosine(query, keys, shape.G, shape.K)
    return calls


def agree(ways: Ways, tolerance: float) -> None:
    """A way that computes something else is an error, not a result."""
    others = ("linear", "peft mixed", "arrow")  # PEFT's mixed batch knows no weights, Arrow routes for itself
    results = {name: call() for name, call in ways.items() if name not in others}
    expected = results.get("gather bmm", next(reversed(results.values())))
    for name, got in results.items():
        for one, other in zip(_tensors(got), _tensors(expected), strict=True):
            if not one.is_floating_point():
                continue  # of nearly equal scores another slot may come first
            error = ((one.double() - other.double()).norm() / other.double().norm()).item()
            if not error <= tolerance:
                raise SystemExit(f"{name}: relative difference {error:.1e}, expected at most {tolerance}")


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def measure(sets: list[Ways], device: str, seconds: float) -> Mapping[str, Mapping[str, Times]]:
    if device == "cpu":
        return {"eager": time_together(sets[0], seconds=0.0, least=2)}
    per_way = {name: [ways[name] for ways in sets] for name in sets[0]}
    in_graphs = {name: calls for name, calls in per_way.items() if name != "peft mixed"}  # it waits for the device
    return {
        "graph": gpu.time_on_gpu(in_graphs, graph=True, seconds=seconds),
        "eager": gpu.time_on_gpu(per_way, graph=False, seconds=seconds),
    }


def lines(case: dict[str, Any], timed: Mapping[str, Mapping[str, Times]], low: float) -> list[dict[str, Any]]:
    rows = []
    for how, times in timed.items():
        others = [t.p50 for name, t in times.items() if name in ("gather bmm", "gather bmm compiled", "gemm + topk")]
        linear = times["linear"].p50 if "linear" in times else 0.0
        best = min(others, default=0.0) - linear
        for name, t in times.items():
            added = t.p50 - linear
            rows.append(
                case
                | {"way": name, "how": how}
                | {"p20_us": f"{1e3 * t.p20:.2f}", "p50_us": f"{1e3 * t.p50:.2f}", "p80_us": f"{1e3 * t.p80:.2f}"}
                | {"added_us": f"{1e3 * added:.2f}", "to_linear": f"{t.p50 / linear:.3f}" if linear else "-"}
                | {"best_alternative_to_it": f"{best / added:.2f}" if name != "linear" and added > 0 < best else "-"}
                | {"to_floor": f"{added / low:.2f}" if name != "linear" and low else "-"}
            )
    return rows


def multi_lora_lines(shape: Shape, device: str, seconds: float, compiled: Any) -> list[dict[str, Any]]:
    rows, size = shape.B * shape.T, shape.dtype.itemsize
    used = len(cpu.route(shape)[0].unique())
    # Floor of what is added: the arithmetic, or the slots read once and y read and written (x the linear has read).
    flops = (8 if shape.backward else 4) * rows * shape.K * shape.r * (shape.H + shape.features_out) / 2
    moved = ((shape.H + shape.features_out) * (rows + used * shape.r)) * size
    low = gpu.floor_ms(flops, moved, shape.dtype) if device == "cuda" else 0.0
    sets = gpu.sets_of_inputs(moved + shape.H * shape.features_out * size) if device == "cuda" else 1

    def one(seed: int) -> Ways:
        given = inputs(shape, device, seed)
        # Compiling takes longer than all the rest: for the targets only.
        return (
            backward_ways(shape, given)
            if shape.backward
            else forward_ways(shape, given, compiled if shape.most else None)
        )

    with torch.inference_mode(not shape.backward):
        all_ways = [one(seed) for seed in range(sets)]
        agree(all_ways[0], 1e-4 if shape.dtype == torch.float32 else 4e-2)
        timed = measure(all_ways, device, seconds)
    case = {
        "B": shape.B, "T": shape.T, "I": shape.H, "O": shape.features_out, "P": shape.P, "K": shape.K, "r": shape.r,
        "dtype": str(shape.dtype).removeprefix("torch."), "slots": shape.slots,
        "pass": "backward" if shape.backward else "forward", "size": shape.size, "target": shape.most or "-",
    }  # fmt: skip
    return lines(case, timed, low)


def retrieve_lines(shape: Search, device: str, seconds: float) -> list[dict[str, Any]]:
    moved = (shape.P + shape.B) * shape.D * 4.0
    low = gpu.floor_ms(0.0, moved, torch.float32) if device == "cuda" else 0.0
    with torch.inference_mode():
        sets = gpu.sets_of_inputs(moved) if device == "cuda" else 1
        all_ways = [search_ways(shape, device, seed) for seed in range(sets)]
        agree(all_ways[0], 1e-4)
        timed = measure(all_ways, device, seconds)
    case: dict[str, Any] = {"B": shape.B, "P": shape.P, "D": shape.D, "G": shape.G, "K": shape.K}
    case |= {"aggregate": "vote" if shape.vote else "mean", "size": "other" if shape.vote else shape.size}
    return lines(case | {"target": shape.most or "-"}, timed, low)


def verdicts(rows: list[dict[str, Any]], operator: str) -> list[dict[str, Any]]:
    """Each target with the fastest of our ways, met or missed."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        ours = row["way"] in ("cuda", "triton", "triton with base")
        if row["target"] != "-" and row["how"] == "graph" and ours:
            case = tuple(str(value) for name, value in row.items() if name in ("B", "T", "I", "P", "slots", "pass"))
            if case not in found or float(row["p50_us"]) < float(found[case]["p50_us"]):
                found[case] = row
    results = []
    for case, row in found.items():
        got = float(row["to_linear" if operator == "multi_lora" else "p50_us"])
        verdict = "met" if got <= float(row["target"]) else "MISSED"
        results.append({"case": " ".join(case), "way": row["way"], "got": got, "target": row["target"], "": verdict})
    return results


def preference(rows: list[dict[str, Any]], operator: str) -> list[dict[str, str]]:
    """For each size class, backends by their time over all its cases, as graphs; the reference last."""
    names = {"cuda", "triton"}
    totals: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    fused = {"with": 0.0, "without": 0.0}
    for row in rows:
        if row["how"] != "graph" or row.get("pass") == "backward":
            continue
        if row["way"] in names:
            totals[row["size"]][row["way"]] += float(row["p50_us"])
    result = []
    for size, times in totals.items():
        order = " ".join([*sorted(times, key=lambda name: times[name]), "reference"])
        result.append({"device": "cuda", "operator": operator, "size": size, "backends": order})
    # The base in the kernel, where it was measured beside the linear and the better of the backends.
    cases: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["how"] == "graph" and row.get("pass") == "forward":
            cases[tuple(str(row[n]) for n in ("B", "T", "I", "O", "P", "dtype"))][row["way"]] = float(row["p50_us"])
    for ways in cases.values():
        if "triton with base" in ways:
            fused["with"] += ways["triton with base"]
            fused["without"] += min(ways[name] for name in names & ways.keys())
    if fused["without"]:
        best = "triton reference" if fused["with"] < fused["without"] else "reference"
        result.append({"device": "cuda", "operator": "adapted_linear", "size": "narrow", "backends": best})
    return result


def tiny(shape: Shape) -> Shape:
    out = 16 if shape.out else 0
    return replace(shape, B=2, T=min(shape.T, 3), H=24, out=out, P=5, K=2, r=2, slots="same", most=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--seconds", type=float, default=0.15, help="for each way, shape and mode")
    parser.add_argument("--within", type=float, default=240.0, help="seconds after which no further shape is begun")
    parser.add_argument("--no-compile", action="store_true", help="without the compiled alternative")
    options = parser.parse_args()
    device = "cpu" if options.dry_run else "cuda"
    shapes, searches = SHAPES, SEARCHES
    if options.dry_run:
        shapes = list(dict.fromkeys(tiny(shape) for shape in SHAPES))
        searches = [replace(search, B=2, P=40, D=24, G=2) for search in SEARCHES[:1] + SEARCHES[-1:]]
    compiled = None if options.dry_run or options.no_compile else torch.compile(cpu.gather_bmm_, dynamic=False)
    torch.set_float32_matmul_precision("highest")
    began, preferences, judged = time.perf_counter(), [], []

    def run(stem: str, cases: list[Any], of: Callable[[Any], list[dict[str, Any]]]) -> None:
        rows: list[dict[str, Any]] = []
        for number, case in enumerate(cases):
            if time.perf_counter() - began > options.within:
                print(f"# {stem}: {len(cases) - number} shapes left out, the time was up", flush=True)
                break
            found = of(case)
            print(table(found), flush=True)
            rows += found
            if device == "cuda":
                torch.cuda.empty_cache()
        if rows:
            write_csv(options.out / f"{stem}_gpu.csv", rows)
            preferences.extend(preference(rows, stem))
            judged.extend(verdicts(rows, stem))

    run("retrieve", searches, lambda case: retrieve_lines(case, device, options.seconds))
    run("multi_lora", shapes, lambda case: multi_lora_lines(case, device, options.seconds, compiled))
    if preferences:
        write_csv(options.out / "preference.csv", preferences)
    if judged:
        write_csv(options.out / "targets_gpu.csv", judged)
        print(table(judged))


if __name__ == "__main__":
    main()
