"""Answers to a file of rows: JSON Lines in, JSON Lines out, in input order; an interrupted run is taken up again."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from slm_fast import __version__
from slm_fast.data import Row, identified
from slm_fast.errors import InputError, WorkError
from slm_fast.model import AdaptedModel, Report
from slm_fast.options import PredictOptions
from slm_fast.predict import WINDOW, Prediction, answer, tokens_of_a_batch, windows_of
from slm_fast.progress import bar
from slm_fast.readers import read_records
from slm_fast.resume import Output, check_resumable, open_input, survey

Source = Path | IO[bytes]
Sink = Path | IO[str]


@dataclass(frozen=True)
class FileAnswered:
    """What became of a file: how many rows were answered before (an interrupted run) and now, and how many failed."""

    before: int
    answered: int
    failed: int


def check_paths(source: Source, sink: Sink, *, overwrite: bool = False) -> None:
    """Raise InputError where reading `source` and writing `sink` cannot be right; nothing is opened for writing."""
    if isinstance(source, Path) and not source.is_file():
        raise InputError(f"{source}: no such file")
    if not isinstance(sink, Path):
        return
    if not sink.parent.is_dir():
        raise InputError(f"{sink}: no such folder")
    if sink.exists():
        if isinstance(source, Path) and sink.samefile(source):
            raise InputError(f"{sink}: is the input")
        if not overwrite and sink.stat().st_size:
            if not isinstance(source, Path):
                raise InputError(f"{sink}: is there already; --overwrite replaces it")
            check_resumable(sink)


def predict_file(
    model: AdaptedModel,
    source: Source,
    sink: Sink,
    options: PredictOptions,
    *,
    files: Mapping[str, str] | None = None,
    task: str | None = None,
    strict: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
) -> FileAnswered:
    """Answer each line of `source` that is not blank and write an answer or an error to `sink`, in order.

    Memory is bounded by two windows of 1,024 rows, whatever the input's size.

    Args:
        source: a file of JSON Lines (.gz too), or a stream of them. sink: a file (.gz too), or a text stream. The same
            call again goes on where an interrupted one stopped, if both are files.
        files: the SHA-256 of each task's file; an interrupted run is only taken up over the same ones. None: never.
        task: take every row for this task.
        strict: stop at the first bad row.
        overwrite: replace an output that is there.

    Raises:
        InputError: a path, the task, or an output of another run. WorkError: a bad row, if strict; a disk that is full.
    """
    check_paths(source, sink, overwrite=overwrite)
    if task is not None and task not in model.pool.names:
        raise InputError(f"task {task!r}: not learned; tasks: {', '.join(model.pool.names) or 'none'}")
    about, rows = None, None
    if isinstance(source, Path) and files is not None:
        digest, rows = survey(source)
        about = {"input": digest, "task": task, "version": __version__, **_what_decides(model, options, files)}
    with ExitStack() as stack:
        lines = stack.enter_context(open_input(source)) if isinstance(source, Path) else source
        output: Output | None = None
        if isinstance(sink, Path) and (sink.is_file() or not sink.exists()):
            output = stack.enter_context(Output(sink, about, overwrite=overwrite))
        stream = (
            stack.enter_context(sink.open("w", encoding="utf-8")) if isinstance(sink, Path) and not output else sink
        )
        before, failed = (output.rows, output.failed) if output else (0, 0)
        if output and output.bad and strict:
            raise _bad_row(source, output.bad)
        answered = 0
        again = before % WINDOW if before != rows else 0  # rows of a window begun are answered, and counted, once more
        advance = stack.enter_context(bar("predicting", rows, progress, done=before - again))
        for records in answer_lines(model, lines, task, options, done=before, rows=rows, report=advance):
            bad = [i for i, record in enumerate(records) if "error" in record]
            if strict and bad:
                records = records[: bad[0] + 1]
            if output:
                output.write(records)
            elif not isinstance(stream, Path):
                stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            if bad and strict:
                raise _bad_row(source, records[bad[0]])
            answered, failed = answered + len(records), failed + len(bad)
    return FileAnswered(before, answered, failed)


def _bad_row(source: Source, record: Mapping[str, Any]) -> WorkError:
    return WorkError(f"{source if isinstance(source, Path) else '-'}: row {record['id']}: {record['error']}")


def _what_decides(model: AdaptedModel, options: PredictOptions, files: Mapping[str, str]) -> dict[str, Any]:
    """What, beside the input, decides every byte of the answers: the tasks, the options and the precision."""
    about = {key: value for key, value in model.about.items() if key != "backbone"}  # where it lies does not count
    return {
        "store": hashlib.sha256(json.dumps([about, dict(files)], sort_keys=True).encode()).hexdigest(),
        "dtype": str(model.backbone.dtype).removeprefix("torch."),
        "device": model.backbone.device.type,
        **asdict(options),
        "batch_tokens": tokens_of_a_batch(model, options),
    }


def answer_lines(
    model: AdaptedModel,
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

    for answers in answer(model, windows_of(read(), task, first), options, report):
        records = [{"id": ids.popleft()} | _as_json(found, options.top_k != 1) for found in answers]
        yield records[part:]
        part = 0


def _as_json(found: Prediction | WorkError, probabilities: bool) -> dict[str, Any]:
    if isinstance(found, WorkError):
        return {"error": str(found)}
    labelled = found.label is not None or found.text is None
    route = found.route
    taken = zip(route.tasks, route.slots, route.weights, strict=True)
    record: dict[str, Any] = {
        "task": found.task,
        **({"label": found.label} if labelled else {"text": found.text}),
        "score": round(found.score, 6),
        "route": [{"task": task, "slot": slot, "weight": round(weight, 6)} for task, slot, weight in taken],
    }
    if probabilities and found.probabilities is not None:
        record["probabilities"] = {label: round(p, 6) for label, p in found.probabilities.items()}
    return record | ({"truncated": True} if found.truncated else {})
