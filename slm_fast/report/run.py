"""The report on runs of the continual-learning benchmark: accuracy, forgetting, routing and cost of each method."""

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
        "Accuracy matrix R",
        "R[i, j] is the accuracy on task j after learning task i. Entries above the diagonal were measured before task "
        "j was learned.",
    ),
    ("Average accuracy", "Mean over all learned tasks of the accuracy after learning the last one."),
    (
        "Forgetting",
        "Mean over all tasks but the last of their best earlier accuracy minus their final accuracy (Chaudhry et al. "
        "2018), in percentage points. 0 means nothing was forgotten; negative values mean a gain.",
    ),
    (
        "Backward transfer",
        "Mean over all tasks but the last of their final accuracy minus their accuracy right after learning (Lopez-Paz "
        "& Ranzato 2017), in percentage points.",
    ),
    (
        "Average incremental accuracy",
        "Mean over learning steps of the average accuracy on the tasks learned so far (Rebuffi et al. 2017).",
    ),
    (
        "Forward transfer",
        "Mean over all tasks but the first of their accuracy right before learning minus that of the untrained model "
        "(Lopez-Paz & Ranzato 2017), in percentage points.",
    ),
    ("Routing accuracy", "Mean over tasks of the share of rows routed to the correct task."),
    (
        "Oracle task ID",
        "The method is given each row's task, which other methods have to infer. The two groups are not comparable.",
    ),
    ("±", "Standard deviation over seeds."),
)


def run_report(paths: Sequence[str | Path], *, command: str = "") -> Report:
    """The report on run folders, one part per run.

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
    made.append(("report versions", versions()))
    title = parts[0].title if len(parts) == 1 else f"{len(parts)} runs of the continual-learning benchmark"
    return Report(title, parts, READING, made)


def _made(run: Run) -> list[tuple[str, str]]:
    found = [("run", str(run.path))]
    for what in ("backbone", "machine", "settings", "date"):
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
        Section("Accuracy over the task stream", _over_tasks(run, ranked, stem)),
        Section("Time and memory", [_costs(ranked, stem)]),
        Section("Accuracy matrix R", [_matrix(run, result, stem) for result in ranked]),
        *([Section("Results per task", [_by_task(own, stem)])] if own else []),
        *_also(ranked, stem),
        Section(
            "Routing confusion matrix",
            _told_apart(ranked, stem),
            "True task (left) against predicted task (top), in % of the true task's rows. Methods with oracle task IDs "
            "are not shown.",
        ),
        _keys(own, stem),
    ]
    return Part(title, _answer(run, ranked), _headline(run, ranked), sections, _unfinished(run, ranked))


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _title(result: Result) -> str:
    return isolated(result.method.title)


def _leads(ranked: Sequence[Result]) -> list[Result]:
    """The methods that have learned the most tasks, without oracle task IDs if there are any such, best first."""
    far = [result for result in ranked if len(result.learned) == len(ranked[0].learned)]
    return [result for result in far if not result.method.told] or far


def _answer(run: Run, ranked: Sequence[Result]) -> str:
    best, *others = _leads(ranked)
    learned = len(best.learned)
    when = f"all {_many(learned, 'task')}" if best.complete else f"{learned} of {len(run.tasks)} tasks"
    told = "with oracle task IDs" if best.method.told else "without oracle task IDs"
    said = f"{_title(best)} has the highest average accuracy {told}: {_percent(best.average)} after {when}"
    lost = best.forgetting
    said += "" if lost is None else f", with forgetting of {written(lost.mean, 'points')} points"
    said += f". {_title(others[0])} follows with {_percent(others[0].average)}." if others else "."
    helped = [r for r in ranked if r.method.told and len(r.learned) == learned and r is not best]
    if helped:
        said += f" With oracle task IDs, {_title(helped[0])} reaches {_percent(helped[0].average)}."
    return said


def _percent(value: Spread) -> str:
    return f"{written(value, 'percent')} %"


def _headline(run: Run, ranked: Sequence[Result]) -> list[tuple[str, str]]:
    best = _leads(ranked)[0]
    lost, routing = best.forgetting, best.routing
    seeds = max(len(result.method.farthest) for result in ranked)
    return [
        (f"{written(best.average.mean, 'percent')} %", f"average accuracy of {_title(best)}"),
        (written(lost.mean if lost else None, "points"), "forgetting, points"),
        (written(routing.mean, "percent") + " %" if routing else written(None, ""), "routing accuracy"),
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
            said.append(f"{_many(behind, 'seed')} of {_title(result)} excluded (fewer tasks learned)")
    said += [f"{isolated(title)} has not learned any task yet" for title in run.waiting]
    return f"This run is unfinished. Results so far: {'; '.join(said)}." if said else ""


def _ranking(run: Run, ranked: Sequence[Result], stem: str) -> Table:
    forward = any(result.forward is not None for result in ranked)
    columns = [
        Column("method"),
        Column("oracle task ID"),
        Column("average accuracy, %", "percent"),
        Column("forgetting, points", "points"),
        Column("backward transfer, points", "points"),
        *([Column("forward transfer, points", "points")] if forward else []),
        Column("average incremental accuracy, %", "percent"),
        Column("routing accuracy, %", "percent"),
        Column("parameters", "short", "trained parameters of all learned tasks"),
        Column("storage", "bytes", "parameters, statistics and replayed rows of all learned tasks"),
        Column("training time per task, s", "seconds", "CPU time where measured"),
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
        f"Ranked by average accuracy after all {_many(len(run.tasks), 'task')}. Methods with oracle task IDs are below "
        "those without, and incomplete methods come last."
    )
    return Table(f"{stem}methods", "Method ranking", columns, rows, note=note)


def _costs(ranked: Sequence[Result], stem: str) -> Table:
    columns = [
        Column("method"),
        Column("training time per task, s", "seconds"),
        Column("total training time, s", "seconds"),
        Column("inference time per row, ms", "number", "including routing"),
        Column("routing time per row, ms", "number", "routing alone, a part of the inference time"),
        Column("parameters per task", "short"),
        Column("storage per task", "bytes"),
        Column("peak memory", "mib", "of the process that trained and evaluated the method"),
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
    note = "Times are CPU time where measured, so that other load on the machine hardly affects them."
    return Table(f"{stem}costs", "Time and memory", columns, rows, note=note)


def _over_tasks(run: Run, ranked: Sequence[Result], stem: str) -> list[Figure | Note]:
    best = _leads(ranked)[0]
    averages = [(r.method.title, r.averages(), r is best) for r in ranked]
    first = [(r.method.title, [row[0] for row in r.matrix(run.tasks)], r is best) for r in ranked]
    return [
        Lines(f"{stem}average", "Average accuracy on the tasks learned so far, %", run.tasks, averages),
        Lines(f"{stem}first", f"Accuracy on the first task ({isolated(run.tasks[0])}), %", run.tasks, first),
    ]


def _lost(ranked: Sequence[Result], stem: str) -> Bars:
    best = _leads(ranked)[0]
    bars = [(r.method.title, None if r.forgetting is None else r.forgetting.mean, r is best) for r in ranked]
    return Bars(f"{stem}forgetting", "Forgetting, points", bars, note="After the last learned task; lower is better.")


def _matrix(run: Run, result: Result, stem: str) -> Grid:
    values = result.matrix(run.tasks)
    rows = [f"after {name}" for name in result.learned]
    note = "" if result.complete else f"{len(result.learned)} of {len(run.tasks)} tasks learned."
    name = f"{stem}accuracy-{result.method.name}"
    return Grid(name, result.method.title, rows, run.tasks, values, "after learning", "accuracy on", note=note)


def _by_task(result: Result, stem: str) -> Table:
    columns = [
        Column("task"),
        Column("rows", "count"),
        Column("accuracy, %", "percent"),
        Column("routing accuracy, %", "percent", "share of the task's rows routed to it"),
        Column("retrieval accuracy, %", "percent", "share of rows with most retrieved slots from their task (Eq. 13)"),
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
    title = f"{_title(result)} after the last learned task"
    note = "Retrieval accuracy (Eq. 13 of the paper): more than half of a row's retrieved slots belong to its task."
    return Table(f"{stem}by-task", title, columns, rows, note=note)


ALSO = {
    "retrieved": Column("labels of the predicted task, %", "percent"),
    "unified": Column("labels of all tasks, %", "percent"),
    "oracle": Column("labels of the true task, %", "percent", "leaks the task ID to the head"),
    "BERTScore": Column("BERTScore F1, %", "percent", "of free-text answers; an empty answer scores 0"),
}


def _also(ranked: Sequence[Result], stem: str) -> list[Section]:
    """Other metrics of the answers, mean over tasks."""
    known = {what: [result.also(what) for result in ranked] for what in ALSO}
    chosen = [what for what, values in known.items() if any(value is not None for value in values)]
    rows: list[list[Value]] = [
        [result.method.title, *(known[what][i] for what in chosen)]
        for i, result in enumerate(ranked)
        if any(known[what][i] is not None for what in chosen)
    ]
    if not rows:
        return []
    note = "Accuracy with answers restricted to these labels: the fewer labels, the more of the task ID leaks."
    columns = [Column("method"), *(ALSO[what] for what in chosen)]
    table = Table(
        f"{stem}also", "Further metrics, mean over tasks", columns, rows, note=note if "oracle" in chosen else ""
    )
    return [Section("Further metrics", [table])]


def _told_apart(ranked: Sequence[Result], stem: str) -> list[Figure | Note]:
    found: list[Figure | Note] = []
    for result in ranked:
        taken = result.confusion()
        if taken is not None:
            found.append(confusion(taken, f"{stem}confusion-{result.method.name}", result.method.title))
    return found or [Note("No method in this run predicts tasks, or its answers were not saved.")]


def _keys(own: Result | None, stem: str) -> Section:
    """The keys of the best method that has saved a store."""
    title = "Router keys"
    place = next((seed.store for seed in own.method.farthest if seed.store), None) if own else None
    if own is None or place is None:
        return Section(title, [Note("No method in this run has saved a store yet, so there are no keys to show.")])
    try:
        store = Store.open(place)
        tasks = store.load()
        shown = keys.figures(keys.keys_of(keys.router_of(tasks, store.about["config"]), tasks), stem)
    except SlmError as error:
        warn(f"{place}: its keys cannot be shown: {error}")
        shown = [Note(f"The keys of {_title(own)} cannot be shown: {error}")]
    return Section(title, shown, f"Keys of {_title(own)}, {place.parent.name}.")
