"""What stands behind a path that rows are read from or answers written to, and the lines that are written."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import IO, Any

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
    if suffix not in _OTHERS:
        return None
    return f"answers are written as JSON Lines, not as {suffix}; name it .jsonl (or .jsonl.gz)"


def open_stream(path: Path, mode: str) -> IO[Any]:
    """Open a pipe, a device or a descriptor: "rb" for bytes as they come, or "w" for text in UTF-8.

    Raises WorkError where that fails.
    """
    number = descriptor(path)
    try:
        file: int | Path = path if number is None else os.dup(number)
        return open(file, mode, 0) if mode == "rb" else open(file, mode, encoding="utf-8")
    except OSError as error:
        raise WorkError(f"{path}: cannot be opened: {error.strerror}") from None


def line_of(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
