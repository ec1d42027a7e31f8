"""The table of zero-shot benchmarks, from a run's `zeroshot.csv` (written by `benchmarks/continual/zeroshot.py`)."""

from __future__ import annotations

import csv
from statistics import mean

from slm_fast.errors import WorkError
from slm_fast.report.figures import Column, Section, Table, Value
from slm_fast.report.results import spread
from slm_fast.report.runs import Run

BARE = "bare"
TITLES = {"arc_easy": "ARC easy", "arc_challenge": "ARC challenge", "piqa": "PIQA", "winogrande": "WinoGrande"}
NOTE = (
    "Accuracy of the bare backbone and of the final models on benchmarks that are none of the learned tasks. With "
    "abstain, the bare backbone answers rows that are farther from their task than this share of its training rows."
)


def zeroshot(run: Run, stem: str) -> list[Section]:
    """No section if the benchmarks were not run. Raises WorkError for a damaged file."""
    path = run.path / "zeroshot.csv"
    scores: dict[str, dict[str, list[float]]] = {}  # by way to answer, then benchmark: one per seed
    routed: dict[str, list[float]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader((line for line in file if not line.startswith("#")), strict=True):
                shares = [float(row[name]) for name in ("value", "routed") if row[name]]
                if not shares or not all(0 <= share <= 1 for share in shares):
                    raise ValueError(f"expected shares, got {shares}")
                if row["metric"] == "acc":
                    scores.setdefault(row["method"], {}).setdefault(row["set"], []).append(shares[0])
                    routed.setdefault(row["method"], []).extend(shares[1:])
    except FileNotFoundError:
        return []
    except (OSError, csv.Error, KeyError, TypeError, ValueError) as error:
        raise WorkError(f"{path}: damaged: {type(error).__name__}: {error}") from None
    titles = {method.name.replace(",", ":", 1): method.title for method in run.methods}
    sets = list(dict.fromkeys(name for own in scores.values() for name in own))
    rows: list[list[Value]] = []
    for way, own in scores.items():
        spec, _, share = way.partition(", abstain ")
        title = "bare backbone" if way == BARE else titles.get(spec, spec) + (f", abstain {share}" if share else "")
        values = [spread(own[name]) if name in own else None for name in sets]
        rows.append([title, *values, mean(routed[way]) if routed[way] else None])
    columns = [
        Column("model"),
        *(Column(f"{TITLES.get(name, name)}, %", "percent") for name in sets),
        Column("answered with a task, %", "percent", "mean over the benchmarks"),
    ]
    return [Section("Zero-shot benchmarks", [Table(f"{stem}zeroshot", "Accuracy", columns, rows, note=NOTE)])]
