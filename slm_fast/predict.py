"""Answering: mixed batches of any tasks in any order, with no task-ID."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from slm_fast.backbone import Encoded
from slm_fast.data import Row
from slm_fast.errors import InputError, WorkError
from slm_fast.model import AdaptedModel, Passage, Report
from slm_fast.ops import Route
from slm_fast.progress import bar
from slm_fast.router import NotFinite
from slm_fast.scheduler import generate

WINDOW = 1024  # rows sorted by length together; two windows are what a stream holds in memory

# Tokens of a batch unless told otherwise: what fills a GPU, and what a processor's caches like, fewer of wider states.
# Writing an answer passes one token a row at a time, so there more rows go together.
BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
WIDTH, FEWEST = 384, 512  # up to which width a processor likes so many, and how many it gets at the least
GENERATING = 4  # times as many


@dataclass(frozen=True)
class RouteTaken:
    """Which slots adapted the backbone for a row: ids in the pool, the tasks they belong to, and their weights."""

    slots: tuple[int, ...]
    tasks: tuple[str, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Prediction:
    """The answer to one row.

    task: the task it was taken for; None when the row was abstained from. label: the answer as a label word (None when
    the answer is free text, or an encoder-only model abstained). text: what a generating backbone wrote, else None.
    score: the answer's probability, for text the mean over its tokens. truncated: the input was cut to max_length.
    """

    task: str | None
    label: str | None
    text: str | None
    score: float
    route: RouteTaken
    truncated: bool = False


@dataclass(frozen=True)
class PredictOptions:
    """How rows are answered.

    batch_tokens: a batch holds as many rows as these allow, padding and the answer's new tokens included; None means
    what suits the device. batch_size: and at most this many rows. max_new_tokens: of a generated answer. head: "mixed"
    weighs the heads of all tasks on the route, "winner" uses the best task's. abstain: answer with the bare backbone
    (or no task) when a row is farther from its task than this share of the task's training rows, True means 0.99. bare:
    always. sample, beams, temperature, top_p, seed: how text is generated.
    """

    batch_size: int | None = None
    max_new_tokens: int = 64
    head: str = "mixed"
    abstain: bool | float = False
    bare: bool = False
    sample: bool = False
    beams: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "batch_tokens", "max_new_tokens", "beams"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.head not in ("mixed", "winner"):
            raise InputError(f"head: expected 'mixed' or 'winner', got {self.head!r}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise InputError(f"temperature: expected a positive number, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: expected more than 0 and at most 1, got {self.top_p}")
        if not 0.0 <= float(self.abstain) <= 1.0:
            raise InputError(f"abstain: expected True, False or a share of 0 to 1, got {self.abstain}")

    @property
    def abstain_share(self) -> float | None:
        return None if self.abstain is False else 0.99 if self.abstain is True else float(self.abstain)

    def generation(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.beams,
            "do_sample": self.sample,
        }
        return options | ({"temperature": self.temperature, "top_p": self.top_p, "top_k": 0} if self.sample else {})


@dataclass(frozen=True)
class Window:
    """Neighbouring rows of an input that are sorted into batches together.

    first: the place in the input of the first of them, from 0. rows: a row that could not be read is the error that
    says why. task: one name, or one for each row, masks the pool: a given task-ID.
    """

    first: int
    rows: Sequence[Row | WorkError]
    task: str | Sequence[str] | None = None


Answer = Prediction | WorkError
NOT_FINITE = "its query holds a number that is not finite"


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
    several = isinstance(task, (list, tuple))
    if several and len(task or ()) != len(rows):
        raise InputError(f"task: {len(task or ())} names for {len(rows)} rows")
    windows = (
        Window(first, rows[first : first + WINDOW], task[first : first + WINDOW] if task and several else task)
        for first in range(0, len(rows), WINDOW)
    )
    with bar("predicting", len(rows), progress) as advance:
        return list(_good(answer(model, windows, options, advance)))


def predict_stream(
    model: AdaptedModel, rows: Iterable[Row], options: PredictOptions, *, task: str | None = None
) -> Iterator[Prediction]:
    """Answers in the order of the rows, holding no more than two windows of them."""
    yield from _good(answer(model, windows_of(rows, task), options))


def windows_of(rows: Iterable[Row | WorkError], task: str | None, first: int = 0) -> Iterator[Window]:
    """Rows in windows, the first row's place being `first`. When reading fails, what was read before is still given."""
    rows = iter(rows)
    failed: Exception | None = None
    while failed is None:
        window: list[Row | WorkError] = []
        try:
            for row in islice(rows, WINDOW):
                window.append(row)
        except Exception as error:
            failed = error
        if not window and failed is None:
            return
        yield Window(first, window, task)
        first += len(window)
    raise failed


def _good(windows: Iterable[list[Answer]]) -> Iterator[Prediction]:
    number = 0
    for window in windows:
        for found in window:
            number += 1
            if isinstance(found, WorkError):
                raise WorkError(f"row {number}: {found}")
            yield found


def answer(
    model: AdaptedModel, windows: Iterable[Window], options: PredictOptions, report: Report | None = None
) -> Iterator[list[Answer]]:
    """The answers of each window, in order; a row that fails has its error there. `report` is told of rows done.

    A thread tokenises the next window and makes its batches while this one is answered. Which rows share a batch
    follows from the windows and the options alone, so answering the same input again gives the same bits.
    """
    waiting: deque[tuple[Window, Future[list[_Batch]]]] = deque()
    windows, failed, more = iter(windows), None, True
    with ThreadPoolExecutor(1, "tokenise") as worker:
        while more or waiting:
            try:
                if more:
                    window = next(windows)
                    waiting.append((window, worker.submit(_batches, model, window, options)))
            except StopIteration:
                more = False
            except Exception as error:  # what was read before it is answered first
                failed, more = error, False
            if len(waiting) == 2 or (waiting and not more):
                window, batches = waiting.popleft()
                yield _window(model, window, batches.result(), options, report)
    if failed is not None:
        raise failed


@dataclass(frozen=True)
class _Batch:
    """Rows that pass together: their places in the window, their tokens, and what their query is found from ahead."""

    places: list[int]
    encoded: Encoded
    ahead: list[list[int] | str]

    def without(self, i: int) -> _Batch:
        """All of its rows but one."""
        kept = [j for j in range(len(self.places)) if j != i]
        encoded = self.encoded
        fewer = Encoded(encoded.input_ids[kept], encoded.attention_mask[kept], [encoded.truncated[j] for j in kept])
        return _Batch([self.places[j] for j in kept], fewer, [self.ahead[j] for j in kept if self.ahead])


def plan(lengths: Sequence[int], budget: int, most: int | None = None) -> list[list[int]]:
    """Rows of these lengths in batches, the longest first. Padded to its longest row, a batch holds at most `budget`
    tokens (or is one row that is longer) and at most `most` rows."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches = []
    while order:
        rows = min(max(1, budget // max(1, lengths[order[0]])), most or len(order))
        batches.append(order[:rows])
        order = order[rows:]
    return batches


def batch_tokens(model: AdaptedModel, options: PredictOptions) -> int:
    """The tokens of a batch, padding included."""
    if options.batch_tokens is not None:
        return options.batch_tokens
    device, width = model.backbone.device.type, model.backbone.width
    if model.backbone.kind != "encoder":
        return GENERATING * BATCH_TOKENS[device]
    return BATCH_TOKENS[device] if device != "cpu" else max(FEWEST, BATCH_TOKENS[device] * WIDTH // max(WIDTH, width))


def _batches(model: AdaptedModel, window: Window, options: PredictOptions) -> list[_Batch]:
    """The window's rows in batches. Rows to write texts for are one: `generate` has them take turns."""
    places = [i for i, row in enumerate(window.rows) if isinstance(row, Row)]
    readings = model.read([row for row in window.rows if isinstance(row, Row)])
    if model.backbone.kind == "encoder":
        chosen = plan([len(r.ids) for r in readings], batch_tokens(model, options), options.batch_size)
    else:
        chosen = [list(range(len(readings)))] if readings else []
    side = "left" if model.backbone.kind == "causal" else "right"
    found = []
    for rows in chosen:
        own = [readings[i] for i in rows]
        encoded = model.backbone.collate([r.ids for r in own], [r.truncated for r in own], side)
        ahead = [r.ids if r.ahead is None else r.ahead for r in own] if any(r.ahead is not None for r in own) else []
        found.append(_Batch([places[i] for i in rows], encoded, ahead))
    return found


def _at_once(model: AdaptedModel, longest: int, options: PredictOptions) -> int:
    """How many rows write their texts together: as many as a batch's tokens allow."""
    tokens = options.beams * (longest + options.max_new_tokens)
    rows = max(1, batch_tokens(model, options) // tokens)
    return rows if options.batch_size is None else min(rows, options.batch_size)


@torch.inference_mode()
def _window(
    model: AdaptedModel,
    window: Window,
    batches: Sequence[_Batch],
    options: PredictOptions,
    report: Report | None,
) -> list[Answer]:
    answers: dict[int, Answer] = {i: row for i, row in enumerate(window.rows) if isinstance(row, WorkError)}
    report = report or (lambda _: None)
    report(len(answers))
    passed = []
    for batch in batches:
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
    return [answers[i] for i in range(len(window.rows))]


@dataclass(frozen=True)
class _Passed:
    """A batch that went through the backbone. Its numbers are still where they were computed, so that a GPU need not
    wait while they are read."""

    batch: _Batch
    route: Route  # [B, K]
    winner: Tensor  # [B] the task with the most weight on the route
    texts: list[str] | None  # of a generating backbone
    score: list[float] | Tensor  # [B]
    word: Tensor | None  # [B] which of the heads' words
    failed: list[int]  # rows whose query is not finite


def _pass(model: AdaptedModel, window: Window, batch: _Batch, options: PredictOptions, report: Report) -> _Passed:
    generates, rows = model.backbone.kind != "encoder", len(batch.places)
    if model.pool.slots == 0 and not generates:
        raise InputError("no task is learned yet: an encoder-only backbone has no answer of its own")
    several = isinstance(window.task, (list, tuple))
    task = [window.task[i] for i in batch.places] if window.task and several else window.task
    slot_mask, share = _slot_mask(model, task, rows), options.abstain_share
    encoded, route = batch.encoded.to(model.backbone.device), None
    at_once = _at_once(model, encoded.input_ids.shape[1], options) if generates else rows
    if options.bare or model.pool.slots == 0:
        route = model.empty_route(rows)
    elif batch.ahead:
        ahead = [batch.ahead[i : i + at_once] for i in range(0, rows, at_once)]
        route = model.find_route(torch.cat([model.query_ahead(part) for part in ahead]), slot_mask, share)
    if not generates:
        passage = Passage(encoded.attention_mask, slot_mask, share)
        with model.passing(passage, model.pool.values, route):
            features = model.features(encoded)
        assert passage.route is not None
        winner = model.pool.task_weights(passage.route).argmax(1)
        score, word = _heads(model, features, passage.route, winner, options.head)
        report(rows)
        return _Passed(batch, passage.route, winner, None, score, word, [])
    # Each row samples from a seed of its own, so that it does not matter which rows run beside it.
    seeds = [options.seed + window.first + place for place in batch.places]
    written = generate(
        model,
        encoded,
        options.generation(),
        seeds=seeds,
        at_once=at_once,
        route=route,
        slot_mask=slot_mask,
        abstain=share,
        report=report,
    )
    found = written.route
    winner = model.pool.task_weights(found).argmax(1) if model.pool.slots else torch.zeros(rows, dtype=torch.int64)
    return _Passed(batch, found, winner, written.texts, written.scores, None, written.failed)


def _predictions(model: AdaptedModel, passed: _Passed) -> Iterator[Prediction]:
    scores = passed.score.tolist() if isinstance(passed.score, Tensor) else passed.score
    words = [-1] * len(scores) if passed.word is None else passed.word.tolist()
    texts = [None] * len(scores) if passed.texts is None else passed.texts
    columns = (passed.route.slot_ids.tolist(), passed.route.weights.tolist(), passed.winner.tolist())
    for ids, weights, winner, score, word, text, cut in zip(
        *columns, scores, words, texts, passed.batch.encoded.truncated, strict=True
    ):
        route = _taken(model, ids, weights)
        task = model.pool.tasks[winner] if route.slots else None
        label: str | None = None
        if text is not None:  # a text that is one of the task's label words is a label
            label = text if task is not None and text in (task.labels or ()) else None
        elif task is not None and model.pool.heads is not None:
            label = model.pool.heads.words[word]
        else:
            score = 0.0
        yield Prediction(None if task is None else task.name, label, text, score, route, cut)


def _slot_mask(model: AdaptedModel, task: str | Sequence[str] | None, rows: int) -> Tensor | None:
    if task is None:
        return None
    names = [task] * rows if isinstance(task, str) else list(task)
    for name in names:
        if name not in model.pool.names:
            raise InputError(f"task {name!r}: not learned; tasks: {', '.join(model.pool.names) or 'none'}")
    return torch.stack([model.pool.slots_of(name) for name in names])


def _heads(model: AdaptedModel, features: Tensor, route: Route, winner: Tensor, head: str) -> tuple[Tensor, Tensor]:
    """The probability of each row's best word, and which word it is."""
    heads = model.pool.heads
    assert heads is not None
    if head == "winner":
        own = model.pool.slot_task[route.slot_ids.clamp(min=0)] == winner[:, None]
        kept = route.weights * own
        route = Route(route.slot_ids, kept / kept.sum(1, keepdim=True).clamp(min=1e-12))
    score, word = heads.answer(features, model.pool.slot_task, route).max(1)
    return score, word


def _taken(model: AdaptedModel, ids: Sequence[int], weights: Sequence[float]) -> RouteTaken:
    used = [(slot, weight) for slot, weight in zip(ids, weights, strict=True) if slot >= 0]
    return RouteTaken(
        tuple(slot for slot, _ in used),
        tuple(model.pool.slot_names[slot] for slot, _ in used),
        tuple(weight for _, weight in used),
    )
