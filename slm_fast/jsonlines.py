"""JSON Lines in, JSON Lines out: what `slm-fast predict` reads and writes for each row, in input order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import IO, Any

from slm_fast.data import Row, identified
from slm_fast.errors import WorkError
from slm_fast.model import Report
from slm_fast.predict import WINDOW, Prediction, PredictOptions, answer, windows_of
from slm_fast.readers import read_records
from slm_fast.slm import ScalableLM


def answer_lines(
    slm: ScalableLM,
    source: IO[bytes],
    task: str | None,
    options: PredictOptions,
    *,
    done: int = 0,
    rows: int | None = None,
    report: Report | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """An answer or an error for each line that is not blank, in order, a window of rows at a time.

    A row without an id gets the number of its line. The first `done` rows, of `rows` in all if that is known, were
    answered before: those that share a window with others are answered again, for the same batches, and left out.
    """
    part = done % WINDOW if done != rows else 0
    first = done - part
    ids: deque[Any] = deque()  # of the rows that were read and not answered yet

    def read() -> Iterator[Row | WorkError]:
        for record in islice(read_records(source), first, None):
            name, row = identified(record)
            ids.append(name)
            yield row

    for answers in answer(slm.model, windows_of(read(), task, first), options, report):
        records = [{"id": ids.popleft()} | _as_json(found) for found in answers]
        yield records[part:]
        part = 0


def _as_json(found: Prediction | WorkError) -> dict[str, Any]:
    if isinstance(found, WorkError):
        return {"error": str(found)}
    labelled = found.label is not None or found.text is None
    route = found.route
    taken = zip(route.tasks, route.slots, route.weights, strict=True)
    record = {
        "task": found.task,
        **({"label": found.label} if labelled else {"text": found.text}),
        "score": round(found.score, 6),
        "route": [{"task": task, "slot": slot, "weight": round(weight, 6)} for task, slot, weight in taken],
    }
    return record | ({"truncated": True} if found.truncated else {})
