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


def check_output(path: Path, *, files: bool) -> None:
    """Check that a report can be written to this path, before any work is done.

    Raises:
        InputError: its folder does not exist, it is a folder itself, or matplotlib, which the PNG files need, is
        missing.
    """
    if not path.name:
        raise InputError(f"{path}: expected the name of a file")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected the name of a file, such as {path / 'report.html'}")
    if not path.parent.is_dir():
        raise InputError(f"{path}: folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: folder {path.parent} cannot be written to")
    if files:
        folder = folder_of(path)
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is in the way of the folder of pictures and numbers")
        if find_spec("matplotlib") is None:
            raise InputError(
                "matplotlib: not installed, and the report's PNG files are drawn with it; "
                "`pip install 'slm-fast[report]'`, or leave them out (--no-files)"
            )


def folder_of(path: Path) -> Path:
    """The folder for the files of a page: page_files for page.html."""
    return path.with_name(f"{path.stem}_files")


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

        for stem, (_, figure) in zip(report.stems(), report.figures(), strict=True):
            beside[f"{stem}.csv"] = _csv(figure)
            picture = png(figure)
            if picture is not None:
                beside[f"{stem}.png"] = picture
        numbers = json.dumps(_plain(report.numbers()), indent=1, ensure_ascii=False, allow_nan=False)
        beside["numbers.json"] = numbers.encode() + b"\n"
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
