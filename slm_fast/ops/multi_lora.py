"""multi_lora: each sample adds its own weighted sum of low-rank increments to a linear layer's output.

Joint Adaptive Re-parameterization (SLM, ICLR 2024, Eq. 3-4), without materialising an [in, out] increment:

    y[b, t] = base[b, t] + sum_k weights[b, k] * (x[b, t] @ lora_a[s].T) @ lora_b[s],   s = slot_ids[b, k]

Shape suffixes: B samples, T tokens, K slots per sample, P slots in total, r rank, I in-features, O out-features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from slm_fast.errors import InputError
from slm_fast.ops import dispatch
from slm_fast.ops.arguments import explained, refuse_tangents


@explained
def multi_lora(
    x: Tensor, lora_a: Tensor, lora_b: Tensor, slot_ids: Tensor, weights: Tensor, base: Tensor | None = None
) -> Tensor:
    """Add each sample's weighted low-rank increments to `base` (Eq. 4), which is not modified.

    Args:
        x: [B, T, I] or [B, I]. With m*B rows for B routes (beams), row i uses route i // m.
        lora_a: [P, r, I], x's dtype.
        lora_b: [P, r, O], x's dtype.
        slot_ids: [B, K] int64 in -1..P-1; -1 adds nothing.
        weights: [B, K] float32 (or float64 with a float64 x).
        base: output of the frozen layer, shaped like the result, x's dtype. None means zeros.

    Under autocast x, lora_a, lora_b and base are first cast to the autocast dtype (float64 is not), like the inputs of
    a linear layer.

    Returns:
        [B, T, O] or [B, O] in x's dtype, accumulated in float32 (float64 for float64). Differentiable in x, lora_a,
        lora_b, weights and base: once, and in reverse mode. Slots that no sample uses have zero gradient.

    Raises:
        InputError: a shape, dtype, device or slot id does not fit, or an argument has a tangent (forward mode). Nothing
            is written.
        WorkError: there is no memory for the result (native backend; from others, torch's own error).
        RuntimeError: in a backward pass through its gradients.
    """
    refuse_tangents("multi_lora", x, lora_a, lora_b, weights, base)
    device = x.device.type
    if device in dispatch.PREFERENCE and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, lora_a, lora_b = x.to(dtype), lora_a.to(dtype), lora_b.to(dtype)
        base = None if base is None else base.to(dtype)
    backend = dispatch.chosen("multi_lora", device, "" if device == "cpu" else size_of(x, lora_a, lora_b, slot_ids))
    op = getattr(torch.ops.slm_fast, f"multi_lora_{backend.name}")
    if backend.checks_arguments and _plain(x, lora_a, lora_b, slot_ids, weights, base):
        try:
            return op(x, lora_a, lora_b, slot_ids, weights, base)  # it checks the rest itself
        except ValueError:
            pass  # reported below, with the message that all backends share
    check(x, lora_a, lora_b, slot_ids, weights, base)
    routes, features_out = slot_ids.shape[0], lora_b.shape[2]
    # Rows that share a route are neighbours, so beams and tokens fold into one axis: [m*B, T, I] -> [B, m*T, I].
    tokens = math.prod(x.shape[:-1]) // max(routes, 1)
    rows = x.reshape(routes, tokens, x.shape[-1])
    rows_base = None if base is None else base.reshape(routes, tokens, features_out)
    try:
        y: Tensor = op(rows, lora_a, lora_b, slot_ids, weights, rows_base)
    except ValueError as error:  # checked only by the backend, such as an id out of range
        raise InputError(str(error)) from None
    return y.view(*x.shape[:-1], features_out)


def multi_lora_(x: Tensor, lora_a: Tensor, lora_b: Tensor, slot_ids: Tensor, weights: Tensor, base: Tensor) -> Tensor:
    """`multi_lora` for a `base` that is no longer needed: it may be overwritten with the result, which is returned.

    It is overwritten if the backend can do so and gradients, autocast and torch.compile (which finds such cases itself)
    are off. A `base` that shares memory with another argument is left as it is.
    """
    refuse_tangents("multi_lora", x, lora_a, lora_b, weights, base)
    if torch.compiler.is_compiling():
        return multi_lora(x, lora_a, lora_b, slot_ids, weights, base)
    device = x.device.type
    backend = dispatch.chosen("multi_lora", device, "" if device == "cpu" else size_of(x, lora_a, lora_b, slot_ids))
    if (
        backend.in_place
        and not torch.is_autocast_enabled(device)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, lora_a, lora_b, weights, base)))
        and _plain(x, lora_a, lora_b, slot_ids, weights, base)
    ):
        try:
            getattr(torch.ops.slm_fast, f"multi_lora_{backend.name}_")(x, lora_a, lora_b, slot_ids, weights, base)
        except ValueError:
            pass  # nothing was written: shared memory, or an error that multi_lora reports
        else:
            return base
    return multi_lora(x, lora_a, lora_b, slot_ids, weights, base)


def size_of(x: Tensor, lora_a: Tensor, lora_b: Tensor, slot_ids: Tensor) -> str:
    """Size class for dispatch: "decode" is one row per route, "tokens" many rows of a 16-bit dtype, both within the
    limits of the CUDA kernels and in multiples of 16 bytes."""
    features_in, features_out = x.shape[-1:].numel(), lora_b.shape[-1:].numel()
    rank, rows = lora_a.shape[1:2].numel() * slot_ids.shape[-1:].numel(), x.numel()
    if features_in % 8 or features_out % 8 or rank == 0 or rows == 0 or x.dtype == torch.float64:
        return "other"
    if rank <= 256 and len(x) <= 65535 and rows == slot_ids.shape[:1].numel() * features_in:
        return "decode"
    return "tokens" if rank <= 64 and x.dtype.itemsize == 2 else "other"


def _plain(x: Tensor, lora_a: Tensor, lora_b: Tensor, slot_ids: Tensor, weights: Tensor, base: Tensor | None) -> bool:
    """Whether x is [B, T, I] with a route per row, all on one device, as operators that check their arguments
    require."""
    device = x.device
    return (
        len(x.shape) == 3
        and slot_ids.shape[0] == x.shape[0]
        and lora_a.device == lora_b.device == slot_ids.device == weights.device == device
        and (base is None or base.device == device)
    )


def check(x: Tensor, lora_a: Tensor, lora_b: Tensor, slot_ids: Tensor, weights: Tensor, base: Tensor | None) -> None:
    """Raise InputError unless the arguments fit `multi_lora`. Slot ids are left to the backend."""
    if not x.is_floating_point() or x.dim() not in (2, 3):
        raise InputError(f"x: expected floating [B, T, I] or [B, I], got {x.dtype} {list(x.shape)}")
    features_in = x.shape[-1]
    if lora_a.dim() != 3 or lora_a.shape[2] != features_in:
        raise InputError(f"lora_a: expected [P, r, {features_in}] to match x, got {list(lora_a.shape)}")
    if lora_b.dim() != 3 or lora_b.shape[:2] != lora_a.shape[:2]:
        slots, rank, _ = lora_a.shape
        raise InputError(f"lora_b: expected [{slots}, {rank}, O] to match lora_a, got {list(lora_b.shape)}")
    if slot_ids.dim() != 2 or slot_ids.dtype != torch.int64:
        raise InputError(f"slot_ids: expected int64 [B, K], got {slot_ids.dtype} {list(slot_ids.shape)}")
    routes, rows = slot_ids.shape[0], x.shape[0]
    if (rows != 0) if routes == 0 else (rows % routes != 0):
        raise InputError(f"slot_ids: {routes} routes do not divide the {rows} rows of x")
    weight_dtypes = (torch.float32, torch.float64) if x.dtype == torch.float64 else (torch.float32,)
    if weights.shape != slot_ids.shape or weights.dtype not in weight_dtypes:
        raise InputError(
            f"weights: expected float32 {list(slot_ids.shape)} to match slot_ids, got {weights.dtype} "
            f"{list(weights.shape)}"
        )
    if base is not None and base.shape != (*x.shape[:-1], lora_b.shape[2]):
        raise InputError(f"base: expected {[*x.shape[:-1], lora_b.shape[2]]}, got {list(base.shape)}")
    for name, tensor in (("lora_a", lora_a), ("lora_b", lora_b), ("base", base)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise InputError(f"{name}: expected {x.dtype} to match x, got {tensor.dtype}")
    for name, tensor in (
        ("lora_a", lora_a),
        ("lora_b", lora_b),
        ("slot_ids", slot_ids),
        ("weights", weights),
        ("base", base),
    ):
        if tensor is not None and tensor.device != x.device:
            raise InputError(f"{name}: expected device {x.device} to match x, got {tensor.device}")


# The specification. Every other backend is compared with these two functions, forward and backward.


def _gather(lora: Tensor, slot_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The K slots of each sample, with zeros for id -1: [P, r, F], [B, K] -> [B, K, r, F]."""
    slots = lora.shape[0]
    if slot_ids.numel() and (int(slot_ids.min()) < -1 or int(slot_ids.max()) >= slots):
        raise InputError(f"slot_ids: expected -1..{slots - 1}, got {int(slot_ids.min())}..{int(slot_ids.max())}")
    padded = torch.cat([lora.to(dtype), lora.new_zeros(1, *lora.shape[1:], dtype=dtype)])  # the last one is slot -1
    return padded[slot_ids]


@dispatch.without_autocast
def reference_multi_lora(
    x_BTI: Tensor,
    lora_a_PrI: Tensor,
    lora_b_PrO: Tensor,
    slot_ids_BK: Tensor,
    weights_BK: Tensor,
    base_BTO: Tensor | None,
) -> Tensor:
    accumulate = torch.float64 if x_BTI.dtype == torch.float64 else torch.float32
    a_BKrI = _gather(lora_a_PrI, slot_ids_BK, accumulate)
    b_BKrO = _gather(lora_b_PrO, slot_ids_BK, accumulate)
    shrunk_BTKr = torch.einsum("bti,bkri->btkr", x_BTI.to(accumulate), a_BKrI)
    scaled_BTKr = shrunk_BTKr * weights_BK[:, None, :, None].to(accumulate)
    scaled_BTKr = scaled_BTKr.masked_fill((slot_ids_BK < 0)[:, None, :, None], 0.0)  # also where x or a weight is inf
    y_BTO = torch.einsum("btkr,bkro->bto", scaled_BTKr, b_BKrO)
    if base_BTO is not None:
        y_BTO = y_BTO + base_BTO.to(accumulate)
    return y_BTO.to(x_BTI.dtype).contiguous()


@dispatch.without_autocast
def reference_multi_lora_backward(
    grad_BTO: Tensor,
    x_BTI: Tensor,
    lora_a_PrI: Tensor,
    lora_b_PrO: Tensor,
    slot_ids_BK: Tensor,
    weights_BK: Tensor,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, lora_a, lora_b and weights, with an empty tensor for those not `needed`."""
    accumulate = torch.float64 if x_BTI.dtype == torch.float64 else torch.float32
    a_BKrI = _gather(lora_a_PrI, slot_ids_BK, accumulate)
    b_BKrO = _gather(lora_b_PrO, slot_ids_BK, accumulate)
    g_BTO, x = grad_BTO.to(accumulate), x_BTI.to(accumulate)
    none_B1K1 = (slot_ids_BK < 0)[:, None, :, None]
    w_B1K1 = weights_BK[:, None, :, None].to(accumulate).masked_fill(none_B1K1, 0.0)
    shrunk_BTKr = torch.einsum("bti,bkri->btkr", x, a_BKrI).masked_fill(none_B1K1, 0.0)
    grad_scaled_BTKr = torch.einsum("bto,bkro->btkr", g_BTO, b_BKrO).masked_fill(none_B1K1, 0.0)
    grad_shrunk_BTKr = grad_scaled_BTKr * w_B1K1
    grad_x, grad_a, grad_b, grad_weights = (x_BTI.new_empty(0) for _ in range(4))
    if needed[0]:
        grad_x = torch.einsum("btkr,bkri->bti", grad_shrunk_BTKr, a_BKrI).to(x_BTI.dtype).contiguous()
    if needed[1]:
        grad_a = _sum_by_slot(torch.einsum("btkr,bti->bkri", grad_shrunk_BTKr, x), slot_ids_BK, lora_a_PrI)
    if needed[2]:
        grad_b = _sum_by_slot(torch.einsum("btkr,bto->bkro", shrunk_BTKr * w_B1K1, g_BTO), slot_ids_BK, lora_b_PrO)
    if needed[3]:
        grad_weights = (grad_scaled_BTKr * shrunk_BTKr).sum((1, 3)).to(weights_BK.dtype)
    return grad_x, grad_a, grad_b, grad_weights


def _sum_by_slot(grad_BKrF: Tensor, slot_ids_BK: Tensor, like_PrF: Tensor) -> Tensor:
    """Sum the samples' gradients by slot. As a product with a 0/1 matrix, because index_add_ uses atomics on a GPU."""
    used_U = torch.unique(slot_ids_BK)
    member = (slot_ids_BK.reshape(-1, 1) == used_U).to(grad_BKrF.dtype)  # [B*K, U]
    summed_UrF = (member.T @ grad_BKrF.flatten(0, 1).flatten(1)).view(len(used_U), *like_PrF.shape[1:])
    grad_PrF = torch.zeros_like(like_PrF)
    grad_PrF[used_U[used_U >= 0]] = summed_UrF[used_U >= 0].to(like_PrF.dtype)
    return grad_PrF


def fake_multi_lora(
    x: Tensor, lora_a: Tensor, lora_b: Tensor, slot_ids: Tensor, weights: Tensor, base: Tensor | None
) -> Tensor:
    return x.new_empty(*x.shape[:2], lora_b.shape[2])


def fake_multi_lora_(
    x: Tensor, lora_a: Tensor, lora_b: Tensor, slot_ids: Tensor, weights: Tensor, base: Tensor
) -> None:
    pass


def fake_multi_lora_backward(
    grad: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, slot_ids: Tensor, weights: Tensor, needed: list[bool]
) -> tuple[Tensor, ...]:
    shaped = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, lora_a, lora_b, weights))
    return tuple(t if wanted else x.new_empty(0) for t, wanted in zip(shaped, needed, strict=True))


def remember_multi_lora(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, lora_a, lora_b, slot_ids, weights, _ = inputs
    ctx.save_for_backward(x, lora_a, lora_b, slot_ids, weights)


def multi_lora_gradients(ctx: Any, backward: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of each input. `backward` is the backend's operator for it."""
    needed = ctx.needs_input_grad
    wanted = [needed[0], needed[1], needed[2], needed[4]]
    grads: tuple[Tensor | None, ...] = (None,) * 4
    if any(wanted):
        computed = backward(grad.contiguous(), *ctx.saved_tensors, wanted)
        grads = tuple(g if want else None for g, want in zip(computed, wanted, strict=True))
    return grads[0], grads[1], grads[2], None, grads[3], grad if needed[5] else None
