"""key_loss in Triton. The specification is slm_fast/ops/key_loss.py.

Forward: the lists of search.py, and one program per query and group that sums the cosines of its selected slots.
Backward: one program per key and group, which loops in order over the queries that selected it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slm_fast.ops.triton import by_slot, on, power_of_two
from slm_fast.ops.triton.search import EPSILON, rank, readable


@triton.jit
def _selected_cosines(query, keys, selected, sums, D, G, K, KP: tl.constexpr, BD: tl.constexpr):
    """sums[0, b, g] = sum of the float64 cosines of the selected slots, sums[1, b, g] = their number."""
    row = tl.program_id(0).to(tl.int64)  # b G + g
    sample, group = row // G, row % G
    place = tl.arange(0, KP)
    slot = tl.load(selected + row * K + place, mask=place < K, other=-1)
    found = slot >= 0
    products, query_square = tl.zeros([KP], tl.float64), tl.zeros([1], tl.float64)
    key_square = tl.zeros([KP], tl.float64)
    for d0 in range(0, D // G, BD):
        d = d0 + tl.arange(0, BD)
        inside = d < D // G
        q = tl.load(query + sample * D + group * (D // G) + d, mask=inside, other=0.0).to(tl.float64)[None, :]
        address = tl.where(found, slot, 0)[:, None] * D + group * (D // G) + d[None, :]
        key = tl.load(keys + address, mask=found[:, None] & inside[None, :], other=0.0).to(tl.float64)
        products += tl.sum(q * key, 1)
        query_square += tl.sum(q * q, 1)
        key_square += tl.sum(key * key, 1)
    query_length, key_length = tl.sqrt(query_square), tl.sqrt(key_square)
    defined = found & (query_length > EPSILON) & (key_length > EPSILON)
    cosine = tl.where(defined, products / tl.where(defined, query_length * key_length, 1.0), 0.0)
    tl.store(sums + row, tl.sum(cosine, 0))
    tl.store(sums + tl.num_programs(0).to(tl.int64) + row, tl.sum(found.to(tl.float64), 0))


@triton.jit
def _key_gradient(
    gradient, grad, counted, query, keys, order, begin, D, G, K, BD: tl.constexpr, d_size: tl.constexpr,
    DOUBLE: tl.constexpr,
):  # fmt: skip
    """gradient[p, g] = scale . sum over the (b, g) that selected p, in order: (q^ - cos k^) / |k|."""
    row = tl.program_id(0).to(tl.int64)  # p G + g
    slot, group = row // G, row % G
    d = tl.arange(0, BD)
    inside = d < d_size
    key = tl.load(keys + slot * D + group * d_size + d, mask=inside, other=0.0).to(tl.float64)
    length = tl.sqrt(tl.sum(key * key, 0))
    usable = length > EPSILON
    key = tl.where(usable, key / tl.where(usable, length, 1.0), 0.0)
    towards = tl.zeros([BD], tl.float64)
    for n in range(tl.load(begin + row), tl.load(begin + row + 1)):
        sample = tl.load(order + n) // (G * K)
        q = tl.load(query + sample * D + group * d_size + d, mask=inside, other=0.0).to(tl.float64)
        query_length = tl.sqrt(tl.sum(q * q, 0))
        towards += tl.where(query_length > EPSILON, q / tl.where(query_length > EPSILON, query_length, 1.0), 0.0)
    # cos is linear in the unit query, so the sum of cosines is the product with the sum.
    direction = (towards - tl.sum(towards * key, 0) * key) / tl.where(usable, length, 1.0)
    scale = -tl.load(grad).to(tl.float64) / tl.maximum(tl.load(counted), 1.0)
    result = tl.where(usable, scale * direction, 0.0)
    if not DOUBLE:
        result = result.to(tl.float32)
    tl.store(gradient + slot * D + group * d_size + d, result, mask=inside)


# ---- from tensors to launches ----


def forward(query: Tensor, keys: Tensor, k: int, groups: int, mask_prob: float, seed: int) -> tuple[Tensor, Tensor]:
    """Same as the reference: the loss [] and the selected slots [B, G, min(k, P)]."""
    (B, D), P = query.shape, keys.shape[0]
    accumulate = torch.float64 if keys.dtype == torch.float64 else torch.float32
    selected = query.new_empty(B, groups, min(k, P), dtype=torch.int64)
    if selected.numel() == 0:
        return query.new_zeros((), dtype=accumulate), selected
    query, keys = readable(query), readable(keys)
    rank(query, keys, k, groups, None, None, selected, None, cosine=True, vote=False, mask_prob=mask_prob, seed=seed)
    sums = query.new_empty(2, B * groups, dtype=torch.float64)
    with on(query.device):
        _selected_cosines[(B * groups,)](
            query, keys, selected, sums, D, groups, min(k, P), KP=power_of_two(min(k, P), 2), BD=32
        )
    total, count = sums.sum(1)
    return (-total / count.clamp(min=1)).to(accumulate), selected


def backward(grad: Tensor, query: Tensor, keys: Tensor, selected: Tensor) -> Tensor:
    """Same as the reference: the gradient of the keys."""
    (_, G, K), (P, D) = selected.shape, keys.shape
    gradient = torch.empty_like(keys, memory_format=torch.contiguous_format)
    if selected.numel() == 0 or D == 0:
        return gradient.zero_()
    # Key slice (p, g) has number p G + g.
    slices = torch.where(selected >= 0, selected * G + torch.arange(G, device=keys.device)[:, None], -1)
    order, begin = by_slot(slices, P * G)
    with on(keys.device):
        _key_gradient[(P * G,)](
            gradient, grad, (selected >= 0).sum().double(), readable(query), readable(keys), order, begin, D, G, K,
            BD=power_of_two(D // G, 16), d_size=D // G, DOUBLE=keys.dtype == torch.float64,
        )  # fmt: skip
    return gradient
