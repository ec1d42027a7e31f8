"""Rows as callers give them: tables of several libraries, and the fields of one row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from dataclasses import fields as fields_of
from itertools import islice
from typing import Any

from slm_fast.chats import read_chat
from slm_fast.columns import CHATTED, LABELLED, PROMPT, Columns, find_columns, known, missing_answer, plain
from slm_fast.errors import InputError, WorkError
from slm_fast.fields import repeated
from slm_fast.labels import as_text, is_unseen, plain_value, shown, whole
from slm_fast.readers import class_name


@dataclass(frozen=True)
class Fields:
    """Contents of a row.

    Attributes:
        kind: kind of the row, as in `columns`.
        text, instruction: stripped, not both empty.
        answer: as it was given.
        key: column of the answer.
        missing: what is wrong if there is no answer.
        turns: of a chat of several turns, as in `Row`.
    """

    kind: str
    text: str
    instruction: str
    answer: Any
    key: str
    missing: str
    turns: tuple[tuple[str, str], ...] = ()

    def target(self) -> str | None:
        """The answer as text. Raises WorkError if it is not a text, whole number or truth value."""
        return as_text(self.answer, self.key)


def read_fields(value: Any, text: str | None = None, label: str | None = None) -> Fields:
    """Read a row from a text, a (text, label) pair, or anything with named columns.

    Args:
        text, label: names of the input and answer columns, if not the usual ones.

    Raises:
        Unclear: which column is the input is unclear.
        WorkError: the row cannot be read.
    """
    given = text is not None or label is not None
    fields = _as_mapping(value, given)
    names = tuple(fields)
    columns = find_columns(names, text, label)
    for name in columns.unread:
        if not _is_empty(fields[name]):
            raise WorkError(f"{name!r}: is not understood, and the answer may depend on it; leave the column out")
    instruction = "\n".join(filter(None, (_string(fields, name) for name in columns.instruction)))
    key = columns.answer or ("label" if columns.kind == LABELLED else "output")
    answer = fields[columns.answer] if columns.answer else None
    turns = _turns(fields, columns)
    if columns.kind == CHATTED or turns is not None:
        chat = read_chat(turns, columns.text[0])
        return Fields(
            CHATTED,
            chat.text,
            "\n".join(filter(None, (instruction, chat.instruction))),
            chat.answer,
            columns.text[0],
            f"{columns.text[0]!r}: the last turn is not the assistant's",
            chat.turns,
        )
    said = "\n".join(filter(None, (_string(fields, name) for name in columns.text)))
    if columns.ready:
        _check_ready(fields, columns, instruction, answer)
    if not (said or instruction):
        raise WorkError(f"empty {'text' if columns.kind == LABELLED else 'input'}")
    return Fields(columns.kind, said, instruction, answer, key, _missing(names, columns, value, given))


def _turns(fields: Mapping[str, Any], columns: Columns) -> Any:
    """The turns of a chat, in one column or, as in TRL, in a prompt and a completion (which may be a text). None if the
    row is not a chat."""
    if columns.kind == CHATTED:
        return fields[columns.text[0]]
    if len(columns.text) != 1 or plain(columns.text[0]) not in PROMPT or (columns.kind == LABELLED and columns.answer):
        return None
    asked: Any = fields[columns.text[0]]
    answer: Any = fields[columns.answer] if columns.answer else None
    if isinstance(asked, (str, Mapping)) or not isinstance(asked, Iterable):
        return None
    turns = list(asked)
    if not turns or not isinstance(turns[0], Mapping):
        return None
    if isinstance(answer, str):
        return [*turns, {"role": "assistant", "content": answer}] if answer.strip() else turns
    return turns if _is_empty(answer) else turns + list(answer)


def _missing(names: tuple[str, ...], columns: Columns, value: Any, given: bool) -> str:
    if columns.answer is not None or not hasattr(value, "keys"):
        return f"no {'label' if columns.kind == LABELLED else 'output'!r}"
    return missing_answer(names, columns.kind, given)


def _as_mapping(value: Any, given: bool) -> Mapping[str, Any]:
    fields = getattr(value, "_fields", None)
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, tuple) and isinstance(fields, tuple):  # a named tuple: read by names, in any order
        return dict(zip(map(str, fields), value, strict=True))
    if isinstance(value, tuple) and len(value) == 2 and not given:
        if hasattr(value[1], "keys"):  # a name with its row, as from groupby, iterrows or a dictionary's items
            as_text(value[1], "label")
        return {"text": value[0], "label": value[1]}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields_of(value)}
    if not isinstance(value, Mapping):
        if not (hasattr(value, "keys") and hasattr(value, "__getitem__")):  # rows of pandas and sqlite3 have these
            one = "a text or an object with 'text' or 'instruction' and 'input'"
            pair = (isinstance(value, list) and len(value) == 2) or getattr(value, "shape", None) == (2,)
            how = "; a pair is read as a tuple: (text, label)" if pair and not given else ""
            raise WorkError(f"expected {'a mapping with named columns' if given else one}, got {shown(value)}{how}")
        value = {name: value[name] for name in value.keys()}  # noqa: SIM118
    return value if all(isinstance(name, str) for name in value) else {str(name): value[name] for name in value}


def _string(fields: Mapping[str, Any], name: str) -> str:
    got = plain_value(fields[name])
    if got is None:
        return ""
    if not isinstance(got, str):
        raise WorkError(f"{name!r}: expected a string, got {shown(got)}")
    text = whole(str.__str__(got), name).strip()
    return "" if is_unseen(text) else text


def _is_empty(value: Any) -> bool:
    value = plain_value(value)
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    size = getattr(value, "__len__", None)
    return value is None or (size is not None and size() == 0)


def _check_ready(fields: Mapping[str, Any], columns: Columns, instruction: str, answer: Any) -> None:
    """Raise WorkError unless a text beside instruction and output, without an input, is composed of these: it might be
    the input itself."""
    ready = _string(fields, columns.ready or "")
    parts = (instruction, answer if isinstance(answer, str) else "")
    if ready and not all(part.strip() in ready for part in parts):
        raise WorkError(f"{columns.ready!r} beside 'instruction': call it 'input' if it is the input, or leave it out")


# Tables


def table_of(rows: Any) -> Iterator[Any]:
    """Iterate over rows of a list, a generator, a DataFrame (pandas or polars), a Series or array of texts, an Arrow
    table or array, or a datasets.Dataset, whose class numbers become names.

    Raises InputError for a text, a mapping or a single row, and for a table with duplicate columns.
    """
    if isinstance(rows, (str, bytes, Mapping)) or hasattr(rows, "_fields"):
        raise _no_rows(rows)
    if hasattr(rows, "collect_schema") and hasattr(rows, "collect"):  # a lazy frame of polars
        rows = rows.collect()
    if hasattr(rows, "to_dict") and hasattr(rows, "iterrows"):  # pandas: iterating would give column names
        twice = repeated(map(str, rows.columns))
        if twice is not None:
            raise InputError(f"rows: the table has column {twice!r} twice")
        return iter(rows.to_dict("records"))
    if hasattr(rows, "iter_rows") and hasattr(rows, "to_dicts"):  # polars: iterating would give columns
        return iter(rows.iter_rows(named=True))
    if hasattr(rows, "to_pylist"):  # Arrow
        return iter(rows.to_pylist())
    if callable(getattr(rows, "keys", None)) and known(map(str, islice(rows.keys(), 64))):  # a single pandas row
        raise _no_rows(rows)
    features = getattr(rows, "features", None)
    if features is not None and hasattr(rows, "with_format"):  # numpy, torch and pandas formats change values
        rows = rows.with_format(None)
    try:
        found = iter(rows)
    except TypeError:
        raise _no_rows(rows) from None
    classes = {
        name: list(feature.names)
        for name, feature in (features.items() if isinstance(features, Mapping) else ())
        if hasattr(feature, "int2str") and getattr(feature, "names", None)
    }
    return _with_names(found, classes) if classes else found


def _no_rows(rows: Any) -> InputError:
    return InputError(f"rows: expected an iterable of rows, got {shown(rows)}")


def _with_names(rows: Iterable[Any], classes: Mapping[str, list[str]]) -> Iterator[Any]:
    for row in rows:
        named = {name: class_name(row[name], names) for name, names in classes.items() if name in row}
        yield {**row, **named}
