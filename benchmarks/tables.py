"""Tables of results: CSV files that record what they were measured on, and text for a terminal."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe

RESULTS = Path(__file__).parent / "results"


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]], notes: Mapping[str, str] | None = None) -> None:
    """Write rows under a head that records the machine, the date and `notes` ({name: value})."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        measured = {"threads": str(torch.get_num_threads()), "date": time.strftime("%Y-%m-%d")}
        for name, value in (describe() | measured | dict(notes or {})).items():
            file.write(f"# {name}: {value}\n")
        names = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(file, fieldnames=list(names), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def not_in(
    found: Iterable[Mapping[str, Any]], path: Path, key: Callable[[Mapping[str, Any]], object]
) -> list[dict[str, Any]]:
    """The rows of a CSV file that a new run has not measured again: none of the rows it `found` has the same key. Empty
    if there is no such file."""
    new = {key(row) for row in found}
    return [row for row in read_csv(path) if key(row) not in new] if path.exists() else []


def read_head(path: Path) -> dict[str, str]:
    """The entries of the CSV's head: {name: value}."""
    with path.open() as file:
        lines = [line[2:].rstrip("\n").split(": ", 1) for line in file if line.startswith("# ")]
    return dict(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a text table."""
    names = list(rows[0])
    cells = [names, *([str(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
