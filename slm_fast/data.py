"""Tasks to learn and rows to answer."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from slm_fast.columns import LABELLED, Unclear, check_columns, id_column
from slm_fast.errors import InputError, SlmError, WorkError, one_line, some_of
from slm_fast.inputs import read_fields, table_of
from slm_fast.labels import (
    are_words,
    as_text,
    check_label,
    foreign_label,
    name_label,
    read_words,
    same_words,
    shown,
    spellings,
    warn_of_alike,
    words_beside,
)
from slm_fast.options import check_switch
from slm_fast.readers import Record, read_records

NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")


@dataclass(frozen=True)
class Row:
    """An input with its answer, if known.

    Attributes:
        text: the input; a chat of several turns as lines "User: ..." and "Assistant: ...".
        instruction: the part of the prompt that a task's rows share, if any.
        turns: the speaker ("user" or "assistant") and text of each turn of a chat of several, the last one the user's.
            A chat template formats these instead of `text`.
    """

    text: str
    target: str | None = None
    instruction: str = ""
    turns: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        known = all(len(turn) == 2 and turn[0] in ("user", "assistant") for turn in self.turns)
        if not known or (self.turns and self.turns[-1][0] != "user"):
            raise InputError("turns: expected ('user' or 'assistant', text) pairs, the last one the user's")

    @property
    def prompt(self) -> str:
        """The text that the backbone reads: instruction and input, joined by a newline if there are both."""
        return f"{self.instruction}\n{self.text}" if self.instruction and self.text else self.instruction or self.text

    def query_text(self, route_on: str) -> str:
        """The text used for routing: the input alone, or the prompt if `route_on` is "prompt" or there is no input."""
        return self.prompt if route_on == "prompt" or not self.text else self.text

    @staticmethod
    def parse(value: Any, *, text: str | None = None) -> Row:
        """Make a row from a Row, a text, or anything `Task` accepts. An answer that is no text or label is dropped.

        Args:
            text: name of the input column, if not one of the usual names.

        Raises:
            WorkError: the row has no input. The message says what is missing.
        """
        if isinstance(value, Row):
            return value
        fields = read_fields(value, text)
        try:
            target = fields.target()
        except WorkError:  # answers are optional here
            target = None
        return Row(fields.text, target, fields.instruction, fields.turns)


class Task:
    """A named set of inputs with answers: labels (`labels` is their sorted list) or free text (`labels` is None).

    Args:
        name: 1 to 64 letters, digits, '.', '_' and '-', beginning with a letter or digit.
        rows: Row objects, (text, label) pairs, or mappings with the columns text,label; instruction,input,output (or
            prompt,completion); or messages. All of one kind. May be a list, generator, datasets.Dataset or
            pandas.DataFrame.
        free_text: whether answers are text to generate. Default: True for all kinds but text,label.
        training: whether the task is to be learned, which requires two labels.

    Raises:
        InputError: the name or a flag is invalid, or `rows` is a single text or mapping.
        WorkError: there are no rows, a row lacks its text or answer or differs in kind from the first, or there is only
            one label.
    """

    def __init__(self, name: str, rows: Iterable[Any], *, free_text: bool | None = None, training: bool = True) -> None:
        check_name(name)
        check_switch("training", training)
        self.name = name
        placed = ((f"row {i}", value) for i, value in enumerate(table_of(rows), 1))
        self.rows, free_text = _answered(name, placed, free_text=free_text)
        self.labels = None if free_text else sorted({row.target for row in self.rows if row.target is not None})
        if not self.rows:
            raise WorkError(f"{name}: the task has no rows")
        if training and self.labels is not None:
            if len(self.labels) < 2:
                raise WorkError(f"{name}: a task needs at least two labels, got only {self.labels[0]!r}")
            warn_of_alike(name, self.labels)

    def __repr__(self) -> str:
        labels = "free text" if self.labels is None else f"{len(self.labels)} labels: {some_of(self.labels, 5)}"
        return f"Task({self.name!r}, {len(self.rows)} rows, {labels})"

    def spelled_as(self, words: Collection[str]) -> Task:
        """This task with its labels spelled like those of a learned task: 1 as 1.0, true as True."""
        renamed = {} if self.labels is None else spellings(self.labels, words)
        if not renamed:
            return self
        task = copy.copy(self)
        task.rows = [replace(row, target=renamed.get(row.target or "", row.target)) for row in self.rows]
        task.labels = sorted({row.target or "" for row in task.rows})
        return task

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
        """Create a task from rows as `Task` does, with column names of your own.

        Args:
            text, label: names of the input and answer columns, if not the usual ones. If only `label` is given, rows of
                instruction,input keep their kind, and it names their output column.

        Raises:
            InputError: as for `Task`, or the first row lacks a named column.
            WorkError: as for `Task`.
        """
        check_name(name)
        check_switch("training", training)
        check_columns(text, label)
        placed = ((f"row {i}", value) for i, value in enumerate(table_of(rows), 1))
        found, free_text = _answered(name, placed, text, label, free_text)
        return cls(name, found, free_text=free_text, training=training)

    @classmethod
    def from_file(
        cls,
        name: str,
        path: str | Path | IO[bytes],
        *,
        text: str | None = None,
        label: str | None = None,
        delimiter: str | None = None,
        encoding: str | None = None,
        labels: str | Path | Sequence[str] | None = None,
        known: Collection[str] = (),
        training: bool = True,
    ) -> Task:
        """Read a task from csv, tsv, jsonl or json (each also .gz), from parquet, or from a pipe or stream.

        Args:
            text, label: names of the input and answer columns, if not the usual ones.
            delimiter, encoding: as for `read_records`. Default: detected.
            labels: names of integer labels, indexed from 0: a list, or a JSON file with one. Default: `labels.json`
                beside the file, if the labels are exactly 0 to n - 1 for its n names. A warning says whether it is
                used.
            known: labels of the learned task that the rows belong to, which may have no others. `labels.json` is then
                used if it contains them.

        Raises:
            InputError: there is no such file or column, or its format or encoding is unknown.
            WorkError: the content is invalid. The message names file and line.
        """
        check_name(name)
        check_switch("training", training)
        given = check_columns(text, label)
        records = list(read_records(path, delimiter=delimiter, encoding=encoding, columns=given, filled=True))
        file = Path(path) if isinstance(path, (str, Path)) else None
        source = "the input" if file is None else str(file)
        for record in records:
            if record.error is not None:
                foreign = encoding is None and str(record.error).startswith("not UTF-8")
                hint = "; encoding=NAME (--encoding) says what it is" if foreign else ""
                raise WorkError(f"{source}: {record.where}: {record.error}{hint}")
        placed = ((record.where, record.fields) for record in records)
        rows, free_text = _answered(source, placed, text, label)
        if not free_text:
            rows = _named(source, file, rows, records, labels, known)
        if known:
            _check_known(source, rows, records, known)
        try:
            return cls(name, rows, free_text=free_text, training=training)
        except WorkError as error:
            raise WorkError(f"{source}: {error}") from None


def checked(task: Any, what: str) -> Task:
    """Return `task`; raise InputError if it is not a Task."""
    if not isinstance(task, Task):
        raise InputError(f"{what}: expected a Task, got a {type(task).__name__}; Task(name, rows) makes one")
    return task


def check_name(name: str) -> None:
    if not isinstance(name, str) or not NAME.match(name):
        given = repr(name[:100]) if isinstance(name, str) else shown(name)
        raise InputError(
            f"task name {given}: expected 1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit"
        )


def rows_to_answer(rows: Iterable[Any], *, text: str | None = None) -> Iterator[Row]:
    """Parse rows to answer: anything `Task` takes rows from, or texts in a list, pandas Series or numpy array.

    Answers, such as the label of a (text, label) pair, are ignored.

    Args:
        text: name of the input column, if not one of the usual names.

    Raises:
        InputError: `rows` is a single text or row or, when iteration reaches it, the first row lacks the column `text`.
        WorkError: when iteration reaches a row that cannot be read. The message gives its number, counted from 1.
    """
    return (_numbered(number, value, text) for number, value in enumerate(table_of(rows), 1))


def _numbered(number: int, value: Any, text: str | None) -> Row:
    try:
        return Row.parse(value, text=text)
    except WorkError as error:
        raise _error_class(error, first=number == 1, named=text is not None)(f"row {number}: {error}") from None


def rows_of_file(
    path: str | Path, *, text: str | None = None, delimiter: str | None = None, encoding: str | None = None
) -> list[Row]:
    """Read the rows of a file as `Task.from_file` does, with or without answers.

    Raises:
        InputError: as for `Task.from_file`.
        WorkError: there are no rows, or one cannot be read. The message names file and line.
    """
    columns = [] if text is None else [text]
    rows: list[Row] = []
    for record in read_records(path, delimiter=delimiter, encoding=encoding, columns=columns, filled=True):
        row = identified(record, text=text)[1]
        if isinstance(row, WorkError):
            raise _error_class(row, first=not rows, named=text is not None)(f"{path}: {record.where}: {row}")
        rows.append(row)
    if not rows:
        raise WorkError(f"{path}: the file has no rows")
    return rows


def identified(record: Record, *, text: str | None = None) -> tuple[Any, Row | WorkError]:
    """Return a record's id (default: its line or row number) and its row, or the error that says what is wrong with it.

    Args:
        text: name of the input column, if not one of the usual names.
    """
    name: Any = record.place
    column = id_column(tuple(record.fields))
    if column is not None:
        try:
            json.dumps(record.fields[column], ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError:
            return name, WorkError(f"{column!r}: holds half a character")
        except (TypeError, ValueError, RecursionError) as error:
            return name, WorkError(f"{column!r}: cannot be written as JSON: {one_line(error)}")
        name = record.fields[column]
    try:
        return name, record.error or Row.parse(record.fields, text=text)
    except WorkError as error:
        return name, error


def _error_class(error: WorkError, *, first: bool, named: bool) -> type[SlmError]:
    """The class of a row's error: InputError if the caller named a column that even the first row lacks."""
    return InputError if first and named and isinstance(error, Unclear) else WorkError


def _answered(
    source: str,
    placed: Iterable[tuple[str, Any]],
    text: str | None = None,
    label: str | None = None,
    free_text: bool | None = None,
) -> tuple[list[Row], bool]:
    """Parse rows that must all have answers, and say whether these are free text. Labels get a uniform spelling."""
    if free_text is not None:
        check_switch("free_text", free_text)
    rows: list[Row] = []
    kind = None
    for where, value in placed:
        try:
            if isinstance(value, Row):
                row, found, missing = replace(value, target=as_text(value.target, "label")), None, "no 'label'"
            else:
                fields = read_fields(value, text, label)
                row = Row(fields.text, fields.target(), fields.instruction, fields.turns)
                found, missing = fields.kind, fields.missing
            if row.target is None:
                raise WorkError(missing)
            if found and kind and found != kind:
                raise WorkError(f"{found}, where the first row has {kind}; rows of a task are all of one kind")
            kind = kind or found
            if free_text is None:
                free_text = kind not in (None, LABELLED)
            if not free_text:
                row = replace(row, target=check_label(row.target))
        except WorkError as error:
            error_class = _error_class(error, first=not rows, named=(text or label) is not None)
            raise error_class(f"{source}: {where}: {error}") from None
        rows.append(row)
    if not free_text:
        try:
            words = same_words([row.target or "" for row in rows])
        except WorkError as error:
            raise WorkError(f"{source}: {error}") from None
        rows = [row if row.target == word else replace(row, target=word) for row, word in zip(rows, words, strict=True)]
    return rows, bool(free_text)


def _named(
    source: str,
    path: Path | None,
    rows: list[Row],
    records: Sequence[Record],
    labels: str | Path | Sequence[str] | None,
    known: Collection[str],
) -> list[Row]:
    """Replace integer labels by their names, if there is a list of names."""
    found = [row.target or "" for row in rows]
    if labels is not None:
        words = read_words(labels)
        if are_words(found, words):
            return rows
    else:
        beside = words_beside(path, found, known) if path is not None else None
        if beside is None:
            return rows
        words = beside
    named = []
    for record, row in zip(records, rows, strict=True):
        try:
            named.append(replace(row, target=name_label(row.target or "", words)))
        except WorkError as error:
            raise WorkError(f"{source}: {record.where}: {error}") from None
    return named


def _check_known(source: str, rows: list[Row], records: Sequence[Record], known: Collection[str]) -> None:
    """Raise WorkError if a row's label is not one of a learned task's, however that spells it."""
    foreign = {row.target or "" for row in rows} - set(known)
    foreign -= spellings(foreign, known).keys()
    for record, row in zip(records, rows, strict=True):
        if row.target in foreign:
            label = row.target or ""
            numbered = label.isdecimal() and not any(word.isdecimal() for word in known)
            how = "; labels= (--labels) names the labels that numbers stand for" if numbered else ""
            raise WorkError(f"{source}: {record.where}: {foreign_label(label, known)}{how}")
