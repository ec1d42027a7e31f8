"""Other ways to apply a layer's increments, as modules that replace slm_fast's adapted layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from benchmarks.speed.operators.bench_multi_lora import materialised
from slm_fast import ScalableLM
from slm_fast.layers import AdaptedLinear
from slm_fast.ops import Route

# (base, x [B, T, I], lora_a [P, r, I], lora_b [P, r, O], route [B, K]) -> y [B, T, O]
Pass = Callable[[Any, Tensor, Tensor, Tensor, Route], Tensor]


def base_only(base: Any, x: Tensor, lora_a: Tensor, lora_b: Tensor, route: Route) -> Tensor:
    """No increments."""
    y: Tensor = base(x)
    return y


def per_sample(base: Any, x: Tensor, lora_a: Tensor, lora_b: Tensor, route: Route) -> Tensor:
    """Each sample's whole increment, [B, I, O], made by one product over its K slots, then one product with x."""
    return materialised(base(x), x, lora_a, lora_b, route.slot_ids, route.weights)


def released(base: Any, x: Tensor, lora_a: Tensor, lora_b: Tensor, route: Route) -> Tensor:
    """The paper's released code: the increments of a sample's K slots, [B, K, I, O], and their weighted sum."""
    y: Tensor = base(x)
    weights = route.weights.to(x.dtype)[..., None, None]
    increment_BIO = (weights * (lora_a[route.slot_ids].transpose(2, 3) @ lora_b[route.slot_ids])).sum(1)
    return y + x @ increment_BIO


def one_task(base: Any, x: Tensor, lora_a: Tensor, lora_b: Tensor, route: Route) -> Tensor:
    """A batch of one task: its increment is added to the weight once per batch."""
    slot = int(route.slot_ids[0, 0])
    return nn.functional.linear(x, base.weight + (lora_a[slot].T @ lora_b[slot]).T, base.bias)


class Replacement(nn.Module):
    """Replaces an adapted layer: same base, values and route, applied in another way."""

    def __init__(self, layer: AdaptedLinear, way: Pass) -> None:
        super().__init__()
        self.layer, self.way = layer, way

    @property
    def weight(self) -> Any:
        """The base's weight: some models check its dtype before they call the layer."""
        return self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        base: Any = self.layer.base
        route, increments = self.layer.adaptation.route, self.layer.increments
        if route is None or increments is None:
            y: Tensor = base(x)
            return y
        lora_a, lora_b = increments
        return self.way(base, x, lora_a, lora_b, route)


def replace_layers(slm: ScalableLM, ways: Mapping[str, Pass]) -> None:
    """Make the adapted layers named apply their increments in other ways from now on."""
    lm = slm.model.backbone.model
    for name, way in ways.items():
        lm.set_submodule(name, Replacement(lm.get_submodule(name), way))
