"""Shared by retrieve and key_loss in Triton: the best slots of each query.

Scores are float64 products (on the tensor cores of data-centre GPUs) rounded to float32, as in the reference, so that
equal keys have equal scores wherever they are. A score and its slot are packed into one 64-bit integer that sorts by
descending score, then ascending id. The best K are kept in registers while keys stream past. `_rank` is one launch: the
pool is split over programs, and for each block of queries the last program to finish joins the parts' lists (the result
does not depend on which is last) and turns them into a route.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from slm_fast.ops.triton import blocks, on, power_of_two, processors

EPSILON = tl.constexpr(1e-12)  # vectors of at most this length have cosine 0 with everything
_NONE = tl.constexpr(-(2**63))  # sorts after every slot


@triton.jit
def _pack(score, slot):
    """Pack for sorting by descending score, then ascending slot. Both zeros are equal."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers that sort like the floats
    return (bits.to(tl.int64) << 32) | (0xFFFFFFFF - slot.to(tl.int64))


@triton.jit
def _score_of(packed):
    bits = (packed >> 32).to(tl.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(packed == _NONE, 0.0, bits.to(tl.float32, bitcast=True))


@triton.jit
def _slot_of(packed):
    return tl.where(packed == _NONE, -1, 0xFFFFFFFF - (packed & 0xFFFFFFFF))


@triton.jit
def _merge(best, more):
    """The best KP, sorted, of a list [N, KP] and further entries [N, M]."""
    rows: tl.constexpr = best.shape[0]
    width: tl.constexpr = best.shape[1]
    result = tl.full([rows, width], _NONE, tl.int64)
    for i in range(width):  # no two entries are equal, so each iteration takes one
        top = tl.maximum(tl.max(best, 1), tl.max(more, 1))[:, None]
        result = tl.where(tl.arange(0, width)[None, :] == i, top, result)
        best, more = tl.where(best == top, _NONE, best), tl.where(more == top, _NONE, more)
    return result


@triton.jit
def _hidden(b, g, p, G, P, seed, threshold):
    """The key mask of Eq. 7, from splitmix64's output number (b G + g) P + p for `seed`."""
    number = ((b.to(tl.int64)[:, None] * G + g) * P + p.to(tl.int64)[None, :] + 1).to(tl.uint64, bitcast=True)
    h = number * 0x9E3779B97F4A7C15 + seed.to(tl.int64).to(tl.uint64, bitcast=True)
    h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9
    h = (h ^ (h >> 27)) * 0x94D049BB133111EB
    h = h ^ (h >> 31)
    return (h >> 40).to(tl.int64) < threshold


@triton.jit
def _cosines(query, keys, b, p, B, P, D, group, d_size, BB: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
             COSINE: tl.constexpr):  # fmt: skip
    """Cosines (or plain products) of queries b with keys p in one group: float64 [BB, BP]."""
    products = tl.zeros([BB, BP], tl.float64)
    query_square, key_square = tl.zeros([BB], tl.float64), tl.zeros([BP], tl.float64)
    query_row = query + b.to(tl.int64)[:, None] * D + group * d_size
    key_row = keys + p.to(tl.int64)[:, None] * D + group * d_size
    for d0 in range(0, d_size, BD):
        d = d0 + tl.arange(0, BD)
        inside = (d < d_size)[None, :]
        q = tl.load(query_row + d[None, :], mask=(b < B)[:, None] & inside, other=0.0).to(tl.float64)
        key = tl.load(key_row + d[None, :], mask=(p < P)[:, None] & inside, other=0.0).to(tl.float64)
        products = tl.dot(q, tl.trans(key), products, out_dtype=tl.float64)
        if COSINE:
            query_square += tl.sum(q * q, 1)
            key_square += tl.sum(key * key, 1)
    if COSINE:
        query_length, key_length = tl.sqrt(query_square), tl.sqrt(key_square)
        defined = (query_length > EPSILON)[:, None] & (key_length > EPSILON)[None, :]
        lengths = tl.where(defined, query_length[:, None] * key_length[None, :], 1.0)
        products = tl.where(defined, products / lengths, 0.0)
    return products


@triton.jit
def _write_route(best, b, row_mask, slot_ids, weights, K, KP: tl.constexpr, SOFTMAX: tl.constexpr, temperature):
    """Write a sorted list [N, KP] as ids and weights."""
    place = tl.arange(0, KP)[None, :]
    found = (best != _NONE) & (place < K)
    score = _score_of(best)
    if SOFTMAX:
        scaled = tl.where(found, score / temperature, float("-inf"))
        top = tl.max(scaled, 1)[:, None]
        share = tl.where(found, tl.exp(scaled - tl.where(top > float("-inf"), top, 0.0)), 0.0)
    else:
        share = tl.where(found & (score > 0), score, 0.0)
        share = tl.where(tl.sum(share, 1)[:, None] > 0, share, found.to(tl.float32))
    total = tl.sum(share, 1)[:, None]
    weight = tl.where(found, tl.div_rn(share, tl.where(total > 0, total, 1.0)), 0.0)
    address = b.to(tl.int64)[:, None] * K + place
    mask = row_mask[:, None] & (place < K)
    tl.store(slot_ids + address, tl.where(found, _slot_of(best), -1), mask=mask)
    tl.store(weights + address, weight, mask=mask)


# Other batch or pool sizes must not compile another kernel.
@triton.jit(do_not_specialize=["seed", "threshold", "B", "P", "G", "K", "mask_row", "span"])
def _rank(
    query, keys, bias, mask, parts, tickets, slot_ids, weights, seed, threshold, temperature,
    B, P, D, d_size, G, K, mask_row, span,
    BB: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, KP: tl.constexpr, JOIN: tl.constexpr,
    COSINE: tl.constexpr, LISTS: tl.constexpr, VOTE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    HIDE: tl.constexpr, SOFTMAX: tl.constexpr, BR: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Find the best slots of a block of queries in a span of the pool, and join the spans' lists.

    LISTS: one list per group (vote, key_loss), else one by the mean over groups. parts: [splits, L, B, KP] packed
    lists, L = G or 1. JOIN: there are several. Without VOTE, the lists of groups are written to slot_ids as they are.
    """
    b = tl.program_id(0) * BB + tl.arange(0, BB)
    group, split = tl.program_id(1), tl.program_id(2)
    end = tl.minimum(P, (split + 1) * span)
    best = tl.full([BB, KP], _NONE, tl.int64)
    for p0 in range(split * span, end, BP):
        p = p0 + tl.arange(0, BP)
        if LISTS:
            score = _cosines(query, keys, b, p, B, P, D, group, d_size, BB, BP, BD, COSINE).to(tl.float32)
        else:
            score = tl.zeros([BB, BP], tl.float32)
            for g in range(G):
                product = _cosines(query, keys, b, p, B, P, D, g, d_size, BB, BP, BD, COSINE)
                if HAS_BIAS:
                    product += tl.load(bias + p, mask=p < P, other=0.0).to(tl.float64)[None, :]
                score += product.to(tl.float32)
            score = tl.div_rn(score, tl.zeros_like(score) + G)
        allowed = (b < B)[:, None] & (p < end)[None, :]
        if HAS_MASK:
            address = b.to(tl.int64)[:, None] * mask_row + p[None, :]
            allowed = allowed & (tl.load(mask + address, mask=allowed, other=0) != 0)
        if HIDE:
            allowed = allowed & ~_hidden(b, group, p, G, P, seed, threshold)
        packed = tl.where(allowed, _pack(score, p[None, :]), _NONE)
        # Most blocks contain nothing better than the current list.
        if tl.max(tl.max((packed > tl.min(best, 1)[:, None]).to(tl.int32), 1), 0) > 0:
            best = _merge(best, packed)

    place = tl.arange(0, KP)[None, :]
    lists, splits = tl.num_programs(1), tl.num_programs(2)
    rows = b.to(tl.int64)[:, None]
    in_batch = (b < B)[:, None]
    if JOIN:
        tl.store(parts + ((split * lists + group) * B + rows) * KP + place, best, mask=in_batch)
        # All threads store before the ticket is drawn, so the program with the last ticket sees every list.
        tl.debug_barrier()
        ticket = tl.atomic_add(tickets + tl.program_id(0), 1, sem="acq_rel", scope="gpu")
        last = ticket == splits * lists - 1
        tl.debug_barrier()
    else:
        last = tl.program_id(1) == 0
    if last:
        if LISTS:
            for g in range(G):
                joined = _joined(parts, rows, in_batch, g, G, splits, B, BB, KP, CHUNK)
                if VOTE:
                    tl.store(parts + (g * B + rows) * KP + place, joined, mask=in_batch)
                else:
                    found = (joined != _NONE) & (place < K)
                    address = (rows * G + g) * K + place
                    tl.store(slot_ids + address, tl.where(found, _slot_of(joined), -1), mask=in_batch & (place < K))
            if VOTE:
                tl.debug_barrier()
                for b0 in range(0, BB, BR):
                    some = tl.program_id(0) * BB + b0 + tl.arange(0, BR)
                    elected = _elect(parts, some, B, G, K, BR, KP)
                    _write_route(elected, some, some < B, slot_ids, weights, K, KP, SOFTMAX, temperature)
        else:
            if JOIN:
                best = _joined(parts, rows, in_batch, 0, 1, splits, B, BB, KP, CHUNK)
            _write_route(best, b, b < B, slot_ids, weights, K, KP, SOFTMAX, temperature)


@triton.jit
def _joined(parts, rows, in_batch, group, lists, splits, B, BB: tl.constexpr, KP: tl.constexpr,
            CHUNK: tl.constexpr):  # fmt: skip
    """The best of all splits' lists for one group, CHUNK splits at a time: [BB, KP]. Loads bypass the L1 cache, because
    other multiprocessors wrote the lists."""
    best = tl.full([BB, KP], _NONE, tl.int64)
    column = tl.arange(0, CHUNK * KP)[None, :]
    for first in range(0, splits, CHUNK):
        split = first + column // KP
        address = parts + ((split * lists + group) * B + rows) * KP + column % KP
        lists_of_chunk = tl.load(address, mask=in_batch & (split < splits), other=_NONE, cache_modifier=".cg")
        best = _merge(best, lists_of_chunk)
    return best


@triton.jit
def _elect(lists, b, B, G, K, BR: tl.constexpr, KP: tl.constexpr):
    """Rank slots by the sum / G of their cosines in the groups' lists: lists [G, B, KP] -> sorted lists [BR, KP]."""
    place = tl.arange(0, KP)[None, :]
    mask = (b < B)[:, None] & (place < K)
    best = tl.full([BR, KP], _NONE, tl.int64)
    for g in range(G):
        mine = tl.load(lists + (g * B + b.to(tl.int64)[:, None]) * KP + place, mask=mask, other=_NONE,
                       cache_modifier=".cg")  # fmt: skip
        total = tl.zeros([BR, KP], tl.float64)
        earlier = tl.zeros([BR, KP], tl.int32)
        for h in range(G):
            other = tl.load(lists + (h * B + b.to(tl.int64)[:, None]) * KP + place, mask=mask, other=_NONE,
                            cache_modifier=".cg")  # fmt: skip
            same = (_slot_of(mine)[:, :, None] == _slot_of(other)[:, None, :]) & (other != _NONE)[:, None, :]
            total += tl.sum(tl.where(same, _score_of(other)[:, None, :].to(tl.float64), 0.0), 2)
            if h < g:
                earlier += tl.sum(same.to(tl.int32), 2)
        score = tl.div_rn(total.to(tl.float32), tl.zeros([BR, KP], tl.float32) + G)
        best = _merge(best, tl.where((mine != _NONE) & (earlier == 0), _pack(score, _slot_of(mine)), _NONE))
    return best


# ---- from tensors to launches ----


def readable(rows: Tensor) -> Tensor:
    """Make `rows` dense, in float32 or float64: Triton cannot compile a float64 product of 16-bit numbers."""
    return (rows if rows.dtype.itemsize >= 4 else rows.float()).contiguous()


def rank(
    query: Tensor,
    keys: Tensor,
    k: int,
    groups: int,
    bias: Tensor | None,
    mask: Tensor | None,
    slot_ids: Tensor,
    weights: Tensor | None,
    *,
    cosine: bool,
    vote: bool,
    softmax: bool = False,
    temperature: float = 1.0,
    mask_prob: float = 0.0,
    seed: int = 0,
) -> None:
    """Launch `_rank`. If `weights` is None, slot_ids gets each group's list. query, keys, bias, mask must be dense."""
    (B, D), P = query.shape, keys.shape[0]
    in_lists = vote or weights is None
    lists = groups if in_lists else 1
    KP = power_of_two(min(k, P), 2)
    BP, BB = max(64, KP), 16
    tiles = blocks(B, BB)
    splits = max(1, min(blocks(P, BP), blocks(2 * processors(query.device), tiles * lists)))
    span = blocks(blocks(P, splits), BP) * BP
    splits = blocks(P, span)
    parts = query.new_empty(splits * lists * B * KP if splits > 1 or in_lists else 1, dtype=torch.int64)
    tickets = query.new_zeros(tiles, dtype=torch.int32)
    with on(query.device):
        _rank[(tiles, lists, splits)](
            query, keys, bias, mask, parts, tickets, slot_ids, weights,
            seed, math.ceil(mask_prob * 2**24), temperature,
            B, P, D, D // groups, groups, slot_ids.shape[-1], 0 if mask is None or mask.dim() == 1 else P, span,
            BB=BB, BP=BP, BD=min(32, power_of_two(D // groups, 16)), KP=KP, JOIN=splits > 1 or in_lists,
            COSINE=cosine, LISTS=in_lists, VOTE=vote, HAS_BIAS=bias is not None, HAS_MASK=mask is not None,
            HIDE=mask_prob > 0, SOFTMAX=softmax, BR=max(1, min(BB, 8192 // KP**2)),
            CHUNK=128 // KP,
        )  # fmt: skip
