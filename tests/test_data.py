"""Tasks from files: rows and labels that are read, and one-line errors that name the file and the row."""

from __future__ import annotations

import csv
import gzip
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from stores import become_nobody, finish, start

from slm_fast.data import Row, Task, check_name, rows_of_file
from slm_fast.errors import InputError, SlmError, SlmWarning, WorkError
from slm_fast.readers import read_records
from slm_fast.tasks import name_seed

ROWS = [("good, really", "pos"), ("two\nlines", "neg"), ('"quoted"', "pos"), ("naïve 🙂", "neg")]
EXPECTED = [Row(text, label) for text, label in ROWS]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_csv(path: Path, *rows: tuple[str, ...], header: tuple[str, ...] = ("text", "label")) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def jsonl(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def refused(kind: type[SlmError], path: Path, *said: str) -> None:
    """Assert that reading `path` fails with a one-line error that names the file and contains all of `said`."""
    with pytest.raises(SlmError) as caught:
        Task.from_file("x", path)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert caught.value.status == {InputError: 2, WorkError: 1}[kind]
    assert len(message.splitlines()) == 1
    for words in (str(path), *said):
        assert words in message


# What is read


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    plain = write_csv(tmp_path / "t.csv", *ROWS)
    lines = write(tmp_path / "t.jsonl", jsonl(*({"text": text, "label": label} for text, label in ROWS)))
    columns = dict(zip(("text", "label"), map(list, zip(*ROWS, strict=True)), strict=True))
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    paths = [plain, lines, tmp_path / "t.parquet"]
    paths += [write(path.with_name(path.name + ".gz"), gzip.compress(path.read_bytes())) for path in (plain, lines)]
    for path in paths:
        task = Task.from_file("x", path)
        assert (task.name, task.rows, task.labels) == ("x", EXPECTED, ["neg", "pos"]), path


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_byte_order_mark_blank_lines_and_other_columns_do_not_matter(tmp_path: Path, line_end: str) -> None:
    plain = line_end.join(["id,label,text", "7,pos,  good ", "", "8,neg,bad", ""])
    lines = line_end.join(['{"text": "good", "label": "pos", "id": 7}', "", '{"text": "bad", "label": "neg"}'])
    for name, content in (("t.csv", plain), ("t.jsonl", lines)):
        path = write(tmp_path / name, b"\xef\xbb\xbf" + content.encode())
        assert Task.from_file("x", path).rows == [Row("good", "pos"), Row("bad", "neg")]


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_integer_labels_take_their_words_from_labels_json_beside_the_file(tmp_path: Path, format: str) -> None:
    write(tmp_path / "labels.json", '["neg", "pos"]')
    path = tmp_path / f"t.{format}"
    if format == "csv":
        write_csv(path, ("a", "1"), ("b", "0"))
    else:
        write(path, jsonl({"text": "a", "label": 1}, {"text": "b", "label": 0}))
    with pytest.warns(SlmWarning, match=r"t\.[a-z]+: labels are named by labels.json \(0 = neg, 1 = pos\)"):
        task = Task.from_file("x", path)
    assert [row.target for row in task.rows] == ["pos", "neg"]
    assert task.labels == ["neg", "pos"]


def test_integer_labels_without_words_stand_for_themselves(tmp_path: Path) -> None:
    assert Task.from_file("x", write_csv(tmp_path / "t.csv", ("a", "10"), ("b", "9"))).labels == ["10", "9"]


def test_word_labels_are_left_alone_by_labels_json(tmp_path: Path) -> None:
    write(tmp_path / "labels.json", '["neg", "pos"]')
    assert Task.from_file("x", write_csv(tmp_path / "t.csv", ("a", "1"), ("b", "two"))).labels == ["1", "two"]


def test_instruction_rows_are_free_text_and_may_lack_an_input(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 + 1", "output": 2},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
    ]
    task = Task.from_file("x", write(tmp_path / "t.jsonl", jsonl(*rows)))
    assert task.labels is None
    assert task.rows == [Row("1 + 1", "2", "Add."), Row("", "hi", "Say hi.")]


def test_a_task_can_be_made_of_rows_pairs_or_mappings() -> None:
    mappings = [{"text": text, "label": label} for text, label in ROWS]
    assert Task("x", EXPECTED).rows == Task("x", ROWS).rows == Task("x", mappings).rows == EXPECTED


def test_labels_may_be_asked_for_as_free_text() -> None:
    assert Task("x", [("a", "same"), ("b", "same")], free_text=True).labels is None


@pytest.mark.parametrize(
    ("row", "prompt", "by_input", "by_prompt"),
    [
        (Row("in"), "in", "in", "in"),
        (Row("in", instruction="Do."), "Do.\nin", "in", "Do.\nin"),
        (Row("", instruction="Do."), "Do.", "Do.", "Do."),
    ],
)
def test_the_backbone_reads_the_prompt_and_the_router_the_input(
    row: Row, prompt: str, by_input: str, by_prompt: str
) -> None:
    assert row.prompt == prompt
    assert row.query_text("input") == by_input
    assert row.query_text("prompt") == by_prompt


def test_the_seed_of_a_name_never_changes_and_differs_with_name_and_seed() -> None:
    assert name_seed("reviews", 0) == 65449074437274032  # a change would alter all learned bytes
    assert len({name_seed(name, seed) for name in ("a", "b") for seed in (0, 1)}) == 4


# Names


@pytest.mark.parametrize("name", ["a", "9", "Ag_News.v2-final", "x" * 64])
def test_good_names_are_taken(name: str) -> None:
    assert Task(name, ROWS).name == name


@pytest.mark.parametrize(
    "name",
    ["", "x" * 65, ".hidden", "-x", "_x", "a/b", "..", "a b", "naïve", "٣", "a\n", "a\0", "a\\b", 7, None],
    ids=repr,
)
def test_bad_names_are_wrong_calls_and_are_shown(tmp_path: Path, name: object) -> None:
    for call in (
        lambda: check_name(name),
        lambda: Task(name, ROWS),
        lambda: Task.from_file(name, tmp_path / "missing.csv"),
    ):
        with pytest.raises(InputError, match="task name") as caught:
            call()
        assert repr(name) in str(caught.value)
        assert "\n" not in str(caught.value)


# Files that cannot be read


def test_a_missing_file_is_a_wrong_call(tmp_path: Path) -> None:
    for name in ("missing.csv", "missing.jsonl.gz", "missing.parquet"):
        refused(InputError, tmp_path / name, "no such file")
    (tmp_path / "folder.csv").mkdir()
    refused(InputError, tmp_path / "folder.csv", "is a folder, expected a file")


@pytest.mark.parametrize("closed", ["file", "folder"])
@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_a_file_that_may_not_be_read_is_one_line_that_names_it(name: str, closed: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / name, "text,label\na,b\n")
        path.chmod(0 if closed == "file" else 0o644)
        os.chmod(folder, 0 if closed == "folder" else 0o755)

        def work() -> None:
            become_nobody()
            refused(WorkError, path, "cannot be read")

        answer = finish(start(work))
        os.chmod(folder, 0o755)
        assert answer == (0, "done: None")


@pytest.mark.parametrize("name", ["t.xlsx", "t.xml", "t.csv.bz2", "t.parquet.gz", "t.pdf"])
def test_an_unknown_format_names_those_there_are(tmp_path: Path, name: str) -> None:
    refused(InputError, write(tmp_path / name, "text,label\na,b\n"), ".csv", ".jsonl", ".parquet")


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path: Path, format: str) -> None:
    head = {"csv": "text,label\n", "jsonl": ""}[format]
    row = {"csv": "caf\u00e9,x\n", "jsonl": '{"text": "caf\u00e9", "label": "x"}\n'}[format]
    content = (head + row).encode() + row.encode("latin-1")
    line = content.count(b"\n")
    refused(WorkError, write(tmp_path / f"t.{format}", content), f"line {line}", "not UTF-8", "0xe9")
    refused(WorkError, write(tmp_path / f"t.{format}.gz", gzip.compress(content)), f"line {line}", "0xe9")


def test_a_damaged_gz_file_is_named_wherever_the_damage_is(tmp_path: Path) -> None:
    whole = gzip.compress("".join(f"text {i * 7919},label {i % 7}\n" for i in range(300)).encode())
    path = tmp_path / "t.csv.gz"
    for length in (0, 5, 12, len(whole) // 2, len(whole) - 1):
        if length:  # an empty file is an empty task
            refused(WorkError, write(path, whole[:length]), "cannot be read")
    for at in range(10, len(whole), 50):
        refused(WorkError, write(path, whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]), "cannot be read")


def test_a_file_that_is_named_gz_and_is_not_compressed_is_told_so(tmp_path: Path) -> None:
    for content in (b"text,label\na,x\nb,y\n", b"PK\x03\x04" + bytes(100)):
        path = write(tmp_path / "t.csv.gz", content)
        refused(WorkError, path, "t.csv.gz: cannot be read: is not compressed, whatever its name; leave out the '.gz'")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"text,label\na,b\n", b"PAR1" + bytes(100) + b"PAR1"])
def test_a_damaged_parquet_file_is_named(tmp_path: Path, content: bytes) -> None:
    refused(WorkError, write(tmp_path / "t.parquet", content), "parquet")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "a", "label": ', "not JSON"),
        ("text,label", "not JSON"),
        ("[1, 2]", "expected a JSON object"),
        ("null", "expected a JSON object"),
        ("{}", "no 'text'"),
        ('{"label": "x"}', "no 'text'"),
        ('{"te\\nxt": "a", "label": "x"}', "no 'text'"),
        ('{"text": "", "label": "x"}', "empty text"),
        ('{"text": " \\n ", "label": "x"}', "empty text"),
        ('{"text": null, "label": "x"}', "empty text"),
        ('{"text": "\\u200b \\ufeff", "label": "x"}', "empty text"),
        ('{"text": "\\u0000\\u0007", "label": "x"}', "empty text"),
        ('{"instruction": "\\u200b", "input": "\\u0000", "output": "x"}', "empty input"),
        ('{"text": 7, "label": "x"}', "'text': expected a string, got 7"),
        ('{"text": "a"}', "no 'label'"),
        ('{"text": "a", "label": " "}', "no 'label'"),
        ('{"text": "a", "label": ["x"]}', "'label': expected a word or an integer"),
        ('{"text": "a", "label": 0.5}', "'label': expected a word or an integer, got 0.5"),
        ('{"instruction": "", "input": "", "output": "x"}', "empty input"),
        ('{"instruction": "Do.", "input": "a"}', "no 'output'"),
        ('{"text": "\\ud83d", "label": "x"}', "'text'"),  # a lone surrogate, which cannot be encoded
        ('{"text": "a", "label": "\\ud83d"}', "'label'"),
        ('{"text": "a", "label": ' + "1" * 5000 + "}", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
    ids=range(24),
)
def test_a_bad_jsonl_row_is_named_with_its_line(tmp_path: Path, line: str, said: str) -> None:
    good = '{"text": "a", "label": "x"}'
    refused(WorkError, write(tmp_path / "t.jsonl", f"{good}\n\n{line}\n{good}\n"), "line 3", said)


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        ("text,label\na,x\n,y\n", 3, "empty text"),
        ("text,label\na,x\nb,\n", 3, "no 'label'"),
        ("text,label\na,x\nb\n", 3, "no 'label'"),
        ("text,label\na,x\nhello, world,y\n", 3, "column"),  # a comma that should have been quoted
        ('text,label\n"two\nlines",x\n,y\n', 4, "empty text"),
        ('text,label\na,x\nb,y\n"c,x\nd,y\ne,x\n', 4, "a quotation mark is opened and never closed"),
        ('text,label\na,x\nb,"y\nc,x\nd,y\n', 3, "a quotation mark is opened and never closed"),
        ("words,label\na,x\n", 2, "'words', 'label'; text=NAME (--text-column)"),
        ("a,x\nb,y\n", 2, "no 'text'"),
        ('"te\nxt",label\na,x\n', 3, "no 'text'"),
    ],
    ids=range(10),
)
def test_a_bad_csv_row_is_named_with_its_line(tmp_path: Path, content: str, line: int, said: str) -> None:
    refused(WorkError, write(tmp_path / "t.csv", content), f"line {line}", said)


def test_a_csv_text_may_be_longer_than_the_csv_modules_limit(tmp_path: Path) -> None:
    long = "word " * 40_000 + "end"
    task = Task.from_file("x", write_csv(tmp_path / "t.csv", (long, "pos"), ("b", "neg")))
    assert task.rows[0].text == long


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (b'["neg"', "labels.json: not a JSON list of words"),
        (b"\xff", "labels.json: not a JSON list of words"),
        (b'{"0": "neg", "1": "pos"}', "labels.json: not a JSON list of words"),
        (b"[1, 2]", "labels.json: not a JSON list of words"),
        (b'["neg"]', "line 3: label 1: there is only 1 label word, numbered from 0"),
    ],
)
def test_words_that_do_not_fit_integer_labels_are_an_error_only_where_they_were_asked_for(
    tmp_path: Path, words: bytes, said: str
) -> None:
    write(tmp_path / "labels.json", words)
    path = write_csv(tmp_path / "t.csv", ("a", "0"), ("b", "1"))
    with pytest.raises(WorkError, match=said) as caught:
        Task.from_file("x", path, labels=tmp_path / "labels.json")
    assert "\n" not in str(caught.value)
    with pytest.warns(SlmWarning, match="labels are not named") as warned:
        assert Task.from_file("x", path).labels == ["0", "1"]
    assert len(warned) == 1


# Tasks that cannot be learned


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet", "t.csv.gz"])
def test_a_file_without_rows_is_an_empty_task(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": [], "label": []}), path)
    else:
        write(path, {"t.csv": b"text,label\n", "t.jsonl": b"\n\n"}.get(name, gzip.compress(b"")))
    refused(WorkError, path, "no rows")


@pytest.mark.parametrize("content", ["text,label\n", "<html><body>Sign in</body></html>", "\ntext\n\n"])
def test_a_file_of_only_a_header_says_so(tmp_path: Path, content: str) -> None:
    path = write(tmp_path / "t.csv", content)
    refused(WorkError, path, f"has no rows; only a header line was found: {content.strip()!r}"[:55])
    with pytest.raises(WorkError, match="only a header line was found"):
        rows_of_file(path)
    assert list(read_records(path)) == []  # to answer, no rows are rows enough


def test_a_file_with_one_label_is_refused_naming_it(tmp_path: Path) -> None:
    refused(WorkError, write_csv(tmp_path / "t.csv", ("a", "pos"), ("b", "pos")), "at least two labels", "'pos'")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "no rows"),
        ([("a", "x")], "at least two labels"),
        ([("a", "x"), ("", "y")], "row 2: empty text"),
        ([("a", "x"), "b"], "row 2: no 'label'"),
        ([("a", "x"), ("b", None)], "row 2: no 'label'"),
        ([("a", "x"), 7], "row 2: expected a text or an object"),
        ([["a", "x"], ["b", "y"]], r"row 1: .*, got \['a', 'x'\]; a pair is read as a tuple: \(text, label\)$"),
        ([np.array(7)], "row 1: expected a text or an object .*, got array.7.$"),
        (np.array([["a", "x"], ["b", "y"]]), r"row 1: .*; a pair is read as a tuple: \(text, label\)$"),
        ([("a", "x"), ("b", "y", "z")], "row 2: expected a text or an object"),
        ([("a", "x"), {"input": "b"}], "row 2: no 'output'"),
    ],
)
def test_bad_rows_in_memory_are_named_by_task_and_number(rows: list, said: str) -> None:
    with pytest.raises(WorkError, match=said) as caught:
        Task("reviews", rows)
    assert str(caught.value).startswith("reviews: ")
    assert "\n" not in str(caught.value)
