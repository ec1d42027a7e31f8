"""Verdicts on the rows: targets met or missed, and the backend order that they suggest for dispatch."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from benchmarks.speed.operators.gpu.compare import OURS, Rows
from slm_fast.ops.adapted_linear import TILE, samples_in

LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # ours against float64, by norm
SPEED_UPS = {"gather bmm compiled": 1.5, "vllm x K": 3.0, "arrow": 20.0}  # their added time, as a multiple of ours


def by_case(rows: Rows) -> dict[str, dict[str, dict[str, Any]]]:
    """Case -> way -> its row: of graphs, or eager if nothing was captured (in a dry run)."""
    how = "graph" if any(row["how"] == "graph" for row in rows) else "eager"
    names = ("pass", "aggregate", "B", "T", "I", "O", "D", "P", "keys", "G", "K", "r", "dtype", "slots")
    found: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        if row["how"] == how:
            found[" ".join(f"{n}={row[n]}" if len(n) == 1 else str(row[n]) for n in names if n in row)][row["way"]] = (
                row
            )
    return found


def verdicts(rows: Rows, operator: str) -> Rows:
    """Each target, the result, and whether it was met; for a target of all cases, the worst case."""
    cases, results = by_case(rows), []

    def judge(target: str, limit: str, got: float, met: bool, where: str) -> None:
        verdict = "met" if met else "MISSED"
        results.append({"target": target, "limit": limit, "got": f"{got:.4g}", "": verdict, "where": where})

    unit = "to_linear" if operator == "multi_lora" else "p50_us"
    worst_to: dict[str, tuple[float, str]] = {}
    for case, ways in cases.items():
        ours = {name: row for name, row in ways.items() if name in OURS}
        limit = next(iter(ways.values()))["target"]
        if not ours:
            judge(f"{operator}: runs", "", float("nan"), False, case)
            continue
        best, row = min(ours.items(), key=lambda pair: float(pair[1]["p50_us"]))
        if limit != "-":
            got = float(row[unit])
            judge(f"{operator}: {unit}", f"<= {limit}", got, got <= float(limit), f"{best}: {case}")
        for other in SPEED_UPS.keys() & ways.keys() if row.get("pass") == "forward" else ():
            added = max(float(row["added_us"]), 1e-3)
            ratio = float(ways[other]["added_us"]) / added
            worst_to[other] = min(worst_to.get(other, (float("inf"), "")), (ratio, f"{best}: {case}"))
    for other, (ratio, where) in worst_to.items():
        least = SPEED_UPS[other]
        judge(f"{operator}: {other}'s added time to ours, worst", f">= {least}", ratio, ratio >= least, where)

    ours_everywhere = [(case, row) for case, ways in cases.items() for row in ways.values() if row["way"] in OURS]
    for dtype, largest in LARGEST_ERROR.items():
        name = str(dtype).removeprefix("torch.")
        errors = [
            (float(r["error"]), f"{r['way']}: {case}") for case, r in ours_everywhere if r.get("dtype", name) == name
        ]
        if errors and (operator == "multi_lora" or dtype == torch.float32):
            error, where = max(errors)
            judge(f"{operator}: error in {name}, worst", f"<= {largest}", error, error <= largest, where)
    other_bits = [f"{row['way']}: {case}" for case, row in ours_everywhere if row["repeats"] != "yes"]
    if ours_everywhere:
        judge(
            f"{operator}: calls that gave other bits", "0", len(other_bits), not other_bits, "; ".join(other_bits[:2])
        )
    return results


def preference(rows: Rows, operator: str, device: str = "cuda") -> list[dict[str, str]]:
    """For each size class, backends ordered by their time over the cases that all of them ran; the reference last."""
    cases = [
        (next(iter(ways.values())), {name: float(row["p50_us"]) for name, row in ways.items() if name in OURS})
        for ways in by_case(rows).values()
    ]
    result = []

    def propose(stem: str, size: str, times: list[dict[str, float]]) -> None:
        names = {name for ways in times for name in ways}
        totals = {name: sum(ways[name] for ways in times if names <= ways.keys()) for name in names}
        order = [name for name in sorted(names, key=lambda name: totals[name]) if name != "layer"]
        if "layer" in names:  # whether to compute the base in the kernel
            order = [name for name in order if totals[name] < totals["layer"]]
        if order or "layer" in names:
            backends = " ".join([*order, "reference"])
            result.append({"device": device, "operator": stem, "size": size, "backends": backends})

    sized: dict[str, list[dict[str, float]]] = defaultdict(list)
    fused: dict[str, list[dict[str, float]]] = defaultdict(list)
    for row, ways in cases:
        if row.get("pass") == "backward":
            continue
        with_base = {name: ways.pop(name) for name in [*ways] if name.endswith(" with base")}
        sized[row["size"]].append(ways)
        for name, time in with_base.items() if ways else ():
            backend = name.removesuffix(" with base")
            if backend == "cuda":
                size = "tiles" if samples_in(TILE, int(row["T"])) == 1 else "packed"
            else:
                size = "wide" if max(int(row["I"]), int(row["O"])) > 2048 else "narrow"
            fused[size].append({backend: time, "layer": min(ways.values())})
    for size, times in sized.items():
        propose(operator, size, times)
    for size, times in fused.items():
        propose("adapted_linear", size, times)
    return result
