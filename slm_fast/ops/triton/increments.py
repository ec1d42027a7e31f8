"""Shared by multi_lora and adapted_linear in Triton: a sample's rows of A and B, products, and block sizes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slm_fast.ops.triton import INTERPRETED, blocks, power_of_two, processors

# float32 products as three tf32 ones, which are accurate to float32. For float16, tf32 has float32's exponent and
# float16's digits, since values may exceed float16's range.
_PRECISION = {torch.float32: "tf32x3", torch.float16: "tf32"}


@triton.jit
def dot(p, q, sums, PRECISION: tl.constexpr):
    """sums + p . q, in the type of sums. (The interpreter cannot multiply bfloat16.)"""
    if INTERPRETED:
        p, q = p.to(sums.dtype), q.to(sums.dtype)
    return tl.dot(p, q, sums, input_precision=PRECISION, out_dtype=sums.dtype)


@triton.jit
def route_rows(ids, weights, sample, first, P, K: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr):
    """Columns first .. first + RP - 1 of a sample's R: number, whether there is a slot, row of A and B, weight."""
    column = first + tl.arange(0, RP)
    inside = column < K * RANK
    place = sample.to(tl.int64) * K + column // RANK
    slot = tl.load(ids + place, mask=inside, other=-1)
    valid = (slot >= 0) & (slot < P)
    row = tl.where(valid, slot * RANK + column % RANK, 0)
    return column, valid, row, tl.load(weights + place, mask=valid, other=0.0)


@triton.jit
def shrink(x, x_mask, a_row, valid, I, h, BI: tl.constexpr, PRECISION: tl.constexpr):
    """h [BT, RP] += x [BT, I] . A [I, RP]. `x` [BT, 1] and `a_row` [1, RP] point to the rows' first elements."""
    for i0 in range(0, I, BI):
        i = i0 + tl.arange(0, BI)
        x_block = tl.load(x + i[None, :], mask=x_mask & (i < I)[None, :], other=0.0)
        a_block = tl.load(a_row + i[:, None], mask=valid[None, :] & (i < I)[:, None], other=0.0)
        h = dot(x_block, a_block, h, PRECISION)
    return h


@triton.jit
def expand(h, b_row, valid, o, O, sums, KEEP_RANGE: tl.constexpr, PRECISION: tl.constexpr):
    """sums + h [BT, RP] . B [RP, BO] for the columns o. `b_row` [RP, 1] points to the rows' first elements."""
    b_block = tl.load(b_row + o[None, :], mask=valid[:, None] & (o < O)[None, :], other=0.0)
    if KEEP_RANGE:
        b_block = b_block.to(h.dtype)
    return dot(h.to(b_block.dtype), b_block, sums, PRECISION)


def dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def check_ids(slot_ids: Tensor, slots: int) -> None:
    """Check ids on the CPU only, where this waits for no device. See slm_fast/ops/triton/__init__.py."""
    if slot_ids.device.type == "cpu" and slot_ids.numel():
        lowest, highest = slot_ids.aminmax()
        if lowest < -1 or highest >= slots:
            raise ValueError(f"slot_ids: expected -1..{slots - 1}, got {int(lowest)}..{int(highest)}")


def arithmetic(dtype: torch.dtype) -> dict[str, object]:
    return {
        "DOUBLE": dtype == torch.float64,
        "KEEP_RANGE": dtype == torch.float16,
        "PRECISION": _PRECISION.get(dtype, "ieee"),
    }


class Tiles:
    """Block sizes that fit an A100's registers and shared memory: bounded in bytes, so halved for doubled widths."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.most_tokens = self.outputs = self.widest = 256 // dtype.itemsize  # widest: maximum columns of R at once
        self.inputs = max(16, 128 // dtype.itemsize)
        self.all_slots = 512 // dtype.itemsize  # maximum P r to use all slots at once


def token_block(programs: int, tokens: int, most: int, device: torch.device) -> int:
    """The most tokens per program that leave a program for each multiprocessor, since each program reads A and B once.
    programs: number of programs per block of tokens."""
    for block in (128, 64, 32):
        if block <= most and tokens > block // 2 and programs * blocks(tokens, block) >= processors(device):
            return block
    return min(32, power_of_two(tokens, 16))
