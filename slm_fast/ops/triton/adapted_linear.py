"""adapted_linear in Triton. The specification is slm_fast/ops/adapted_linear.py.

Each program has a block of a sample's tokens and a block of output features. It reads its rows of x once, for both the
base's product and the shrink, so programs for the same tokens repeat the shrink.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slm_fast.ops.triton import blocks, on, power_of_two
from slm_fast.ops.triton.increments import (
    Tiles,
    arithmetic,
    check_ids,
    dense_rows,
    dot,
    expand,
    route_rows,
    token_block,
)


@triton.jit(do_not_specialize=["P", "T"])
def _linear(
    x, matrix, bias, a, b, ids, weights, y, x_sample, x_token, P, T, I, O,
    K: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
    HAS_BIAS: tl.constexpr, KEEP_RANGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = x . W^T + bias + increments. x is read once for both the base's product and the shrink."""
    tiles, shares = tl.cdiv(T, BT), tl.cdiv(O, BO)
    block = tl.program_id(0) // shares  # neighbours read the same x
    sample = (block // tiles).to(tl.int64)
    t = ((block % tiles) * BT + tl.arange(0, BT)).to(tl.int64)
    o = (tl.program_id(0) % shares) * BO + tl.arange(0, BO)
    _, valid, row, weight = route_rows(ids, weights, sample, 0, P, K, RANK, RP)
    x_row, a_row = x + sample * x_sample + t[:, None] * x_token, a + (row * I)[None, :]
    w_row = matrix + o.to(tl.int64)[None, :] * I
    h, sums = tl.zeros([BT, RP], tl.float32), tl.zeros([BT, BO], tl.float32)
    for i0 in range(0, I, BI):
        i = i0 + tl.arange(0, BI)
        x_block = tl.load(x_row + i[None, :], mask=(t < T)[:, None] & (i < I)[None, :], other=0.0)
        a_block = tl.load(a_row + i[:, None], mask=valid[None, :] & (i < I)[:, None], other=0.0)
        w_block = tl.load(w_row + i[:, None], mask=(o < O)[None, :] & (i < I)[:, None], other=0.0)
        h = dot(x_block, a_block, h, PRECISION)
        sums = dot(x_block, w_block, sums, PRECISION)
    h = tl.where(valid[None, :], h * weight[None, :], 0.0)
    sums = expand(h, b + (row * O)[:, None], valid, o, O, sums, KEEP_RANGE, PRECISION)
    if HAS_BIAS:
        sums += tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    tl.store(y + (sample * T + t)[:, None] * O + o[None, :], sums, mask=(t < T)[:, None] & (o < O)[None, :])


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, slot_ids: Tensor, weights: Tensor
) -> Tensor:
    """Same as the reference: x [B, T, I] -> [B, T, O]."""
    (B, T, I), (P, r, O), K = x.shape, lora_b.shape, slot_ids.shape[1]
    tiles = Tiles(x.dtype)
    if x.dtype == torch.float64 or not 0 < K * r <= tiles.widest:
        raise ValueError(f"adapted_linear: expected K r of 1..{tiles.widest}, not float64, got {K * r}, {x.dtype}")
    check_ids(slot_ids, P)
    y = x.new_empty(B, T, O)
    if min(y.numel(), P) == 0:
        return y.copy_(torch.nn.functional.linear(x, weight, bias))
    BO = power_of_two(min(O, tiles.outputs), 16)
    x, BT = dense_rows(x), token_block(B * blocks(O, BO), T, tiles.most_tokens, x.device)
    chosen = arithmetic(x.dtype)
    with on(x.device):
        _linear[(blocks(O, BO) * B * blocks(T, BT),)](
            x, weight.contiguous(), None if bias is None else bias.contiguous(), lora_a.contiguous(),
            lora_b.contiguous(), slot_ids.contiguous(), weights.contiguous(), y, x.stride(0), x.stride(1), P, T, I, O,
            K=K, RANK=r, RP=power_of_two(K * r, 16), BT=BT, BI=tiles.inputs, BO=BO, HAS_BIAS=bias is not None,
            KEEP_RANGE=chosen["KEEP_RANGE"], PRECISION=chosen["PRECISION"],
            num_warps=8 if BT >= 64 else 4,
        )  # fmt: skip
    return y
