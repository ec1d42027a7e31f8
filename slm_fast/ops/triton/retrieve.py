"""retrieve in Triton. The specification is slm_fast/ops/retrieve.py."""

from __future__ import annotations

import torch
from torch import Tensor

from slm_fast.ops.triton import power_of_two
from slm_fast.ops.triton.search import rank, readable


def forward(
    query: Tensor,
    keys: Tensor,
    k: int,
    groups: int,
    bias: Tensor | None,
    mask: Tensor | None,
    metric: str,
    aggregate: str,
    weighting: str,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Same as the reference: slot_ids and weights [B, k]. Queries are checked to be finite on the CPU only, where this
    waits for no device."""
    B, P = query.shape[0], keys.shape[0]
    if query.device.type == "cpu" and not bool(query.isfinite().all()):
        raise ValueError(f"query: row {int((~query.isfinite().all(1)).nonzero()[0])} holds a number that is not finite")
    if min(B, P) == 0 or k > power_of_two(P, 2):
        slot_ids = torch.full((B, k), -1, dtype=torch.int64, device=query.device)
        weights = torch.zeros(B, k, dtype=torch.float32, device=query.device)
    else:
        slot_ids = query.new_empty(B, k, dtype=torch.int64)
        weights = query.new_empty(B, k, dtype=torch.float32)
    if min(B, P) > 0:
        rank(
            readable(query), readable(keys), k, groups,
            None if bias is None else readable(bias), None if mask is None else mask.contiguous().view(torch.uint8),
            slot_ids, weights, cosine=metric == "cosine", vote=aggregate == "vote", softmax=weighting == "softmax",
            temperature=temperature,
        )  # fmt: skip
    return slot_ids, weights
