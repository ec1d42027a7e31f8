"""CUDA graphs: kernels that Python launches one by one once, and all together from then on.

Captured code must not wait for the device, and reads its inputs from the same addresses at each replay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from slm_fast.loading import masks_not_looked_at

Step = Callable[[], Any]  # returns a tensor or a tuple of tensors


class Graphs:
    """CUDA graphs on one device. They share memory: a replay overwrites the results of all others."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, _stream(device)
        self.memory = torch.cuda.graph_pool_handle()

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Raise an error if code inside the block waits for the device. In a capture this would fail, too, and leave
        torch's allocator in capture mode."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with masks_not_looked_at():
                yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def capture(self, step: Step) -> Step:
        """Capture a step as a graph: the same kernels on the same addresses, launched together."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            # Meanwhile another thread may prepare rows for the GPU, which does not concern this capture.
            graph.capture_begin(pool=self.memory, capture_error_mode="thread_local")
            try:
                result = step()
            finally:
                graph.capture_end()

        def replay() -> Any:
            graph.replay()
            return result

        return replay


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream for captures: always the same one, because libraries keep memory for each stream."""
    return torch.cuda.Stream(device)


def graphs_on(device: torch.device) -> Graphs | None:
    """Graphs for this device; None if it has no CUDA graphs."""
    return Graphs(device) if device.type == "cuda" else None
