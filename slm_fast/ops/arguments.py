"""What all operators say of arguments that they cannot take."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from slm_fast.errors import InputError

NO_TANGENTS = "it has no forward-mode derivative; use reverse mode (backward, torch.autograd.grad)"


def forward_mode() -> bool:
    """Whether forward-mode differentiation (torch.func.jvp, torch.autograd.forward_ad) is under way."""
    return forward_ad._current_level >= 0


def refuse_tangents(stem: str, *tensors: Tensor | None) -> None:
    """Raise InputError if one of the tensors has a tangent in forward mode, or may have one of an outer torch.func
    transform: an operator would drop it, as if its derivative were zero."""
    if not forward_mode():
        return
    for tensor in tensors:
        if tensor is not None and (
            torch._C._functorch.is_functorch_wrapped_tensor(tensor)
            or forward_ad.unpack_dual(tensor).tangent is not None
        ):
            raise InputError(f"{stem}: {NO_TANGENTS}")
