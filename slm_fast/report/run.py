"""The report on runs of the continual-learning benchmark: accuracy, forgetting, routing and cost of each method."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from slm_fast.errors import InputError, SlmError, warn
from slm_fast.report import keys, paper
from slm_fast.report.ablations import ablations
from slm_fast.report.figures import Bars, Figure, Grid, Lines, Note, Part, Report, Section, Spread, written
from slm_fast.report.made import versions
from slm_fast.report.markup import isolated
from slm_fast.report.results import Result, leads, many, results
from slm_fast.report.run_tables import also, by_task, costs, ranking, routed_by, timed
from slm_fast.report.runs import Run, read_run
from slm_fast.report.store import confusion
from slm_fast.report.zeroshot import zeroshot
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
    (
        "Difference, paired by row",
        "Average accuracy minus that of the other method on the same rows and seeds. The ± is its standard error over "
        "rows, paired: an effect of about twice that much would rarely come from the choice of rows. It does not "
        "include what other seeds would change.",
    ),
    ("±", "Standard deviation over seeds; for differences paired by row, their standard error."),
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
    title = f"{isolated(run.stream)}{on}: {many(len(ranked), 'method')}, {many(len(run.tasks), 'task')}"
    own = next((result for result in ranked if any(seed.store for seed in result.method.farthest)), None)
    sections = [
        Section("Methods", [ranking(run, ranked, stem), *paper.tables(run.stream, stem), _lost(ranked, stem)]),
        *ablations(ranked, stem),
        Section("Accuracy over the task stream", _over_tasks(run, ranked, stem)),
        Section("Time and memory", [costs(ranked, stem)]),
        Section("Accuracy matrix R", [_matrix(run, result, stem) for result in ranked]),
        *([Section("Results per task", [by_task(own, stem)])] if own else []),
        *also(ranked, stem),
        *zeroshot(run, stem),
        *routed_by(ranked, stem),
        *timed(ranked, stem),
        Section(
            "Routing confusion matrix",
            _told_apart(ranked, stem),
            "True task (left) against predicted task (top), in % of the true task's rows. Methods with oracle task IDs "
            "are not shown.",
        ),
        _keys(own, stem),
    ]
    return Part(title, _answer(run, ranked), _headline(run, ranked), sections, _unfinished(run, ranked))


def _answer(run: Run, ranked: Sequence[Result]) -> str:
    best, *others = leads(ranked)
    learned = len(best.learned)
    when = f"all {many(learned, 'task')}" if best.complete else f"{learned} of {len(run.tasks)} tasks"
    told = "with oracle task IDs" if best.method.told else "without oracle task IDs"
    said = f"{best.title} has the highest average accuracy {told}: {_percent(best.average)} after {when}"
    lost = best.forgetting
    said += "" if lost is None else f", with forgetting of {written(lost.mean, 'points')} points"
    said += f". {others[0].title} follows with {_percent(others[0].average)}." if others else "."
    others = [result for result in ranked if len(result.learned) == learned and result is not best]
    for how, given in (
        ("With oracle task IDs", [result for result in others if result.method.told]),
        ("Retrained on all rows", [result for result in others if result.method.retrains]),
    ):
        if given:
            said += f" {how}, {given[0].title} reaches {_percent(given[0].average)}."
    return f"{said} {_cost(best)}".strip()


def _cost(result: Result) -> str:
    """What a method costs per task, in a sentence; empty if nothing was measured."""
    processor = result.cost("learn_cpu_seconds", mean)
    seconds, unit = (result.seconds("learn", mean), "seconds" if processor is None else "CPU seconds")
    totals = [result.last_cost(name) for name in ("parameters", "kept_bytes")]
    if seconds is None and totals == [None, None]:
        return ""
    parameters, kept = (None if total is None else total / len(result.learned) for total in totals)
    return (
        f"{result.title} takes {written(seconds, 'seconds')} {unit} to learn a task, trains "
        f"{written(parameters, 'short')} parameters for it and stores {written(kept, 'bytes')}."
    )


def _percent(value: Spread) -> str:
    return f"{written(value, 'percent')} %"


def _headline(run: Run, ranked: Sequence[Result]) -> list[tuple[str, str]]:
    best = leads(ranked)[0]
    lost, routing = best.forgetting, best.routing
    seeds = max(len(result.method.farthest) for result in ranked)
    return [
        (f"{written(best.average.mean, 'percent')} %", f"average accuracy of {best.title}"),
        (written(lost.mean if lost else None, "points"), "forgetting, points"),
        (written(routing.mean, "percent") + " %" if routing else written(None, ""), "routing accuracy"),
        (f"{len(ranked[0].learned)} of {len(run.tasks)}", "tasks learned"),
        (f"{seeds}", "seed" if seeds == 1 else "seeds"),
    ]


def _unfinished(run: Run, ranked: Sequence[Result]) -> str:
    said = [
        f"{result.title} has learned {len(result.learned)} of {many(len(run.tasks), 'task')}"
        for result in ranked
        if not result.complete
    ]
    for result in ranked:
        behind = len(result.method.seeds) - len(result.method.farthest)
        if behind:
            said.append(f"{many(behind, 'seed')} of {result.title} excluded (fewer tasks learned)")
    said += [f"{isolated(title)} has not learned any task yet" for title in run.waiting]
    return f"This run is unfinished. Results so far: {'; '.join(said)}." if said else ""


def _over_tasks(run: Run, ranked: Sequence[Result], stem: str) -> list[Figure | Note]:
    best = leads(ranked)[0]
    averages = [(r.method.title, r.averages(), r is best) for r in ranked]
    first = [(r.method.title, [row[0] for row in r.matrix(run.tasks)], r is best) for r in ranked]
    return [
        Lines(f"{stem}average", "Average accuracy on the tasks learned so far, %", run.tasks, averages),
        Lines(f"{stem}first", f"Accuracy on the first task ({isolated(run.tasks[0])}), %", run.tasks, first),
        _forgotten(run, ranked, stem),
    ]


def _forgotten(run: Run, ranked: Sequence[Result], stem: str) -> Lines | Note:
    """Forgetting F_k after each task."""
    heading, best = "Forgetting on the tasks learned so far, points", leads(ranked)[0]
    series = [(r.method.title, r.forgetting_by_step(), r is best) for r in ranked]
    if all(value is None for _, values, _ in series for value in values):
        return Note("Forgetting is defined from the second task on.", heading)
    theirs = [(name, values[: len(run.tasks)]) for name, values in paper.forgetting(run.stream)]
    note = "F_k after each task k from the second on; lower is better."
    if theirs:
        note += " In grey the paper's, mean over its orders 4 to 6, with another backbone (BERT-base) and other rows."
    return Lines(f"{stem}forgetting-by-task", heading, run.tasks, series, note=note, kind="points", grey=theirs)


def _lost(ranked: Sequence[Result], stem: str) -> Bars:
    best = leads(ranked)[0]
    bars = [(r.method.title, None if r.forgetting is None else r.forgetting.mean, r is best) for r in ranked]
    return Bars(f"{stem}forgetting", "Forgetting, points", bars, note="After the last learned task; lower is better.")


def _matrix(run: Run, result: Result, stem: str) -> Grid:
    values = result.matrix(run.tasks)
    rows = [f"after {name}" for name in result.learned]
    note = "" if result.complete else f"{len(result.learned)} of {len(run.tasks)} tasks learned."
    name = f"{stem}accuracy-{result.method.name}"
    return Grid(name, result.method.title, rows, run.tasks, values, "after learning", "accuracy on", note=note)


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
        return Section(title, [Note("There is no store in this run, so there are no keys to show.")])
    try:
        store = Store.open(place)
        tasks = store.load()
        shown = keys.figures(keys.keys_of(keys.router_of(tasks, store.about["config"]), tasks), stem)
    except SlmError as error:
        warn(f"{place}: its keys cannot be shown: {error}")
        shown = [Note(f"The keys of {own.title} cannot be shown: {error}")]
    return Section(title, shown, f"Keys of {own.title}, {place.parent.name}.")
