"""`slm-fast evaluate`."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from slm_fast.cli.arguments import (
    Verbs,
    add_label_files,
    add_predict_options,
    add_reading_options,
    add_task_files,
    check_stdin,
    fields_of,
    named_files,
    open_store,
    read_tasks,
)
from slm_fast.errors import InputError, warn
from slm_fast.options import PredictOptions


def add(verbs: Verbs) -> None:
    about = "measure accuracy and routing accuracy on labelled files, answered as one mixed stream"
    evaluate = verbs.add("evaluate", run, about)
    add_task_files(evaluate, "labelled file; - reads standard input")
    evaluate.add_argument(
        "--with-task-id", action="store_true", help="tell the model each row's task (oracle task IDs)"
    )
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.add_argument("--report", metavar="FILE", type=Path, help="also write an HTML report")
    evaluate.add_argument(
        "--files", action="store_true", help="with --report: also write figures (PNG) and numbers (CSV, JSON)"
    )
    add_reading_options(evaluate)
    add_label_files(evaluate)
    add_predict_options(evaluate)


def run(arguments: argparse.Namespace) -> int:
    from slm_fast.evaluate import mark, tally
    from slm_fast.tables import console, evaluation_table

    if arguments.report is not None:
        from slm_fast.report import check_output

        check_output(arguments.report, files=arguments.files)
    elif arguments.files:
        raise InputError("--files: goes with --report")

    if arguments.distance:
        warn("--distance has no effect: it goes with predict")
    files = named_files(arguments.tasks)
    check_stdin(files)
    slm = open_store(arguments)
    known = {name: task.labels or () for name, task in slm.learned.items()}
    tasks = read_tasks(arguments, files, training=False, known=known)
    options, told = PredictOptions(**fields_of(arguments, PredictOptions)), arguments.with_task_id
    started = time.perf_counter()
    marked = mark(slm.model, tasks, options, with_task_id=told)
    seconds = time.perf_counter() - started
    if arguments.report is not None:
        from slm_fast.report import report_on, save

        report = report_on(slm, marked, seconds, with_task_id=told, command=arguments.command)
        save(report, arguments.report, files=arguments.files)
    evaluation = tally(marked)
    if arguments.json:
        result = {"accuracy": evaluation.accuracy, "routing": evaluation.routing, "average": evaluation.average}
        print(json.dumps(result, allow_nan=False))
    else:
        console().print(evaluation_table(evaluation))
    return 0
