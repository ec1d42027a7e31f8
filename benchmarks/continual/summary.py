"""Prints a RUN as a table: one row per method, with mean ± standard deviation over seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.continual.cell import stages_of
from slm_fast import WorkError
from slm_fast.measures import average_accuracy, backward_transfer, final_forgetting

UNDEFINED = "n/a"


def show(run: Path, console: Console) -> None:
    """Print the results of a RUN so far. Raises WorkError if it is damaged."""
    about = json.loads((run / "run.json").read_text())
    tasks = about["stream"]["tasks"]
    title = f"{about['stream']['name']}: results after the last task (mean ± standard deviation over seeds)"
    table = Table(title=title, title_justify="left")
    columns = (
        *("method", "seeds", "average accuracy (%)", "forgetting (points)", "backward transfer (points)"),
        *("routing accuracy (%)", "training time per task (s)", "peak memory (MiB)"),
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right")
    for folder in sorted({path.parent for path in run.glob("*/seed*")}):
        title = title_of(folder)
        seeds = [stages_of(path) for path in sorted(folder.glob("seed*"))]
        whole = [stages for stages in seeds if len(stages) == len(tasks)]
        if not whole:
            done = max(map(len, seeds), default=0)
            table.add_row(title, f"{done} of {len(tasks)} tasks", *[UNDEFINED] * (len(columns) - 2))
            continue
        table.add_row(title, str(len(whole)), *line(whole, tasks))
    console.print(table)


def title_of(folder: Path) -> str:
    """A method's title, or its folder's name if it has none. Raises WorkError if its about.json is damaged."""
    file = folder / "about.json"
    try:
        return str(json.loads(file.read_text())["title"]) if file.exists() else folder.name
    except (ValueError, KeyError, TypeError):
        raise WorkError(f"{file}: damaged; delete it, it only holds the method's title") from None


def line(seeds: Sequence[Sequence[dict[str, Any]]], tasks: Sequence[str]) -> list[str]:
    """The table cells of a method, from the stages of its seeds."""
    matrices = [[{name: own["accuracy"] for name, own in s["tasks"].items()} for s in stages] for stages in seeds]
    last = [stages[-1]["tasks"] for stages in seeds]
    routed = [[own.get("routed") for own in tasks_.values()] for tasks_ in last]
    return [
        spread([100 * average_accuracy(matrix, tasks) for matrix in matrices]),
        spread([_percent(final_forgetting(matrix, tasks)) for matrix in matrices]),
        spread([_percent(backward_transfer(matrix, tasks)) for matrix in matrices]),
        spread([None if None in own else 100 * mean(own) for own in routed]),
        _cost(seeds, mean, "learn_cpu_seconds", "learn_seconds"),
        _cost(seeds, max, "peak_mib"),
    ]


def _cost(seeds: Sequence[Sequence[dict[str, Any]]], over: Callable[[list[float]], float], *names: str) -> str:
    """A cost over all stages, by the first of its names that a stage has."""
    found = [next((stage[name] for name in names if name in stage), None) for stages in seeds for stage in stages]
    known = [value for value in found if value is not None]
    return f"{over(known):.0f}" if known and len(known) == len(found) else UNDEFINED


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def spread(values: Sequence[float | None]) -> str:
    """Mean ± standard deviation; n/a if any value is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return UNDEFINED
    return f"{mean(known):.2f}" + (f" ± {stdev(known):.2f}" if len(known) > 1 else "")
