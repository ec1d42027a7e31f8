"""Native CPU backend only: threads, strides, odd sizes, the in-place form and the instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_fast import ops
from slm_fast.errors import InputError, WorkError, lacks_memory
from slm_fast.ops import dispatch
from slm_fast.ops.multi_lora import multi_lora_

pytestmark = pytest.mark.skipif(dispatch.NATIVE_MISSING is not None, reason=str(dispatch.NATIVE_MISSING))
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
SETTINGS = settings(max_examples=60, deadline=None)


@pytest.fixture(autouse=True)
def _native():
    with ops.use_backend("native"):
        yield


@st.composite
def calls(draw, most_tokens=70):
    """multi_lora arguments with sizes around tile edges, -1 slots and repeated slots."""
    size = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 47, 48, 49, 63, 64, 65, 96, 97, 130]))
    B, T, I, O = draw(st.integers(0, 5)), draw(st.integers(0, most_tokens)), draw(size), draw(size)
    P, K, r = draw(st.integers(1, 6)), draw(st.integers(0, 5)), draw(st.integers(0, 9))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def normal(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    call = {"x": normal(B, T, I), "lora_a": normal(P, r, I), "lora_b": normal(P, r, O)}
    call["slot_ids"] = torch.randint(-1, P, (B, K), generator=random)
    call["weights"] = torch.rand(B, K, generator=random)
    call["base"] = normal(B, T, O) if draw(st.booleans()) else None
    if draw(st.booleans()):  # rows that are not adjacent in memory
        call["x"] = call["x"].transpose(0, 1).contiguous().transpose(0, 1)
        if call["base"] is not None:
            call["base"] = torch.cat([call["base"]] * 2, -1)[..., :O]
    return call


def doubled(call, of=lambda number: number):
    return {n: of(t.double()) if t is not None and t.is_floating_point() else t for n, t in call.items()}


def assert_near(got, expected, magnitude, tolerance):
    """`magnitude`: the result from absolute values. A sum may cancel out, but its rounding error does not."""
    assert got.shape == expected.shape
    tolerance = max(tolerance, TOLERANCE[got.dtype])
    assert (got.double() - expected).norm() <= tolerance * magnitude.norm()


def assert_equals_the_specification(call):
    with ops.use_backend("reference"):
        expected, magnitude = (ops.multi_lora(**doubled(call, of)) for of in (torch.clone, torch.abs))
    assert_near(ops.multi_lora(**call), expected, magnitude, TOLERANCE[call["x"].dtype])


@given(calls())
@SETTINGS
def test_any_shape_equals_the_specification_in_float64(call):
    assert_equals_the_specification(call)


@given(calls(most_tokens=3))
@SETTINGS
def test_any_shape_of_few_tokens_equals_the_specification_in_float64(call):
    assert_equals_the_specification(call)


@given(calls())
@SETTINGS
def test_gradients_of_any_shape_equal_the_specification_in_float64(call):
    names = [name for name in ("x", "lora_a", "lora_b", "weights", "base") if call[name] is not None]

    def gradients(call, backend):
        leaves = {name: call[name].detach().clone().requires_grad_() for name in names}
        with ops.use_backend(backend):
            y = ops.multi_lora(**(call | leaves))
            return torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))

    expected, magnitude = (gradients(doubled(call, of), "reference") for of in (torch.clone, torch.abs))
    for results in zip(gradients(call, "native"), expected, magnitude, strict=True):
        assert_near(*results, TOLERANCE[call["x"].dtype])


@given(calls())
@SETTINGS
def test_the_in_place_form_gives_the_same_bits_and_touches_nothing_beside_base(call):
    if call["base"] is None:
        return
    O = call["base"].shape[-1]
    wide = torch.full((*call["base"].shape[:2], O + 3), 7.0, dtype=call["base"].dtype)
    inside = wide[..., 1 : O + 1]
    inside.copy_(call["base"])
    expected = ops.multi_lora(**call)
    torch.ops.slm_fast.multi_lora_native_(**(call | {"base": inside}))
    assert torch.equal(inside, expected)
    assert (wide[..., 0] == 7).all()
    assert (wide[..., O + 1 :] == 7).all()


THREADS = """
import torch
from slm_fast import ops
torch.manual_seed(0)
def bits(B, T, I, O, P, K, r, dtype):
    x, a, b, base = torch.randn(B, T, I), torch.randn(P, r, I), torch.randn(P, r, O), torch.randn(B, T, O)
    leaves = [t.to(dtype).requires_grad_() for t in (x, a, b, base)]
    weights, ids = torch.rand(B, K).requires_grad_(), torch.randint(-1, P, (B, K))
    y = ops.multi_lora(*leaves[:3], ids, weights, leaves[3])
    return y, *torch.autograd.grad(y, [*leaves, weights], torch.randn(y.shape).to(dtype))
for dtype in (torch.float32, torch.bfloat16):
    for shape in ((9, 70, 96, 100, 5, 4, 12), (40, 1, 256, 260, 3, 2, 8)):
        torch.manual_seed(1)
        torch.set_num_threads(1)
        one = bits(*shape, dtype)
        for threads in (2, 3, 5):
            torch.manual_seed(1)
            torch.set_num_threads(threads)
            assert all(torch.equal(p, q) for p, q in zip(one, bits(*shape, dtype), strict=True)), (shape, threads)
query, keys = torch.randn(60, 48), torch.randn(700, 48)
def routes():
    loss = ops.key_loss(query, keys, 3, groups=3, mask_prob=0.3, seed=1)
    several = ops.retrieve(query, keys, 5, groups=3, key_slot=torch.arange(700) // 33)
    return *ops.retrieve(query, keys, 5, groups=3), *several, loss
torch.set_num_threads(1)
one = routes()
torch.set_num_threads(4)
assert all(torch.equal(p, q) for p, q in zip(one, routes(), strict=True))
"""


def run(code, *arguments, **environment):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


def test_forward_and_gradients_have_the_same_bits_for_any_number_of_threads():
    done = run(THREADS)
    assert done.returncode == 0, done.stderr


# Run the operator tests with one instruction set; exits with ABSENT if the processor does not have it.
ABSENT = 77
OPERATOR_TESTS = f"""
import sys, pytest, torch
from slm_fast import _C
name, *files = sys.argv[1:]
if _C.build_info()["instruction_set"] != name:
    sys.exit({ABSENT})
sys.exit(pytest.main(["-q", "-x", "-k", "native and not compile", *files]))
"""


@pytest.mark.parametrize("name", ["amx", "avx512_bf16", "avx512", "avx2", "portable"])
def test_every_instruction_set_this_processor_has_passes_the_operator_tests(name):
    from slm_fast import _C

    if name not in _C.build_info()["instruction_sets"]:
        pytest.skip("not compiled for this architecture")
    if name == _C.build_info()["instruction_set"]:
        return  # the other tests already run this one
    here = os.path.dirname(__file__)
    stems = ("multi_lora", "retrieve", "native_wide", "key_loss", "invariant_linear", "sum_scatters", "poison")
    files = [os.path.join(here, f"test_{stem}.py") for stem in stems]
    done = run(OPERATOR_TESTS, name, *files, SLM_FAST_CPU=name, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")  # unused, and slow
    if done.returncode == ABSENT:
        pytest.skip("this processor does not have it")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def in_place_call():
    zeros = torch.zeros
    call = {"x": zeros(2, 3, 6), "lora_a": zeros(3, 2, 6), "lora_b": zeros(3, 2, 6), "base": zeros(2, 3, 6)}
    return call | {"slot_ids": zeros(2, 2, dtype=torch.int64), "weights": zeros(2, 2)}


def test_an_output_that_overlaps_an_input_or_itself_is_an_error_before_anything_is_written():
    call, op = in_place_call(), torch.ops.slm_fast.multi_lora_native_
    op(**call)
    with pytest.raises(ValueError, match=r"^base: overlaps x in memory"):
        op(**(call | {"base": call["x"]}))
    shared = torch.zeros(40)
    with pytest.raises(ValueError, match=r"^base: overlaps lora_b in memory"):
        op(**(call | {"base": shared[:36].view(2, 3, 6), "lora_b": shared[4:].view(3, 2, 6)}))
    with pytest.raises(ValueError, match=r"^base: rows overlap in memory"):
        op(**(call | {"base": torch.zeros(6).expand(2, 3, 6)}))
    with pytest.raises(ValueError, match=r"^base: expected a dense last axis"):
        op(**(call | {"base": torch.zeros(2, 6, 3).transpose(1, 2)}))


@pytest.mark.parametrize("name", ["x", "lora_a", "lora_b", "weights", "base"])
def test_the_operator_itself_checks_dtypes_and_shapes(name):
    call, op = in_place_call(), torch.ops.slm_fast.multi_lora_native
    for wrong in (call[name].to(torch.int32), call[name][..., :-1]):
        with pytest.raises(ValueError, match=r"^(x|lora_a|lora_b|slot_ids|weights|base): "):
            op(**(call | {name: wrong}))
    with pytest.raises(ValueError, match=r"^slot_ids: expected -1\.\.2, got 0\.\.3"):
        op(**(call | {"slot_ids": torch.tensor([[0, 3], [0, 0]])}))


def test_the_form_that_may_overwrite_base_leaves_shared_memory_alone():
    call = in_place_call()
    call |= {"lora_a": torch.randn(3, 2, 6), "lora_b": torch.randn(3, 2, 6), "weights": torch.ones(2, 2)}
    call["x"] = torch.randn(2, 3, 6)
    expected = ops.multi_lora(**call)
    assert multi_lora_(**call) is call["base"]
    assert torch.equal(call["base"], expected)
    before = call["x"].clone()
    y = multi_lora_(**(call | {"base": call["x"]}))
    assert torch.equal(call["x"], before)
    assert torch.equal(y, ops.multi_lora(**(call | {"base": before})))


def test_bad_arguments_become_input_errors_that_name_them():
    call = in_place_call()
    with pytest.raises(InputError, match=r"^lora_a: expected \[P, r, 6\] to match x, got \[3, 2, 5\]$"):
        ops.multi_lora(**(call | {"lora_a": torch.zeros(3, 2, 5)}))


def test_build_info_names_the_compiler_and_the_instruction_set_in_use():
    from slm_fast import _C

    info = _C.build_info()
    assert set(info) == {"compiler", "instruction_sets", "instruction_set", "cuda"}
    assert info["instruction_set"] in info["instruction_sets"]
    assert info["instruction_sets"][-1] == "portable"
    assert info["compiler"].split()[0] in ("GNU", "Clang", "AppleClang")


def test_a_result_that_memory_has_no_room_for_is_told_as_such():
    x, lora_a, lora_b = torch.zeros(1, 10_000_000, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1, 10_000_000)
    with pytest.raises(RuntimeError) as caught:  # 400 TB: no process has as many addresses
        torch.ops.slm_fast.multi_lora_native(
            x, lora_a, lora_b, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), None
        )
    assert lacks_memory(caught.value)
    with pytest.raises(WorkError, match=r"^multi_lora: not enough memory for its result; pass fewer rows$"):
        ops.multi_lora(x, lora_a, lora_b, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    for k in (10**14, 2**63 - 1):
        with pytest.raises(WorkError, match=r"^retrieve: not enough memory for its result; pass fewer rows or a sm"):
            ops.retrieve(torch.ones(3, 8), torch.ones(4, 8), k)
