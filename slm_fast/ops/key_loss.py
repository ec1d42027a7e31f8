"""key_loss: the loss that pulls keys towards the queries of their task (SLM, ICLR 2024, Eq. 5-7).

Shape suffixes: B queries, P slots, G groups, K selected, D query width, d = D / G.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from slm_fast.errors import InputError
from slm_fast.ops import dispatch
from slm_fast.ops.arguments import explained, refuse_tangents
from slm_fast.ops.search import EPSILON, MOST_PICKED, best, check_pair, normalised_groups


@explained
def key_loss(query: Tensor, keys: Tensor, k: int, *, groups: int, mask_prob: float, seed: int) -> Tensor:
    """The key-preparation loss (Eq. 5-7): minus the mean cosine between each query and its top-K unmasked keys.

    Each group of each query hides every slot with probability `mask_prob`, then selects its top K by cosine. The mean
    is over everything selected (fewer than K if the mask leaves fewer), or 0 if nothing is. Slot (b, g, p) is hidden
    when `(h >> 40) * 2**-24 < mask_prob` with `h = splitmix64(seed + 0x9E3779B97F4A7C15 * (1 + (b*G + g)*P + p))` (the
    finaliser alone: h is output (b*G + g)*P + p of the generator seeded with `seed`), the same on every backend.

    Args:
        query: [B, D].
        keys: [P, D], same dtype.
        k: at least 1.
        groups: G, a divisor of D.
        mask_prob: in [0, 1].
        seed: any 64-bit integer.

    Returns:
        [] loss, float32 (float64 for float64), differentiable in keys: once, and in reverse mode. Keys that are
        not selected get no gradient.

    Raises:
        InputError: an argument is invalid, or has a tangent (forward mode).
        RuntimeError: in a backward pass through its gradient.
    """
    refuse_tangents("key_loss", query, keys)
    check_pair(query, keys, k, groups)
    if not 0.0 <= mask_prob <= 1.0:
        raise InputError(f"mask_prob: expected 0 to 1, got {mask_prob}")
    seed = (operator.index(seed) + 2**63) % 2**64 - 2**63  # the int64 with the same bits
    op = dispatch.operator("key_loss", query.device.type, "wide" if min(k, len(keys)) > MOST_PICKED else "")
    loss: Tensor = op(query, keys, k, groups, mask_prob, seed)[0]
    return loss


# The specification, forward and backward. Every other backend is compared with these functions.


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
    """The loss [] and the selected slots [B, G, min(k, P)], with -1 where the mask left fewer."""
    accumulate = torch.float64 if keys_PD.dtype == torch.float64 else torch.float32
    B, P = query_BD.shape[0], keys_PD.shape[0]
    query_BGd, key_PGd = normalised_groups(query_BD.double(), groups), normalised_groups(keys_PD.double(), groups)
    cosine_BGP = torch.einsum("bgd,pgd->bgp", query_BGd, key_PGd)
    hidden_BGP = hidden_slots(B, groups, P, mask_prob, seed, keys_PD.device)
    ids_BGK = best(cosine_BGP.float().masked_fill(hidden_BGP, -torch.inf), k)
    found_BGK = ~hidden_BGP.gather(2, ids_BGK)
    total = (cosine_BGP.gather(2, ids_BGK) * found_BGK).sum()
    loss = (-total / found_BGK.sum().clamp(min=1)).to(accumulate)
    return loss, ids_BGK.masked_fill(~found_BGK, -1)


@dispatch.without_autocast
def reference_key_loss_backward(grad: Tensor, query_BD: Tensor, keys_PD: Tensor, selected_BGK: Tensor) -> Tensor:
    """Gradient of the keys: d cos / d key = (query^ - cos * key^) / |key|, over the selected (b, g, k) only."""
    accumulate = torch.float64 if keys_PD.dtype == torch.float64 else torch.float32
    groups, P = selected_BGK.shape[1], keys_PD.shape[0]
    query_BGd = normalised_groups(query_BD.to(accumulate), groups)
    key_PGd = normalised_groups(keys_PD.to(accumulate), groups)
    length_PG1 = torch.linalg.vector_norm(
        keys_PD.to(accumulate).unflatten(1, (groups, keys_PD.shape[1] // groups)), dim=-1, keepdim=True
    )
    cosine_BGP = torch.einsum("bgd,pgd->bgp", query_BGd, key_PGd)
    # One column more than there are slots takes the -1s.
    picked_BGP = torch.zeros(*selected_BGK.shape[:2], P + 1, dtype=accumulate, device=keys_PD.device)
    picked_BGP = picked_BGP.scatter_(2, selected_BGK.where(selected_BGK >= 0, P), 1.0)[..., :P]
    towards_PGd = torch.einsum("bgp,bgd->pgd", picked_BGP, query_BGd)
    along_PG1 = (picked_BGP * cosine_BGP).sum(0).T[..., None]
    direction_PGd = torch.where(length_PG1 > EPSILON, (towards_PGd - along_PG1 * key_PGd) / length_PG1, 0.0)
    scale = -grad.to(accumulate) / (selected_BGK >= 0).sum().clamp(min=1)
    grad_keys_PD: Tensor = (scale * direction_PGd).reshape(keys_PD.shape).to(keys_PD.dtype)
    return grad_keys_PD


def fake_key_loss(query: Tensor, keys: Tensor, k: int, groups: int, *_: object) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    selected = query.new_empty((query.shape[0], groups, min(k, keys.shape[0])), dtype=torch.int64)
    return query.new_empty((), dtype=dtype), selected


def fake_key_loss_backward(grad: Tensor, query: Tensor, keys: Tensor, selected: Tensor) -> Tensor:
    return torch.empty_like(keys, memory_format=torch.contiguous_format)


def remember_key_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, keys, *_ = inputs
    ctx.save_for_backward(query, keys, output[1])
    ctx.mark_non_differentiable(output[1])


def key_loss_gradients(ctx: Any, backward: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of each input. `backward` is the backend's operator for it."""
    grad_keys = backward(grad, *ctx.saved_tensors) if ctx.needs_input_grad[1] else None
    return None, grad_keys, None, None, None, None
