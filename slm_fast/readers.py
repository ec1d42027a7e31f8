"""Rows as they stand in a file or a stream: CSV, JSON Lines and Parquet, one record after another."""

from __future__ import annotations

import csv
import gzip
import io
import json
import reprlib
import stat
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from slm_fast.errors import InputError, WorkError, one_line
from slm_fast.fields import refuse_constant

FORMATS = ("csv", "jsonl", "parquet")
SUFFIXES = (".csv", ".csv.gz", ".jsonl", ".jsonl.gz", ".parquet")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BATCH = 1024  # rows of a Parquet file that are in memory together

Line = TypeVar("Line", bytes, str)


@dataclass(frozen=True)
class Record:
    """A row as it was read: its fields, and what is wrong with it if anything is.

    place: the line on which it begins or, in a Parquet file, the number of the row; both from 1. unit: "line" or "row".
    """

    place: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    error: WorkError | None = None
    unit: str = "line"

    @property
    def where(self) -> str:
        return f"{self.unit} {self.place}"


def read_records(
    source: str | Path | IO[bytes],
    *,
    format: str | None = None,
    delimiter: str | None = None,
    encoding: str | None = None,
) -> Iterator[Record]:
    """The rows of a file or of a binary stream, in order, but for blank ones. Memory stays bounded.

    A bad row is a record with an error; the rest go on.

    Args:
        source: a path (decompressed if it ends in .gz), or a stream, which is left open.
        format: "csv", "jsonl" or "parquet". None means what the path ends in, and "jsonl" for a stream.

    Raises:
        InputError: no such file, or an unknown format. WorkError: the source cannot be opened or, when that row is
        asked for, read on.
    """
    if not isinstance(source, (str, Path)):
        if format not in (None, "csv", "jsonl"):
            raise InputError(f"format: expected 'csv' or 'jsonl' for a stream, got {format!r}")
        return (_read_csv if format == "csv" else _read_jsonl)(source, "the input")
    path = Path(source)
    if format is None:
        suffix = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
        if suffix not in SUFFIXES:
            raise InputError(f"{path}: unknown format; expected one of {', '.join(SUFFIXES)}")
        format = suffix.split(".")[1]
    elif format not in FORMATS:
        raise InputError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    _check_file(path)
    return _read_parquet(path) if format == "parquet" else _read_text(path, format)


def _check_file(path: Path) -> None:
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        is_file = False
    except OSError as error:
        raise WorkError(f"{path}: cannot be read: {error.strerror}") from None
    if not is_file:
        raise InputError(f"{path}: no such file")


def _read_text(path: Path, format: str) -> Iterator[Record]:
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        file = opened(path, "rb")
    except OSError as error:
        raise WorkError(f"{path}: cannot be read: {error.strerror}") from None
    with file:
        yield from (_read_csv if format == "csv" else _read_jsonl)(file, str(path))


def _unbroken(lines: Iterable[Line], name: str) -> Iterator[Line]:
    """The lines of a file. Raises WorkError where it breaks off."""
    number = 0
    try:
        for number, line in enumerate(lines, 1):  # noqa: B007
            yield line
    except (EOFError, OSError, zlib.error) as error:
        raise WorkError(f"{name}: cannot be read: breaks off after line {number}: {one_line(error)}") from None


# JSON Lines


def _read_jsonl(file: IO[bytes], name: str) -> Iterator[Record]:
    for number, line in enumerate(_unbroken(file, name), 1):
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if line.strip():
            yield _parse_line(number, line)


def _parse_line(number: int, line: bytes) -> Record:
    try:
        value = json.loads(line.decode(), parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        return Record(number, error=_not_utf8(line[error.start]))
    except json.JSONDecodeError as error:
        return Record(number, error=WorkError(f"not JSON: {error.msg} at character {error.pos + 1}"))
    except RecursionError:
        return Record(number, error=WorkError("not JSON: nested too deeply"))
    except ValueError as error:
        return Record(number, error=WorkError(f"not JSON: {one_line(error)}"))
    if isinstance(value, str):  # a text alone
        value = {"text": value}
    if not isinstance(value, dict):
        return Record(number, error=WorkError(f"expected a JSON object, got {reprlib.repr(value)}"))
    return Record(number, value)


def _not_utf8(byte: int) -> WorkError:
    return WorkError(f"not UTF-8 (byte 0x{byte:02x})")


# CSV


def _read_csv(file: IO[bytes], name: str) -> Iterator[Record]:
    # Bytes that are not UTF-8 are half characters until their row is whole, so that it alone is bad.
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    bad: list[tuple[int, int]] = []
    try:
        yield from _csv_records(csv.reader(_noting_bytes(_unbroken(text, name), bad), strict=True), bad)
    finally:
        with suppress(ValueError):  # closed by its owner
            text.detach()  # leaves the file open


def _csv_records(reader: Any, bad: list[tuple[int, int]]) -> Iterator[Record]:
    header: list[str] = []
    while True:
        place = reader.line_num + 1
        row, error = _next_row(reader)
        if bad:
            place, byte = bad[0]
            error = _not_utf8(byte)
            bad.clear()
        if error is None and row is None:
            return
        if error is not None and not header:
            yield Record(place, error=error)
            return
        if not header:
            header = row or []
        elif row or error is not None:
            row = row or []
            if len(row) > len(header) and error is None:
                error = WorkError("more columns than the header; quote a text that holds a comma")
            yield Record(place, dict.fromkeys(header) | dict(zip(header, row, strict=False)), error)


def _next_row(reader: Any) -> tuple[list[str] | None, WorkError | None]:
    """The next row, or what is wrong with it; neither at the end."""
    limit = csv.field_size_limit(sys.maxsize)  # the csv module has one for all its readers
    try:
        return next(reader, None), None
    except csv.Error as error:
        return None, WorkError(str(error))
    finally:
        csv.field_size_limit(limit)


def _noting_bytes(lines: Iterable[str], bad: list[tuple[int, int]]) -> Iterator[str]:
    """The lines, and in `bad` (line, byte) the first byte of each that is not UTF-8."""
    for number, line in enumerate(lines, 1):
        if not line.isascii():
            try:
                line.encode()
            except UnicodeEncodeError as error:
                bad.append((number, ord(line[error.start]) - 0xDC00))
        yield line


# Parquet


def _read_parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow.parquet  # optional: only parquet files need it
    except ImportError:
        raise InputError(f"{path}: reading parquet needs pyarrow: pip install 'slm-fast[parquet]'") from None
    place = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH):
                for fields in batch.to_pylist():
                    place += 1
                    yield Record(place, fields, unit="row")
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise WorkError(f"{path}: cannot be read as parquet: {one_line(error)}") from None
