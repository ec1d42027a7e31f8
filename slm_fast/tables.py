"""Tables for the terminal: accuracies, answers and tasks."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from slm_fast.errors import some_of
from slm_fast.measures import forgetting

if TYPE_CHECKING:
    from slm_fast.evaluate import Evaluation
    from slm_fast.predict import Prediction
    from slm_fast.tasks import LearnedTask

LISTED = 20  # maximum labels listed per task


def console() -> Console:
    """A console on standard output. If that is not a terminal, the width is unlimited, so that names are not cut."""
    return Console() if sys.stdout.isatty() else Console(width=1_000_000)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def accuracy_matrix(history: Sequence[Mapping[str, float]], title: str) -> Table:
    """The accuracy matrix R (%), with average accuracy and forgetting. history: accuracy by task, in learning order.

    Columns are numbered instead of named, so that the table fits a narrow terminal.
    """
    names = list(history[-1])
    table = Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        caption="accuracy (%) on tasks 1, 2, ...; avg.: average accuracy; F: forgetting (points)",
        caption_justify="left",
    )
    table.add_column("after learning", no_wrap=True)
    for number in range(1, len(names) + 1):
        table.add_column(str(number), justify="right")
    table.add_column("avg.", justify="right", style="bold")
    table.add_column("F", justify="right", no_wrap=True)
    for number, (name, row, lost) in enumerate(zip(names, history, forgetting(history), strict=True), 1):
        cells = [percent(row[other]) if other in row else "" for other in names]
        table.add_row(f"{number} {name}", *cells, percent(sum(row.values()) / len(row)), percent(lost))
    return table


def evaluation_table(evaluation: Evaluation) -> Table:
    table = Table()
    table.add_column("task", overflow="fold")
    table.add_column("accuracy (%)", justify="right")
    table.add_column("routing accuracy (%)", justify="right")
    for name in evaluation.accuracy:
        table.add_row(name, percent(evaluation.accuracy[name]), percent(evaluation.routing[name]))
    table.add_section()
    routing = sum(evaluation.routing.values()) / len(evaluation.routing)
    table.add_row("average", percent(evaluation.average), percent(routing), style="bold")
    return table


def answers_table(
    texts: Sequence[str], expected: Sequence[str], predictions: Sequence[Prediction], title: str
) -> Table:
    """Inputs with their answers and routes; wrong answers also show the expected one."""
    table = Table(title=title, title_justify="left", show_lines=True)
    table.add_column("input", ratio=3)
    table.add_column("answer", ratio=1)
    table.add_column("route", ratio=2)
    for text, right, prediction in zip(texts, expected, predictions, strict=True):
        answer = prediction.label or prediction.text or "(no task)"
        cell = Text(f"{answer}  {percent(prediction.score)} %")
        if answer == right:
            cell.stylize("green")
        else:
            cell.append(f"\nexpected {right}", style="red")
        route = prediction.route
        lines = [f"{task} {percent(w)} %" for task, w in zip(route.tasks, route.weights, strict=True) if w >= 0.0005]
        table.add_row(Text(text), cell, "\n".join(lines))
    return table


def tasks_table(tasks: Sequence[LearnedTask]) -> Table:
    table = Table()
    table.add_column("task", overflow="fold")
    table.add_column("slots", justify="right")
    table.add_column("rank", justify="right")
    table.add_column("parameters", justify="right")
    table.add_column("outputs", overflow="fold")
    starts = [started_from(task) for task in tasks]
    if any(starts):
        table.add_column("warm start", overflow="fold")
    for task, start in zip(tasks, starts, strict=True):
        size = sum(a.numel() + b.numel() for a, b in task.values.values())
        labels = task.labels or ()
        many = f"{len(labels):,} labels: " if len(labels) > LISTED else ""
        answers = "free text" if task.labels is None else many + some_of(labels, LISTED)
        table.add_row(task.name, str(task.slots), str(task.rank), f"{size:,}", Text(answers), *[start] * any(starts))
    return table


def started_from(task: LearnedTask) -> str:
    """The task that this one was initialised from, and the SHA-256 of its file; empty without a warm start."""
    start = task.options.get("warm_start")
    return f"{start['task']} {start['sha256'][:12]}" if isinstance(start, Mapping) else ""
