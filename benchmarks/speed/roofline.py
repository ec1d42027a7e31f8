"""Measured limits of the processor: the floor for any implementation of the same arithmetic and traffic."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch


def _fastest(call: Callable[[], object], rounds: int = 60) -> float:
    """Seconds of the fastest call: a limit is what the machine can do, not its average."""
    fastest = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


@functools.cache
def gemm_rate(dtype: torch.dtype) -> float:
    """flop/s of a large matrix product: the faster of MKL's and oneDNN's if torch can use both."""
    x, weight = torch.randn(4096, 768, dtype=dtype), torch.randn(768, 768, dtype=dtype)
    candidates: dict[str, Callable[[], object]] = {"linear": lambda: torch.nn.functional.linear(x, weight)}
    if dtype == torch.float32 and torch.backends.mkldnn.is_available():
        onednn = torch.ops.mkldnn._linear_pointwise
        candidates["onednn"] = lambda: onednn(x, weight, None, "none", [], "")
    return 2.0 * 4096 * 768 * 768 / min(_fastest(call) for call in candidates.values())


@functools.cache
def bandwidth(megabytes: int) -> float:
    """bytes/s of reading a buffer of this size repeatedly: a cache's if it fits one, else the memory's."""
    buffer = torch.ones(megabytes << 18)
    return (megabytes << 20) / _fastest(lambda: buffer.sum())


def floor_ms(flops: float, moved: float, dtype: torch.dtype) -> float:
    """The larger of the arithmetic at the measured GEMM rate and the traffic at the measured bandwidth."""
    size = next((m for m in (1, 4, 16, 64) if m << 20 >= moved), 256)
    return 1e3 * max(flops / gemm_rate(dtype), moved / bandwidth(size))
