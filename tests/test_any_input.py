"""Property tests: for arbitrary input bytes each record is a row or an error, and no other exception is raised."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slm_fast.data import Row, identified
from slm_fast.encodings import GZIP, NO_TEXT
from slm_fast.errors import SlmError, WorkError
from slm_fast.readers import read_records

NAMES = st.sampled_from(
    ["text", "Text", "label", "id", "body", "title", "instruction", "input", "output", "messages", "system", "history"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
TURNS = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), VALUES | st.just("user"), max_size=3),
    max_size=3,
)
OBJECTS = st.dictionaries(NAMES | st.text(max_size=3), VALUES | TURNS, max_size=4)
LINES = st.one_of(
    st.binary(max_size=40),
    OBJECTS.map(lambda value: json.dumps(value).encode()),
    OBJECTS.map(lambda value: json.dumps(value).encode()[:-3]),
    st.lists(NAMES | st.text(max_size=6), max_size=4).map(",".join).map(lambda line: line.encode("utf-8", "replace")),
    st.sampled_from([b"[", b"{", b'"', b"text,label", b"text;label", b"[" * 5000, b'{"id": 1e999, "text": "a"}']),
)
DATA = st.lists(LINES, max_size=8).map(b"\n".join)


def answered(records: object) -> int:
    """Count the records, asserting that each is a row with a prompt or an error, and that its id is valid JSON."""
    count = 0
    for record in records:
        name, row = identified(record)
        assert isinstance(row, Row | WorkError)
        assert "\n" not in str(row) or isinstance(row, Row)
        json.dumps(name, allow_nan=False, ensure_ascii=False).encode()
        if isinstance(row, Row):
            assert row.prompt.strip()
            row.prompt.encode()
        count += 1
    return count


@settings(max_examples=300, deadline=None)
@given(DATA)
def test_every_line_of_a_stream_is_an_answer_or_an_error(data: bytes) -> None:
    if not data.startswith((b"PAR1", GZIP, *NO_TEXT)):  # refused as a whole
        answered(read_records(io.BytesIO(data)))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    DATA, st.sampled_from(["csv", "tsv", "jsonl", "json", "txt", "csv.gz"]), st.sampled_from([None, "utf-16", "cp1252"])
)
@pytest.mark.filterwarnings("ignore::slm_fast.errors.SlmWarning")
def test_a_file_of_any_bytes_is_rows_or_one_line(
    tmp_path: Path, data: bytes, suffix: str, encoding: str | None
) -> None:
    path = tmp_path / f"t.{suffix}"
    path.write_bytes(data)
    said = f"{path}: "
    try:
        answered(read_records(path, encoding=encoding))
    except SlmError as error:
        said = str(error)
    assert said.startswith(f"{path}: ")
    assert "\n" not in said


@settings(max_examples=300, deadline=None)
@given(st.lists(OBJECTS, min_size=1, max_size=6))
def test_every_json_object_is_one_answer_or_one_error(rows: list[dict]) -> None:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    assert answered(read_records(io.BytesIO(data), format="jsonl")) == len(rows)
