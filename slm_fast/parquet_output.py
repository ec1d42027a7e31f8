"""Answers as a Parquet file, which appears complete or not at all: an interrupted run starts over."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from slm_fast.errors import InputError, WorkError
from slm_fast.streams import named


def is_parquet(path: Path) -> bool:
    return path.name.lower().endswith(".parquet")


def check_parquet(path: Path, *, overwrite: bool) -> None:
    """Raise InputError if a Parquet file cannot be written to this path."""
    try:
        import pyarrow.parquet  # noqa: F401  optional: only parquet files need it
    except ImportError:
        raise InputError(f"{path}: writing parquet needs pyarrow: pip install 'slm-fast[parquet]'") from None
    if not overwrite and path.exists():
        raise InputError(f"{path}: already exists, and a Parquet file cannot be resumed; --overwrite replaces it")


def answer_columns() -> dict[str, Any]:
    """Columns of answers and their Arrow types: the fields of the JSON Lines records, except that `id` is text and
    `probabilities` is a list of {label, probability}."""
    import pyarrow

    text, number, whole = pyarrow.string(), pyarrow.float64(), pyarrow.int64()
    route = pyarrow.struct({"task": text, "slot": whole, "weight": number})
    probability = pyarrow.struct({"label": text, "probability": number})
    columns = {"id": text, "task": text, "label": text, "text": text, "score": number}
    columns |= {"route": pyarrow.list_(route), "probabilities": pyarrow.list_(probability), "distance": number}
    columns |= {"finish_reason": text, "max_new_tokens": whole, "truncated": pyarrow.bool_(), "error": text}
    return columns


class ParquetOutput:
    """A Parquet file to which records are written, one window at a time. It appears when all are written.

    The columns are always those of `answer_columns`. Fields that a record lacks are null.

    Raises:
        InputError: as for `check_parquet`.
        WorkError: another process is writing the file, or it cannot be written.
    """

    rows, failed, bad = 0, 0, None  # as in `resume.Output`; nothing is ever resumed

    def __init__(self, path: Path, *, overwrite: bool) -> None:
        import pyarrow
        import pyarrow.parquet

        check_parquet(path, overwrite=overwrite)
        self.path, self.part, self.schema = path, path.with_name(path.name + ".part"), pyarrow.schema(answer_columns())
        self._file = self._begun()
        try:
            check_parquet(path, overwrite=overwrite)  # another process may have finished it since
            with named(path):
                self._file.truncate(0)
                self._writer = pyarrow.parquet.ParquetWriter(self._file, self.schema)
        except BaseException:
            self._give_up()
            raise

    def _begun(self) -> BinaryIO:
        """The part file, locked."""
        while True:
            with named(self.path):
                file = self.part.open("ab")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise WorkError(f"{self.path}: another process is writing it") from None
            if self._is_part(file):
                return file
            file.close()  # another process has finished or removed what was opened here

    def _is_part(self, file: BinaryIO) -> bool:
        """Whether an open file is still the part file."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), self.part.stat())
        except OSError:
            return False

    def _give_up(self) -> None:
        """Remove the part file, while it is locked: afterwards it may be another process's."""
        with suppress(OSError):
            if self._is_part(self._file):
                self.part.unlink()
        with suppress(OSError):
            self._file.close()

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write records. Raises WorkError, naming the file, if that fails."""
        import pyarrow

        with named(self.path):
            self._writer.write_table(pyarrow.Table.from_pylist(list(map(_row, records)), self.schema))

    def __enter__(self) -> ParquetOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            with suppress(Exception):  # such as a full disk; the first error is the one to report
                self._writer.close()
            self._give_up()
            return
        try:
            with named(self.path):
                self._writer.close()
                self._file.flush()
                os.fsync(self._file.fileno())
                os.replace(self.part, self.path)
        except BaseException:
            self._give_up()
            raise
        self._file.close()


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    name, known = record["id"], record.get("probabilities")
    row = {**record, "id": name if isinstance(name, str) else json.dumps(name, ensure_ascii=False)}
    if known is not None:
        row["probabilities"] = [{"label": label, "probability": p} for label, p in known.items()]
    return row


def with_answers(table: Any, records: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> Any:
    """Append fields of the records, one per row, to an Arrow table. names: field -> name of its column."""
    import pyarrow

    rows, kinds = list(map(_row, records)), answer_columns()
    for name, column in names.items():
        values = pyarrow.array([row.get(name) for row in rows], kinds[name])
        table = table.append_column(pyarrow.field(column, kinds[name]), values)
    return table
