"""Read rows of a file or stream, one record after another: delimited text, JSON Lines, JSON, Parquet."""

from __future__ import annotations

import gzip
import io
import json
import re
import reprlib
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, cast

from slm_fast.columns import known, listed
from slm_fast.delimited import check_delimiter, choose_delimiter, columns_of, read_delimited
from slm_fast.documents import rows_of_document
from slm_fast.encodings import GZIP, NO_TEXT, Lines, check_encoding, open_binary, read_head, rejoined, settle
from slm_fast.errors import InputError, WorkError, one_line
from slm_fast.fields import STRICT
from slm_fast.labels import plain_value, shown

FORMATS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
UNTOLD = ("", ".txt")  # suffixes that say nothing about the format
SUFFIXES = ".csv, .tsv, .txt, .jsonl, .ndjson, .json (each also .gz) or .parquet"
BATCH = 1024  # rows of a Parquet file in memory at once
DOCUMENT = re.compile(r'\[\s*([{"]|\Z)')  # start of a list of rows
JSON_LINES = re.compile(r"\s*\{.*\}[ \t\r]*\n\s*\S")  # an object on a line of its own, and more below it
PARQUET = b"PAR1\x15"  # its first bytes
BLANK = " \t\r\n\v\f"


@dataclass(frozen=True)
class Record:
    """A row as read: its fields, or an error.

    Attributes:
        place: line on which it begins or, in a Parquet or JSON file, row number; counted from 1.
        unit: "line" or "row".
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
    columns: Collection[str] = (),
    filled: bool = False,
) -> Iterator[Record]:
    """Read the non-blank rows of a file or binary stream, in order. Memory is bounded, except for .json.

    A bad row is a record with an error; reading goes on. A stream or pipe is read line by line: each record is yielded
    as soon as its line has arrived.

    Args:
        source: path of a file or named pipe, or a stream, which is left open. Gzip is decompressed.
        format: "csv", "tsv", "jsonl", "json" or "parquet". Default: by the path's suffix, in any case, or else the
            first line.
        delimiter: column separator: one character, or "tab". Default: detected from the header.
        encoding: default: UTF-16 or UTF-8, by the first bytes. A regular file of delimited text that is clearly not
            UTF-8 is read as Windows-1252, with a warning.
        columns: known column names besides the usual ones.
        filled: raise WorkError if delimited text has nothing but a header.

    Raises:
        InputError: there is no such file, or the format, encoding or delimiter is invalid.
        WorkError: the source cannot be opened or, while reading, cannot be read any further.
    """
    path = Path(source) if isinstance(source, (str, Path)) else None
    if path is None and (isinstance(source, io.TextIOBase) or not hasattr(source, "readline")):
        raise InputError(f"source: expected a path or a binary stream, got a {type(source).__name__}")
    if format is not None and format not in FORMATS.values():
        names = ", ".join(dict.fromkeys(FORMATS.values()))
        raise InputError(f"format: expected one of {names}, got {format!r}")
    if format == "parquet" and path is None:
        raise InputError("format: a stream cannot be parquet; save it to a file")
    reading = _Reading(
        name="the input" if path is None else str(path),
        delimiter=None if delimiter is None else check_delimiter(delimiter),
        encoding=None if encoding is None else check_encoding(encoding),
        columns=columns,
        filled=filled,
    )
    if path is None:
        return _read_stream(source, format, reading)  # type: ignore[arg-type]
    regular = _check_file(path)
    return _read_path(path, regular, _format_of(path) if format is None else format, reading)


@dataclass(frozen=True)
class _Reading:
    """How a source is read. again: its path, if it can be read more than once."""

    name: str
    delimiter: str | None
    encoding: str | None
    columns: Collection[str]
    filled: bool
    again: Path | None = None


def _format_of(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    suffix = (suffixes[:-1] if zipped else suffixes)[-1:] or [""]
    found = FORMATS.get(suffix[0])
    if (found is None and suffix[0] not in UNTOLD) or (zipped and found == "parquet"):
        raise InputError(f"{path}: unknown format; expected {SUFFIXES}")
    return found


def _check_file(path: Path) -> bool:
    """Whether a file can be read more than once."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = 0
    except (OSError, ValueError) as error:
        raise WorkError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if stat.S_ISDIR(mode):
        saved = "; Task.from_rows(name, datasets.load_from_disk(folder)) reads it" * (path / "state.json").exists()
        raise InputError(f"{path}: is a folder, expected a file{saved}")
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        raise InputError(f"{path}: no such file")
    return stat.S_ISREG(mode)


def _read_path(path: Path, regular: bool, format: str | None, how: _Reading) -> Iterator[Record]:
    if format == "parquet":
        if not regular:
            raise InputError(f"{path}: parquet cannot be read from a pipe; save it to a file")
        yield from _read_parquet(path)
        return
    how = replace(how, again=path if regular else None)
    with open_binary(path) as file:
        if regular and path.suffix.lower() == ".gz":
            with path.open("rb") as raw:
                start = raw.read(2)
            if start and not GZIP.startswith(start):
                raise WorkError(f"{path}: cannot be read: is not compressed, whatever its name; leave out the '.gz'")
        yield from _read_stream(file, format, how)


def _read_stream(file: IO[bytes], format: str | None, how: _Reading) -> Iterator[Record]:
    head = read_head(file, how.name)
    if head.startswith(GZIP):  # whatever its name
        file = cast("IO[bytes]", gzip.GzipFile(fileobj=rejoined(head, file)))
        head = read_head(file, how.name)
    for magic, kind in NO_TEXT.items():
        if head.startswith(magic):
            raise WorkError(f"{how.name}: is {kind}; save it as CSV")
    if head.startswith(PARQUET) or (format is None and head.startswith(PARQUET[:4])):  # whatever its name
        if how.again is None:
            raise InputError(f"{how.name}: parquet cannot be read from a pipe; save it to a file")
        yield from _read_parquet(how.again)
        return
    encoding = settle(how.encoding, head)
    if format in ("csv", "tsv") and _is_object(_first_line(head, encoding)):  # no header, whatever its name
        format = "jsonl"
    untold, certain = None, format is not None
    if format is None:
        format, untold = _sniff(_first_line(head, encoding), how)
    json_like = format in ("json", "jsonl")
    again = how.again if how.encoding is None and not json_like else None
    newline = "\n" if json_like and b"\n" in head else ""  # without one, lines may end in "\r"
    lines = Lines(rejoined(head, file), how.name, encoding, newline, again)
    if format == "json":
        yield from _read_json(lines, how.columns, certain)
        return
    if format == "jsonl":
        yield from _read_jsonl(lines, untold)
        return
    empty = True
    for place, fields, error in read_delimited(lines, how.delimiter, format == "tsv", how.columns):
        yield Record(place, fields, error)
        empty = False
    header = _first_line(head, encoding)
    if how.filled and empty and header:
        raise WorkError(f"{how.name}: has no rows; only a header line was found: {shown(header)}")


# Format detection


def _first_line(head: bytes, encoding: str) -> str:
    """The first non-blank line. The last bytes of UTF-16 may be half a character."""
    text = head.decode(encoding, "replace").strip("\ufeff" + BLANK)
    return text.split("\n", 1)[0].rstrip("\ufffd" + BLANK)


def _is_object(line: str) -> bool:
    """Whether a line is a JSON object, as in JSON Lines."""
    try:
        return line.startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _sniff(line: str, how: _Reading) -> tuple[str, WorkError | None]:
    """The format detected from a first line, and what is wrong with that line if none is."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if line.startswith("["):
        return ("json" if DOCUMENT.match(line) else "jsonl"), None
    if line.startswith("{"):
        return ("json" if line.strip() == "{" else "jsonl"), None
    delimiter = how.delimiter or choose_delimiter(line, columns=how.columns)
    names = columns_of(line, delimiter)
    if how.delimiter is not None or known(names, how.columns) or not line or line.lower().startswith(("sep=", '"sep=')):
        return "csv", None
    if isinstance(value, str):
        return "jsonl", None
    # For a file a guess is worth it: errors will name the columns. A stream may contain anything.
    if how.again is not None:
        return "csv", None
    return "jsonl", WorkError(f"not JSON, nor a header with a column of a known name; columns: {listed(names)}")


# JSON


def _read_jsonl(lines: Lines, untold: WorkError | None = None) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        if not line.strip(BLANK):
            continue
        if lines.bad:
            yield Record(number, error=lines.error(lines.bad.pop()[1]))
        elif untold is not None:
            yield Record(number, error=untold)
        else:
            yield _parse_line(number, line)
        untold = None


def _reason(error: ValueError) -> str:
    """Why a text that is well-formed is refused: NaN, a field that is there twice, or a number of thousands of digits
    (Python's advice on these is left out)."""
    return one_line(error).partition("; use sys.")[0]


def _parse_line(number: int, line: str) -> Record:
    try:
        value = STRICT.decode(line)
    except json.JSONDecodeError as error:
        return Record(number, error=WorkError(f"not JSON: {error.msg} at character {error.pos + 1}"))
    except RecursionError:
        return Record(number, error=WorkError("not JSON: nested too deeply"))
    except ValueError as error:
        return Record(number, error=WorkError(f"not JSON: {_reason(error)}"))
    return _as_record(number, value)


def _as_record(number: int, value: Any, unit: str = "line") -> Record:
    if isinstance(value, str):  # just a text
        value = {"text": value}
    if not isinstance(value, dict):
        return Record(number, error=WorkError(f"expected a JSON object, got {reprlib.repr(value)}"), unit=unit)
    return Record(number, value, unit=unit)


def _read_json(lines: Lines, columns: Collection[str], certain: bool) -> Iterator[Record]:
    """The rows of a document or, if it is not one, of JSON Lines. certain: whether the file is said to be JSON."""
    all_lines = list(lines)
    text, bad = "".join(all_lines), dict(lines.bad)
    try:
        for number, byte in bad.items():
            raise WorkError(f"{lines.name}: line {number}: {lines.error(byte)}")
        rows = rows_of_document(_parse_document(text, lines.name), lines.name, columns) if text.strip(BLANK) else []
    except WorkError:
        if certain and not JSON_LINES.match(text):
            raise
        for number, line in enumerate(all_lines, 1):
            if number in bad:
                yield Record(number, error=lines.error(bad[number]))
            elif line.strip(BLANK):
                yield _parse_line(number, line)
        return
    for number, row in enumerate(rows, 1):
        yield _as_record(number, row, "row")


def _parse_document(text: str, name: str) -> Any:
    try:
        return STRICT.decode(text)
    except json.JSONDecodeError as error:
        wrong = f"line {error.lineno}: not JSON: {error.msg} at character {error.colno}"
    except RecursionError:
        wrong = "not JSON: nested too deeply"
    except ValueError as error:
        wrong = f"not JSON: {_reason(error)}"
    raise WorkError(f"{name}: {wrong}")


# Parquet


def _read_parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow.parquet  # optional: only parquet files need it
    except ImportError:
        raise InputError(f"{path}: reading parquet needs pyarrow: pip install 'slm-fast[parquet]'") from None
    place = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            classes = _class_names(file.schema_arrow.metadata or {})
            for batch in file.iter_batches(BATCH):
                for fields in _readable(batch).to_pylist():
                    place += 1
                    for column, names in classes.items():
                        if column in fields:
                            fields[column] = class_name(fields[column], names)
                    yield Record(place, fields, unit="row")
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        raise WorkError(f"{path}: cannot be read as parquet: {one_line(error)}") from None


def _readable(batch: Any) -> Any:
    """Convert columns of times and decimals to text, for JSON."""
    import pyarrow

    for i, column in enumerate(batch.schema):
        if pyarrow.types.is_temporal(column.type) or pyarrow.types.is_decimal(column.type):
            batch = batch.set_column(i, column.name, batch.column(i).cast(pyarrow.string()))
    return batch


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Class names by column, if the `datasets` library wrote them into the schema."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        found = {name: one["names"] for name, one in features.items() if one.get("_type") == "ClassLabel"}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
    return {name: names for name, names in found.items() if _are_words(names)}


def _are_words(names: Any) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def class_name(value: Any, names: list[str]) -> Any:
    """The name of a class given by its number. -1 means none, as in data sets whose test rows have no labels."""
    value = plain_value(value)
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    return names[value] if 0 <= value < len(names) else None
