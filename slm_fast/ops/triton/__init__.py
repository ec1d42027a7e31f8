"""The operators as Triton kernels: imported only if dispatch.py finds that Triton can run.

Nothing here waits for the device, and all sizes follow from the arguments' shapes, so that CUDA graphs and
torch.compile can capture a call. Checks that would have to wait are therefore omitted: an invalid slot id adds nothing,
where the reference raises an error. Under TRITON_INTERPRET=1 the same kernels run on CPU tensors, and ids are checked.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton.language as tl
from torch import Tensor

from slm_fast.ops import dispatch

INTERPRETED = tl.constexpr(dispatch.INTERPRETED)  # for use inside kernels


def on(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` current, since Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def processors(device: torch.device) -> int:
    """Number of multiprocessors to fill. The interpreter's time grows with programs, but 2 still split the work."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def by_slot(ids: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Group the entries of `ids` by slot, as compressed rows.

    Returns:
        order [N] int64 and begin [slots + 1] int64: order[begin[p] : begin[p + 1]] are the indices, ascending, of
        slot p's entries in `ids`. Entries without a slot are in no row. All sums over a slot use this fixed order.
    """
    ordered, order = ids.flatten().sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(slots + 1, device=ids.device))


def power_of_two(n: int, least: int) -> int:
    return max(least, 1 << (max(n, 1) - 1).bit_length())


def blocks(n: int, block: int) -> int:
    return -(-n // block)
