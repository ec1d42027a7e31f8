"""A stream's records hold what its methods answered, and its report sums them up."""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.continual import report, run
from benchmarks.continual.methods import METHODS, Entry
from benchmarks.continual.streams import ORDERS
from slm_fast import Task
from slm_fast.evaluate import Evaluation


class Forgetful:
    """Answers the task learned last without a mistake, and half of the rows of all others."""

    def learn(self, task: Task, progress: bool | None = None) -> None:
        self.last = task.name

    def evaluate(self, tasks: Mapping[str, Task]) -> Evaluation:
        return Evaluation({name: 1.0 if name == self.last else 0.5 for name in tasks}, {})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ORDERS[1]:
        for split in ("train", "test"):
            path = tmp_path / name / f"{split}.jsonl.gz"
            path.parent.mkdir(exist_ok=True)
            rows = [json.dumps({"text": f"{name} {i}", "label": str(i % 2)}) for i in range(4)]
            path.write_bytes(gzip.compress("\n".join(rows).encode()))
    return tmp_path


def test_a_stream_is_recorded_task_by_task_and_its_report_is_of_the_last(data, monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(METHODS, "forgetful", Entry("forgets", lambda *_: Forgetful()))
    options = argparse.Namespace(data=data, order=1, train=4, test=4, max_length=32, epochs=1, seed=0, invariance=0)
    records = run.run("forgetful", options)
    assert [(r["after"], r["task"]) for r in records] == [
        (after, task) for n, after in enumerate(ORDERS[1], 1) for task in ORDERS[1][:n]
    ]
    assert [r["accuracy"] for r in records] == [1.0, 0.5, 1.0, 0.5, 0.5, 1.0, 0.5, 0.5, 0.5, 1.0]
    assert {r["forgetting"] for r in records if r["after"] != ORDERS[1][0]} == {0.5}
    console = Console(record=True, width=120)
    report.show(records, console)
    last = console.export_text().splitlines()[-2]
    assert "forgets" in last
    assert "62.50" in last
    assert "50.00" in last
    report.plot(records, tmp_path / "stream.png")
    assert (tmp_path / "stream.png").stat().st_size > 1000
