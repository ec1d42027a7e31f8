"""Description of the machine, for the head of a result's CSV."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch


def peak_mib(call: Callable[[], object]) -> tuple[float, float]:
    """(before, peak) MiB that this process holds before a call and at most during it, of the GPU if there is one.

    NaN if unknown. getrusage is not used, because it would include earlier peaks and the peak of the parent process.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        first = torch.cuda.memory_allocated()
        call()
        return first / 2**20, torch.cuda.max_memory_allocated() / 2**20
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return float("nan"), float("nan")

    def held(name: str) -> float:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name)) / 1024

    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")
    before = held("VmRSS:")
    call()
    return before, held("VmHWM:")


def describe() -> dict[str, str]:
    """The processor, its cores and the relevant versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        # With family and model: the name that a virtual machine reports may stand for several processor generations.
        about = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", info.read_text(), re.MULTILINE))
        if "cpu family" in about:
            cpu = f"{about['model name']} (family {about['cpu family']}, model {about['model']})"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    versions = {}
    for package in ("torch", "transformers", "peft", "triton", "faiss-cpu", "vllm"):
        if find_spec(package.partition("-")[0]):
            with suppress(metadata.PackageNotFoundError):  # installed under another name
                versions[package] = metadata.version(package)
    return {
        "cpu": f"{cpu}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores",
        "gpu": gpu,
        "python": platform.python_version(),
        **versions,
    }
