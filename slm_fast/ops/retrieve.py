"""retrieve and key_loss: from a query to its top-K slots and their weights, and the loss that learns the keys.

Dynamic Task-related Knowledge Retrieval (SLM, ICLR 2024, Section 3.2). Group g is the g-th of G equal slices of D:

    s[b, p] = mean_g cos(query[b, g], key[p, g])                        metric="cosine"
    s[b, p] = query[b] . key[p] + bias[p]                               metric="dot"

Shape suffixes: B queries, P slots, G groups, K retrieved, D query width, d = D / G.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slm_fast.errors import InputError
from slm_fast.ops import dispatch

_EPSILON = 1e-12  # a vector no longer than this has cosine 0 with everything
_MOST_PICKED = 128  # K up to which a GPU keeps the best in registers


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
    _check_pair(query, keys, k, groups)
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
    size = "" if query.device.type == "cpu" and not dispatch.INTERPRETED else _size(query, keys, k, groups, aggregate)
    backend = dispatch.chosen("retrieve", query.device.type, size)
    op = getattr(torch.ops.slm_fast, f"retrieve_{backend.name}")
    query, keys, bias = query.detach(), keys.detach(), None if bias is None else bias.detach()
    more = (prepared,) if backend.prepares_keys and metric == "cosine" else ()
    try:
        slot_ids, weights = op(query, keys, k, groups, bias, mask, metric, aggregate, weighting, temperature, *more)
    except ValueError as error:  # what only the backend sees, such as a number that is not finite
        raise InputError(str(error)) from None
    return Route(slot_ids, weights)


def key_loss(query: Tensor, keys: Tensor, k: int, *, groups: int, mask_prob: float, seed: int) -> Tensor:
    """The key-preparation loss (Eq. 5-7): minus the mean cosine between each query and its top-K unmasked keys.

    Each group of each query hides every slot with probability `mask_prob`, then takes its top K by cosine; the mean is
    over all that was selected (fewer than K where the mask leaves fewer), 0 if nothing was. Slot (b, g, p) is hidden
    when `(h >> 40) * 2**-24 < mask_prob` with `h = splitmix64(seed + 0x9E3779B97F4A7C15 * (1 + (b*G + g)*P + p))` (the
    finaliser alone: h is output (b*G + g)*P + p of the generator seeded with `seed`), the same on every backend.

    Args:
        query: [B, D]. keys: [P, D], same dtype. k: at least 1. groups: G, a divisor of D.
        mask_prob: in [0, 1]. seed: any 64-bit integer.

    Returns:
        [] loss, float32 (float64 for float64), differentiable in keys; unselected keys get no gradient.

    Raises:
        InputError: an argument does not fit.
    """
    _check_pair(query, keys, k, groups)
    if not 0.0 <= mask_prob <= 1.0:
        raise InputError(f"mask_prob: expected 0 to 1, got {mask_prob}")
    seed = (seed + 2**63) % 2**64 - 2**63  # the int64 with the same bits
    op = dispatch.operator("key_loss", query.device.type, "wide" if min(k, len(keys)) > _MOST_PICKED else "")
    loss: Tensor = op(query, keys, k, groups, mask_prob, seed)[0]
    return loss


def _size(query: Tensor, keys: Tensor, k: int, groups: int, aggregate: str) -> str:
    """What dispatch chooses by: "few" and "many" slots where a warp keeps the K best, "wide" for very large K."""
    slots, width = keys.shape
    if min(k, slots) > _MOST_PICKED:
        return "wide"
    padded = groups * -(-width // groups // 64) * 64  # a group's numbers as they lie in shared memory
    if k > 32 or aggregate == "vote" or padded > 2560 or query.dtype == torch.float64:
        return "other"
    return "few" if slots <= 4096 else "many"


def _check_pair(query: Tensor, keys: Tensor, k: int, groups: int) -> None:
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


# The specification. Every other backend is compared with these functions.


def _normalised_groups(rows: Tensor, groups: int) -> Tensor:
    """[N, D] -> [N, G, d], each group of unit length."""
    grouped = rows.unflatten(1, (groups, rows.shape[1] // groups))
    length: Tensor = torch.linalg.vector_norm(grouped, dim=-1, keepdim=True)
    return torch.where(length > _EPSILON, grouped / length, 0.0)


def _best(scores: Tensor, k: int) -> Tensor:
    """Ids of the k best along the last axis, by falling score, of equal scores the lower id first."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


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
            "bgd,pgd->bgp", _normalised_groups(query_BD, groups), _normalised_groups(keys_PD, groups)
        ).float()
        if aggregate == "vote":
            ranked_BGP = cosine_BGP.masked_fill(~allowed_BP[:, None], -torch.inf)
            kept_BGP = torch.zeros_like(cosine_BGP, dtype=torch.bool).scatter_(2, _best(ranked_BGP, k), True)
            kept_BGP &= allowed_BP[:, None]
            cosine_BGP = cosine_BGP * kept_BGP
            allowed_BP = kept_BGP.any(1)
        score_BP = cosine_BGP.sum(1) / groups

    K = min(k, P)
    ids_BK = _best(score_BP.masked_fill(~allowed_BP, -torch.inf), K)
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


def hidden_slots(B: int, G: int, P: int, mask_prob: float, seed: int, device: torch.device) -> Tensor:
    """[B, G, P] bool: the random key mask of Eq. 7 (True = hidden), the same on every device and backend."""

    def signed(value: int) -> int:  # the int64 with the same 64 bits
        value &= 2**64 - 1
        return value - 2**64 if value >= 2**63 else value

    def shift_right(h: Tensor, bits: int) -> Tensor:  # logical, not arithmetic
        return (h >> bits) & ((1 << (64 - bits)) - 1)

    # Output number i of the splitmix64 generator (Steele, Lea & Flood 2014) started from `seed`: its state advances by
    # the golden-ratio constant before each output, and the finaliser below mixes it.
    h = torch.arange(1, B * G * P + 1, device=device) * signed(0x9E3779B97F4A7C15) + signed(seed)
    h = (h ^ shift_right(h, 30)) * signed(0xBF58476D1CE4E5B9)
    h = (h ^ shift_right(h, 27)) * signed(0x94D049BB133111EB)
    h = h ^ shift_right(h, 31)
    return (shift_right(h, 40).double() * 2.0**-24 < mask_prob).view(B, G, P)


@dispatch.without_autocast
def reference_key_loss(
    query_BD: Tensor, keys_PD: Tensor, k: int, groups: int, mask_prob: float, seed: int
) -> tuple[Tensor, Tensor]:
    """The loss [] and the selected slots [B, G, min(k, P)], -1 where the mask left fewer."""
    accumulate = torch.float64 if keys_PD.dtype == torch.float64 else torch.float32
    B, P = query_BD.shape[0], keys_PD.shape[0]
    query_BGd, key_PGd = _normalised_groups(query_BD.double(), groups), _normalised_groups(keys_PD.double(), groups)
    cosine_BGP = torch.einsum("bgd,pgd->bgp", query_BGd, key_PGd)
    hidden_BGP = hidden_slots(B, groups, P, mask_prob, seed, keys_PD.device)
    ids_BGK = _best(cosine_BGP.float().masked_fill(hidden_BGP, -torch.inf), k)
    found_BGK = ~hidden_BGP.gather(2, ids_BGK)
    total = (cosine_BGP.gather(2, ids_BGK) * found_BGK).sum()
    loss = (-total / found_BGK.sum().clamp(min=1)).to(accumulate)
    return loss, ids_BGK.masked_fill(~found_BGK, -1)


@dispatch.without_autocast
def reference_key_loss_backward(grad: Tensor, query_BD: Tensor, keys_PD: Tensor, selected_BGK: Tensor) -> Tensor:
    """Gradient of the keys: d cos / d key = (query^ - cos * key^) / |key|, over the selected (b, g, k) only."""
    accumulate = torch.float64 if keys_PD.dtype == torch.float64 else torch.float32
    groups, P = selected_BGK.shape[1], keys_PD.shape[0]
    query_BGd = _normalised_groups(query_BD.to(accumulate), groups)
    key_PGd = _normalised_groups(keys_PD.to(accumulate), groups)
    length_PG1 = torch.linalg.vector_norm(
        keys_PD.to(accumulate).unflatten(1, (groups, keys_PD.shape[1] // groups)), dim=-1, keepdim=True
    )
    cosine_BGP = torch.einsum("bgd,pgd->bgp", query_BGd, key_PGd)
    # One column more than there are slots takes the -1s.
    picked_BGP = torch.zeros(*selected_BGK.shape[:2], P + 1, dtype=accumulate, device=keys_PD.device)
    picked_BGP = picked_BGP.scatter_(2, selected_BGK.where(selected_BGK >= 0, P), 1.0)[..., :P]
    towards_PGd = torch.einsum("bgp,bgd->pgd", picked_BGP, query_BGd)
    along_PG1 = (picked_BGP * cosine_BGP).sum(0).T[..., None]
    direction_PGd = torch.where(length_PG1 > _EPSILON, (towards_PGd - along_PG1 * key_PGd) / length_PG1, 0.0)
    scale = -grad.to(accumulate) / (selected_BGK >= 0).sum().clamp(min=1)
    grad_keys_PD: Tensor = (scale * direction_PGd).reshape(keys_PD.shape).to(keys_PD.dtype)
    return grad_keys_PD


# Registration: the same fakes and autograd formula serve every backend.

_RETRIEVE_SCHEMA = (
    "(Tensor query, Tensor keys, SymInt k, SymInt groups, Tensor? bias, Tensor? mask, str metric, str aggregate,"
    " str weighting, float temperature) -> (Tensor, Tensor)"
)
_KEY_LOSS_SCHEMA = (
    "(Tensor query, Tensor keys, SymInt k, SymInt groups, float mask_prob, SymInt seed) -> (Tensor, Tensor)"
)
_KEY_LOSS_BACKWARD_SCHEMA = "(Tensor grad, Tensor query, Tensor keys, Tensor selected) -> Tensor"


def _fake_retrieve(query: Tensor, keys: Tensor, k: int, *_: object) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], k)
    return query.new_empty(shape, dtype=torch.int64), query.new_empty(shape, dtype=torch.float32)


def _fake_key_loss(query: Tensor, keys: Tensor, k: int, groups: int, *_: object) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    selected = query.new_empty((query.shape[0], groups, min(k, keys.shape[0])), dtype=torch.int64)
    return query.new_empty((), dtype=dtype), selected


def _remember_key_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, keys, *_ = inputs
    ctx.save_for_backward(query, keys, output[1])
    ctx.mark_non_differentiable(output[1])


def _fake_prepare_keys(keys: Tensor, groups: int) -> Tensor:
    return keys.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


def register(backend: str) -> None:
    """Attach the fake kernels and autograd formulas to those of `slm_fast::{retrieve,key_loss}_<backend>` there are."""
    torch.library.register_fake(f"slm_fast::retrieve_{backend}", _fake_retrieve)
    if any(b.name == backend and b.prepares_keys for b in dispatch.BACKENDS):
        torch.library.register_fake(f"slm_fast::prepare_keys_{backend}", _fake_prepare_keys)
    if not any(b.name == backend and b.serves("key_loss") for b in dispatch.BACKENDS):
        return

    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_keys = None
        if ctx.needs_input_grad[1]:
            grad_keys = getattr(torch.ops.slm_fast, f"key_loss_{backend}_backward")(grad, *ctx.saved_tensors)
        return None, grad_keys, None, None, None, None

    torch.library.register_fake(f"slm_fast::key_loss_{backend}", _fake_key_loss)
    torch.library.register_fake(
        f"slm_fast::key_loss_{backend}_backward",
        lambda grad, query, keys, selected: torch.empty_like(keys, memory_format=torch.contiguous_format),
    )
    torch.library.register_autograd(f"slm_fast::key_loss_{backend}", backward, setup_context=_remember_key_loss)


for _stem, _function, _schema in (
    ("retrieve_reference", reference_retrieve, _RETRIEVE_SCHEMA),
    ("key_loss_reference", reference_key_loss, _KEY_LOSS_SCHEMA),
    ("key_loss_reference_backward", reference_key_loss_backward, _KEY_LOSS_BACKWARD_SCHEMA),
):
    torch.library.custom_op(f"slm_fast::{_stem}", _function, mutates_args=(), schema=_schema)
register("reference")
if dispatch.NATIVE_MISSING is None:
    register("native")
if dispatch.TRITON_MISSING is None:
    from slm_fast.ops.triton import retrieve as in_triton

    torch.library.custom_op("slm_fast::retrieve_triton", in_triton.retrieve, mutates_args=(), schema=_RETRIEVE_SCHEMA)
    torch.library.custom_op("slm_fast::key_loss_triton", in_triton.key_loss, mutates_args=(), schema=_KEY_LOSS_SCHEMA)
    torch.library.custom_op(
        "slm_fast::key_loss_triton_backward",
        in_triton.key_loss_backward,
        mutates_args=(),
        schema=_KEY_LOSS_BACKWARD_SCHEMA,
    )
    register("triton")
if dispatch.CUDA_MISSING is None:
    register("cuda")
