"""OneDnnLinear behaves as nn.Linear: same weights, results and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from slm_fast import layers
from slm_fast.layers import OneDnnLinear, use_onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def small_products_too(monkeypatch):
    """Use oneDNN even for the small products of these tests, which would otherwise go to torch."""
    monkeypatch.setattr(layers, "_SMALLEST", 0)


def pair(features_in: int = 24, features_out: int = 40, bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    plain = nn.Linear(features_in, features_out, bias=bias)
    quick = copy.deepcopy(plain)
    quick.__class__ = OneDnnLinear
    return plain, quick


@pytest.mark.parametrize("shape", [(3, 17, 24), (40, 24), (2, 24), (0, 24), (1, 1, 24), (16, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_result_is_that_of_linear(shape, bias):
    plain, quick = pair(bias=bias)
    x = torch.randn(shape)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            torch.testing.assert_close(quick(x), plain(x), rtol=1e-5, atol=1e-6)


def test_a_strided_input_is_read_as_it_lies():
    plain, quick = pair()
    last = torch.randn(3, 5, 24)[:, -1:]  # each prompt's last token
    for x in (torch.randn(32, 48)[:, ::2], last):
        torch.testing.assert_close(quick(x), plain(x), rtol=1e-5, atol=1e-6)
    y, expected = quick.bfloat16()(last.bfloat16()), plain.bfloat16()(last.bfloat16().contiguous())
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("trained", [True, False])
def test_gradients_are_those_of_linear_and_a_frozen_weight_gets_none(trained):
    plain, quick = pair()
    grad = torch.randn(3, 17, 40)
    inputs = []
    for layer in (plain, quick):
        layer.requires_grad_(trained)
        torch.manual_seed(1)
        x = torch.randn(3, 17, 24, requires_grad=True)
        layer(x).backward(grad)
        inputs.append(x.grad)
    torch.testing.assert_close(inputs[1], inputs[0], rtol=1e-5, atol=1e-5)
    if trained:
        torch.testing.assert_close(quick.weight.grad, plain.weight.grad, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(quick.bias.grad, plain.bias.grad, rtol=1e-5, atol=1e-5)
    else:
        assert quick.weight.grad is None
        assert quick.bias.grad is None


def test_bfloat16_is_rounded_once_from_the_exact_product():
    plain, quick = pair()
    x = torch.randn(40, 24, dtype=torch.bfloat16)
    plain.bfloat16().double()
    exact = plain(x.double())
    error = (quick.bfloat16()(x).double() - exact).abs()
    assert bool((error <= exact.abs() * 2**-8 + 1e-5).all())


def test_bfloat16_gradients_are_those_of_linear():
    plain, quick = pair()
    grads = []
    for layer in (plain.bfloat16(), quick.bfloat16()):
        torch.manual_seed(1)
        x = torch.randn(3, 17, 24, dtype=torch.bfloat16, requires_grad=True)
        layer(x).float().square().sum().backward()
        grads.append([x.grad, layer.weight.grad, layer.bias.grad])
    for got, expected in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=0.05, atol=0.1)


def test_other_dtypes_and_autocast_go_the_usual_way():
    plain, quick = pair()
    x = torch.randn(20, 24, dtype=torch.float64)
    assert torch.equal(quick.double()(x), plain.double()(x))
    plain, quick = pair()
    with torch.autocast("cpu", torch.bfloat16):
        assert quick(x.float()).dtype == plain(x.float()).dtype == torch.bfloat16


def test_quickening_a_model_leaves_its_weights_names_and_other_layers(monkeypatch):
    monkeypatch.setattr("slm_fast.layers.prefers_onednn", lambda dtype: True)

    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Special(4, 4), nn.LayerNorm(4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    use_onednn(model)
    assert [type(layer) for layer in model] == [OneDnnLinear, Special, nn.LayerNorm]
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
