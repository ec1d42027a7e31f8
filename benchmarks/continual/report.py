"""What came of a stream, for a terminal and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.continual.methods import METHODS
from benchmarks.figures import pyplot
from slm_fast.tables import accuracy_matrix


def show(records: list[dict[str, Any]], console: Console) -> None:
    """Each method's accuracy matrix, and a line each of averages."""
    summary = Table(title="After the last task", title_justify="left")
    for column in ("method", "average %", "forgetting", "routing %", "seconds a task", "peak MiB"):
        summary.add_column(column, justify="left" if column == "method" else "right")
    for method in dict.fromkeys(record["method"] for record in records):
        own = [record for record in records if record["method"] == method]
        after = list(dict.fromkeys(record["after"] for record in own))
        history = [{r["task"]: float(r["accuracy"]) for r in own if r["after"] == name} for name in after]
        console.print(accuracy_matrix(history, METHODS[method].title))
        last = [record for record in own if record["after"] == after[-1]]
        routing = [float(record["routing"]) for record in last if record["routing"] != ""]
        seconds = {record["after"]: float(record["seconds"]) for record in own}
        summary.add_row(
            METHODS[method].title,
            f"{100 * sum(history[-1].values()) / len(history[-1]):.2f}",
            f"{100 * float(last[0]['forgetting']):.2f}",
            f"{100 * sum(routing) / len(routing):.2f}" if routing else "",
            f"{sum(seconds.values()) / len(seconds):.0f}",
            f"{max(float(record['peak_mib']) for record in own):.0f}",
        )
    console.print(summary)


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """What is left of the first task, and the average over all tasks seen, as more are learned."""
    after = list(dict.fromkeys(record["after"] for record in records))
    figure, panels = pyplot().subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for method in dict.fromkeys(record["method"] for record in records):
        rows = [[r for r in records if r["method"] == method and r["after"] == name] for name in after]
        first = [next(100 * float(r["accuracy"]) for r in row if r["task"] == after[0]) for row in rows]
        average = [100 * sum(float(r["accuracy"]) for r in row) / len(row) for row in rows]
        for panel, values in zip(panels, (first, average), strict=True):
            panel.plot(after, values, marker="o", label=METHODS[method].title)
    panels[0].set_title(f"accuracy on {after[0]}, the first task", fontsize=10)
    panels[1].set_title("average over the tasks seen so far", fontsize=10)
    panels[0].set_ylabel("%")
    panels[0].set_ylim(bottom=0)
    for panel in panels:
        panel.set_xlabel("after learning")
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=140)
