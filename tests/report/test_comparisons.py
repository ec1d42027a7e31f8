"""Comparisons in a run's report: differences paired by row, ablations, forgetting by step, the paper's numbers."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import pytest
from command import one_line, slm_fast
from made_runs import TASKS, make_run, stage_of, write_method, write_run, write_stages
from test_run_report import accuracies, columns, figures

from slm_fast.measures import forgetting_by_step, paired_difference
from slm_fast.report import html, paper, run_report, save
from slm_fast.report.figures import Spread

DIFFERENCE = "difference to the reference, points"


def write_scores(seed: Path, done: int, scores: Mapping[str, Sequence[float]]) -> None:
    """Write the answers of a seed after `done` tasks: for each task, the score of each row."""
    lines = [f"{task},{i},{score:g},\n" for task, own in scores.items() for i, score in enumerate(own)]
    data = gzip.compress(("task,row,right,named\n" + "".join(lines)).encode(), mtime=0)
    (seed / f"answers-{done}.csv.gz").write_bytes(data)


def write_answered(run: Path, name: str, scores: Sequence[Mapping[str, Sequence[float]]], **about: bool) -> None:
    """Write a method of two tasks, a and b: for each seed, the scores of all rows after the last task."""
    for k, own in enumerate(scores):
        seed = run / name / f"seed{k}"
        found = {task: mean(values) for task, values in own.items()}
        first = stage_of(1, {"a": found["a"]}, tasks=["a", "b"], named=False)
        write_stages(seed, [first, stage_of(2, found, tasks=["a", "b"], named=False)])
        write_scores(seed, 2, own)
    (run / name / "about.json").write_text(json.dumps({"title": f"method {name}", "told": False, **about}))


def plain(text: str) -> str:
    return text.replace("\u2068", "").replace("\u2069", "")


# Differences paired by row


def test_the_standard_error_of_a_difference_is_that_of_the_rows_paired():
    found, error = paired_difference({"a": [{1: 1.0, 2: 0.0, 3: 0.0, 4: 1.0}], "b": [{1: -1.0, 2: 0.0}]})
    assert found == pytest.approx((0.5 - 0.5) / 2)
    assert error == pytest.approx(((1 / 3) / 4 + (1 / 2) / 2) ** 0.5 / 2)


def test_seeds_are_averaged_by_row_if_they_answered_the_same_rows_else_they_are_independent():
    same = {"a": [{1: 1.0, 2: 0.0}, {1: 0.0, 2: 1.0}]}
    assert paired_difference(same) == (0.5, 0.0)  # each row's mean over seeds is 0.5
    other = {"a": [{1: 1.0, 2: 0.0}, {3: 0.0, 4: 1.0}]}
    assert paired_difference(other) == (0.5, pytest.approx((2 * 0.25 * (1 / 2) / 2) ** 0.5))


def test_a_task_of_one_row_has_a_difference_but_no_standard_error():
    assert paired_difference({"a": [{1: 1.0}], "b": [{1: 0.0, 2: 0.0}]}) == (0.5, None)


def test_methods_are_compared_by_row_with_the_best_one_without_oracle_task_ids(tmp_path: Path):
    run = write_run(tmp_path / "run", tasks=["a", "b"])
    write_answered(run, "best", [{"a": [1, 1, 0, 1], "b": [1, 1]}])
    write_answered(run, "worse", [{"a": [1, 0, 0, 1], "b": [1, 1]}])
    write_answered(run, "oracle", [{"a": [1, 1, 1, 1], "b": [1, 1]}], told=True)
    shown = columns(figures(run_report([run]))["methods"])
    assert shown["method best"][DIFFERENCE] == "reference"
    error = pytest.approx(((1 / 4) / 4) ** 0.5 / 2)  # s^2 of (0, -1, 0, 0) is 1/4
    assert shown["method worse"][DIFFERENCE] == Spread(pytest.approx(-1 / 8), error)
    assert shown["method oracle"][DIFFERENCE] == Spread(pytest.approx(1 / 8), error)


def test_a_method_retrained_on_all_rows_is_an_upper_bound_and_no_winner(tmp_path: Path):
    run = write_run(tmp_path / "run", tasks=["a", "b"])
    write_answered(run, "joint", [{"a": [1, 1, 1, 1], "b": [1, 1]}], retrains=True)
    write_answered(run, "best", [{"a": [1, 1, 0, 1], "b": [1, 1]}])
    (part,) = run_report([run]).parts
    said = plain(part.answer)
    assert said.startswith("method best has the highest average accuracy without oracle task IDs: 87.5 %")
    assert "Retrained on all rows, method joint reaches 100.0 %." in said
    shown = columns(figures(run_report([run]))["methods"])
    assert list(shown) == ["method best", "method joint"]
    assert shown["method best"][DIFFERENCE] == "reference"


def test_a_difference_is_over_the_seeds_that_both_methods_have(tmp_path: Path):
    run = write_run(tmp_path / "run", tasks=["a", "b"])
    write_answered(run, "best", [{"a": [1, 1], "b": [1, 1]}, {"a": [1, 0], "b": [1, 1]}])
    write_answered(run, "worse", [{"a": [0, 1], "b": [1, 1]}])
    found = columns(figures(run_report([run]))["methods"])["method worse"][DIFFERENCE]
    assert found == Spread(pytest.approx(-1 / 4), pytest.approx((0.5 / 2) ** 0.5 / 2))


@pytest.mark.parametrize("fault", ["other rows", "no file", "another task", "no seed"])
def test_methods_without_answers_to_the_same_rows_are_not_compared(tmp_path: Path, fault: str):
    run = write_run(tmp_path / "run", tasks=["a", "b"])
    write_answered(run, "best", [{"a": [1, 1], "b": [1, 1]}])
    write_answered(run, "worse", [{"a": [0, 1], "b": [1, 1]}])
    seed = run / "worse" / "seed0"
    if fault == "other rows":
        write_scores(seed, 2, {"a": [0, 1, 1], "b": [1, 1]})
    elif fault == "no file":
        (seed / "answers-2.csv.gz").unlink()
    elif fault == "another task":
        write_scores(seed, 2, {"a": [0, 1]})
    else:
        seed.rename(run / "worse" / "seed1")
    report = run_report([run])
    assert columns(figures(report)["methods"])["method worse"][DIFFERENCE] is None
    save(report, tmp_path / "page.html", files=True)
    with (tmp_path / "page_files" / "methods.csv").open(newline="") as file:
        assert [line[DIFFERENCE] for line in csv.DictReader(file)] == ["reference", ""]


def test_an_unfinished_method_is_compared_after_the_tasks_that_it_has_learned(tmp_path: Path):
    run = write_run(tmp_path / "run", tasks=["a", "b"])
    write_answered(run, "best", [{"a": [0, 0], "b": [1, 1]}])
    write_scores(run / "best" / "seed0", 1, {"a": [1, 1], "b": [0, 0]})  # b was asked before it was learned
    write_stages(run / "late" / "seed0", [stage_of(1, {"a": 0.5}, tasks=["a", "b"])])
    write_scores(run / "late" / "seed0", 1, {"a": [1, 0]})
    found = columns(figures(run_report([run]))["methods"])["late"][DIFFERENCE]
    assert found == Spread(pytest.approx(-1 / 2), pytest.approx(1 / 2))


@pytest.mark.parametrize(
    ("line", "said"), [("a,0,2,\n", "expected a score of 0 to 1"), ("a,0,x,\n", "float"), ("a,0,1,\n" * 2, "twice")]
)
def test_damaged_answers_are_named(tmp_path: Path, line: str, said: str):
    run = write_run(tmp_path / "run", tasks=["a", "b"])
    for name in ("best", "worse"):
        write_answered(run, name, [{"a": [1, 1], "b": [1, 1]}])
    data = gzip.compress(b"task,row,right,named\n" + line.encode())
    (run / "worse" / "seed0" / "answers-2.csv.gz").write_bytes(data)
    one_line(slm_fast("report", run, "--no-files"), 1, "answers-2.csv.gz", "damaged", said)


# Ablations


def test_methods_with_options_have_a_table_by_base_method(tmp_path: Path):
    run = write_run(tmp_path / "run", tasks=["a", "b"])
    write_answered(run, "m", [{"a": [1, 1, 1, 1], "b": [1, 1]}])
    for options, rows in (("rank=12", [1, 1, 1, 0]), ("rank=4,k=2", [1, 0, 0, 0]), ("rank=4", [1, 1, 0, 0])):
        write_answered(run, f"m,{options}", [{"a": rows, "b": [1, 1]}])
    write_answered(run, "lone,k=2", [{"a": [0, 0, 0, 0], "b": [1, 0]}])
    (run / "lone,k=2" / "about.json").write_text(json.dumps({"title": "Lone (k=2)", "told": False}))
    write_answered(run, "without", [{"a": [0, 0, 0, 0], "b": [0, 0]}])
    report = run_report([run])
    table = figures(report)["ablations"]
    assert [row[:2] for row in table.rows] == [
        ["method m", "none"],
        ["method m", "rank=4"],
        ["method m", "rank=4, k=2"],
        ["method m", "rank=12"],
        ["Lone", "k=2"],
    ]
    difference = [column.name for column in table.columns].index("difference to the base method, points")
    assert table.rows[0][difference] == "reference"
    assert table.rows[1][difference] == Spread(pytest.approx(-1 / 4), pytest.approx(((1 / 3) / 4) ** 0.5 / 2))
    assert table.rows[-1][difference] is None  # the run does not have it without options
    assert "method m,rank=4" in columns(figures(report)["methods"])
    save(report, tmp_path / "page.html", files=True)
    with (tmp_path / "page_files" / "ablations.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert lines[1]["options"] == "rank=4"
    assert float(lines[1]["difference to the base method, points, standard error"]) == pytest.approx(0.144338)
    numbers = json.loads((tmp_path / "page_files" / "numbers.json").read_text())
    assert [row["options"] for row in numbers["parts"][0]["figures"]["ablations"]["rows"]][-1] == "k=2"


def test_a_run_without_options_has_no_table_of_ablations(tmp_path: Path):
    assert "ablations" not in figures(run_report([make_run(tmp_path / "run", seeds=1)]))


# The answer, forgetting by step, the paper's numbers


def test_the_answer_says_what_learning_costs(tmp_path: Path):
    run = write_run(tmp_path / "run")
    write_method(run, "slm")
    said = plain(run_report([run]).parts[0].answer)
    assert said.endswith(
        "SLM (ours) takes 33 seconds to learn a task, trains 0.3 M parameters for it and stores 1.3 MB."
    )
    stages = [json.loads(line) for line in (run / "slm" / "seed0" / "stages.jsonl").read_text().splitlines()]
    for stage in stages:
        stage["learn_cpu_seconds"] = 7.5
        del stage["kept_bytes"]
    write_stages(run / "slm" / "seed0", stages)
    said = plain(run_report([run]).parts[0].answer)
    assert "takes 7.50 CPU seconds to learn a task, trains 0.3 M parameters for it and stores n/a." in said
    for stage in stages:
        del stage["learn_cpu_seconds"], stage["learn_seconds"], stage["parameters"]
    write_stages(run / "slm" / "seed0", stages)
    assert "to learn a task" not in run_report([run]).parts[0].answer


def test_forgetting_after_each_task_is_a_line_a_method_with_the_papers_in_grey(tmp_path: Path):
    run = make_run(tmp_path / "run")
    report = run_report([run])
    lines = figures(report)["forgetting-by-task"]
    series = {name: values for name, values, _ in lines.series}
    own = [accuracies(run / "finetune" / f"seed{k}") for k in range(2)]
    for n, value in enumerate(series["Sequential fine-tuning"]):
        by_seed = [forgetting_by_step(matrix, TASKS)[n] for matrix in own]
        assert value == (pytest.approx(mean(by_seed)) if n else None)
    assert series["Sequential fine-tuning"][1] == pytest.approx(0.3)
    assert dict(lines.grey)["IDBR (the paper's)"] == pytest.approx([None, 0.008, 0.024, 0.027, 0.029])
    save(report, tmp_path / "page.html", files=True)
    with (tmp_path / "page_files" / "forgetting-by-task.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["SLM (the paper's)"] for row in rows] == ["", "0", "0.003", "0.005", "0.005"]
    assert rows[0]["Sequential fine-tuning"] == ""
    assert (tmp_path / "page_files" / "forgetting-by-task.png").exists()
    drawn = html(report).split('aria-label="Forgetting on the tasks learned so far')[1].split("</svg>")[0]
    assert drawn.count('stroke="var(--soft)"') == 2


def test_the_axis_of_forgetting_has_room_for_gains_and_losses(tmp_path: Path):
    run = write_run(tmp_path / "run", tasks=["a", "b"], stream="own")
    stages = [stage_of(1, {"a": 0.5}, tasks=["a", "b"]), stage_of(2, {"a": 0.512, "b": 0.9}, tasks=["a", "b"])]
    write_stages(run / "m" / "seed0", stages)
    lines = figures(run_report([run]))["forgetting-by-task"]
    low, high, ticks = lines.axis
    assert low <= -0.012 < 0.0 < high
    assert 0.0 in ticks
    assert lines.grey == []


def test_the_forgetting_of_one_task_is_said_to_be_undefined(tmp_path: Path):
    run = write_run(tmp_path / "run", tasks=["a"], stream="own")
    write_stages(run / "m" / "seed0", [stage_of(1, {"a": 0.5}, tasks=["a"])])
    report = run_report([run])
    assert "forgetting-by-task" not in figures(report)
    assert "Forgetting is defined from the second task on." in html(report)


@pytest.mark.parametrize(
    ("stream", "methods", "backbone"),
    [("order2", paper.T5.methods, "T5-large"), ("order9", paper.LLAMA.methods, "LLaMA2-7B")],
)
def test_the_papers_numbers_of_other_backbones_stand_beside_their_streams(tmp_path, stream, methods, backbone):
    run = write_run(tmp_path / "run", tasks=["a"], stream=stream)
    write_stages(run / "m" / "seed0", [stage_of(1, {"a": 0.5}, tasks=["a"])])
    table = figures(run_report([run]))["paper"]
    assert {row[0]: row[1] for row in table.rows} == {name: accuracy / 100 for name, accuracy, _ in methods}
    assert backbone in table.note
    assert "other rows" in table.note
    assert table.muted


def test_the_papers_prompts_and_adapters_stand_beside_the_streams_of_encoders(tmp_path: Path):
    shown = figures(run_report([make_run(tmp_path / "run", seeds=1)]))
    found = {name: accuracy for name, accuracy, _ in shown["paper-in-place"].rows}
    assert found == pytest.approx({"DTKR + Prompt": 0.533, "DTKR + Adapter": 0.709, "DTKR + JARe (SLM)": 0.79})
    assert shown["paper-in-place"].muted
