"""Prediction: mixed batches of any tasks, in any order, without task IDs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import isfinite
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slm_fast.data import Row
from slm_fast.errors import NOT_FINITE, InputError, RowsFailed, WorkError, some_of
from slm_fast.generate import Written
from slm_fast.model import AdaptedModel, Report
from slm_fast.options import PredictOptions
from slm_fast.passes import Batch, Passed, Ready, made_ready, pass_batch, passed_texts
from slm_fast.progress import bar
from slm_fast.reading import Reading
from slm_fast.windows import TaskID, Window, windows_of


@dataclass(frozen=True)
class RouteTaken:
    """The slots that adapted the backbone for a row: ids in the pool, the tasks they belong to, and weights."""

    slots: tuple[int, ...]
    tasks: tuple[str, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Prediction:
    """The answer to one row.

    Attributes:
        task: the task the row was assigned to; None if it was abstained from.
        label: predicted label; None for free text, or if an encoder-only model abstained.
        text: generated text; None if nothing was generated.
        score: probability of the answer; for generated text, the mean over its tokens.
        route: the slots that adapted the backbone.
        truncated: whether the input was cut to max_length.
        probabilities: probabilities of the `top_k` labels of an encoder-only backbone, most probable first, without
            zeros. None for text.
        finish_reason: of generated text (which may be a label): "stop" if it ended, "length" if it was cut at
            max_new_tokens. None if nothing was generated.
        distance: how far the row is from its task: the fraction of the task's training rows that are nearer, or more
            than 1 beyond all of them. Rows with a distance above `abstain` are abstained from. None unless `abstain` or
            `distance` is set.
    """

    task: str | None
    label: str | None
    text: str | None
    score: float
    route: RouteTaken
    truncated: bool = False
    probabilities: Mapping[str, float] | None = None
    finish_reason: str | None = None
    distance: float | None = None


Answer = Prediction | WorkError
Begun = TypeVar("Begun")
Ended = TypeVar("Ended")
NO_SCORE = "its score is not a number"


def predict(
    model: AdaptedModel,
    rows: Sequence[Row],
    options: PredictOptions,
    *,
    task: str | Sequence[str] | None = None,
    progress: bool | None = False,
) -> list[Prediction]:
    """Answer rows of any tasks.

    Args:
        task: oracle task ID, one for all rows or one per row. It masks the pool to that task.

    Raises:
        InputError: a task is unknown, or none is learned yet.
        WorkError: a row cannot be answered, such as one whose query is not finite.
    """
    if task is not None and not isinstance(task, str):
        try:
            task = list(task)
        except TypeError:
            raise InputError(f"task: expected a name, or one for each row, got {task!r}") from None
        if len(task) != len(rows):
            raise InputError(f"task: {len(task)} names for {len(rows)} rows")
    with bar("predicting", len(rows), progress) as advance, model.pinned():
        _check_learned(model, [task] if isinstance(task, str) else task or ())
        return list(_good(answer(model, windows_of(rows, task), options, advance)))


def predict_stream(
    model: AdaptedModel, rows: Iterable[Row], options: PredictOptions, *, task: str | None = None
) -> Iterator[Prediction]:
    """Yield answers in the order of the rows, holding at most two windows of rows in memory. Each window is answered
    with the tasks that are known then. Raises InputError if the task is unknown."""
    _check_learned(model, () if task is None else [task])
    return _good(answer(model, windows_of(rows, task), options))


def _check_learned(model: AdaptedModel, names: Iterable[object]) -> None:
    for name in names:
        if not isinstance(name, str) or name not in model.pool.place:
            raise InputError(f"task {name!r}: not learned; tasks: {some_of(model.pool.names)}")


def _good(windows: Iterable[list[Answer]]) -> Iterator[Prediction]:
    number = 0
    for window in windows:
        for found in window:
            number += 1
            if isinstance(found, WorkError):
                raise WorkError(f"row {number}: {found}")
            yield found


def probabilities(answers: Sequence[Prediction], words: Sequence[str]) -> NDArray[np.float32]:
    """Label probabilities of answers with `top_k=None`, [N, C] float32, columns in the order of `words`."""
    column = {word: i for i, word in enumerate(words)}
    found = np.zeros((len(answers), len(words)), np.float32)
    for row, answer in zip(found, answers, strict=True):
        for word, probability in (answer.probabilities or {}).items():
            row[column[word]] = probability
    return found


def answer(
    model: AdaptedModel, windows: Iterable[Window | None], options: PredictOptions, report: Report | None = None
) -> Iterator[list[Answer]]:
    """Yield the answers of each window, in order. A row that fails has its error as its answer.

    A thread tokenises and batches the next window while this one is answered. Batches depend on the windows and options
    alone, so answering the same input again gives the same bits.

    Args:
        report: called with the number of rows just done.
    """
    with ThreadPoolExecutor(1, "tokenise") as worker:

        def begin(window: Window) -> Future[Ready]:
            return worker.submit(made_ready, model, window, options)

        yield from in_order(windows, begin, lambda ready: _answers(model, ready.result(), options, report), 2)


def in_order(
    windows: Iterable[Window | None], begin: Callable[[Window], Begun], end: Callable[[Begun], Ended], most: int
) -> Iterator[Ended]:
    """Yield the result of each window, in order, beginning up to `most` windows before the first one is ended.

    A None among the windows announces a possible wait for the next one: those begun before it are ended first. The same
    happens if reading fails.
    """
    waiting: deque[Begun] = deque()
    windows, failed, more = iter(windows), None, True
    while more or waiting:
        pause = False
        try:
            if more:
                window = next(windows)
                if window is None:
                    pause = True
                else:
                    waiting.append(begin(window))
                del window  # texts may be long, and are not needed once tokenised
        except StopIteration:
            more = False
        except Exception as error:  # rows read before the error are answered first
            failed, more = error, False
        while len(waiting) == most or (waiting and (pause or not more)):
            yield end(waiting.popleft())
    if failed is not None:
        raise failed


def answer_batch(
    model: AdaptedModel,
    rows: Sequence[Row],
    readings: Sequence[Reading],
    options: PredictOptions,
    task: TaskID = None,
) -> list[Answer]:
    """Answer tokenised rows in one batch. `task` is one name, or one for each row."""
    batch = Batch(list(range(len(rows))), list(rows), model.collate(readings))
    return _answers(model, Ready(0, len(rows), task, {}, [batch]), options, None)


def answer_written(
    model: AdaptedModel, row: Row, reading: Reading, written: Written, distance: Tensor | None
) -> Answer:
    """The answer for one row whose text has been generated. `distance` is [1]."""
    passed = passed_texts(model, Batch([0], [row], model.collate([reading])), written, distance)
    return WorkError(written.failed[0]) if written.failed else next(_predictions(model, passed))


@torch.inference_mode()
def _answers(model: AdaptedModel, window: Ready, options: PredictOptions, report: Report | None) -> list[Answer]:
    answers: dict[int, Answer] = dict(window.errors)
    report = report or (lambda _: None)
    report(len(answers))
    passed: list[Passed] = []
    with model.lock:  # tasks must not change within a window
        waiting = list(reversed(window.batches))
        while waiting:
            batch = waiting.pop()
            if not batch.places:
                continue
            try:
                passed += pass_batch(model, window, batch, options, report)
            except RowsFailed as error:  # they do not fail the others
                answers.update((batch.places[i], WorkError(error.reason)) for i in error.rows)
                waiting.append(batch.without(*error.rows))
                report(len(error.rows))
        for one in passed:
            answers.update(zip(one.batch.places, _predictions(model, one), strict=True))
            failed = one.failed
            if one.finite is not None:
                failed = dict.fromkeys((~one.finite).nonzero()[:, 0].tolist(), NOT_FINITE)
            answers.update((one.batch.places[i], WorkError(reason)) for i, reason in failed.items())
    return [answers[i] for i in range(window.rows)]


def _predictions(model: AdaptedModel, passed: Passed) -> Iterator[Answer]:
    columns = (passed.route.slot_ids.tolist(), passed.route.weights.tolist(), passed.winner.tolist())
    scores = passed.score.tolist() if isinstance(passed.score, Tensor) else [[score] for score in passed.score]
    words = [[-1]] * len(scores) if passed.words is None else passed.words.tolist()
    nothing: list[None] = [None] * len(scores)
    texts = zip(passed.texts or nothing, passed.finish_reasons or nothing, strict=True)
    cut, heads = passed.batch.encoded.truncated, model.pool.heads
    distances = nothing if passed.distance is None else passed.distance.tolist()
    each = zip(*columns, scores, words, texts, cut, distances, strict=True)
    for ids, weights, winner, score, word, written, truncated, distance in each:
        text, finish_reason = written
        route = taken(model, ids, weights)
        task = model.pool.tasks[winner] if route.slots else None
        name = None if task is None else task.name
        if text is None and (task is None or heads is None):
            yield Prediction(None, None, None, 0.0, route, truncated, {}, distance=distance)
        elif not all(map(isfinite, (score[0], *route.weights))):
            yield WorkError(NO_SCORE)
        elif text is not None:  # a generated text may be one of the task's labels
            label = None if task is None else model.label_of(task, text)
            yield Prediction(
                name, label, text, score[0], route, truncated, finish_reason=finish_reason, distance=distance
            )
        else:
            assert heads is not None
            names = [heads.words[i] for i in word]
            probabilities = {label: p for label, p in zip(names, score, strict=True) if p > 0}
            yield Prediction(name, names[0], None, score[0], route, truncated, probabilities, distance=distance)


def taken(model: AdaptedModel, ids: Sequence[int], weights: Sequence[float]) -> RouteTaken:
    used = [(slot, weight) for slot, weight in zip(ids, weights, strict=True) if slot >= 0]
    return RouteTaken(
        tuple(slot for slot, _ in used),
        tuple(model.pool.slot_names[slot] for slot, _ in used),
        tuple(weight for _, weight in used),
    )
