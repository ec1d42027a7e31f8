"""What the engine does with a model besides answering: tokenise requests, find routes without an answer, cut
answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from slm_fast.errors import NOT_FINITE, NotFinite, WorkError
from slm_fast.model import AdaptedModel
from slm_fast.ops import Route
from slm_fast.options import PredictOptions
from slm_fast.passes import measured
from slm_fast.predict import Answer, Prediction, taken
from slm_fast.reading import Reading
from slm_fast.server.jobs import Ask, Result, Routed
from slm_fast.server.text import cut_at


def read(model: AdaptedModel, asks: Sequence[Ask]) -> list[Reading]:
    """Tokenise all rows. A chat for the bare backbone uses the backbone's own template.

    Raises:
        WorkError: the template rejects a chat.
    """
    readings = model.tokenize([row for ask in asks for row in ask.rows])
    first, longest = 0, model.config.max_length or 0
    for ask in asks:
        ids = None if ask.chat is None else model.backbone.tokenization.chat(ask.chat)
        if ids is not None:
            readings[first] = Reading(ids[-longest:], len(ids) > longest, None)
        first += len(ask.rows)
    return readings


@torch.inference_mode()
def found_routes(
    model: AdaptedModel, readings: Sequence[Reading], options: PredictOptions, slot_mask: Tensor | None = None
) -> tuple[list[int], Route, Tensor | None]:
    """Routes of rows in one batch: the rows (indices) whose queries are finite, their route, and their distances [B] if
    the options need them. slot_mask: [B, P], the slots that each row may have."""
    places = list(range(len(readings)))
    while places:
        batch = model.collate([readings[i] for i in places]).to(model.backbone.device)
        try:
            query = model.find_queries(batch)
            route = model.route(query, None if slot_mask is None else slot_mask[places])
        except NotFinite as error:
            places = [place for i, place in enumerate(places) if i not in error.rows]
            continue
        return places, *measured(model, query, route, options)
    return [], model.empty_route(0), None


def answer_routes(model: AdaptedModel, readings: Sequence[Reading], options: PredictOptions) -> list[Result]:
    """The routes of rows in one batch, as results. A row whose query is not finite gets an error instead."""
    results: list[Result] = [WorkError(NOT_FINITE)] * len(readings)
    with model.lock:
        places, route, distance = found_routes(model, readings, options)
        far = [None] * len(places) if distance is None else distance.tolist()
        rows = zip(places, route.slot_ids.tolist(), route.weights.tolist(), far, strict=True)
        for place, ids, weights, one in rows:
            results[place] = Routed(taken(model, ids, weights), one, readings[place].truncated)
    return results


def stopped(model: AdaptedModel, answer: Answer, stops: Sequence[str]) -> Answer:
    """A whole answer, with its text cut before the first of these strings."""
    text = cut_at(answer.text, stops) if isinstance(answer, Prediction) and answer.text is not None else None
    if text is None:
        return answer
    assert isinstance(answer, Prediction)
    label = None if answer.task is None else model.label_of(model.pool.tasks[model.pool.place[answer.task]], text)
    return replace(answer, text=text, label=label, finish_reason="stop")
