"""multi_lora and retrieve on a GPU beside every alternative a user has.

    python -m benchmarks.ops.bench_gpu OUT               # all shapes; writes OUT/{multi_lora,retrieve}_gpu.csv
    python -m benchmarks.ops.bench_gpu OUT --dry-run     # tiny shapes on a CPU, to see that all of it works

Every way is the frozen linear followed by its increments, so that the ratio to the linear is what a user pays. Times
are of CUDA graphs that go through as many sets of inputs as keep the cache cold, and of eager calls on the same sets.
Each way is compared with float64 before it is timed, and ours repeated; what fails is left out and said. At the end are
the targets, met or missed (OUT/targets_gpu.csv). OUT/preference.csv is the order that this run would have dispatch use:
slm_fast/ops/preference.csv, if committed, decides.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
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
    Shape(T=512, H=1024),
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
Rows = list[dict[str, Any]]
OURS = ("cuda", "triton", "triton with base")
ELSEWHERE = ("linear", "peft mixed", "arrow")  # PEFT's mixed batch knows no weights, Arrow routes for itself
LARGEST_ERROR = {torch.float32: 1e-5, BF16: 2e-2}  # ours against float64, by norm
SPEED_UPS = {"gather bmm compiled": 1.5, "vllm x K": 3.0, "arrow": 20.0}  # their added time, as a multiple of ours
SETS_OF_SLOW_WAYS = 2  # PEFT makes a module for each slot


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


def forward_ways(
    shape: Shape, given: dict[str, Tensor], compiled: Callable[..., Tensor] | None, slow_ones: bool = True
) -> Ways:
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
    if dispatch.TRITON_MISSING is None and shape.K * shape.r <= widest:
        fused = torch.ops.slm_fast.adapted_linear_triton
        calls["triton with base"] = lambda: fused(x, matrix, None, *arguments[1:])
    calls["gather bmm"] = lambda: cpu.gather_bmm_(linear(x, matrix), *arguments)
    if compiled is not None:
        calls["gather bmm compiled"] = lambda: compiled(linear(x, matrix), *arguments)
    if shape.B * shape.H * shape.features_out * size <= biggest:
        calls["materialised"] = lambda: cpu.materialised(linear(x, matrix), *arguments)
    if slow_ones and find_spec("peft"):
        mixed = cpu.peft_mixed(x, lora_a, lora_b, ids)
        calls["peft mixed"] = lambda: mixed(linear(x, matrix))
        if shape.B * shape.T * shape.P * shape.features_out * size <= biggest and shape.P <= 100:
            with x.device:
                routed = cpu.arrow(x, lora_a, lora_b, ids)
            calls["arrow"] = lambda: routed(linear(x, matrix))
    if device == "cuda" and shape.features_out == shape.H and (add := vllm_times_k(*arguments)):
        calls["vllm x K"] = lambda: add(linear(x, matrix))
    return calls


def backward_ways(shape: Shape, given: dict[str, Tensor]) -> Ways:
    """The base's gradient of its input, then what the increments add to it: all four gradients."""
    x, matrix, lora_a, lora_b, ids, weights = given.values()
    grad = output_gradient(shape, x.device)
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
    for name in ("reference", *backends_of("retrieve", "other" if shape.vote else shape.size, device)):
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


def exact_layer(shape: Shape, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """What the layer should give, or (backward) its gradients, in float64."""
    x, matrix, lora_a, lora_b, ids, weights = (t.double() if t.is_floating_point() else t for t in given.values())
    if not shape.backward:
        return (cpu.gather_bmm(torch.nn.functional.linear(x, matrix), x, lora_a, lora_b, ids, weights),)
    leaves, grad = [t.requires_grad_() for t in (x, lora_a, lora_b, weights)], output_gradient(shape, x.device).double()
    y = cpu.gather_bmm(torch.zeros_like(grad), x, lora_a, lora_b, ids, weights)
    return (grad @ matrix, *torch.autograd.grad(y, leaves, grad))


def output_gradient(shape: Shape, device: torch.device) -> Tensor:
    random = torch.Generator(device).manual_seed(7)
    return torch.randn(shape.B, shape.T, shape.features_out, device=device, generator=random).to(shape.dtype)


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """By norm; of slot ids, the share that differs."""
    if not expected.is_floating_point():
        return (got != expected).double().mean().item()
    return ((got.double() - expected).norm() / expected.double().norm()).item()


def checked(ways: Ways, expected: tuple[Tensor, ...], largest: float) -> dict[str, dict[str, str]]:
    """For each way that works: its largest error, and of ours whether every call gives the same bits. A way that fails,
    or computes something else, is said and left out."""
    found: dict[str, dict[str, str]] = {}
    for name, call in ways.items():
        try:
            results = [_tensors(call()) for _ in range(4 if name in OURS else 1)]
            errors = [relative_error(*pair) for pair in zip(results[0], expected, strict=False)]
        except Exception as reason:  # of any library
            print(f"# {name} left out: {type(reason).__name__}: {str(reason)[:200]}", flush=True)
            continue
        if name in ELSEWHERE:
            found[name] = {"error": "-", "repeats": "-"}
            continue
        error, repeats = max(errors), "-"
        if name in OURS:
            same = all(torch.equal(a, b) for again in results[1:] for a, b in zip(again, results[0], strict=True))
            repeats = "yes" if same else "NO"
        elif not error <= largest:
            print(f"# {name} left out: relative error {error:.1e}, expected at most {largest}", flush=True)
            continue
        found[name] = {"error": f"{error:.1e}", "repeats": repeats}
    return found


def measure(sets: list[Ways], names: Collection[str], device: str, seconds: float) -> Mapping[str, Mapping[str, Times]]:
    if device == "cpu":
        return {"eager": time_together({name: sets[0][name] for name in names}, seconds=0.0, least=2)}
    per_way = {name: [ways[name] for ways in sets if name in ways] for name in names}
    in_graphs = {name: calls for name, calls in per_way.items() if name != "peft mixed"}  # it waits for the device
    return {
        "graph": gpu.time_on_gpu(in_graphs, graph=True, seconds=seconds),
        "eager": gpu.time_on_gpu(per_way, graph=False, seconds=seconds),
    }


def lines(
    case: dict[str, Any], timed: Mapping[str, Mapping[str, Times]], low: float, about: dict[str, dict[str, str]]
) -> Rows:
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
                | about[name]
            )
    return rows


def multi_lora_lines(shape: Shape, device: str, seconds: float, compiled: Any) -> Rows:
    rows, size = shape.B * shape.T, shape.dtype.itemsize
    used = len(cpu.route(shape)[0].unique())
    # Floor of what is added: the arithmetic, or the slots read once and y read and written (x the linear has read).
    flops = (8 if shape.backward else 4) * rows * shape.K * shape.r * (shape.H + shape.features_out) / 2
    moved = ((shape.H + shape.features_out) * (rows + used * shape.r)) * size
    low = gpu.floor_ms(flops, moved, shape.dtype) if device == "cuda" else 0.0
    sets = gpu.sets_of_inputs(moved + shape.H * shape.features_out * size) if device == "cuda" else 1

    def one(seed: int) -> Ways:
        given = inputs(shape, device, seed)
        if shape.backward:
            return backward_ways(shape, given)
        return forward_ways(shape, given, compiled, slow_ones=seed < SETS_OF_SLOW_WAYS)

    with torch.inference_mode(not shape.backward):
        all_ways = [one(seed) for seed in range(sets)]
        expected = exact_layer(shape, inputs(shape, device, 0))
        about = checked(all_ways[0], expected, 1e-4 if shape.dtype == torch.float32 else 4e-2)
        timed = measure(all_ways, about, device, seconds)
    case = {
        "B": shape.B, "T": shape.T, "I": shape.H, "O": shape.features_out, "P": shape.P, "K": shape.K, "r": shape.r,
        "dtype": str(shape.dtype).removeprefix("torch."), "slots": shape.slots,
        "pass": "backward" if shape.backward else "forward", "size": shape.size, "target": shape.most or "-",
    }  # fmt: skip
    return lines(case, timed, low, about)


def retrieve_lines(shape: Search, device: str, seconds: float) -> Rows:
    moved = (shape.P + shape.B) * shape.D * 4.0
    low = gpu.floor_ms(0.0, moved, torch.float32) if device == "cuda" else 0.0
    with torch.inference_mode():
        sets = gpu.sets_of_inputs(moved) if device == "cuda" else 1
        all_ways = [search_ways(shape, device, seed) for seed in range(sets)]
        expected = all_ways[0].pop("reference")()
        about = checked(all_ways[0], _tensors(expected), 1e-2)  # in float32 another of nearly equal slots may be first
        timed = measure(all_ways, about, device, seconds)
    case: dict[str, Any] = {"B": shape.B, "P": shape.P, "D": shape.D, "G": shape.G, "K": shape.K}
    case |= {"aggregate": "vote" if shape.vote else "mean", "size": "other" if shape.vote else shape.size}
    return lines(case | {"target": shape.most or "-"}, timed, low, about)


# ---- what the rows say ----


def by_case(rows: Rows) -> dict[str, dict[str, dict[str, Any]]]:
    """Case -> way -> its row: as graphs, or eager where nothing was captured (in a dry run)."""
    how = "graph" if any(row["how"] == "graph" for row in rows) else "eager"
    names = ("pass", "aggregate", "B", "T", "I", "O", "D", "P", "G", "K", "r", "dtype", "slots")
    found: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        if row["how"] == how:
            found[" ".join(f"{n}={row[n]}" if len(n) == 1 else str(row[n]) for n in names if n in row)][row["way"]] = (
                row
            )
    return found


def verdicts(rows: Rows, operator: str) -> Rows:
    """Each target, what was got, and whether it was met; of a target for all cases, the worst case."""
    cases, results = by_case(rows), []

    def judge(target: str, limit: str, got: float, met: bool, where: str) -> None:
        verdict = "met" if met else "MISSED"
        results.append({"target": target, "limit": limit, "got": f"{got:.4g}", "": verdict, "where": where})

    unit = "to_linear" if operator == "multi_lora" else "p50_us"
    worst_to: dict[str, tuple[float, str]] = {}
    for case, ways in cases.items():
        ours = {name: row for name, row in ways.items() if name in OURS}
        limit = next(iter(ways.values()))["target"]
        if not ours:
            judge(f"{operator}: runs", "", float("nan"), False, case)
            continue
        best, row = min(ours.items(), key=lambda pair: float(pair[1]["p50_us"]))
        if limit != "-":
            got = float(row[unit])
            judge(f"{operator}: {unit}", f"<= {limit}", got, got <= float(limit), f"{best}: {case}")
        for other in SPEED_UPS.keys() & ways.keys() if row.get("pass") == "forward" else ():
            added = max(float(row["added_us"]), 1e-3)
            ratio = float(ways[other]["added_us"]) / added
            worst_to[other] = min(worst_to.get(other, (float("inf"), "")), (ratio, f"{best}: {case}"))
    for other, (ratio, where) in worst_to.items():
        least = SPEED_UPS[other]
        judge(f"{operator}: {other}'s added time to ours, worst", f">= {least}", ratio, ratio >= least, where)

    ours_everywhere = [(case, row) for case, ways in cases.items() for row in ways.values() if row["way"] in OURS]
    for dtype, largest in LARGEST_ERROR.items():
        name = str(dtype).removeprefix("torch.")
        errors = [
            (float(r["error"]), f"{r['way']}: {case}") for case, r in ours_everywhere if r.get("dtype", name) == name
        ]
        if errors and (operator == "multi_lora" or dtype == torch.float32):
            error, where = max(errors)
            judge(f"{operator}: error in {name}, worst", f"<= {largest}", error, error <= largest, where)
    other_bits = [f"{row['way']}: {case}" for case, row in ours_everywhere if row["repeats"] != "yes"]
    if ours_everywhere:
        judge(
            f"{operator}: calls that gave other bits", "0", len(other_bits), not other_bits, "; ".join(other_bits[:2])
        )
    return results


def preference(rows: Rows, operator: str, device: str = "cuda") -> list[dict[str, str]]:
    """For each size class, backends by their time over the cases that all of them ran; the reference last."""
    cases = [
        (next(iter(ways.values())), {name: float(row["p50_us"]) for name, row in ways.items() if name in OURS})
        for ways in by_case(rows).values()
    ]
    result = []

    def propose(stem: str, size: str, times: list[dict[str, float]]) -> None:
        names = {name for ways in times for name in ways}
        totals = {name: sum(ways[name] for ways in times if names <= ways.keys()) for name in names}
        order = [name for name in sorted(names, key=lambda name: totals[name]) if name != "layer"]
        if "layer" in names:  # the base in the kernel, or not
            order = order[: int(totals["triton"] < totals["layer"])]
        if order or "layer" in names:
            backends = " ".join([*order, "reference"])
            result.append({"device": device, "operator": stem, "size": size, "backends": backends})

    sized: dict[str, list[dict[str, float]]] = defaultdict(list)
    fused: dict[str, list[dict[str, float]]] = defaultdict(list)
    for row, ways in cases:
        if row.get("pass") == "backward":
            continue
        with_base = ways.pop("triton with base", None)
        sized[row["size"]].append(ways)
        if with_base is not None and ways:
            wide = max(int(row["I"]), int(row["O"])) > 2048
            fused["wide" if wide else "narrow"].append({"triton": with_base, "layer": min(ways.values())})
    for size, times in sized.items():
        propose(operator, size, times)
    for size, times in fused.items():
        propose("adapted_linear", size, times)
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
    began = time.perf_counter()
    preferences: list[dict[str, str]] = []
    judged: Rows = []
    failed: Rows = []

    def run(stem: str, cases: list[Any], of: Callable[[Any], Rows]) -> None:
        rows: Rows = []
        for number, case in enumerate(cases):
            if time.perf_counter() - began > options.within:
                print(f"# {stem}: {len(cases) - number} shapes left out, the time was up", flush=True)
                break
            try:
                found = of(case)
            except Exception as reason:  # one shape that does not fit, say, must not lose the others
                print(f"# left out: {case}: {type(reason).__name__}: {str(reason)[:200]}", flush=True)
                failed.append({"target": f"{stem}: runs", "limit": "", "got": "-", "": "MISSED", "where": str(case)})
                continue
            print(table(found), flush=True)
            rows += found
            write_csv(options.out / f"{stem}_gpu.csv", rows)  # each time: what is done is kept whatever comes
            torch.compiler.reset()
            if device == "cuda":
                torch.cuda.empty_cache()
        preferences.extend(preference(rows, stem, device))
        judged.extend(verdicts(rows, stem))

    # On a stream of its own, which the graphs are captured on: autograd runs backward where forward ran.
    with torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext():
        run("retrieve", searches, lambda case: retrieve_lines(case, device, options.seconds))
        run("multi_lora", shapes, lambda case: multi_lora_lines(case, device, options.seconds, compiled))
    if preferences:
        write_csv(options.out / "preference.csv", preferences)
    if judged := judged + failed:
        write_csv(options.out / "targets_gpu.csv", judged)
        print(table(judged))


if __name__ == "__main__":
    main()
