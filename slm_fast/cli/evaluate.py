"""`slm-fast evaluate`."""

from __future__ import annotations

import argparse
import json

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
from slm_fast.options import PredictOptions


def add(verbs: Verbs) -> None:
    about = "accuracy and routing accuracy on labelled files, answered as one mixed stream"
    evaluate = verbs.add("evaluate", run, about)
    add_task_files(evaluate, "a labelled file; - is standard input")
    evaluate.add_argument("--with-task-id", action="store_true", help="oracle task IDs: tell the model each row's task")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    add_reading_options(evaluate)
    add_label_files(evaluate)
    add_predict_options(evaluate)


def run(arguments: argparse.Namespace) -> int:
    from slm_fast.tables import console, evaluation_table

    files = named_files(arguments.tasks)
    check_stdin(files)
    slm = open_store(arguments)
    known = {name: task.labels or () for name, task in slm.learned.items()}
    tasks = read_tasks(arguments, files, training=False, known=known)
    evaluation = slm.evaluate(tasks, with_task_id=arguments.with_task_id, **fields_of(arguments, PredictOptions))
    if arguments.json:
        result = {"accuracy": evaluation.accuracy, "routing": evaluation.routing, "average": evaluation.average}
        print(json.dumps(result, allow_nan=False))
    else:
        console().print(evaluation_table(evaluation))
    return 0
