"""Unwritten memory of each backend reads as NaN or as an out-of-range slot ID: see conftest.py.

Otherwise, memory that happens to hold zeros could hide an element that a kernel forgets to write."""

from __future__ import annotations

import ctypes

import pytest
import torch
from cuda_on_host import compile_for_host

from slm_fast.ops import dispatch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
no_native = pytest.mark.skipif(dispatch.NATIVE_MISSING is not None, reason=str(dispatch.NATIVE_MISSING))
no_triton = pytest.mark.skipif(dispatch.TRITON_MISSING is not None, reason=str(dispatch.TRITON_MISSING))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if dispatch.TRITON_MISSING is None:
    import triton
    import triton.language as tl

    @triton.jit
    def copy(source, to, inside, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(to + i, tl.load(source + i, mask=i < inside))  # no `other`


def assert_poisoned(memory):
    assert memory.numel() > 0
    assert bool((memory.isnan() if memory.is_floating_point() else memory > 2**30).all())


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64])
def test_reference_tensors_are_poisoned(dtype):
    like = torch.zeros(3, 5, dtype=dtype, device=DEVICE)
    for made in (
        torch.empty(3, 5, dtype=dtype, device=DEVICE),
        torch.empty_strided((3, 5), (5, 1), dtype=dtype, device=DEVICE),
        torch.empty_like(like),
        like.new_empty(3, 5),
    ):
        assert_poisoned(made)


@no_native
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64])
def test_native_tensors_are_poisoned(dtype):
    prepared = torch.ops.slm_fast.prepare_keys_native(torch.ones(1, 2), 1)
    assert prepared[:8].view(torch.float64) == 2**0.5
    assert_poisoned(prepared[8:64].view(dtype))  # padding up to the next cache line


@no_native
def test_native_scratch_memory_is_poisoned():
    from slm_fast import _C

    for count in (2, 14, 1 << 20):
        assert _C.read_scratch(count) == b"\xff\x7f" * (count // 2)


@no_native
def test_native_memory_is_not_touched_when_nobody_asks():
    from slm_fast import _C

    poison = b"\xff\x7f" * (20 << 20)  # so large that it comes fresh from the OS, not from a reused allocation
    _C.poison_memory(False)
    assert _C.read_scratch(len(poison)) != poison
    _C.poison_memory(True)
    assert _C.read_scratch(len(poison)) == poison


@no_triton
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64])
def test_triton_reads_poison_where_nobody_has_written(dtype):
    x = torch.ones(16, dtype=dtype, device=DEVICE)
    unwritten, copied = x.new_empty(16), x.new_zeros(16)
    copy[(1,)](unwritten, copied, 16, N=16)
    assert_poisoned(copied)


@no_triton
@pytest.mark.skipif(not dispatch.INTERPRETED, reason="a GPU leaves it undefined")
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64])
def test_triton_reads_poison_where_a_mask_leaves_out(dtype):
    x, copied = torch.ones(16, dtype=dtype), torch.zeros(16, dtype=dtype)
    copy[(1,)](x, copied, 5, N=16)
    assert torch.equal(copied[:5], x[:5])
    assert_poisoned(copied[5:])


LOOK = """
#include "kernels.h"
namespace slm_fast::cuda {
struct Kept {
  float number;
  double wide;
  int64_t id;
};
struct Seen {
  Kept* kept;
};
__device__ inline Kept look_at(const volatile Kept& from) { return {from.number, from.wide, from.id}; }
__global__ void look(Seen seen) {
  __shared__ Kept one;
  __shared__ Kept other;
  extern __shared__ double dynamic[];
  volatile Kept local[256];
  if (threadIdx.x != 31) return;
  const volatile auto* halves = reinterpret_cast<float*>(dynamic);
  seen.kept[0] = look_at(one), seen.kept[1] = look_at(other), seen.kept[2] = look_at(local[0]);
  seen.kept[3] = {halves[1], dynamic[1], reinterpret_cast<int64_t*>(dynamic)[2]};
  one.number = 1;
  seen.kept[4] = {one.number, 2, other.number != other.number};
}
}  // namespace slm_fast::cuda
"""
RUN = """
extern "C" void run(void* kept) {
  const cuda::Seen seen{static_cast<cuda::Kept*>(kept)};
  using cuda::look;
  on_host::launch(dim3(1), 32)([&] { look(seen); });
}
"""


def test_shared_memory_and_stacks_of_cuda_code_on_the_host_are_poisoned(tmp_path):
    run = compile_for_host(LOOK, RUN, tmp_path)
    kept = torch.zeros(5, 3, dtype=torch.int64)
    run(ctypes.c_void_p(kept.data_ptr()))
    for place in kept[:4]:
        assert_poisoned(place[:1].view(torch.float32)[:1])
        assert_poisoned(place[1:2].view(torch.float64))
        assert_poisoned(place[2:])
    # Written values stay, and two variables of one type are distinct.
    assert kept[4, :1].view(torch.float32)[0] == 1
    assert kept[4, 2] == 1
