"""multi_lora against each sample's materialised increment in float64, and against the reference backend."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.autograd import forward_ad

from slm_fast import ops
from slm_fast.errors import InputError
from slm_fast.ops import dispatch

NAMES = ("x", "lora_a", "lora_b", "weights", "base")


def closed_form(x, lora_a, lora_b, slot_ids, weights, base=None):
    """Each row of x times its route's materialised sum of w * A^T B, in float64; differentiable."""
    x, lora_a, lora_b, weights = (t.double() for t in (x, lora_a, lora_b, weights))
    zero = x.new_zeros(x.shape[-1], lora_b.shape[2])
    beams, rows = len(x) // max(len(slot_ids), 1), []
    for i in range(len(x)):
        route = zip(slot_ids[i // beams].tolist(), weights[i // beams], strict=True)
        rows.append(x[i] @ sum((w * lora_a[s].T @ lora_b[s] for s, w in route if s >= 0), zero))
    y = torch.stack(rows) if rows else x @ zero
    return y if base is None else y + base.double()


def example(device="cpu", dtype=torch.float32, *, B=3, beams=1, T=5, K=3, P=7, r=3, I=13, O=11, seed=0):
    """Keyword arguments of one call. Sizes permitting, row 0 has a slot twice and the last row has a -1."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(device, dtype)

    rows = (B * beams,) if T is None else (B * beams, T)
    slot_ids = torch.randint(-1, P, (B, K), generator=random)
    slot_ids[:1, :2] = min(P - 1, 1)
    if slot_ids.numel() > 1:
        slot_ids[-1, -1] = -1
    weights = torch.rand(B, K, generator=random, dtype=torch.float64)
    return {
        "x": normal(*rows, I),
        "lora_a": normal(P, r, I),
        "lora_b": normal(P, r, O),
        "slot_ids": slot_ids.to(device),
        "weights": weights.to(device, torch.float64 if dtype == torch.float64 else torch.float32),
        "base": normal(*rows, O),
    }


def gradients(function, call, wanted=NAMES):
    """The output y of one call, and the gradient of a fixed projection of y for each argument in `wanted`."""
    call = call | {name: call[name].detach().clone().requires_grad_() for name in wanted if call[name] is not None}
    y = function(**call)
    random = torch.Generator().manual_seed(99)
    projection = torch.randn(y.shape, generator=random, dtype=torch.float64).to(y.device, call["x"].dtype)
    y.backward(projection.to(y.dtype))
    return {"y": y.detach()} | {name: call[name].grad for name in NAMES if call[name] is not None}


def assert_near(got, expected, tolerance):
    assert (got.double() - expected.double()).norm() <= tolerance * expected.double().norm()


SIZES = {
    "odd": {},
    "two-dimensional x": {"T": None},
    "beams": {"beams": 3},
    "beams of two-dimensional x": {"beams": 4, "T": None},
    "all ones": {"B": 1, "T": 1, "K": 1, "P": 1, "r": 1, "I": 1, "O": 1},
    "one sample and token": {"B": 1, "T": 1},
    "rank one, one slot": {"P": 1, "r": 1},
    "more places than slots": {"K": 6, "P": 2},
    "multiples of a tile": {"B": 4, "T": 16, "K": 4, "P": 8, "r": 8, "I": 128, "O": 64},
    "past a tile": {"B": 2, "T": 33, "r": 17, "I": 131, "O": 67},
    "many tokens": {"B": 5, "T": 70, "K": 3, "P": 4, "r": 5, "I": 20, "O": 150},
    "no token": {"T": 0},
    "no slot": {"P": 0},
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("has_base", [True, False], ids=["base", "no base"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_result_and_gradients_equal_the_specification(device, dtype, has_base, sizes):
    call = example(device, dtype, **sizes)
    call["base"] = call["base"] if has_base else None
    got = gradients(ops.multi_lora, call)
    with ops.use_backend("reference"):
        reference = gradients(ops.multi_lora, call)
    on_cpu = {name: None if t is None else t.cpu() for name, t in call.items()}
    for name, expected in gradients(closed_form, on_cpu).items():
        like = call["x"] if name == "y" else call[name]
        assert got[name].dtype == like.dtype
        assert name == "y" or got[name].shape == like.shape
        # If no slot is used, autograd of the closed form gives None and the operator zeros.
        expected = torch.zeros(got[name].shape) if expected is None else expected
        assert_near(got[name].cpu(), expected, TOLERANCE[dtype])
        assert_near(got[name], reference[name], TOLERANCE[dtype])


@pytest.mark.parametrize("sizes", [{"B": 0}, {"B": 0, "T": None}], ids=["tokens", "two-dimensional x"])
def test_an_empty_batch_gives_an_empty_result(device, sizes):
    call = example(device, torch.bfloat16, **sizes)
    for base in (call["base"], None):
        y = ops.multi_lora(**(call | {"base": base}))
        assert y.shape == call["base"].shape
        assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("sizes", [{}, {"T": None, "beams": 2}], ids=["tokens", "beams"])
def test_gradcheck_in_float64(device, interpreted, sizes):
    call = example(device, torch.float64, B=2, K=3, P=3, r=2, I=3, O=4, **({"T": 2} | sizes))
    inputs = tuple(call[name].requires_grad_() for name in NAMES)
    ids = call["slot_ids"]

    def run(x, lora_a, lora_b, weights, base):
        return ops.multi_lora(x, lora_a, lora_b, ids, weights, base)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=interpreted)
    assert_near(run(*inputs), closed_form(*inputs[:3], ids, *inputs[3:]), 1e-12)


NO_SECOND = r"^multi_lora: it has no second derivative; do not differentiate its gradients$"
NO_TANGENTS = r"^multi_lora: it has no forward-mode derivative; use reverse mode \(backward, torch\.autograd\.grad\)$"


@pytest.mark.parametrize("wanted", NAMES[:4])
def test_differentiating_its_gradients_is_an_error_not_zero(device, wanted):
    call = example(device) | {"base": None}
    leaves = [call[name].requires_grad_() for name in NAMES[:4]]
    [gradient] = torch.autograd.grad(ops.multi_lora(**call).square().sum(), [call[wanted]], create_graph=True)
    with pytest.raises(RuntimeError, match=NO_SECOND):
        torch.autograd.grad(gradient.square().sum(), leaves, allow_unused=True)


def test_a_gradient_that_could_be_differentiated_is_the_same_and_that_of_base_can(device):
    call = example(device)
    leaves = [call[name].requires_grad_() for name in NAMES]
    loss = ops.multi_lora(**call).square().sum()
    kept = torch.autograd.grad(loss, leaves, create_graph=True)
    for got, expected in zip(kept, torch.autograd.grad(loss, leaves, retain_graph=True), strict=True):
        assert torch.equal(got, expected)
    [twice] = torch.autograd.grad(kept[4].sum(), [call["base"]], retain_graph=True)
    assert torch.equal(twice, torch.full_like(twice, 2.0))


def tangent_of(run, tensor):
    return torch.func.jvp(run, (tensor,), (torch.ones_like(tensor),))[1]


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_is_an_error_not_zero(device, name):
    call, one = example(device), torch.ones((), device=device)
    inplace = sys.modules["slm_fast.ops.multi_lora"].multi_lora_

    def nested(moved):
        return tangent_of(lambda scale: scale * ops.multi_lora(**call | {name: moved}), one)

    for run in (lambda t: ops.multi_lora(**call | {name: t}), lambda t: inplace(**call | {name: t}), nested):
        for tensor in (call[name], call[name].clone().requires_grad_()):
            with pytest.raises(InputError, match=NO_TANGENTS):
                tangent_of(run, tensor)
    with forward_ad.dual_level(), pytest.raises(InputError, match=NO_TANGENTS):
        ops.multi_lora(**call | {name: forward_ad.make_dual(call[name], call[name])})


def test_forward_mode_elsewhere_does_not_disturb_it_until_a_gradient_needs_its_tangent(device):
    call, one = example(device), torch.ones((), device=device)
    assert torch.equal(tangent_of(lambda scale: scale * ops.multi_lora(**call), one), ops.multi_lora(**call))
    for name in ("base", "x"):
        leaf = call[name].requires_grad_()
        y = ops.multi_lora(**call)
        with forward_ad.dual_level():
            grad = forward_ad.make_dual(torch.zeros_like(y), torch.ones_like(y))
            if name == "base":
                [got] = torch.autograd.grad(y, [leaf], grad)
                assert torch.equal(forward_ad.unpack_dual(got).tangent, torch.ones_like(y))
            else:
                with pytest.raises(RuntimeError, match=NO_TANGENTS):
                    torch.autograd.grad(y, [leaf], grad)
        leaf.requires_grad_(False)


def test_base_is_not_overwritten_and_not_aliased(device):
    for sizes in ({}, {"B": 0}, {"P": 0}):
        call = example(device, **sizes)
        before = call["base"].clone()
        y = ops.multi_lora(**call)
        assert torch.equal(call["base"], before)
        assert y.numel() == 0 or y.data_ptr() != call["base"].data_ptr()


def test_non_contiguous_arguments_equal_contiguous_ones(device):
    call = example(device)
    strided = {name: t.repeat_interleave(2, -1)[..., ::2] for name, t in call.items()}
    turned = {name: t.transpose(0, 1).contiguous().transpose(0, 1) for name, t in call.items()}

    def run(call, projection):
        leaves = [call[name].detach().requires_grad_() for name in NAMES]
        y = ops.multi_lora(*leaves[:3], call["slot_ids"], *leaves[3:])
        return y, *torch.autograd.grad(y, leaves, projection)

    for other in (strided, turned):
        for got, expected in zip(run(other, turned["base"]), run(call, call["base"]), strict=True):
            assert_near(got, expected, 1e-6)


def test_bfloat16_sums_over_features_and_tokens_are_accumulated_in_float32(device):
    """All values are 1: a sum of ones in bfloat16 stops growing at 256."""
    sizes = {"x": (4, 256, 1024), "lora_a": (1, 1, 1024), "lora_b": (1, 1, 512), "base": (4, 256, 512)}
    call = {name: torch.ones(size, dtype=torch.bfloat16, device=device) for name, size in sizes.items()}
    call |= {"slot_ids": torch.zeros(4, 1, dtype=torch.int64, device=device), "weights": torch.ones(4, 1).to(device)}
    leaves = [call[name].requires_grad_() for name in NAMES[:4]]
    y = ops.multi_lora(**(call | {"base": None}))
    grads = torch.autograd.grad(y, leaves, call["base"])
    for got, exact in zip((y, *grads), (1024, 512, 512 * 1024, 1024 * 1024, 512 * 256 * 1024), strict=True):
        assert (got == exact).all()


def test_a_sample_does_not_see_a_nan_of_another_sample_or_of_a_slot_it_does_not_use(device):
    call = example(device, B=3, P=5)
    call["slot_ids"] = torch.tensor([[0, 1, -1], [2, 2, 2], [3, 1, 0]], device=device)
    clean = gradients(ops.multi_lora, call)
    for name, index in (("x", 1), ("lora_a", 2), ("lora_b", 2), ("lora_a", 4), ("lora_b", 4), ("base", 1)):
        dirty = call | {name: call[name].clone()}
        dirty[name][index] = torch.nan
        got = gradients(ops.multi_lora, dirty)
        for result in ("y", "x", "weights"):
            for sample in (0, 2):
                assert_near(got[result][sample], clean[result][sample], 1e-6)


@pytest.mark.parametrize("name", ["x", "weights"])
def test_a_place_without_a_slot_adds_nothing_whatever_stands_there(device, name):
    call = example(device, B=2, K=2)
    call["slot_ids"] = torch.tensor([[-1, -1], [0, -1]], device=device)
    expected = ops.multi_lora(**call)
    call[name] = call[name].clone()
    call[name][0] = torch.inf
    if name == "weights":
        call[name][1, 1] = torch.nan
    y = ops.multi_lora(**call)
    assert torch.equal(y[0], call["base"][0])
    assert_near(y[1], expected[1], 1e-6)


def test_the_gradient_of_a_slot_that_no_sample_uses_is_exactly_zero(device):
    call = example(device, P=9)
    got = gradients(ops.multi_lora, call)
    unused = sorted(set(range(9)) - set(call["slot_ids"].flatten().tolist()))
    assert len(unused) >= 2
    assert (got["lora_a"][unused] == 0).all()
    assert (got["lora_b"][unused] == 0).all()


@pytest.mark.parametrize("wanted", NAMES)
def test_one_requested_gradient_equals_the_same_among_all_and_the_rest_are_not_computed(device, wanted):
    call = example(device)
    got = gradients(ops.multi_lora, call, (wanted,))
    assert_near(got[wanted], gradients(ops.multi_lora, call)[wanted], 1e-6)
    assert [name for name in NAMES if got[name] is not None] == [wanted]
    if wanted != "base":
        backward = getattr(torch.ops.slm_fast, dispatch.operator("multi_lora", device).__name__ + "_backward")
        needed = [name == wanted for name in NAMES[:4]]
        arguments = [call[name] for name in ("x", "lora_a", "lora_b", "slot_ids", "weights")]
        assert [bool(t.numel()) for t in backward(call["base"], *arguments, needed)] == needed


def test_backward_gives_the_same_bits_every_time(device, interpreted):
    call = example(device, B=32, T=8, K=4, P=3, r=8, I=64, O=48)
    first = gradients(ops.multi_lora, call)
    for _ in range(1 if interpreted else 5):
        again = gradients(ops.multi_lora, call)
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_under_autocast_it_is_the_same_call_in_the_autocast_dtype(device):
    call = example(device)
    with torch.autocast(device, torch.bfloat16):
        got = gradients(ops.multi_lora, call)
    halved = {name: t.bfloat16() if name in ("x", "lora_a", "lora_b", "base") else t for name, t in call.items()}
    expected = gradients(ops.multi_lora, halved)
    assert got["y"].dtype == torch.bfloat16
    assert torch.equal(got["y"], expected["y"])
    for name in NAMES:
        assert got[name].dtype == torch.float32
        assert_near(got[name], expected[name], 2e-2)


def test_inference_mode_gives_the_same_bits(device):
    call = example(device)
    with torch.inference_mode():
        y = ops.multi_lora(**call)
    assert torch.equal(y, ops.multi_lora(**call))


@pytest.mark.parametrize("sizes", [{}, {"beams": 2, "T": None}], ids=["tokens", "beams"])
def test_it_compiles_into_one_graph_forward_and_backward(device, sizes):
    call = example(device, **sizes)
    compiled = torch.compile(lambda **c: 2 * ops.multi_lora(**c), fullgraph=True)
    got, expected = gradients(compiled, call), gradients(lambda **c: 2 * ops.multi_lora(**c), call)
    for name in expected:
        assert_near(got[name], expected[name], 1e-6)


ZEROS = torch.zeros
CALL = {"x": ZEROS(4, 5, 6), "lora_a": ZEROS(3, 2, 6), "lora_b": ZEROS(3, 2, 7), "base": ZEROS(4, 5, 7)}
CALL |= {"slot_ids": ZEROS(4, 2, dtype=torch.int64), "weights": ZEROS(4, 2)}
ERRORS = [
    ("x", {"x": ZEROS(6)}),
    ("x", {"x": ZEROS(4, 1, 5, 6)}),
    ("x", {"x": ZEROS(4, 5, 6, dtype=torch.int32)}),
    ("lora_a", {"lora_a": ZEROS(3, 6)}),
    ("lora_a", {"lora_a": ZEROS(3, 2, 5)}),
    ("lora_a", {"lora_a": ZEROS(3, 2, 6).half()}),
    ("lora_a", {"lora_a": ZEROS(3, 2, 6, device="meta")}),
    ("lora_b", {"lora_b": ZEROS(2, 7)}),
    ("lora_b", {"lora_b": ZEROS(2, 2, 7)}),
    ("lora_b", {"lora_b": ZEROS(3, 1, 7)}),
    ("lora_b", {"lora_b": ZEROS(3, 2, 7).half()}),
    ("lora_b", {"lora_b": ZEROS(3, 2, 7, device="meta")}),
    ("slot_ids", {"slot_ids": ZEROS(4, dtype=torch.int64)}),
    ("slot_ids", {"slot_ids": ZEROS(4, 2, dtype=torch.int32)}),
    ("slot_ids", {"slot_ids": ZEROS(3, 2, dtype=torch.int64), "weights": ZEROS(3, 2)}),
    ("slot_ids", {"slot_ids": ZEROS(0, 2, dtype=torch.int64), "weights": ZEROS(0, 2)}),
    ("slot_ids", {"slot_ids": ZEROS(4, 2, dtype=torch.int64, device="meta")}),
    ("weights", {"weights": ZEROS(4, 3)}),
    ("weights", {"weights": ZEROS(4, 2).half()}),
    ("weights", {"weights": ZEROS(4, 2).double()}),
    ("weights", {"weights": ZEROS(4, 2, device="meta")}),
    ("base", {"base": ZEROS(4, 5, 6)}),
    ("base", {"base": ZEROS(4, 7)}),
    ("base", {"base": ZEROS(4, 5, 7).half()}),
    ("base", {"base": ZEROS(4, 5, 7, device="meta")}),
]


@pytest.mark.parametrize(("name", "wrong"), ERRORS)
def test_each_wrong_argument_is_an_error_that_names_it(name, wrong):
    with pytest.raises(InputError, match=rf"^{name}: "):
        ops.multi_lora(**(CALL | wrong))


@pytest.mark.parametrize("slot", [-2, 3])
def test_a_slot_id_out_of_range_is_an_error_that_gives_the_range(device, slot):
    call = {name: tensor.clone().to(device) for name, tensor in CALL.items()}
    call["slot_ids"][1, 1] = slot
    if device == "cuda" and dispatch.operator("multi_lora", device) is not torch.ops.slm_fast.multi_lora_reference:
        # Checking the ID would wait for the device. It adds nothing, and no memory outside the slots is read.
        call["base"] = torch.ones_like(call["base"])
        assert torch.equal(ops.multi_lora(**call), call["base"])
        return
    with pytest.raises(InputError, match=rf"^slot_ids: expected -1\.\.2, got .*{slot}"):
        ops.multi_lora(**call)
