"""Delimited text: CSV, TSV and spreadsheets' variants of them."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Collection, Iterator
from itertools import chain
from typing import Any

from slm_fast.columns import known
from slm_fast.encodings import Lines
from slm_fast.errors import InputError, WorkError
from slm_fast.fields import repeated

DELIMITERS = (",", ";", "\t", "|")
HEADER = 20  # maximum number of lines of a header
NONE = "\x1f"  # delimiter of a file with one column
SPOKEN = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
DECLARED = re.compile(r'"?sep=(.)"?\Z', re.IGNORECASE)  # Excel's declaration above a header

Found = tuple[int, dict[str, Any], WorkError | None]  # a row's first line number, its fields, its error


def check_delimiter(delimiter: str) -> str:
    """Return the delimiter as one character. Raises InputError if it is not valid."""
    delimiter = {"tab": "\t", "\\t": "\t"}.get(delimiter, delimiter) if isinstance(delimiter, str) else delimiter
    if not isinstance(delimiter, str) or len(delimiter) != 1 or delimiter in '"\r\n \0':
        raise InputError(f"delimiter: expected one character, such as ';', or 'tab', got {delimiter!r}")
    return delimiter


def columns_of(header: str, delimiter: str) -> list[str]:
    """The column names in the first line of a header."""
    return [name.strip("\ufeff \t\r\n\v\f") for name in _cells(header, delimiter)]


def _cells(header: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader(header.splitlines(keepends=True), delimiter=delimiter), [])
    except csv.Error:
        return []


def choose_delimiter(header: str, tabbed: bool = False, columns: Collection[str] = ()) -> str:
    """The delimiter of a header: the one that gives the most known names, then the most columns.

    Args:
        tabbed: prefer a tab if it fits as well as others.
        columns: known names besides the usual ones.
    """
    order = sorted(DELIMITERS, key=lambda each: each != "\t") if tabbed else DELIMITERS
    found = {each: columns_of(header, each) for each in order}
    best = max(order, key=lambda each: (known(found[each], columns), len(found[each])))
    return best if len(found[best]) > 1 else NONE


def read_delimited(lines: Lines, delimiter: str | None, tabbed: bool, columns: Collection[str]) -> Iterator[Found]:
    """Yield each row that is not blank. A bad row has an error; reading continues after it."""
    text = iter(lines)
    first: list[str] = []  # lines up to and including the header
    header = ""
    for line in text:
        declared = DECLARED.match(line.strip("\ufeff \r\n")) if not header else None
        if declared:
            delimiter, line = delimiter or declared.group(1), "\n"
        first.append(line)
        header += line if line.strip() or header else ""
        if header and (header.count('"') % 2 == 0 or len(first) > HEADER):
            break
    if delimiter is None:
        delimiter = choose_delimiter(header, tabbed, columns)
    names = _cells(header, delimiter)[1:]
    spaced = bool(names) and all(name[:1] == " " for name in names)  # `text, label`, and so `a, "b"`
    reader = csv.reader(chain(first, text), delimiter=delimiter, strict=True, skipinitialspace=spaced)
    yield from _rows(reader, lines, delimiter, columns)


def _rows(reader: Any, lines: Lines, delimiter: str, columns: Collection[str]) -> Iterator[Found]:
    header: list[str] = []
    while True:
        place = reader.line_num + 1
        row, error = _next_row(reader, delimiter)
        unread = row is None
        if error is not None and reader.line_num > place:
            error = WorkError(f"{error}; lines {place} to {reader.line_num} are lost")
        if lines.bad:  # in this row, since the reader never reads beyond it
            place, byte = lines.bad[0]
            error = lines.error(byte)
            lines.bad.clear()
        if row is None and error is None:
            return
        row = row or []
        if error is None and not any(cell.strip() for cell in row):
            continue
        if not header:
            header = [name.strip("\ufeff \t\r\n\v\f") for name in row]
            error = error or _check_header(header, columns)
            if error is not None:
                yield place, {}, error
                return
            continue
        while len(row) > len(header) and not row[-1]:  # a separator at the end of each row
            row.pop()
        if len(row) > len(header) and error is None:
            error = WorkError(f"more columns than the header; quote a text that holds a {_spoken(delimiter)}")
        yield place, {} if unread else dict.fromkeys(header) | dict(zip(header, row, strict=False)), error


def _check_header(header: list[str], columns: Collection[str]) -> WorkError | None:
    twice = repeated(name for name in header if known([name], columns))
    return None if twice is None else WorkError(f"the header has column {twice!r} twice")


def _spoken(delimiter: str) -> str:
    return SPOKEN.get(delimiter, repr(delimiter))


def _next_row(reader: Any, delimiter: str) -> tuple[list[str] | None, WorkError | None]:
    """The next row or its error; neither at the end."""
    limit = csv.field_size_limit(sys.maxsize)  # global to the csv module, so it is restored
    try:
        return next(reader, None), None
    except csv.Error as error:
        said = str(error)
        if "unexpected end" in said:
            said = "a quotation mark is opened and never closed"
        elif "expected after" in said and delimiter == NONE:
            said = "a text that begins with '\"' must be quoted whole"
        elif "expected after" in said:
            said = "text follows a closing quotation mark; inside a quoted text, double each quotation mark"
        return None, WorkError(said)
    finally:
        csv.field_size_limit(limit)
