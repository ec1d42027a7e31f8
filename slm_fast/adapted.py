"""A frozen linear layer that adds each sample's increments to its output, and the one thing such layers share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slm_fast.linear import PLAIN
from slm_fast.ops import Route, dispatch, multi_lora
from slm_fast.ops.multi_lora import multi_lora_

Values = Mapping[str, tuple[Tensor, Tensor]]  # module name -> (lora_a [P, r, I], lora_b [P, r, O])


class Adaptation:
    """What the adapted layers add to the batch now passing through: nothing until a route is set."""

    def __init__(self) -> None:
        self.values: Values | None = None
        self.route: Route | None = None
        self.layers: list[AdaptedLinear] = []

    @contextmanager
    def using(self, values: Values, route: Route | None) -> Iterator[None]:
        """Adapt what passes inside the block. `route` may still be None and be set on the way (see model.py)."""
        if self.values is not None:
            raise RuntimeError("the model is already adapting a batch; one batch passes at a time")
        self.values, self.route = values, route
        for layer in self.layers:
            layer.__dict__["increments"] = values.get(layer.name)  # nn.Module's own way takes a microsecond
        try:
            yield
        finally:
            self.values = self.route = None
            for layer in self.layers:
                layer.__dict__["increments"] = None


class AdaptedLinear(nn.Module):
    """Stands in the place of `base` and calls it unopened, so a quantised or otherwise opaque layer works.

    Args:
        base: any module from [..., in_features] to [..., out_features].
        name: under which the pool keeps this layer's values.
    """

    def __init__(self, base: nn.Module, name: str, adaptation: Adaptation) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.adaptation = adaptation
        # This layer's values while a batch passes. Were they looked up by name in `forward`, torch.compile would make a
        # graph for each layer where one serves all.
        self.increments: tuple[Tensor, Tensor] | None = None
        adaptation.layers.append(self)

    @property
    def weight(self) -> Any:
        """The base's weight: some models look at its dtype before they call the layer."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        base: Any = self.base
        route, increments = self.adaptation.route, self.increments
        if route is None or increments is None or route.slot_ids.shape[1] == 0:
            y: Tensor = base(x)
            return y
        lora_a, lora_b = increments
        if dispatch.MEASURED and self._in_one_kernel(base, x, lora_a, route):
            y = torch.ops.slm_fast.adapted_linear_triton(
                x, base.weight, base.bias, lora_a, lora_b, route.slot_ids, route.weights
            )
            return y
        y = base(x)
        # What a plain linear layer without hooks returned is nobody else's, so it may be overwritten. Another module
        # may return its input, or something that it keeps.
        add = multi_lora_ if type(base) in PLAIN and not base._forward_hooks else multi_lora
        return add(x, lora_a, lora_b, route.slot_ids, route.weights, y)

    @staticmethod
    def _in_one_kernel(base: Any, x: Tensor, lora_a: Tensor, route: Route) -> bool:
        """Whether a kernel that has the base's product in it may run, and was measured to win."""
        if type(base) not in PLAIN or not dispatch.fused_wins(
            x.device.type, "narrow" if max(base.in_features, base.out_features) <= 2048 else "wide"
        ):
            return False
        watched = base._forward_hooks or base._forward_pre_hooks or torch.is_autocast_enabled(x.device.type)
        same = x.dtype == base.weight.dtype == lora_a.dtype and x.dim() == 3 and len(x) == len(route.slot_ids)
        fits = 0 < route.slot_ids.shape[1] * lora_a.shape[1] <= 256 // x.dtype.itemsize and x.dtype != torch.float64
        return not (watched or torch.is_grad_enabled()) and same and fits
