"""The comparison of routers on training rows held out."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import torch

from benchmarks.continual import routers
from benchmarks.continual.streams import STREAMS, Stream
from slm_fast import Task


def test_each_label_is_dealt_out_over_the_folds() -> None:
    task = Task.from_rows("a", [(f"text {i}", "xyz"[i % 3]) for i in range(30)])
    fold = routers.folds_of(task, 5)
    for label in range(3):
        assert torch.bincount(fold[torch.arange(30) % 3 == label], minlength=5).tolist() == [2] * 5


def test_each_variant_has_a_line_and_what_it_gains_over_the_first(tmp_path: Path) -> None:
    words = {"sea": ("wave fish", "boat salt"), "farm": ("cow hay", "barn seed")}
    for name, (first, second) in words.items():
        (tmp_path / name).mkdir()
        with gzip.open(tmp_path / name / "train.jsonl.gz", "wt") as file:
            for i in range(20):
                row = {"text": f"{(first, second)[i % 2]} number {i}", "label": "ab"[i % 2]}
                file.write(json.dumps(row) + "\n")
    STREAMS["toy"] = Stream("", tuple(words), 20)
    try:
        output = tmp_path / "out.csv"
        assert routers.main(["--data", str(tmp_path), "--stream", "toy", "--folds", "2", "--output", str(output)]) == 0
    finally:
        del STREAMS["toy"]
    rows = list(csv.DictReader(line for line in output.read_text().splitlines() if not line.startswith("#")))
    assert [row["router"] for row in rows] == [variant.name for variant in routers.VARIANTS]
    assert float(rows[0]["gain"]) == 0
    assert all(int(row["bytes_a_task"]) > 0 and 50 <= float(row["right_task"]) <= 100 for row in rows)
