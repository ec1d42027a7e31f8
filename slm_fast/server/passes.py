"""What the engine does with a model besides answering: tokenise requests, and find routes without an answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from slm_fast.errors import NOT_FINITE, NotFinite, WorkError
from slm_fast.model import AdaptedModel
from slm_fast.options import PredictOptions
from slm_fast.passes import measured
from slm_fast.predict import taken
from slm_fast.reading import Reading
from slm_fast.server.jobs import Ask, Result, Routed


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
def find_routes(model: AdaptedModel, readings: Sequence[Reading], options: PredictOptions) -> list[Result]:
    """The routes of rows in one batch. A row whose query is not finite gets an error instead."""
    found: list[Result] = [WorkError(NOT_FINITE)] * len(readings)
    places = list(range(len(readings)))
    with model.lock:
        while places:
            batch = model.collate([readings[i] for i in places]).to(model.backbone.device)
            try:
                query = model.find_queries(batch)
                route, distance = measured(model, query, model.route(query), options)
            except NotFinite as error:
                places = [place for i, place in enumerate(places) if i not in error.rows]
                continue
            far = [None] * len(places) if distance is None else distance.tolist()
            rows = zip(places, route.slot_ids.tolist(), route.weights.tolist(), far, strict=True)
            for place, ids, weights, one in rows:
                found[place] = Routed(taken(model, ids, weights), one, readings[place].truncated)
            break
    return found
