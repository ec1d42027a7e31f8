"""Tests of what `repro` refuses (other rows or settings, wrong numbers), of damaged files and of Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from forks import forked
from models import make_model, make_tokenizer
from rich.console import Console
from rivals import Here, Listing, run_here

from benchmarks.continual import cell, run, summary
from benchmarks.continual.methods import METHODS
from benchmarks.continual.methods.method import Answer, Entry
from benchmarks.continual.run_file import alone
from slm_fast import WorkError
from slm_fast.data import Row
from slm_fast.report.results import results
from slm_fast.report.runs import read_run

NAMES = ("first", "second")


class Right(Listing):
    """Answers every row correctly, if it has learned the row's task."""

    def answers(self, rows: Sequence[Row], tasks: Sequence[str] | None = None) -> list[Answer]:
        assert tasks is None or set(tasks) <= set(self.learned)
        return [Answer(row.target or "") for row in rows]


@pytest.fixture(autouse=True)
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "right", Entry("right", Right))
    monkeypatch.setitem(METHODS, "oracle", Entry("oracle", Right, told=True))
    monkeypatch.setattr(run, "started", Here)


@pytest.fixture
def call(tmp_path: Path) -> list[str]:
    """A run of a stream of two tasks, on a tiny BERT."""
    make_model("bert").save_pretrained(tmp_path / "bert")
    make_tokenizer("bert").save_pretrained(tmp_path / "bert")
    for name in NAMES:
        for split in ("train", "test"):
            rows = [json.dumps({"text": f"{name} {i}", "label": "ab"[i % 2]}) for i in range(6)]
            (tmp_path / f"{name}.{split}.jsonl").write_text("\n".join(rows))
    tasks = "".join(f"  {name}: {{train: {name}.train.jsonl, test: {name}.test.jsonl}}\n" for name in NAMES)
    (tmp_path / "own.yaml").write_text(f"rows: 4\ntasks:\n{tasks}")
    stream = ["--stream", str(tmp_path / "own.yaml"), "--backbone", str(tmp_path / "bert")]
    return [str(tmp_path / "run"), *stream, "--methods", "right"]


def refused(call: Sequence[str], capsys) -> str:
    """The one line that refuses a call."""
    capsys.readouterr()
    assert run.main(call) in (1, 2)
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    return said.err


def test_other_rows_or_settings_are_refused_once_a_stage_is_done(call, tmp_path, capsys):
    assert run.main(call) == 0
    for more, said in (
        (["--test", "3"], "made without --test, called with --test 3; name another folder"),
        (["--unseen"], "made without --unseen, called with --unseen"),
        (["--max-length", "7"], "made with --max-length 128, called with --max-length 7"),
        (["--autocast"], "made without --autocast, called with --autocast"),
    ):
        assert said in refused([*call, *more], capsys)
    made = (tmp_path / "run" / "run.json").read_bytes()
    first = tmp_path / "first.train.jsonl"
    first.write_text(first.read_text().replace("first 0", "first nought"))
    assert "learned from other rows; name another folder" in refused(call, capsys)
    assert (tmp_path / "run" / "run.json").read_bytes() == made


def test_a_run_from_before_autocast_was_made_without_it(call, tmp_path, capsys):
    assert run.main(call) == 0
    path = tmp_path / "run" / "run.json"
    about = json.loads(path.read_text())
    del about["settings"]["autocast"]
    path.write_text(json.dumps(about))
    assert "made without --autocast, called with --autocast" in refused([*call, "--autocast"], capsys)
    assert run.main(call) == 0


def test_settings_can_be_corrected_until_a_stage_is_done(call, tmp_path):
    (tmp_path / "run" / "right" / "seed0").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"format": 1, "settings": {"epochs": 2}, "date": "then"}))
    assert run.main(call) == 0
    made = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (made["settings"]["epochs"], made["date"]) == (None, "then")
    assert list(made["data"]) == ["0"]


@pytest.mark.parametrize(
    "wrong",
    [["--jobs", "0"], ["--train", "0"], ["--train", "-5"], ["--seeds", "-1"], ["--epochs", "0"], ["--max-length", "x"]],
)
def test_numbers_out_of_range_are_refused_before_the_folder_is_made(call, tmp_path, capsys, wrong):
    with pytest.raises(SystemExit) as ended:
        run.main([*call, *wrong])
    assert ended.value.code == 2
    assert f"argument {wrong[0]}: expected a whole number from" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_backbone_that_does_not_exist_leaves_no_folder(call, tmp_path, capsys):
    assert "nope" in refused([*call, "--backbone", str(tmp_path / "nope")], capsys)
    assert not (tmp_path / "run").exists()


def test_a_method_or_seed_given_twice_runs_once(call, capsys):
    assert run.main([*call, "right", "--seeds", "0", "0"]) == 0
    assert "[1/1] right, seed 0" in capsys.readouterr().err


def test_methods_with_oracle_task_ids_are_not_asked_what_they_have_not_learned(call, tmp_path):
    assert run.main([*call, "oracle", "--unseen"]) == 0
    found = {result.method.title: result for result in results(read_run(tmp_path / "run"))}
    assert found["right"].forward is not None
    assert found["oracle"].forward is None
    assert [len(stage["tasks"]) for stage in cell.stages_of(tmp_path / "run" / "oracle" / "seed0")] == [1, 2]


def test_a_folder_that_cannot_be_one_is_refused_in_one_line(call, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert "is a file, expected a folder" in refused([str(tmp_path / "file"), *call[1:]], capsys)
    assert "Not a directory" in refused([str(tmp_path / "file" / "run"), *call[1:]], capsys)
    assert (tmp_path / "file").read_text() == "mine"


def test_the_table_of_incomplete_and_damaged_files(call, tmp_path):
    assert run.main(call) == 0
    stages = tmp_path / "run" / "right" / "seed0" / "stages.jsonl"
    lines = [json.loads(line) for line in stages.read_text().splitlines()]
    for line in lines:
        del line["learn_cpu_seconds"], line["learn_seconds"]
        for own in line["tasks"].values():
            del own["routed"]
    stages.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "run" / "right" / "about.json").unlink()
    console = Console(record=True, width=160)
    summary.show(tmp_path / "run", console)
    assert "100.00" in console.export_text()
    (tmp_path / "run" / "right" / "about.json").write_text("[")
    with pytest.raises(WorkError, match=r"about.json: damaged; delete it"):
        summary.show(tmp_path / "run", console)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_call_stops_its_cells(interruptible, call, tmp_path, stop):
    module = ["slm_fast.cli", "repro"] if stop == signal.SIGINT else ["benchmarks.continual.run"]
    command = [sys.executable, "-m", *module, *call[:-1], "finetune:epochs=10000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        lock = tmp_path / "run" / "finetune,epochs=10000" / "seed0" / ".lock"
        while not lock.exists():
            assert process.poll() is None
            time.sleep(0.02)
        if stop == signal.SIGINT:
            os.killpg(process.pid, stop)  # as a terminal does on Ctrl-C
        else:
            process.terminate()
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + stop
    assert "Traceback" not in said
    assert ("repro: interrupted; the same command resumes\n" in said) == (stop == signal.SIGINT)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no process is left


def test_two_commands_may_create_a_run_at_once(call, tmp_path):
    commands = [forked(run_here, [*call[:-1], "finetune:epochs=1", "--seeds", seed]) for seed in "01"]
    for command in commands:
        command.join(timeout=300)
    assert [command.exitcode for command in commands] == [0, 0]
    for seed in (0, 1):
        assert len(cell.stages_of(run.cell_folder(tmp_path / "run", "finetune:epochs=1", seed))) == len(NAMES)


def test_a_run_that_another_command_has_just_begun_is_joined(call, tmp_path):
    (tmp_path / "run").mkdir()
    for name in (".lock", "run.json.part"):
        (tmp_path / "run" / name).touch()
    assert run.main(call) == 0
    assert json.loads((tmp_path / "run" / "right" / "about.json").read_text())["title"] == "right"


def test_two_commands_do_not_run_one_cell(call, tmp_path, capsys):
    assert run.main(call) == 0
    cell_call = [*call, "--seeds", "0", "--cell"]
    with alone(tmp_path / "run" / "right" / "seed0"):
        assert "seed0: another command is writing to it" in refused(cell_call, capsys)
    assert run.main(cell_call) == 0
