"""multi_lora against its alternatives, on a CPU.

    python -m benchmarks.speed.operators.bench_multi_lora            # the shapes of the targets
    python -m benchmarks.speed.operators.bench_multi_lora --sweep    # every axis around them, with the plot

Each line: p20/p50/p80 of one way, and its ratio to the best alternative, to the frozen linear and to the floor (all in
the same run). `native` and `gather bmm` write in place, as an adapted layer without gradients does; `native new` and
`gather bmm new` keep the base output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
    *(Shape(B=B, T=T) for B, T in ((1, 1), (32, 1), (256, 1), (1, 128), (32, 128), (256, 128), (32, 512))),
    Shape(B=31, T=97, H=1000, P=19, K=3, r=7),  # ragged: no size is a multiple of a tile
    *(Shape(H=H) for H in (384, 1024, 4096)),
    *(Shape(K=K, r=r) for K, r in ((2, 8), (4, 8), (4, 16))),
    *(Shape(P=P) for P in (1000, 100_000)),
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


# The alternatives. Each returns or overwrites y [B, T, H].
IN_PLACE = ("gather bmm", "gather bmm compiled", "peft mixed")  # unusable if the base output is needed again


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


class Given(torch.nn.Module):
    """Replaces a base layer whose output is already computed."""

    y: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.y


def peft_layer(lora_a: Tensor, lora_b: Tensor) -> Any:
    """PEFT's LoRA layer with the slots as its adapters, named "0", "1", ..., and a base that costs nothing."""
    import peft

    config = peft.LoraConfig(r=lora_a.shape[1], lora_alpha=lora_a.shape[1])
    base = torch.nn.Linear(lora_a.shape[2], lora_b.shape[2], dtype=lora_a.dtype, device=lora_a.device)
    options = {"r": config.r, "lora_alpha": config.lora_alpha, "init_lora_weights": False}
    layer: Any = peft.tuners.lora.layer.Linear(base, "0", config, **options)
    for slot in range(1, len(lora_a)):
        layer.update_layer(str(slot), config=config, **options)
    for slot in range(len(lora_a)):
        for lora, weight in ((layer.lora_A, lora_a[slot]), (layer.lora_B, lora_b[slot].T.contiguous())):
            lora[str(slot)].weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.base_layer = Given()
    return layer.eval()


def peft_mixed(x: Tensor, lora_a: Tensor, lora_b: Tensor, ids: Tensor) -> Callable[[Tensor], Tensor]:
    """PEFT's own mixed-batch forward, added onto y.

    It takes one adapter per row and no weights, so it is called K times without the rows' weights, which saves it work.
    """
    layer = peft_layer(lora_a, lora_b)
    names = [[str(slot) for slot in column] for column in ids.T.tolist()]

    def add(y: Tensor) -> Tensor:
        layer.base_layer.y = y
        return [layer(x, adapter_names=column) for column in names][-1]

    return add


def arrow(x: Tensor, lora_a: Tensor, lora_b: Tensor, ids: Tensor) -> Callable[[Tensor], Tensor]:
    """PEFT Arrow's own code, added to y: every adapter's output for every token, [B T, P, H], and their weighted sum.

    It does its own routing, token by token (one [B T, H] x [H, P] product).
    """
    import peft
    from peft.tuners.lora.arrow import ArrowLoraLinearLayer

    layer = peft_layer(lora_a, lora_b)
    names = [str(slot) for slot in range(len(lora_a))]
    config = peft.ArrowConfig(top_k=ids.shape[1])
    config.task_adapter_names = names
    router = ArrowLoraLinearLayer(x.shape[-1], config)
    router.build_prototypes(layer.lora_A, layer.lora_B)
    keep, scaling = torch.nn.Identity(), dict.fromkeys(names, 1.0)
    return lambda y: y + router(x, layer.lora_A, layer.lora_B, keep, scaling)


def dense(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """All slots for every token, unused ones times zero: two plain products."""
    P, r, _ = lora_a.shape
    share = torch.zeros(len(ids), P, dtype=x.dtype).scatter_add_(1, ids, weights.to(x.dtype))
    shrunk = (x.flatten(0, 1) @ lora_a.flatten(0, 1).T).view(*x.shape[:2], P, r) * share[:, None, :, None]
    return torch.addmm(y.flatten(0, 1), shrunk.view(-1, P * r), lora_b.flatten(0, 1)).view(y.shape)


def candidates(shape: Shape, compiled: bool) -> Ways:
    """Every way that fits in memory for this case, ready to call."""
    torch.manual_seed(0)
    B, T, H, P, r, size = shape.B, shape.T, shape.H, shape.P, shape.r, shape.dtype.itemsize
    x, y = (torch.randn(B, T, H, dtype=shape.dtype) for _ in range(2))
    # As small as trained values, so that thousands of in-place additions stay finite.
    lora_a, lora_b = (torch.randn(P, r, H, dtype=shape.dtype) * 1e-3 for _ in range(2))
    ids, weights = route(shape)
    arguments = (x, lora_a, lora_b, ids, weights)
    linear = torch.nn.Linear(H, H, dtype=shape.dtype)
    if shape.backward:
        return {"linear": lambda: linear(x)} | _backward_candidates(y, *arguments)

    def native_in_place() -> Tensor:
        torch.ops.slm_fast.multi_lora_native_(*arguments, y)
        return y

    calls: Ways = {
        "linear": lambda: linear(x),
        "native": native_in_place,
        "native new": lambda: ops.multi_lora(*arguments, base=y),
        "gather bmm": lambda: gather_bmm_(y, *arguments),
        "gather bmm new": lambda: gather_bmm(y, *arguments),
    }
    if B * H * H * size <= 1 << 30:
        calls["materialised"] = lambda: materialised(y, *arguments)
    if P <= 1000:
        mixed = peft_mixed(x, lora_a, lora_b, ids)
        calls["peft mixed"] = lambda: mixed(y)
    if B * T * P * r * size <= 1 << 28 and P * r <= 4096:
        calls["dense"] = lambda: dense(y, *arguments)
    if B * T * P * H * size <= 1 << 29 and shape.K <= P:
        routed = arrow(x, lora_a, lora_b, ids)
        calls["arrow"] = lambda: routed(y)
    if compiled:
        in_place, new = torch.compile(gather_bmm_), torch.compile(gather_bmm)
        calls["gather bmm compiled"] = lambda: in_place(y, *arguments)
        calls["gather bmm compiled new"] = lambda: new(y, *arguments)
    return calls


def _backward_candidates(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, ids: Tensor, weights: Tensor) -> Ways:
    leaves = [tensor.requires_grad_() for tensor in (x, lora_a, lora_b, weights)]
    grad = torch.randn_like(y)

    def gradients(result: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(result, leaves, grad, retain_graph=True)

    return {
        "native": gradients(ops.multi_lora(x, lora_a, lora_b, ids, weights, y)),
        "gather bmm": gradients(gather_bmm(y, x, lora_a, lora_b, ids, weights)),
    }


def floor(shape: Shape) -> float:
    """Milliseconds: 4 N R H flops (8 N R H backward), or x and each used slot read once and y read and written."""
    rows, rank = shape.B * shape.T, shape.K * shape.r
    used = len(route(shape)[0].unique())
    moved = (3 * rows * shape.H + 2 * used * shape.r * shape.H) * shape.dtype.itemsize
    flops = (8 if shape.backward else 4) * rows * rank * shape.H
    return floor_ms(flops, moved, shape.dtype)


def lines(shape: Shape, options: argparse.Namespace) -> list[dict[str, Any]]:
    low = floor(shape)
    with torch.inference_mode(not shape.backward):
        times, others_share = measure(candidates(shape, options.compiled), options)
    others = {name: t.p50 for name, t in times.items() if name not in ("native", "native new", "linear")}
    kept = {name: t for name, t in others.items() if name not in IN_PLACE} or others
    best = {False: min(others.values()), True: min(kept.values())}
    return [
        {
            "way": name,
            "B": shape.B, "T": shape.T, "H": shape.H, "P": shape.P, "K": shape.K, "r": shape.r,
            "dtype": dtype_name(shape.dtype), "slots": shape.slots,
            "pass": "backward" if shape.backward else "forward",
            **times_of(t, best[name.endswith("new")], low),
            "to_linear": f"{t.p50 / times['linear'].p50:.2f}",
            "other_load": f"{others_share:.2f}",
        }
        for name, t in times.items()
    ]  # fmt: skip


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Time against tokens per batch, at the first target's width and slots."""
    shown = [
        row
        for row in rows
        if (row["H"], row["P"], row["K"], row["r"], row["slots"]) == ("768", "20", "4", "12", "uniform")
    ]
    labels = {
        "native": "slm_fast",
        "gather bmm": "gather + baddbmm_",
        "gather bmm compiled": "gather + baddbmm_, compiled",
        "peft mixed": "PEFT mixed batch, once for each of the K",
        "arrow": "PEFT Arrow",
        "dense": "all slots dense",
        "materialised": "materialised ΔW (the paper's code)",
        "linear": "the frozen linear itself",
    }
    tokens = {"T = 1 (decoding)": ("1",), "T = 128 or 512 (prefill, classification)": ("128", "512")}
    plot_times(
        {name: [row for row in shown if row["T"] in lengths] for name, lengths in tokens.items()},
        lambda row: int(row["B"]) * int(row["T"]),
        labels,
        path,
        title="Adding 4 of 20 slots of rank 12 to a 768-wide layer, float32",
        axis="tokens in the batch",
    )


def main(arguments: Sequence[str]) -> int:
    return run(__doc__, "multi_lora", TARGETS, SWEEP, lines, plot, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
