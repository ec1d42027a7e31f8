"""The report on a store: accuracy and routing accuracy of its tasks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from slm_fast.errors import InputError
from slm_fast.evaluate import Marked, as_task, mark, tally
from slm_fast.options import PredictOptions
from slm_fast.report import keys
from slm_fast.report.figures import Column, Grid, Listing, Note, Part, Report, Section, Table, Value, written
from slm_fast.report.made import versions
from slm_fast.slm import ScalableLM

SHOWN = 20  # maximum wrong answers shown
NO_TASK = "(none)"

READING = (
    ("Average accuracy", "Mean over tasks of the share of correctly answered rows."),
    (
        "Routing accuracy",
        "Share of a task's rows that are routed to it; the others go to another task, or to none. The overall value is "
        "the mean over tasks.",
    ),
    (
        "Routing confusion matrix",
        "Each matrix row shows where the rows of one task were routed and sums to 100 %. The diagonal is the routing "
        "accuracy.",
    ),
    (
        "Key similarity",
        "The router identifies tasks by keys, one or more per task. Tasks with similar keys are easily confused.",
    ),
    (
        "Most confident errors",
        "Wrong answers with the highest scores, alternating between tasks. If the route is wrong, another task "
        "answered. If it is right, the task was not learned well enough or the row is mislabelled.",
    ),
)


def store_report(
    slm: ScalableLM,
    tasks: Mapping[str, Any],
    options: PredictOptions | None = None,
    *,
    with_task_id: bool = False,
    command: str = "",
    progress: bool | None = None,
) -> Report:
    """Answer the rows of {task name: file or rows} as `ScalableLM.evaluate` does, and report the results.

    Raises:
        InputError: no tasks, or one that is not learned. WorkError: a row's label is not one of the task's.
    """
    if not isinstance(tasks, Mapping):
        raise InputError(f"tasks: expected {{name: a file or rows}}, got a {type(tasks).__name__}")
    given = {name: as_task(slm.learned.get(name), name, source) for name, source in tasks.items()}
    started = time.perf_counter()
    marked = mark(slm.model, given, options or PredictOptions(), with_task_id=with_task_id, progress=progress)
    seconds = time.perf_counter() - started
    return report_on(slm, marked, seconds, with_task_id=with_task_id, command=command)


def report_on(
    slm: ScalableLM, marked: Sequence[Marked], seconds: float, *, with_task_id: bool = False, command: str = ""
) -> Report:
    """The report on answered rows. The same rows, answers and seconds give the same report."""
    evaluation = tally(marked)
    routing = sum(evaluation.routing.values()) / len(evaluation.routing)
    speed = len(marked) / seconds if seconds > 0 else None
    rate, many = written(speed, "count"), len(evaluation.accuracy)
    average, routed = written(evaluation.average, "percent"), written(routing, "percent")
    store = slm.store or slm.source
    place = "" if store is None else store.where
    told = "Oracle task IDs were given." if with_task_id else f"Routing accuracy is {routed} %."
    answer = (
        f"Average accuracy is {average} % over {many} task{'s' * (many != 1)}. {told} "
        f"{len(marked):,} rows were answered as one mixed stream at {rate} rows/s."
    )
    headline = [
        (f"{average} %", "average accuracy"),
        (f"{routed} %", "routing accuracy" + (" (oracle task IDs)" if with_task_id else "")),
        (f"{len(marked):,}", "rows"),
        (f"{many:,}", "task" if many == 1 else "tasks"),
        (rate, "rows/s"),
    ]
    taken = Counter((one.task, one.prediction.task or "") for one in marked)
    found = keys.keys_of(slm.model.router, list(slm.learned.values()))
    apart = "Confusion matrix: true task (left) against predicted task (top), in % of the true task's rows."
    sections = [
        Section("Results per task", [_by_task(slm, marked)]),
        Section("Routing", [confusion(taken), *keys.figures(found)], apart),
        Section("Most confident errors", [_mistakes(marked)]),
    ]
    made = [("command", command)] if command else []
    made += [("store", place)] if place else []
    config = slm.model.config
    made += [
        (
            "backbone",
            f"{slm.model.backbone.name or type(slm.model.backbone.model).__name__}, {slm.model.backbone.dtype}".replace(
                "torch.", ""
            ),
        )
    ]
    made += [("router", f"{config.router}, query {config.query}"), ("versions", versions())]
    title = "Evaluation report"
    return Report(title, [Part(title, answer, headline, sections)], READING, made)


def _by_task(slm: ScalableLM, marked: Sequence[Marked]) -> Table:
    evaluation, rows = tally(marked), Counter(one.task for one in marked)
    columns = [
        Column("task"),
        Column("rows", "count"),
        Column("accuracy, %", "percent", "share of rows answered correctly"),
        Column("routing accuracy, %", "percent", "share of the task's rows routed to it"),
        Column("labels", "count"),
        Column("on disk", "bytes", "size of the task's file in the store"),
    ]
    lines: list[list[Value]] = []
    sizes = {name: _size(slm, name) for name in rows}
    for name in rows:
        labels = slm.learned[name].labels
        free = "free text" if labels is None else len(labels)
        lines.append([name, rows[name], evaluation.accuracy[name], evaluation.routing[name], free, sizes[name]])
    known = [size for size in sizes.values() if size is not None]
    total = sum(known) if len(known) == len(sizes) else None
    routing = sum(evaluation.routing.values()) / len(evaluation.routing)
    lines.append(["average (rows, size: total)", len(marked), evaluation.average, routing, "", total])
    return Table("tasks", "Results per task", columns, lines, last=True)


def _size(slm: ScalableLM, name: str) -> int | None:
    """Size of a task's file in bytes; None if it is not in a store."""
    store = slm.store or slm.source
    try:
        return None if store is None else store.file(name).stat().st_size
    except (KeyError, OSError):
        return None


def confusion(
    taken: Mapping[tuple[str, str], int], stem: str = "confusion", title: str = "Routing confusion matrix"
) -> Grid:
    """The routing confusion matrix, normalised per true task. taken: rows by (task, predicted task or "")."""
    rows = list(dict.fromkeys(task for task, _ in taken))
    others = sorted({other for _, other in taken} - {*rows, ""})
    columns = [*rows, *others, *([""] if any(not other for _, other in taken) else [])]
    values: list[list[float | None]] = []
    for task in rows:
        counts = [taken.get((task, other), 0) for other in columns]
        values.append([count / sum(counts) for count in counts])
    names = [name or NO_TASK for name in columns]
    note = f"{NO_TASK}: rows without a predicted task." if "" in columns else ""
    return Grid(stem, title, rows, names, values, "task", "predicted task", note=note)


def _mistakes(marked: Sequence[Marked]) -> Listing | Note:
    wrong = [one for one in marked if not one.right]
    if not wrong:
        return Note("All answers are correct.")
    by_task: dict[str, list[Marked]] = {}
    for one in sorted(wrong, key=lambda one: -one.prediction.score):
        by_task.setdefault(one.task, []).append(one)
    turns = [one for turn in zip_longest(*by_task.values()) for one in turn if one is not None][:SHOWN]
    entries = []
    for one in turns:
        found, route = one.prediction, one.prediction.route
        got = found.label if found.label is not None else found.text if found.text is not None else NO_TASK
        weights = [
            f"{task} {100 * weight:.0f} %"
            for task, weight in zip(route.tasks, route.weights, strict=True)
            if weight >= 0.005
        ]
        facts = {
            "expected": one.row.target or "",
            "got": got,
            "score": f"{100 * found.score:.0f} %",
            "task": one.task,
            "route": ", ".join(weights) or NO_TASK,
        }
        entries.append((one.row.prompt, facts))
    note = f"Shows {len(entries)} of {len(wrong):,} wrong answers." if len(entries) < len(wrong) else ""
    return Listing("mistakes", "Most confident errors", entries, note=note)
