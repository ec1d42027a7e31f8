"""The benchmark of learning keeps what it measured of other shapes, and the peak memory of the same settings."""

from __future__ import annotations

import sys

import pytest

from benchmarks import training
from benchmarks.timing import read_csv, write_csv

FEW = ["--rows", "8", "--epochs", "1", "--batch-size", "2", "--rounds", "1"]


def run(module, monkeypatch, output, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [module.__name__, "--output", str(output), *arguments])
    status: int = module.main()
    return status


def test_learning_is_timed_beside_other_shapes_and_its_memory_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "peak", lambda method, _: len(method))
    output = tmp_path / "training.csv"
    assert run(training, monkeypatch, output, "--shape", "minilm", *FEW) == 0
    rows = read_csv(output)
    assert [row["method"] for row in rows] == list(training.TITLES)
    write_csv(output, [*rows, *(row | {"shape": "bert-base"} for row in rows)])
    assert run(training, monkeypatch, output, "--shape", "minilm", *FEW, "--memory") == 0
    assert run(training, monkeypatch, output, "--shape", "minilm", *FEW) == 0
    kept = {(row["shape"], row["method"]): row["peak_mib"] for row in read_csv(output)}
    assert kept == {("minilm", name): str(len(name)) for name in training.TITLES} | {
        ("bert-base", name): "" for name in training.TITLES
    }
    with pytest.raises(SystemExit):
        run(training, monkeypatch, output, "--shape", "minilm", "--memory", "--batch-size", "4")
    assert "was timed with rows 8" in capsys.readouterr().err
