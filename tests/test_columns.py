"""Finding the text, label and instruction columns by usual or given names, and errors if they are ambiguous."""

from __future__ import annotations

import json
import sqlite3
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from test_data import jsonl, write
from test_rows import DataFrame, Dataset

from slm_fast.data import Row, Task, identified, rows_to_answer
from slm_fast.errors import InputError, SlmError, WorkError, one_line
from slm_fast.readers import Record, class_name

ASKED = [{"role": "user", "content": "Hi?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": " Hello. "}]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"text": 0}, "text: expected the name of a column, got 0"),
        ({"label": ("a",)}, r"label: expected the name of a column, got \('a',\)"),
        ({"text": "a", "label": "a"}, "label: expected another column than that of the text, got 'a' for both"),
    ],
)
def test_columns_that_are_no_names_or_one_for_both_roles_are_a_wrong_call(columns: dict, said: str, tmp_path: Path):
    with pytest.raises(InputError, match=f"^{said}"):
        Task.from_file("x", write(tmp_path / "x.jsonl", jsonl({"a": "b"})), **columns)
    with pytest.raises(InputError, match=f"^{said}"):
        Task.from_rows("x", [{"a": "b"}], **columns)


@pytest.mark.parametrize("columns", [{"text": "label"}, {"label": "text"}, {"text": "Label"}])
def test_the_column_named_for_one_role_is_not_taken_for_the_other_too(columns: dict, tmp_path: Path) -> None:
    row = {"text": "a", "label": "b"}
    for call in (
        lambda: Task.from_file("x", write(tmp_path / "x.jsonl", jsonl(row)), **columns),
        lambda: Task.from_rows("x", [row], **columns),
    ):
        with pytest.raises(
            SlmError, match=r"no column 'text' beside the label's, 'text'|no 'label' beside 'label', which is read"
        ):
            call()


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("it failed\nhere", "it failed"),
        ("made with:\n   a 1\n   b 2", "made with: a 1"),
        ("a:\n\nb:\nc:\nd:\ne", "a: b: c: d:"),
        (" \n", "ValueError"),
    ],
)
def test_the_first_line_of_a_message_has_what_its_colon_announces(message: str, line: str) -> None:
    assert one_line(ValueError(message)) == line


def rows_of(*rows: object, **columns: str) -> list[Row]:
    return Task.from_rows("x", rows, training=False, **columns).rows


@pytest.mark.parametrize("text", ["text", "Text", " TEXT ", "\ufefftext", "sentence", "Review", "body", "Input Text"])
@pytest.mark.parametrize("label", ["label", "Label", " label", "category", "Intent", "rating", "queue"])
def test_usual_names_are_known_whatever_their_case_and_spacing(text: str, label: str) -> None:
    assert rows_of({"id": 1, label: "x", text: "a"}) == [Row("a", "x")]
    assert identified(Record(1, {label: "x", text: "a"}))[1] == Row("a", "x")


def test_the_usual_name_wins_over_its_synonyms_and_its_exact_spelling_over_others() -> None:
    row = {"title": "t", "text": "a", "body": "b", "category": "c", "label": "x"}
    assert rows_of(row) == [Row("a", "x")]
    assert rows_of({"Text": "b", "text": "a", "Label": "y", "label": "x"}) == [Row("a", "x")]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"title": "t", "body": "b", "label": "x"},
            "columns 'title', 'body' may each be the text; text=NAME (--text-column) says which",
        ),
        (
            {"text": "t", "topic": "b", "intent": "x"},
            "columns 'topic', 'intent' may each be the label; label=NAME (--label-column) says which",
        ),
        ({"prompt": "a", "answer": "b", "completion": "c"}, "columns 'answer', 'completion' may each be the output"),
        ({"Frage": "a", "Thema": "x"}, "fields: 'Frage', 'Thema'; text=NAME (--text-column) says which holds it"),
        ({"text": "a", "Thema": "x"}, "fields: 'text', 'Thema'; label=NAME (--label-column) says which holds it"),
        ({"text;label": "a;x"}, "; text=NAME (--text-column) says which holds it, delimiter=CHAR (--delimiter)"),
        ({"TEXT": "a", "Text": "b", "label": "x"}, "columns 'TEXT', 'Text' may each be the text"),
    ],
    ids=range(7),
)
def test_where_two_columns_could_be_meant_or_none_the_options_are_named(row: dict, said: str) -> None:
    with pytest.raises(WorkError) as caught:
        rows_of(row)
    assert str(caught.value).startswith("x: row 1: ")
    assert said in str(caught.value)


def test_a_delimiter_is_not_advised_for_a_single_column_whose_name_is_one_word() -> None:
    with pytest.raises(WorkError, match=r"says which holds it$"):
        rows_of({"Frage": "a"})


def test_to_answer_a_row_its_label_need_not_be_clear() -> None:
    assert identified(Record(1, {"text": "a", "topic": "b", "intent": "x"}))[1] == Row("a")
    assert identified(Record(1, {"text": "a", "label": ["x", "y"]}))[1] == Row("a")
    assert identified(Record(1, {"q": "a"}), text="Q")[1] == Row("a")
    assert isinstance(identified(Record(1, {"q": "a"}), text="text")[1], WorkError)


def test_names_that_are_given_win_and_match_exactly_before_they_match_without_case(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "text;Frage;frage;Thema\r\na;b;c;x\r\n")
    for text, expected in (("frage", "c"), ("Frage", "b"), ("TEXT", "a")):
        task = Task.from_file("x", path, text=text, label="thema", training=False)
        assert task.rows == [Row(expected, "x")]
    with pytest.raises(InputError, match=r"t.csv: line 2: more than one column 'FRAGE'"):
        Task.from_file("x", path, text="FRAGE")
    with pytest.raises(InputError, match=r"line 2: no column 'nix'; columns: 'text', 'Frage', 'frage', 'Thema'"):
        Task.from_file("x", path, label="nix")


# Instructions


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Do.", "input": "a", "output": "b", "text": "### Do. a b"}, Row("a", "b", "Do.")),
        ({"Instruction": "Do.", "Input": "a", "Response": "b"}, Row("a", "b", "Do.")),
        ({"instruction": "Do.", "input": "", "output": "b", "system": "Be kind."}, Row("", "b", "Be kind.\nDo.")),
        ({"system": "Be kind.", "input": "a", "output": "b"}, Row("a", "b", "Be kind.")),
        ({"instruction": "Do.", "context": "a", "response": "b", "category": "qa"}, Row("a", "b", "Do.")),
        ({"instruction": "Do.", "input": "a", "context": "", "output": "b"}, Row("a", "b", "Do.")),
        ({"instruction": "Do.", "output": "b", "text": "Below ... Do. ### b"}, Row("", "b", "Do.")),
        ({"instruction": "Do.", "input": "a", "output": "b", "history": []}, Row("a", "b", "Do.")),
        ({"prompt": "a", "completion": "b"}, Row("a", "b")),
        ({"prompt": "a", "response": "b", "system": "Be kind."}, Row("a", "b", "Be kind.")),
        ({"prompt": "a", "completion": "b", "text": "a b"}, Row("a", "b")),
        ({"question": "a", "answer": "b"}, Row("a", "b")),
        ({"question": "a", "context": "c", "answer": "b"}, Row("c\na", "b")),
    ],
    ids=range(13),
)
def test_instructions_and_their_answers_come_under_several_names(row: dict, expected: Row) -> None:
    task = Task("x", [row])
    assert (task.rows, task.labels) == ([expected], None)
    asked = {key: value for key, value in row.items() if value != "b"}
    if "text" not in row:
        assert list(rows_to_answer([asked])) == [Row(expected.text, None, expected.instruction)]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a", "label": "x", "instruction": "Do.", "output": "b"},
        {"text": "a", "label": "x", "instruction": "Do."},
        {"question": "a", "label": "x"},
        {"prompt": "a", "label": "x"},
        {"text": "a", "label": "x", "messages": ANSWERED},
    ],
    ids=range(5),
)
def test_a_text_with_a_label_of_its_own_is_that(row: dict) -> None:
    assert rows_of(row) == [Row("a", "x")]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "Do.", "text": "the input", "output": "b"}, "'text' beside 'instruction': call it 'input'"),
        ({"instruction": "Do.", "input": "a", "output": "b", "history": [["q", "a"]]}, "'history': is not understood"),
        ({"instruction": "Do.", "input": "a", "output": "b", "context": "c"}, "'context': is not understood"),
        ({"question": "a", "choices": ["b", "c"], "answer": 1}, "'choices': is not understood"),
        ({"messages": ANSWERED, "images": ["a.png"]}, "'images': is not understood"),
        ({"prompt": "a", "completion": ["b"]}, "'completion': expected a word or an integer, got ['b']"),
    ],
    ids=range(6),
)
def test_what_would_be_left_out_without_a_word_is_refused(row: dict, said: str) -> None:
    with pytest.raises(WorkError) as caught:
        rows_of(row)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("first", "other"),
    [
        ({"text": "a", "label": "x"}, {"instruction": "Do.", "input": "a", "output": "b"}),
        (("a", "x"), {"prompt": "a", "completion": "b"}),
        ({"instruction": "Do.", "input": "a", "output": "b"}, {"text": "a", "label": "x"}),
        ({"messages": ANSWERED}, {"text": "a", "label": "x"}),
    ],
    ids=range(4),
)
def test_rows_of_two_kinds_are_refused_and_the_first_that_differs_is_named(
    tmp_path: Path, first: object, other: dict
) -> None:
    for free_text in (None, True, False):
        with pytest.raises(WorkError, match=r"^x: row 3: .*, where the first row has .*all of one kind$"):
            Task("x", [first, first, other, first], free_text=free_text)
    if isinstance(first, dict):
        with pytest.raises(WorkError, match=r"t.jsonl: line 3: .*all of one kind$"):
            Task.from_file("x", write(tmp_path / "t.jsonl", jsonl(first, first, other)))


# Chats


@pytest.mark.parametrize("style", [("messages", "role", "content"), ("conversations", "from", "value")])
def test_the_last_turn_of_a_chat_is_the_answer_and_what_precedes_it_the_input(style: tuple[str, str, str]) -> None:
    column, role, content = style
    human, robot = ("human", "gpt") if role == "from" else ("user", "assistant")

    def chat(*turns: tuple[str, str]) -> dict:
        return {column: [{role: who, content: said} for who, said in turns]}

    short = chat((human, "Hi?"), (robot, "Hello."))
    long = chat(("system", "Be kind."), (human, "Hi?"), (robot, "Hello."), (human, "And?"), (robot, "Fine."))
    turns = (("user", "Hi?"), ("assistant", "Hello."), ("user", "And?"))
    expected = [Row("Hi?", "Hello."), Row("User: Hi?\nAssistant: Hello.\nUser: And?", "Fine.", "Be kind.", turns)]
    task = Task("x", [short, long])
    assert (task.rows, task.labels) == (expected, None)
    assert list(rows_to_answer([short, chat((human, "Hi?"))])) == [expected[0], Row("Hi?")]
    assert Task("x", [{"system": "Be kind.", **short}]).rows == [Row("Hi?", "Hello.", "Be kind.")]


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv", "t.parquet"])
def test_chats_come_in_every_format(tmp_path: Path, name: str) -> None:
    rows = [{"messages": ANSWERED}]
    path = tmp_path / name
    if name == "t.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif name == "t.csv":
        write(path, 'messages\n"{}"\n'.format(json.dumps(ANSWERED).replace('"', '""')))
    else:
        write(path, json.dumps(rows if name == "t.json" else rows[0]))
    assert Task.from_file("x", path).rows == [Row("Hi?", "Hello.")]


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        (ASKED, "the last turn is not the assistant's"),
        ([], "expected a turn of the user's"),
        (ANSWERED[1:], "expected a turn of the user's"),
        ([*ANSWERED, ANSWERED[1]], "expected a turn of the user's"),
        ([*ASKED, {"role": "tool", "content": "x"}, ANSWERED[1]], "turn 2: expected a role of system"),
        ([*ASKED, {"role": "system", "content": "x"}, *ANSWERED], "a turn of the system's stands after others"),
        (
            [*ASKED, {"role": "assistant", "content": None, "tool_calls": [{}]}],
            "turn 2: 'tool_calls' is not understood",
        ),
        ([*ASKED, {"role": "assistant", "content": ""}], "turn 2: 'content': expected a text, got ''"),
        ([{"role": "user", "content": [{"type": "image_url"}]}, ANSWERED[1]], "expected parts that are texts"),
        ([*ASKED, "hello"], "turn 2: expected an object with 'role' and 'content'"),
        ([{"role": ["user"], "content": "a"}], "turn 1: expected a role"),
        ("hello", "expected a list of turns, got 'hello'"),
        ("[hello", "not a JSON list of turns"),
        (None, "expected a list of turns, got None"),
    ],
    ids=range(14),
)
def test_a_chat_that_is_not_understood_is_one_line(turns: object, said: str) -> None:
    with pytest.raises(WorkError) as caught:
        Task("x", [{"messages": turns}])
    assert str(caught.value).startswith("x: row 1: 'messages': ")
    assert said in str(caught.value)


def test_the_parts_of_a_turn_are_joined_where_all_are_texts() -> None:
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]
    assert Task("x", [{"messages": [{"role": "user", "content": parts}, ANSWERED[1]]}]).rows[0].text == "Hi\nthere"


# Types of rows that callers may pass


Labelled = namedtuple("Labelled", "label text")
Ticket = namedtuple("Ticket", "number body queue")


class PolarsFrame:
    """Stand-in for polars.DataFrame, which yields columns when iterated."""

    def __iter__(self):
        return iter([["a"], ["x"]])

    def to_dicts(self):
        raise AssertionError("all at once")

    def iter_rows(self, *, named: bool):
        assert named
        return iter([{"text": "a", "label": "x"}])


def test_named_tuples_are_read_by_their_names_in_whatever_order() -> None:
    assert rows_of(Labelled("x", "a"), Labelled(text="b", label="y")) == [Row("a", "x"), Row("b", "y")]
    assert rows_of(Ticket(1, "a", "x")) == [Row("a", "x")]
    assert rows_of(Ticket(1, "a", "x"), text="queue", label="body") == [Row("x", "a")]
    assert list(rows_to_answer([Labelled("x", "a")])) == [Row("a", "x")]


def test_rows_of_tables_and_data_bases_are_read_by_their_names() -> None:
    table = sqlite3.connect(":memory:")
    table.row_factory = sqlite3.Row
    given = [
        DataFrame(label=["x"], text=["a"]),
        Dataset([{"label": "x", "text": "a"}]),
        PolarsFrame(),
        pyarrow.table({"label": ["x"], "text": ["a"]}),
        table.execute("select 'x' as label, 'a' as text"),
        (row for row in [("a", "x")]),
    ]
    for rows in given:
        assert Task("x", rows, training=False).rows == [Row("a", "x")]
    for rows in given[:4]:
        assert list(rows_to_answer(rows)) == [Row("a", "x")]


def test_texts_to_answer_come_in_lists_arrays_and_pairs() -> None:
    expected = [Row("a"), Row("b")]
    for rows in (["a", "b"], ("a", "b"), np.array(["a", "b"]), np.array(["a", "b"], object), expected, iter("ab")):
        assert list(rows_to_answer(rows)) == expected
    assert [row.text for row in rows_to_answer([("a", ["no", "label"]), ("b", None)])] == ["a", "b"]
    assert list(rows_to_answer(DataFrame(q=["a", "b"]), text="q")) == expected
    assert list(rows_to_answer([])) == []


@pytest.mark.parametrize("rows", ["a", b"a", {"text": "a"}, Labelled("x", "a"), 7, None, np.array("a")], ids=range(7))
def test_a_single_row_is_a_wrong_call(rows: object) -> None:
    for call in (lambda: rows_to_answer(rows), lambda: Task("x", rows), lambda: Task.from_rows("x", rows)):
        with pytest.raises(InputError, match="rows: expected an iterable of rows, got ") as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "bad", [7, None, float("nan"), b"a", ["a"], ("a",), np.array(["a", "b"]), {}, {1: "a"}, "", []]
)
def test_a_row_that_cannot_be_answered_is_named_by_its_number(bad: object) -> None:
    answered = rows_to_answer(["a", bad])
    assert next(answered) == Row("a")
    with pytest.raises(SlmError, match=r"^row 2: ") as caught:
        next(answered)
    assert "\n" not in str(caught.value)


def test_a_name_and_its_row_are_no_text_and_label() -> None:
    """Such (name, row) pairs come from groupby, iterrows and dict.items."""
    with pytest.raises(WorkError, match="row 1: 'label': expected a word or an integer"):
        list(rows_to_answer({"first": {"text": "a", "label": "x"}}.items()))


def test_dataclasses_and_arrays_of_arrow_are_rows_and_a_series_of_one_row_is_not() -> None:
    @dataclass
    class Ticket:
        label: str
        text: str

    assert rows_of(Ticket("x", "a"), Ticket("y", "b")) == [Row("a", "x"), Row("b", "y")]
    for rows in (pyarrow.array(["a", "b"]), pyarrow.chunked_array([["a"], ["b"]])):
        assert list(rows_to_answer(rows)) == [Row("a"), Row("b")]
    with pytest.raises(InputError, match="rows: expected an iterable of rows"):
        rows_to_answer(Ticket("x", "a"))

    class Series(list):  # stand-in for pandas.Series, which yields values when iterated
        keys = staticmethod(lambda: ["label", "text"])

    with pytest.raises(InputError, match="rows: expected an iterable of rows"):
        rows_to_answer(Series(["x", "a"]))


def test_a_table_with_a_column_twice_is_refused() -> None:
    frame = DataFrame(text=["a"], label=["x"])
    frame.columns = ["text", "text", "label"]
    with pytest.raises(InputError, match="rows: the table has column 'text' twice"):
        rows_to_answer(frame)


def test_classes_keep_their_names_in_whatever_format_a_dataset_gives_its_rows() -> None:
    for number in (np.int64(1), torch.tensor(1), np.array(1), 1):
        assert class_name(number, ["bad", "good"]) == "good"
    assert class_name(np.int64(-1), ["bad", "good"]) is None
