"""invariant_linear: a float64 linear layer whose results for a row do not depend on the other rows of the batch.

    y[m, n] = sum_d x[m, d] * weight[n, d]

A BLAS picks its order of summation by the shape of the whole batch, so a row's last bits depend on what it is computed
with (He et al. 2025, "Defeating Nondeterminism in LLM Inference", call a kernel without this batch-invariant). Routing
keys must not: the keys of a task are the same bits whatever other tasks are computed with it, or later.

Shape suffixes: M rows, D in-features, N out-features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slm_fast.errors import InputError
from slm_fast.ops import dispatch


def invariant_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`, each row with the bits that it has alone.

    These bits may differ between backends and kinds of processors.

    Args:
        x: [M, D] float64.
        weight: [N, D] float64.

    Returns:
        [M, N] float64. Forward only: it has no gradient.

    Raises:
        InputError: a shape, dtype or device does not fit.
    """
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dim() != 2 or tensor.dtype != torch.float64:
            raise InputError(f"{name}: expected torch.float64 [rows, D], got {tensor.dtype} {list(tensor.shape)}")
    if x.shape[1] != weight.shape[1] or x.device != weight.device:
        raise InputError(
            f"weight: expected [N, {x.shape[1]}] on {x.device} to match x, got {list(weight.shape)} on {weight.device}"
        )
    y: Tensor = dispatch.operator("invariant_linear", x.device.type)(x, weight)
    return y


# The specification. Every other backend is compared with it, up to rounding.


@dispatch.without_autocast
def reference_invariant_linear(x_MD: Tensor, weight_ND: Tensor) -> Tensor:
    y_MN, weight_ND = x_MD.new_empty(len(x_MD), len(weight_ND)), weight_ND.contiguous()
    for x_D, y_N in zip(x_MD, y_MN, strict=True):
        y_N.copy_(weight_ND @ x_D.clone())  # on some processors MKL's bits depend on where a row begins in memory
    return y_MN


def fake_invariant_linear(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
