"""What is behind a path for reading rows or writing answers, and the lines that are written."""

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
# Suffixes that promise something other than JSON Lines.
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
    """What a path is. A descriptor is a stream even if it is of a file, since it has a position there.

    Args:
        missing: error message for a path that does not exist. Without one, only its folder must exist.

    Raises:
        InputError: the path is a folder, or something that must exist does not.
        WorkError: the path cannot be accessed.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if missing:
            raise InputError(f"{path}: {missing}") from None
        if not path.parent.is_dir():
            wrong = f"{path.parent} is a file, expected a folder" if path.parent.exists() else "no such folder"
            raise InputError(f"{path}: {wrong}") from None
        return Kind.MISSING
    except ValueError as error:  # a NUL, or a lone surrogate
        raise InputError(f"{str(path)!a}: not a path: {error}") from None
    except OSError as error:
        raise WorkError(f"{path}: cannot be opened: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        raise InputError(f"{path}: is a folder, expected a file")
    return Kind.FILE if stat.S_ISREG(mode) and descriptor(path) is None else Kind.STREAM


def wrong_name(path: Path) -> str | None:
    """What is wrong with the name of an output file; None if nothing is."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix not in _OTHERS or name.endswith(".parquet"):
        return None
    return f"answers are written as JSON Lines, not as {suffix}; name it .jsonl (or .jsonl.gz, .parquet)"


def open_stream(path: Path, mode: Literal["rb", "wb"]) -> io.FileIO:
    """Open a pipe, a device or a descriptor, unbuffered. Raises WorkError if that fails."""
    number = descriptor(path)
    try:
        return open(path if number is None else os.dup(number), mode, buffering=0)
    except OSError as error:
        raise WorkError(f"{path}: cannot be opened: {error.strerror}") from None


def write_all(file: io.FileIO, data: bytes, path: Path) -> None:
    """Write to an unbuffered file. (A buffered one would, on closing, retry what a full disk has refused.)

    Raises WorkError, naming the file; BrokenPipeError, as usual, if nobody reads from a pipe any more.
    """
    with named(path):
        left = memoryview(data)
        while left:
            left = left[file.write(left) or 0 :]


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Convert the file system's errors to WorkErrors that name the file."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise WorkError(f"{path}: cannot be written: {error.strerror or error}") from None


def is_foreign(path: Path, start: bytes) -> bool:
    """Whether an existing file is not empty and does not begin like the files that are written to its place.

    Raises InputError if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(len(start)) not in (start, b"")
    except OSError as error:
        raise InputError(f"{path}: already exists, and cannot be read: {error.strerror}") from None


def line_of(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
