"""retrieve: from a query to its top-K slots and their weights.

Dynamic Task-related Knowledge Retrieval (SLM, ICLR 2024, Section 3.2). Group g is the g-th of G equal slices of D:

    s[b, p] = mean_g cos(query[b, g], key[p, g])                        metric="cosine"
    s[b, p] = query[b] . key[p] + bias[p]                               metric="dot"

Shape suffixes: B queries, P slots, G groups, K retrieved, D query width, d = D / G.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from slm_fast.errors import InputError
from slm_fast.ops import dispatch
from slm_fast.ops.search import MOST_PICKED, best, check_pair, normalised_groups


class Route(NamedTuple):
    """What retrieval gives each sample, best slot first."""

    slot_ids: Tensor  # [B, K] int64, -1 = none
    weights: Tensor  # [B, K] float32, 0 where there is none


class PreparedKeys(NamedTuple):
    """Keys that many queries will be compared with; made by `prepare_keys`. The keys must not change afterwards."""

    keys: Tensor  # [P, D]
    groups: int
    prepared: Tensor | None  # [bytes] uint8, the backend's own: lengths, and rows of unit length; None if it needs none


def prepare_keys(keys: Tensor, *, groups: int = 1) -> PreparedKeys:
    """Does once what `retrieve` by cosine does with keys [P, D] at each call: their lengths and, where the processor
    multiplies bfloat16, rounded rows (on a CPU that takes half the memory of float32 keys). The routes stay the same.

    Raises InputError when groups does not divide D.
    """
    if keys.dim() != 2 or not keys.is_floating_point():
        raise InputError(f"keys: expected floating [P, D], got {keys.dtype} {list(keys.shape)}")
    if groups < 1 or keys.shape[1] % groups != 0:
        raise InputError(f"groups: expected a divisor of the key width {keys.shape[1]}, got {groups}")
    keys, prepared = keys.detach(), None
    if keys.device.type == "cpu":
        backend = dispatch.chosen("retrieve", "cpu")
        if backend.prepares_keys:
            prepared = getattr(torch.ops.slm_fast, f"prepare_keys_{backend.name}")(keys, groups)
    return PreparedKeys(keys, groups, prepared)


def retrieve(
    query: Tensor,
    keys: Tensor | PreparedKeys,
    k: int,
    *,
    groups: int = 1,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    metric: str = "cosine",
    aggregate: str = "mean",
    weighting: str = "ratio",
    temperature: float = 1.0,
) -> Route:
    """The K best slots of each query and their weights.

    Args:
        query: [B, D] floating. keys: [P, D], same dtype, or `prepare_keys` of them. Ranked in float32 in any dtype.
        k: slots to return, at least 1. It may exceed P: the places left over are id -1, weight 0.
        groups: G, a divisor of D; more than one only with metric="cosine".
        bias: [P], added to the score; only with metric="dot".
        mask: [P] or [B, P] bool; a slot that is False is never returned.
        aggregate: "mean" ranks by the mean cosine over groups (the authors' code). "vote" lets each group keep its own
            top K cosines and ranks by their sum over groups divided by G (the paper's text); a slot that no group kept
            is never returned.
        weighting: "ratio" is max(s, 0) / sum max(s, 0) over the K (uniform if none is positive); "softmax" is
            softmax(s / temperature) over the K.

    Returns:
        Route of slot_ids [B, K] and weights [B, K], by falling score; of equal scores the lower id comes first.
        A constant: no gradient flows through a route (keys learn through `key_loss`).

    Raises:
        InputError: an argument does not fit, or (on a CPU) the query holds a number that is not finite.
    """
    prepared = None
    if isinstance(keys, PreparedKeys):
        if metric == "cosine" and groups != keys.groups:
            raise InputError(f"groups: expected {keys.groups}, as the keys were prepared for, got {groups}")
        keys, _, prepared = keys
    check_pair(query, keys, k, groups)
    if metric not in ("cosine", "dot"):
        raise InputError(f"metric: expected 'cosine' or 'dot', got {metric!r}")
    if aggregate not in ("mean", "vote"):
        raise InputError(f"aggregate: expected 'mean' or 'vote', got {aggregate!r}")
    if weighting not in ("ratio", "softmax"):
        raise InputError(f"weighting: expected 'ratio' or 'softmax', got {weighting!r}")
    if metric == "dot" and (groups != 1 or aggregate != "mean"):
        raise InputError("metric: groups and aggregate='vote' go with 'cosine', got 'dot'")
    if metric == "cosine" and bias is not None:
        raise InputError("bias: goes with metric='dot', got metric='cosine'")
    if not (math.isfinite(temperature) and temperature > 0):
        raise InputError(f"temperature: expected a positive number, got {temperature}")
    if bias is not None and bias.shape != keys.shape[:1]:
        raise InputError(f"bias: expected [{keys.shape[0]}] to match keys, got {list(bias.shape)}")
    if mask is not None:
        shapes = (keys.shape[:1], (query.shape[0], keys.shape[0]))
        if mask.dtype != torch.bool or mask.shape not in shapes:
            raise InputError(
                f"mask: expected bool {list(shapes[0])} or {list(shapes[1])}, got {mask.dtype} {list(mask.shape)}"
            )
    for name, tensor in (("bias", bias), ("mask", mask)):
        if tensor is not None and tensor.device != query.device:
            raise InputError(f"{name}: expected device {query.device} to match query, got {tensor.device}")
    size = "" if query.device.type == "cpu" and not dispatch.INTERPRETED else size_of(query, keys, k, groups, aggregate)
    backend = dispatch.chosen("retrieve", query.device.type, size)
    op = getattr(torch.ops.slm_fast, f"retrieve_{backend.name}")
    query, keys, bias = query.detach(), keys.detach(), None if bias is None else bias.detach()
    more = (prepared,) if backend.prepares_keys and metric == "cosine" else ()
    try:
        slot_ids, weights = op(query, keys, k, groups, bias, mask, metric, aggregate, weighting, temperature, *more)
    except ValueError as error:  # what only the backend sees, such as a number that is not finite
        raise InputError(str(error)) from None
    return Route(slot_ids, weights)


def size_of(query: Tensor, keys: Tensor, k: int, groups: int, aggregate: str) -> str:
    """What dispatch chooses by: "few" and "many" slots where a warp keeps the K best, "wide" for very large K."""
    slots, width = keys.shape
    if min(k, slots) > MOST_PICKED:
        return "wide"
    padded = groups * -(-width // groups // 64) * 64  # a group's numbers as they lie in shared memory
    if k > 32 or aggregate == "vote" or padded > 2560 or query.dtype == torch.float64:
        return "other"
    return "few" if slots <= 4096 else "many"


# The specification. Every other backend is compared with it.


@dispatch.without_autocast
def reference_retrieve(
    query_BD: Tensor,
    keys_PD: Tensor,
    k: int,
    groups: int,
    bias_P: Tensor | None,
    mask: Tensor | None,
    metric: str,
    aggregate: str,
    weighting: str,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    B, P = query_BD.shape[0], keys_PD.shape[0]
    if query_BD.device.type == "cpu" and not bool(query_BD.isfinite().all()):
        row = int((~query_BD.isfinite().all(1)).nonzero()[0])
        raise InputError(f"query: row {row} holds a number that is not finite")
    # Scores are rounded to float32 from float64. A float32 product gives equal keys scores that differ in the last bit,
    # depending on where they stand, and the lower id would not come first.
    query_BD, keys_PD = query_BD.double(), keys_PD.double()
    allowed_BP = torch.ones(B, P, dtype=torch.bool, device=query_BD.device) if mask is None else mask.expand(B, P)

    if metric == "dot":
        score_BP = query_BD @ keys_PD.T
        if bias_P is not None:
            score_BP = score_BP + bias_P.double()
        score_BP = score_BP.float()
    else:
        cosine_BGP = torch.einsum(
            "bgd,pgd->bgp", normalised_groups(query_BD, groups), normalised_groups(keys_PD, groups)
        ).float()
        if aggregate == "vote":
            ranked_BGP = cosine_BGP.masked_fill(~allowed_BP[:, None], -torch.inf)
            kept_BGP = torch.zeros_like(cosine_BGP, dtype=torch.bool).scatter_(2, best(ranked_BGP, k), True)
            kept_BGP &= allowed_BP[:, None]
            cosine_BGP = cosine_BGP * kept_BGP
            allowed_BP = kept_BGP.any(1)
        score_BP = cosine_BGP.sum(1) / groups

    K = min(k, P)
    ids_BK = best(score_BP.masked_fill(~allowed_BP, -torch.inf), K)
    found_BK, score_BK = allowed_BP.gather(1, ids_BK), score_BP.gather(1, ids_BK)
    if weighting == "softmax":
        weight_BK = (score_BK / temperature).masked_fill(~found_BK, -torch.inf).softmax(-1)
    else:
        positive_BK = score_BK.clamp(min=0) * found_BK
        total_B1 = positive_BK.sum(-1, keepdim=True)
        uniform_BK = found_BK / found_BK.sum(-1, keepdim=True)
        weight_BK = torch.where(total_B1 > 0, positive_BK / total_B1, uniform_BK)

    slot_ids = torch.full((B, k), -1, dtype=torch.int64, device=query_BD.device)
    weights = torch.zeros(B, k, dtype=torch.float32, device=query_BD.device)
    slot_ids[:, :K] = ids_BK.masked_fill(~found_BK, -1)
    weights[:, :K] = weight_BK.masked_fill(~found_BK, 0.0)
    return slot_ids, weights


def fake_retrieve(query: Tensor, keys: Tensor, k: int, *_: object) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], k)
    return query.new_empty(shape, dtype=torch.int64), query.new_empty(shape, dtype=torch.float32)


def fake_prepare_keys(keys: Tensor, groups: int) -> Tensor:
    return keys.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)
