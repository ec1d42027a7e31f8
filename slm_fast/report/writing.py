"""Writes a report's page and, next to it, a folder with its figures as PNG and its numbers as CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slm_fast.errors import InputError, WorkError
from slm_fast.files import write
from slm_fast.report.figures import Figure, Report, Value
from slm_fast.report.markup import clean
from slm_fast.report.page import html
from slm_fast.streams import Kind, is_foreign, kind_of

PAGE, NUMBERS = b"<!DOCTYPE html>", b'{\n "format": 1,\n "title": '  # how a page and its numbers.json begin


def check_output(path: Path, *, files: bool) -> None:
    """Check that a report can be written to this path, before any work is done.

    Raises:
        InputError: its folder does not exist; it, or with `files` the folder next to it, is there already and is not a
        report's; or matplotlib, which the PNG files need, is missing.
    """
    if str(path) == "-":
        raise InputError("-: a report is not written to standard output; expected the name of a file")
    if not path.name:
        raise InputError(f"{path}: expected the name of a file")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected the name of a file, such as {path / 'report.html'}")
    if not path.parent.is_dir():
        wrong = "is a file, expected a folder" if path.parent.exists() else "does not exist"
        raise InputError(f"{path}: folder {path.parent} {wrong}")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: folder {path.parent} cannot be written to")
    kind = kind_of(path)
    if kind is Kind.STREAM:
        raise InputError(f"{path}: is not a regular file; expected the name of a file")
    if kind is Kind.FILE and is_foreign(path, PAGE):
        raise InputError(f"{path}: already exists, and is not an HTML page; name another file, or delete it")
    if files:
        folder = folder_of(path)
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is in the way of the folder of pictures and numbers")
        if folder.exists() and not _is_of_a_report(folder):
            raise InputError(f"{folder}: already exists, and is not a report's folder; name another output")
        if find_spec("matplotlib") is None:
            raise InputError(
                "matplotlib: not installed, and the report's PNG files are drawn with it; "
                "`pip install 'slm-fast[report]'`, or leave them out (--no-files)"
            )


def folder_of(path: Path) -> Path:
    """The folder for the files of a page: page_files for page.html."""
    return path.with_name(f"{path.stem}_files")


def _is_of_a_report(folder: Path) -> bool:
    """Whether a report wrote this folder, or it is empty. `.part` files are from a write that was cut off."""
    numbers = folder / "numbers.json"
    if numbers.is_file():
        return not is_foreign(numbers, NUMBERS)
    return all(path.suffix == ".part" for path in folder.iterdir())


def save(report: Report, path: str | Path, *, files: bool = False) -> None:
    """Write the page and, with `files`, first the folder next to it. Each file is written completely or not at all.

    Raises:
        InputError: as for `check_output`. WorkError: the files cannot be written, for example because the disk is full.
    """
    path = Path(path)
    check_output(path, files=files)
    page = html(report).encode()
    beside: dict[str, bytes] = {}
    if files:
        from slm_fast.report.pictures import png

        # The numbers come first, since they are what the folder of an interrupted report is recognised by.
        numbers = json.dumps(_plain(report.numbers()), indent=1, ensure_ascii=False, allow_nan=False)
        beside["numbers.json"] = numbers.encode() + b"\n"
        for stem, (_, figure) in zip(report.stems(), report.figures(), strict=True):
            beside[f"{stem}.csv"] = _csv(figure)
            picture = png(figure)
            if picture is not None:
                beside[f"{stem}.png"] = picture
    folder = folder_of(path)
    try:
        if files:
            folder.mkdir(exist_ok=True)
        for name, data in beside.items():
            write(folder / name, data)
        write(path, page)
    except OSError as error:
        raise WorkError(f"{error.filename or path}: cannot be written: {error.strerror or error}") from None


def _csv(figure: Figure) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_cell(value) for value in row] for row in figure.records())
    return text.getvalue().encode()


def _cell(value: Value) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    return clean(value) if isinstance(value, str) else value


def _plain(value: Any) -> Any:
    """A value that JSON can represent: text that is valid UTF-8, and floats with six digits."""
    if isinstance(value, dict):
        return {clean(str(name)): _plain(own) for name, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(own) for own in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if value - value == 0 else None
    return clean(value) if isinstance(value, str) else value
