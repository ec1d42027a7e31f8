"""Predictions written as a Parquet file: the same content as JSON Lines, written atomically."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pandas
import pyarrow
import pyarrow.parquet
import pytest
from command import one_line, slm_fast
from models import (
    knows,
    make_slm,
    mixed,
    one_thread,  # noqa: F401
    random_task,
    two_tasks,
)

from slm_fast import InputError, ScalableLM, WorkError, parquet_output
from slm_fast.parquet_output import ParquetOutput

pytestmark = pytest.mark.usefixtures("few_features")


@pytest.fixture(scope="module")
def slm() -> ScalableLM:
    slm = make_slm("bert", features=32)
    return knows(slm, *two_tasks(slm))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Rows without an ID and with string, integer and list IDs; the row with ID 7 has no text and fails."""
    rows = [{"text": text} for text in mixed(3)] + [
        {"text": "sea1", "id": "käse"},
        {"id": 7},
        {"text": "farm1", "id": [1]},
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_parquet_file_holds_what_json_lines_do(slm, source, tmp_path):
    how = {"top_k": None, "distance": True}
    one = slm.predict_file(source, tmp_path / "out.jsonl", **how)
    two = slm.predict_file(source, tmp_path / "out.PARQUET", **how)
    assert one == two
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.PARQUET", "out.jsonl"]
    records = list(map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines()))
    rows = pyarrow.parquet.read_table(tmp_path / "out.PARQUET").to_pylist()
    assert len(rows) == len(records) == 9
    for row, record in zip(rows, records, strict=True):
        found = {name: value for name, value in row.items() if value is not None}
        if "probabilities" in found:
            found["probabilities"] = {one["label"]: one["probability"] for one in found["probabilities"]}
        if not isinstance(record["id"], str):
            record["id"] = json.dumps(record["id"])
        assert found == record
    frame = pandas.read_parquet(tmp_path / "out.PARQUET")
    assert list(frame.id) == ["1", "2", "3", "4", "5", "6", "käse", "7", "[1]"]
    assert frame.error.notna().sum() == 1


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_texts_and_runs_without_rows_have_the_same_columns(name, tmp_path):
    slm = make_slm(name, features=32)
    knows(slm, random_task(slm, "sea", labels=None))
    for file, content in (("texts", '"sea1 sea2"\n'), ("nothing", "")):
        (tmp_path / f"{file}.jsonl").write_text(content)
        slm.predict_file(tmp_path / f"{file}.jsonl", tmp_path / f"{file}.parquet", max_new_tokens=3)
    texts, nothing = (pyarrow.parquet.read_table(tmp_path / f"{file}.parquet") for file in ("texts", "nothing"))
    assert texts.schema == nothing.schema
    assert (texts.num_rows, nothing.num_rows) == (1, 0)
    assert texts["text"].to_pylist() == [slm.predict(["sea1 sea2"], max_new_tokens=3)[0].text]
    assert texts["label"].null_count == 1


def test_a_file_that_is_there_is_not_gone_on_with(slm, source, tmp_path):
    (tmp_path / "out.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"out.parquet: already exists, and a Parquet file cannot be resumed"):
        slm.predict_file(source, tmp_path / "out.parquet")
    slm.predict_file(source, tmp_path / "out.parquet", overwrite=True)
    assert pyarrow.parquet.read_table(tmp_path / "out.parquet").num_rows == 9


def test_what_stops_the_work_leaves_nothing_or_what_was_there(slm, source, tmp_path):
    with pytest.raises(WorkError, match="id 7: no 'text'"):
        slm.predict_file(source, tmp_path / "out.parquet", strict=True)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    (tmp_path / "out.parquet").write_text("kept")
    with pytest.raises(WorkError, match="id 7: no 'text'"):
        slm.predict_file(source, tmp_path / "out.parquet", strict=True, overwrite=True)
    assert (tmp_path / "out.parquet").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.parquet"]


def test_without_pyarrow_it_is_one_line_before_a_model_is_loaded(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    done = slm_fast("predict", tmp_path / "no-store", "--input", source, "--output", tmp_path / "out.parquet")
    one_line(done, 2, "out.parquet: writing parquet needs pyarrow: pip install 'slm-fast[parquet]'")


def test_shards_are_read_as_one(slm, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(f'"sea{i % 20}"\n' for i in range(1500)))  # two windows
    for i in (1, 2):
        slm.predict_file(tmp_path / "in.jsonl", tmp_path / f"out-{i}.parquet", shard=(i, 2))
    slm.predict_file(tmp_path / "in.jsonl", tmp_path / "out.parquet")
    whole = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    parts = [pyarrow.parquet.read_table(tmp_path / f"out-{i}.parquet") for i in (1, 2)]
    assert pyarrow.concat_tables(parts).to_pylist() == whole.to_pylist()


# Two processes, one of which acts just before a call of the other


def before(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, act: Callable[[], object]) -> None:
    """Call `act` before the next call of a function."""
    call = getattr(owner, name)

    def called(*arguments: object) -> object:
        monkeypatch.setattr(owner, name, call)
        act()
        return call(*arguments)

    monkeypatch.setattr(owner, name, called)


def rows_of(path: Path) -> list[str]:
    return pyarrow.parquet.read_table(path)["id"].to_pylist()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_another_process_finishes_between_opening_and_locking_stays_whole(
    overwrite: bool, tmp_path: Path, monkeypatch
) -> None:
    path = tmp_path / "out.parquet"
    one = ParquetOutput(path, overwrite=overwrite)
    one.write([{"id": "one"}])
    before(monkeypatch, parquet_output.fcntl, "flock", lambda: one.__exit__(None, None, None))
    if overwrite:
        with ParquetOutput(path, overwrite=True) as two:
            assert rows_of(path) == ["one"]
            two.write([{"id": "two"}])
        assert rows_of(path) == ["two"]
    else:
        with pytest.raises(InputError, match="already exists"):
            ParquetOutput(path, overwrite=False)
        assert rows_of(path) == ["one"]
    assert [file.name for file in tmp_path.iterdir()] == ["out.parquet"]


def test_a_file_that_another_process_begins_and_finishes_meanwhile_is_not_overwritten(tmp_path, monkeypatch):
    path = tmp_path / "out.parquet"

    def finish() -> None:
        with ParquetOutput(path, overwrite=False) as one:
            one.write([{"id": "one"}])

    before(monkeypatch, Path, "open", finish)
    with pytest.raises(InputError, match="already exists"):
        ParquetOutput(path, overwrite=False)
    assert rows_of(path) == ["one"]
    assert [file.name for file in tmp_path.iterdir()] == ["out.parquet"]


def test_what_a_failed_run_leaves_is_removed_before_another_can_begin(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "out.parquet"
    one = ParquetOutput(path, overwrite=False)
    closing, others = one._file.close, []

    def close() -> None:
        closing()
        others.append(ParquetOutput(path, overwrite=False))

    monkeypatch.setattr(one, "_file", SimpleNamespace(close=close, fileno=one._file.fileno))
    one.__exit__(ValueError, ValueError(), None)
    others[0].write([{"id": "two"}])
    others[0].__exit__(None, None, None)
    assert rows_of(path) == ["two"]


def test_a_disk_that_is_full_at_the_end_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WorkError, match=r"out.parquet: cannot be written: No space left"):
        ParquetOutput(tmp_path / "out.parquet", overwrite=False).__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []
