"""multi_lora in Triton. The specification is slm_fast/ops/multi_lora.py.

`_adapt`: each program has a sample, a block of its tokens and, if there are few tokens, a share of the output features.
The sample's K slots form one matrix of width R = K r: shrink x [BT, I] . A [I, R], scale the R columns by their
weights, expand [BT, R] . B [R, O] onto the base. The R-vectors never leave the registers, x is read once, and the batch
needs no plan. Programs that share the features each repeat the shrink: reading R rows of A again costs less than a
second launch.

`_dense_shrink`, `_dense_expand`: for decoding with a small pool that most samples share. All P r rows are used at once
for many samples, and those that a sample does not use are scaled by zero.

Backward: multi_lora_backward.py if samples have many tokens. Else `_adapt` with A and B exchanged gives the gradient of
x. It also stores both R-vectors, from which `_slot_gradient` sums each slot's gradient over the pairs that use it, in
order and without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slm_fast.ops.triton import blocks, by_slot, multi_lora_backward, on, power_of_two, processors
from slm_fast.ops.triton.increments import (
    Tiles,
    arithmetic,
    check_ids,
    dense_rows,
    dot,
    expand,
    route_rows,
    shrink,
    token_block,
)


@triton.jit(do_not_specialize=["P", "T"])
def _adapt(
    x, a, b, ids, weights, base, y, shrunk,
    x_sample, x_token, base_sample, base_token, P, T, I, O, first,
    K: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
    HAS_BASE: tl.constexpr, EXPAND: tl.constexpr, STORE: tl.constexpr, DOUBLE: tl.constexpr,
    KEEP_RANGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BT)
    sample, share = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(1)
    t = (tl.program_id(0) % tiles) * BT + tl.arange(0, BT)
    t_mask = (t < T)[:, None]
    column, valid, row, weight = route_rows(ids, weights, sample, first, P, K, RANK, RP)

    h = tl.zeros([BT, RP], tl.float64 if DOUBLE else tl.float32)
    x_row = x + sample * x_sample + t.to(tl.int64)[:, None] * x_token
    h = shrink(x_row, t_mask, a + (row * I)[None, :], valid, I, h, BI, PRECISION)
    h = tl.where(valid[None, :], h, 0.0)  # even if x is not finite
    y_row = sample * T + t.to(tl.int64)[:, None]
    if STORE and share == 0:
        tl.store(shrunk + y_row * (K * RANK) + column[None, :], h, mask=t_mask & (column < K * RANK)[None, :])
    if EXPAND:
        h = tl.where(valid[None, :], h * weight.to(h.dtype)[None, :], 0.0)
        for o0 in range(share * BO, O, tl.num_programs(1) * BO):
            o = o0 + tl.arange(0, BO)
            mask = t_mask & (o < O)[None, :]
            sums = tl.zeros([BT, BO], h.dtype)
            if HAS_BASE:
                base_row = base + sample * base_sample + t.to(tl.int64)[:, None] * base_token
                sums += tl.load(base_row + o[None, :], mask=mask, other=0.0)
            sums = expand(h, b + (row * O)[:, None], valid, o, O, sums, KEEP_RANGE, PRECISION)
            tl.store(y + y_row * O + o[None, :], sums, mask=mask)


@triton.jit(do_not_specialize=["N"])
def _dense_shrink(
    x, a, partial, N, Q, I, BN: tl.constexpr, QP: tl.constexpr, BI: tl.constexpr, SPAN: tl.constexpr,
    DOUBLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial[s, n] [Q] = x[n] . A^T [Q, I] over the s-th span of features, for all Q = P r rows."""
    n, q = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, QP)
    part = tl.program_id(1).to(tl.int64)
    begin = part * SPAN
    h = tl.zeros([BN, QP], tl.float64 if DOUBLE else tl.float32)
    x_row, a_row = x + n.to(tl.int64)[:, None] * I + begin, a + q.to(tl.int64)[None, :] * I + begin
    h = shrink(x_row, (n < N)[:, None], a_row, q < Q, tl.minimum(I - begin, SPAN), h, BI, PRECISION)
    tl.store(partial + ((part * N + n[:, None]) * Q + q[None, :]), h, mask=(n < N)[:, None] & (q < Q)[None, :])


@triton.jit(do_not_specialize=["N", "T", "PARTS"])
def _dense_expand(
    partial, b, ids, weights, base, y, N, Q, O, T, PARTS,
    K: tl.constexpr, RANK: tl.constexpr, BN: tl.constexpr, QP: tl.constexpr, BO: tl.constexpr, HAS_BASE: tl.constexpr,
    DOUBLE: tl.constexpr, KEEP_RANGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[n] = base[n] + (sum of parts, scaled by the sample's weights of the rows' slots) [Q] . B [Q, O]."""
    n, q = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, QP)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    n_mask = (n < N)[:, None]
    h = tl.zeros([BN, QP], tl.float64 if DOUBLE else tl.float32)
    for part in range(PARTS):  # always in this order
        address = (part * N + n.to(tl.int64)[:, None]) * Q + q[None, :]
        h += tl.load(partial + address, mask=n_mask & (q < Q)[None, :], other=0.0)
    scale = tl.zeros([BN, QP], h.dtype)
    used = tl.zeros([BN, QP], tl.int1)
    for k in range(K):
        place = (n // T).to(tl.int64) * K + k
        slot = tl.load(ids + place, mask=n < N, other=-1)
        here = (slot[:, None] == (q // RANK)[None, :]) & (q < Q)[None, :]
        scale += tl.where(here, tl.load(weights + place, mask=n < N, other=0.0).to(h.dtype)[:, None], 0.0)
        used = used | here
    h = tl.where(used, h * scale, 0.0)

    # A slot's values that are not finite must not affect samples that do not use it, but 0 . inf is NaN. So they are
    # left out of the product, and the results that do use them are set to NaN.
    b_block = tl.load(b + q.to(tl.int64)[:, None] * O + o[None, :], mask=(q < Q)[:, None] & (o < O)[None, :], other=0.0)
    broken = b_block.to(h.dtype) - b_block.to(h.dtype) != 0
    b_block = tl.where(broken, 0.0, b_block.to(h.dtype)).to(h.dtype if KEEP_RANGE else b_block.dtype)
    sums = dot(h.to(b_block.dtype), b_block, tl.zeros([BN, BO], h.dtype), PRECISION)
    if tl.max(tl.max(broken.to(tl.int32), 1), 0) > 0:
        reached = tl.dot(used.to(tl.float16), broken.to(tl.float16), out_dtype=tl.float32)
        sums = tl.where(reached > 0, float("nan"), sums)
    mask = n_mask & (o < O)[None, :]
    y_address = n.to(tl.int64)[:, None] * O + o[None, :]
    if HAS_BASE:
        sums += tl.load(base + y_address, mask=mask, other=0.0)
    tl.store(y + y_address, sums, mask=mask)


@triton.jit(do_not_specialize=["T"])
def _slot_gradient(
    gradient, coefficient, weights, rows, order, begin, row_sample, row_token, T, F,
    K: tl.constexpr, RANK: tl.constexpr, RB: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, DOUBLE: tl.constexpr,
    KEEP_RANGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """gradient[p] [r, F] = sum over p's pairs (b, k) and tokens t of weight . coefficient[b, t, k] rows[b, t]^T."""
    slot = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * RB + tl.arange(0, RB)
    f = tl.program_id(2) * BF + tl.arange(0, BF)
    sums = tl.zeros([RB, BF], tl.float64 if DOUBLE else tl.float32)
    for n in range(tl.load(begin + slot), tl.load(begin + slot + 1)):
        pair = tl.load(order + n)
        sample, k = pair // K, pair % K
        weight = tl.load(weights + pair).to(sums.dtype)
        for t0 in range(0, T, BT):
            t = (t0 + tl.arange(0, BT)).to(tl.int64)
            c_address = (sample * T + t)[None, :] * (K * RANK) + k * RANK + j[:, None]
            c = weight * tl.load(coefficient + c_address, mask=(j < RANK)[:, None] & (t < T)[None, :], other=0.0)
            row_address = sample * row_sample + t[:, None] * row_token + f[None, :]
            block = tl.load(rows + row_address, mask=(t < T)[:, None] & (f < F)[None, :], other=0.0)
            if KEEP_RANGE:
                block = block.to(sums.dtype)
            sums = dot(c.to(block.dtype), block, sums, PRECISION)
    mask = (j < RANK)[:, None] & (f < F)[None, :]
    tl.store(gradient + (slot * RANK + j[:, None]) * F + f[None, :], sums, mask=mask)


# ---- from tensors to launches ----


def _run_adapt(
    x: Tensor,
    a: Tensor,
    b: Tensor | None,
    slot_ids: Tensor,
    weights: Tensor,
    base: Tensor | None,
    shrunk: Tensor | None,
) -> Tensor:
    """Return y, or an empty tensor if b is None. `shrunk` [B, T, K r] gets x . A^T, not scaled by the weights."""
    (B, T, I), (P, r, _), K = x.shape, a.shape, slot_ids.shape[1]
    O = 0 if b is None else b.shape[2]
    tiles = Tiles(x.dtype)
    turns = range(0, K * r, tiles.widest)
    last = len(turns) - 1
    y = x.new_empty(B, T, O) if b is not None else x.new_empty(0)
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    RP, BO = (power_of_two(min(n, most), 16) for n, most in ((K * r, tiles.widest), (O, tiles.outputs)))
    BT = token_block(B, T, tiles.most_tokens, x.device)
    programs = B * blocks(T, BT)
    shares = min(blocks(O, BO), max(1, processors(x.device) // programs)) if O else 1
    for turn, first in enumerate(turns):
        # Between iterations the sum keeps the accumulator's precision.
        result = y if turn == last else y.new_empty(y.shape, dtype=accumulator)
        _adapt[(programs, shares)](
            x, a, a if b is None else b, slot_ids, weights, base, result, shrunk,
            x.stride(0), x.stride(1), *((0, 0) if base is None else base.stride()[:2]), P, T, I, O, first,
            K=K, RANK=r, RP=RP, BT=BT, BI=tiles.inputs, BO=BO,
            HAS_BASE=base is not None, EXPAND=b is not None, STORE=shrunk is not None, **arithmetic(x.dtype),
            num_warps=8 if BT >= 64 else 4,
        )  # fmt: skip
        base = None if b is None else result
    return y


def _run_dense(
    x: Tensor, a: Tensor, b: Tensor, slot_ids: Tensor, weights: Tensor, base: Tensor | None, y: Tensor
) -> None:
    (B, T, I), (P, r, O), K = x.shape, b.shape, slot_ids.shape[1]
    N, Q = B * T, P * r
    BI = Tiles(x.dtype).inputs
    QP, BN, BO = power_of_two(Q, 16), 16 if N <= 16 else 32, BI
    tiles = blocks(N, BN)
    span = power_of_two(blocks(I, max(1, processors(x.device) // (2 * tiles))), 64)
    parts = blocks(I, span)
    partial = x.new_empty(parts, N, Q, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    chosen = arithmetic(x.dtype)
    shrink = {name: chosen[name] for name in ("DOUBLE", "PRECISION")}
    _dense_shrink[(tiles, parts)](x, a, partial, N, Q, I, BN=BN, QP=QP, BI=BI, SPAN=span, **shrink)
    _dense_expand[(tiles, blocks(O, BO))](
        partial, b, slot_ids, weights, base, y, N, Q, O, T, parts,
        K=K, RANK=r, BN=BN, QP=QP, BO=BO, HAS_BASE=base is not None, **chosen,
        num_warps=4 if x.dtype.itemsize == 2 else 8,
    )  # fmt: skip


def shares_slots(x: Tensor, picks: int, slots: int, rank: int) -> bool:
    """Whether to decode with all slots at once: they have few rows in total, and several samples use each."""
    samples, tokens, _ = x.shape
    return tokens <= 4 and 0 < slots * rank <= Tiles(x.dtype).all_slots and samples * picks >= 4 * slots


def forward(
    x: Tensor, lora_a: Tensor, lora_b: Tensor, slot_ids: Tensor, weights: Tensor, base: Tensor | None
) -> Tensor:
    """Same as the reference: x [B, T, I] -> [B, T, O]."""
    (B, T, _), (P, r, O), K = x.shape, lora_b.shape, slot_ids.shape[1]
    check_ids(slot_ids, P)
    if min(B * T * O, P * r, K) == 0:
        return x.new_zeros(B, T, O) if base is None else base.clone(memory_format=torch.contiguous_format)
    x, lora_a, lora_b = dense_rows(x), lora_a.contiguous(), lora_b.contiguous()
    slot_ids, weights, base = slot_ids.contiguous(), weights.contiguous(), None if base is None else dense_rows(base)
    with on(x.device):
        if shares_slots(x, K, P, r):
            y = x.new_empty(B, T, O)
            base = None if base is None else base.contiguous()
            _run_dense(x.contiguous(), lora_a, lora_b, slot_ids, weights, base, y)
            return y
        return _run_adapt(x, lora_a, lora_b, slot_ids, weights, base, None)


def backward(
    grad: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, slot_ids: Tensor, weights: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Same as the reference: gradients of x, lora_a, lora_b and weights; an empty tensor for each not needed."""
    (B, T, I), (P, r, O), K = x.shape, lora_b.shape, slot_ids.shape[1]
    check_ids(slot_ids, P)
    if min(B * T, P * r, K, I, O) == 0:
        shaped = zip((x, lora_a, lora_b, weights), needed, strict=True)
        zeros = [t.new_zeros(t.shape) if wanted else x.new_empty(0) for t, wanted in shaped]
        return zeros[0], zeros[1], zeros[2], zeros[3]
    x, grad, lora_a, lora_b = dense_rows(x), dense_rows(grad), lora_a.contiguous(), lora_b.contiguous()
    slot_ids, weights = slot_ids.contiguous(), weights.contiguous()
    if multi_lora_backward.serves(x, K, r, O):
        with on(x.device):
            return multi_lora_backward.sample_wise(grad, x, lora_a, lora_b, slot_ids, weights, needed)
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    shrunk = grad_shrunk = None
    if needed[2] or needed[3]:
        shrunk = x.new_empty(B, T, K * r, dtype=accumulator)
    if needed[1] or needed[3]:
        grad_shrunk = torch.empty_like(shrunk) if shrunk is not None else x.new_empty(B, T, K * r, dtype=accumulator)
    grad_x, grad_a, grad_b, grad_weights = (x.new_empty(0) for _ in range(4))
    with on(x.device):
        if shrunk is not None:
            _run_adapt(x, lora_a, None, slot_ids, weights, None, shrunk)
        if needed[0] or grad_shrunk is not None:
            grad_x = _run_adapt(grad, lora_b, lora_a if needed[0] else None, slot_ids, weights, None, grad_shrunk)
        if needed[1] or needed[2]:
            order, begin = by_slot(slot_ids, P)
            if needed[1]:
                grad_a = _sum_by_slot(grad_shrunk, weights, x, order, begin, lora_a)
            if needed[2]:
                grad_b = _sum_by_slot(shrunk, weights, grad, order, begin, lora_b)
        if needed[3]:
            assert shrunk is not None
            assert grad_shrunk is not None
            grad_weights = (shrunk * grad_shrunk).view(B, T, K, r).sum((1, 3)).to(weights.dtype)
    return grad_x, grad_a, grad_b, grad_weights


def _sum_by_slot(
    coefficient: Tensor | None, weights: Tensor, rows: Tensor, order: Tensor, begin: Tensor, like: Tensor
) -> Tensor:
    P, r, F = like.shape
    T, K = rows.shape[1], weights.shape[1]
    gradient = torch.empty_like(like)
    tiles = Tiles(rows.dtype)
    RB, BF, BT = (power_of_two(min(n, most), 16) for n, most in ((r, 64), (F, tiles.outputs), (T, tiles.inputs)))
    _slot_gradient[(P, blocks(r, RB), blocks(F, BF))](
        gradient, coefficient, weights, rows, order, begin, rows.stride(0), rows.stride(1), T, F,
        K=K, RANK=r, RB=RB, BT=BT, BF=BF, **arithmetic(rows.dtype),
    )  # fmt: skip
    return gradient
