"""JSON Lines in, JSON Lines out: what `slm-fast predict` reads and writes for each row, in input order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import IO, Any

from slm_fast.errors import WorkError
from slm_fast.infer import WINDOW, Prediction
from slm_fast.slm import ScalableLM
from slm_fast.tasks import Row


def answer_lines(
    slm: ScalableLM, source: IO[bytes], task: str | None, options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """An answer or an error for each line that is not blank, in order, holding one window of rows at a time.

    A row without an id gets the number of its line.
    """
    lines = ((number, line) for number, line in enumerate(source, 1) if line.strip())
    while window := list(islice(lines, WINDOW)):
        records: list[dict[str, Any]] = []
        rows: list[Row] = []
        for number, line in window:
            record: dict[str, Any] = {"id": number}
            try:
                value = json.loads(line.decode("utf-8"))
                if isinstance(value, dict):
                    record["id"] = value.get("id", number)
                rows.append(Row.parse(value))
            except UnicodeDecodeError:
                record["error"] = "not UTF-8"
            except (ValueError, RecursionError) as error:
                record["error"] = f"not JSON: {error}"
            except WorkError as error:
                record["error"] = str(error)
            records.append(record)
        answered = iter(_predict_each(slm, rows, task, options))
        for record in records:
            yield record if "error" in record else record | next(answered)


def _predict_each(slm: ScalableLM, rows: list[Row], task: str | None, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Answers as JSON objects; when a row makes its batch fail, it is found by answering the rows one at a time."""
    try:
        return [_as_json(prediction) for prediction in slm.predict(rows, task=task, **options)]
    except WorkError as error:
        if len(rows) == 1:
            return [{"error": str(error)}]
        return [answer for row in rows for answer in _predict_each(slm, [row], task, options)]


def _as_json(prediction: Prediction) -> dict[str, Any]:
    answer = (
        {"text": prediction.text}
        if prediction.label is None and prediction.text is not None
        else {"label": prediction.label}
    )
    route = prediction.route
    taken = zip(route.tasks, route.slots, route.weights, strict=True)
    record = {
        "task": prediction.task,
        **answer,
        "score": round(prediction.score, 6),
        "route": [{"task": task, "slot": slot, "weight": round(weight, 6)} for task, slot, weight in taken],
    }
    return record | ({"truncated": True} if prediction.truncated else {})
