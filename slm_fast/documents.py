"""Rows of a JSON document: a list of rows, an object with such a list, or columns."""

from __future__ import annotations

import reprlib
from collections.abc import Collection
from typing import Any

from slm_fast.columns import CHAT, known, listed, plain
from slm_fast.errors import WorkError
from slm_fast.fields import repeated


def rows_of_document(value: Any, name: str, columns: Collection[str] = ()) -> list[Any]:
    """The rows in a JSON value.

    Args:
        value: a list of rows; an object with one list of rows; columns, as lists of the same length or (from pandas)
            objects with the same keys; pandas' {"columns", "data"}; or a single row.
        name: name of the document, for messages.
        columns: known column names besides the usual ones.

    Raises:
        WorkError: there are several lists of rows, or none.
    """
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise WorkError(f"{name}: expected a JSON list of objects, got {type(value).__name__}")
    if {"columns", "data"} <= value.keys() and isinstance(value["columns"], list) and isinstance(value["data"], list):
        return _split_table(value["columns"], value["data"], name)
    whole = _whole_columns(value, name) if known(value, columns) and not any(map(_chat, value)) else None
    if whole is not None:
        return whole
    tables = [key for key, rows in value.items() if not _chat(key) and _is_table(rows, columns)]
    if len(tables) > 1:
        raise WorkError(f"{name}: holds several lists of rows: {listed(tables)}; save one of them to a file of its own")
    if tables:
        return list(value[tables[0]])
    if known(value, columns):
        return [value]
    raise WorkError(f"{name}: expected a list of rows, or columns of one length; fields: {listed(value)}")


def _split_table(columns: list[Any], data: list[Any], name: str) -> list[dict[str, Any]]:
    names = list(map(str, columns))
    twice = repeated(names)
    if twice is not None:
        raise WorkError(f"{name}: has column {twice!r} twice")
    for number, row in enumerate(data, 1):
        if not isinstance(row, list) or len(row) != len(names):
            raise WorkError(f"{name}: row {number}: expected a list of {len(names)}, got {reprlib.repr(row)}")
    return [dict(zip(names, row, strict=True)) for row in data]


def _is_table(rows: Any, columns: Collection[str]) -> bool:
    return isinstance(rows, list) and bool(rows) and isinstance(rows[0], dict) and known(rows[0], columns) > 0


def _chat(key: str) -> bool:
    return plain(key) in CHAT


def _whole_columns(value: dict[str, Any], name: str) -> list[dict[str, Any]] | None:
    parts = [each for each in value.values() if isinstance(each, (list, dict))]
    if len(parts) < len(value) or len({type(each) for each in parts}) != 1:
        return None
    if len({len(each) for each in parts}) != 1:
        sizes = ", ".join(f"{key!r} {len(each)}" for key, each in value.items())
        raise WorkError(f"{name}: columns of different lengths: {sizes}")
    keys = list(parts[0]) if isinstance(parts[0], dict) else list(range(len(parts[0])))
    try:
        return [{column: each[key] for column, each in value.items()} for key in keys]
    except KeyError as error:
        raise WorkError(f"{name}: columns with different keys: {error}") from None
