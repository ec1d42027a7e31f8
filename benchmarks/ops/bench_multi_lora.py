"""multi_lora beside every alternative a user has, on a CPU.

    python -m benchmarks.ops.bench_multi_lora            # the shapes of the targets
    python -m benchmarks.ops.bench_multi_lora --sweep    # every axis around them, with the plot

Each line: p20/p50/p80 of one way, its ratio to the best alternative, to the frozen linear and to the floor (all in the
same run). `native` and `gather bmm` write in place, as an adapted layer without gradients does; `native new` and
`gather bmm new` leave the base output as it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import RESULTS, Times, floor_ms, read_csv, table, time_together, undisturbed, write_csv
from slm_fast import ops


@dataclass(frozen=True)
class Shape:
    """One case: B samples of T tokens, H features in and out, K of P slots of rank r."""

    B: int = 32
    T: int = 128
    H: int = 768
    P: int = 20
    K: int = 4
    r: int = 12
    dtype: torch.dtype = torch.float32
    slots: str = "uniform"  # or same, zipf, distinct
    backward: bool = False


TARGETS = [
    Shape(),
    Shape(H=384),
    Shape(B=8, T=64, H=4096, P=12, K=2, r=8),
    Shape(T=1, H=4096, P=12, K=2, r=8),
    Shape(T=1, H=4096, P=1000, K=2, r=8, slots="distinct"),
]
TARGETS += [replace(shape, dtype=torch.bfloat16) for shape in TARGETS]
TARGETS += [Shape(backward=True), Shape(H=384, backward=True), Shape(dtype=torch.bfloat16, backward=True)]

SWEEP = [
    *(Shape(H=H) for H in (384, 768, 1024, 4096)),
    *(Shape(K=K, r=r) for K, r in ((2, 8), (4, 8), (4, 16))),
    *(Shape(P=P) for P in (1000, 100_000)),
    *(Shape(B=B) for B in (1, 256)),
    *(Shape(T=T) for T in (1, 512)),
    *(Shape(P=1000, slots=slots) for slots in ("same", "zipf", "distinct")),
    *(Shape(B=B, T=1, H=4096, P=1000, K=2, r=8) for B in (1, 32, 256)),
    *(Shape(T=1, H=4096, P=1000, K=2, r=8, slots=slots) for slots in ("same", "zipf", "distinct")),
]


def route(shape: Shape) -> tuple[Tensor, Tensor]:
    """slot_ids [B, K] and weights [B, K] that sum to one."""
    random = torch.Generator().manual_seed(0)
    B, K, P = shape.B, shape.K, shape.P
    if shape.slots == "same":
        ids = torch.arange(K).expand(B, K) % P
    elif shape.slots == "distinct":
        ids = torch.arange(B * K).view(B, K) % P
    elif shape.slots == "zipf":
        ids = torch.multinomial(1 / torch.arange(1, P + 1), B * K, replacement=True, generator=random).view(B, K)
    else:
        ids = torch.randint(P, (B, K), generator=random)
    weights = torch.rand(B, K, generator=random) + 0.1
    return ids.contiguous(), weights / weights.sum(1, keepdim=True)


# ---- the alternatives; each returns or overwrites y [B, T, H] ----


def gather_bmm_(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    a = lora_a[ids].flatten(1, 2)  # [B, K r, H]
    b = (lora_b[ids] * weights.to(x.dtype)[:, :, None, None]).flatten(1, 2)
    return y.baddbmm_(torch.bmm(x, a.transpose(1, 2)), b)


def gather_bmm(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    a = lora_a[ids].flatten(1, 2)
    b = (lora_b[ids] * weights.to(x.dtype)[:, :, None, None]).flatten(1, 2)
    return torch.baddbmm(y, torch.bmm(x, a.transpose(1, 2)), b)


def materialised(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The paper's code: each sample's whole increment, then one product."""
    a, b = lora_a[ids] * weights.to(x.dtype)[:, :, None, None], lora_b[ids]
    increment = torch.bmm(a.flatten(1, 2).transpose(1, 2), b.flatten(1, 2))  # [B, H, H]
    return torch.baddbmm(y, x, increment)


def loop_over_slots_(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """PEFT's mixed-batch forward (tuners/lora/layer.py): for each adapter its rows, two products, added in place."""
    for slot in ids.unique():
        rows, k = (ids == slot).nonzero(as_tuple=True)
        shrunk = torch.nn.functional.linear(x[rows], lora_a[slot]) * weights[rows, k].to(x.dtype)[:, None, None]
        y.index_add_(0, rows, shrunk @ lora_b[slot])
    return y


def arrow(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """PEFT Arrow (tuners/lora/arrow.py): every adapter's output for every token, [B, T, P, H], then their sum."""
    share = torch.zeros(len(ids), len(lora_a), dtype=x.dtype).scatter_add_(1, ids, weights.to(x.dtype))  # [B, P]
    shrunk = torch.einsum("bti,pri->btpr", x, lora_a)
    outputs = torch.einsum("btpr,pro->btpo", shrunk, lora_b)
    return y + torch.einsum("btpo,bp->bto", outputs, share)


def dense(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """All slots for every token, the unused ones times zero: two plain products."""
    P, r, _ = lora_a.shape
    share = torch.zeros(len(ids), P, dtype=x.dtype).scatter_add_(1, ids, weights.to(x.dtype))
    shrunk = (x.flatten(0, 1) @ lora_a.flatten(0, 1).T).view(*x.shape[:2], P, r) * share[:, None, :, None]
    return torch.addmm(y.flatten(0, 1), shrunk.view(-1, P * r), lora_b.flatten(0, 1)).view(y.shape)


def candidates(shape: Shape, compiled: bool) -> dict[str, Callable[[], object]]:
    """Every way that this case's memory allows, ready to be called."""
    torch.manual_seed(0)
    B, T, H, P, r, size = shape.B, shape.T, shape.H, shape.P, shape.r, shape.dtype.itemsize
    x, y = (torch.randn(B, T, H, dtype=shape.dtype) for _ in range(2))
    # Values as small as trained ones, so that thousands of in-place additions stay finite.
    lora_a, lora_b = (torch.randn(P, r, H, dtype=shape.dtype) * 1e-3 for _ in range(2))
    ids, weights = route(shape)
    arguments = (x, lora_a, lora_b, ids, weights)
    linear = torch.nn.Linear(H, H, dtype=shape.dtype)
    if shape.backward:
        return {"linear": lambda: linear(x)} | _backward_candidates(y, *arguments)
    native_ = torch.ops.slm_fast.multi_lora_native_
    calls: dict[str, Callable[[], object]] = {
        "linear": lambda: linear(x),
        "native": lambda: native_(*arguments, y),
        "native new": lambda: ops.multi_lora(*arguments, base=y),
        "gather bmm": lambda: gather_bmm_(y, *arguments),
        "gather bmm new": lambda: gather_bmm(y, *arguments),
    }
    if B * H * H * size <= 1 << 30:
        calls["materialised"] = lambda: materialised(y, *arguments)
    if P <= 1000:
        calls["loop over slots"] = lambda: loop_over_slots_(y, *arguments)
    if B * T * P * r * size <= 1 << 28 and P * r <= 4096:
        calls["dense"] = lambda: dense(y, *arguments)
    if B * T * P * H * size <= 1 << 29:
        calls["arrow"] = lambda: arrow(y, *arguments)
    if compiled:
        in_place, new = torch.compile(gather_bmm_), torch.compile(gather_bmm)
        calls["gather bmm compiled"] = lambda: in_place(y, *arguments)
        calls["gather bmm compiled new"] = lambda: new(y, *arguments)
    return calls


def _backward_candidates(
    y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, ids: Tensor, weights: Tensor
) -> dict[str, Callable[[], object]]:
    leaves = [tensor.requires_grad_() for tensor in (x, lora_a, lora_b, weights)]
    grad = torch.randn_like(y)

    def gradients(result: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(result, leaves, grad, retain_graph=True)

    return {
        "native": gradients(ops.multi_lora(x, lora_a, lora_b, ids, weights, y)),
        "gather bmm": gradients(gather_bmm(y, x, lora_a, lora_b, ids, weights)),
    }


def floor(shape: Shape) -> float:
    """Milliseconds: 4 N R H flops (8 N R H backward), or x read, y read and written and each slot used read once."""
    rows, rank = shape.B * shape.T, shape.K * shape.r
    used = len(route(shape)[0].unique())
    moved = (3 * rows * shape.H + 2 * used * shape.r * shape.H) * shape.dtype.itemsize
    flops = (8 if shape.backward else 4) * rows * rank * shape.H
    return floor_ms(flops, moved, shape.dtype)


def lines(shape: Shape, compiled: bool, seconds: float, patience: float) -> list[dict[str, Any]]:
    low = floor(shape)
    with torch.inference_mode(not shape.backward):
        calls = candidates(shape, compiled)
        times, others_share = undisturbed(lambda: time_together(calls, seconds=seconds), patience=patience)
    others = {name: t.p50 for name, t in times.items() if name not in ("native", "native new", "linear")}
    in_place = ("gather bmm", "gather bmm compiled", "loop over slots")  # not for who needs the base output again
    kept = {name: t for name, t in others.items() if name not in in_place} or others
    best = {False: min(others.values()), True: min(kept.values())}

    def line(name: str, t: Times) -> dict[str, Any]:
        return {
            "way": name,
            "B": shape.B, "T": shape.T, "H": shape.H, "P": shape.P, "K": shape.K, "r": shape.r,
            "dtype": str(shape.dtype).removeprefix("torch."), "slots": shape.slots,
            "pass": "backward" if shape.backward else "forward",
            "p20_ms": f"{t.p20:.3f}", "p50_ms": f"{t.p50:.3f}", "p80_ms": f"{t.p80:.3f}",
            "to_best_alternative": f"{t.p50 / best[name.endswith('new')]:.2f}",
            "to_linear": f"{t.p50 / times['linear'].p50:.2f}",
            "to_floor": f"{t.p50 / low:.2f}",
            "other_load": f"{others_share:.2f}",
        }  # fmt: skip

    return [line(name, t) for name, t in times.items()]


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Time against tokens a batch, log-log: one line a way, at the first target's shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = {
        "native": "slm_fast",
        "gather bmm": "gather + baddbmm_",
        "loop over slots": "loop over slots (PEFT)",
        "dense": "all slots dense",
        "materialised": "materialised ΔW (paper's code)",
        "linear": "the frozen linear",
    }
    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=130)
    for way, label in names.items():
        points = sorted(
            (int(row["B"]) * int(row["T"]), float(row["p50_ms"]))
            for row in rows
            if row["way"] == way and (row["H"], row["P"], row["K"], row["r"]) == ("768", "20", "4", "12")
            and row["dtype"] == "float32" and row["slots"] == "uniform" and row["pass"] == "forward"
        )  # fmt: skip
        style = {"linewidth": 2.4} if way == "native" else {"linewidth": 1.2, "alpha": 0.9}
        axes.plot(*zip(*dict(points).items(), strict=True), marker="o", markersize=4, label=label, **style)
    axes.set(xscale="log", yscale="log", xlabel="tokens in the batch", ylabel="milliseconds (median)")
    axes.set_title("Adding 4 of 20 rank-12 slots to a 768-wide layer, float32, 2 cores", fontsize=10)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="every axis around the targets, and the plot")
    parser.add_argument("--compiled", action="store_true", help="also torch.compile the strongest alternative (slow)")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each way and shape")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the shapes to run")
    parser.add_argument("--patience", type=float, default=0.0, help="seconds to wait for a quiet machine, each shape")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = SWEEP if options.sweep else TARGETS
    rows: list[dict[str, Any]] = []
    seen = set()
    for number, shape in enumerate(shapes):
        if astuple(shape) in seen or (options.only is not None and number not in options.only):
            continue
        seen.add(astuple(shape))
        found = lines(shape, options.compiled, options.seconds, options.patience)
        print(table(found), flush=True)
        rows += found
    name = "multi_lora_sweep" if options.sweep else "multi_lora"
    output = options.output or RESULTS / f"{name}.csv"
    write_csv(output, rows)
    if options.sweep:
        plot(read_csv(output), output.with_suffix(".png"))


if __name__ == "__main__":
    main()
