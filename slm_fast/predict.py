"""Answering: mixed batches of any tasks in any order, with no task-ID."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from slm_fast.batching import length_buckets, token_budget
from slm_fast.data import Row
from slm_fast.errors import InputError, WorkError, some_of
from slm_fast.generate import Written, generate
from slm_fast.model import AdaptedModel, Reading, Report
from slm_fast.ops import Route
from slm_fast.options import PredictOptions
from slm_fast.pool import emptied
from slm_fast.progress import bar
from slm_fast.query import TrunkQuery
from slm_fast.router import NotFinite
from slm_fast.tokenization import Encoded
from slm_fast.windows import TaskID, Window, windows_of


@dataclass(frozen=True)
class RouteTaken:
    """Which slots adapted the backbone for a row: ids in the pool, the tasks they belong to, and their weights."""

    slots: tuple[int, ...]
    tasks: tuple[str, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Prediction:
    """The answer to one row.

    Attributes:
        task: the task it was taken for; None when the row was abstained from.
        label: the answer as a label word; None when it is free text, or an encoder-only model abstained.
        text: what a generating backbone wrote, else None.
        score: the answer's probability, for text the mean over its tokens.
        route: which slots adapted the backbone.
        probabilities: of an encoder-only backbone's `top_k` labels, the most probable first; those of probability 0 are
            left out. None for text.
        truncated: the input was cut to max_length.
        distance: how unlike its task the row is: the share of the task's training rows that are nearer to it, more than
            1 beyond all of them. A row whose distance exceeds `abstain` is abstained from. None unless `abstain` or
            `distance` asks for it.
        finish_reason: of a written text (which may be a label word): "stop" where it ended, "length" where it was cut
            at max_new_tokens. None where nothing was written.
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
NOT_FINITE = "its query holds a number that is not finite"
NO_SCORE = "its score is not a number"


def predict(
    model: AdaptedModel,
    rows: Sequence[Row],
    options: PredictOptions,
    *,
    task: str | Sequence[str] | None = None,
    progress: bool | None = False,
) -> list[Prediction]:
    """Answer rows of any tasks. `task` (one name, or one for each row) masks the pool to that task: a given task-ID.

    Raises:
        InputError: an unknown task, or no task learned yet. WorkError: a row's query is not finite.
    """
    if task is not None and not isinstance(task, str):
        try:
            task = list(task)
        except TypeError:
            raise InputError(f"task: expected a name, or one for each row, got {task!r}") from None
        if len(task) != len(rows):
            raise InputError(f"task: {len(task)} names for {len(rows)} rows")
    elif task is not None and task not in model.pool.names:
        raise InputError(f"task {task!r}: not learned; tasks: {some_of(model.pool.names)}")
    with bar("predicting", len(rows), progress) as advance, model.pinned():
        return list(_good(answer(model, windows_of(rows, task), options, advance)))


def predict_stream(
    model: AdaptedModel, rows: Iterable[Row], options: PredictOptions, *, task: str | None = None
) -> Iterator[Prediction]:
    """Answers in the order of the rows, holding no more than two windows of them."""
    yield from _good(answer(model, windows_of(rows, task), options))


def _good(windows: Iterable[list[Answer]]) -> Iterator[Prediction]:
    number = 0
    for window in windows:
        for found in window:
            number += 1
            if isinstance(found, WorkError):
                raise WorkError(f"row {number}: {found}")
            yield found


def answer(
    model: AdaptedModel, windows: Iterable[Window | None], options: PredictOptions, report: Report | None = None
) -> Iterator[list[Answer]]:
    """The answers of each window, in order; a row that fails has its error there. `report` is told of rows done.

    A thread tokenises the next window and makes its batches while this one is answered; None among the windows says
    that the next one may be long in coming. Which rows share a batch follows from the windows and the options alone, so
    answering the same input again gives the same bits.
    """
    waiting: deque[Future[_Ready]] = deque()
    windows, failed, more = iter(windows), None, True
    with ThreadPoolExecutor(1, "tokenise") as worker:
        while more or waiting:
            pause = False
            try:
                if more:
                    window = next(windows)
                    if window is None:
                        pause = True
                    else:
                        waiting.append(worker.submit(_ready, model, window, options))
                    del window  # its texts may be long, and are not needed once they are tokens
            except StopIteration:
                more = False
            except Exception as error:  # what was read before it is answered first
                failed, more = error, False
            while len(waiting) == 2 or (waiting and (pause or not more)):
                yield _answers(model, waiting.popleft().result(), options, report)
    if failed is not None:
        raise failed


@dataclass(frozen=True)
class _Batch:
    """Rows that pass together: their places in the window, and their tokens."""

    places: list[int]
    encoded: Encoded

    def without(self, row: int) -> _Batch:
        """All of its rows but one."""
        kept = [i for i in range(len(self.places)) if i != row]
        return _Batch([self.places[i] for i in kept], self.encoded.rows(kept))


@dataclass(frozen=True)
class _Ready:
    """A window whose rows are tokens.

    first, task: the window's. rows: how many it has. errors: of those that could not be read, by their places.
    """

    first: int
    rows: int
    task: TaskID
    errors: Mapping[int, WorkError]
    batches: Sequence[_Batch]


def answer_batch(
    model: AdaptedModel, readings: Sequence[Reading], options: PredictOptions, task: TaskID = None
) -> list[Answer]:
    """The answers to rows that are tokens already, passed together. task: one name, or one for each row."""
    batch = _Batch(list(range(len(readings))), model.collate(readings))
    return _answers(model, _Ready(0, len(readings), task, {}, [batch]), options, None)


def answer_written(model: AdaptedModel, reading: Reading, written: Written, distance: Tensor | None) -> Answer:
    """The answer that a text is, written for one row. distance: [1]"""
    passed = _written(model, _Batch([0], model.collate([reading])), written, distance)
    return WorkError(NOT_FINITE) if written.failed else next(_predictions(model, passed))


def tokens_of_a_batch(model: AdaptedModel, options: PredictOptions) -> int:
    """The tokens of a batch, padding included."""
    backbone = model.backbone
    return options.batch_tokens or token_budget(backbone.device.type, backbone.kind, backbone.width)


def _ready(model: AdaptedModel, window: Window, options: PredictOptions) -> _Ready:
    errors = {i: row for i, row in enumerate(window.rows) if isinstance(row, WorkError)}
    return _Ready(window.first, len(window.rows), window.task, errors, _batches(model, window, options))


def _batches(model: AdaptedModel, window: Window, options: PredictOptions) -> list[_Batch]:
    """The window's rows in batches. Rows to write texts for are one: the scheduler has them take turns."""
    places = [i for i, row in enumerate(window.rows) if isinstance(row, Row)]
    readings = model.tokenize([row for row in window.rows if isinstance(row, Row)])
    if model.backbone.kind == "encoder":
        lengths = [len(reading.ids) for reading in readings]
        chosen = length_buckets(lengths, tokens_of_a_batch(model, options), options.batch_size)
    else:
        chosen = [list(range(len(readings)))] if readings else []
    return [_Batch([places[i] for i in rows], model.collate([readings[i] for i in rows])) for rows in chosen]


def _rows_at_once(model: AdaptedModel, longest: int, options: PredictOptions) -> int:
    """How many rows write their texts together: as many as a batch's tokens allow."""
    tokens = options.beams * (longest + options.max_new_tokens)
    rows = max(1, tokens_of_a_batch(model, options) // tokens)
    return rows if options.batch_size is None else min(rows, options.batch_size)


@torch.inference_mode()
def _answers(model: AdaptedModel, window: _Ready, options: PredictOptions, report: Report | None) -> list[Answer]:
    answers: dict[int, Answer] = dict(window.errors)
    report = report or (lambda _: None)
    report(len(answers))
    passed = []
    with model.lock:  # the tasks stay the same for a window
        for batch in window.batches:
            while batch.places:
                try:
                    passed.append(_pass(model, window, batch, options, report))
                    break
                except NotFinite as error:  # a row that fails does not take its batch with it
                    answers[batch.places[error.row]] = WorkError(NOT_FINITE)
                    batch = batch.without(error.row)
                    report(1)
        for one in passed:
            answers.update(zip(one.batch.places, _predictions(model, one), strict=True))
            answers.update((one.batch.places[i], WorkError(NOT_FINITE)) for i in one.failed)
    return [answers[i] for i in range(window.rows)]


@dataclass(frozen=True)
class _Passed:
    """A batch that went through the backbone. Its numbers are still where they were computed, so that a GPU need not
    wait while they are read."""

    batch: _Batch
    route: Route  # [B, K]
    winner: Tensor  # [B] the task with the most weight on the route
    score: list[float] | Tensor  # [B], or of the most probable words [B, W]
    words: Tensor | None = None  # [B, W] which of the heads' words they are
    texts: list[str] | None = None  # of a generating backbone
    finish_reasons: list[str | None] | None = None  # of the texts
    failed: Sequence[int] = ()  # rows whose query is not finite
    distance: Tensor | None = None  # [B] of the rows from their tasks


def _pass(model: AdaptedModel, window: _Ready, batch: _Batch, options: PredictOptions, report: Report) -> _Passed:
    rows, pool = len(batch.places), model.pool
    several = isinstance(window.task, (list, tuple))
    task = [window.task[i] for i in batch.places] if window.task and several else window.task
    slot_mask = _slot_mask(model, task, rows)
    encoded = batch.encoded.to(model.backbone.device)
    route = model.empty_route(rows) if options.bare or pool.slots == 0 else None
    if model.backbone.kind != "encoder":
        return _write(model, window, batch, encoded, route, slot_mask, options, report)
    if pool.heads is None:
        raise InputError("no task is learned yet: an encoder-only backbone has no answer of its own")
    query = None
    if route is None and (encoded.query_inputs or not isinstance(model.query, TrunkQuery)):
        query = model.find_queries(encoded)
        route = model.route(query, slot_mask)
    output = model.forward(encoded, route, slot_mask=slot_mask)
    query = output.query if query is None else query
    route, distance = measured(model, query, output.route, options)
    # Where the task is given, its answers are its own, whatever else is learned.
    known = None if query is None or task is not None else model.router.label_scores(query, route.slot_ids)
    prior = None if known is None else pool.heads.prior(*known)
    features = TrunkQuery.pool(output.hidden, encoded.attention_mask)
    winner = pool.task_weights(route).argmax(1)
    weighed = _winners_alone(model, route, winner) if options.head == "winner" else route
    answer = pool.heads.answer(features, pool.slot_task, weighed, prior)
    if options.top_k == 1:
        score, words = answer.max(1, keepdim=True)
    else:  # of equal probabilities the first word, as max has it
        score, words = answer.sort(dim=1, descending=True, stable=True)
        score, words = score[:, : options.top_k], words[:, : options.top_k]
    report(rows)
    return _Passed(batch, route, winner, score, words, distance=distance)


def measured(
    model: AdaptedModel, query: Tensor | None, route: Route, options: PredictOptions
) -> tuple[Route, Tensor | None]:
    """The route, empty for rows that are abstained from, and how far rows are from their tasks [B], if that is asked
    for."""
    if query is None or not options.measures:
        return route, None
    distance = model.distance(query, route)
    share = options.abstain_share
    return (route if share is None else emptied(route, distance > share)), distance


def _write(
    model: AdaptedModel,
    window: _Ready,
    batch: _Batch,
    encoded: Encoded,
    route: Route | None,
    slot_mask: Tensor | None,
    options: PredictOptions,
    report: Report,
) -> _Passed:
    """Texts for the rows of a window, as many at once as fit a batch."""
    rows, at_once = len(batch.places), _rows_at_once(model, encoded.input_ids.shape[1], options)
    distance = None
    if route is None and (encoded.query_inputs or options.measures):
        parts = []
        for start in range(0, rows, at_once):
            part = range(start, min(start + at_once, rows))
            parts.append(model.find_queries(encoded.rows(part)))
        query = torch.cat(parts)
        route, distance = measured(model, query, model.route(query, slot_mask), options)
    # Each row samples from a seed of its own, so that it does not matter which rows run beside it.
    seeds = [options.seed + window.first + place for place in batch.places]
    written = generate(
        model, encoded, options, seeds=seeds, max_rows=at_once, route=route, slot_mask=slot_mask, report=report
    )
    return _written(model, batch, written, distance)


def _written(model: AdaptedModel, batch: _Batch, written: Written, distance: Tensor | None) -> _Passed:
    pool, route, texts, reasons = model.pool, written.route, written.texts, written.finish_reasons
    winner = pool.task_weights(route).argmax(1) if pool.slots else torch.zeros(len(texts), dtype=torch.int64)
    return _Passed(batch, route, winner, written.scores, None, texts, reasons, written.failed, distance)


def _predictions(model: AdaptedModel, passed: _Passed) -> Iterator[Answer]:
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
        elif text is not None:  # a text that is one of the task's label words is a label
            label = None if task is None else model.label_of(task, text)
            yield Prediction(
                name, label, text, score[0], route, truncated, finish_reason=finish_reason, distance=distance
            )
        else:
            assert heads is not None
            names = [heads.words[i] for i in word]
            probabilities = {label: p for label, p in zip(names, score, strict=True) if p > 0}
            yield Prediction(name, names[0], None, score[0], route, truncated, probabilities, distance=distance)


def _slot_mask(model: AdaptedModel, task: str | Sequence[str] | None, rows: int) -> Tensor | None:
    if task is None:
        return None
    names = [task] * rows if isinstance(task, str) else list(task)
    for name in names:
        if name not in model.pool.names:
            raise InputError(f"task {name!r}: not learned; tasks: {some_of(model.pool.names)}")
    return torch.stack([model.pool.slots_of(name) for name in names])


def _winners_alone(model: AdaptedModel, route: Route, winner: Tensor) -> Route:
    """The route with the weights of the best task's slots only, which sum to 1."""
    own = model.pool.slot_task[route.slot_ids.clamp(min=0)] == winner[:, None]
    kept = route.weights * own
    return Route(route.slot_ids, kept / kept.sum(1, keepdim=True).clamp(min=1e-12))


def taken(model: AdaptedModel, ids: Sequence[int], weights: Sequence[float]) -> RouteTaken:
    used = [(slot, weight) for slot, weight in zip(ids, weights, strict=True) if slot >= 0]
    return RouteTaken(
        tuple(slot for slot, _ in used),
        tuple(model.pool.slot_names[slot] for slot, _ in used),
        tuple(weight for _, weight in used),
    )
