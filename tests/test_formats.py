"""Input files from spreadsheets, editors and shells: separators, encodings, formats detected from content, pipes."""

from __future__ import annotations

import gzip
import io
import json
import os
import threading
from pathlib import Path

import pytest
from test_data import write

from slm_fast.data import Row, Task, identified
from slm_fast.errors import InputError, SlmWarning, WorkError
from slm_fast.readers import read_records

ROWS = [("Grüße, schön", "Lieferung"), ("der Bildschirm; kaputt", "Reparatur"), ("ein\tTab", "Lieferung")]
EXPECTED = [Row(text, label) for text, label in ROWS]


def delimited(separator: str, header: tuple[str, str] = ("text", "label"), end: str = "\r\n") -> str:
    lines = [header, *((f'"{text}"', label) for text, label in ROWS)]
    return "".join(separator.join(line) + end for line in lines)


def found(source: object, **options: object) -> list[tuple[int, object]]:
    records = read_records(source, **options)
    return [(record.place, dict(record.fields) if record.error is None else str(record.error)) for record in records]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"], ids=["comma", "semicolon", "tab", "bar"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["t.csv", "T.CSV", "t.tsv", "t.txt", "t", "t.Csv.GZ"])
def test_delimited_text_shows_its_separator_and_its_unicode(
    tmp_path: Path, separator: str, encoding: str, name: str
) -> None:
    data = delimited(separator).encode(encoding)
    path = write(tmp_path / name, gzip.compress(data) if name.endswith("GZ") else data)
    assert Task.from_file("x", path).rows == EXPECTED


@pytest.mark.parametrize("name", ["t.csv", "t.txt", "t.csv.gz"])
def test_windows_1252_is_read_whole_and_said_once(tmp_path: Path, name: str) -> None:
    data = delimited(";").encode("cp1252")
    path = write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    with pytest.warns(SlmWarning) as warned:
        assert Task.from_file("x", path).rows == EXPECTED
    [warning] = warned
    assert str(warning.message) == f'{path}: not UTF-8; read as Windows-1252 (encoding="cp1252"; --encoding)'
    assert Task.from_file("x", path, encoding="windows-1252").rows == EXPECTED  # requested: no warning


@pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
def test_json_is_utf8_unless_another_encoding_is_given(tmp_path: Path, name: str) -> None:
    lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in ROWS]
    path = write(tmp_path / name, "\n".join(lines).encode("cp1252"))
    assert [record.error is None for record in read_records(path)] == [text.isascii() for text, _ in ROWS]
    with pytest.raises(
        WorkError, match=r"line 1: not UTF-8 \(byte 0x..\); encoding=NAME \(--encoding\) says what it is"
    ):
        Task.from_file("x", path)
    assert Task.from_file("x", path, encoding="cp1252").rows == EXPECTED


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_what_is_in_a_file_counts_for_more_than_its_name(tmp_path: Path, name: str) -> None:
    lines = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in ROWS)
    data = (lines if name == "t.jsonl" else delimited(",")).encode()
    assert Task.from_file("x", write(tmp_path / name, gzip.compress(data))).rows == EXPECTED
    for magic, kind in ((b"PK\x03\x04", "Excel"), (b"%PDF-1.7\n", "PDF")):
        with pytest.raises(WorkError, match=f"is an? .*{kind}.*; save it as CSV"):
            Task.from_file("x", write(tmp_path / name, magic + data))
    if name == "t.csv":  # a control character, which Windows-1252 text does not have
        with pytest.raises(WorkError, match="not UTF-8"):
            Task.from_file("x", write(tmp_path / name, b"text,label\na\x01\xe4,b\nc,d\n"))


def test_lines_may_end_in_carriage_returns_alone(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text, "label": label}) + "\r" for text, label in ROWS)
    assert Task.from_file("x", write(tmp_path / "t.jsonl", lines.encode())).rows == EXPECTED


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark_is_seen_by_any_ascii_in_its_first_line(tmp_path: Path, encoding: str) -> None:
    path = write(tmp_path / "t.csv", "日本,label\n東京,x\n京都,y\n".encode(encoding))
    assert [row.text for row in Task.from_file("x", path, text="日本").rows] == ["東京", "京都"]


def test_one_bad_line_does_not_make_a_utf8_file_windows_1252_wherever_it_stands(tmp_path: Path) -> None:
    good, bad = "gut, schön".encode(), "schön".encode("cp1252")
    for lines in ([b"text", bad, good], [b"text", good, bad]):
        records = list(read_records(write(tmp_path / "t.csv", b"\n".join(lines))))
        assert [str(record.error) for record in records if record.error] == ["not UTF-8 (byte 0xf6)"]
        assert [record.fields["text"] for record in records if not record.error] == ["gut, schön"]


def test_bytes_that_windows_1252_does_not_have_leave_a_file_what_it_is(tmp_path: Path) -> None:
    assert found(write(tmp_path / "t.csv", b"text\na\x81\nb\n")) == [(2, "not UTF-8 (byte 0x81)"), (3, {"text": "b"})]


def test_a_stream_is_never_taken_for_windows_1252(tmp_path: Path) -> None:
    assert found(io.BytesIO(b'{"text": "sch\xf6n"}\n{"text": "b"}\n')) == [
        (1, "not UTF-8 (byte 0xf6)"),
        (2, {"text": "b"}),
    ]


def test_what_is_not_in_the_encoding_that_was_given_is_a_bad_row(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", b"text\na\x81\nb\n")
    assert found(path, encoding="cp1252") == [(2, "not cp1252 (byte 0x81)"), (3, {"text": "b"})]
    data = "text\na\nb".encode("utf-16-le") + b"\x00"
    assert found(io.BytesIO(data), encoding="utf-16-le")[-1] == (3, "not utf-16-le (byte 0x00)")


@pytest.mark.parametrize("encoding", ["utf-9", "base64", "rot13", "idna", "punycode", "", "a\0b", 7])
def test_an_unknown_encoding_is_a_wrong_call(encoding: object) -> None:
    with pytest.raises(InputError, match="encoding: expected a name such as"):
        read_records(io.BytesIO(), encoding=encoding)


@pytest.mark.parametrize("delimiter", ["", ";;", '"', "\n", 7, b";"])
def test_an_impossible_delimiter_is_a_wrong_call(delimiter: object) -> None:
    with pytest.raises(InputError, match="delimiter: expected one character"):
        read_records(io.BytesIO(), delimiter=delimiter)


@pytest.mark.parametrize("delimiter", ["\t", "tab", "\\t"])
def test_a_delimiter_that_is_given_wins(delimiter: str) -> None:
    assert found(io.BytesIO(b"text,label\tnote\na,b\tc\n"), delimiter=delimiter) == [
        (2, {"text,label": "a,b", "note": "c"})
    ]


def test_a_header_of_unknown_names_is_split_where_most_columns_come_out_or_the_names_given_do() -> None:
    assert found(io.BytesIO(b"Anliegen;Ziel\na, b;c\n"), format="csv") == [(2, {"Anliegen": "a, b", "Ziel": "c"})]
    data = b"Anliegen|a, b, c;d\nx|y\n"
    assert found(io.BytesIO(data), columns=["anliegen"]) == [(2, {"Anliegen": "x", "a, b, c;d": "y"})]


def test_a_file_of_one_column_may_hold_any_separator_unquoted() -> None:
    assert found(io.BytesIO(b'text\nhello, world; a|b\tc\n"quoted, ""twice"""\n"a" b\n')) == [
        (2, {"text": "hello, world; a|b\tc"}),
        (3, {"text": 'quoted, "twice"'}),
        (4, "a text that begins with '\"' must be quoted whole"),
    ]


def test_rows_without_anything_in_them_are_blank_and_lines_are_counted() -> None:
    data = b"sep=;\r\n\r\n text ;label\r\na;x\r\n;\r\n ; \r\nb;y\r\n;\r\n"
    assert found(io.BytesIO(data)) == [(4, {"text": "a", "label": "x"}), (7, {"text": "b", "label": "y"})]


def test_a_column_too_many_is_told_in_the_words_of_the_separator() -> None:
    assert found(io.BytesIO(b"text;label\na;b;c\n"))[0][1].endswith("quote a text that holds a semicolon")


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match="line 1: the header has column 'text' twice"):
        Task.from_file("x", write(tmp_path / "t.csv", "text,label, text \na,b,c\n"))


# Streams and files whose names do not show their format


@pytest.mark.parametrize(
    "data",
    [
        b'{"text": "a", "label": "x"}\n\n{"text": "b", "label": "y"}\n',
        b'\xef\xbb\xbf\n [{"text": "a", "label": "x"},\n {"text": "b", "label": "y"}]',
        b'{\n "rows": [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]\n}',
        b'"text","label"\n"a","x"\n"b","y"\n',
        b"label;text\nx;a\ny;b\n",
        '{"text": "a", "label": "x"}\r\n{"text": "b", "label": "y"}\r\n'.encode("utf-16"),
    ],
    ids=range(6),
)
def test_streams_pipes_and_files_without_a_suffix_show_their_format(tmp_path: Path, data: bytes) -> None:
    expected = [Row("a", "x"), Row("b", "y")]
    assert Task.from_file("x", io.BytesIO(data)).rows == expected
    assert Task.from_file("x", write(tmp_path / "rows", data)).rows == expected
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(data,))
    writer.start()
    assert Task.from_file("x", pipe).rows == expected
    writer.join()
    read, end = os.pipe()
    with os.fdopen(end, "wb") as file:
        file.write(data)
    assert Task.from_file("x", f"/dev/fd/{read}").rows == expected
    os.close(read)


def test_strings_of_json_are_texts_unless_they_are_a_header() -> None:
    assert found(io.BytesIO(b'"hello"\n"there"\n')) == [(1, {"text": "hello"}), (2, {"text": "there"})]
    assert found(io.BytesIO(b'"text"\n"there"\n')) == [(2, {"text": "there"})]


def test_a_stream_that_shows_nothing_is_one_bad_row_after_another() -> None:
    data = b"hello, world\nand so on\n"
    assert [place for place, said in found(io.BytesIO(data)) if isinstance(said, str)] == [1, 2]
    assert "columns: 'hello', 'world'" in found(io.BytesIO(data))[0][1]


@pytest.mark.parametrize(
    "lines",
    [
        [b'{"text": "a"}\n', b'{"text": "b"}\n'],
        [b'\xef\xbb\xbf{"text": "a"}\r\n', b'{"text": "b"}\r\n'],
        [b"text,label\na,x\n", b"b,y\n"],
        [b"text\na\n", b"b\n"],
    ],
    ids=range(4),
)
def test_each_row_of_a_pipe_is_given_when_its_line_is_there(lines: list[bytes]) -> None:
    read, end = os.pipe()
    with os.fdopen(read, "rb") as source, os.fdopen(end, "wb", buffering=0) as sink:
        sink.write(lines[0])
        records = read_records(source)
        assert next(records).fields["text"] == "a"  # a reader that needs a second line would block here
        sink.write(lines[1])
        assert next(records).fields["text"] == "b"
        sink.close()
        assert list(records) == []


def test_a_stream_without_a_suffix_that_cannot_seek_loses_nothing_of_a_long_first_line() -> None:
    text = "x" * 3_000_000
    read, end = os.pipe()
    writer = threading.Thread(target=lambda: os.fdopen(end, "wb").write(json.dumps({"text": text}).encode()))
    writer.start()
    with os.fdopen(read, "rb", buffering=0) as source:
        assert found(source) == [(1, {"text": text})]
    writer.join()


# JSON documents


@pytest.mark.parametrize(
    "value",
    [
        [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}],
        {"version": 1, "data": [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]},
        {"text": ["a", "b"], "label": ["x", "y"]},
        {"text": {"0": "a", "1": "b"}, "label": {"0": "x", "1": "y"}},
        {"columns": ["text", "label"], "index": [0, 1], "data": [["a", "x"], ["b", "y"]]},
    ],
    ids=range(5),
)
@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_file_holds_rows_or_columns(tmp_path: Path, value: object, indent: int | None) -> None:
    path = write(tmp_path / "t.json", json.dumps(value, indent=indent))
    assert Task.from_file("x", path).rows == [Row("a", "x"), Row("b", "y")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"text": "a"}, {"text": "b", "label": "x"}]', "row 1: no 'label'"),
        ('[{"text": "a", "label": "x"}, 7]', "row 2: expected a JSON object, got 7"),
        ('[{"text": "a"},\n {"text": }]', "line 2: not JSON: Expecting value at character 11"),
        ('{"train": [{"text": "a"}], "test": [{"text": "b"}]}', "several lists of rows: 'train', 'test'"),
        ('{"text": ["a", "b"], "label": ["x"]}', "columns of different lengths: 'text' 2, 'label' 1"),
        ('{"text": {"0": "a"}, "label": {"1": "x"}}', "columns with different keys"),
        ('{"a": 1}', "expected a list of rows, or columns of one length; fields: 'a'"),
        ("7", "expected a JSON list of objects, got int"),
        ("[" * 100_000, "nested too deeply"),
        ("", "no rows"),
        ('[{"text": NaN}]', "NaN is not JSON"),
    ],
    ids=range(11),
)
def test_a_json_file_of_anything_else_is_one_line(tmp_path: Path, content: str, said: str) -> None:
    path = write(tmp_path / "t.json", content)
    with pytest.raises(WorkError) as caught:
        Task.from_file("x", path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ids_that_json_cannot_hold_are_bad_rows() -> None:
    lines = b'{"id": 1e999, "text": "a"}\n{"id": {"x": [-1e999]}, "text": "a"}\n{"Id": "k", "text": "a"}\n'
    rows = [identified(record) for record in read_records(io.BytesIO(lines))]
    assert [name for name, _ in rows] == [1, 2, "k"]
    assert [isinstance(row, WorkError) for _, row in rows] == [True, True, False]


@pytest.mark.parametrize(
    "content",
    [
        "text,label\na,x,,\nb,y,\n",
        "text,label,,\na,x,,\nb,y,,\n",
        'text, label\na, "x"\n"b", y\n',
        "sep=\t\ntext\tlabel\na\tx\nb\ty\n",
        "\ufeffsep=,\r\ntext,label\r\na,x\r\nb,y\r\n",
    ],
    ids=["separators at the end", "columns without a name", "spaces behind commas", "a declared tab", "and a mark"],
)
def test_what_spreadsheets_add_to_delimited_text_is_no_part_of_it(tmp_path: Path, content: str) -> None:
    assert Task.from_file("x", write(tmp_path / "t.csv", content)).rows == [Row("a", "x"), Row("b", "y")]
    assert Task.from_file("x", io.BytesIO(content.encode())).rows == [Row("a", "x"), Row("b", "y")]


def test_a_field_that_stands_in_a_row_twice_is_refused_wherever_it_is(tmp_path: Path) -> None:
    twice = '{"text": "a", "text": "b", "label": "x"}'
    error = "not JSON: field 'text' occurs twice"
    assert found(io.BytesIO(f'{twice}\n{{"text": "c"}}\n'.encode())) == [(1, error), (2, {"text": "c"})]
    for name, content in (("t.json", f"[{twice}]"), ("t.jsonl", twice)):
        with pytest.raises(WorkError, match=error):
            Task.from_file("x", write(tmp_path / name, content))
    table = {"columns": ["text", "text"], "data": [["a", "b"]]}
    with pytest.raises(WorkError, match="has column 'text' twice"):
        Task.from_file("x", write(tmp_path / "t.json", json.dumps(table)))


@pytest.mark.parametrize("row", [["a"], ["a", "x", 1], "ax", {"text": "a"}])
def test_a_table_of_json_whose_rows_do_not_fit_its_columns_is_refused(tmp_path: Path, row: object) -> None:
    table = {"columns": ["text", "label"], "data": [["a", "x"], row]}
    with pytest.raises(WorkError, match="row 2: expected a list of 2, got "):
        Task.from_file("x", write(tmp_path / "t.json", json.dumps(table)))
