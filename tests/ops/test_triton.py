"""Triton backend only: the alternative kernels of an operator, chosen by size, equal the specification.

Runs on a GPU, or on a CPU with Triton's interpreter (see tests/conftest.py)."""

from __future__ import annotations

import pytest
import torch

from slm_fast import ops
from slm_fast.ops import dispatch

pytestmark = pytest.mark.skipif(dispatch.TRITON_MISSING is not None, reason=str(dispatch.TRITON_MISSING))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def example(dtype=torch.float32, *, B=3, T=1, K=2, P=4, r=3, I=21, O=37, seed=0):
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random).to(DEVICE, dtype)

    slot_ids = torch.randint(-1, P, (B, K), generator=random)
    slot_ids[:1, :] = P - 1
    return {
        "x": normal(B, T, I),
        "lora_a": normal(P, r, I),
        "lora_b": normal(P, r, O),
        "slot_ids": slot_ids.to(DEVICE),
        "weights": torch.rand(B, K, generator=random).to(DEVICE),
        "base": normal(B, T, O),
    }


def doubled(call):
    return {name: t.double() if t is not None and t.is_floating_point() else t for name, t in call.items()}


def assert_equals_the_specification(call, tolerance):
    with ops.use_backend("reference"):
        expected = ops.multi_lora(**doubled(call))
    with ops.use_backend("triton"):
        got = ops.multi_lora(**call)
    assert got.dtype == call["x"].dtype
    assert (got.double() - expected).norm() <= tolerance * expected.norm()


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 3], ids=["one token", "beams"])
def test_decoding_with_all_slots_at_once_equals_the_specification(dtype, tokens):
    from slm_fast.ops.triton import multi_lora as in_triton

    call = example(dtype, B=19, T=tokens)
    assert in_triton.shares_slots(call["x"], 2, 4, 3)
    assert_equals_the_specification(call, TOLERANCE[dtype])
    assert_equals_the_specification(call | {"base": None}, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_more_columns_than_fit_at_once_equal_the_specification(dtype):
    assert_equals_the_specification(example(dtype, B=2, T=5, K=5, r=29), TOLERANCE[dtype])


def test_gradients_of_more_columns_than_fit_at_once_equal_the_specification():
    call = example(B=2, T=5, K=5, r=29)
    names = [name for name in call if name != "slot_ids"]

    def gradients(backend, call):
        leaves = {name: call[name].clone().requires_grad_() for name in names}
        with ops.use_backend(backend):
            y = ops.multi_lora(**(call | leaves))
            return torch.autograd.grad(y, list(leaves.values()), call["base"])

    for got, expected in zip(gradients("triton", call), gradients("reference", doubled(call)), strict=True):
        assert (got.double() - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("dtype", "rank"), [(torch.float32, 5), (torch.bfloat16, 5), (torch.float16, 5), (torch.float16, 40)]
)
@pytest.mark.parametrize(
    "needed", [[True] * 4, [True, False, False, False], [False, True, True, True], [False, False, True, False]]
)
def test_gradients_of_many_tokens_in_several_spans_equal_the_specification(dtype, rank, needed, monkeypatch):
    """Two samples share a slot, one has it twice, -1 slots have NaN weights, and x is not contiguous."""
    from slm_fast.ops.triton import multi_lora_backward

    T = 531 if all(needed) else 275  # three spans or two: the interpreter takes seconds for each

    monkeypatch.setattr(multi_lora_backward, "processors", lambda device: 30)
    call = example(dtype, B=3, T=T, K=3, r=rank, I=70, O=24)
    call["slot_ids"] = torch.tensor([[1, 1, 0], [3, -1, 1], [2, -1, -1]], device=DEVICE)
    call["weights"][call["slot_ids"] < 0] = torch.nan
    x = call["x"].repeat(1, 1, 2)[..., :70]  # rows with a stride of twice their length
    tiles = multi_lora_backward.blocks(70, 64) + multi_lora_backward.blocks(24, 64)
    assert multi_lora_backward.spans_of(3, T, tiles, 64, x.device)[0] > 1
    assert multi_lora_backward.serves(x, 3, rank, 24)
    arguments = (x, call["lora_a"], call["lora_b"], call["slot_ids"], call["weights"], needed)
    got = torch.ops.slm_fast.multi_lora_triton_backward(call["base"], *arguments)
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments]
    expected = torch.ops.slm_fast.multi_lora_reference_backward(call["base"].double(), *wide)
    again = torch.ops.slm_fast.multi_lora_triton_backward(call["base"], *arguments)
    for mine, same, right in zip(got, again, expected, strict=True):
        assert mine.shape == right.shape
        assert torch.equal(mine, same)
        assert (mine.double() - right).norm() <= TOLERANCE[dtype] * right.norm()


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_of_all_slots_at_once_one_that_is_not_finite_reaches_only_samples_that_use_it(number):
    call = example(B=19)
    uses = (call["slot_ids"] == 2).any(1)
    assert uses.any()
    assert not uses.all()
    with ops.use_backend("triton"):
        clean = ops.multi_lora(**call)
        for name in ("lora_a", "lora_b"):
            broken = call | {name: call[name].clone()}
            broken[name][2, 1, 5] = number
            y = ops.multi_lora(**broken)
            assert torch.equal(y[~uses], clean[~uses])
            assert not y[uses].isfinite().all(-1).any()


def test_measured_orders_go_before_the_preference(tmp_path, monkeypatch):
    path = tmp_path / "preference.csv"
    path.write_text("# gpu: a card\ndevice,operator,size,backends\ncpu,retrieve,few,triton reference\n")
    monkeypatch.setattr(dispatch, "MEASURED", dispatch.read_measured(path))
    monkeypatch.setattr(dispatch, "PREFERENCE", {"cpu": ("reference",)})
    assert dispatch.operator("retrieve", "cpu", "few") is torch.ops.slm_fast.retrieve_triton
    assert dispatch.operator("retrieve", "cpu", "many") is torch.ops.slm_fast.retrieve_reference


def test_a_pool_in_several_parts_gives_the_route_of_the_specification():
    query, keys = (torch.randn(rows, 24, generator=torch.Generator().manual_seed(rows)) for rows in (20, 300))
    query, keys = query.to(DEVICE), keys.to(DEVICE)
    for options in ({"groups": 2}, {"groups": 2, "aggregate": "vote"}):
        with ops.use_backend("reference"):
            expected = ops.retrieve(query, keys, 5, **options)
        with ops.use_backend("triton"):
            got = ops.retrieve(query, keys, 5, **options)
        assert torch.equal(got.slot_ids, expected.slot_ids)
        torch.testing.assert_close(got.weights, expected.weights)
