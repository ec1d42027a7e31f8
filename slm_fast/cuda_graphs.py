"""CUDA graphs: kernels that Python launched once, one after the other, and that are launched together from then on.

What is captured must not wait for the device, and finds its inputs where they were when it was captured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from slm_fast.loading import masks_not_looked_at

Step = Callable[[], Any]  # gives a tensor, or a tuple of them


class Graphs:
    """CUDA graphs on one device, which share their memory: a replay overwrites what any other returned."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, _stream(device)
        self.memory = torch.cuda.graph_pool_handle()

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Whatever waits for the device inside the block is an error: it would be one in a capture too, and there leave
        torch's allocator capturing."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with masks_not_looked_at():
                yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def capture(self, step: Step) -> Step:
        """A step as a graph: the same kernels on the same addresses, launched at once."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            # Another thread may meanwhile make rows ready for the GPU, which is no business of this capture.
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
    """What steps are captured on: always the same, because libraries keep memory for each stream."""
    return torch.cuda.Stream(device)


def graphs_on(device: torch.device) -> Graphs | None:
    """Where steps are captured on this device; None where they are not."""
    return Graphs(device) if device.type == "cuda" else None
