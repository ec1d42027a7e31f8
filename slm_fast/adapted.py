"""A frozen linear layer that adds each sample's increments to its output, and the one thing such layers share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from slm_fast.linear import OneDnnLinear
from slm_fast.ops import Route, multi_lora
from slm_fast.ops.multi_lora import multi_lora_

Values = Mapping[str, tuple[Tensor, Tensor]]  # module name -> (lora_a [P, r, I], lora_b [P, r, O])


class Adaptation:
    """What the adapted layers add to the batch now passing through: nothing until a route is set."""

    def __init__(self) -> None:
        self.values: Values | None = None
        self.route: Route | None = None

    @contextmanager
    def using(self, values: Values, route: Route | None) -> Iterator[None]:
        """Adapt what passes inside the block. `route` may still be None and be set on the way (see model.py)."""
        if self.values is not None:
            raise RuntimeError("the model is already adapting a batch; one batch passes at a time")
        self.values, self.route = values, route
        try:
            yield
        finally:
            self.values = self.route = None


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

    @property
    def weight(self) -> Any:
        """The base's weight: some models look at its dtype before they call the layer."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        route, values = self.adaptation.route, self.adaptation.values
        if route is None or values is None or route.slot_ids.shape[1] == 0 or self.name not in values:
            return y
        lora_a, lora_b = values[self.name]
        add = multi_lora_ if self._output_is_ours() else multi_lora
        return add(x, lora_a, lora_b, route.slot_ids, route.weights, y)

    def _output_is_ours(self) -> bool:
        """Whether nobody else holds what the base returned, so that it may be overwritten. Of a plain linear layer
        without hooks that is known; another module may return its input, or something that it keeps."""
        return type(self.base) in (nn.Linear, OneDnnLinear) and not self.base._forward_hooks
