"""Answers to a file or stream of rows, in order, as JSON Lines or Parquet. Interrupted runs can be resumed."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from itertools import chain, islice
from math import isfinite
from numbers import Integral
from pathlib import Path
from typing import IO, Any

from slm_fast import __version__
from slm_fast.columns import Unclear
from slm_fast.data import Row, identified
from slm_fast.errors import InputError, SlmWarning, WorkError, some_of
from slm_fast.labels import shown
from slm_fast.model import AdaptedModel, Report
from slm_fast.options import PredictOptions, check_switch
from slm_fast.parquet_output import ParquetOutput, check_parquet, is_parquet
from slm_fast.passes import tokens_of_a_batch
from slm_fast.predict import Answer, Prediction, answer
from slm_fast.progress import bar, is_shown
from slm_fast.readers import Record, read_records
from slm_fast.resume import Output, check_resumable, check_run_file, digest_of
from slm_fast.schema import WHEN_KNOWN
from slm_fast.streams import Kind, kind_of, line_of, named, open_stream, write_all, wrong_name
from slm_fast.windows import WINDOW, Feed, Window, is_live, windows_of

Source = Path | IO[bytes]
Sink = Path | IO[str]


@dataclass(frozen=True)
class FileAnswered:
    """Row counts: answered before (by an interrupted run), answered now, and failed in either.

    `first_error` names the first failed row and says why.
    """

    before: int
    answered: int
    failed: int
    first_error: str | None = None


@dataclass(frozen=True)
class Reading:
    """How to read a source, if not detected: see `read_records`. `text` is the name of the input column."""

    format: str | None = None
    delimiter: str | None = None
    encoding: str | None = None
    text: str | None = None

    def records(self, source: Source) -> Iterator[Record]:
        columns = () if self.text is None else (self.text,)
        return read_records(
            source, format=self.format, delimiter=self.delimiter, encoding=self.encoding, columns=columns
        )


def check_paths(
    source: Source,
    sink: Sink,
    *,
    overwrite: bool = False,
    reading: Reading | None = None,
    shard: tuple[int, int] | None = None,
) -> None:
    """Raise InputError if `source` cannot be read (as `reading` says) or `sink` cannot be written. Opens nothing for
    writing."""
    if isinstance(source, io.TextIOBase):
        raise InputError("source: expected a binary stream, got one of text")
    for name, given, method in (("source", source, "readline"), ("sink", sink, "write")):
        if not isinstance(given, Path) and not hasattr(given, method):
            raise InputError(f"{name}: expected a path or a stream, got a {type(given).__name__}")
    if isinstance(sink, (io.RawIOBase, io.BufferedIOBase)):
        raise InputError("sink: expected a text stream, got a binary one")
    if isinstance(source, Path) and kind_of(source, missing="no such file") is Kind.FILE:
        _check_columns(source, reading or Reading())
    if shard is not None and not _is_shard(shard):
        raise InputError(f"shard: expected (i, n), integers with i from 1 to n, got {shown(shard)}")
    if shard is not None and not _is_file(source):
        raise InputError("shard: needs a file to read; what comes through a pipe cannot be read by several processes")
    if not isinstance(sink, Path):
        return
    kind = kind_of(sink)
    wrong = wrong_name(sink)
    if wrong and kind is not Kind.STREAM:
        raise InputError(f"{sink}: {wrong}")
    if kind is not Kind.STREAM and is_parquet(sink):
        check_parquet(sink, overwrite=overwrite)
    elif kind is not Kind.STREAM:
        check_run_file(sink)
    if kind is Kind.FILE:
        if isinstance(source, Path) and sink.samefile(source):
            raise InputError(f"{sink}: is the input")
        if not overwrite and sink.stat().st_size and not is_parquet(sink):
            if not _is_file(source):
                raise InputError(f"{sink}: already exists; --overwrite replaces it")
            check_resumable(sink)


def _is_shard(shard: Any) -> bool:
    if not isinstance(shard, (tuple, list)) or len(shard) != 2:
        return False
    whole = all(isinstance(number, Integral) and not isinstance(number, bool) for number in shard)
    return whole and 1 <= shard[0] <= shard[1]


def _check_columns(source: Path, reading: Reading) -> None:
    """Raise InputError if options for reading a file are invalid, or its columns are named, or separated, as no row at
    its beginning has them."""
    records = reading.records(source)
    if reading.text is None and reading.delimiter is None:
        return
    wrong = None
    with warnings.catch_warnings(), suppress(WorkError):  # answering the rows warns, and answers those before an error
        warnings.simplefilter("ignore", SlmWarning)
        for record in islice(records, WINDOW):
            row = identified(record, text=reading.text)[1]
            if isinstance(row, Unclear):
                wrong = wrong or f"{source}: {record.where}: {row}"
            elif record.error is None:
                return
    if wrong:
        raise InputError(wrong)


@dataclass(frozen=True)
class Answering:
    """Answers windows of rows with a fixed set of tasks: a local model, or several remote ones.

    Attributes:
        tasks: names of the known tasks.
        about: everything besides the input that determines the bytes of the answers. None: runs cannot be resumed.
        answer: yields the answers of each window, in order, like `slm_fast.predict.answer`.
    """

    tasks: Sequence[str]
    about: dict[str, Any] | None
    answer: Callable[[Iterator[Window | None], Report], Iterator[list[Answer]]]

    @classmethod
    def of(cls, model: AdaptedModel, options: PredictOptions, files: Mapping[str, str] | None) -> Answering:
        """A local model with the tasks it knows now, in this thread.

        Args:
            files: SHA-256 of each task's file; an interrupted run is resumed only if they are the same. None: never.
        """
        about = None if files is None else what_decides(model, options, files)
        return cls(model.pool.names, about, lambda windows, report: answer(model, windows, options, report))


def predict_file(
    by: Answering,
    source: Source,
    sink: Sink,
    options: PredictOptions,
    *,
    reading: Reading | None = None,
    task: str | None = None,
    shard: tuple[int, int] | None = None,
    strict: bool = False,
    overwrite: bool = False,
    progress: bool | None = None,
) -> FileAnswered:
    """Answer each row of `source` and write an answer or an error to `sink`, in order.

    Memory is bounded by two windows (1,024 rows or 8 MB of text each), or two per model if there are several, whatever
    the input's size. Rows that a program writes to a pipe are answered as soon as it pauses.

    Args:
        source: a file in any format that tasks are read from, a pipe, or a binary stream.
        sink: a file or pipe for JSON Lines (.gz, too), a .parquet file, or a text stream. If source and sink are files,
            repeat an interrupted call to resume it. A .parquet file appears once complete and cannot be resumed.
        reading: how to read `source`, if not detected.
        task: oracle task ID for all rows.
        shard: (i, n): answer the i-th of n parts of a file, i from 1. Parts consist of whole windows, so their
            concatenated outputs equal that of the whole file byte for byte.
        strict: stop at the first bad row.
        overwrite: replace an existing output.

    Raises:
        InputError: a path, a flag or the task is invalid, or the output belongs to another run.
        WorkError: a bad row with `strict`, or the disk is full.
    """
    check_switch("strict", strict)
    check_switch("overwrite", overwrite)
    reading = reading or Reading()
    check_paths(source, sink, overwrite=overwrite, reading=reading, shard=shard)
    if task is not None and task not in by.tasks:
        raise InputError(f"task {task!r}: not learned; tasks: {some_of(by.tasks)}")
    about, rows, first, mine = None, None, 0, None
    if shard is not None:
        sizes = _sizes(source, reading)
        mine = range(len(sizes) * (shard[0] - 1) // shard[1], len(sizes) * shard[0] // shard[1])
        first, rows = sum(sizes[: mine.start]), sum(sizes[mine.start : mine.stop])
    if isinstance(source, Path) and _is_file(source):
        if by.about is not None:
            how = {name: value for name, value in asdict(reading).items() if value is not None}
            about = {"input": digest_of(source), "task": task, "version": __version__, **how}
            about |= by.about | ({"shard": "{}/{}".format(*shard)} if shard else {})
        if rows is None and is_shown(progress):
            rows = _count(reading.records(source))
    with ExitStack() as stack:
        output: Output | ParquetOutput | None = None
        stream: IO[str] | io.FileIO | None = None
        if isinstance(sink, Path) and kind_of(sink) is not Kind.STREAM:
            if is_parquet(sink):
                output = stack.enter_context(ParquetOutput(sink, overwrite=overwrite))
            else:
                output = stack.enter_context(Output(sink, about, overwrite=overwrite))
        else:
            stream = stack.enter_context(open_stream(sink, "wb")) if isinstance(sink, Path) else sink
        before, failed = (output.rows, output.failed) if output else (0, 0)
        first_bad = output.bad if output else None
        if first_bad and strict:
            raise _bad_row(source, first_bad)
        ids: deque[Any] = deque()  # of rows read but not answered yet
        windows = _windows(source, reading, task, ids, stack)
        if shard is not None and mine is not None:
            windows = _part(windows, mine, ids, is_last=shard[0] == shard[1])
        windows, start = _behind(windows, first + before, ids)
        part, answered = first + before - start, 0  # a window partly answered before is answered, and counted, again
        advance = stack.enter_context(bar("predicting", rows, progress, done=start - first))
        for answers in by.answer(windows, advance):
            records = [{"id": ids.popleft()} | as_record(found, options) for found in answers][part:]
            part = 0
            bad = [i for i, record in enumerate(records) if "error" in record]
            if strict and bad:
                records = records[: bad[0] + 1]
            if output:
                output.write(records)
            elif stream:
                _write(stream, sink, "".join(map(line_of, records)))
            if bad:
                first_bad = first_bad or records[bad[0]]
                if strict:
                    raise _bad_row(source, records[bad[0]])
            answered, failed = answered + len(records), failed + len(bad)
    return FileAnswered(before, answered, failed, str(_bad_row(source, first_bad)) if first_bad else None)


def _is_file(source: Source) -> bool:
    """Whether a source is a file that can be read again from the beginning."""
    return isinstance(source, Path) and kind_of(source) is Kind.FILE


def _count(records: Iterator[Record]) -> int:
    """The number of records, up to where the source breaks off."""
    count = 0
    with warnings.catch_warnings(), suppress(WorkError):
        warnings.simplefilter("ignore", SlmWarning)  # answering the rows warns
        for _ in records:
            count += 1
    return count


def _sizes(source: Source, reading: Reading) -> list[int]:
    """The number of rows in each window of a file, up to where it breaks off."""
    sizes: list[int] = []
    with warnings.catch_warnings(), suppress(WorkError), ExitStack() as stack:
        warnings.simplefilter("ignore", SlmWarning)  # answering the rows warns
        for window in _windows(source, reading, None, deque(), stack):
            assert window is not None
            sizes.append(len(window.rows))
    return sizes


def _part(windows: Iterator[Window | None], mine: range, ids: deque[Any], *, is_last: bool) -> Iterator[Window | None]:
    """The windows numbered in `mine`. Only the last part raises the error of a source that breaks off after it."""
    for number, window in enumerate(windows if mine else ()):
        assert window is not None
        if number in mine:
            yield window
        for _ in window.rows if number < mine.start else ():
            ids.popleft()
        if number + 1 == mine.stop and not is_last:
            return


def _windows(
    source: Source, reading: Reading, task: str | None, ids: deque[Any], stack: ExitStack
) -> Iterator[Window | None]:
    """The rows of a source in windows. Appends each row's id (default: its line or row number) to `ids`."""

    def rows(source: Source) -> Iterator[Row | WorkError]:
        for record in reading.records(source):
            name, row = identified(record, text=reading.text)
            ids.append(name)
            yield row

    if isinstance(source, Path) and not _is_file(source):
        source = stack.enter_context(open_stream(source, "rb"))
    if not isinstance(source, Path) and is_live(source):
        return stack.enter_context(Feed(source, rows)).windows(task)
    return windows_of(rows(source), task)


def _behind(windows: Iterator[Window | None], done: int, ids: deque[Any]) -> tuple[Iterator[Window | None], int]:
    """Skip the first `done` rows: the windows from the first that holds a later row, and the row where it begins."""
    for window in windows if done else ():
        assert window is not None  # None only comes from a stream, which cannot be resumed
        if window.first + len(window.rows) > done:
            return chain([window], windows), window.first
        for _ in window.rows:
            ids.popleft()
    return windows, done


def _write(stream: IO[str] | io.FileIO, sink: Sink, lines: str) -> None:
    """Write and flush at once, since a reader may be waiting."""
    if isinstance(stream, io.FileIO):
        write_all(stream, lines.encode(), Path(str(sink)))
        return
    with named(Path("the output")):
        stream.write(lines)
        stream.flush()


def _bad_row(source: Source, record: Mapping[str, Any]) -> WorkError:
    return WorkError(f"{source if isinstance(source, Path) else '-'}: id {record['id']!r}: {record['error']}")


def what_decides(model: AdaptedModel, options: PredictOptions, files: Mapping[str, str]) -> dict[str, Any]:
    """Everything besides the input that determines the bytes of the answers: tasks, options and precision."""
    # The backbone's location does not matter.
    about = {key: value for key, value in model.about.items() if key not in ("backbone", *WHEN_KNOWN)}
    return {
        "store": hashlib.sha256(json.dumps([about, dict(files)], sort_keys=True).encode()).hexdigest(),
        "dtype": str(model.backbone.dtype).removeprefix("torch."),
        "device": model.backbone.device.type,
        **asdict(options),
        "batch_tokens": tokens_of_a_batch(model, options),
    }


def as_record(found: Prediction | WorkError, options: PredictOptions) -> dict[str, Any]:
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
    if options.top_k != 1 and found.probabilities is not None:
        record["probabilities"] = {label: round(p, 6) for label, p in found.probabilities.items()}
    if found.distance is not None and isfinite(found.distance):
        record["distance"] = round(found.distance, 6)
    if found.finish_reason == "length":
        record |= {"finish_reason": "length", "max_new_tokens": options.max_new_tokens}
    return record | ({"truncated": True} if found.truncated else {})
