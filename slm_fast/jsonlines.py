"""JSON Lines in, JSON Lines out: what `slm-fast predict` reads and writes for each row, in input order."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from itertools import islice
from typing import IO, Any

from slm_fast.errors import WorkError, one_line
from slm_fast.infer import WINDOW, Prediction, PredictOptions, predict
from slm_fast.slm import ScalableLM
from slm_fast.tasks import Row


def answer_lines(
    slm: ScalableLM, source: IO[bytes], task: str | None, options: PredictOptions
) -> Iterator[dict[str, Any]]:
    """An answer or an error for each line that is not blank, in order, holding one window of rows at a time.

    A row without an id gets the number of its line.
    """
    lines = ((number, line) for number, line in enumerate(source, 1) if line.strip())
    answered_before, failed = 0, None
    while failed is None:
        window: list[tuple[int, bytes]] = []
        try:
            for numbered in islice(lines, WINDOW):
                window.append(numbered)
        except (EOFError, OSError, zlib.error) as error:  # what was read before it is answered first
            failed = WorkError(f"the input breaks off: {one_line(error)}")
        if not window and failed is None:
            return
        records: list[dict[str, Any]] = []
        rows: list[Row] = []
        for number, line in window:
            record: dict[str, Any] = {"id": number}
            try:
                value = json.loads(line.decode("utf-8"), parse_constant=_refuse)
                if isinstance(value, dict):
                    json.dumps(value.get("id"), ensure_ascii=False).encode()  # half a character cannot be written
                    record["id"] = value.get("id", number)
                rows.append(Row.parse(value))
            except UnicodeEncodeError:
                record["error"] = "'id': holds half a character"
            except UnicodeDecodeError:
                record["error"] = "not UTF-8"
            except (ValueError, RecursionError) as error:
                record["error"] = f"not JSON: {error}"
            except WorkError as error:
                record["error"] = str(error)
            records.append(record)
        answered = iter(_predict_each(slm, rows, task, options, answered_before))
        answered_before += len(rows)
        for record in records:
            yield record if "error" in record else record | next(answered)
    raise failed


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _predict_each(
    slm: ScalableLM, rows: list[Row], task: str | None, options: PredictOptions, offset: int
) -> list[dict[str, Any]]:
    """Answers as JSON objects; when a row makes its batch fail, it is found by answering the rows one at a time."""
    try:
        return [_as_json(answer) for answer in predict(slm.model, rows, options, task=task, offset=offset)]
    except WorkError as error:
        if len(rows) == 1:
            return [{"error": str(error)}]
        alone = (_predict_each(slm, [row], task, options, offset + i) for i, row in enumerate(rows))
        return [answer for answers in alone for answer in answers]


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
