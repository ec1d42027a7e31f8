"""Tests of progress where standard error is not a terminal."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from command import slm_fast
from models import easy, make_model, make_tokenizer
from test_data import write_csv

from slm_fast import progress
from slm_fast.progress import bar, in_lines


def work(rows: int, show: bool | None = None, total: int | None = 20, done: int = 0) -> None:
    with bar("reading", total, show, done=done) as advance:
        for number in range(rows):
            advance(1, note=f"loss {number}")


def test_elsewhere_than_on_a_terminal_long_work_prints_lines_with_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 10
        return now

    monkeypatch.setattr(progress.time, "monotonic", clock)
    assert not sys.stderr.isatty()
    with in_lines():
        work(20)
    assert capsys.readouterr().err.splitlines() == [
        f"reading: {done} of 20 rows, 0.1 rows/s, 0:0{left // 6}:{left % 6}0 left, loss {done - 1}"
        for done, left in ((3, 17), (6, 14), (9, 11), (12, 8), (15, 5), (19, 1))  # later a quarter of what is spent
    ]
    with in_lines():
        work(3, total=None, done=7)
    assert capsys.readouterr().err == "reading: 10 rows, 0.1 rows/s, loss 2\n"


def test_lines_are_for_commands_alone_and_can_be_turned_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "FIRST_LINE", 0.0)
    work(3)
    with in_lines():
        work(3, show=False)
    work(3)
    assert capsys.readouterr().err == ""


def test_a_command_whose_output_goes_to_a_file_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("bert").save_pretrained(tmp_path / "bert")
    make_tokenizer("bert").save_pretrained(tmp_path / "bert")
    rows = write_csv(tmp_path / "rows.csv", *((row.text, row.target or "") for row in easy("sea", 8, 0).rows))
    monkeypatch.setattr(progress, "FIRST_LINE", 0.0)
    done = slm_fast("learn", tmp_path / "store", "--backbone", tmp_path / "bert", "--epochs=3", f"--task=sea={rows}")
    assert done.returncode == 0
    assert "\nsea: learning: " in f"\n{done.stderr}"
    assert " of 24 rows, " in done.stderr
    assert " left, loss " in done.stderr
