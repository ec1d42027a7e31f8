"""What retrieve and key_loss share: cosines in groups, the ranking of slots, and checks of a query and its keys.

Shape suffixes: B queries, P slots, G groups, K best, D query width, d = D / G.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slm_fast.errors import InputError

EPSILON = 1e-12  # a vector no longer than this has cosine 0 with everything
MOST_PICKED = 128  # K up to which a GPU keeps the best in registers


def check_pair(query: Tensor, keys: Tensor, k: int, groups: int) -> None:
    """Raise InputError unless query is [B, D], keys [P, D] of its dtype and device, k at least 1 and groups a divisor
    of D."""
    if query.dim() != 2 or not query.is_floating_point():
        raise InputError(f"query: expected floating [B, D], got {query.dtype} {list(query.shape)}")
    if keys.dim() != 2 or keys.shape[1] != query.shape[1]:
        raise InputError(
            f"keys: expected [P, {query.shape[1]}] to match query {list(query.shape)}, got {list(keys.shape)}"
        )
    if keys.dtype != query.dtype or keys.device != query.device:
        raise InputError(
            f"keys: expected {query.dtype} on {query.device} to match query, got {keys.dtype} on {keys.device}"
        )
    if k < 1:
        raise InputError(f"k: expected at least 1, got {k}")
    if groups < 1 or query.shape[1] % groups != 0:
        raise InputError(f"groups: expected a divisor of the query width {query.shape[1]}, got {groups}")


def normalised_groups(rows: Tensor, groups: int) -> Tensor:
    """[N, D] -> [N, G, d], with each group scaled to unit length."""
    grouped = rows.unflatten(1, (groups, rows.shape[1] // groups))
    length: Tensor = torch.linalg.vector_norm(grouped, dim=-1, keepdim=True)
    return torch.where(length > EPSILON, grouped / length, 0.0)


def best(scores: Tensor, k: int) -> Tensor:
    """Ids of the k highest scores along the last axis, in descending order. Ties go to the lower id."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
