"""AdaptedLinear may add increments to its base's output in place, but not if something else holds that output."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slm_fast import ops
from slm_fast.layers import Adaptation, AdaptedLinear, OneDnnLinear


class Keeps(nn.Linear):
    """A base that keeps a reference to its last output."""

    def forward(self, x):
        self.kept = super().forward(x)
        return self.kept


@pytest.mark.parametrize("base", [nn.Linear(6, 6), OneDnnLinear(6, 6), Keeps(6, 6), nn.Identity()])
@pytest.mark.parametrize("gradients", [False, True])
def test_an_adapted_layer_adds_to_its_base_and_changes_nothing_that_others_hold(base, gradients):
    torch.manual_seed(0)
    x, lora_a, lora_b = torch.randn(2, 20, 6), torch.randn(3, 2, 6), torch.randn(3, 2, 6)
    route = ops.Route(torch.tensor([[0, 2], [1, -1]]), torch.rand(2, 2))
    expected = ops.multi_lora(x, lora_a, lora_b, *route, base=base(x)).detach()
    adaptation = Adaptation()
    layer, before, seen = AdaptedLinear(base, "layer", adaptation), x.clone(), []
    adaptation.layers.append(layer)
    alone = layer(x)
    with (
        torch.set_grad_enabled(gradients),
        adaptation.using({"layer": (lora_a.requires_grad_(gradients), lora_b)}, route),
    ):
        y = layer(x)
        assert torch.equal(y, expected)
        assert torch.equal(x, before)
        if isinstance(base, Keeps):
            assert torch.equal(base.kept, alone)
        hook = base.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        assert torch.equal(layer(x), expected)
        hook.remove()
    assert torch.equal(seen[0], alone)
    if gradients:
        (grad,) = torch.autograd.grad(y.sum(), lora_a)
        assert grad.abs().sum() > 0
