"""What stands behind a path that rows are read from or answers written to, and the lines that are written."""

from __future__ import annotations

import io
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from slm_fast.errors import InputError, WorkError

_STANDARD = ("/dev/stdin", "/dev/stdout", "/dev/stderr")
# Names that promise something else than JSON Lines.
_OTHERS = (
    *(".csv", ".tsv", ".json", ".parquet", ".arrow", ".feather", ".orc", ".avro", ".xls", ".xlsx", ".ods"),
    *(".zip", ".bz2", ".xz", ".zst", ".7z", ".tar", ".tgz"),
)


class Kind(Enum):
    """What a path is: a regular file; a pipe, device or open descriptor; or nothing yet."""

    FILE = "file"
    STREAM = "stream"
    MISSING = "missing"


def descriptor(path: Path) -> int | None:
    """The open descriptor that a path such as /dev/stdin or /dev/fd/63 names."""
    name = str(path)
    if name in _STANDARD:
        return _STANDARD.index(name)
    found = re.fullmatch(r"/(?:dev|proc/self)/fd/(\d{1,9})", name)
    return int(found[1]) if found else None


def kind_of(path: Path, *, missing: str | None = None) -> Kind:
    """What a path is; a descriptor is a stream even where a file is behind it, since it has a place in it.

    Raises InputError for a folder, for a file in a folder that is not there, or, with the words `missing`, for one that
    is not there itself. WorkError: it may not be looked at.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if missing:
            raise InputError(f"{path}: {missing}") from None
        if not path.parent.is_dir():
            raise InputError(f"{path}: no such folder") from None
        return Kind.MISSING
    except ValueError as error:  # a NUL, or half a character
        raise InputError(f"{str(path)!a}: not a path: {error}") from None
    except OSError as error:
        raise WorkError(f"{path}: cannot be opened: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        raise InputError(f"{path}: is a folder, expected a file")
    return Kind.FILE if stat.S_ISREG(mode) and descriptor(path) is None else Kind.STREAM


def wrong_name(path: Path) -> str | None:
    """What is wrong with the name of a file that answers are to be written to."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix not in _OTHERS or name.endswith(".parquet"):
        return None
    return f"answers are written as JSON Lines, not as {suffix}; name it .jsonl (or .jsonl.gz, .parquet)"


def open_stream(path: Path, mode: Literal["rb", "wb"]) -> io.FileIO:
    """Open a pipe, a device or a descriptor, without a buffer. Raises WorkError where that fails."""
    number = descriptor(path)
    try:
        return open(path if number is None else os.dup(number), mode, buffering=0)
    except OSError as error:
        raise WorkError(f"{path}: cannot be opened: {error.strerror}") from None


def write_all(file: io.FileIO, data: bytes, path: Path) -> None:
    """Write to a file without a buffer: what a full disk refuses would else be tried again when the file is closed.

    Raises WorkError, naming the file. A pipe that nobody reads any more is a BrokenPipeError, as everywhere.
    """
    with named(path):
        left = memoryview(data)
        while left:
            left = left[file.write(left) or 0 :]


@contextmanager
def named(path: Path) -> Iterator[None]:
    """What the file system refuses is a WorkError that names the file."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise WorkError(f"{path}: cannot be written: {error.strerror or error}") from None


def line_of(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
