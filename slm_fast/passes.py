"""Tokenised windows of rows, and their passes through the backbone, for heads or for text generation."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from slm_fast import encoder_graphs
from slm_fast.batching import length_buckets, token_budget
from slm_fast.data import Row
from slm_fast.errors import InputError, RowsFailed, WorkError, some_of
from slm_fast.generate import Written, generate
from slm_fast.heads import Heads
from slm_fast.model import AdaptedModel, Report
from slm_fast.ops import Route
from slm_fast.options import PredictOptions
from slm_fast.pool import emptied
from slm_fast.query import TrunkQuery
from slm_fast.reading import reread
from slm_fast.scheduler import row_seed
from slm_fast.tokenization import Encoded
from slm_fast.windows import TaskID, Window


@dataclass(frozen=True)
class Batch:
    """Rows that pass together, their indices in the window, and their tokens."""

    places: list[int]
    rows: list[Row]
    encoded: Encoded

    def some(self, kept: Sequence[int]) -> Batch:
        """A batch of some of its rows."""
        return Batch([self.places[i] for i in kept], [self.rows[i] for i in kept], self.encoded.rows(kept))

    def without(self, *rows: int) -> Batch:
        """A batch of all its rows but these."""
        gone = set(rows)
        return self.some([i for i in range(len(self.places)) if i not in gone])


@dataclass(frozen=True)
class Ready:
    """A tokenised window.

    Attributes:
        first, task: the window's.
        rows: number of rows.
        errors: of rows that could not be read, by index.
    """

    first: int
    rows: int
    task: TaskID
    errors: Mapping[int, WorkError]
    batches: Sequence[Batch]


def tokens_of_a_batch(model: AdaptedModel, options: PredictOptions) -> int:
    """Maximum tokens of a batch, including padding."""
    backbone = model.backbone
    return options.batch_tokens or token_budget(backbone.device.type, backbone.kind, backbone.width)


def made_ready(model: AdaptedModel, window: Window, options: PredictOptions) -> Ready:
    errors = {i: row for i, row in enumerate(window.rows) if isinstance(row, WorkError)}
    return Ready(window.first, len(window.rows), window.task, errors, _batches(model, window, options))


def _batches(model: AdaptedModel, window: Window, options: PredictOptions) -> list[Batch]:
    """The window's rows in batches. For text generation there is only one, whose rows the scheduler runs in turn."""
    places = [i for i, row in enumerate(window.rows) if isinstance(row, Row)]
    given = [row for row in window.rows if isinstance(row, Row)]
    readings = model.tokenize(given)
    if model.backbone.kind == "encoder":
        lengths = [len(reading.ids) for reading in readings]
        few = model.backbone.device.type != "cpu"  # for `encoder_graphs`
        chosen = length_buckets(lengths, tokens_of_a_batch(model, options), options.batch_size, few=few)
    else:
        chosen = [list(range(len(readings)))] if readings else []
    return [
        Batch([places[i] for i in rows], [given[i] for i in rows], model.collate([readings[i] for i in rows]))
        for rows in chosen
    ]


def _rows_at_once(model: AdaptedModel, longest: int, options: PredictOptions) -> int:
    """How many rows generate text together: as many as a batch's tokens allow."""
    tokens = options.beams * (longest + options.max_new_tokens)
    rows = max(1, tokens_of_a_batch(model, options) // tokens)
    rows = rows if options.batch_size is None else min(rows, options.batch_size)
    return min(rows, model.known.most_rows or rows)


@dataclass(frozen=True)
class Passed:
    """A batch after its pass. Its tensors stay on the device, so that a GPU need not wait while they are read."""

    batch: Batch
    route: Route  # [B, K]
    winner: Tensor  # [B] task with the largest weight on the route
    score: list[float] | Tensor  # [B], or [B, W] of the most probable words
    words: Tensor | None = None  # [B, W] indices in the heads' words
    texts: list[str] | None = None  # if the backbone generates text
    finish_reasons: list[str | None] | None = None  # of the texts
    failed: Mapping[int, str] = field(default_factory=dict)  # rows without an answer, and why
    finite: Tensor | None = None  # [B] which queries are, if not checked yet (that waits for a GPU)
    distance: Tensor | None = None  # [B], of the rows from their tasks


def pass_batch(
    model: AdaptedModel, window: Ready, batch: Batch, options: PredictOptions, report: Report
) -> list[Passed]:
    rows, pool = len(batch.places), model.pool
    several = isinstance(window.task, (list, tuple))
    task = [window.task[i] for i in batch.places] if window.task and several else window.task
    slot_mask = _slot_mask(model, task, rows)
    batch = Batch(batch.places, batch.rows, batch.encoded.to(model.backbone.device))
    route = model.empty_route(rows) if options.bare or pool.slots == 0 else None
    if model.backbone.kind != "encoder":
        return _pass_to_write(model, window, batch, route, slot_mask, options, report)
    if pool.heads is None:
        raise InputError(
            "no task is learned yet: an encoder-only backbone has no answer of its own; learn a task first "
            "(slm.learn, slm-fast learn)"
        )
    query = None
    if route is None and (batch.encoded.query_inputs or model.ahead or not isinstance(model.query, TrunkQuery)):
        query = model.find_queries(batch.encoded)
        route = model.route(query, slot_mask)
    if rows > (model.known.most_rows or rows):
        passed = _passed_in_parts(model, batch, query, route, slot_mask, task, options)
    else:
        output = encoder_graphs.forward(model, batch.encoded, route, slot_mask)
        query = output.query if query is None else query
        passed = [_answered(model, batch, (output.mean, output.hidden), query, output.route, task, options)]
        if query is not None and not output.checked:
            passed = [replace(passed[0], finite=query.isfinite().all(1))]
    report(rows)
    return passed


def _passed_in_parts(
    model: AdaptedModel,
    batch: Batch,
    query: Tensor | None,
    route: Route | None,
    slot_mask: Tensor | None,
    task: TaskID,
    options: PredictOptions,
) -> list[Passed]:
    """Pass a batch that may need more tasks' values than fit: all rows pass the lower layers, which find the routes,
    together and once; then groups of rows with the same tasks pass the adapted layers."""
    mask, states = batch.encoded.attention_mask, None
    if route is None:
        states, query = model.lower_states(batch.encoded, mask)
        assert query is not None
        route = model.route(query, slot_mask)
    passed = []
    for rows in model.pool.parts(route):
        part, own = batch.some(rows), Route(route.slot_ids[rows], route.weights[rows])
        with _known_as(rows, len(route.weights)):
            hidden = model.forward(part.encoded, own, states=None if states is None else states[rows]).hidden
        read, found = (TrunkQuery.pool(hidden, mask[rows]), hidden), None if query is None else query[rows]
        names = task if task is None or isinstance(task, str) else [task[i] for i in rows]
        passed.append(_answered(model, part, read, found, own, names, options))
    return passed


@contextmanager
def _known_as(rows: Sequence[int], of: int) -> Iterator[None]:
    """Name rows that fail inside the block, in a pass of `rows` alone, by their indices among the `of` rows of all."""
    try:
        yield
    except RowsFailed as error:
        raise RowsFailed(str(error), [rows[i] for i in error.rows], of, error.reason) from None


def _answered(
    model: AdaptedModel,
    batch: Batch,
    read: tuple[Tensor, Tensor | None],
    query: Tensor | None,
    route: Route,
    task: TaskID,
    options: PredictOptions,
) -> Passed:
    """Answers of heads and router for rows after their pass. read: as for `_marked`. task: the rows' oracle task
    IDs."""
    route, distance = measured(model, query, route, options)
    # With an oracle task ID answers must not depend on other tasks.
    known = None if query is None or task is not None else model.router.label_scores(query, route.slot_ids)
    heads = model.pool.heads_for(route)
    prior = None if known is None or heads is None else heads.prior(*known)
    return _marked(model, batch, read, route, options, heads, prior, distance)


def _marked(
    model: AdaptedModel,
    batch: Batch,
    read: tuple[Tensor, Tensor | None],
    route: Route,
    options: PredictOptions,
    heads: Heads | None = None,
    prior: Tensor | None = None,
    distance: Tensor | None = None,
) -> Passed:
    """Answers of the heads for rows.

    Args:
        read: mean [B, H] of the last hidden states, and all of them [B, T, H].
        heads: those of the route, if known.
    """
    pool, mask = model.pool, batch.encoded.attention_mask
    heads = pool.heads_for(route) if heads is None else heads
    assert heads is not None
    winner = pool.task_weights(route).argmax(1)
    features = heads.features(*read, mask, winner)
    weighed = _winners_alone(model, route, winner) if options.head == "winner" else route
    answer = heads.answer(features, pool.slot_task, weighed, prior)
    if options.top_k == 1:
        score, words = answer.max(1, keepdim=True)
    else:  # for equal probabilities the first word comes first, as in max
        score, words = answer.sort(dim=1, descending=True, stable=True)
        score, words = score[:, : options.top_k], words[:, : options.top_k]
    return Passed(batch, route, winner, score, words, distance=distance)


def measured(
    model: AdaptedModel, query: Tensor | None, route: Route, options: PredictOptions
) -> tuple[Route, Tensor | None]:
    """The route, emptied for rows that are abstained from, and the rows' distances from their tasks [B], if
    requested."""
    if query is None or not options.measures:
        return route, None
    distance = model.distance(query, route)
    share = options.abstain_share
    return (route if share is None else emptied(route, distance > share)), distance


def _pass_to_write(
    model: AdaptedModel,
    window: Ready,
    batch: Batch,
    route: Route | None,
    slot_mask: Tensor | None,
    options: PredictOptions,
    report: Report,
) -> list[Passed]:
    """Generate texts for the rows of a window; rows that an imported task's head answers get labels."""
    rows, at_once = len(batch.places), _rows_at_once(model, batch.encoded.input_ids.shape[1], options)
    distance = None
    if route is None and (batch.encoded.query_inputs or options.measures or model.ahead):
        parts = [
            model.find_queries(batch.encoded.rows(range(start, min(start + at_once, rows))))
            for start in range(0, rows, at_once)
        ]
        query = torch.cat(parts)
        route, distance = measured(model, query, model.route(query, slot_mask), options)
    if route is None or model.pool.imported is None:
        return [_write(model, window, batch, route, slot_mask, options, report, distance)]
    best = [model.pool.tasks[i] for i in model.pool.slot_task[route.slot_ids[:, 0].clamp(min=0)].tolist()]
    tasks = [task if slot >= 0 else None for task, slot in zip(best, route.slot_ids[:, 0].tolist(), strict=True)]
    adapters = [task.adapter if task else None for task in tasks]
    if model.backbone.kind == "causal":
        limit = model.config.max_length or 0
        try:
            encoded = reread(batch.rows, adapters, batch.encoded, model.backbone.tokenization, limit)
        except RowsFailed as error:
            task = tasks[error.rows[0]]
            raise RowsFailed(f"task {task.name if task else ''!r}: {error}", error.rows, error.of) from None
        batch = Batch(batch.places, batch.rows, encoded)
    marked = [i for i, task in enumerate(tasks) if task and task.head]
    written = [i for i in range(rows) if i not in set(marked)]
    passed = []
    for start in range(0, len(marked), at_once):
        some = marked[start : start + at_once]
        part, own = batch.some(some), Route(route.slot_ids[some], route.weights[some])
        with _known_as(some, rows):
            hidden = model.forward(part.encoded, own).hidden
        far = None if distance is None else distance[some]
        read = TrunkQuery.pool(hidden, part.encoded.attention_mask), hidden
        passed.append(_marked(model, part, read, own, options, distance=far))
    report(len(marked))
    if written:
        own, far = (
            Route(route.slot_ids[written], route.weights[written]),
            None if distance is None else distance[written],
        )
        ends = [adapter.ends if (adapter := adapters[i]) else () for i in written]
        passed.append(_write(model, window, batch.some(written), own, None, options, report, far, ends))
    return passed


def _write(
    model: AdaptedModel,
    window: Ready,
    batch: Batch,
    route: Route | None,
    slot_mask: Tensor | None,
    options: PredictOptions,
    report: Report,
    distance: Tensor | None,
    ends: Sequence[Collection[int]] = (),
) -> Passed:
    """Generate texts, for as many rows at once as fit a batch. ends: further end tokens of each row, besides the
    backbone's."""
    at_once = _rows_at_once(model, batch.encoded.input_ids.shape[1], options)
    seeds = [row_seed(options.seed, window.first + place) for place in batch.places]
    written = generate(
        model,
        batch.encoded,
        options,
        seeds=seeds,
        max_rows=at_once,
        route=route,
        slot_mask=slot_mask,
        ends=ends,
        report=report,
    )
    return passed_texts(model, batch, written, distance)


def passed_texts(model: AdaptedModel, batch: Batch, written: Written, distance: Tensor | None) -> Passed:
    """A batch whose texts have been generated. distance: [B], of the rows from their tasks, if requested."""
    pool, route = model.pool, written.route
    winner = pool.task_weights(route).argmax(1) if pool.slots else torch.zeros(len(route.weights), dtype=torch.int64)
    return Passed(
        batch,
        route,
        winner,
        written.scores,
        texts=written.texts,
        finish_reasons=written.finish_reasons,
        failed=written.failed,
        distance=distance,
    )


def _slot_mask(model: AdaptedModel, task: str | Sequence[str] | None, rows: int) -> Tensor | None:
    if task is None:
        return None
    names = [task] * rows if isinstance(task, str) else list(task)
    for name in names:
        if name not in model.pool.place:
            raise InputError(f"task {name!r}: not learned; tasks: {some_of(model.pool.names)}")
    places = torch.tensor([model.pool.place[name] for name in names], device=model.pool.device)
    return model.pool.slot_task == places[:, None]  # [B, P]


def _winners_alone(model: AdaptedModel, route: Route, winner: Tensor) -> Route:
    """The route with weights on the best task's slots only, summing to 1."""
    own = model.pool.slot_task[route.slot_ids.clamp(min=0)] == winner[:, None]
    kept = route.weights * own
    return Route(route.slot_ids, kept / kept.sum(1, keepdim=True).clamp(min=1e-12))
