"""Weights without an answer, through the lower layers only."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from slm_fast.errors import WorkError
from slm_fast.model import AdaptedModel, Reading
from slm_fast.options import PredictOptions
from slm_fast.predict import NOT_FINITE, measured, taken
from slm_fast.router import NotFinite
from slm_fast.server.jobs import Result, Routed


@torch.inference_mode()
def find_routes(model: AdaptedModel, readings: Sequence[Reading], options: PredictOptions) -> list[Result]:
    """The routes of rows that pass together; of one whose query is not finite, the error."""
    found: list[Result] = [WorkError(NOT_FINITE)] * len(readings)
    places = list(range(len(readings)))
    with model.lock:
        while places:
            batch = model.collate([readings[i] for i in places]).to(model.backbone.device)
            try:
                query = model.find_queries(batch)
                route, distance = measured(model, query, model.route(query), options)
            except NotFinite as error:
                places.pop(error.row)
                continue
            far = [None] * len(places) if distance is None else distance.tolist()
            rows = zip(places, route.slot_ids.tolist(), route.weights.tolist(), far, strict=True)
            for place, ids, weights, one in rows:
                found[place] = Routed(taken(model, ids, weights), one, readings[place].truncated)
            break
    return found
