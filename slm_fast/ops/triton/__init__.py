"""The operators as Triton kernels: imported only where dispatch.py finds that Triton can run.

Nothing here waits for the device and every size follows from the arguments' shapes, so that CUDA graphs and
torch.compile capture a call. What can only be seen by waiting is therefore not checked: an id that is no slot's adds
nothing, where the reference raises an error. Under TRITON_INTERPRET=1 the same kernels run on CPU tensors, and there
ids are checked.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton.language as tl
from torch import Tensor

from slm_fast.ops import dispatch

INTERPRETED = tl.constexpr(dispatch.INTERPRETED)  # so that kernels can ask


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors to fill; few for the interpreter, whose time goes by programs, but enough that work is split."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def by_slot(ids: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Which entries of `ids` name each slot, as compressed rows.

    Returns order [N] int64 and begin [slots + 1] int64: slot p is named by the entries order[begin[p] : begin[p + 1]]
    of ids, in rising order; entries that name none are in no row. This is the fixed order of every sum over a slot.
    """
    ordered, order = ids.flatten().sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(slots + 1, device=ids.device))


def power_of_two(n: int, least: int) -> int:
    return max(least, 1 << (max(n, 1) - 1).bit_length())


def blocks(n: int, block: int) -> int:
    return -(-n // block)
