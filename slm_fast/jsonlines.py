"""JSON Lines in, JSON Lines out: what `slm-fast predict` reads and writes for each row, in input order."""

from __future__ import annotations

import json
import zlib
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import IO, Any

from slm_fast.data import Row
from slm_fast.errors import WorkError, one_line
from slm_fast.model import Report
from slm_fast.predict import WINDOW, Prediction, PredictOptions, answer, windows_of
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
    lines = ((number, line) for number, line in enumerate(source, 1) if line.strip())
    part = done % WINDOW if done != rows else 0
    first = done - part
    ids: deque[Any] = deque()  # of the rows that were read and not answered yet

    def read() -> Iterator[Row | WorkError]:
        try:
            for number, line in islice(lines, first, None):
                name, row = _parse(number, line)
                ids.append(name)
                yield row
        except (EOFError, OSError, zlib.error) as error:
            raise WorkError(f"the input breaks off: {one_line(error)}") from None

    for answers in answer(slm.model, windows_of(read(), task, first), options, report):
        records = [{"id": ids.popleft()} | _as_json(found) for found in answers]
        yield records[part:]
        part = 0


def _parse(number: int, line: bytes) -> tuple[Any, Row | WorkError]:
    """A line's id, and its row or what is wrong with it."""
    name: Any = number
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_refuse)
        if isinstance(value, dict):
            json.dumps(value.get("id"), ensure_ascii=False).encode()  # half a character cannot be written
            name = value.get("id", number)
        return name, Row.parse(value)
    except UnicodeEncodeError:
        return name, WorkError("'id': holds half a character")
    except UnicodeDecodeError:
        return name, WorkError("not UTF-8")
    except (ValueError, RecursionError) as error:
        return name, WorkError(f"not JSON: {error}")
    except WorkError as error:
        return name, error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


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
