"""Tests of what all benchmarks check before they run, and of errors in one line."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytest
import torch

from benchmarks import arguments
from benchmarks.arguments import at_least, counts, duration, exit_status, output_file, work_folder
from benchmarks.speed import generation, jobs
from benchmarks.speed.operators import __main__ as ops
from benchmarks.speed.operators import command
from benchmarks.tables import read_csv, read_head, write_csv
from slm_fast import InputError, WorkError


def test_numbers_that_make_no_sense_are_refused() -> None:
    assert at_least(1)("3") == 3
    assert counts("5,100") == [5, 100]
    assert duration("0.5") == 0.5
    for read, wrong in (
        *((at_least(1), text) for text in ("0", "-2", "x", "", "1.5")),
        *((counts, text) for text in ("abc", "-5", "5,", "100,5", "5,5")),
        *((duration, text) for text in ("-1", "x", "nan", "inf")),
    ):
        with pytest.raises(argparse.ArgumentTypeError):
            read(wrong)
    assert not math.isnan(duration("0"))


def test_an_output_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    kept = tmp_path / "kept.csv"
    kept.write_text("a\n")
    assert output_file(str(kept)) == kept
    assert kept.read_text() == "a\n"
    new = tmp_path / "new" / "found.csv"
    assert output_file(str(new)) == new
    assert not new.exists()
    assert work_folder(str(tmp_path / "work")).is_dir()
    for read, wrong in ((output_file, tmp_path), (output_file, kept / "x.csv"), (work_folder, kept)):
        with pytest.raises(argparse.ArgumentTypeError, match=str(wrong)):
            read(str(wrong))


def test_errors_are_one_line_with_the_command_and_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise WorkError("the file\nis damaged")

    assert exit_status("slm-fast bench ops", fails) == 1
    assert capsys.readouterr().err == "slm-fast bench ops: error: the file is damaged\n"
    assert exit_status("x", lambda: [1]) == 0
    assert exit_status("x", lambda: 3) == 3
    parser = arguments.Parser("slm-fast bench ops", __doc__)
    parser.add_argument("--rows", type=at_least(1))
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--rows", "-1"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("slm-fast bench ops: error: argument --rows: expected a whole number from 1 on, got '-1'")
    assert said.count("\n") == 1


def line(case: int, way: str, time: str) -> dict[str, str]:
    return {"way": way, "B": str(case), "p20_ms": time, "p50_ms": time, "other_load": "0"}


def test_a_run_of_some_cases_keeps_the_rows_of_the_others(tmp_path: Path) -> None:
    path = tmp_path / "found.csv"

    def run(*more: str) -> list[tuple[str, ...]]:
        lines = lambda case, options: [line(case, way, options.output.stem) for way in ("native", "other")]  # noqa: E731
        assert command.run("about", "found", [3, 4], [], lines, None, ["--output", str(path), *more]) == 0
        return [tuple(row.values())[:3] for row in read_csv(path)]

    write_csv(path, [line(case, way, "old") for case in (3, 4) for way in ("native", "gone")])
    assert run("--only", "1") == [
        *(("native", "3", "old"), ("gone", "3", "old")),
        *(("native", "4", "found"), ("other", "4", "found")),
    ]
    assert read_head(path)["kept from earlier runs"] == "2 rows"
    assert [row[1:] for row in run()] == [("3", "found")] * 2 + [("4", "found")] * 2


def test_ops_says_where_the_options_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert ops.main(["--help"]) == 0
    assert "slm-fast bench ops multi_lora --help" in capsys.readouterr().out


def test_folders_without_what_is_asked_for_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^--data: .*/intents: no folder of a task"):
        jobs.tasks_of(tmp_path, 2, 10)
    with pytest.raises(InputError, match=r"^--stories: .*stories260K.bin: No such file"):
        generation.stories(tmp_path, torch.float32)
    (tmp_path / "checkpoints" / "stories260K").mkdir(parents=True)
    (tmp_path / "checkpoints" / "stories260K" / "stories260K.bin").write_bytes(b"short")
    with pytest.raises(WorkError, match=r"^--stories: "):
        generation.stories(tmp_path, torch.float32)
