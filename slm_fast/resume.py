"""The output of `slm-fast predict`: an interrupted run is taken up where it stopped.

Beside OUTPUT stands OUTPUT.run, which says what its rows come from: input, store and options. The same call again
keeps the rows that are whole and goes on behind them; another call is refused. Rows are written a window at a time,
in a compressed output each window as a member of its own, so that a half-written one can be told and cut off.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from slm_fast.errors import InputError, WorkError
from slm_fast.streams import line_of, named, write_all


def digest_of(path: Path) -> str:
    """SHA-256 of an input's bytes, unpacked; of one that breaks off, up to there."""
    digest = hashlib.sha256()
    try:
        with cast("IO[bytes]", (gzip.open if path.suffix == ".gz" else open)(path, "rb")) as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except (EOFError, OSError, zlib.error):
        pass  # whoever reads the rows says what is wrong, and where
    return digest.hexdigest()


class Output:
    """A file of records that grows a window at a time. `rows` are in it from before, the first error among them `bad`.

    Args:
        about: what the rows come from, by name; None where that cannot be known beforehand (standard input), and then
            nothing can be resumed.

    Raises:
        InputError: the file is there and is not the beginning of this run. WorkError: another process writes to it, or
        it cannot be written.
    """

    def __init__(self, path: Path, about: Mapping[str, Any] | None, *, overwrite: bool) -> None:
        self.path, self.run = path, run_file(path)
        self.rows, self.failed = 0, 0
        self.bad: dict[str, Any] | None = None
        with named(path):
            self._file = path.open("ab", buffering=0)
        try:
            with named(path):
                self._begin(about, overwrite)
        except BaseException:
            self._file.close()
            raise

    def _begin(self, about: Mapping[str, Any] | None, overwrite: bool) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkError(f"{self.path}: another process is writing it") from None
        if overwrite:
            self._file.truncate(0)
        if self.path.stat().st_size:
            if about is None:
                raise InputError(f"{self.path}: is there already; --overwrite replaces it")
            check_resumable(self.path, about)
            self._keep_whole_rows()
        elif about is None:
            self.run.unlink(missing_ok=True)
        else:
            # After the output is empty: a run file must never stand beside rows of another run.
            part = self.run.with_name(self.run.name + ".part")
            with named(self.run):
                part.write_text(json.dumps(about, indent=1) + "\n", "utf-8")
                os.replace(part, self.run)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Raises WorkError, naming the file, where it cannot be written; what was written is kept."""
        data = "".join(map(line_of, records)).encode()
        write_all(self._file, gzip.compress(data, mtime=0) if self.path.suffix == ".gz" else data, self.path)

    def _keep_whole_rows(self) -> None:
        end = 0
        with self.path.open("rb") as file:
            for end_of_part, lines in _members(file) if self.path.suffix == ".gz" else _lines(file):
                try:
                    records = [json.loads(line) for line in lines]
                except ValueError:
                    break
                for record in records:
                    self.failed += "error" in record
                    if "error" in record and self.bad is None:
                        self.bad = record
                self.rows, end = self.rows + len(records), end_of_part
        if end < self.path.stat().st_size:
            self._file.truncate(end)


def run_file(path: Path) -> Path:
    return path.with_name(path.name + ".run")


def check_resumable(path: Path, about: Mapping[str, Any] | None = None) -> None:
    """Raise InputError unless the rows in `path` were made by a run like this; without `about`, by any that can be
    resumed."""
    try:
        begun = json.loads(run_file(path).read_text("utf-8"))
    except (OSError, ValueError):
        begun = None
    if not isinstance(begun, dict):
        raise InputError(f"{path}: is there already; --overwrite replaces it")
    for name in sorted({*begun, *about} if about else ()):
        then, now = begun.get(name), (about or {}).get(name)
        if then != now:
            what = f"another {name}" if name in ("input", "store") else f"{name} {then!r}, not {now!r}"
            raise InputError(f"{path}: was begun with {what}; --overwrite starts afresh")


def _lines(file: IO[bytes]) -> Iterator[tuple[int, list[bytes]]]:
    """(where it ends, [line]) of each whole line."""
    end = 0
    for line in file:
        end += len(line)
        if line.endswith(b"\n"):
            yield end, [line]


def _members(file: IO[bytes]) -> Iterator[tuple[int, list[bytes]]]:
    """(where it ends, its lines) of each whole member of a gzip file."""
    end, rest = 0, b""
    while True:
        member, data = zlib.decompressobj(31), b""
        while not member.eof:
            chunk = rest or file.read(1 << 20)
            rest = b""
            if not chunk:
                return
            try:
                data += member.decompress(chunk)
            except zlib.error:
                return
            end += len(chunk)
        rest = member.unused_data
        end -= len(rest)
        yield end, data.splitlines(keepends=True)
