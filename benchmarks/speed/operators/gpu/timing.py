"""Timing on a GPU: CUDA graphs over inputs that exceed its cache, eager calls, and the card's measured limits."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from benchmarks.speed.timing import Times, percentiles

Calls = Sequence[Callable[[], object]]  # one per set of inputs


def sets_of_inputs(moved: float, most: int = 160) -> int:
    """How many sets of inputs of `moved` bytes to cycle through, so that none is in the cache when its turn comes."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return int(min(most, max(1, -(-2 * cache // max(1, int(moved))))))


def capture(calls: Calls) -> Callable[[], object] | None:
    """A replay of all calls as one CUDA graph, captured on the current stream, which must not be the default one.

    None if the calls cannot be captured, for example because they synchronise with the device.
    """
    try:
        torch.cuda.set_sync_debug_mode("error")  # a failed capture would leave torch's allocator capturing
        try:
            for call in calls:
                call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            kept = [call() for call in calls]
    except (RuntimeError, ValueError) as error:
        torch.cuda.synchronize()
        print(f"# not captured: {str(error)[:100]!r}")
        return None

    def replay(_kept: object = kept) -> None:
        graph.replay()

    return replay


def _call_all(calls: Calls) -> None:
    for call in calls:
        call()


def time_on_gpu(candidates: Mapping[str, Calls], *, graph: bool, seconds: float, most: int = 200) -> dict[str, Times]:
    """Milliseconds per call, by events, candidates in turns; with `graph`, those that cannot be captured are left
    out."""
    runs: dict[str, Callable[[], object]] = {}
    for name, calls in candidates.items():
        if not graph:
            runs[name] = functools.partial(_call_all, calls)
        elif replay := capture(calls):
            runs[name] = replay
    for run in runs.values():
        run()
    torch.cuda.synchronize()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    began = time.perf_counter()
    while time.perf_counter() - began < seconds * len(runs) and len(next(iter(events.values()), [0] * most)) < most:
        for name, run in runs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            events[name].append((start, end))
        torch.cuda.synchronize()
    return {
        name: percentiles([start.elapsed_time(end) / len(candidates[name]) for start, end in pairs])
        for name, pairs in events.items()
    }


def _milliseconds(call: Callable[[], object], rounds: int = 20) -> float:
    return time_on_gpu({"": [call] * 4}, graph=True, seconds=0.2, most=rounds)[""].p20


@functools.cache
def gemm_rate(dtype: torch.dtype) -> float:
    """flop/s of a large matrix product of random numbers (zeros run faster)."""
    x, y = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
    return 2e3 * 8192**3 / _milliseconds(lambda: x @ y)


@functools.cache
def bandwidth() -> float:
    """bytes/s of a large copy, counting reads and writes."""
    x, y = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2e3 * (1 << 30) / _milliseconds(lambda: y.copy_(x))


def floor_ms(flops: float, moved: float, dtype: torch.dtype) -> float:
    """The larger of the arithmetic at the measured matrix rate and the traffic at the measured bandwidth."""
    return 1e3 * max(flops / gemm_rate(dtype), moved / bandwidth())
