"""Atomic, durable file writes, a lock, and space reserved for when the disk is full."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from slm_fast.errors import InputError

LEAST_RESERVE = 64 << 10
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
PASSWORD = re.compile(r"(://[^/:@]*):[^/]*@")


def path_of(given: Any) -> Path:
    """The path of a store's folder. Raises InputError if it is not a path, or is empty (the current folder)."""
    if not isinstance(given, (str, os.PathLike)) or not os.fspath(given):
        raise InputError(f"store: expected the path of a folder, got {given!r}")
    if is_url(given):
        raise InputError(f"{shown(given)}: expected the path of a folder; a store at a URL is only read")
    return Path(given)


def is_url(given: Any) -> bool:
    """Whether what is given as a folder is a URL such as s3://bucket/store."""
    return isinstance(given, str) and URL.match(given) is not None


def shown(given: object) -> str:
    """A folder or URL for messages, without a password."""
    return PASSWORD.sub(r"\1:***@", given) if isinstance(given, str) else str(given)


def write(path: Path, *data: bytes | memoryview) -> None:
    """Write `data` to `path` atomically: write beside it, flush to disk, rename. Raises OSError."""
    part = write_beside(path, *data)
    try:
        flush(part)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def write_beside(path: Path, *data: bytes | memoryview) -> Path:
    """Write `data` to a file beside `path`, which is to be flushed and renamed to it, and return that file. Raises
    OSError."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.writelines(data)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    return part


def flush(path: Path) -> None:
    """Make a file's content durable, or the names of files renamed or created in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, patience: float, *, shared: bool = False) -> Iterator[bool]:
    """Hold the lock file at `path`, created if needed. Yields whether it was acquired within `patience` seconds.

    shared: lock as a reader, which excludes writers but not other readers. This needs no write permission, but the file
    must exist.
    """
    flags = os.O_RDONLY if shared else os.O_RDWR | os.O_CREAT
    lock = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        yield _lock(lock, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, patience)
    finally:
        os.close(lock)  # releases the lock


def _lock(lock: int, kind: int, patience: float) -> bool:
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            # Readers try more often, so that writers taking turns without a pause do not starve them.
            time.sleep(0.05 if kind == fcntl.LOCK_EX else 0.002)


class Reserve:
    """Disk space for one more manifest, held by a file, so that tasks can be removed when the disk is full."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def keep(self, size: int) -> None:
        """Reserve space for at least `size` bytes if possible; nothing is lost if not."""
        wanted = max(LEAST_RESERVE, 1 << (2 * size - 1).bit_length())
        with suppress(OSError):
            if self.path.exists() and self.path.stat().st_size == wanted:
                return
            write(self.path, b"\xff" * wanted)  # not zeros, which copying may turn into a hole

    def spend(self, error: OSError) -> bool:
        """Free the space if that may help against this error. Returns whether there was any."""
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self.path.exists():
            return False
        self.path.unlink()
        return True
