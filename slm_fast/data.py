"""Tasks to learn and rows to answer, and the readers of the files they come from."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_fast.errors import InputError, WorkError

NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
FORMATS = (".csv", ".csv.gz", ".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class Row:
    """One input and, where known, its answer. `instruction` is what a task's rows have in common, if anything."""

    text: str
    target: str | None = None
    instruction: str = ""

    @property
    def prompt(self) -> str:
        """What the backbone reads."""
        return f"{self.instruction}\n{self.text}" if self.instruction and self.text else self.instruction or self.text

    def query_text(self, route_on: str) -> str:
        """What the route is found from: the input alone, unless `route_on` is "prompt" or there is no input."""
        return self.prompt if route_on == "prompt" or not self.text else self.text

    @staticmethod
    def parse(value: Any) -> Row:
        """A row from a string, a Row, or a mapping with text[, label] or instruction and/or input[, output].

        Raises WorkError that says what is missing.
        """
        if isinstance(value, Row):
            return value
        if isinstance(value, str):
            value = {"text": value}
        if not isinstance(value, Mapping):
            raise WorkError(f"expected a text or an object with 'text' or 'instruction' and 'input', got {value!r:.60}")
        if "text" in value:
            text, instruction, target = _string(value, "text"), "", _answer(value, "label")
        elif "input" in value or "instruction" in value:
            text, instruction = _string(value, "input"), _string(value, "instruction")
            target = _answer(value, "output")
        else:
            raise WorkError(
                f"no 'text' (nor 'instruction' and 'input'); fields: {', '.join(map(repr, value)) or 'none'}"
            )
        if not (text or instruction):
            raise WorkError(f"empty {'text' if 'text' in value else 'input'}")
        return Row(text, target, instruction)


def _string(value: Mapping[str, Any], key: str) -> str:
    got = value.get(key)
    if got is None:
        got = ""
    if not isinstance(got, str):
        raise WorkError(f"{key!r}: expected a string, got {got!r:.60}")
    return _whole(got, key).strip()


def _whole(got: str, key: str) -> str:
    try:
        got.encode()
    except UnicodeEncodeError:  # JSON can write half of a surrogate pair, which no file and no tokenizer can hold
        raise WorkError(f"{key!r}: holds half a character, got {got!a:.60}") from None
    return got


def _answer(value: Mapping[str, Any], key: str) -> str | None:
    got = value.get(key)
    if got is None:
        return None
    if isinstance(got, bool) or not isinstance(got, (str, int)):
        raise WorkError(f"{key!r}: expected a word or an integer, got {got!r:.60}")
    return _whole(str(got), key).strip() or None


class Task:
    """A named set of inputs with answers: label words (`labels` is their sorted list) or free text (`labels` is None).

    Args:
        name: letters, digits, '.', '_' and '-', at most 64, beginning with a letter or digit.
        rows: Rows, (text, label) pairs, or mappings with text,label or instruction,input,output.
        free_text: answers are text to generate. By default that is so when the rows come as instruction,input,output.
        training: the task is to be learned, for which it needs two labels.

    Raises:
        InputError: a bad name. WorkError: no rows, a row without text or answer, a task with only one label.
    """

    def __init__(self, name: str, rows: Iterable[Any], *, free_text: bool | None = None, training: bool = True) -> None:
        check_name(name)
        self.name = name
        raw = list(rows)
        self.rows = [_answered(name, f"row {i}", value) for i, value in enumerate(raw, 1)]
        if free_text is None:
            free_text = bool(raw) and isinstance(raw[0], Mapping) and "text" not in raw[0]
        self.labels = None if free_text else sorted({row.target for row in self.rows if row.target is not None})
        if not self.rows:
            raise WorkError(f"{name}: the task has no rows")
        if training and self.labels is not None and len(self.labels) < 2:
            raise WorkError(f"{name}: a task needs at least two labels, got only {self.labels[0]!r}")

    @classmethod
    def from_file(cls, name: str, path: str | Path, *, training: bool = True) -> Task:
        """Read a task from csv, jsonl (both also .gz) or parquet; columns text,label or instruction,input,output.

        Integer labels are named by `labels.json`, a list of words, where one lies beside the file.

        Raises:
            InputError: no such file, or an unknown format. WorkError: what is in it, naming file and line.
        """
        check_name(name)
        rows, free_text = read_rows(path)
        try:
            return cls(name, rows, free_text=free_text, training=training)
        except WorkError as error:
            raise WorkError(f"{path}: {error}") from None


def check_name(name: str) -> None:
    if not isinstance(name, str) or not NAME.match(name):
        raise InputError(
            f"task name {name!r}: expected 1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit"
        )


def _answered(source: str, where: str, value: Any) -> Row:
    if isinstance(value, tuple) and len(value) == 2:
        value = {"text": value[0], "label": value[1]}
    try:
        row = Row.parse(value)
    except WorkError as error:
        raise WorkError(f"{source}: {where}: {error}") from None
    if row.target is None:
        answer = "label" if not isinstance(value, Mapping) or "text" in value else "output"
        raise WorkError(f"{source}: {where}: no {answer!r}")
    return row


def read_rows(path: str | Path) -> tuple[list[Row], bool]:
    """The answered rows of a task file and whether their answers are free text."""
    path = Path(path)
    records = list(read_records(path))
    rows = [_answered(str(path), f"line {line}", record) for line, record in records]
    names = path.parent / "labels.json"
    labels = {record.get("label") for _, record in records}
    if rows and all(_is_index(label) for label in labels) and names.is_file():
        words = _read_words(names)
        for (line, _), row in zip(records, rows, strict=True):
            if int(row.target or 0) >= len(words):
                raise WorkError(f"{path}: line {line}: label {row.target}: {names} names only {len(words)}")
        rows = [Row(row.text, words[int(row.target or 0)], row.instruction) for row in rows]
    return rows, bool(records) and "text" not in records[0][1]


def _read_words(path: Path) -> list[str]:
    try:
        words = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WorkError(f"{path}: not a JSON list of words: {error}") from None
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
        raise WorkError(f"{path}: expected a JSON list of words, got {str(words)!r:.60}")
    return words


def _is_index(label: Any) -> bool:
    return isinstance(label, (int, str)) and not isinstance(label, bool) and str(label).isdecimal()


def read_records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number, record) of each row of a csv, jsonl or parquet file."""
    suffix = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    if suffix not in FORMATS:
        raise InputError(f"{path}: unknown format; expected one of {', '.join(FORMATS)}")
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        is_file = False
    except OSError as error:
        raise WorkError(f"{path}: cannot be read: {error.strerror}") from None
    if not is_file:
        raise InputError(f"{path}: no such file")
    if suffix == ".parquet":
        yield from _read_parquet(path)
        return
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if suffix.endswith(".gz") else data
    except (OSError, EOFError, zlib.error) as error:
        raise WorkError(f"{path}: cannot be read: {error}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise WorkError(f"{path}: line {line}: not UTF-8 (byte 0x{data[error.start]:02x})") from None
    if ".csv" in suffix:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        limit = csv.field_size_limit(len(text) + 1)
        try:
            records = [(reader.line_num, record) for record in reader]
        except csv.Error as error:
            raise WorkError(f"{path}: line {reader.line_num + 1}: {error}") from None
        finally:
            csv.field_size_limit(limit)
        for line, record in records:
            if None in record:
                raise WorkError(f"{path}: line {line}: more columns than the header; quote a text that holds a comma")
            yield line, record
        return
    for number, line_text in enumerate(text.split("\n"), 1):
        if line_text.strip():
            try:
                record = json.loads(line_text)
            except (ValueError, RecursionError) as error:
                raise WorkError(f"{path}: line {number}: not JSON: {error}") from None
            if not isinstance(record, dict):
                raise WorkError(f"{path}: line {number}: expected a JSON object, got {line_text:.60}")
            yield number, record


def _read_parquet(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        import pyarrow.parquet  # optional: only parquet files need it
    except ImportError:
        raise InputError(f"{path}: reading parquet needs pyarrow: pip install 'slm-fast[parquet]'") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise WorkError(f"{path}: cannot be read as parquet: {str(error).splitlines()[0]}") from None
    yield from enumerate(table.to_pylist(), 1)
