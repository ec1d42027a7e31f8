"""The gradients of multi_lora in Triton, sample by sample. The specification is slm_fast/ops/multi_lora.py.

There are three launches, none of which waits for a sort. `_shrink_both` stores both R-vectors of every token, x . A^T
and grad . B^T. `_sample_gradients` passes over x and grad again: each program has a sample and a block of features, and
computes the gradient of x together with the sample's contributions to the gradients of its K slots. `_add_up` sums each
slot's contributions in the order of samples, without atomics. So x and grad are read twice, however many slots a sample
has; `multi_lora._slot_gradient`, for few tokens, reads them once per slot.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slm_fast.ops.triton import blocks, power_of_two, processors
from slm_fast.ops.triton.increments import Tiles, arithmetic, dot, route_rows, shrink, token_block

LEAST_TOKENS = 16  # minimum tokens per sample; with fewer, its contributions to slots are larger than itself
MOST_BYTES = 1 << 29  # maximum size of all samples' contributions


@triton.jit
def _shrink_side(
    rows, matrix, shrunk, rows_sample, rows_token, sample, t, T, F, valid, row, column,
    K: tl.constexpr, RANK: tl.constexpr, BF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    t_mask = (t < T)[:, None]
    h = tl.zeros([t.shape[0], row.shape[0]], tl.float32)
    from_row = rows + sample * rows_sample + t.to(tl.int64)[:, None] * rows_token
    h = shrink(from_row, t_mask, matrix + (row * F)[None, :], valid, F, h, BF, PRECISION)
    h = tl.where(valid[None, :], h, 0.0)  # even if the row is not finite
    to = shrunk + (sample * T + t.to(tl.int64))[:, None] * (K * RANK) + column[None, :]
    tl.store(to, h, mask=t_mask & (column < K * RANK)[None, :])


@triton.jit(do_not_specialize=["P", "T", "first_side"])
def _shrink_both(
    x, grad, a, b, ids, weights, shrunk, grad_shrunk,
    x_sample, x_token, grad_sample, grad_token, P, T, I, O, first_side,
    K: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """shrunk = x . A^T (side 0), grad_shrunk = grad . B^T (side 1): [B, T, K r] float32."""
    tiles = tl.cdiv(T, BT)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    t = (tl.program_id(0) % tiles) * BT + tl.arange(0, BT)
    column, valid, row, _ = route_rows(ids, weights, sample, 0, P, K, RANK, RP)
    if tl.program_id(1) + first_side == 0:
        _shrink_side(x, a, shrunk, x_sample, x_token, sample, t, T, I, valid, row, column, K, RANK, BF, PRECISION)
    else:
        _shrink_side(
            grad, b, grad_shrunk, grad_sample, grad_token, sample, t, T, O, valid, row, column, K, RANK, BF, PRECISION
        )


@triton.jit
def _gradient_side(
    rows, coefficient, matrix, grad_rows, added, rows_sample, rows_token, sample, place, begin, end, f, T, F,
    valid, row, column, weight,
    K: tl.constexpr, RANK: tl.constexpr, BT: tl.constexpr, SUM: tl.constexpr, ROWS: tl.constexpr,
    KEEP_RANGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For one block of features: the contribution of tokens begin .. end - 1 to the gradients of the sample's slots
    (SUM), weight . coefficient^T . rows, and the tokens' own gradient (ROWS), weight . coefficient . matrix."""
    f_mask = (f < F)[None, :]
    sums = tl.zeros([row.shape[0], f.shape[0]], tl.float32)
    if ROWS:
        m_block = tl.load(matrix + (row * F)[:, None] + f[None, :], mask=valid[:, None] & f_mask, other=0.0)
        if KEEP_RANGE:
            m_block = m_block.to(tl.float32)
    for t0 in range(begin, end, BT):
        t = t0 + tl.arange(0, BT)
        t_mask, token = (t < end)[:, None], (sample * T + t.to(tl.int64))[:, None]
        c = tl.load(coefficient + token * (K * RANK) + column[None, :], mask=t_mask & valid[None, :], other=0.0)
        c = tl.where(valid[None, :], c * weight[None, :], 0.0)
        if SUM:
            at = rows + sample * rows_sample + t.to(tl.int64)[:, None] * rows_token + f[None, :]
            block = tl.load(at, mask=t_mask & f_mask, other=0.0)
            if KEEP_RANGE:
                block = block.to(tl.float32)
            sums = dot(tl.trans(c.to(block.dtype)), block, sums, PRECISION)
        if ROWS:
            y = dot(c.to(m_block.dtype), m_block, tl.zeros([BT, f.shape[0]], tl.float32), PRECISION)
            tl.store(grad_rows + token * F + f[None, :], y, mask=t_mask & f_mask)
    if SUM:
        to = added + (place * (K * RANK) + column.to(tl.int64))[:, None] * F + f[None, :]
        tl.store(to, sums, mask=(column < K * RANK)[:, None] & f_mask)


@triton.jit(do_not_specialize=["P", "T", "span", "tiles_x", "tiles_grad"])
def _sample_gradients(
    x, grad, a, b, ids, weights, shrunk, grad_shrunk, grad_x, added_a, added_b, grad_weights,
    x_sample, x_token, grad_sample, grad_token, P, T, I, O, span, tiles_x, tiles_grad,
    K: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr,
    NEED_X: tl.constexpr, NEED_A: tl.constexpr, KEEP_RANGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For a sample and a span of its tokens: blocks of in-features, then of out-features, then the weights' gradient.

    added_a, added_b: contributions [spans, B, K r, I or O] float32."""
    sample, part, tile = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    column, valid, row, weight = route_rows(ids, weights, sample, 0, P, K, RANK, RP)
    begin = part * span
    end = tl.minimum(begin + span, T)
    place = part.to(tl.int64) * tl.num_programs(0) + sample
    if tile < tiles_x:
        _gradient_side(
            x, grad_shrunk, a, grad_x, added_a, x_sample, x_token, sample, place, begin, end,
            tile * BF + tl.arange(0, BF), T, I, valid, row, column, weight,
            K, RANK, BT, NEED_A, NEED_X, KEEP_RANGE, PRECISION,
        )  # fmt: skip
    elif tile < tiles_x + tiles_grad:
        _gradient_side(
            grad, shrunk, b, grad_x, added_b, grad_sample, grad_token, sample, place, begin, end,
            (tile - tiles_x) * BF + tl.arange(0, BF), T, O, valid, row, column, weight,
            K, RANK, BT, True, False, KEEP_RANGE, PRECISION,
        )  # fmt: skip
    elif part == 0:
        total = tl.zeros([RP], tl.float32)
        for t0 in range(0, T, BT):
            t = t0 + tl.arange(0, BT)
            at = (sample * T + t.to(tl.int64))[:, None] * (K * RANK) + column[None, :]
            mask = (t < T)[:, None] & valid[None, :]
            total += tl.sum(
                tl.load(shrunk + at, mask=mask, other=0.0) * tl.load(grad_shrunk + at, mask=mask, other=0.0), 0
            )
        for k in range(K):
            mine = tl.sum(tl.where(valid & (column // RANK == k), total, 0.0), 0)
            tl.store(grad_weights + sample * K + k, mine)


@triton.jit
def _add_up_side(
    added, gradient, ids, slot, f, N, F, parts, samples,
    K: tl.constexpr, RANK: tl.constexpr, RB: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    j = tl.arange(0, RB)[:, None]
    mask = (j < RANK) & (f < F)[None, :]
    sums = tl.zeros([RB, f.shape[0]], tl.float32)
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        here = tl.load(ids + n, mask=n < N, other=-1) == slot
        last = n0 - 1
        for _ in range(tl.sum(here.to(tl.int32), 0)):  # the next pair (sample, k) with this slot
            last = tl.min(tl.where(here & (n > last), n, N), 0)
            for part in range(parts):
                first_row = (part * samples + last // K).to(tl.int64) * (K * RANK) + last % K * RANK
                sums += tl.load(added + (first_row + j) * F + f[None, :], mask=mask, other=0.0)
    tl.store(gradient + (slot * RANK + j) * F + f[None, :], sums, mask=mask)


@triton.jit(do_not_specialize=["N", "parts", "samples", "tiles_a"])
def _add_up(
    added_a, added_b, grad_a, grad_b, ids, N, I, O, parts, samples, tiles_a,
    K: tl.constexpr, RANK: tl.constexpr, RB: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """gradient[p] [r, F] = sum of the contributions of all pairs (sample, k) with slot p. N: number of pairs."""
    slot, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tile < tiles_a:
        _add_up_side(added_a, grad_a, ids, slot, tile * BF + tl.arange(0, BF), N, I, parts, samples, K, RANK, RB, BN)
    else:
        f = (tile - tiles_a) * BF + tl.arange(0, BF)
        _add_up_side(added_b, grad_b, ids, slot, f, N, O, parts, samples, K, RANK, RB, BN)


# ---- from tensors to launches ----


def spans_of(samples: int, tokens: int, tiles: int, block: int, device: torch.device) -> tuple[int, int]:
    """Number and length of the spans that a sample's tokens are split into, to give each multiprocessor a program."""
    wanted = blocks(processors(device), max(1, samples * tiles))
    span = blocks(blocks(tokens, min(wanted, blocks(tokens, 4 * block))), block) * block
    return blocks(tokens, span), span


def serves(x: Tensor, picks: int, rank: int, features_out: int) -> bool:
    """Whether these kernels serve such a call: many tokens per sample, and little memory for contributions."""
    B, T, I = x.shape
    tiles = Tiles(x.dtype)
    fits = 4 * B * picks * rank * (I + features_out) <= MOST_BYTES
    return T >= LEAST_TOKENS and fits and picks * rank <= tiles.widest and x.dtype != torch.float64


def sample_wise(
    grad: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, slot_ids: Tensor, weights: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All gradients that are needed. Arguments must have the memory layout that the kernels read."""
    (B, T, I), (P, r, O), K = x.shape, lora_b.shape, slot_ids.shape[1]
    R, tiles, none = K * r, Tiles(x.dtype), x.new_empty(0)
    need_x, need_a, need_b, need_weights = needed
    shrunk = x.new_empty(B, T, R, dtype=torch.float32) if need_b or need_weights else none
    grad_shrunk = x.new_empty(B, T, R, dtype=torch.float32) if need_x or need_a or need_weights else none
    chosen = arithmetic(x.dtype)
    options = {"K": K, "RANK": r, "RP": power_of_two(R, 16), "PRECISION": chosen["PRECISION"]}
    strides = (x.stride(0), x.stride(1), grad.stride(0), grad.stride(1))
    sides = (shrunk is not none) + (grad_shrunk is not none)
    BT = token_block(sides * B, T, tiles.most_tokens, x.device)
    _shrink_both[(B * blocks(T, BT), sides)](
        x, grad, lora_a, lora_b, slot_ids, weights, shrunk, grad_shrunk, *strides, P, T, I, O,
        0 if shrunk is not none else 1, BT=BT, BF=tiles.inputs * (2 if R <= 32 else 1), **options,
        num_stages=4 if R <= 32 else 3,
    )  # fmt: skip

    halved = 2 if chosen["KEEP_RANGE"] and R > 64 else 1  # float32 blocks take twice the shared memory
    BT, BF = tiles.inputs // halved, power_of_two(min(max(I, O), tiles.outputs // halved), 16)
    tiles_x, tiles_grad = (blocks(I, BF) if need_x or need_a else 0), (blocks(O, BF) if need_b else 0)
    parts, span = spans_of(B, T, tiles_x + tiles_grad, BT, x.device)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else none
    added_a = x.new_empty(parts, B, R, I, dtype=torch.float32) if need_a else none
    added_b = x.new_empty(parts, B, R, O, dtype=torch.float32) if need_b else none
    grad_weights = weights.new_empty(weights.shape, dtype=torch.float32) if need_weights else none
    _sample_gradients[(B, parts, tiles_x + tiles_grad + need_weights)](
        x, grad, lora_a, lora_b, slot_ids, weights, shrunk, grad_shrunk, grad_x, added_a, added_b, grad_weights,
        *strides, P, T, I, O, span, tiles_x, tiles_grad,
        BT=BT, BF=BF, NEED_X=need_x, NEED_A=need_a, KEEP_RANGE=chosen["KEEP_RANGE"], **options,
        num_warps=8, num_stages=2,
    )  # fmt: skip

    grad_a, grad_b = torch.empty_like(lora_a) if need_a else none, torch.empty_like(lora_b) if need_b else none
    RB = power_of_two(r, 1)
    BF = power_of_two(min(max(I, O), max(16, 4096 // RB)), 16)
    tiles_a, tiles_b = (blocks(I, BF) if need_a else 0), (blocks(O, BF) if need_b else 0)
    if tiles_a + tiles_b:
        _add_up[(P, tiles_a + tiles_b)](
            added_a, added_b, grad_a, grad_b, slot_ids, B * K, I, O, parts, B, tiles_a,
            K=K, RANK=r, RB=RB, BN=64, BF=BF,
        )  # fmt: skip
    # Gradients not needed are empty, but must be distinct tensors.
    grads = [grad_x, grad_a, grad_b, grad_weights.to(weights.dtype)]
    grads = [part if wanted else x.new_empty(0) for part, wanted in zip(grads, needed, strict=True)]
    return grads[0], grads[1], grads[2], grads[3]
