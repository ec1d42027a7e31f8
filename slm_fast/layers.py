"""Linear layers: one that adds each sample's increments to a frozen base, and products through oneDNN.

On a CPU torch sends float32 products to MKL, which on AMD processors is slower than oneDNN; both are part of torch.
bfloat16 products go to oneDNN anyway, but torch first writes the bias to the result and reads it back. The choice
depends on the processor alone, so that runs on one machine are repeatable bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from slm_fast.ops import Route, dispatch, multi_lora
from slm_fast.ops.adapted_linear import FEWEST_ROWS, adapted_linear, size_of
from slm_fast.ops.multi_lora import multi_lora_

Values = Mapping[str, tuple[Tensor, Tensor]]  # module name -> (lora_a [P, r, I], lora_b [P, r, O])

# Number of multiplications below which MKL is faster in float32, since oneDNN takes longer to start. (In bfloat16
# oneDNN is never slower, and torch takes seconds for a few non-contiguous rows, such as the last tokens of prompts.)
_SMALLEST = 1 << 21


@cache
def processor() -> str:
    """What Linux says about the processor; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    return info.read_text() if info.exists() else ""


def has_bfloat16() -> bool:
    """Whether the processor has bfloat16 multiplication."""
    return any(f" {flag}" in processor() for flag in ("avx512_bf16", "amx_bf16"))


@cache
def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN supports products of this dtype on this processor."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def prefers_onednn(dtype: torch.dtype) -> bool:
    """Whether products of this dtype go straight to oneDNN on this machine."""
    if not torch.backends.mkldnn.is_available():
        return False
    return {torch.float32: "AuthenticAMD" in processor(), torch.bfloat16: has_bfloat16()}.get(dtype, False)


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
    """nn.Linear that uses oneDNN if input and weight are float32 or bfloat16, on a CPU that oneDNN supports."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        known = x.dtype == weight.dtype and x.device.type == "cpu" and onednn_multiplies(x.dtype)
        known = known and not torch.is_autocast_enabled("cpu")
        gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        numbers = x.numel()
        small = numbers * weight.shape[0] < _SMALLEST and x.dtype == torch.float32
        if small or not known or numbers == 0 or torch.compiler.is_compiling():
            return nn.functional.linear(x, weight, bias)
        if gradients:
            y: Tensor = _Product.apply(x, weight, bias)
            return y
        return _product(x, weight, bias)


PLAIN = (nn.Linear, OneDnnLinear)  # exact types: other modules, including subclasses, may compute anything


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer with ordinary weights (torchao's quantised layers differ only in their
    weight)."""
    return type(module) in PLAIN and type(module._parameters.get("weight")) is nn.Parameter


def is_watched(module: nn.Module) -> bool:
    """Whether calling a module does more than its class's `forward`: hooks, or a `forward` of its own (which
    torch.compile does not look for)."""
    if module._forward_hooks or module._forward_pre_hooks or torch.compiler.is_compiling():
        return bool(module._forward_hooks or module._forward_pre_hooks)
    return bool("forward" in module.__dict__ or _global_forward_hooks or _global_forward_pre_hooks)


def use_onednn(model: nn.Module) -> None:
    """Let every plain nn.Linear of a model use oneDNN where it is faster. Weights, names and hooks do not change."""
    for module in model.modules():
        if type(module) is nn.Linear and is_plain(module) and prefers_onednn(module.weight.dtype):
            module.__class__ = OneDnnLinear


@contextmanager
def rounded_for_autocast(modules: Iterable[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Inside the block, the plain linear layers among the modules hold their frozen weights in `dtype`.

    Autocast rounds weights to the same values, but caches only trainable ones and rounds all others again in every
    pass.
    """
    held = [
        (module, module.weight, module.bias)
        for module in modules
        if isinstance(module, nn.Linear) and is_plain(module)
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


class Adaptation:
    """What the adapted layers add to the current batch: nothing until a route is set."""

    def __init__(self) -> None:
        self.values: Values | None = None
        self.route: Route | None = None
        self.layers: list[AdaptedLinear] = []

    @contextmanager
    def using(self, values: Values, route: Route | None) -> Iterator[None]:
        """Adapt passes inside the block. `route` may be None and be set during the pass (see model.py)."""
        if self.values is not None:
            raise RuntimeError("the model is already adapting a batch; one batch passes at a time")
        self.values, self.route = values, route
        for layer in self.layers:
            own = layer.__dict__  # setting attributes of an nn.Module takes a microsecond
            own["adaptation"], own["increments"] = self, layer.find(values)
        try:
            yield
        finally:
            self.values = self.route = None
            for layer in self.layers:
                layer.__dict__["increments"] = None


class AdaptedLinear(nn.Module):
    """Takes the place of `base` and calls it as a black box, so that quantised and other opaque layers work.

    If a model is given twice, its adapted layers are reused: they serve whichever adaptation has a batch passing.

    Args:
        base: any module from [..., in_features] to [..., out_features].
        name: name of this layer's values in the pool.
    """

    def __init__(self, base: nn.Module, name: str, adaptation: Adaptation) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.adaptation = adaptation
        # This layer's values during a pass. If `forward` looked them up by name, torch.compile would make a graph for
        # each layer instead of one for all.
        self.increments: Any = None
        self.register_load_state_dict_pre_hook(_under_base)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Weights keep the names that they have without this layer, so that saved models open anywhere."""
        return self.base.state_dict(*args, **kwargs)

    @property
    def weight(self) -> Any:
        """The base's weight: some models look at its dtype before calling the layer."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        base: Any = self.base
        route, increments = self.adaptation.route, self.increments
        if route is None or increments is None or route.slot_ids.shape[1] == 0:
            y: Tensor = base(x)
            return y
        if self._in_one_kernel(base, x, increments, route):
            lora_a, lora_b = increments
            return adapted_linear(x, base.weight, base.bias, lora_a, lora_b, route.slot_ids, route.weights)
        y = base(x)
        if len(x) < len(route.slot_ids):
            return self._add_to_each_row(x, y, route)
        return self._add(x, y, route)

    def _add(self, x: Tensor, y: Tensor, route: Route) -> Tensor:
        """Add the increments to the base's output."""
        base: Any = self.base
        # The output of a plain linear layer without hooks has no other users, so it may be overwritten. Another module
        # may return its input, or something that it keeps.
        add = multi_lora_ if is_plain(base) and not base._forward_hooks else multi_lora
        lora_a, lora_b = self.increments
        return add(x, lora_a, lora_b, route.slot_ids, route.weights, y)

    def _add_to_each_row(self, x: Tensor, y: Tensor, route: Route) -> Tensor:
        """Adapt an input [1, T, I] that all rows share, such as DeBERTa's embeddings of relative positions. The
        increments differ between rows, so there is one result per row, [B, T, O]."""
        rows = len(route.slot_ids)
        y = self._add(x.expand(rows, *x.shape[1:]), y.expand(rows, *y.shape[1:]).contiguous(), route)
        return y.as_subclass(ForEachRow)

    def find(self, values: Values) -> Any:
        """This layer's part of the values; None if it has none."""
        return values.get(self.name)

    def _in_one_kernel(self, base: Any, x: Tensor, increments: Any, route: Route) -> bool:
        """Whether a kernel that includes the base's product can run, and was measured to be faster."""
        device = x.device
        if torch.is_grad_enabled() or x.dim() != 3 or len(x) != len(route.slot_ids):
            return False
        if device.type == "cpu" and (x.dtype != torch.bfloat16 or len(x) * x.shape[1] < FEWEST_ROWS):
            return False  # as `size_of` would say, but steps of generation have no time to ask
        if not dispatch.fuses(device.type) or not is_plain(base) or is_watched(base):
            return False
        weight, lora_a = base.weight, increments[0]
        same = x.dtype == weight.dtype == lora_a.dtype and weight.device == device
        if not same or torch.is_autocast_enabled(device.type):
            return False
        return dispatch.fused_wins(device.type, size_of(x, weight, lora_a, route.slot_ids))


class AdaptedFused(AdaptedLinear):
    """An adapted layer whose output features are those of several layers (query, key, value), each with its own values,
    or none.

    Args:
        parts: names of the layers, and their output features.
    """

    def __init__(self, base: nn.Module, name: str, adaptation: Adaptation, parts: Mapping[str, slice]) -> None:
        super().__init__(base, name, adaptation)
        self.parts = dict(parts)

    def find(self, values: Values) -> Any:
        found = [(part, values.get(name)) for name, part in self.parts.items()]
        return found if any(pair for _, pair in found) else None

    def _in_one_kernel(self, base: Any, x: Tensor, increments: Any, route: Route) -> bool:
        return False

    def _add(self, x: Tensor, y: Tensor, route: Route) -> Tensor:
        pieces = [
            y[..., part]
            if pair is None
            else multi_lora(x, pair[0], pair[1], route.slot_ids, route.weights, y[..., part])
            for part, pair in self.increments
        ]
        return torch.cat(pieces, dim=-1)


class ForEachRow(Tensor):
    """A tensor that already has a part for each row of a batch, where the model expects one for all: repeating it for
    the rows returns it unchanged."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.repeat:
            return args[0].as_subclass(Tensor)
        return super().__torch_function__(function, types, args, kwargs or {})


def _under_base(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename the weights of a state dictionary to the names that they have in an adapted layer."""
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}base.{name[len(prefix) :]}"] = state.pop(name)
