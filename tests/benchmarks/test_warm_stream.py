"""Tests of the warm-start benchmark: paired gains, and a full run from data files to the result table."""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import pytest

from benchmarks.continual import warm_start
from benchmarks.continual.streams import STREAMS, Stream
from benchmarks.tables import read_csv, read_head
from slm_fast import ScalableLM, demo


def test_the_table_has_each_task_all_rows_and_what_tasks_started_from():
    anew = {"told": {"a": [1.0, 0.0], "b": [0.0]}, "routed": {"a": [0.0, 0.0], "b": [0.0]}}
    warm = {"told": {"a": [1.0, 1.0], "b": [0.0]}, "routed": {"a": [0.0, 0.0], "b": [1.0]}}
    lines = warm_start.summary({"anew": [anew], "warm": [warm]}, [{"b": "a"}], [0], ["a", "b"])
    assert [(line["task"], line["rows"], line["started_from"]) for line in lines] == [
        ("a", 2, ""),
        ("b", 1, "a 1x"),
        ("all rows", 3, ""),
    ]
    assert [line["told_gain"] for line in lines] == ["50.00", "0.00", "33.33"]
    assert [line["routed_gain"] for line in lines] == ["0.00", "100.00", "33.33"]
    assert (lines[2]["told_anew"], lines[2]["told_warm"]) == ("33.33", "66.67")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_features) -> Path:
    """Data folder with two demo tasks as two streams: "few" with a sample per seed (two), and "clinc" with just one."""
    names = ("news_desk", "recipe_steps")
    monkeypatch.setitem(STREAMS, "few", Stream("tiny", names, 16, seeds=2))
    monkeypatch.setitem(STREAMS, "clinc", Stream("tiny/plain", names, 24))
    for split in ("train", "test"):
        for name, task in demo.load(split).items():
            if name in names:
                rows = [json.dumps({"text": row.text, "label": row.target}) for row in task.rows[:32]]
                for folder in (f"{name}/seed0", f"{name}/seed1", f"plain/{name}"):
                    (tmp_path / "tiny" / folder).mkdir(parents=True, exist_ok=True)
                    (tmp_path / "tiny" / folder / f"{split}.jsonl.gz").write_bytes(
                        gzip.compress("\n".join(rows).encode())
                    )
    return tmp_path


def test_a_run_learns_each_way_once_and_answers_both_with_the_same_rows(data, capsys):
    call = ["--data", str(data), "--stream", "few", "--seeds", "0", "--rows", "12", "--max-length", "32"]
    call += ["--work", str(data / "work"), "--output", str(data / "out.csv")]
    assert warm_start.main(call) == 0
    assert capsys.readouterr().err.count("learned") == 3  # the first task is shared
    lines = {line["task"]: line for line in read_csv(data / "out.csv")}
    assert [(name, line["rows"], line["started_from"]) for name, line in lines.items()] == [
        ("news_desk", "12", ""),
        ("recipe_steps", "12", "news_desk 1x"),
        ("all rows", "24", ""),
    ]
    assert lines["news_desk"]["told_gain"] == "0.00"
    assert float(lines["all rows"]["told_anew"]) > 40  # percent; chance is 25
    assert "test rows, 12 a task at most; at most 16 training rows" in read_head(data / "out.csv")["setup"]
    anew, warm = (ScalableLM.from_pretrained(data / "work" / "few-16-32-0" / way).learned for way in ("anew", "warm"))
    assert warm["recipe_steps"].options["warm_start"]["task"] == "news_desk"
    assert "warm_start" not in anew["recipe_steps"].options
    assert warm["news_desk"].origin == anew["news_desk"].origin
    assert warm_start.main(call) == 0
    assert "learned" not in capsys.readouterr().err
    assert {line["task"]: line for line in read_csv(data / "out.csv")} == lines


def test_held_out_rows_are_none_that_are_learned_and_no_test_rows(data):
    options = argparse.Namespace(data=data, held_out=True, train=None, rows=5)
    rows = warm_start.answered(STREAMS["clinc"], options, 0)
    learned = STREAMS["clinc"].load(data, "train", 0, 24)
    test = STREAMS["clinc"].load(data, "test", 0)
    for name, task in rows.items():
        texts = {row.text for row in task.rows}
        assert len(texts) == 5
        assert not texts & {row.text for row in [*learned[name].rows, *test[name].rows]}


def test_what_is_wrong_with_the_data_is_one_line(data, capsys):
    call = ["--data", str(data / "nowhere"), "--stream", "few", "--work", str(data / "work")]
    assert warm_start.main(call) == 2
    assert capsys.readouterr().err.startswith("warm_start: error: ")
