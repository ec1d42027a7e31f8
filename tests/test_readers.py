"""Readers of files and streams: records come one at a time, and bad ones are marked without affecting the rest."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from slm_fast.errors import InputError, WorkError
from slm_fast.readers import BATCH, Record, read_records


def found(source: object, **options: str) -> list[tuple[int, object]]:
    """Place of each record, with its fields or its error message."""
    records = read_records(source, **options)
    return [(record.place, dict(record.fields) if record.error is None else str(record.error)) for record in records]


class Endless(io.RawIOBase):
    """A stream that repeats a line endlessly and counts the bytes it returned."""

    def __init__(self, head: bytes, line: bytes) -> None:
        self.given, self.buffer, self.line = 0, head, line

    def readable(self) -> bool:
        return True

    def readinto(self, into) -> int:
        while len(self.buffer) < len(into):
            self.buffer += self.line * 100
        part, self.buffer = self.buffer[: len(into)], self.buffer[len(into) :]
        into[:] = part
        self.given += len(part)
        return len(part)


class Broken(io.RawIOBase):
    """A stream that returns its bytes and then raises OSError."""

    def __init__(self, data: bytes) -> None:
        self.data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, into) -> int:
        count = self.data.readinto(into)
        if not count:
            raise OSError("Input/output error")
        return count


def test_a_stream_of_json_lines_gives_every_record_its_line_and_marks_the_bad_ones() -> None:
    lines = [
        b'\xef\xbb\xbf{"text": "a", "id": 7}\r',
        b"",
        b"  \t",
        b"not json",
        b'{"text": NaN}',
        b'"alone"',
        b"[1]",
        b"null",
        b'{"text": "caf\xe9"}',
        b"[" * 100_000,
        '{"text": "naïve"}'.encode(),
        b'{"text": "a", "label": ' + b"9" * 5000 + b"}",
    ]
    assert found(io.BytesIO(b"\n".join(lines))) == [
        (1, {"text": "a", "id": 7}),
        (4, "not JSON: Expecting value at character 1"),
        (5, "not JSON: NaN is not JSON"),
        (6, {"text": "alone"}),
        (7, "expected a JSON object, got [1]"),
        (8, "expected a JSON object, got None"),
        (9, "not UTF-8 (byte 0xe9)"),
        (10, "not JSON: nested too deeply"),
        (11, {"text": "naïve"}),
        (12, "not JSON: Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits"),
    ]


def test_csv_records_begin_on_their_line_and_the_rest_go_on_after_a_bad_one(tmp_path: Path) -> None:
    lines = [
        b"",
        b"id,text,label",
        b'1,"two',
        b'lines",x',
        b"",
        b"2,a,b,c",
        b'3,"quoted"wrongly,x',
        b"4,caf\xe9,x",
        b'5,"two',
        b'caf\xe9",x',
        "6,gööd".encode(),  # so the file's encoding is taken to be UTF-8
        b'7,"never closed',
        b"8,swallowed,x",
    ]
    expected = [
        (3, {"id": "1", "text": "two\nlines", "label": "x"}),
        (6, "more columns than the header; quote a text that holds a comma"),
        (7, "text follows a closing quotation mark; inside a quoted text, double each quotation mark"),
        (8, "not UTF-8 (byte 0xe9)"),
        (10, "not UTF-8 (byte 0xe9)"),
        (11, {"id": "6", "text": "gööd", "label": None}),
        (12, "a quotation mark is opened and never closed; lines 12 to 13 are lost"),
    ]
    data = b"\n".join(lines)
    (tmp_path / "t.csv").write_bytes(data)
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(data))
    for source in (tmp_path / "t.csv", str(tmp_path / "t.csv.gz")):
        assert found(source) == expected
    assert found(io.BytesIO(data), format="csv") == expected


def test_a_bad_csv_record_keeps_what_could_be_read_of_it() -> None:
    [record] = read_records(io.BytesIO(b"id,text\n1,a,b\n"), format="csv")
    assert record.fields == {"id": "1", "text": "a"}


def test_a_csv_header_that_cannot_be_read_is_the_only_record() -> None:
    assert found(io.BytesIO(b"text,\xff\na,b\n"), format="csv") == [(1, "not UTF-8 (byte 0xff)")]
    [(line, said)] = found(io.BytesIO(b'"text"s,label\na,b\n'), format="csv")
    assert line == 1
    assert said.startswith("text follows a closing quotation mark; ")


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_csv_lines_may_end_as_anywhere(line_end: str) -> None:
    data = line_end.join(["text,label", "a,x", "b,y"]).encode()
    assert found(io.BytesIO(data), format="csv") == [(2, {"text": "a", "label": "x"}), (3, {"text": "b", "label": "y"})]


def test_the_limit_of_the_csv_module_is_left_as_it_was() -> None:
    limit = csv.field_size_limit()
    records = read_records(io.BytesIO(b"text\n" + b"x" * 200_000 + b"\nb\n"), format="csv")
    assert len(next(records).fields["text"]) == 200_000
    assert csv.field_size_limit() == limit


def test_a_parquet_file_gives_its_rows_by_number_across_batches(tmp_path: Path) -> None:
    count = 2 * BATCH + 3
    table = pyarrow.table({"id": range(count), "text": [f"text {i}" for i in range(count)]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet", row_group_size=700)
    records = list(read_records(tmp_path / "t.parquet"))
    assert [(record.place, dict(record.fields)) for record in records] == [
        (i + 1, {"id": i, "text": f"text {i}"}) for i in range(count)
    ]
    assert records[4].where == "row 5"


def test_a_parquet_text_that_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    column = pyarrow.array([b"good", b"caf\xe9"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "t.parquet")
    with pytest.raises(WorkError, match="cannot be read as parquet") as caught:
        list(read_records(tmp_path / "t.parquet"))
    assert str(caught.value).startswith(f"{tmp_path / 't.parquet'}: ")


@pytest.mark.parametrize(
    ("format", "head", "line"), [("csv", b"text\n", b"a,long,row\n"), ("jsonl", b"", b'{"text": "a"}\n')]
)
def test_a_stream_is_read_as_far_as_its_records_are_asked_for(format: str, head: bytes, line: bytes) -> None:
    stream = Endless(head, line)
    records = list(islice(read_records(io.BufferedReader(stream), format=format), 1000))
    assert len(records) == 1000
    assert stream.given < len(line) * 1000 + 100_000


def reading(records: Iterator[Record]) -> tuple[int, str]:
    """Number of records before the error, and the error's message."""
    given = []
    with pytest.raises(WorkError) as caught:
        given.extend(records)
    return len(given), str(caught.value)


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_records_before_the_place_where_a_source_breaks_off_are_given(tmp_path: Path, format: str) -> None:
    rows = [{"text": f"text {i * 7919}"} for i in range(3000)]
    lines = [json.dumps(row) for row in rows] if format == "jsonl" else ["text", *(row["text"] for row in rows)]
    data = "".join(f"{line}\n" for line in lines).encode()
    path = tmp_path / f"t.{format}.gz"
    path.write_bytes(gzip.compress(data)[:-2000])
    compressed = gzip.GzipFile(fileobj=io.BytesIO(path.read_bytes()))
    for records, name in (
        (read_records(path), str(path)),
        (read_records(compressed, format=format), "the input"),
        (read_records(io.BufferedReader(Broken(data)), format=format), "the input"),
    ):
        count, said = reading(records)
        assert 0 < count <= 3000
        assert said.startswith(f"{name}: cannot be read: breaks off after line {count + (format == 'csv')}: ")


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_a_stream_is_left_open(format: str) -> None:
    stream = io.BytesIO(b'"text"\n"a"\n')
    records = read_records(stream, format=format)
    next(records)
    records.close()
    assert not stream.closed


@pytest.mark.parametrize("format", ["csv", "jsonl", None])
def test_a_pipe_is_decompressed_as_a_file_is(format: str | None) -> None:
    lines = (
        [f'{{"text": "text {i * 7919}"}}' for i in range(3000)]
        if format == "jsonl"
        else ["text", *map(str, range(3000))]
    )
    data = gzip.compress("\n".join(lines).encode())
    out, into = os.pipe()

    def fill() -> None:
        with open(into, "wb", buffering=0) as pipe:
            for start in range(0, len(data), 777):
                pipe.write(data[start : start + 777])

    filling = threading.Thread(target=fill)
    filling.start()
    with open(out, "rb") as pipe:
        records = list(read_records(pipe, format=format))
    filling.join()
    assert len(records) == 3000
    assert all(record.error is None for record in records)


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.csv.gz"])
def test_json_lines_are_read_as_such_whatever_their_name(tmp_path: Path, name: str) -> None:
    data = b'\n{"text": "a, b", "label": "x"}\n{"text": "c"}\nno\n'
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    *rows, bad = read_records(tmp_path / name)
    assert [row.fields for row in rows] == [{"text": "a, b", "label": "x"}, {"text": "c"}]
    assert str(bad.error).startswith("not JSON")
    (tmp_path / name.removesuffix(".gz")).write_text("{text}\ta\nb\tc\n" if "tsv" in name else "{text},a\nb,c\n")
    assert found(tmp_path / name.removesuffix(".gz")) == [(2, {"{text}": "b", "a": "c"})]


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.json", "t.txt", "t"])
@pytest.mark.parametrize("texts", [["a", "b"], []])
def test_parquet_is_read_as_such_whatever_its_name(tmp_path: Path, name: str, texts: list[str]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(texts, "string")}), tmp_path / name)
    assert found(tmp_path / name) == [(number, {"text": text}) for number, text in enumerate(texts, 1)]
    (tmp_path / "t.csv").write_text("PAR1,text\na,b\n")
    assert found(tmp_path / "t.csv") == [(2, {"PAR1": "a", "text": "b"})]


def test_a_pipe_of_another_kind_of_file_says_so() -> None:
    with pytest.raises(WorkError, match=r"^the input: is a zip archive or an Excel file; save it as CSV$"):
        list(read_records(io.BytesIO(b"PK\x03\x04" + bytes(range(256)))))


def test_a_format_may_be_given_where_the_name_does_not_say_it(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("text\na\n")
    assert found(tmp_path / "rows.txt", format="csv") == [(2, {"text": "a"})]


def test_a_stream_is_not_parquet() -> None:
    with pytest.raises(InputError, match="a stream cannot be parquet"):
        read_records(io.BytesIO(), format="parquet")
    with pytest.raises(InputError, match="parquet cannot be read from a pipe"):
        list(read_records(io.BytesIO(b"PAR1 and more")))


def test_a_wrong_call_is_refused_before_a_record_is_asked_for(tmp_path: Path) -> None:
    for path in (tmp_path / "t.csv", tmp_path / "t.xlsx"):
        path.write_text("text\n")
    with pytest.raises(InputError, match="no such file"):
        read_records(tmp_path / "missing.csv")
    with pytest.raises(InputError, match="unknown format"):
        read_records(tmp_path / "t.xlsx")
    with pytest.raises(InputError, match="format: expected one of csv, tsv, jsonl, json, parquet, got 'xml'"):
        read_records(tmp_path / "t.csv", format="xml")
