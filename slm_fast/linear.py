"""float32 linear layers through oneDNN on processors where its products are faster than MKL's.

torch sends float32 products on a CPU to MKL, which on AMD processors reaches less than half of what oneDNN does; both
are part of torch. Which one is used follows from the processor alone, so that runs repeat bit for bit on one machine.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_FEWEST_ROWS = 16  # below this a product only waits for the weight to be read, and MKL waits better


@cache
def prefers_onednn() -> bool:
    """Whether float32 products go to oneDNN here."""
    info = Path("/proc/cpuinfo")
    return torch.backends.mkldnn.is_available() and info.exists() and "AuthenticAMD" in info.read_text()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., I] @ weight [O, I].T + bias [O]."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


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
    """nn.Linear, through oneDNN when what passes is float32 on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        plain = x.dtype == self.weight.dtype == torch.float32 and x.device.type == "cpu"
        elsewhere = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()  # the compiler has its own way
        if not plain or elsewhere or x.numel() < _FEWEST_ROWS * x.shape[-1]:
            return super().forward(x)
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            y: Tensor = _Product.apply(x, self.weight, self.bias)
            return y
        return _product(x, self.weight, self.bias)


def quicken(model: nn.Module) -> None:
    """Let every plain nn.Linear of a model use oneDNN where that is faster. Weights, names and hooks stay."""
    if prefers_onednn():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDnnLinear
