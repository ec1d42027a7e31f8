"""Tasks from rows in memory, and rows to predict."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from test_data import EXPECTED, ROWS, jsonl, refused, write

from slm_fast.data import Row, Task, identified
from slm_fast.errors import InputError, SlmError, WorkError
from slm_fast.readers import Record, read_records

# Rows from memory


class DataFrame:
    """Behaves like pandas.DataFrame: iteration yields column names."""

    def __init__(self, **columns: list) -> None:
        self.columns = columns

    def __iter__(self):
        return iter(self.columns)

    def iterrows(self):
        raise AssertionError("slow")

    def to_dict(self, orient: str = "dict"):
        assert orient == "records"
        return [dict(zip(self.columns, row, strict=True)) for row in zip(*self.columns.values(), strict=True)]


class Dataset:
    """Behaves like datasets.Dataset: iteration yields rows, and to_dict returns columns."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)

    def to_dict(self, batch_size: int | None = None):
        raise AssertionError("columns are not rows")


RENAMED = [{"sentence": text, "stars": label, "id": i} for i, (text, label) in enumerate(ROWS)]


@pytest.mark.parametrize(
    "rows",
    [
        RENAMED,
        (row for row in RENAMED),
        Dataset(RENAMED),
        DataFrame(id=[1, 2, 3, 4], sentence=[row[0] for row in ROWS], stars=[row[1] for row in ROWS]),
    ],
    ids=["list", "generator", "Dataset", "DataFrame"],
)
def test_columns_may_have_other_names(rows: Iterable) -> None:
    task = Task.from_rows("x", rows, text="sentence", label="stars")
    assert (task.rows, task.labels) == (EXPECTED, ["neg", "pos"])


def test_rows_under_the_usual_names_need_no_columns_named() -> None:
    plain = [{"text": text, "label": label} for text, label in ROWS]
    for rows in (ROWS, iter(ROWS), EXPECTED, plain, Dataset(plain), DataFrame(**dict(zip(plain[0], zip(*ROWS))))):  # noqa: B905
        assert Task.from_rows("x", rows).rows == EXPECTED
    instructed = [{"instruction": "Add.", "input": "1 + 1", "output": 2}]
    assert Task.from_rows("x", instructed).labels is None


def test_one_column_may_be_named_and_the_other_be_the_usual_one() -> None:
    assert Task.from_rows("x", [{"q": t, "label": a} for t, a in ROWS], text="q").rows == EXPECTED
    assert Task.from_rows("x", [{"text": t, "a": a, "label": 0.5} for t, a in ROWS], label="a").rows == EXPECTED
    instructed = [{"instruction": "Add.", "input": "1 + 1", "sum": 2}]
    task = Task.from_rows("x", instructed, label="sum")
    assert (task.rows, task.labels) == ([Row("1 + 1", "2", "Add.")], None)


def test_the_answers_of_named_columns_may_be_free_text_and_a_task_to_evaluate_may_have_one_label() -> None:
    assert Task.from_rows("x", RENAMED, text="sentence", label="stars", free_text=True).labels is None
    assert Task.from_rows("x", [("a", "x")], training=False).labels == ["x"]


def test_labels_may_be_integers_of_numpy() -> None:
    rows = [{"text": "a", "label": np.int64(3)}, {"text": "b", "label": np.int32(0)}]
    assert Task.from_rows("x", rows).labels == ["0", "3"]


@pytest.mark.parametrize(
    ("rows", "columns", "kind", "said"),
    [
        (RENAMED, {"text": "sentense"}, InputError, "row 1: no column 'sentense'; columns: 'sentence', 'stars', 'id'"),
        ([{"q": "a", "a": 1}], {"text": "q"}, WorkError, "row 1: no column 'label'; columns: 'q', 'a'"),
        ([{"q": "a", "a": 1}], {"label": "a"}, InputError, "row 1: no column 'text'; columns: 'q', 'a'"),
        ([{"input": "a"}], {"label": "y"}, InputError, "row 1: no column 'y'; columns: 'input'"),
        ([*RENAMED, {"a": 1}], {"text": "sentence", "label": "stars"}, WorkError, "row 5: no column 'sentence'"),
        ([{}], {"label": "x"}, InputError, "row 1: no column 'text'; columns: none"),
        (ROWS, {"text": "sentence"}, WorkError, "row 1: expected a mapping with named columns, got ('good"),
        ([{"q": 7, "label": "x"}], {"text": "q"}, WorkError, "row 1: 'q': expected a string, got 7"),
        ([{"text": "a", "tag": "x"}], {}, WorkError, "row 1: no 'label'; fields: 'text', 'tag'"),
        ([{"words": "a"}], {}, WorkError, "row 1: no 'text' (nor 'instruction' and 'input'); fields: 'words'"),
        ([{"text": "a", "label": float("nan")}], {}, WorkError, "row 1: no 'label'"),
    ],
)
def test_a_missing_column_is_one_line_that_lists_those_there_are(
    rows: list, columns: dict[str, str], kind: type[SlmError], said: str
) -> None:
    with pytest.raises(SlmError) as caught:
        Task.from_rows("reviews", rows, **columns)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(f"reviews: {said}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rows", ["text", {"train": ROWS, "test": ROWS}, None, 7])
def test_what_gives_no_rows_is_a_wrong_call(rows: object) -> None:
    with pytest.raises(InputError, match="rows: expected an iterable of rows, got "):
        Task.from_rows("x", rows)


@pytest.mark.parametrize("depth", [100, 900, 100_000])
def test_a_deeply_nested_field_is_a_bad_row(tmp_path: Path, depth: int) -> None:
    line = '{"label": "x", "text": ' + "[" * depth + "]" * depth + "}"
    refused(WorkError, write(tmp_path / "t.jsonl", line), "line 1")


def test_an_integer_label_of_instructed_rows_is_not_their_answer(tmp_path: Path) -> None:
    write(tmp_path / "labels.json", '["neg", "pos"]')
    rows = [{"instruction": "Say hi.", "output": "hi", "label": label} for label in (1, [2])]
    path = write(tmp_path / "t.jsonl", jsonl(*rows[:1]))
    assert Task.from_file("x", path).rows == [Row("", "hi", "Say hi.")]
    path = write(tmp_path / "t.jsonl", jsonl(*rows))
    assert len(Task.from_file("x", path).rows) == 2


# Rows to predict


@pytest.mark.parametrize(
    ("fields", "name", "row"),
    [
        ({"text": "a", "id": "x", "label": 1}, "x", Row("a", "1")),
        ({"text": "a"}, 3, Row("a")),
        ({"text": "a", "id": None}, None, Row("a")),
        ({"instruction": "Do.", "id": {"a": [1]}}, {"a": [1]}, Row("", None, "Do.")),
        ({"text": "\u200b", "id": "x"}, "x", "empty text"),
        ({"text": "\0", "id": "x"}, "x", "empty text"),
        ({"text": "\u200b.", "id": "x"}, "x", Row("\u200b.")),
        ({"instruction": "Do.", "input": "\u200b"}, 3, Row("", None, "Do.")),
        ({"id": "x"}, "x", "no 'text' (nor 'instruction' and 'input'); fields: 'id'"),
        ({"id": "\ud800", "text": "a"}, 3, "'id': holds half a character"),
        ({"id": float("nan"), "text": "a"}, 3, "'id': cannot be written as JSON"),
        ({"id": b"x", "text": "a"}, 3, "'id': cannot be written as JSON"),
        ({"id": "x", "text": "\ud800"}, "x", "'text': holds half a character"),
    ],
)
def test_a_row_to_answer_has_its_id_or_its_place(fields: dict, name: object, row: Row | str) -> None:
    found = identified(Record(3, fields))
    assert found[0] == name
    if isinstance(row, Row):
        assert found[1] == row
    else:
        assert isinstance(found[1], WorkError)
        assert str(found[1]).startswith(row)


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        ('1,"a\n2,b\n3,c\n', 2, "a quotation mark is opened and never closed; lines 2 to 4 are lost"),
        ('1,a\n2,"b\n3,"c\n', 3, "each quotation mark; lines 3 to 4 are lost"),
        ('1,"a"b\n2,c\n', 2, "double each quotation mark"),
    ],
)
def test_a_csv_row_that_could_not_be_read_has_its_line_as_its_id(content: str, name: int, said: str) -> None:
    rows = [identified(record) for record in read_records(io.BytesIO(f"id,text\n{content}".encode()), format="csv")]
    [(found, error)] = [(found, row) for found, row in rows if isinstance(row, WorkError)]
    assert found == name
    assert str(error).endswith(said)


def test_a_record_that_could_not_be_read_keeps_its_id_and_its_error() -> None:
    error = WorkError("more columns than the header")
    assert identified(Record(3, {"id": "x", "text": "a"}, error)) == ("x", error)
