"""What a stage costs: seconds, and the largest memory of this process while it ran."""

from __future__ import annotations

import ctypes
import resource
import time
from contextlib import suppress
from pathlib import Path

import torch

RESET, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Clock:
    """Wall and CPU seconds of this process since creation. CPU seconds hardly depend on what else runs."""

    def __init__(self) -> None:
        self.wall, self.processor = time.perf_counter(), time.process_time()

    def spent(self, what: str) -> dict[str, float]:
        wall, processor = time.perf_counter() - self.wall, time.process_time() - self.processor
        return {f"{what}_seconds": round(wall, 2), f"{what}_cpu_seconds": round(processor, 2)}


class Peak:
    """The largest memory of this process, and of each of its stages. MiB.

    A stage's own peak needs Linux, where the kernel's peak can be reset; elsewhere only the process's is known.
    """

    def __init__(self) -> None:
        self._most = 0.0
        self._reset = False

    def start(self) -> None:
        """Start a stage."""
        self._most = self.of_process()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with suppress(AttributeError, OSError, TypeError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)  # memory that earlier stages have freed is not this one's
        try:
            RESET.write_text("5")
            self._reset = True
        except OSError:
            self._reset = False

    def reached(self, what: str) -> dict[str, float]:
        """The stage's peak as <what>_peak_mib, of the GPU as <what>_peak_gpu_mib; without those that are unknown."""
        found: dict[str, float] = {}
        if self._reset:
            lines = STATUS.read_text().splitlines()
            held = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
            found = {f"{what}_peak_mib": round(held[0] / 1024, 1)} if held else {}
        if torch.cuda.is_available():
            found[f"{what}_peak_gpu_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
        return found

    def of_process(self) -> float:
        """The largest memory since the process began, although `start` resets the kernel's own record of it."""
        return max(self._most, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
