"""Memory: human-readable sizes, free memory of a device, and buffers that cost nothing until they are used."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slm_fast.errors import InputError

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
LARGE = 1 << 20  # bytes
AMPLE = 0.5  # default share of a device's free memory for tasks' values
ALIGNMENT = 64  # bytes; torch allocates at multiples of it


def bytes_of(size: Any, name: str) -> int:
    """Bytes given as a number or a text such as "2GB" or "512 MiB" (powers of 1,024). Raises InputError, naming
    `name`."""
    found = SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if found:
        size = int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise InputError(f"{name}: expected a number of bytes or a size such as '2GB', got {size!r}")
    return size


def ample(device: torch.device) -> int | None:
    """Default number of bytes for tasks' values: half of the device's free memory; None if unknown."""
    if device.type == "cuda":
        return int(AMPLE * torch.cuda.mem_get_info(device)[0])
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(AMPLE * int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, ValueError, KeyError, IndexError):
        return None


@functools.cache  # making it takes as long as copying a task's values
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def return_freed_memory() -> None:
    """Return what this process has freed to the system, where the C library (glibc) would keep it: tensors of changing
    sizes leave it in fragments. Takes tens of milliseconds, in which other threads may wait for memory."""
    with suppress(AttributeError, OSError):
        _libc().malloc_trim(0)


def unmap(data: Tensor) -> None:
    """Let the system take the memory of a mapped file [bytes] whose contents nobody has changed. It is mapped again on
    use, without reading the disk as long as the system caches the file."""
    with suppress(AttributeError, OSError):
        _libc().madvise(ctypes.c_void_p(data.data_ptr()), ctypes.c_size_t(len(data)), mmap.MADV_DONTNEED)


def zeros(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Like torch.zeros, but on a CPU the system allocates each page on first access."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < LARGE or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(shape, device=device, dtype=dtype)
    room = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(room, dtype=dtype).view(shape)


def aligned(tensor: Tensor) -> Tensor:
    """A tensor on the CPU whose memory begins where torch would allocate it: this one, or a copy. A view of a file may
    begin elsewhere, and on some processors the last bits of a product depend on that."""
    if tensor.device.type != "cpu" or tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return tensor.clone()
