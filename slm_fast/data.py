"""Tasks to learn and rows to answer."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

from slm_fast.errors import InputError, WorkError, one_line
from slm_fast.fields import TEXT, Unfit, check, list_of, read_json
from slm_fast.readers import Record, read_records

NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")


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
            raise WorkError(
                f"expected a text or an object with 'text' or 'instruction' and 'input', got {reprlib.repr(value)}"
            )
        if "text" in value:
            text, instruction, target = _string(value, "text"), "", _answer(value, "label")
        elif "input" in value or "instruction" in value:
            text, instruction = _string(value, "input"), _string(value, "instruction")
            target = _answer(value, "output")
        else:
            raise WorkError(f"no 'text' (nor 'instruction' and 'input'); fields: {_names(value)}")
        if not (text or instruction):
            raise WorkError(f"empty {'text' if 'text' in value else 'input'}")
        return Row(text, target, instruction)


def _string(value: Mapping[str, Any], key: str) -> str:
    got = value.get(key)
    if got is None:
        got = ""
    if not isinstance(got, str):
        raise WorkError(f"{key!r}: expected a string, got {reprlib.repr(got)}")
    return _whole(got, key).strip()


def _whole(got: str, key: str) -> str:
    try:
        got.encode()
    except UnicodeEncodeError:  # JSON can write half of a surrogate pair, which no file and no tokenizer can hold
        raise WorkError(f"{key!r}: holds half a character, got {got[:60]!a}") from None
    return got


def _answer(value: Mapping[str, Any], key: str) -> str | None:
    got = value.get(key)
    if got is None:
        return None
    if isinstance(got, bool) or not isinstance(got, (str, Integral)):
        raise WorkError(f"{key!r}: expected a word or an integer, got {reprlib.repr(got)}")
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
    def from_rows(
        cls,
        name: str,
        rows: Iterable[Any],
        *,
        text: str | None = None,
        label: str | None = None,
        free_text: bool | None = None,
        training: bool = True,
    ) -> Task:
        """A task from anything that gives rows: a list, a generator, a datasets.Dataset, a pandas.DataFrame.

        Args:
            rows: mappings with text,label or instruction,input,output, or (text, label) pairs.
            text, label: the columns that hold the input and its answer, where they have other names.

        Raises:
            InputError: a bad name, no rows but a text or a mapping, or a first row without such a column. WorkError: as
            for `Task`, naming the row.
        """
        if isinstance(rows, (str, Mapping)) or not isinstance(rows, Iterable):
            raise InputError(f"rows: expected an iterable of rows, got {reprlib.repr(rows)}")
        if hasattr(rows, "to_dict") and hasattr(rows, "iterrows"):  # a DataFrame, which iterates over its columns
            rows = rows.to_dict("records")
        check_name(name)
        if text is not None or label is not None:
            rows = (_choose(name, i, row, text, label) for i, row in enumerate(rows, 1))
        return cls(name, rows, free_text=free_text, training=training)

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


def _choose(name: str, number: int, row: Any, text: str | None, label: str | None) -> dict[str, Any]:
    """A row under the usual names, from the columns that `text` and `label` name."""
    if not isinstance(row, Mapping):
        raise WorkError(f"{name}: row {number}: expected a mapping with named columns, got {reprlib.repr(row)}")
    if text is None and "text" not in row and ("input" in row or "instruction" in row):
        chosen, columns = dict(row), {"output": label or "output"}
    else:
        chosen, columns = {}, {"text": text or "text", "label": label or "label"}
    for column in columns.values():
        if column not in row:
            kind = InputError if number == 1 else WorkError
            raise kind(f"{name}: row {number}: no column {column!r}; columns: {_names(row)}")
    return chosen | {usual: row[column] for usual, column in columns.items()}


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "none"


def _answered(source: str, where: str, value: Any) -> Row:
    if isinstance(value, tuple) and len(value) == 2:
        value = {"text": value[0], "label": value[1]}
    try:
        row = Row.parse(value)
    except WorkError as error:
        raise WorkError(f"{source}: {where}: {error}") from None
    if row.target is None:
        answer = "label" if not isinstance(value, Mapping) or "text" in value else "output"
        others = f"; fields: {_names(value)}" if isinstance(value, Mapping) and answer not in value else ""
        raise WorkError(f"{source}: {where}: no {answer!r}{others}")
    return row


def identified(record: Record, *, text: str | None = None) -> tuple[Any, Row | WorkError]:
    """A record's id, which is the number of its line unless it has one, and its row or what is wrong with it."""
    name: Any = record.place
    if "id" in record.fields:
        try:
            json.dumps(record.fields["id"], ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError:
            return name, WorkError("'id': holds half a character")
        except (TypeError, ValueError, RecursionError) as error:
            return name, WorkError(f"'id': cannot be written as JSON: {one_line(error)}")
        name = record.fields["id"]
    try:
        return name, record.error or Row.parse(record.fields)
    except WorkError as error:
        return name, error


def read_rows(path: str | Path) -> tuple[list[Row], bool]:
    """The answered rows of a task file and whether their answers are free text."""
    path = Path(path)
    records = list(read_records(path))
    rows = []
    for record in records:
        if record.error is not None:
            raise WorkError(f"{path}: {record.where}: {record.error}")
        rows.append(_answered(str(path), record.where, record.fields))
    free_text = bool(records) and "text" not in records[0].fields
    names = path.parent / "labels.json"
    if rows and not free_text and all(_is_index(record.fields.get("label")) for record in records) and names.is_file():
        words = _read_words(names)
        for record, row in zip(records, rows, strict=True):
            if int(row.target or 0) >= len(words):
                raise WorkError(f"{path}: {record.where}: label {row.target}: {names} names only {len(words)}")
        rows = [Row(row.text, words[int(row.target or 0)], row.instruction) for row in rows]
    return rows, free_text


def _read_words(path: Path) -> list[str]:
    try:
        words: list[str] = read_json(path.read_bytes())
        check(words, "labels", list_of(TEXT))
    except (OSError, ValueError, Unfit) as error:
        raise WorkError(f"{path}: not a JSON list of words: {one_line(error)}") from None
    return words


def _is_index(label: Any) -> bool:
    return (
        isinstance(label, (int, str))
        and not isinstance(label, bool)
        and re.fullmatch(r"\d{1,9}", str(label)) is not None
    )
