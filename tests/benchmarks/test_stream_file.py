"""Tests of stream files: what they may say, and tasks that are data sets of the datasets library (here folders)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.continual.stream_file import read_stream
from slm_fast import InputError, WorkError


@pytest.fixture
def of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stream of a data set of JSON lines with labels and one of CSV files with instructions."""
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "news").mkdir()
    (tmp_path / "medical").mkdir()
    for split, count in (("train", 6), ("test", 4)):
        rows = [{"text": f"{split} news {i}", "label": ("sports", "world")[i % 2]} for i in range(count)]
        (tmp_path / "news" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines = [f"Answer briefly.,{split} question {i},answer {i}" for i in range(count)]
        (tmp_path / "medical" / f"{split}.csv").write_text("\n".join(["instruction,input,output", *lines]) + "\n")
    path = tmp_path / "own.yaml"
    path.write_text(
        f"rows: 5\ntasks:\n  news: {{dataset: {tmp_path / 'news'}, train: train, test: test}}\n"
        f"  medical: {{dataset: {tmp_path / 'medical'}, config: default, train: train, test: 'test[:2]'}}\n"
    )
    return path


def test_a_task_is_the_split_of_its_data_set(of_datasets: Path):
    found = read_stream(of_datasets)
    assert found.tasks == ("news", "medical")
    train, test = found.load(Path(), "train", 0, found.rows), found.load(Path(), "test", 0)
    assert [row.text for row in train["news"].rows] == [f"train news {i}" for i in range(5)]
    assert train["news"].labels == ["sports", "world"]
    assert [(row.text, row.target) for row in test["news"].rows][:2] == [
        ("test news 0", "sports"),
        ("test news 1", "world"),
    ]
    assert len(test["news"].rows) == 4
    assert train["medical"].labels is None
    rows = [(row.instruction, row.text, row.target) for row in test["medical"].rows]
    assert rows == [("Answer briefly.", f"test question {i}", f"answer {i}") for i in range(2)]


@pytest.mark.parametrize(
    ("old", "new"),
    [("train: train", "train: nonesuch"), ("config: default", "config: nonesuch"), ("/news", "/nowhere")],
)
def test_a_data_set_that_cannot_be_loaded_is_named_in_one_line(of_datasets: Path, old: str, new: str):
    of_datasets.write_text(of_datasets.read_text().replace(old, new))
    with pytest.raises(WorkError, match=r"^(news|medical): data set '.*' cannot be loaded: ") as caught:
        read_stream(of_datasets).load(Path(), "train", 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tasks: [", "not YAML"),
        ("tasks: {1: {train: x.csv, test: y.csv}}", "task 1: expected a text"),
        ("tasks: {no: {train: x.csv, test: y.csv}}", "task False: expected a text"),
        ("tasks: {a: {train: first.train.jsonl, test: first.test.jsonl}}\n3: 4", "3: unknown"),
        ("tasks: {a: {train: first.train.jsonl, test: first.test.jsonl}}\nrows: true", "got True"),
        ("rows: 4", "'tasks': expected names"),
        ("tasks: {}", "'tasks': expected names"),
        ("tasks: {a: {train: x.csv}}", "task 'a': expected train and test"),
        ("tasks: {a: {train: x.csv, test: 3}}", "'test': expected a word, got 3"),
        ("tasks: {a: {train: x.csv, test: y.csv, file: z}}", "and of config"),
        ("tasks: {a: {train: x.csv, test: y.csv}}", "x.csv: no such file"),
        ("tasks: {a: {train: first.train.jsonl, test: first.test.jsonl}}\nrow: 4", "'row': unknown"),
        ("tasks: {a: {train: first.train.jsonl, test: first.test.jsonl}}\nrows: none", "'rows': expected a whole"),
        (
            "tasks:\n  a: {train: first.train.jsonl, test: first.test.jsonl}\n"
            "  a: {train: first.train.jsonl, test: first.test.jsonl}",
            "task 'a' is there twice",
        ),
    ],
)
def test_a_stream_file_that_says_something_else_is_refused_in_one_line(tmp_path, text, said):
    stream = tmp_path / "own.yaml"
    for split in ("train", "test"):
        (tmp_path / f"first.{split}.jsonl").write_text('{"text": "a", "label": "b"}')
    stream.write_text(text)
    with pytest.raises((InputError, WorkError)) as caught:
        read_stream(stream)
    assert said in str(caught.value)
    assert str(stream) in str(caught.value)
    assert "\n" not in str(caught.value)
