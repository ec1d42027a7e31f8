"""What a result was measured on, for the head of its CSV."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch


def describe() -> dict[str, str]:
    """The processor, its cores and the versions that matter."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    versions = {package: metadata.version(package) for package in ("torch", "transformers", "peft")}
    return {
        "cpu": f"{cpu}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores",
        "gpu": gpu,
        "python": platform.python_version(),
        **versions,
    }
