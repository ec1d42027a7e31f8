"""Answering: mixed batches of any tasks in any order, with no task-ID."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from slm_fast.errors import InputError, WorkError
from slm_fast.generate import generate
from slm_fast.model import AdaptedModel, Passage
from slm_fast.ops import Route
from slm_fast.progress import bar
from slm_fast.router import NotFinite
from slm_fast.tasks import Row

WINDOW = 1024  # rows sorted by length together: what bounds the memory of a stream


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
    """batch_size in rows; max_new_tokens of a generated answer; head: "mixed" weighs the heads of all tasks on the
    route, "winner" uses the best task's; abstain: answer with the bare backbone (or no task) when a row is farther from
    its task than this share of the task's training rows, True means 0.99; bare: always; sample, beams, temperature,
    top_p, seed: how text is generated."""

    batch_size: int = 32
    max_new_tokens: int = 64
    head: str = "mixed"
    abstain: bool | float = False
    bare: bool = False
    sample: bool = False
    beams: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens", "beams"):
            if getattr(self, name) < 1:
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


def predict(
    model: AdaptedModel,
    rows: Sequence[Row],
    options: PredictOptions,
    *,
    task: str | Sequence[str] | None = None,
    progress: bool | None = False,
    offset: int = 0,
) -> list[Prediction]:
    """Answer rows of any tasks. `task` (one name, or one for each row) masks the pool to that task: a given task-ID.

    `offset` is how many rows of the same input were answered before these.

    Raises:
        InputError: an unknown task, or no task learned yet. WorkError: a row's query is not finite.
    """
    if isinstance(task, (list, tuple)) and len(task) != len(rows):
        raise InputError(f"task: {len(task)} names for {len(rows)} rows")
    with bar("predicting", len(rows), progress) as advance:
        found: list[Prediction] = []
        for start in range(0, len(rows), WINDOW):
            names = task[start : start + WINDOW] if isinstance(task, (list, tuple)) else task
            for prediction in _window(model, rows[start : start + WINDOW], options, names, offset + start):
                found.append(prediction)
                advance(1)
    return found


def predict_stream(
    model: AdaptedModel, rows: Iterable[Row], options: PredictOptions, *, task: str | None = None
) -> Iterator[Prediction]:
    """Answers in the order of the rows, holding no more than a window of them."""
    rows = iter(rows)
    failed: Exception | None = None
    offset = 0
    while failed is None:
        window: list[Row] = []
        try:
            for row in islice(rows, WINDOW):
                window.append(row)
        except Exception as error:  # what was read before it is answered first
            failed = error
        if not window and failed is None:
            return
        yield from _window(model, window, options, task, offset)
        offset += len(window)
    raise failed


@torch.inference_mode()
def _window(
    model: AdaptedModel, rows: Sequence[Row], options: PredictOptions, task: str | Sequence[str] | None, offset: int
) -> list[Prediction]:
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt))
    found: list[Prediction | None] = [None] * len(rows)
    # Texts are written by as many rows at once as a batch holds, out of a queue of all of them.
    size = options.batch_size if model.backbone.kind == "encoder" else len(order)
    for start in range(0, len(order), max(size, 1)):
        chosen = order[start : start + size]
        names = [task[i] for i in chosen] if isinstance(task, (list, tuple)) else task
        try:
            # Each row samples from a seed of its own, so that it does not matter which rows run beside it.
            seeds = [options.seed + offset + i for i in chosen]
            answers = _batch(model, [rows[i] for i in chosen], options, names, seeds)
        except NotFinite as error:
            row = offset + chosen[error.row % len(chosen)] + 1
            raise WorkError(f"row {row}: its query holds a number that is not finite") from None
        for i, prediction in zip(chosen, answers, strict=True):
            found[i] = prediction
    return [prediction for prediction in found if prediction is not None]


def _batch(
    model: AdaptedModel,
    rows: Sequence[Row],
    options: PredictOptions,
    task: str | Sequence[str] | None,
    seeds: Sequence[int],
) -> list[Prediction]:
    generates = model.backbone.kind != "encoder"
    if model.pool.slots == 0 and not generates:
        raise InputError("no task is learned yet: an encoder-only backbone has no answer of its own")
    encoded = model.encode(rows, padding_side="left" if model.backbone.kind == "causal" else "right")
    slot_mask = _slot_mask(model, task, len(rows))
    share, route = options.abstain_share, None
    if options.bare or model.pool.slots == 0:
        route = model.empty_route(len(rows))
    elif model.route_ahead(rows):
        route = model.find_route(model.queries(rows, batch_size=options.batch_size), slot_mask, share)
    if generates:
        written = generate(
            model,
            encoded,
            options.generation(),
            seeds=seeds,
            at_once=options.batch_size,
            route=route,
            slot_mask=slot_mask,
            abstain=share,
        )
        if written.failed:
            raise NotFinite(written.failed[0])
        route, texts, scores = written.route, written.texts, written.scores
    else:
        passage = Passage(encoded.attention_mask, slot_mask, share)
        with model.passing(passage, model.pool.values, route):
            features = model.features(encoded)
        route = passage.route
    assert route is not None
    tasks = _tasks(model, route)
    if generates:
        labels = [_as_label(model, name, text) for name, text in zip(tasks, texts, strict=True)]
        answers: list[tuple[str | None, str | None, float]] = list(zip(labels, texts, scores, strict=True))
    else:
        answers = _heads(model, features, route, tasks, options.head)
    return [
        Prediction(name, label, text, score, _taken(model, ids, weights), cut)
        for name, (label, text, score), ids, weights, cut in zip(
            tasks, answers, route.slot_ids.tolist(), route.weights.tolist(), encoded.truncated, strict=True
        )
    ]


def _slot_mask(model: AdaptedModel, task: str | Sequence[str] | None, rows: int) -> Tensor | None:
    if task is None:
        return None
    names = [task] * rows if isinstance(task, str) else list(task)
    for name in names:
        if name not in model.pool.names:
            raise InputError(f"task {name!r}: not learned; tasks: {', '.join(model.pool.names) or 'none'}")
    return torch.stack([model.pool.slots_of(name) for name in names])


def _tasks(model: AdaptedModel, route: Route) -> list[str | None]:
    """The task with the most weight on each row's route, None where the route is empty."""
    if model.pool.slots == 0:
        return [None] * len(route.slot_ids)
    best = model.pool.task_weights(route).argmax(1).tolist()
    empty = (route.slot_ids < 0).all(1).tolist()
    return [None if nothing else model.pool.names[i] for i, nothing in zip(best, empty, strict=True)]


def _heads(
    model: AdaptedModel, features: Tensor, route: Route, tasks: Sequence[str | None], head: str
) -> list[tuple[str | None, str | None, float]]:
    heads = model.pool.heads
    assert heads is not None
    if head == "winner":
        best = model.pool.task_weights(route).argmax(1, keepdim=True)
        own = model.pool.slot_task[route.slot_ids.clamp(min=0)] == best
        kept = route.weights * own
        route = Route(route.slot_ids, kept / kept.sum(1, keepdim=True).clamp(min=1e-12))
    score, word = heads.answer(features, model.pool.slot_task, route).max(1)
    return [
        (None, None, 0.0) if name is None else (heads.words[w], None, s)
        for name, w, s in zip(tasks, word.tolist(), score.tolist(), strict=True)
    ]


def _as_label(model: AdaptedModel, name: str | None, text: str) -> str | None:
    """A generated text that is one of the task's label words is a label."""
    if name is None:
        return None
    labels = model.pool.tasks[model.pool.names.index(name)].labels
    return text if labels is not None and text in labels else None


def _taken(model: AdaptedModel, ids: Sequence[int], weights: Sequence[float]) -> RouteTaken:
    used = [(slot, weight) for slot, weight in zip(ids, weights, strict=True) if slot >= 0]
    return RouteTaken(
        tuple(slot for slot, _ in used),
        tuple(model.pool.slot_names[slot] for slot, _ in used),
        tuple(weight for _, weight in used),
    )
