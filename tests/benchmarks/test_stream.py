"""Tests of continual-learning runs: recorded stages, resuming after interruption, refused input, result tables."""

from __future__ import annotations

import csv
import gzip
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import pytest
import torch
from forks import forked
from models import make_model, make_tokenizer
from rich.console import Console
from rivals import Here, Listing

from benchmarks.continual import cell, run, summary
from benchmarks.continual.methods import METHODS, method_of
from benchmarks.continual.methods.method import Answer, Entry, Setup
from benchmarks.continual.run_file import described
from benchmarks.continual.scoring import scores
from benchmarks.continual.stream_file import read_stream
from slm_fast import InputError, ScalableLM, Task, demo
from slm_fast.data import Row
from slm_fast.measures import (
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    final_forgetting,
    forward_transfer,
)
from slm_fast.options import LearnOptions
from slm_fast.report.results import results
from slm_fast.report.runs import read_run

NAMES = ("first", "second", "third")


class Forgetful(Listing):
    """Answers all rows of the last learned task correctly, and every second row of the others."""

    def answers(self, rows: Sequence[Row], tasks: Sequence[str] | None = None) -> list[Answer]:
        assert tasks is None
        last = self.learned[-1]
        return [
            Answer(row.target if last in row.text or i % 2 else "wrong", last, (last, last, NAMES[0]))
            for i, row in enumerate(rows)
        ]


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    for name in NAMES:
        for split in ("train", "test"):
            rows = [json.dumps({"text": f"{name} {i}", "label": "ab"[i // 2 % 2]}) for i in range(8)]
            (tmp_path / f"{name}.{split}.jsonl").write_text("\n".join(rows))
    path = tmp_path / "own.yaml"
    tasks = "".join(f"  {name}: {{train: {name}.train.jsonl, test: {name}.test.jsonl}}\n" for name in NAMES)
    path.write_text(f"rows: 4\ntasks:\n{tasks}")
    return path


@pytest.fixture
def forgetful(monkeypatch) -> None:
    monkeypatch.setitem(METHODS, "forgetful", Entry("forgets", Forgetful))


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """Path of a tiny BERT with random weights, for tests that do not depend on what is learned."""
    make_model("bert").save_pretrained(tmp_path / "bert")
    make_tokenizer("bert").save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def go(stream: Path, folder: Path, method: str = "forgetful", *more: str) -> int:
    """Run one method with seed 0 in this process; return the exit status."""
    return run.main([str(folder), "--stream", str(stream), "--methods", method, "--seeds", "0", *more, "--cell"])


def test_a_stream_is_recorded_task_by_task(stream, forgetful, tmp_path):
    folder = tmp_path / "run"
    assert go(stream, folder) == 0
    stages = cell.stages_of(folder / "forgetful" / "seed0")
    assert [stage["after"] for stage in stages] == list(NAMES)
    found = [{name: own["accuracy"] for name, own in stage["tasks"].items()} for stage in stages]
    assert found == [
        {"first": 1.0},
        {"first": 0.5, "second": 1.0},
        {"first": 0.5, "second": 0.5, "third": 1.0},
    ]
    assert [stage["tasks"]["first"]["routed"] for stage in stages] == [1.0, 0.0, 0.0]
    assert [stage["tasks"][stage["after"]]["retrieved"] for stage in stages] == [1.0, 1.0, 1.0]
    assert {(stage["parameters"], stage["kept_bytes"]) for stage in stages} == {(7, 28)}
    assert [stage["rows_answered"] for stage in stages] == [8, 16, 24]
    with gzip.open(folder / "forgetful" / "seed0" / "answers-3.csv.gz", "rt", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24
    assert rows[0] == {"task": "first", "row": "0", "right": "0", "named": "third"}
    assert sum(float(row["right"]) for row in rows if row["task"] == "second") == 4


def test_a_stopped_run_goes_on_and_learns_nothing_twice(stream, forgetful, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    saves = []
    save = cell._save

    def stop_after_the_second(*given: object) -> None:
        save(*given)
        saves.append(given[2])
        if given[2] == 2:
            raise KeyboardInterrupt  # the second task is learned and saved, but not answered yet

    monkeypatch.setattr(cell, "_save", stop_after_the_second)
    with pytest.raises(KeyboardInterrupt):
        go(stream, folder)
    assert len(cell.stages_of(folder / "forgetful" / "seed0")) == 1
    monkeypatch.setattr(cell, "_save", save)
    learned = []
    learn = Forgetful.learn
    monkeypatch.setattr(Forgetful, "learn", lambda self, task, p=None: (learned.append(task.name), learn(self, task)))
    assert go(stream, folder) == 0
    assert learned == ["third"]
    straight = tmp_path / "straight"
    go(stream, straight)
    both = [cell.stages_of(where / "forgetful" / "seed0") for where in (folder, straight)]
    assert [s["tasks"] for s in both[0]] == [s["tasks"] for s in both[1]]


def test_a_run_that_is_killed_goes_on_and_ends_as_one_that_was_not(stream, tiny, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    method, *more = "slm:epochs=1,features=0", "--max-length", "16", "--backbone", tiny
    assert go(stream, straight, method, *more) == 0
    call = [str(killed), "--stream", str(stream), "--methods", method, "--seeds", "0", *more, "--cell"]
    where = run.cell_folder(killed, method, 0)
    process = forked(run.main, call)
    try:
        until = time.monotonic() + 300
        while not (where / "state.pt").exists():  # the first task is learned; it may or may not be answered
            assert process.is_alive()
            assert time.monotonic() < until
            time.sleep(0.005)
    finally:
        process.kill()
        process.join()
    assert len(cell.stages_of(where)) < len(NAMES)
    assert go(stream, killed, method, *more) == 0
    ends = [cell.stages_of(run.cell_folder(folder, method, 0)) for folder in (straight, killed)]
    assert [stage["tasks"] for stage in ends[0]] == [stage["tasks"] for stage in ends[1]]
    assert ends[0][-1]["sha256"] == ends[1][-1]["sha256"]


def test_slm_goes_on_from_its_own_state_with_the_same_bytes(stream, tmp_path, monkeypatch):
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    assert go(stream, straight, "slm:epochs=1,features=0", "--max-length", "16") == 0
    real = cell.run_cell
    first = read_stream(stream)
    short = type(first)(first.folder, first.tasks[:2], first.rows, described=first.described, path=first.path)
    monkeypatch.setattr(
        run, "run_cell", lambda folder, spec, stream, *rest, **more: real(folder, spec, short, *rest, **more)
    )
    assert go(stream, halves, "slm:epochs=1,features=0", "--max-length", "16") == 0
    monkeypatch.setattr(run, "run_cell", real)
    assert go(stream, halves, "slm:epochs=1,features=0", "--max-length", "16") == 0
    ends = [cell.stages_of(where / "slm,epochs=1,features=0" / "seed0") for where in (straight, halves)]
    assert ends[0][-1]["sha256"] == ends[1][-1]["sha256"]
    assert ScalableLM.from_pretrained(straight / "slm,epochs=1,features=0" / "seed0" / "store").tasks == sorted(NAMES)


def test_a_run_in_processes_of_their_own_ends_in_a_table(stream, tiny, tmp_path, capsys):
    folder = tmp_path / "run"
    call = [str(folder), "--stream", str(stream), "--methods", "separate:epochs=1", "--backbone", tiny]
    assert run.main(call) == 0
    said = capsys.readouterr()
    assert "[1/1] separate:epochs=1, seed 0" in said.err
    assert "Separate, one LoRA per task, oracle" in said.out
    assert run.main(call) == 0
    assert "1 of 1 already done" in capsys.readouterr().err


def test_in_a_miniature_stream_finetune_forgets_and_slm_does_not(few_features, tmp_path):
    names = ("news_desk", "recipe_steps", "help_desk")
    train, test = demo.load("train"), demo.load("test")
    for name in names:
        for split, rows in (("train", train[name].rows[:32]), ("test", test[name].rows[:16])):
            lines = [json.dumps({"text": row.text, "label": row.target}) for row in rows]
            (tmp_path / f"{name}.{split}.jsonl").write_text("\n".join(lines))
    tasks = "".join(f"  {name}: {{train: {name}.train.jsonl, test: {name}.test.jsonl}}\n" for name in names)
    (tmp_path / "own.yaml").write_text(f"tasks:\n{tasks}")
    lost = {}
    for method in ("slm:epochs=5", "finetune:epochs=10"):
        assert go(tmp_path / "own.yaml", tmp_path / "run", method, "--max-length", "16") == 0
        stages = cell.stages_of(run.cell_folder(tmp_path / "run", method, 0))
        matrix = [{name: own["accuracy"] for name, own in stage["tasks"].items()} for stage in stages]
        assert min(row[name] for row, name in zip(matrix, names, strict=True)) > 0.6  # each task is learned
        lost[method.partition(":")[0]] = final_forgetting(matrix, names)
    assert lost["slm"] <= 0.05
    assert lost["finetune"] > 0.4


def test_the_table_has_means_over_seeds_and_says_what_is_not_done(stream, forgetful, tmp_path):
    folder = tmp_path / "run"
    for method in ("forgetful", "separate"):
        for seed in (0, 1):
            where = run.cell_folder(folder, method, seed)
            where.mkdir(parents=True)
            (where.parent / "about.json").write_text(json.dumps({"title": method, "told": False}))
    options = run.parser().parse_args([str(folder), "--stream", str(stream)])
    (folder / "run.json").write_text(json.dumps(described(options, read_stream(stream), {})))
    for seed, last in ((0, 1.0), (1, 0.8)):
        accuracies = [{"first": 1.0}, {"first": 0.5, "second": 1.0}, {"first": 0.5, "second": 0.5, "third": last}]
        stages = [
            {
                "after": NAMES[n],
                "tasks": {name: {"accuracy": a, "routed": None} for name, a in own.items()},
                "learn_seconds": 2.0,
                "peak_mib": 100,
            }
            for n, own in enumerate(accuracies)
        ]
        text = "".join(json.dumps(stage) + "\n" for stage in stages)
        (run.cell_folder(folder, "forgetful", seed) / "stages.jsonl").write_text(text)
    console = Console(record=True, width=160)
    summary.show(folder, console)
    text = console.export_text()
    assert "63.33 ± 4.71" in text
    assert "50.00 ± 0.00" in text
    assert "0 of 3 tasks" in text


def test_what_is_asked_before_it_is_learned_gives_forward_transfer(stream, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "started", Here)
    folder = tmp_path / "run"
    call = ["--stream", str(stream), "--methods", "finetune:epochs=1", "--backbone", tiny, "--unseen"]
    assert run.main([str(folder), *call]) == 0
    (result,) = results(read_run(folder))
    (seed,) = result.method.seeds
    assert seed.untrained.keys() == set(NAMES)
    matrix = [stage.accuracy for stage in seed.stages]
    expected = mean(matrix[n - 1][name] - seed.untrained[name] for n, name in enumerate(NAMES) if n)
    assert result.forward is not None
    assert result.forward.mean == pytest.approx(expected)


def test_measures_are_those_of_their_definitions():
    matrix = [{"a": 0.9, "b": 0.2, "c": 0.1}, {"a": 0.6, "b": 0.8, "c": 0.3}, {"a": 0.7, "b": 0.5, "c": 0.6}]
    order = ("a", "b", "c")
    assert average_accuracy(matrix, order) == pytest.approx(0.6)
    assert average_incremental_accuracy(matrix, order) == pytest.approx((0.9 + 0.7 + 0.6) / 3)
    assert final_forgetting(matrix, order) == pytest.approx((0.2 + 0.3) / 2)
    assert backward_transfer(matrix, order) == pytest.approx((-0.2 - 0.3) / 2)
    assert forward_transfer(matrix, order, {"b": 0.1, "c": 0.1}) == pytest.approx((0.1 + 0.2) / 2)
    seen = [{"a": 0.9}, {"a": 0.6, "b": 0.8}]
    assert forward_transfer(seen, order, {"b": 0.1}) is None
    assert final_forgetting(matrix[:1], order[:1]) is None
    assert backward_transfer(matrix[:1], order[:1]) is None


def test_free_text_is_right_by_its_first_words_and_a_label_as_it_is():
    rows = [Row("t", "B"), Row("t", "B"), Row("t", "very positive"), Row("t", "Bad breath is a sign"), Row("t", "b")]
    texts = ["b. the second one", "A", "Very positive!", "bad breath, is one of many", "B"]
    assert scores(texts, rows, [True] * 4 + [False]) == [1, 0, 1, 1, 0]


def test_the_papers_method_has_the_papers_settings():
    method = method_of("slm-paper")[1](Setup("minilm", (), 16, LearnOptions()))
    config, options = method.slm.model.config, method.setup.options
    assert (config.query, config.router, config.targets, config.first_layer) == ("sentence", "dtkr", ("out",), 0)
    assert (config.groups, config.k, method.slm.model.new_router().mask_prob) == (6, 4, 0.2)
    assert (options.rank, options.slots, options.joint) == (12, 4, True)
    assert options.learning_rate == LearnOptions().learning_rate


def test_the_papers_random_keys_mask_can_be_turned_off(tiny):
    rows = [Row(f"{topic}{i} good{i % 2}", "ab"[i % 2]) for i in range(20) for topic in ("sea", "farm")]
    keys = []
    for mask in ("", ",mask=0"):
        spec = f"slm-paper:query=trunk,encoder=none,first_layer=none,groups=4{mask}"
        method = method_of(spec)[1](Setup(tiny, ("a", "b"), 16, LearnOptions()))
        method.learn(Task("sea", rows), progress=False)
        keys.append(method.slm.learned["sea"].router["keys"])
    assert not torch.equal(*keys)


def test_an_ablation_names_options_of_learning_and_of_the_model():
    assert method_of("slm-paper:k=2,groups=3,rank=4")[0] is METHODS["slm-paper"]
    setup = Setup("minilm", (), 16, LearnOptions())
    method = method_of("slm-paper:k=2,groups=3,rank=4")[1](setup)
    assert (method.slm.model.config.k, method.slm.model.config.groups, method.setup.options.rank) == (2, 3, 4)
    method = method_of("slm-paper:slots=2,targets=out+query")[1](setup)
    assert method.setup.options.slots == 2
    assert method.slm.model.config.targets == ("out", "query")
    default = method_of("slm")[1](setup).slm.model.config
    assert method_of("slm:taps=none,targets=none")[1](setup).slm.model.config == default
    assert method_of("slm:taps=1,targets=value")[1](setup).slm.model.config.targets == ("value",)
    for spec, said in (("nonesuch", "not known; methods: slm"), ("slm:depth=2", "'depth=2' is no option of it")):
        with pytest.raises(InputError, match=said):
            method_of(spec)
    for spec in ("finetune:k=2", "finetune:autocast=true"):  # autocast is the RUN's
        with pytest.raises(InputError, match="no option"):
            method_of(spec)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("slm:rank=0", "rank: expected at least 1, got 0"),
        ("slm:taps=two", "taps: expected a layer's number"),
        ("slm-paper:taps=1+3", "taps: go with query='trunk'"),
        ("slm:mask=0", "mask: goes with router='dtkr'"),
        ("slm-paper:mask=2", "mask: expected a number from 0 to 1, got 2"),
        ("slm:targets=nonesuch", "nonesuch"),
    ],
)
def test_an_ablation_that_cannot_be_is_refused_before_a_run_begins(stream, tiny, tmp_path, capsys, spec, said):
    assert run.main([str(tmp_path / "run"), "--stream", str(stream), "--backbone", tiny, "--methods", spec]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"repro: error: method {spec!r}: ")
    assert said in line
    assert line.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_what_cannot_run_is_said_before_anything_is_made(stream, forgetful, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"

    def refused(*more: str) -> str:
        status = run.main([str(folder), "--stream", str(stream), *more])
        said = capsys.readouterr().err
        assert status in (1, 2)
        assert said.count("\n") == 1
        assert not folder.exists()
        return said

    assert "nonesuch" in refused("--stream", "nonesuch")
    assert "no such folder" in refused("--stream", "order4", "--data", str(tmp_path))
    assert "not known; methods" in refused("--methods", "nonesuch")
    monkeypatch.setitem(METHODS, "t5only", Entry("t5", Forgetful, kinds=("seq2seq",)))
    assert "runs on seq2seq backbones, 'minilm' is encoder" in refused("--methods", "t5only")
    rows = [{"instruction": "tell", "input": f"sea{i}", "output": f"farm{i} the sea{i} word"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    writes = tmp_path / "writes.yaml"
    writes.write_text("rows: 60\ntasks:\n  told: {train: rows.jsonl, test: rows.jsonl}\n")
    said = refused("--stream", str(writes), "--methods", "forgetful")
    assert "--backbone 'minilm': answers with labels, and 'told' of this stream has free text" in said


def test_a_folder_of_another_kind_or_a_damaged_one_is_refused_and_left_alone(stream, forgetful, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    call = [str(folder), "--stream", str(stream), "--methods", "forgetful"]
    assert run.main(call) == 2
    assert "not empty, and no run" in capsys.readouterr().err
    (folder / "run.json").write_text("{")
    assert run.main(call) == 1
    assert "damaged" in capsys.readouterr().err
    (folder / "run.json").write_text('{"format": 99}')
    assert run.main(call) == 1
    assert "of format 99, this version reads 1" in capsys.readouterr().err
    assert (folder / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("damage", ["line", "state", "count"])
def test_a_damaged_cell_says_what_to_delete(stream, forgetful, tmp_path, capsys, damage):
    folder = tmp_path / "run"
    go(stream, folder)
    where = folder / "forgetful" / "seed0"
    stages = (where / "stages.jsonl").read_text().splitlines(keepends=True)
    if damage == "line":
        (where / "stages.jsonl").write_text(stages[0] + stages[1][:20] + "\n")
    else:
        (where / "stages.jsonl").write_text("".join(stages[: 2 if damage == "state" else 1]))
        if damage == "state":
            (where / "state.pt").write_bytes(b"not a state")
    capsys.readouterr()
    assert go(stream, folder) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "delete" in said
    assert {"line": "line 2", "state": "state.pt", "count": "of 3 tasks"}[damage] in said
