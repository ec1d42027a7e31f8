"""retrieve: from a query to its top-K slots and their weights.

Dynamic Task-related Knowledge Retrieval (SLM, ICLR 2024, Section 3.2). Group g is the g-th of G equal slices of D:

    s[b, p] = mean_g cos(query[b, g], key[p, g])                        metric="cosine"
    s[b, p] = query[b] . key[p] + bias[p]                               metric="dot"

If a slot has several keys, its score is that of its best key.

Shape suffixes: B queries, P slots, N keys (P if each slot has one), G groups, K retrieved, D query width, d = D / G.
"""

from __future__ import annotations

import math
import operator
from typing import NamedTuple

import torch
from torch import Tensor

from slm_fast.errors import InputError
from slm_fast.ops import dispatch
from slm_fast.ops.arguments import explained
from slm_fast.ops.search import MOST_PICKED, best, check_pair, normalised_groups


class Route(NamedTuple):
    """The retrieved slots of each sample, best first."""

    slot_ids: Tensor  # [B, K] int64, -1 = none
    weights: Tensor  # [B, K] float32, 0 where there is none


def route_to_only_slots(mask: Tensor | None, k: int) -> Route | None:
    """What `retrieve` with softmax weights returns, whatever the keys, if each row of a mask [B, P] allows one slot;
    None for other masks. Waits for the device."""
    if mask is None or mask.ndim != 2:
        return None
    row, slot = mask.nonzero(as_tuple=True)
    if not torch.equal(row, torch.arange(len(mask), device=mask.device)):
        return None
    slot_ids, weights = slot.new_full((len(mask), k), -1), torch.zeros(len(mask), k, device=mask.device)
    slot_ids[:, 0], weights[:, 0] = slot, 1.0
    return Route(slot_ids, weights)


class PreparedKeys(NamedTuple):
    """Keys prepared for many queries, by `prepare_keys`. The keys must not change afterwards."""

    keys: Tensor  # [N, D]
    groups: int
    prepared: Tensor | None  # [bytes] uint8, in the backend's own format; None if unused
    key_slot: Tensor | None = None  # [N] int64
    most: int = 1  # maximum number of keys per slot
    metric: str = "cosine"  # which `prepared` is for


@explained
def prepare_keys(
    keys: Tensor, *, groups: int = 1, key_slot: Tensor | None = None, metric: str = "cosine"
) -> PreparedKeys:
    """Precompute what `retrieve` would compute of its keys at each call. Routes stay the same.

    For cosines these are the keys' lengths and, if the CPU multiplies bfloat16, rounded rows; for inner products,
    rounded float32 rows, if it does. Rounded rows take half the memory of float32 keys. With several keys per slot it
    also inspects `key_slot`, which on a GPU takes a synchronisation.

    Args:
        keys: [N, D].
        groups: G, a divisor of D; 1 for inner products.
        key_slot: [N], as for `retrieve`.
        metric: "cosine" or "dot", with which they will be used. `retrieve` with the other ignores what was prepared.

    Raises:
        InputError: `groups` does not divide D, or `key_slot` or `metric` is invalid.
    """
    groups = operator.index(groups)  # not every backend's operator gets to see it
    _check_metric(metric, groups)
    if keys.dim() != 2 or not keys.is_floating_point():
        raise InputError(f"keys: expected floating [P, D], got {keys.dtype} {list(keys.shape)}")
    if groups < 1 or keys.shape[1] % groups != 0:
        raise InputError(f"groups: expected a divisor of the key width {keys.shape[1]}, got {groups}")
    most = 1
    if key_slot is not None:
        _check_like_keys(key_slot, keys)
        check_key_slot(key_slot)
        most = most_keys(key_slot)
    keys, prepared = keys.detach(), None
    if keys.device.type == "cpu":
        backend = dispatch.chosen("retrieve", "cpu")
        if backend.prepares_keys:
            prepared = getattr(torch.ops.slm_fast, f"prepare_keys_{backend.name}")(keys, groups, metric)
    return PreparedKeys(keys, groups, prepared, key_slot, most, metric)


@explained
def retrieve(
    query: Tensor,
    keys: Tensor | PreparedKeys,
    k: int,
    *,
    groups: int = 1,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    key_slot: Tensor | None = None,
    metric: str = "cosine",
    aggregate: str = "mean",
    weighting: str = "ratio",
    temperature: float = 1.0,
) -> Route:
    """The K best slots of each query, and their weights.

    Args:
        query: [B, D] floating point.
        keys: [N, D], same dtype, or the result of `prepare_keys`. Ranking is in float32 for any dtype.
        k: number of slots to return, at least 1. If it exceeds P, the remaining places have id -1 and weight 0.
        groups: G, a divisor of D; more than one only with metric="cosine".
        bias: [N], added to the keys' scores; only with metric="dot".
        mask: [P] or [B, P] bool; slots that are False are never returned.
        key_slot: [N] int64, the slot of each key, in ascending order from 0; slots without a key are never returned.
            None: one key per slot. Not with aggregate="vote".
        aggregate: "mean" ranks by the mean cosine over groups (the authors' code). "vote" lets each group keep its own
            top K cosines and ranks by their sum over groups divided by G (the paper's text); slots that no group kept
            are never returned.
        weighting: "softmax" is softmax(s / temperature) over the K; "ratio" is max(s, 0) / sum max(s, 0) over the K
            (uniform if none is positive).

    Returns:
        Route of slot_ids [B, K] and weights [B, K], in descending order of score; ties go to the lower id. No gradient
        flows through a route (keys learn through `key_loss`).

    Raises:
        InputError: an argument is invalid, or (on a CPU) the query is not finite.
        WorkError: there is no memory for [B, K] (native backend; from others, torch's own error).
    """
    prepared, most = None, None
    if isinstance(keys, PreparedKeys):
        if metric == "cosine" and groups != keys.groups:
            raise InputError(f"groups: expected {keys.groups}, as the keys were prepared for, got {groups}")
        if keys.key_slot is not None and key_slot is not None and key_slot is not keys.key_slot:
            raise InputError("key_slot: the keys were prepared with one of their own")
        most = None if keys.key_slot is None else keys.most
        key_slot = keys.key_slot if key_slot is None else key_slot
        prepared, keys = keys.prepared if keys.metric == metric else None, keys.keys
    check_pair(query, keys, k, groups)
    if aggregate not in ("mean", "vote"):
        raise InputError(f"aggregate: expected 'mean' or 'vote', got {aggregate!r}")
    if weighting not in ("ratio", "softmax"):
        raise InputError(f"weighting: expected 'ratio' or 'softmax', got {weighting!r}")
    _check_metric(metric, groups, aggregate)
    if metric == "cosine" and bias is not None:
        raise InputError("bias: goes with metric='dot', got metric='cosine'")
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature: expected a positive number, got {temperature}")
    if bias is not None and bias.shape != keys.shape[:1]:
        raise InputError(f"bias: expected [{keys.shape[0]}] to match keys, got {list(bias.shape)}")
    if key_slot is not None:
        _check_like_keys(key_slot, keys)
        if aggregate == "vote":
            raise InputError("key_slot: goes with aggregate='mean', got 'vote'")
    if mask is not None:
        slots = keys.shape[0] if key_slot is None else mask.shape[-1] if mask.dim() else 0
        if mask.dtype != torch.bool or mask.shape not in ((slots,), (query.shape[0], slots)):
            P = "P" if key_slot is not None else slots
            raise InputError(
                f"mask: expected bool [{P}] or [{query.shape[0]}, {P}], got {mask.dtype} {list(mask.shape)}"
            )
    for name, tensor in (("bias", bias), ("mask", mask)):
        if tensor is not None and tensor.device != query.device:
            raise InputError(f"{name}: expected device {query.device} to match query, got {tensor.device}")
    query, keys, bias = query.detach(), keys.detach(), None if bias is None else bias.detach()
    wanted, sized = k, query.device.type != "cpu" or dispatch.INTERPRETED
    size = size_of(query, keys, k, groups, aggregate) if sized else ""
    backend = dispatch.chosen("retrieve", query.device.type, size)
    if key_slot is not None and not backend.takes_key_slot and len(key_slot):
        # Enough keys to include the best key of each of the k best slots.
        if most is None:
            check_key_slot(key_slot, mask)
            most = most_keys(key_slot)
        wanted = min((min(k, len(key_slot)) - 1) * most + 1, len(key_slot))
        size = size_of(query, keys, wanted, groups, aggregate) if sized else ""
        backend = dispatch.chosen("retrieve", query.device.type, size)
    op = getattr(torch.ops.slm_fast, f"retrieve_{backend.name}")
    more = {"prepared": prepared} if backend.prepares_keys else {}
    if key_slot is not None and backend.takes_key_slot:
        more["key_slot"] = key_slot
    options = (metric, aggregate, weighting, temperature)
    try:
        if key_slot is None or backend.takes_key_slot:
            return Route(*op(query, keys, k, groups, bias, mask, *options, **more))
        of_keys = None if mask is None else mask[..., key_slot]
        return _best_slots(Route(*op(query, keys, wanted, groups, bias, of_keys, *options)), key_slot, k)
    except ValueError as error:  # checked only by the backend, such as a number that is not finite
        message = None if key_slot is None else _wrong_key_slot(key_slot, mask)  # in the words all backends share
        raise InputError(message or str(error)) from None


def _check_metric(metric: str, groups: int, aggregate: str = "mean") -> None:
    if metric not in ("cosine", "dot"):
        raise InputError(f"metric: expected 'cosine' or 'dot', got {metric!r}")
    if metric == "dot" and (groups != 1 or aggregate != "mean"):
        raise InputError("metric: groups and aggregate='vote' go with 'cosine', got 'dot'")


def _best_slots(keys: Route, key_slot: Tensor, k: int) -> Route:
    """The k best slots of the best keys [B, n], each weighted by its best key."""
    found, places = keys.slot_ids >= 0, keys.slot_ids.shape[1]
    slot_Bn = torch.where(found, key_slot[keys.slot_ids.clamp(min=0)] if len(key_slot) else keys.slot_ids, -1)
    earlier = torch.ones(places, places, dtype=torch.bool, device=found.device).tril(-1)
    first = found & ~((slot_Bn[:, :, None] == slot_Bn[:, None, :]) & earlier).any(2)
    rank = first.cumsum(1) - 1
    place = torch.where(first & (rank < k), rank, k)  # the last one is cut off
    ids = slot_Bn.new_full((len(slot_Bn), k + 1), -1).scatter_(1, place, slot_Bn)[:, :k]
    weights = keys.weights.new_zeros(len(slot_Bn), k + 1).scatter_(1, place, keys.weights)[:, :k]
    weights = torch.where(ids >= 0, weights, 0.0)
    return Route(ids, weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny))


def _check_like_keys(key_slot: Tensor, keys: Tensor) -> None:
    if key_slot.dtype != torch.int64 or key_slot.shape != keys.shape[:1] or key_slot.device != keys.device:
        raise InputError(
            f"key_slot: expected int64 [{keys.shape[0]}] on {keys.device} to match keys, got {key_slot.dtype} "
            f"{list(key_slot.shape)} on {key_slot.device}"
        )


def check_key_slot(key_slot: Tensor, mask: Tensor | None = None) -> None:
    """Raise InputError unless slots are in ascending order from 0, and in the mask if there is one."""
    message = _wrong_key_slot(key_slot, mask)
    if message is not None:
        raise InputError(message)


def _wrong_key_slot(key_slot: Tensor, mask: Tensor | None) -> str | None:
    if len(key_slot) == 0:
        return None
    if int(key_slot[0]) < 0 or bool((key_slot.diff() < 0).any()):
        return "key_slot: expected slots in rising order from 0"
    if mask is not None and int(key_slot[-1]) >= mask.shape[-1]:
        return f"key_slot: expected slots below {mask.shape[-1]}, as mask has, got {int(key_slot[-1])}"
    return None


def most_keys(key_slot: Tensor) -> int:
    """The largest number of keys of any slot."""
    return int(key_slot.unique_consecutive(return_counts=True)[1].max()) if len(key_slot) else 1


def size_of(query: Tensor, keys: Tensor, k: int, groups: int, aggregate: str) -> str:
    """Size class for dispatch: "few" or "many" slots if a warp can keep the K best, "wide" for very large K, else
    "other"."""
    slots = keys.shape[0]
    if min(k, slots) > MOST_PICKED:
        return "wide"
    if k > 32 or aggregate == "vote" or query.dtype == torch.float64:
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
    key_slot_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    B, P = query_BD.shape[0], keys_PD.shape[0]
    if query_BD.device.type == "cpu" and not bool(query_BD.isfinite().all()):
        row = int((~query_BD.isfinite().all(1)).nonzero()[0])
        raise InputError(f"query: row {row} holds a number that is not finite")
    # Scores are rounded from float64 to float32. A float32 product gives equal keys scores that differ in the last bit,
    # depending on their position, so the lower id might not come first.
    query_BD, keys_PD = query_BD.double(), keys_PD.double()
    if key_slot_N is not None:
        check_key_slot(key_slot_N, mask)
        P = mask.shape[-1] if mask is not None else int(key_slot_N[-1]) + 1 if P else 0
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

    if key_slot_N is not None:
        lowest_BP = score_BP.new_full((B, P), -torch.inf)
        score_BP = lowest_BP.scatter_reduce(1, key_slot_N.expand(B, -1), score_BP, "amax")
        allowed_BP = allowed_BP & torch.zeros_like(allowed_BP).index_fill(1, key_slot_N, True)

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


def fake_prepare_keys(keys: Tensor, groups: int, metric: str = "cosine") -> Tensor:
    return keys.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)
