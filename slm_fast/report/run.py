"""The report of runs of the continual-learning benchmark: which method answers best, what it forgets, what it costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from slm_fast.errors import InputError, SlmError, warn
from slm_fast.report import keys, paper
from slm_fast.report.figures import (
    Bars,
    Column,
    Figure,
    Grid,
    Lines,
    Note,
    Part,
    Report,
    Section,
    Spread,
    Table,
    Value,
    written,
)
from slm_fast.report.made import versions
from slm_fast.report.markup import isolated
from slm_fast.report.results import Result, results
from slm_fast.report.runs import Run, read_run
from slm_fast.report.store import confusion
from slm_fast.store import Store

READING = (
    (
        "Accuracy after each task",
        "A line after each task learned, a column a task: the matrix R. What stands above the diagonal was answered "
        "before it was learned.",
    ),
    ("Average accuracy", "The mean over all tasks learned of the accuracy after the last of them."),
    (
        "Forgetting",
        "The mean over earlier tasks of the best accuracy they had minus the one at the end (Chaudhry et al. 2018), in "
        "points. 0 is nothing forgotten, below 0 something gained.",
    ),
    (
        "Backward transfer",
        "The mean over earlier tasks of the accuracy at the end minus that right after learning them (Lopez-Paz & "
        "Ranzato 2017), in points.",
    ),
    (
        "Average incremental accuracy",
        "The mean over tasks learned of the average accuracy until then (Rebuffi et al. 2017).",
    ),
    (
        "Forward transfer",
        "The mean over all tasks but the first of the accuracy right before learning it minus that of the untrained "
        "model (Lopez-Paz & Ranzato 2017), in points.",
    ),
    ("Routing accuracy", "The mean over tasks of the share of their rows that were taken for them."),
    ("Needs task-ID", "The method is told each row's task, which the others have to find. The two are not comparable."),
    ("±", "The standard deviation over seeds."),
)


def run_report(paths: Sequence[str | Path], *, command: str = "") -> Report:
    """The report of run folders, a part each.

    Raises:
        InputError: no folder given, or one that is no run. WorkError: a file of a run is damaged or of another format,
        or no stage is done.
    """
    if not paths:
        raise InputError("report: no run given")
    runs = [read_run(path) for path in paths]
    parts = [_part(run, f"{i}-" if len(runs) > 1 else "") for i, run in enumerate(runs, 1)]
    made = [("command", command)] if command else []
    for run in runs:
        made += [(f"{what} of {run.path.name}" if len(runs) > 1 else what, value) for what, value in _made(run)]
    made.append(("this page", versions()))
    title = parts[0].title if len(parts) == 1 else f"{len(parts)} runs of the continual-learning benchmark"
    return Report(title, parts, READING, made)


def _made(run: Run) -> list[tuple[str, str]]:
    found = [("run", str(run.path))]
    for what in ("backbone", "machine", "settings", "versions"):
        value = run.about.get(what)
        if isinstance(value, dict):
            value = ", ".join(
                f"{name} {own if isinstance(own, str) else json.dumps(own)}" for name, own in value.items()
            )
        if value is not None:
            found.append((what, value if isinstance(value, str) else json.dumps(value)))
    return found


def _part(run: Run, stem: str) -> Part:
    ranked = results(run)
    backbone = run.about.get("backbone")
    on = f" on {isolated(backbone)}" if isinstance(backbone, str) else ""
    title = f"{isolated(run.stream)}{on}: {_many(len(ranked), 'method')}, {_many(len(run.tasks), 'task')}"
    own = next((result for result in ranked if any(seed.store for seed in result.method.farthest)), None)
    theirs = paper.table(run.stream, f"{stem}paper")
    sections = [
        Section("Methods", [_ranking(run, ranked, stem), *([theirs] if theirs else []), _lost(ranked, stem)]),
        Section("As tasks are learned", _over_tasks(run, ranked, stem)),
        Section("What it costs", [_costs(ranked, stem)]),
        Section("Accuracy after each task", [_matrix(run, result, stem) for result in ranked]),
        *([Section("By task", [_by_task(own, stem)])] if own else []),
        *_also(ranked, stem),
        Section(
            "Which task rows were taken for",
            _told_apart(ranked, stem),
            "In % of the rows of the task at the left. Methods that are told the task are left out.",
        ),
        _keys(own, stem),
    ]
    return Part(title, _answer(run, ranked), _headline(run, ranked), sections, _unfinished(run, ranked))


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _title(result: Result) -> str:
    return isolated(result.method.title)


def _leads(ranked: Sequence[Result]) -> list[Result]:
    """Of the methods that have learned most tasks, those that find the task themselves, the best first."""
    far = [result for result in ranked if len(result.learned) == len(ranked[0].learned)]
    return [result for result in far if not result.method.told] or far


def _answer(run: Run, ranked: Sequence[Result]) -> str:
    best, *others = _leads(ranked)
    learned = len(best.learned)
    when = f"all {_many(learned, 'task')}" if best.complete else f"{learned} of {len(run.tasks)} tasks"
    told = " (told each row's task)" if best.method.told else " without being told the task"
    said = f"{_title(best)} answers best{told}: {_percent(best.average)} on average after {when}"
    lost = best.forgetting
    said += "" if lost is None else f", having forgotten {written(lost.mean, 'points')} points"
    said += f". {_title(others[0])} is next with {_percent(others[0].average)}." if others else "."
    helped = [r for r in ranked if r.method.told and len(r.learned) == learned and r is not best]
    if helped:
        said += f" Told each row's task, {_title(helped[0])} reaches {_percent(helped[0].average)}."
    return said


def _percent(value: Spread) -> str:
    return f"{written(value, 'percent')} %"


def _headline(run: Run, ranked: Sequence[Result]) -> list[tuple[str, str]]:
    best = _leads(ranked)[0]
    lost, routing = best.forgetting, best.routing
    seeds = max(len(result.method.farthest) for result in ranked)
    return [
        (f"{written(best.average.mean, 'percent')} %", f"average accuracy of {_title(best)}"),
        (written(lost.mean if lost else None, "points"), "points it forgets"),
        (written(routing.mean, "percent") + " %" if routing else written(None, ""), "rows whose task it names right"),
        (f"{len(ranked[0].learned)} of {len(run.tasks)}", "tasks learned"),
        (f"{seeds}", "seed" if seeds == 1 else "seeds"),
    ]


def _unfinished(run: Run, ranked: Sequence[Result]) -> str:
    said = [
        f"{_title(result)} has learned {len(result.learned)} of {_many(len(run.tasks), 'task')}"
        for result in ranked
        if not result.complete
    ]
    for result in ranked:
        behind = len(result.method.seeds) - len(result.method.farthest)
        if behind:
            said.append(f"{_many(behind, 'seed')} of {_title(result)} got less far, and what is said leaves that out")
    said += [f"{isolated(title)} has learned nothing yet" for title in run.waiting]
    return f"This run is unfinished and shown as far as it is: {'; '.join(said)}." if said else ""


def _ranking(run: Run, ranked: Sequence[Result], stem: str) -> Table:
    forward = any(result.forward is not None for result in ranked)
    columns = [
        Column("method"),
        Column("needs task-ID"),
        Column("average accuracy, %", "percent"),
        Column("forgetting, points", "points"),
        Column("backward transfer, points", "points"),
        *([Column("forward transfer, points", "points")] if forward else []),
        Column("average incremental accuracy, %", "percent"),
        Column("routing accuracy, %", "percent"),
        Column("parameters", "short", "that are trained, of all tasks learned"),
        Column("bytes kept", "bytes", "of all tasks learned"),
        Column("seconds a task", "seconds", "to learn it, of a processor"),
        Column("peak memory", "mib"),
        Column("seeds", "count"),
        *([] if all(result.complete for result in ranked) else [Column("tasks", "count", "learned so far")]),
    ]
    rows: list[list[Value]] = [
        [
            result.method.title,
            "yes" if result.method.told else "no",
            result.average,
            result.forgetting,
            result.backward,
            *([result.forward] if forward else []),
            result.incremental,
            result.routing,
            result.last_cost("parameters"),
            result.last_cost("kept_bytes"),
            result.seconds("learn", mean),
            result.cost("peak_mib", max),
            len(result.method.farthest),
            len(result.learned),
        ][: len(columns)]
        for result in ranked
    ]
    note = (
        f"Ranked by average accuracy after all {_many(len(run.tasks), 'task')}. Methods that need each row's task-ID "
        "stand below those that find it, and methods that are not there yet below all."
    )
    return Table(f"{stem}methods", "Methods, ranked", columns, rows, note=note)


def _costs(ranked: Sequence[Result], stem: str) -> Table:
    columns = [
        Column("method"),
        Column("seconds a task", "seconds", "to learn it"),
        Column("seconds to learn all", "seconds"),
        Column("answering, ms a row", "number"),
        Column("of it routing, ms a row", "number"),
        Column("parameters a task", "short"),
        Column("bytes kept a task", "bytes"),
        Column("peak memory", "mib", "of the process that learned and answered"),
    ]
    rows: list[list[Value]] = []
    for result in ranked:
        many, seeds = len(result.learned), len(result.method.farthest)
        total = result.seconds("learn", sum)
        parameters, kept = result.last_cost("parameters"), result.last_cost("kept_bytes")
        rows.append(
            [
                result.method.title,
                result.seconds("learn", mean),
                None if total is None else total / seeds,
                result.milliseconds_a_row("answer"),
                result.milliseconds_a_row("route"),
                None if parameters is None else parameters / many,
                None if kept is None else kept / many,
                result.cost("peak_mib", max),
            ]
        )
    note = "Seconds are a processor's where they were measured, so that what else ran hardly shows."
    return Table(f"{stem}costs", "What it costs", columns, rows, note=note)


def _over_tasks(run: Run, ranked: Sequence[Result], stem: str) -> list[Figure | Note]:
    best = _leads(ranked)[0]
    averages = [(r.method.title, r.averages(), r is best) for r in ranked]
    first = [(r.method.title, [row[0] for row in r.matrix(run.tasks)], r is best) for r in ranked]
    return [
        Lines(f"{stem}average", "Average accuracy on the tasks seen so far, %", run.tasks, averages),
        Lines(f"{stem}first", f"Accuracy on {isolated(run.tasks[0])}, the first task, %", run.tasks, first),
    ]


def _lost(ranked: Sequence[Result], stem: str) -> Bars:
    best = _leads(ranked)[0]
    bars = [(r.method.title, None if r.forgetting is None else r.forgetting.mean, r is best) for r in ranked]
    return Bars(f"{stem}forgetting", "Forgetting, points", bars, note="After the last task learned; shorter is better.")


def _matrix(run: Run, result: Result, stem: str) -> Grid:
    values = result.matrix(run.tasks)
    rows = [f"after {name}" for name in result.learned]
    note = "" if result.complete else f"{len(result.learned)} of {len(run.tasks)} tasks are learned."
    name = f"{stem}accuracy-{result.method.name}"
    return Grid(name, result.method.title, rows, run.tasks, values, "after learning", "accuracy on", note=note)


def _by_task(result: Result, stem: str) -> Table:
    columns = [
        Column("task"),
        Column("rows", "count"),
        Column("accuracy, %", "percent"),
        Column("routed to it, %", "percent", "the share of rows taken for this task"),
        Column("retrieval accuracy, %", "percent", "the share of rows most of whose slots are the task's (Eq. 13)"),
    ]
    rows: list[list[Value]] = []
    for name in result.learned:
        told = result.method.told
        rows.append(
            [
                name,
                result.method.farthest[0].stages[-1].rows[name],
                result.by_task(lambda stage: stage.accuracy, name),
                None if told else result.by_task(lambda stage: stage.routed, name),
                None if told else result.by_task(lambda stage: stage.retrieved, name),
            ]
        )
    title = f"{_title(result)} by task, after the last one learned"
    note = "Retrieval accuracy is the paper's Eq. 13: more than half of the retrieved slots are the task's own."
    return Table(f"{stem}by-task", title, columns, rows, note=note)


ALSO = {
    "retrieved": Column("labels of the task found, %", "percent"),
    "unified": Column("labels of all tasks, %", "percent"),
    "oracle": Column("labels of its own task, %", "percent", "which leaks the task-ID to the head"),
    "BERTScore": Column("BERTScore F1, %", "percent", "of answers in free text; one that says nothing has 0"),
}


def _also(ranked: Sequence[Result], stem: str) -> list[Section]:
    """What else was measured of answers, the mean over tasks."""
    known = {what: [result.also(what) for result in ranked] for what in ALSO}
    chosen = [what for what, values in known.items() if any(value is not None for value in values)]
    rows: list[list[Value]] = [
        [result.method.title, *(known[what][i] for what in chosen)]
        for i, result in enumerate(ranked)
        if any(known[what][i] is not None for what in chosen)
    ]
    if not rows:
        return []
    note = "With labels, what an answer may be: the fewer labels a row is offered, the more of its task-ID leaks."
    columns = [Column("method"), *(ALSO[what] for what in chosen)]
    table = Table(f"{stem}also", "Answers, the mean over tasks", columns, rows, note=note if "oracle" in chosen else "")
    return [Section("Answers measured otherwise", [table])]


def _told_apart(ranked: Sequence[Result], stem: str) -> list[Figure | Note]:
    found: list[Figure | Note] = []
    for result in ranked:
        taken = result.confusion()
        if taken is not None:
            found.append(confusion(taken, f"{stem}confusion-{result.method.name}", result.method.title))
    return found or [Note("No method of this run names tasks, or its answers are not kept.")]


def _keys(own: Result | None, stem: str) -> Section:
    """The keys of the best method that has kept a store."""
    title = "What the router goes by"
    place = next((seed.store for seed in own.method.farthest if seed.store), None) if own else None
    if own is None or place is None:
        return Section(title, [Note("No method of this run has kept a store yet, whose keys could be shown.")])
    try:
        store = Store.open(place)
        tasks = store.load()
        shown = keys.figures(keys.keys_of(keys.router_of(tasks, store.about["config"]), tasks), stem)
    except SlmError as error:
        warn(f"{place}: its keys cannot be shown: {error}")
        shown = [Note(f"The keys of {_title(own)} cannot be shown: {error}")]
    return Section(title, shown, f"The keys of {_title(own)}, {place.parent.name}.")
