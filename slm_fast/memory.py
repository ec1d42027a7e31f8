"""Sizes of memory: as people write them, and what a device has left."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from slm_fast.errors import InputError

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
AMPLE = 0.5  # of what a device has left, that tasks' values may take without being asked


def bytes_of(size: Any, name: str) -> int:
    """A number of bytes, or a text such as "2GB" or "512 MiB" (powers of 1,024). Raises InputError, naming `name`."""
    found = SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if found:
        size = int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise InputError(f"{name}: expected a number of bytes or a size such as '2GB', got {size!r}")
    return size


def ample(device: torch.device) -> int | None:
    """Bytes that tasks' values may take where nobody said: half of what the device has left; None if not known."""
    if device.type == "cuda":
        return int(AMPLE * torch.cuda.mem_get_info(device)[0])
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(AMPLE * int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, ValueError, KeyError, IndexError):
        return None
