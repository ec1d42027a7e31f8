"""The native adapted_linear, which multiplies bfloat16 in tiles of AMX, against float64 and in an adapted layer."""

from __future__ import annotations

import pytest
import torch
from test_adapted_linear import assert_near, closed_form, example

from slm_fast.layers import Adaptation, AdaptedLinear
from slm_fast.ops import Route, dispatch
from slm_fast.ops.adapted_linear import adapted_linear, size_of

needs_amx = pytest.mark.skipif(not dispatch.has_amx(), reason="this processor has no AMX")


def native(**call):
    return torch.ops.slm_fast.adapted_linear_native(**call)


def bfloat16(**sizes):
    return example(dtype=torch.bfloat16, **sizes)


SIZES = {
    "one row": {"B": 1, "T": 1, "I": 32, "O": 32},
    "one token per sample": {"B": 70, "T": 1, "K": 2, "P": 50, "I": 64, "O": 64},
    "several samples in a block": {"B": 9, "T": 7, "I": 64, "O": 96, "r": 8},
    "blocks of whole samples": {"B": 3, "T": 64, "I": 96, "O": 32, "K": 4, "r": 8},
    "rows past a block": {"B": 5, "T": 33, "I": 160, "O": 224, "K": 3, "r": 5},
    "more places than slots": {"B": 2, "T": 50, "I": 64, "O": 64, "K": 6, "P": 2},
    "more rows of rank than a step": {"B": 4, "T": 40, "I": 64, "O": 64, "K": 5, "P": 20, "r": 24},
    "rows that share lines of a cache": {"B": 3, "T": 32, "I": 2048, "O": 64},
    "a weight that is passed over by many blocks": {"B": 9, "T": 61, "I": 768, "O": 1056},
    "no place": {"B": 2, "T": 20, "I": 32, "O": 64, "K": 0},
    "no rank": {"B": 2, "T": 20, "I": 32, "O": 64, "r": 0},
    "no token": {"B": 2, "T": 0, "I": 32, "O": 32},
    "no sample": {"B": 0, "T": 5, "I": 32, "O": 32},
}


@needs_amx
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_it_equals_the_closed_form_on_any_number_of_threads(sizes, has_bias):
    call = bfloat16(**sizes)
    call["bias"] = call["bias"] if has_bias else None
    got = native(**call)
    assert got.dtype == torch.bfloat16
    assert_near(got, closed_form(**call), 6e-3)
    threads = torch.get_num_threads()
    try:
        for other in (1, 2, 5):
            torch.set_num_threads(other)
            assert torch.equal(native(**call), got)
    finally:
        torch.set_num_threads(threads)


@needs_amx
@pytest.mark.parametrize("seed", range(5))
def test_a_sample_has_the_same_bits_whatever_other_samples_are_there(seed):
    call = bfloat16(B=16, T=23, I=64, O=256, K=3, P=9, r=7)
    random = torch.Generator().manual_seed(seed)
    call["slot_ids"] = torch.randint(-1, 9, (16, 3), generator=random)
    call["lora_b"][1], call["weights"][:, 1] = call["lora_b"][0], -call["weights"][:, 0]  # which nearly cancel
    rows = ("x", "slot_ids", "weights")
    got = native(**call)
    order = torch.randperm(16, generator=random)
    assert torch.equal(native(**(call | {name: call[name][order] for name in rows})), got[order])
    for chosen in ([2], [6, 0], [1, 2, 3, 4]):
        assert torch.equal(native(**(call | {name: call[name][chosen] for name in rows})), got[chosen])


@needs_amx
def test_rows_that_are_not_dense_equal_dense_ones():
    call = bfloat16(B=4, T=40, I=64, O=64)
    expected = native(**call)
    wide = torch.randn(4, 50, 100).bfloat16()
    wide[:, :40, :64] = call["x"]
    turned = call["x"].transpose(0, 1).contiguous().transpose(0, 1)
    apart = call["x"].repeat_interleave(2, -1)[..., ::2]
    for x in (wide[:, :40, :64], turned, apart):
        assert not x.is_contiguous()
        assert torch.equal(native(**(call | {"x": x})), expected)
    assert torch.equal(native(**(call | {"weight": call["weight"].T.clone().T})), expected)


@needs_amx
@pytest.mark.parametrize("name", ["lora_a", "lora_b"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_a_slot_that_is_not_finite_reaches_only_samples_that_use_it(name, number):
    call = bfloat16(B=6, T=11, I=64, O=512, r=8)
    call["slot_ids"] = torch.tensor([[0, 1], [2, -1], [3, 0], [1, 2], [2, 2], [-1, -1]])
    clean = native(**call)
    call[name][2, 1, 40] = number
    got, expected = native(**call), closed_form(**call)
    assert torch.equal(got[[0, 2, 5]], clean[[0, 2, 5]])
    broken = ~expected.isfinite()
    assert broken[[1, 3, 4]].any()
    assert torch.equal(~got.isfinite(), broken)
    assert_near(got.masked_fill(broken, 0), expected.masked_fill(broken, 0), 6e-3)


@needs_amx
def test_a_row_that_is_not_finite_reaches_no_other():
    call = bfloat16(B=4, T=20, I=64, O=64)
    clean = native(**call)
    call["x"][1, 7, 3], call["x"][3, 19, 63] = torch.nan, torch.inf
    got, expected = native(**call), closed_form(**call)
    assert torch.equal(~got.isfinite(), ~expected.isfinite())
    kept = got.isfinite()
    assert kept.sum() == kept.numel() - 2 * 64
    assert torch.equal(got[kept], clean[kept])


@needs_amx
def test_an_adapted_layer_takes_it_for_many_tokens_without_gradients():
    call = bfloat16(B=16, T=32, I=64, O=96, K=2, r=8)
    layer = AdaptedLinear(torch.nn.Linear(64, 96, dtype=torch.bfloat16), "layer", Adaptation())
    layer.adaptation.layers.append(layer)
    layer.base.weight.data, layer.base.bias.data = call["weight"], call["bias"]
    values, route = {"layer": (call["lora_a"], call["lora_b"])}, Route(call["slot_ids"], call["weights"])

    def run(rows=16):
        some = Route(route.slot_ids[:rows], route.weights[:rows])
        with layer.adaptation.using(values, some):
            return layer(call["x"][:rows])

    with torch.no_grad():
        assert torch.equal(run(), native(**call))
        assert torch.equal(run(), adapted_linear(**call))
        few = native(**(call | {name: call[name][:2] for name in ("x", "slot_ids", "weights")}))
        assert not torch.equal(run(2), few)  # the base rounds before the increments are added
        assert_near(run(2), few, 1e-2)
    with_gradients = run()
    assert with_gradients.requires_grad
    assert_near(with_gradients.detach(), native(**call), 1e-2)


@needs_amx
def test_a_base_whose_call_is_watched_or_replaced_is_called():
    call = bfloat16(B=16, T=32, I=64, O=96, K=2, r=8)
    values, route = {"layer": (call["lora_a"], call["lora_b"])}, Route(call["slot_ids"], call["weights"])
    called = []

    def run(prepare):
        layer = AdaptedLinear(torch.nn.Linear(64, 96, dtype=torch.bfloat16), "layer", Adaptation())
        layer.adaptation.layers.append(layer)
        called.clear()
        handle = prepare(layer.base)
        with torch.no_grad(), layer.adaptation.using(values, route):
            layer(call["x"])
        if handle is not None:
            handle.remove()
        return len(called)

    def see(module, *_):
        if isinstance(module, torch.nn.Linear):
            called.append(module)

    def patch(base):
        forward = base.forward
        base.forward = lambda x: called.append(base) or forward(x)

    assert run(lambda base: None) == 0
    for watch in (
        lambda base: base.register_forward_hook(see),
        lambda base: base.register_forward_pre_hook(see),
        lambda base: torch.nn.modules.module.register_module_forward_hook(see),
        lambda base: torch.nn.modules.module.register_module_forward_pre_hook(see),
        patch,
    ):
        assert run(watch) == 1


def test_what_it_does_not_serve_has_another_size():
    def size(dtype=torch.bfloat16, **sizes):
        call = example(dtype=dtype, **({"B": 16, "T": 32, "I": 64, "O": 64} | sizes))
        return size_of(call["x"], call["weight"], call["lora_a"], call["slot_ids"])

    assert size() == ("blocks" if dispatch.has_amx() else "narrow")
    others = (
        {"T": 10, "B": 40, "r": 8},
        {"B": 7},
        {"I": 48},
        {"O": 65},
        {"K": 5, "r": 20},
        {"K": 0},
        {"dtype": torch.float32},
    )
    assert all(size(**other) != "blocks" for other in others)
    assert size(I=2048, O=2048) != "blocks"


@needs_amx
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("x", {"x": torch.zeros(3, 64).bfloat16()}),
        ("weight", {"weight": torch.zeros(32, 32).bfloat16()}),
        ("bias", {"bias": torch.zeros(31).bfloat16()}),
        ("slot_ids", {"slot_ids": torch.full((3, 2), 4)}),
        ("slot_ids", {"slot_ids": torch.full((3, 2), -2)}),
    ],
)
def test_each_wrong_argument_is_an_error_that_names_it(name, wrong):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        native(**(bfloat16(B=3, T=5, I=64, O=32) | wrong))


@needs_amx
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        (torch.bfloat16, {"I": 48, "O": 32}),
        (torch.bfloat16, {"I": 32, "O": 40}),
        (torch.float32, {"I": 32, "O": 32}),
        (torch.float64, {"I": 32, "O": 32}),
    ],
)
def test_what_fills_no_tiles_is_an_error(dtype, sizes):
    with pytest.raises(ValueError, match=r"^x: expected torch\.bfloat16 with features in multiples of 32, got "):
        native(**example(dtype=dtype, B=3, T=5, **sizes))
