"""adapted_linear: a frozen linear layer plus each sample's increments, in one kernel if a backend has one.

    y[b, t] = x[b, t] @ weight.T + bias + sum_k weights[b, k] * (x[b, t] @ lora_a[s].T) @ lora_b[s]

with s = slot_ids[b, k], as in multi_lora.

Shape suffixes: B samples, T tokens, K slots per sample, P slots in total, r rank, I in-features, O out-features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slm_fast.errors import InputError
from slm_fast.ops import dispatch
from slm_fast.ops.arguments import refuse_tangents
from slm_fast.ops.multi_lora import check, reference_multi_lora


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, slot_ids: Tensor, weights: Tensor
) -> Tensor:
    """`multi_lora` on top of `linear(x, weight, bias)`, without rounding in between.

    Args:
        x: [B, T, I].
        weight: [O, I], x's dtype.
        bias: [O], x's dtype, or None.
        lora_a, lora_b, slot_ids, weights: as for `multi_lora`, with one route per row of x.

    Returns:
        [B, T, O] in x's dtype, accumulated in float32 (float64 for float64). Forward only: it has no gradient.

    Raises:
        InputError: a shape, dtype, device or slot id does not fit, or an argument has a tangent (forward mode).
    """
    refuse_tangents("adapted_linear", x, weight, bias, lora_a, lora_b, weights)
    check(x, lora_a, lora_b, slot_ids, weights, None)
    if x.dim() != 3 or len(x) != len(slot_ids):
        raise InputError(f"x: expected [{len(slot_ids)}, T, I] to match slot_ids, got {list(x.shape)}")
    features_out = lora_b.shape[2]
    for name, tensor, shape in (("weight", weight, [features_out, x.shape[2]]), ("bias", bias, [features_out])):
        if tensor is None:
            continue
        if list(tensor.shape) != shape or tensor.dtype != x.dtype or tensor.device != x.device:
            raise InputError(
                f"{name}: expected {x.dtype} {shape} on {x.device} to match x and lora_b, got {tensor.dtype} "
                f"{list(tensor.shape)} on {tensor.device}"
            )
    op = dispatch.operator("adapted_linear", x.device.type, size_of(x, weight, lora_a, slot_ids))
    try:
        y: Tensor = op(x, weight, bias, lora_a, lora_b, slot_ids, weights)
    except ValueError as error:  # checked only by the backend, such as an id out of range
        raise InputError(str(error)) from None
    return y


# Limits of the CUDA kernel, as in csrc/cuda/launch.h: tokens of a tile; of its samples, slots and their rows of rank.
TILE, TILE_PICKS, TILE_COLUMNS = 128, 32, 96
# Of the CPU kernel: rows and output features of a block; the most rows of rank of its samples for which it was measured
# to be faster; and for all blocks the fewest rows, and the most numbers of a weight.
BLOCK, BLOCK_COLUMNS, FEWEST_ROWS, LARGEST_WEIGHT = 32, 64, 512, 3 << 20


def size_of(x: Tensor, weight: Tensor, lora_a: Tensor, slot_ids: Tensor) -> str:
    """Size class for dispatch: "tiles" or "packed" if the CUDA kernel can run and a tile of it has one sample or more,
    "blocks" if the CPU kernel can and is faster, else "narrow" or "wide" layers, or "other" if no kernel can keep all
    K r columns."""
    columns = slot_ids.shape[1] * lora_a.shape[1]
    blocks = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.compiler.is_compiling()
    if blocks and fits_blocks(x, weight, columns) and dispatch.has_amx():
        return "blocks"
    tiles = x.dtype == torch.bfloat16 and x.device.type == "cuda" and x.dim() == 3
    if tiles and not torch.compiler.is_compiling() and dispatch.multiplies_tiles(x.device.index):
        samples, tokens, _ = x.shape
        sizes = samples * tokens, *weight.shape, len(lora_a)
        fits = weight.shape[0] % 8 == weight.shape[1] % 8 == 0 and min(sizes) > 0 and max(sizes) <= 1 << 30
        spans = samples_in(TILE, tokens) if fits else 0
        if 0 < spans * columns <= TILE_COLUMNS and spans * slot_ids.shape[1] <= TILE_PICKS:
            return "tiles" if spans == 1 else "packed"
    if x.dtype == torch.float64 or not 0 < columns <= 256 // x.dtype.itemsize:
        return "other"
    return "narrow" if max(weight.shape) <= 2048 else "wide"


def fits_blocks(x: Tensor, weight: Tensor, columns: int) -> bool:
    """Whether the CPU kernel can run, and is expected to be faster than a linear layer and its increments: the rows are
    worth rearranging the weight for, their blocks are of few samples, and the weight fits the caches. columns: K r."""
    features_out, features_in = weight.shape
    if features_in % BLOCK or features_out % BLOCK or not 0 < features_in * features_out <= LARGEST_WEIGHT:
        return False
    tokens = x.shape[1] if x.dim() == 3 else 0
    if tokens == 0 or len(x) * tokens < FEWEST_ROWS:
        return False
    return 0 < samples_in(BLOCK, tokens) * columns <= BLOCK_COLUMNS


def samples_in(rows: int, tokens: int) -> int:
    """How many samples successive rows can be of, if each has `tokens`."""
    if tokens % rows == 0:
        return 1
    return rows // tokens if rows % tokens == 0 else (rows - 2) // tokens + 2


# The specification. Every other backend is compared with it.


@dispatch.without_autocast
def reference_adapted_linear(
    x_BTI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    lora_a_PrI: Tensor,
    lora_b_PrO: Tensor,
    slot_ids_BK: Tensor,
    weights_BK: Tensor,
) -> Tensor:
    accumulate = torch.float64 if x_BTI.dtype == torch.float64 else torch.float32
    base_BTO = x_BTI.to(accumulate) @ weight_OI.T.to(accumulate)
    if bias_O is not None:
        base_BTO = base_BTO + bias_O.to(accumulate)
    return reference_multi_lora(x_BTI, lora_a_PrI, lora_b_PrO, slot_ids_BK, weights_BK, base_BTO)


def fake_adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, slot_ids: Tensor, weights: Tensor
) -> Tensor:
    return x.new_empty(*x.shape[:2], lora_b.shape[2])
