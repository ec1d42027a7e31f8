"""adapted_linear against each sample's materialised weight matrix in float64, and against the reference backend."""

from __future__ import annotations

import pytest
import torch

from slm_fast import ops
from slm_fast.errors import InputError
from slm_fast.layers import Adaptation, AdaptedLinear
from slm_fast.ops import Route, dispatch
from slm_fast.ops.adapted_linear import adapted_linear

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def example(device="cpu", dtype=torch.float32, *, B=3, T=5, K=2, P=4, r=3, I=21, O=37):
    """Keyword arguments of one call. Sizes permitting, row 0 has a slot twice and the last row has a -1."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(device, dtype)

    slot_ids = torch.randint(-1, P, (B, K), generator=random)
    slot_ids[:1, :2] = P - 1
    if slot_ids.numel() > 1:
        slot_ids[-1, -1] = -1
    call = {"x": normal(B, T, I), "weight": normal(O, I), "bias": normal(O)}
    call |= {"lora_a": normal(P, r, I), "lora_b": normal(P, r, O)}
    weights = torch.rand(B, K, generator=random, dtype=torch.float64)
    weights = weights.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    return call | {"slot_ids": slot_ids.to(device), "weights": weights}


def closed_form(x, weight, bias, lora_a, lora_b, slot_ids, weights):
    """Each sample's x times its own materialised matrix, W^T + sum_k w A^T B, in float64."""
    x, weight, lora_a, lora_b, weights = (t.double() for t in (x, weight, lora_a, lora_b, weights))
    rows = []
    for x_TI, ids, ws in zip(x, slot_ids.tolist(), weights, strict=True):
        matrix = weight.T + sum((w * lora_a[s].T @ lora_b[s] for s, w in zip(ids, ws, strict=True) if s >= 0), 0)
        rows.append(x_TI @ matrix)
    y = torch.stack(rows) if rows else x.new_zeros(*x.shape[:2], len(weight))
    return y if bias is None else y + bias.double()


def assert_near(got, expected, tolerance):
    assert got.shape == expected.shape
    assert (got.double() - expected.double()).norm() <= tolerance * expected.double().norm()


SIZES = {
    "odd": {},
    "one token": {"T": 1},
    "all ones": {"B": 1, "T": 1, "K": 1, "P": 1, "r": 1, "I": 1, "O": 1},
    "more places than slots": {"K": 6, "P": 2},
    "multiples of a tile": {"T": 32, "K": 2, "r": 8, "I": 64, "O": 128},
    "past a tile": {"B": 2, "T": 33, "K": 4, "r": 7, "I": 131, "O": 67},
    "no token": {"T": 0},
    "no sample": {"B": 0},
    "no slot": {"P": 0, "B": 1, "K": 1},
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_it_equals_the_closed_form_and_the_specification(device, dtype, has_bias, sizes):
    call = example(device, dtype, **sizes)
    call["bias"] = call["bias"] if has_bias else None
    got = adapted_linear(**call)
    assert got.dtype == dtype
    assert_near(got, closed_form(**call), TOLERANCE[dtype])
    with ops.use_backend("reference"):
        assert_near(got, adapted_linear(**call), TOLERANCE[dtype])


@pytest.mark.parametrize("sizes", [{"K": 0}, {"r": 0}, {"K": 9, "r": 40}], ids=["no place", "no rank", "many columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sizes_that_no_kernel_keeps_run_on_the_reference(sizes, dtype):
    call = example(dtype=dtype, **sizes)
    assert_near(adapted_linear(**call), closed_form(**call), 1e-5 if dtype == torch.float32 else 1e-12)


def test_in_float64_it_is_exact_to_float64():
    call = example(dtype=torch.float64)
    assert_near(adapted_linear(**call), closed_form(**call), 1e-12)


def test_the_base_is_not_rounded_before_the_increments(device):
    """Computes 255 + 1.5 - 255; bfloat16 cannot represent 256.5."""
    sizes = {"x": (1, 2, 16), "weight": (8, 16), "bias": (8,), "lora_a": (1, 1, 16), "lora_b": (1, 1, 8)}
    ones = {name: torch.ones(size, dtype=torch.bfloat16, device=device) for name, size in sizes.items()}
    ones["weight"] *= 255 / 16
    ones["bias"] *= 1.5
    ones["lora_a"] *= -255 / 16
    route = {"slot_ids": torch.zeros(1, 1, dtype=torch.int64, device=device)}
    route["weights"] = torch.ones(1, 1, device=device)
    assert (adapted_linear(**ones, **route) == 1.5).all()


def test_arguments_that_are_not_dense_equal_dense_ones(device):
    call = example(device)
    strided = {name: t.repeat_interleave(2, -1)[..., ::2] for name, t in call.items()}
    turned = call | {"x": call["x"].transpose(0, 1).contiguous().transpose(0, 1), "weight": call["weight"].T.clone().T}
    for other in (strided, turned):
        assert_near(adapted_linear(**other), adapted_linear(**call), 1e-6)


@pytest.mark.parametrize("name", ["lora_a", "lora_b"])
def test_a_slot_that_is_not_finite_reaches_only_samples_that_use_it(device, name):
    call = example(device)
    call["slot_ids"] = torch.tensor([[0, 1], [2, -1], [3, 0]], device=device)
    clean = adapted_linear(**call)
    call[name][2] = torch.nan
    y = adapted_linear(**call)
    assert_near(y[[0, 2]], clean[[0, 2]], 1e-6)
    assert y[1].isnan().any()


def test_a_place_without_a_slot_adds_nothing_whatever_its_weight(device):
    call = example(device, K=1)
    call["slot_ids"].fill_(-1)
    call["weights"].fill_(torch.inf)
    expected = torch.nn.functional.linear(call["x"].double(), call["weight"].double(), call["bias"].double())
    assert_near(adapted_linear(**call), expected, 1e-6)


def test_autocast_does_not_change_the_result(device):
    call = example(device)
    expected = adapted_linear(**call)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(adapted_linear(**call), expected)


def test_it_compiles_into_one_graph(device):
    call = example(device)
    compiled = torch.compile(lambda **c: 2 * adapted_linear(**c), fullgraph=True, backend="aot_eager")
    assert_near(compiled(**call), 2 * adapted_linear(**call), 1e-6)


@pytest.mark.parametrize("blocks", [False, True], ids=["any size", "blocks"])
def test_going_back_through_it_is_an_error(device, blocks):
    call = example(device, torch.bfloat16, B=16, T=32, I=64, O=64) if blocks else example(device)
    y = adapted_linear(**(call | {"lora_a": call["lora_a"].requires_grad_()}))
    with pytest.raises(RuntimeError, match="no autograd formula"):
        y.sum().backward()


ZEROS = torch.zeros


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("x", {"x": ZEROS(3, 21)}),
        ("x", {"x": ZEROS(6, 5, 21)}),
        ("weight", {"weight": ZEROS(37, 20)}),
        ("weight", {"weight": ZEROS(36, 21)}),
        ("weight", {"weight": ZEROS(37, 21).half()}),
        ("weight", {"weight": ZEROS(37, 21, device="meta")}),
        ("bias", {"bias": ZEROS(36)}),
        ("bias", {"bias": ZEROS(37).double()}),
        ("lora_a", {"lora_a": ZEROS(4, 3, 20)}),
        ("lora_b", {"lora_b": ZEROS(4, 2, 37)}),
        ("slot_ids", {"slot_ids": ZEROS(3, 2)}),
        ("slot_ids", {"slot_ids": torch.full((3, 2), 4)}),
        ("weights", {"weights": ZEROS(3, 1)}),
    ],
)
def test_each_wrong_argument_is_an_error_that_names_it(name, wrong):
    with pytest.raises(InputError, match=rf"^{name}: "):
        adapted_linear(**(example() | wrong))


@pytest.mark.skipif(dispatch.TRITON_MISSING is not None, reason=str(dispatch.TRITON_MISSING))
def test_an_adapted_layer_takes_the_kernel_with_the_base_only_where_it_was_measured_to_win(monkeypatch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    call = example(device, torch.bfloat16, B=16, T=32, K=2)  # features that fill no tiles
    base = torch.nn.Linear(21, 37, dtype=torch.bfloat16, device=device)
    layer = AdaptedLinear(base, "layer", Adaptation())
    layer.adaptation.layers.append(layer)
    values, route = {"layer": (call["lora_a"], call["lora_b"])}, Route(call["slot_ids"], call["weights"])
    taken = []
    monkeypatch.setattr("slm_fast.layers.adapted_linear", lambda *given: taken.append(True) or adapted_linear(*given))

    def run():
        taken.clear()
        with layer.adaptation.using(values, route), ops.use_backend("triton"):
            return layer(call["x"]).detach()

    with torch.no_grad():
        expected = run()
        assert not taken  # no measurement
        monkeypatch.setattr(dispatch, "MEASURED", {(device, "adapted_linear", "narrow"): ("triton", "reference")})
        assert_near(run(), expected, 1e-2)
        assert taken
        handle = base.register_forward_hook(lambda *_: None)  # it needs the base layer to be called
        run()
        assert not taken
        handle.remove()
    run()
    assert not taken  # the kernel computes no gradients


def test_forward_mode_through_it_is_an_error(device):
    call = example(device)
    for name in ("x", "weight", "bias", "lora_a", "lora_b", "weights"):
        with pytest.raises(InputError, match=r"^adapted_linear: it has no forward-mode derivative; use reverse mode "):
            torch.func.jvp(lambda t, name=name: adapted_linear(**call | {name: t}), (call[name],), (call[name],))
