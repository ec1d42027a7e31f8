"""Accuracy, routing accuracy, and how much learning further tasks makes a model forget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_fast.data import Row, Task, check_name
from slm_fast.errors import InputError, WorkError, some_of
from slm_fast.labels import foreign_label
from slm_fast.model import AdaptedModel
from slm_fast.options import PredictOptions, check_switch
from slm_fast.predict import Prediction, predict
from slm_fast.tasks import LearnedTask


@dataclass(frozen=True)
class Evaluation:
    """Accuracy and routing accuracy by task, as fractions from 0 to 1.

    Attributes:
        accuracy: rows answered with the correct label, or with exactly the correct text as the tokenizer writes it.
        routing: rows assigned to the correct task.
        average: mean accuracy over tasks.
    """

    accuracy: dict[str, float]
    routing: dict[str, float]

    @property
    def average(self) -> float:
        return sum(self.accuracy.values()) / len(self.accuracy)


@dataclass(frozen=True)
class Marked:
    """A row of a task with its prediction. `right`: whether that is correct, as `Evaluation` defines it."""

    task: str
    row: Row
    prediction: Prediction
    right: bool


def evaluate(
    model: AdaptedModel,
    tasks: Mapping[str, Task],
    options: PredictOptions,
    *,
    with_task_id: bool = False,
    progress: bool | None = None,
) -> Evaluation:
    """Answer the rows of all tasks as one mixed stream and compute accuracies.

    Args:
        with_task_id: give each row its oracle task ID (the paper's SLM-TI).

    Raises:
        InputError, WorkError: as for `mark`.
    """
    return tally(mark(model, tasks, options, with_task_id=with_task_id, progress=progress))


def mark(
    model: AdaptedModel,
    tasks: Mapping[str, Task],
    options: PredictOptions,
    *,
    with_task_id: bool = False,
    progress: bool | None = None,
) -> list[Marked]:
    """Answer the rows of all tasks, in order, and mark each answer as right or wrong.

    Raises:
        InputError: there are no tasks, one is not learned, or `with_task_id` is neither True nor False.
        WorkError: a row's label is not one of the task's.
    """
    check_switch("with_task_id", with_task_id)
    if not tasks:
        raise InputError("evaluate: no tasks given")
    rows: list[Row] = []
    names: list[str] = []
    known = {task.name: task for task in model.pool.tasks}
    for name, task in tasks.items():
        if name not in known:
            raise InputError(f"task {name!r}: not learned; tasks: {some_of(known)}")
        labels = known[name].labels
        task = task.spelled_as(labels or ())
        words = set(labels or ())
        for i, row in enumerate(task.rows, 1):
            if labels is not None and row.target not in words:
                raise WorkError(f"{name}: row {i}: {foreign_label(row.target or '', labels)}")
        rows += task.rows
        names += [name] * len(task.rows)
    predictions = predict(model, rows, options, task=names if with_task_id else None, progress=progress)
    targets: dict[str, str] = {}  # as the tokenizer writes them
    if model.backbone.kind != "encoder":
        texts = sorted({row.target or "" for row in rows})
        longest = options.max_new_tokens + 2  # more than is ever generated
        targets = dict(zip(texts, model.backbone.tokenization.written(texts, longest), strict=True))
    marked = []
    for name, row, prediction in zip(names, rows, predictions, strict=True):
        right = False
        if prediction.label is not None:
            right = prediction.label == row.target
        elif prediction.text is not None:
            right = prediction.text in (row.target, targets[row.target or ""])
        marked.append(Marked(name, row, prediction, right))
    return marked


def tally(marked: Sequence[Marked]) -> Evaluation:
    """Accuracy and routing accuracy of marked rows, with tasks in order of appearance."""
    rows = Counter(one.task for one in marked)
    right = Counter(one.task for one in marked if one.right)
    routed = Counter(one.task for one in marked if one.prediction.task == one.task)
    return Evaluation(
        {name: right[name] / rows[name] for name in rows}, {name: routed[name] / rows[name] for name in rows}
    )


def as_task(learned: LearnedTask | None, name: str, source: Any) -> Task:
    """Make a Task for evaluation from a Task, a file or rows. `learned` is the learned task, for its labels."""
    if isinstance(source, Task):
        return source
    if isinstance(source, (str, Path)):
        return Task.from_file(name, source, known=(learned and learned.labels) or (), training=False)
    free_text = None if learned is None else learned.labels is None
    check_name(name)
    try:
        return Task(name, source, free_text=free_text, training=False)
    except InputError as error:
        raise InputError(f"task {name!r}: {error}") from None
