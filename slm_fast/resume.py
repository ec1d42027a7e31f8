"""The output of `slm-fast predict`, with which an interrupted run can be resumed.

OUTPUT.run, beside OUTPUT, describes what the rows were made from: input, store and options. The same call again keeps
the complete rows and continues after them; a different call is refused. Rows are written a window at a time. In a
compressed output each window is a separate gzip member, so that an incomplete one can be detected and cut off.
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
from slm_fast.streams import is_foreign, line_of, named, write_all


def digest_of(path: Path) -> str:
    """SHA-256 of an input's decompressed bytes; for damaged compressed data, of those before the error."""
    digest = hashlib.sha256()
    try:
        with cast("IO[bytes]", (gzip.open if path.suffix == ".gz" else open)(path, "rb")) as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except (EOFError, OSError, zlib.error):
        pass  # reading the rows will report the error and its place
    return digest.hexdigest()


class Output:
    """A file of records that grows a window at a time.

    Args:
        about: what the rows are made from, by name. None if unknown beforehand (standard input), so not resumable.

    Attributes:
        rows: number of rows kept from an earlier run.
        failed: number of them with errors.
        bad: first record with an error among them.

    Raises:
        InputError: the file exists and is not the beginning of this run.
        WorkError: another process is writing it, or it cannot be written.
    """

    def __init__(self, path: Path, about: Mapping[str, Any] | None, *, overwrite: bool) -> None:
        self.path, self.run = path, run_file(path)
        self.rows, self.failed = 0, 0
        self.bad: dict[str, Any] | None = None
        with named(path):
            begun = path.exists() and self.run.exists()  # even if nothing was written
            self._file = path.open("ab", buffering=0)
        try:
            with named(path):
                self._begin(about, begun, overwrite)
        except BaseException:
            self._file.close()
            raise

    def _begin(self, about: Mapping[str, Any] | None, begun: bool, overwrite: bool) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkError(f"{self.path}: another process is writing it") from None
        if overwrite:
            self._file.truncate(0)
        if self.path.stat().st_size or (begun and not overwrite):
            if about is None:
                raise InputError(f"{self.path}: already exists; --overwrite replaces it")
            check_resumable(self.path, about)
            self._keep_whole_rows()
        elif about is None:
            self.run.unlink(missing_ok=True)
        else:
            # Only once the output is empty: a run file must never be beside rows of another run.
            part = self.run.with_name(self.run.name + ".part")
            with named(self.run):
                part.write_text(json.dumps(about, indent=1) + "\n", "utf-8")
                os.replace(part, self.run)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is not None and not os.fstat(self._file.fileno()).st_size:
            self.run.unlink(missing_ok=True)  # nothing is to be resumed, so the next call may differ
        self._file.close()

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write records. Raises WorkError, naming the file, if that fails; what was written is kept."""
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


def check_run_file(path: Path) -> None:
    """Raise InputError if another file is where the description of the run that writes `path` goes."""
    run = run_file(path)
    with named(run):
        wrong = run.exists() and (not run.is_file() or is_foreign(run, b'{\n "input": '))
    if wrong:
        raise InputError(f"{run}: is in the way of the description of this run; name another output, or move it")


def check_resumable(path: Path, about: Mapping[str, Any] | None = None) -> None:
    """Raise InputError unless the rows in `path` were made by a run like this; without `about`, by any resumable
    one."""
    try:
        begun = json.loads(run_file(path).read_text("utf-8"))
    except (OSError, ValueError):
        begun = None
    if not isinstance(begun, dict):
        raise InputError(f"{path}: already exists; --overwrite replaces it")
    for name in sorted({*begun, *about} if about else ()):
        then, now = begun.get(name), (about or {}).get(name)
        if then != now:
            raise InputError(f"{path}: was begun {_differing(name, then, now)}; --overwrite starts afresh")


def _differing(name: str, then: Any, now: Any) -> str:
    if name in ("input", "store"):
        return f"with another {name}"
    if name == "top_k":  # where None is a value
        then, now = (("all" if value is None else value) for value in (then, now))
    if then is None:
        return f"without {name}, not with {name} {now!r}"
    return f"with {name} {then!r}, not " + ("without" if now is None else repr(now))


def _lines(file: IO[bytes]) -> Iterator[tuple[int, list[bytes]]]:
    """(end position, [line]) of each complete line."""
    end = 0
    for line in file:
        end += len(line)
        if line.endswith(b"\n"):
            yield end, [line]


def _members(file: IO[bytes]) -> Iterator[tuple[int, list[bytes]]]:
    """(end position, lines) of each complete member of a gzip file."""
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
