"""Tests of the routing-cost benchmark: paired differences, and a full run from data files to the result table."""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import pytest
import torch

from benchmarks.continual import gaps
from benchmarks.continual.streams import STREAMS, Stream
from benchmarks.tables import read_csv, read_head
from slm_fast import demo


def test_differences_are_paired_by_row_and_their_errors_are_over_rows_and_over_seeds():
    random = torch.Generator().manual_seed(0)
    told = torch.randint(0, 2, (3, 200), generator=random).double()
    routed = torch.where(torch.rand(3, 200, generator=random, dtype=torch.float64) < 0.1, 0.0, told)
    gap, over_rows, over_seeds = gaps.paired(told.tolist(), routed.tolist())
    difference = routed - told
    assert gap == pytest.approx(float(difference.mean()))
    assert over_rows == pytest.approx(float(difference.mean(0).std() / 200**0.5))
    assert over_seeds == pytest.approx(float(difference.mean(1).std() / 3**0.5))
    assert gaps.paired([[1.0, 1.0]], [[1.0, 0.0]])[:2] == (-0.5, pytest.approx(0.5))


def test_differences_are_paired_within_a_drawing_of_rows_and_weighed_by_its_seeds():
    random = torch.Generator().manual_seed(0)
    drawing, rows = [0, 1, 0], {0: 50, 1: 70}
    anew, warm = (
        [torch.randint(0, 2, (rows[drawn],), generator=random).double() for drawn in drawing] for _ in range(2)
    )
    total, over_rows, over_seeds = gaps.paired([x.tolist() for x in anew], [x.tolist() for x in warm], drawing)
    gains = [after - before for before, after in zip(anew, warm, strict=True)]
    means = torch.stack([gain.mean() for gain in gains])
    assert total == pytest.approx(float(means.mean()))
    assert over_seeds == pytest.approx(float(means.std() / 3**0.5))
    first, second = (gains[0] + gains[2]) / 2, gains[1]
    expected = (2 / 3) ** 2 * first.var() / 50 + (1 / 3) ** 2 * second.var() / 70
    assert over_rows == pytest.approx(float(expected) ** 0.5)


def row(task: str, number: int, told: str, routed: str, named: str, distance: float = 0.5) -> dict[str, str]:
    own = {"task": task, "row": str(number), "told": told, "routed": routed, "named": named}
    return own | {"kept": str(int(distance <= 0.95)), "distance": str(distance)}


def test_the_table_has_each_task_all_rows_and_what_is_out_of_scope():
    slm = [
        row("a", 0, "1", "1", "a"),
        row("a", 1, "1", "0", "b"),
        row("b", 0, "0", "1", "b", 0.99),
        row(gaps.NOWHERE, 0, "", "", "a", 1.2),
        row(gaps.NOWHERE, 1, "", "", "b", 0.5),
    ]
    separate = [row("a", 0, "1", "", ""), row("a", 1, "1", "", ""), row("b", 0, "1", "", "")]
    found = {line["task"]: line for line in gaps.summary({"slm": [slm], "separate": [separate]}, ["a", "b"])}
    assert [found["a"][name] for name in ("rows", "told", "routed", "gap", "right_task")] == [
        2,
        "100.00",
        "50.00",
        "-50.00",
        "50.00",
    ]
    assert (found["b"]["gap"], found["b"]["separate"], found["b"]["kept"]) == ("100.00", "100.00", "0.00")
    assert (found["all rows"]["gap"], found["all rows"]["routed_less_separate"]) == ("0.00", "-33.33")
    assert (found["out of scope"]["rows"], found["out of scope"]["kept"]) == (2, "50.00")
    assert (found["out of scope"]["auroc"], found["a"]["auroc"]) == (f"{(3 + 1) / 6:.4f}", "")
    assert gaps.confusions([slm, slm]) == [{"task": "a", "taken_for": "b", "rows": 2}]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_features) -> Path:
    """Data folder with a stream of two demo tasks and out-of-scope rows."""
    names = ("news_desk", "recipe_steps")
    monkeypatch.setitem(STREAMS, "clinc", Stream("tiny", names, 40, out_of_scope="strangers"))
    for split in ("train", "test"):
        for name, task in demo.load(split).items():
            folder = tmp_path / "tiny" / ("strangers" if name not in names else name)
            folder.mkdir(parents=True, exist_ok=True)
            rows = [json.dumps({"text": row.text, "label": row.target}) for row in task.rows[:40]]
            (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    return tmp_path


def test_a_run_answers_each_row_told_and_not_told_and_goes_on_where_it_was(data, capsys):
    call = [
        "--data",
        str(data),
        "--stream",
        "clinc",
        "--epochs",
        "5",
        "--max-length",
        "32",
        "--work",
        str(data / "work"),
    ]
    assert gaps.main([*call, "--seeds", "0", "--methods", "slm", "--output", str(data / "one.csv")]) == 0
    assert capsys.readouterr().err.count("learned") == 2
    assert gaps.main([*call, "--seeds", "0", "--output", str(data / "both.csv")]) == 0
    assert capsys.readouterr().err.count("separate learned") == 2
    lines = {line["task"]: line for line in read_csv(data / "both.csv")}
    assert list(lines) == ["news_desk", "recipe_steps", "all rows", "out of scope"]
    assert float(lines["all rows"]["told"]) > 50  # percent; chance is 25
    assert float(lines["all rows"]["separate"]) > 50
    assert float(lines["all rows"]["right_task"]) > 90
    assert lines["all rows"]["gap_se_seeds"] == "nan"
    assert float(lines["out of scope"]["auroc"]) > 0.9
    assert float(lines["all rows"]["kept"]) > 80
    assert "test rows; at most 40 training rows" in read_head(data / "both.csv")["setup"]
    again = {line["task"]: line for line in read_csv(data / "one.csv")}
    assert again["all rows"]["routed"] == lines["all rows"]["routed"]


def test_held_out_rows_are_training_rows_that_are_not_learned(data):
    options = argparse.Namespace(data=data, held_out=True, train=None)
    train, test = gaps.split(STREAMS["clinc"], options, 0)
    for name in train:
        assert (len(train[name].rows), len(test[name].rows)) == (36, 4)
        assert not {row.text for row in train[name].rows} & {row.text for row in test[name].rows}


def test_what_is_wrong_with_the_data_is_one_line(data, capsys):
    call = ["--data", str(data / "nowhere"), "--stream", "clinc", "--work", str(data / "work")]
    assert gaps.main(call) == 2
    assert capsys.readouterr().err.startswith("gaps: error: ")
