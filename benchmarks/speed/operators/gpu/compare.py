"""Checks each way against float64 before it is timed, times it, and makes the rows of results."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.operators.command import Ways
from benchmarks.speed.operators.gpu.timing import time_on_gpu
from benchmarks.speed.timing import Times, time_together
from slm_fast import ops

Rows = list[dict[str, Any]]
OURS = ("cuda", "triton", "cuda with base", "triton with base")
ELSEWHERE = ("linear", "peft mixed", "arrow")  # PEFT's mixed batch has no weights, Arrow does its own routing


def backends_of(stem: str, size: str, device: str) -> list[str]:
    """The fast backends that serve this size of an operator on the device."""
    return [b.name for b in ops.backends(device) if b.serves(stem, size) and b.name != "reference"]


def tensors_of(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """By norm; for slot ids, the share that differs."""
    if not expected.is_floating_point():
        return (got != expected).double().mean().item()
    return ((got.double() - expected).norm() / expected.double().norm()).item()


def checked(ways: Ways, expected: tuple[Tensor, ...], largest: float) -> dict[str, dict[str, str]]:
    """For each way that works, its largest error and, for ours, whether every call gives the same bits.

    A way that fails or computes something else is reported and left out.
    """
    found: dict[str, dict[str, str]] = {}
    for name, call in ways.items():
        try:
            results = [tensors_of(call()) for _ in range(4 if name in OURS else 1)]
            errors = [relative_error(*pair) for pair in zip(results[0], expected, strict=False)]
        except Exception as reason:  # from any library
            print(f"# {name} left out: {type(reason).__name__}: {str(reason)[:200]}", flush=True)
            continue
        if name in ELSEWHERE:
            found[name] = {"error": "-", "repeats": "-"}
            continue
        error, repeats = max(errors), "-"
        if name in OURS:
            same = all(torch.equal(a, b) for again in results[1:] for a, b in zip(again, results[0], strict=True))
            repeats = "yes" if same else "NO"
        elif not error <= largest:
            print(f"# {name} left out: relative error {error:.1e}, expected at most {largest}", flush=True)
            continue
        found[name] = {"error": f"{error:.1e}", "repeats": repeats}
    return found


def measure(sets: list[Ways], names: Collection[str], device: str, seconds: float) -> Mapping[str, Mapping[str, Times]]:
    """{"graph" or "eager": {way: its times}} of the ways named, over all sets of inputs."""
    if device == "cpu":
        return {"eager": time_together({name: sets[0][name] for name in names}, seconds=0.0, least=2)}
    per_way = {name: [ways[name] for ways in sets if name in ways] for name in names}
    in_graphs = {name: calls for name, calls in per_way.items() if name != "peft mixed"}  # it waits for the device
    return {
        "graph": time_on_gpu(in_graphs, graph=True, seconds=seconds),
        "eager": time_on_gpu(per_way, graph=False, seconds=seconds),
    }


def lines(
    case: dict[str, Any], timed: Mapping[str, Mapping[str, Times]], low: float, about: dict[str, dict[str, str]]
) -> Rows:
    """The rows of one case: times, and ratios to the linear layer, the best alternative and the floor `low` (ms)."""
    rows = []
    for how, times in timed.items():
        others = [t.p50 for name, t in times.items() if name in ("gather bmm", "gather bmm compiled", "gemm + topk")]
        linear = times["linear"].p50 if "linear" in times else 0.0
        best = min(others, default=0.0) - linear
        for name, t in times.items():
            added = t.p50 - linear
            rows.append(
                case
                | {"way": name, "how": how}
                | {"p20_us": f"{1e3 * t.p20:.2f}", "p50_us": f"{1e3 * t.p50:.2f}", "p80_us": f"{1e3 * t.p80:.2f}"}
                | {"added_us": f"{1e3 * added:.2f}", "to_linear": f"{t.p50 / linear:.3f}" if linear else "-"}
                | {"best_alternative_to_it": f"{best / added:.2f}" if name != "linear" and added > 0 < best else "-"}
                | {"to_floor": f"{added / low:.2f}" if name != "linear" and low else "-"}
                | about[name]
            )
    return rows
