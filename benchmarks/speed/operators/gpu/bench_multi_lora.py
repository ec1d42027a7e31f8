"""multi_lora on a GPU. Run it with `python -m benchmarks.speed.operators.gpu OUT`.

Every way is the frozen linear layer followed by its increments, so that the ratio to the linear layer alone is the cost
to a user.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks.speed.operators import bench_multi_lora as cpu
from benchmarks.speed.operators.command import Ways, dtype_name
from benchmarks.speed.operators.gpu.compare import Rows, backends_of, checked, lines, measure
from benchmarks.speed.operators.gpu.timing import floor_ms, sets_of_inputs
from slm_fast.ops.adapted_linear import size_of

BF16 = torch.bfloat16
SETS_OF_SLOW_WAYS = 2  # PEFT creates a module per slot


@dataclass(frozen=True)
class Shape(cpu.Shape):
    """One case. out: output features if not H. most: the target for linear plus increments, as a multiple of the
    linear alone."""

    dtype: torch.dtype = BF16
    out: int = 0
    most: float = 0.0

    @property
    def features_out(self) -> int:
        return self.out or self.H

    @property
    def size(self) -> str:
        if self.T == 1:
            return "decode"
        return "tokens" if self.dtype.itemsize == 2 and self.K * self.r <= 64 else "other"


SEVEN_B = Shape(B=8, T=512, H=4096, P=20, K=4, r=8)
SHAPES = [
    replace(SEVEN_B, most=1.14),
    Shape(most=1.35),
    Shape(T=1, H=4096, K=2, r=8, most=1.30),
    Shape(T=1, H=4096, P=64, K=2, r=8, slots="distinct", most=1.50),
    replace(SEVEN_B, backward=True, most=1.40),
    replace(SEVEN_B, out=11008),
    replace(SEVEN_B, H=11008, out=4096),
    Shape(T=512, H=1024),
    Shape(B=52, T=80, H=4096, P=20, K=4, r=8),
    Shape(B=128, T=64),
    Shape(B=256, P=1000),
    Shape(dtype=torch.float32),
    Shape(backward=True),
    *(Shape(B=B, T=1, H=4096, K=2, r=8) for B in (1, 256)),
    Shape(B=256, T=1, H=4096, P=1000, K=2, r=8),
    Shape(T=1, H=768),
]


def tiny(shape: Shape) -> Shape:
    """The case for a dry run."""
    out = 16 if shape.out else 0
    return replace(shape, B=2, T=min(shape.T, 3), H=24, out=out, P=5, K=2, r=2, slots="same", most=1.0)


def vllm_times_k(
    x: Tensor, lora_a: Tensor, lora_b: Tensor, ids: Tensor, weights: Tensor
) -> Callable[[Tensor], Tensor] | None:
    """vLLM's LoRA kernels, which take one adapter per token and no weights: shrink, scale and expand for each k."""
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


def inputs(shape: Shape, device: str, seed: int) -> dict[str, Tensor]:
    """One set of the layer's inputs, random and seeded."""
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


def _before_linear(op: Callable[..., Tensor], arguments: tuple[Tensor, ...], matrix: Tensor) -> Tensor:
    """The increments first, then the frozen product accumulated onto them: a GEMM reads its accumulator almost for
    free."""
    y: Tensor = op(*arguments, None)
    y.view(-1, y.shape[-1]).addmm_(arguments[0].view(-1, matrix.shape[1]), matrix.t())
    return y


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
    if "cuda" in calls:
        calls["cuda before linear"] = lambda: _before_linear(torch.ops.slm_fast.multi_lora_cuda, arguments, matrix)
    widest = 256 // size
    with_base = []
    if "triton" in backends_of("adapted_linear", "", device) and shape.K * shape.r <= widest:
        with_base.append("triton")
    if size_of(x, matrix, lora_a, ids) in ("tiles", "packed"):
        with_base.append("cuda")
    for name in with_base:
        op = getattr(torch.ops.slm_fast, f"adapted_linear_{name}")
        calls[f"{name} with base"] = partial(op, x, matrix, None, *arguments[1:])
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
    """The base's input gradient, then what the increments add to it: all four gradients."""
    x, matrix, lora_a, lora_b, ids, weights = given.values()
    grad = output_gradient(shape, x.device)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, lora_a, lora_b, weights)]
    y = torch.zeros_like(grad)
    calls: Ways = {"linear": lambda: grad @ matrix}

    def gradients(result: Tensor) -> Callable[[], object]:
        return lambda: (grad @ matrix, *torch.autograd.grad(result, leaves, grad, retain_graph=True))

    for name in backends_of("multi_lora", "other", x.device.type):  # those with a backward pass
        op = getattr(torch.ops.slm_fast, f"multi_lora_{name}")
        calls[name] = gradients(op(leaves[0], leaves[1], leaves[2], ids, leaves[3], y))
    calls["gather bmm"] = gradients(cpu.gather_bmm(y, leaves[0], leaves[1], leaves[2], ids, leaves[3]))
    return calls


def exact_layer(shape: Shape, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The layer's exact output or (backward) gradients, in float64."""
    x, matrix, lora_a, lora_b, ids, weights = (t.double() if t.is_floating_point() else t for t in given.values())
    if not shape.backward:
        return (cpu.gather_bmm(torch.nn.functional.linear(x, matrix), x, lora_a, lora_b, ids, weights),)
    leaves, grad = [t.requires_grad_() for t in (x, lora_a, lora_b, weights)], output_gradient(shape, x.device).double()
    y = cpu.gather_bmm(torch.zeros_like(grad), x, lora_a, lora_b, ids, weights)
    return (grad @ matrix, *torch.autograd.grad(y, leaves, grad))


def output_gradient(shape: Shape, device: torch.device) -> Tensor:
    """The gradient of the layer's output, [B, T, O]."""
    random = torch.Generator(device).manual_seed(7)
    return torch.randn(shape.B, shape.T, shape.features_out, device=device, generator=random).to(shape.dtype)


def multi_lora_rows(shape: Shape, device: str, seconds: float, compiled: Callable[..., Tensor] | None) -> Rows:
    """One row per way and mode (CUDA graph, eager), each first checked against float64."""
    rows, size = shape.B * shape.T, shape.dtype.itemsize
    used = len(cpu.route(shape)[0].unique())
    # Floor of the added time: the arithmetic, or reading slots once and reading and writing y (the linear has read x).
    flops = (8 if shape.backward else 4) * rows * shape.K * shape.r * (shape.H + shape.features_out) / 2
    moved = ((shape.H + shape.features_out) * (rows + used * shape.r)) * size
    low = floor_ms(flops, moved, shape.dtype) if device == "cuda" else 0.0
    sets = sets_of_inputs(moved + shape.H * shape.features_out * size) if device == "cuda" else 1

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
        "dtype": dtype_name(shape.dtype), "slots": shape.slots,
        "pass": "backward" if shape.backward else "forward", "size": shape.size, "target": shape.most or "-",
    }  # fmt: skip
    return lines(case, timed, low, about)
