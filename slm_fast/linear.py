"""Linear layers on a CPU straight through oneDNN, where that is faster than the way torch takes; and frozen ones under
autocast.

torch sends float32 products to MKL, which on AMD processors is slower than oneDNN; both are part of torch. bfloat16
products go to oneDNN anyway, but torch writes the bias to the result first and reads it back. Which way is taken
follows from the processor alone, so that runs repeat bit for bit on one machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Multiplications below which MKL is done with float32 before oneDNN has begun. (In bfloat16 oneDNN is never slower, and
# torch takes seconds for a few rows that do not lie together, such as the last tokens of prompts.)
_SMALLEST = 1 << 21
_DTYPES = (torch.float32, torch.bfloat16)


@cache
def processor() -> str:
    """What Linux says of the processor, or nothing elsewhere."""
    info = Path("/proc/cpuinfo")
    return info.read_text() if info.exists() else ""


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself."""
    return any(f" {flag}" in processor() for flag in ("avx512_bf16", "amx_bf16"))


def prefers_onednn(dtype: torch.dtype) -> bool:
    """Whether products of this dtype go straight to oneDNN here."""
    if not torch.backends.mkldnn.is_available():
        return False
    return {torch.float32: "AuthenticAMD" in processor(), torch.bfloat16: has_bfloat16()}.get(dtype, False)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., I] @ weight [O, I].T + bias [O]."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


# In a graph of torch.compile the product is an operator of ours: the compiler's own way with oneDNN's asks for weights
# packed by it, and its way with a plain linear layer goes to MKL.
@torch.library.custom_op("slm_fast::linear_onednn", mutates_args=())
def _product_in_graph(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _product(x, weight, bias)


@_product_in_graph.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        grad_NO = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            grad_x = _product(grad_NO, weight.t(), None).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = _product(grad_NO.t(), x.reshape(-1, x.shape[-1]).t(), None)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_NO.sum(0)
        return grad_x, grad_weight, grad_bias


class OneDnnLinear(nn.Linear):
    """nn.Linear, through oneDNN when what passes is float32 or bfloat16 on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        known = x.dtype == weight.dtype in _DTYPES and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if torch.compiler.is_compiling():  # one graph is for all sizes, so it cannot ask for this batch's
            return _product_in_graph(x, weight, bias) if known and not gradients else super().forward(x)
        numbers = x.numel()
        small = numbers * weight.shape[0] < _SMALLEST and x.dtype == torch.float32
        if small or not known or numbers == 0:
            return nn.functional.linear(x, weight, bias)
        if gradients:
            y: Tensor = _Product.apply(x, weight, bias)
            return y
        return _product(x, weight, bias)


PLAIN = (nn.Linear, OneDnnLinear)  # whose product is known: other modules, subclasses among them, may do anything


def quicken(model: nn.Module) -> None:
    """Let every plain nn.Linear of a model use oneDNN where that is faster. Weights, names and hooks stay."""
    for module in model.modules():
        if type(module) is nn.Linear and prefers_onednn(module.weight.dtype):
            module.__class__ = OneDnnLinear


@contextmanager
def rounded_for_autocast(modules: Iterable[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Inside the block the plain linear layers among the modules hold their frozen weights in `dtype`.

    Autocast rounds weights to the same numbers, but keeps only those of weights that learn, and does it again in every
    pass with all others.
    """
    held = [
        (module, module.weight, module.bias)
        for module in modules
        if isinstance(module, nn.Linear) and type(module) in PLAIN
        if module.weight.dtype == torch.float32 and not module.weight.requires_grad
    ]
    try:
        for module, weight, bias in held:
            module.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
            if bias is not None:
                module.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
        yield
    finally:
        for module, weight, bias in held:
            module.weight, module.bias = weight, bias
