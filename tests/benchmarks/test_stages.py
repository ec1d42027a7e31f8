"""Tests of what a stage records besides accuracy: peak memory, routing by input or prompt, routing time by task; and of
`slm-ti`, which is given the tasks."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from models import toy_task
from rivals import Here, Listing, make_setup

from benchmarks.continual import cell, clock, last_stage, run
from benchmarks.continual.methods import METHODS, method_of
from benchmarks.continual.methods.method import Answer, Entry
from benchmarks.continual.methods.slm import Slm
from slm_fast.data import Row, Task
from slm_fast.report import run_report
from slm_fast.report.runs import read_run

PEAKS = ("learn_peak_mib", "answer_peak_mib")


class Silent(Listing):
    """Answers nothing."""

    def answers(self, rows, tasks=None) -> list[Answer]:
        return [Answer("") for _ in rows]


class Precise(Listing):
    """Answers with what products are computed in, followed by that of learning."""

    def learn(self, task, progress=None) -> None:
        super().learn(task, progress)
        self.learned_in = self.precision()

    def answers(self, rows, tasks=None) -> list[Answer]:
        return [Answer(f"{self.precision()}, {self.learned_in}") for _ in rows]

    def precision(self) -> str:
        """The dtype of a product, and whether autocast sees that weights change between passes."""
        weight, x = torch.ones(8, 8, requires_grad=True), torch.ones(8, 8)
        before = x @ weight
        with torch.no_grad():
            weight.fill_(2)
        return f"{before.dtype} {bool((x @ weight == 2 * before).all())}"


def write_stream(folder: Path, *tasks: Task) -> Path:
    """The tasks as files, and a stream file of them."""
    lines = []
    for task in tasks:
        for split in ("train", "test"):
            rows = [
                {"instruction": row.instruction, "input": row.text, "output": row.target}
                if task.labels is None
                else {"text": row.text, "label": row.target}
                for row in task.rows
            ]
            (folder / f"{task.name}.{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        lines.append(f"  {task.name}: {{train: {task.name}.train.jsonl, test: {task.name}.test.jsonl}}\n")
    (folder / "own.yaml").write_text(f"tasks:\n{''.join(lines)}")
    return folder / "own.yaml"


def go(stream: Path, folder: Path, method: str, *more: str) -> int:
    """Run one method with seed 0 in this process; return the exit status."""
    return run.main([str(folder), "--stream", str(stream), "--methods", method, "--seeds", "0", *more])


@pytest.mark.parametrize(("more", "said"), [((), "torch.float32 True"), (("--autocast",), "torch.bfloat16 True")])
def test_autocast_is_on_where_the_run_asks_for_it(here, tmp_path, monkeypatch, more, said):
    monkeypatch.setitem(METHODS, "precise", Entry("precise", Precise))
    rows = [Row("one", f"{said}, {said}"), Row("two", "other")]
    assert go(write_stream(tmp_path, Task("only", rows)), tmp_path / "run", "precise", *more) == 0
    (stage,) = cell.stages_of(tmp_path / "run" / "precise" / "seed0")
    assert stage["tasks"]["only"]["accuracy"] == 0.5  # of the two labels, the answer is the first


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, few_features) -> None:
    """Cells run in this process, and there is a method that does nothing."""
    monkeypatch.setattr(run, "started", Here)
    monkeypatch.setitem(METHODS, "silent", Entry("silent", Silent))


# Peak memory


def can_reset() -> bool:
    try:
        clock.RESET.write_text("5")
    except OSError:
        return False
    return True


needs_reset = pytest.mark.skipif(not can_reset(), reason="the kernel's peak of memory cannot be reset here")


@needs_reset
def test_each_stage_has_a_peak_of_its_own_and_the_process_the_largest():
    peak = clock.Peak()
    peak.start()
    held = torch.ones(50 * 2**20)  # 200 MiB
    large = peak.reached("learn")["learn_peak_mib"]
    del held
    gc.collect()
    peak.start()
    small = peak.reached("answer")["answer_peak_mib"]
    assert 0 < small < large - 150
    peak.start()
    assert peak.of_process() >= large - 1


def test_without_the_kernels_record_only_the_peak_of_the_process_is_known(monkeypatch, tmp_path):
    monkeypatch.setattr(clock, "RESET", tmp_path / "none" / "clear_refs")
    peak = clock.Peak()
    peak.start()
    assert not set(peak.reached("learn")) & set(PEAKS)
    assert peak.of_process() > 10


@needs_reset
def test_a_run_records_the_peak_of_learning_and_of_answering_also_if_it_is_resumed(here, tmp_path, monkeypatch):
    tasks = [toy_task(name, rows=4) for name in ("sea", "farm")]
    stream, bert = write_stream(tmp_path, *tasks), make_setup(tmp_path).backbone
    assert go(stream, tmp_path / "run", "silent", "--backbone", bert) == 0
    seed = tmp_path / "run" / "silent" / "seed0"
    stages = cell.stages_of(seed)
    assert all(0 < stage[name] <= stage["peak_mib"] + 1 for stage in stages for name in PEAKS)
    (seed / "stages.jsonl").write_text(json.dumps(stages[0]) + "\n")  # as if killed before the last answers
    monkeypatch.setattr(clock, "RESET", tmp_path / "none" / "clear_refs")
    assert go(stream, tmp_path / "run", "silent", "--backbone", bert) == 0
    again = cell.stages_of(seed)[1]
    assert again["learn_peak_mib"] == stages[1]["learn_peak_mib"]
    assert "answer_peak_mib" not in again
    costs = read_run(tmp_path / "run").methods[0].seeds[0].stages[1].costs
    assert (costs["learn_peak_mib"], costs["answer_peak_mib"]) == (again["learn_peak_mib"], None)


# After the last task


def test_the_last_stage_of_slm_times_each_task_and_routes_with_and_without_instructions(here, tmp_path, monkeypatch):
    monkeypatch.setattr(last_stage, "TIMED_ROWS", 5)
    tasks = [toy_task("sea", rows=8, instruction="the question :"), toy_task("farm", rows=8)]
    stream, llama = write_stream(tmp_path, *tasks), make_setup(tmp_path, "llama").backbone
    call = ["--backbone", llama, "--epochs", "1", "--max-length", "32", "--max-new-tokens", "2"]
    assert go(stream, tmp_path / "run", "slm", *call) == 0
    first, last = cell.stages_of(tmp_path / "run" / "slm" / "seed0")
    assert "timed" not in first
    assert all("routed_by" not in own for own in first["tasks"].values())
    assert list(last["timed"]) == ["sea", "farm"]
    for own in last["timed"].values():
        assert own.pop("rows") == 5
        assert set(own) == {f"{what}{by}_seconds" for what in ("route", "answer") for by in ("", "_cpu")}
        assert min(own.values()) >= 0
    assert last["tasks"]["sea"]["routed_by"]["input"] == last["tasks"]["sea"]["routed"]
    assert 0 <= last["tasks"]["sea"]["routed_by"]["prompt"] <= 1
    assert last["tasks"]["farm"]["routed_by"] is None
    shown = {figure.stem: figure for _, figure in run_report([tmp_path / "run"]).figures()}
    (sea, farm) = shown["routed-by"].rows
    assert [row[1] for row in (sea, farm)] == ["sea", "farm"]
    assert sea[2].mean == last["tasks"]["sea"]["routed"]
    assert farm[2:] == [None, None]
    timed = last["timed"]["farm"]
    assert shown["timed"].rows[1][3] == pytest.approx(1000 * timed["answer_cpu_seconds"] / 5)


def test_rows_with_an_instruction_are_routed_by_their_inputs_and_by_their_prompts(few_features, tmp_path, monkeypatch):
    method = Slm(make_setup(tmp_path))
    tasks = {name: toy_task(name, rows=24) for name in ("sea", "farm")}
    for task in tasks.values():
        method.learn(task, progress=False)
    share = last_stage.routed_share
    assert [share(method, name, tasks["sea"].rows) for name in tasks] == [1.0, 0.0]
    asked = []
    monkeypatch.setattr(last_stage, "routed_share", lambda _, name, rows: asked.append((name, rows)) or len(asked) / 10)
    rows = [Row("sea1", "yes", "the question"), Row("sea2", "no"), Row("", "no", "the question")]
    found = last_stage.routed_by(method, Task("sea", rows))
    assert asked == [("sea", [Row("sea1")]), ("sea", [Row("the question\nsea1")])]
    assert found == {"input": 0.1, "prompt": 0.2}
    assert last_stage.routed_by(method, Task("sea", rows[1:], training=False)) is None


# The method that is given the tasks


def test_slm_ti_answers_with_the_tasks_that_it_is_given(few_features, tmp_path):
    entry, make = method_of("slm-ti:epochs=8")
    assert entry.told
    words = {"sea": {"yes": "deep", "no": "flat"}, "farm": {"yes": "ripe", "no": "bare"}}
    tasks = {
        name: Task(name, [(row.text, words[name][row.target]) for row in toy_task(name, rows=32).rows])
        for name in words
    }
    method = make(make_setup(tmp_path))
    for task in tasks.values():
        method.learn(task, progress=False)
    rows = tasks["sea"].rows
    right, wrong = (method.answers(rows, [name] * len(rows)) for name in ("sea", "farm"))
    assert {answer.task for answer in right} == {"sea"}
    assert {answer.task for answer in wrong} == {"farm"}
    assert sum(answer.text == row.target for answer, row in zip(right, rows, strict=True)) > 0.8 * len(rows)
    assert {answer.text for answer in wrong} <= {"ripe", "bare"}  # so that none is right
    mixed = [("sea", "farm")[i % 2] for i in range(len(rows))]
    assert [answer.task for answer in method.answers(rows, mixed)] == mixed


def test_a_run_of_slm_ti_gives_each_row_its_task_and_measures_no_routing(here, tmp_path, monkeypatch):
    given = []
    answers = Slm.answers

    def watched(self, rows, tasks=None):
        given.append(tasks)
        return answers(self, rows, tasks)

    monkeypatch.setattr(Slm, "answers", watched)
    stream = write_stream(tmp_path, *(toy_task(name, rows=4) for name in ("sea", "farm")))
    assert go(stream, tmp_path / "run", "slm-ti:epochs=1", "--backbone", make_setup(tmp_path).backbone) == 0
    assert given == [["sea"] * 4, ["sea"] * 4 + ["farm"] * 4]
    last = cell.stages_of(run.cell_folder(tmp_path / "run", "slm-ti:epochs=1", 0))[-1]
    assert [own["routed"] for own in last["tasks"].values()] == [None, None]
    assert not {"route_seconds", "timed"} & set(last)
    assert all("routed_by" not in own for own in last["tasks"].values())
