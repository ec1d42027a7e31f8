"""Labels of any type and format become the same words; lists of label words name numbers only if unambiguous."""

from __future__ import annotations

import csv
import enum
import json
import warnings
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from test_data import jsonl, write, write_csv

from slm_fast.data import Row, Task
from slm_fast.errors import InputError, SlmWarning, WorkError
from slm_fast.labels import words_beside


class Rating(enum.IntEnum):
    bad = 0
    good = 1


class Word(str, enum.Enum):
    bad = "0"
    good = "1"


def labels_of(values: list, **options: object) -> list[str]:
    return Task("x", [("a text", value) for value in values], **options).labels


@pytest.mark.parametrize(
    "values",
    [
        [1, 0],
        [1.0, 0.0],
        ["1", "0"],
        ["1.0", "0.0"],
        [" 1.00 ", "-0.0"],
        ["1", 0.0],
        [1, "1.0", 0],
        list(np.array([1, 0])),
        list(np.array([1, 0], np.uint8)),
        list(np.array([1, 0], np.float32)),
        np.array(["1", "0"]),
        list(torch.tensor([1, 0])),
        [Decimal("1.0"), Decimal("0")],
        list(Rating),
        list(Word),
        [Row("a", "1.0"), Row("b", "0.0")],
    ],
    ids=range(16),
)
def test_whole_numbers_are_one_label_however_they_are_written(values: list) -> None:
    rows = [value if isinstance(value, Row) else ("a text", value) for value in values]
    assert Task("x", rows).labels == ["0", "1"]


@pytest.mark.parametrize("values", [[True, False], ["True", "False"], list(np.array([True, False])), [True, "FALSE"]])
def test_truth_values_are_true_and_false_wherever_they_come_from(values: list) -> None:
    assert labels_of(values) == ["False", "True"]


def test_one_column_has_the_same_labels_in_every_format(tmp_path: Path) -> None:
    for first, second, expected in ((1.0, 0.0, ["0", "1"]), (True, False, ["False", "True"]), (7, 12, ["12", "7"])):
        paths = [tmp_path / name for name in ("t.csv", "t.tsv", "t.jsonl", "t.json", "t.parquet")]
        for path, separator in zip(paths, ",\t", strict=False):
            with open(path, "w", newline="") as file:
                csv.writer(file, delimiter=separator).writerows([("text", "label"), ("a", first), ("b", second)])
        rows = [{"text": "a", "label": first}, {"text": "b", "label": second}]
        write(paths[2], jsonl(*rows))
        write(paths[3], json.dumps(rows))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), paths[4])
        for path in paths:
            task = Task.from_file("x", path)
            assert (task.labels, task.rows[0].target) == (expected, str(expected[1])), path


@pytest.mark.parametrize(
    "values",
    [["1.0", "1.5"], ["1", "1.0", "x"], ["01", "1"], ["1e0", "0"], ["true", "false"], ["TRUE", "FALSE"], ["yes", "no"]],
)
def test_words_that_are_not_all_numbers_stay_as_they_are_written(values: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlmWarning)
        assert labels_of(values) == sorted(values)


@pytest.mark.parametrize("missing", [None, float("nan"), np.float32("nan"), np.datetime64("NaT"), "", " \n"])
def test_what_says_that_nothing_is_there_is_no_label(missing: object) -> None:
    with pytest.raises(WorkError, match=r"^x: row 2: no 'label'$"):
        labels_of(["a", missing])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.5, "expected a word or an integer, got 0.5"),
        (float("inf"), "expected a word or an integer, got inf"),
        (1e300, "expected a word or an integer"),
        (Decimal("0.1"), "expected a word or an integer"),
        (["x"], "expected a word or an integer"),
        ({"x": 1}, "expected a word or an integer"),
        (b"x", "expected a word or an integer"),
        (np.array([1]), "expected a word or an integer"),
        (np.datetime64("2020-01-01"), "expected a word or an integer"),
        (10**5000, "expected a word or an integer"),
        ("x" * 1001, "expected at most 1,000 characters, got 1,001"),
        ("\x1b[31mred", "control character"),
        ("a\0b", "control character"),
        ("\u200b", "no visible character, got '\\u200b'"),
        ("\u200b \ufeff", "no visible character"),
    ],
    ids=range(15),
)
def test_what_cannot_be_a_label_is_one_line_that_names_the_row(value: object, said: str) -> None:
    with pytest.raises(WorkError) as caught:
        labels_of(["a", value]) if not isinstance(value, np.ndarray) else Task("x", [("t", "a"), ("t", value)])
    assert str(caught.value).startswith("x: row 2: 'label': ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_label_may_hold_tabs_and_line_breaks() -> None:
    assert labels_of(["a\tb", "two\nlines"]) == ["a\tb", "two\nlines"]


def test_labels_that_unicode_writes_in_two_ways_are_one_and_free_text_is_left_alone() -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    assert labels_of([composed, decomposed, "tea"]) == [composed, "tea"]
    rows = [{"instruction": "Say.", "input": "a", "output": text} for text in (decomposed, "1.0", "True")]
    assert [row.target for row in Task("x", rows).rows] == [decomposed, "1.0", "True"]


@pytest.mark.parametrize(
    "pair", [("Yes", "yes"), ("two words", "two  words"), ("\uff11", "1"), ("a\u200bb", "ab"), ("1", "1.0")]
)
def test_labels_that_look_alike_are_two_and_said(pair: tuple[str, str]) -> None:
    with pytest.warns(SlmWarning, match="look alike") as warned:
        assert len(labels_of([*pair, "other"])) == 3
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels_of([*pair, "other"], training=False)  # for evaluation: the warning came when they were learned


# Names for numeric labels


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["one", "two", "three", "four", "five"], [1, 2, 3, 4]),
        (["cat", "dog", "cow"], [0, 1]),
        (["cat", "dog"], [0, 1, 2]),
        (["cat", "dog"], ["00", "1"]),
    ],
)
def test_words_beside_a_file_that_do_not_fit_without_doubt_are_not_used_and_that_is_said(
    tmp_path: Path, words: list[str], values: list
) -> None:
    write(tmp_path / "labels.json", json.dumps(words))
    path = write(tmp_path / "t.jsonl", jsonl(*({"text": "a", "label": value} for value in values)))
    with pytest.warns(SlmWarning, match=r"labels are not named by labels.json.* \(--labels NAME=FILE\)"):
        assert Task.from_file("x", path).labels == sorted(map(str, values))


def test_words_that_are_given_are_used_where_not_every_class_is_there(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", ("a", "2.0"), ("b", "0.0"))
    words = ["cat", "dog", "cow"]
    write(tmp_path / "elsewhere.json", b"\xef\xbb\xbf" + json.dumps(words).encode())
    for labels in (words, tuple(words), tmp_path / "elsewhere.json", str(tmp_path / "elsewhere.json")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert [row.target for row in Task.from_file("x", path, labels=labels).rows] == ["cow", "cat"]


def test_words_that_are_given_take_labels_that_are_words_already(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", ("a", "cow"), ("b", "cat"))
    assert Task.from_file("x", path, labels=["cat", "dog", "cow"]).labels == ["cat", "cow"]
    with pytest.raises(WorkError, match="line 2: label 'cow': expected the number of a label word"):
        Task.from_file("x", path, labels=["cat", "dog"])


@pytest.mark.parametrize("labels", [[], [1], ["a", ""], ["a", " "], {"0": "a"}, 5, b"a"])
def test_words_that_are_no_list_of_words_are_one_line(tmp_path: Path, labels: object) -> None:
    path = write_csv(tmp_path / "t.csv", ("a", "1"), ("b", "0"))
    with pytest.raises(InputError) as caught:
        Task.from_file("x", path, labels=labels)
    assert str(caught.value) == f"labels: expected a list of words or a file with one, got {labels!r}"


def test_a_list_of_words_that_is_not_there_is_a_wrong_call(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", ("a", "1"), ("b", "0"))
    for labels, said in ((tmp_path / "missing.json", "missing.json: no such file"), (tmp_path, "is a folder")):
        with pytest.raises(InputError, match=said):
            Task.from_file("x", path, labels=labels)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pos", "neg", "pos"], "'pos' occurs twice"),
        (["pos", "neg", " pos"], "'pos' occurs twice"),
        (["caf\u00e9", "tea", "cafe\u0301"], "'caf\u00e9' occurs twice"),
        (["1", "2", "1.0"], "'1' occurs twice"),
        (["pos", "\u200b", "neg"], "no visible character"),
    ],
    ids=range(5),
)
def test_words_that_would_merge_classes_are_refused_and_beside_a_file_not_used(
    tmp_path: Path, words: list[str], said: str
) -> None:
    path = write_csv(tmp_path / "t.csv", ("a", "0"), ("b", "1"), ("c", "2"))
    with pytest.raises(InputError, match=f"^labels: .*{said}"):
        Task.from_file("x", path, labels=words)
    write(tmp_path / "labels.json", json.dumps(words))
    with pytest.warns(SlmWarning, match=f"labels are not named: .*labels.json: .*{said}"):
        assert Task.from_file("x", path).labels == ["0", "1", "2"]


class ClassLabel:
    """Stand-in for datasets.ClassLabel."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)

    def int2str(self, value: int) -> str:
        raise AssertionError("raises for -1")


class Dataset(list):
    """Stand-in for datasets.Dataset: rows with class numbers, and features that name the classes."""

    def __init__(self, *rows: dict, **features: object) -> None:
        super().__init__(rows)
        self.features = features


ROWS = [{"text": "a", "label": 1, "n": 1}, {"text": "b", "label": 0, "n": 0}]


def test_the_class_names_of_a_data_set_are_its_labels() -> None:
    made = Dataset(*ROWS, text="string", label=ClassLabel("neg", "pos"), n=object())
    assert [row.target for row in Task("x", made).rows] == ["pos", "neg"]
    assert Task.from_rows("x", made, label="label").labels == ["neg", "pos"]
    with pytest.raises(WorkError, match="row 1: no 'label'"):
        Task("x", Dataset({"text": "a", "label": -1}, label=ClassLabel("neg", "pos")))


@pytest.mark.parametrize("names", [["neg", "pos"], None, "text", [1]])
def test_the_class_names_in_a_parquet_schema_are_its_labels(tmp_path: Path, names: object) -> None:
    features = {"text": {"dtype": "string", "_type": "Value"}, "label": {"names": names, "_type": "ClassLabel"}}
    table = pyarrow.Table.from_pylist(ROWS).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    expected = ["neg", "pos"] if names == ["neg", "pos"] else ["0", "1"]
    assert Task.from_file("x", tmp_path / "t.parquet").labels == expected
    plain = table.replace_schema_metadata({"huggingface": "[" * 10_000})
    pyarrow.parquet.write_table(plain, tmp_path / "t.parquet")
    assert Task.from_file("x", tmp_path / "t.parquet").labels == ["0", "1"]


def test_truth_values_beside_their_numbers_are_refused() -> None:
    for values in ([True, 1, 0], ["true", "0"], [np.bool_(False), 1.0, "1"]):
        with pytest.raises(WorkError, match=r"x: labels .* may mean one thing") as caught:
            labels_of(values)
        assert "\n" not in str(caught.value)
    assert labels_of([True, 1, 2, "x"]) == ["1", "2", "True", "x"]


def test_a_few_rows_spell_their_labels_as_the_learned_task_does() -> None:
    learned = labels_of(["1.0", "2.5", "x", "true"])
    for values, words in ((["1.0", 1, 2.0], ["1.0", "1.0", "2"]), ([True, "true"], ["true", "true"])):
        few = Task("x", [("a text", value) for value in values], training=False).spelled_as(learned)
        assert [row.target for row in few.rows] == words
        assert few.labels == sorted(set(words))
    few = Task("x", [("a", "1"), ("b", "x")], training=False)
    assert few.spelled_as(["1.0", "1.00", "x"]) is few  # 1.0 or 1.00: ambiguous
    assert few.spelled_as(["1", "1.0", "x"]) is few


def test_labels_json_names_a_part_of_a_learned_tasks_rows_if_it_holds_the_tasks_words(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "part.csv", ("a", "2"), ("b", "0"))
    write(tmp_path / "labels.json", '["bad", "so so", "good"]')
    with pytest.warns(SlmWarning, match="not named by labels.json, which has 3 words for labels 0, 2"):
        assert Task.from_file("x", path, training=False).labels == ["0", "2"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlmWarning)
        assert Task.from_file("x", path, known=["bad", "good"], training=False).labels == ["bad", "good"]
        assert words_beside(path, ["2", "0"], {"good", "so so"}) == ["bad", "so so", "good"]
        assert words_beside(path, ["good"], {"good"}) is None  # labels are words already
    with pytest.warns(SlmWarning, match="not named by labels.json"):  # labels that are numbers
        assert Task.from_file("x", path, known=["0", "1", "2"], training=False).labels == ["0", "2"]
    with pytest.warns(SlmWarning, match="not named by labels.json"):  # words of another list
        assert words_beside(path, ["2", "0"], ["bad", "grand"]) is None
    write_csv(path, ("a", "3"))
    with pytest.warns(SlmWarning, match="not named by labels.json"):
        assert words_beside(path, ["3"], {"bad", "good"}) is None  # the list has no fourth word
