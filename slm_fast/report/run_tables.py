"""The tables of a run's report: ranking, ablations, cost, results per task and further metrics."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from slm_fast.report.figures import Column, Section, Table, Value
from slm_fast.report.paired import REFERENCE, STANDARD_ERROR, Comparison
from slm_fast.report.paper import RETRIEVAL
from slm_fast.report.results import Result, leads, many, spread
from slm_fast.report.runs import Run, Stage

DIFFERENCE = Column(
    "difference to the reference, points", "points", "of average accuracy, paired by row", STANDARD_ERROR
)


def ranking(run: Run, ranked: Sequence[Result], stem: str) -> Table:
    forward = any(result.forward is not None for result in ranked)
    best = leads(ranked)[0]
    compared, several = Comparison(best), len(ranked) > 1
    columns = [
        Column("method"),
        Column("oracle task ID"),
        Column("average accuracy, %", "percent"),
        *([DIFFERENCE] if several else []),
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
            *([REFERENCE if result is best else compared.difference(result)] if several else []),
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
        f"Ranked by average accuracy after all {many(len(run.tasks), 'task')}. Methods with oracle task IDs, and those "
        "retrained on the rows of all tasks, are below the others, and incomplete methods come last."
    )
    if several:
        note += (
            f" Differences are to {best.title}, ± their standard error, paired by row; n/a unless both methods have "
            "saved answers to the same rows."
        )
    return Table(f"{stem}methods", "Method ranking", columns, rows, note=note)


PEAKS = (
    (Column("peak while learning", "mib", "of the process"), "learn_peak_mib"),
    (Column("peak while answering", "mib", "of the process"), "answer_peak_mib"),
    (Column("GPU peak while learning", "mib"), "learn_peak_gpu_mib"),
    (Column("GPU peak while answering", "mib"), "answer_peak_gpu_mib"),
)


def costs(ranked: Sequence[Result], stem: str) -> Table:
    peaks = [peak for peak in PEAKS if any(result.cost(peak[1], max) is not None for result in ranked)]
    columns = [
        Column("method"),
        Column("training time per task, s", "seconds"),
        Column("total training time, s", "seconds"),
        Column("inference time per row, ms", "number", "including routing"),
        Column("routing time per row, ms", "number", "routing alone, a part of the inference time"),
        Column("parameters per task", "short"),
        Column("storage per task", "bytes"),
        Column("peak memory", "mib", "of the process that trained and evaluated the method"),
        *(column for column, _ in peaks),
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
                *(result.cost(name, max) for _, name in peaks),
            ]
        )
    note = "Times are CPU time where measured, so that other load on the machine hardly affects them."
    return Table(f"{stem}costs", "Time and memory", columns, rows, note=note)


def by_task(result: Result, stem: str) -> Table:
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
    heading = f"{result.title} after the last learned task"
    note = "Retrieval accuracy (Eq. 13 of the paper): more than half of a row's retrieved slots belong to its task."
    return Table(f"{stem}by-task", heading, columns, rows, note=note)


ALSO = {
    "retrieved": Column("labels of the predicted task, %", "percent"),
    "unified": Column("labels of all tasks, %", "percent"),
    "oracle": Column("labels of the true task, %", "percent", "leaks the task ID to the head"),
    "BERTScore": Column("BERTScore F1, %", "percent", "of free-text answers; an empty answer scores 0"),
}


def also(ranked: Sequence[Result], stem: str) -> list[Section]:
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


def routed_by(ranked: Sequence[Result], stem: str) -> list[Section]:
    """Routing accuracy with and without the rows' instructions."""
    rows: list[list[Value]] = []
    for result in ranked:
        by_input = [result.by_task(lambda stage: _of(stage, "input"), name) for name in result.learned]
        by_prompt = [result.by_task(lambda stage: _of(stage, "prompt"), name) for name in result.learned]
        if any(value is not None for value in (*by_input, *by_prompt)):
            rows += [[result.method.title, *own] for own in zip(result.learned, by_input, by_prompt, strict=True)]
    if not rows:
        return []
    columns = [
        Column("method"),
        Column("task"),
        Column("by the input alone, %", "percent"),
        Column("by the whole prompt, %", "percent", "instruction and input"),
    ]
    note = (
        "Rows with an instruction only; n/a for a task without any. The instruction is the same in all rows of a task, "
        "so it gives the task away. The router is the same in both columns: unless the method has route_on=prompt, it "
        "has learned from inputs alone."
    )
    table = Table(f"{stem}routed-by", "Routing accuracy with and without instructions", columns, rows, note=note)
    return [Section("Routing with and without instructions", [table])]


def _of(stage: Stage, by: str) -> dict[str, float | None]:
    return {name: own[by] for name, own in stage.routed_by.items()}


def timed(ranked: Sequence[Result], stem: str) -> list[Section]:
    """Routing time against the whole time per row, by task."""
    rows: list[list[Value]] = []
    for result in ranked:
        found = [
            (name, _milliseconds(result, name, "route"), _milliseconds(result, name, "answer"))
            for name in result.learned
        ]
        if any(answer is not None for _, _, answer in found):
            rows += [
                [result.method.title, name, route, answer, None if route is None or not answer else route / answer]
                for name, route, answer in found
            ]
    if not rows:
        return []
    columns = [
        Column("method"),
        Column("task"),
        Column("routing per row, ms", "number", "routing alone"),
        Column("answering per row, ms", "number", "including routing"),
        Column("share of routing, %", "percent"),
    ]
    theirs = [f"{task} {share} %" for task, share in RETRIEVAL.items() if task in ranked[0].learned]
    note = "Of some rows of each task, answered task by task after the last one was learned."
    if theirs:
        note += f" The paper reports for LLaMA2-7B on an A100: {', '.join(theirs)}."
    return [
        Section(
            "Routing against answering time", [Table(f"{stem}timed", "Routing time by task", columns, rows, note=note)]
        )
    ]


def _milliseconds(result: Result, name: str, what: str) -> float | None:
    """Time per row of a task after the last one: CPU time if known, else wall-clock time; mean over seeds."""
    found: list[float | None] = []
    for seed in result.method.farthest:
        own = seed.stages[-1].timed[name]
        seconds = own[f"{what}_cpu_seconds"]
        seconds = own[f"{what}_seconds"] if seconds is None else seconds
        found.append(None if seconds is None or not own["rows"] else 1000 * seconds / own["rows"])
    value = spread(found)
    return None if value is None else value.mean
