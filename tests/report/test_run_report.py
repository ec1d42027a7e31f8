"""Report of benchmark runs: its numbers equal the measures, and damaged or unfinished parts are named."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from statistics import mean, stdev

import pytest
from command import one_line, slm_fast
from made_runs import METHODS, ROWS, TASKS, make_run, stage_of, write_answers, write_method, write_run, write_stages
from models import knows, make_slm, random_task

from slm_fast import InputError, WorkError
from slm_fast.errors import SlmWarning
from slm_fast.measures import average_accuracy, average_incremental_accuracy, backward_transfer, final_forgetting
from slm_fast.report import html, paper, run_report, save
from slm_fast.report.figures import Report, Spread


def figures(report: Report) -> dict:
    return dict(zip(report.stems(), (figure for _, figure in report.figures()), strict=True))


def columns(table) -> dict[str, dict]:
    """Table rows as {heading: value}, keyed by their first value."""
    return {row[0]: dict(zip([c.name for c in table.columns], row, strict=True)) for row in table.rows}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run")


def accuracies(seed: Path) -> list[dict[str, float]]:
    stages = [json.loads(line) for line in (seed / "stages.jsonl").read_text().splitlines()]
    return [{name: own["accuracy"] for name, own in stage["tasks"].items()} for stage in stages]


def test_its_numbers_are_those_of_the_measures(run: Path):
    shown = columns(figures(run_report([run]))["methods"])
    measures = {
        "average accuracy, %": average_accuracy,
        "forgetting, points": final_forgetting,
        "backward transfer, points": backward_transfer,
        "average incremental accuracy, %": average_incremental_accuracy,
    }
    for name, (title, told, _, _) in METHODS.items():
        own = [accuracies(run / name / f"seed{k}") for k in range(2)]
        for heading, measure in measures.items():
            values = [measure(matrix, TASKS) for matrix in own]
            assert shown[title][heading] == Spread(pytest.approx(mean(values)), pytest.approx(stdev(values)))
        assert shown[title]["oracle task ID"] == ("yes" if told else "no")
        assert shown[title]["routing accuracy, %"] == (None if told else Spread(pytest.approx(0.95), 0.0))
        assert shown[title]["parameters"] == 1_500_000
        assert shown[title]["training time per task, s"] == pytest.approx(33)
        assert shown[title]["peak memory"] == 905


def test_what_is_measured_beside_accuracy_is_shown_and_damage_in_it_named(tmp_path: Path):
    run = write_run(tmp_path / "run", tasks=TASKS[:2])
    lines = [stage_of(1, {"ag_news": 0.9, "yelp": 0.3}), stage_of(2, {"ag_news": 0.9, "yelp": 0.8})]
    for name, share in (("ag_news", 0.7), ("yelp", 0.9)):
        lines[1]["tasks"][name]["also"] = {"oracle": share, "of a later version": 0.5}
    lines[1] |= {"answer_cpu_seconds": 0.4, "route_cpu_seconds": 0.1}
    write_stages(run / "m" / "seed0", lines)
    write_stages(run / "other" / "seed0", [stage_of(n, dict.fromkeys(TASKS[:n], 0.5)) for n in (1, 2)])
    (run / "m" / "seed0" / "untrained.json").write_text('{"ag_news": 0.25, "yelp": 0.2}')
    shown = figures(run_report([run]))
    assert columns(shown["also"]) == {
        "m": {"method": "m", "labels of the true task, %": Spread(pytest.approx(0.8), None)}
    }
    assert columns(shown["methods"])["m"]["forward transfer, points"] == Spread(pytest.approx(0.1), None)
    assert columns(shown["methods"])["other"]["forward transfer, points"] is None
    cost = columns(shown["costs"])["m"]
    assert cost["inference time per row, ms"] == pytest.approx(1000 * 0.4 / (2 * ROWS))
    assert cost["routing time per row, ms"] == pytest.approx(1000 * 0.1 / (2 * ROWS))
    (run / "m" / "seed0" / "untrained.json").write_text('{"ag_news": 2}')
    one_line(slm_fast("report", run, "--no-files"), 1, "untrained.json", "ag_news: expected a share")


def test_zero_shot_benchmarks_are_shown_if_they_were_run_and_a_damaged_file_is_named(run: Path, tmp_path: Path):
    assert "zeroshot" not in figures(run_report([run]))
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "zeroshot.csv"
    lines = [
        ("bare", 0, "piqa", "acc", 0.5, ""),
        *(("slm", seed, "piqa", "acc", score, share) for seed, score, share in ((0, 0.25, 0.5), (1, 0.75, 1.0))),
        ("slm", 0, "piqa", "acc_norm", 0.1, 0.5),
        ("slm, abstain 0.99", 0, "piqa", "acc", 0.625, 0.0),
        ("slm, abstain 0.99", 0, "arc_easy", "acc", 0.375, 0.5),
    ]
    heading = "method,seed,set,metric,value,routed\n"
    written = "".join(f'"{way}",{",".join(map(str, rest))}\n' for way, *rest in lines)
    path.write_text(f"# cpu: one\n{heading}{written}")
    title = METHODS["slm"][0]
    answered = "answered with a task, %"
    assert columns(figures(run_report([path.parent]))["zeroshot"]) == {
        "bare backbone": {"model": "bare backbone", "PIQA, %": Spread(0.5, None), "ARC easy, %": None, answered: None},
        title: {
            **{"model": title, "PIQA, %": Spread(0.5, pytest.approx(0.5**1.5)), "ARC easy, %": None},
            answered: 0.75,
        },
        f"{title}, abstain 0.99": {
            **{"model": f"{title}, abstain 0.99", "PIQA, %": Spread(0.625, None)},
            **{"ARC easy, %": Spread(0.375, None), answered: 0.25},
        },
    }
    for damage in ("bare,0,piqa,acc,1.5,\n", "bare,0\n", "bare,0,piqa,acc,x,\n", "bare,0,piqa,acc,,\n"):
        path.write_text(heading + damage)
        one_line(slm_fast("report", path.parent, "--no-files"), 1, "zeroshot.csv: damaged")


def test_methods_are_ranked_and_those_that_are_told_the_task_stand_apart(run: Path):
    report = run_report([run])
    shown = columns(figures(report)["methods"])
    assert list(shown) == ["SLM (ours)", "Experience replay", "Sequential fine-tuning", "SLM-TI"]
    answer = report.parts[0].answer.replace("\u2068", "").replace("\u2069", "")
    assert answer.startswith("SLM (ours) has the highest average accuracy without oracle task IDs: ")
    assert f"{100 * shown['SLM (ours)']['average accuracy, %'].mean:.1f} ±" in answer
    assert "With oracle task IDs, SLM-TI reaches" in answer


def test_the_matrix_the_lines_and_the_confusion_are_means_over_seeds(run: Path):
    shown = figures(run_report([run]))
    own = [accuracies(run / "finetune" / f"seed{k}") for k in range(2)]
    grid = shown["accuracy-finetune"]
    for n, values in enumerate(grid.values):
        for i, name in enumerate(TASKS):
            expected = pytest.approx(mean(matrix[n][name] for matrix in own)) if i <= n else None
            assert values[i] == expected
    series = {name: values for name, values, _ in shown["average"].series}
    assert series["Sequential fine-tuning"][-1] == pytest.approx(mean(average_accuracy(m, TASKS) for m in own))
    assert shown["confusion-slm"].rows == list(TASKS)
    assert all(sum(values) == pytest.approx(1) for values in shown["confusion-slm"].values)
    assert "confusion-slm_told" not in shown


def test_one_task_and_one_seed_have_no_forgetting_and_no_deviation(tmp_path: Path):
    run = write_run(tmp_path / "run", tasks=["only"], stream="one")
    write_stages(run / "m" / "seed0", [stage_of(1, {"only": 0.5}, tasks=["only"], named=False)])
    report = run_report([run])
    row = columns(figures(report)["methods"])["m"]
    assert (row["forgetting, points"], row["backward transfer, points"], row["routing accuracy, %"]) == (
        None,
        None,
        None,
    )
    assert row["average accuracy, %"] == Spread(0.5, None)
    page = html(report)
    assert page.count('<span class="na">n/a</span>') >= 5
    assert "±" not in page.split("<h2>Definitions</h2>")[0]
    save(report, tmp_path / "page.html", files=True)
    with (tmp_path / "page_files" / "methods.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["forgetting, points"] == ""


def test_costs_that_were_not_measured_are_not_zero(tmp_path: Path):
    run = write_run(tmp_path / "run", tasks=["a", "b"])
    first, last = stage_of(1, {"a": 0.5}, tasks=["a", "b"]), stage_of(2, {"a": 0.5, "b": 0.5}, tasks=["a", "b"])
    last |= {"peak_mib": float("nan"), "kept_bytes": None}
    del last["learn_seconds"]
    write_stages(run / "m" / "seed0", [first, last])
    row = columns(figures(run_report([run]))["methods"])["m"]
    assert (row["peak memory"], row["storage"], row["training time per task, s"]) == (None, None, None)
    assert row["parameters"] == 600_000


def test_an_unfinished_run_is_shown_as_far_as_it_is(tmp_path: Path):
    run = write_run(tmp_path / "run")
    write_method(run, "slm", stages=2)
    write_method(run, "finetune", stages=3)
    shutil.copytree(run / "finetune" / "seed0", run / "finetune" / "seed1")
    write_stages(run / "finetune" / "seed1", [stage_of(1, {"ag_news": 0.9})])
    (run / "replay" / "seed0").mkdir(parents=True)
    report = run_report([run])
    said = report.parts[0].warning.replace("\u2068", "").replace("\u2069", "")
    assert "unfinished" in said
    assert "Sequential fine-tuning has learned 3 of 5 tasks" in said
    assert "SLM (ours) has learned 2 of 5 tasks" in said
    assert "1 seed of Sequential fine-tuning excluded (fewer tasks learned)" in said
    assert "replay has not learned any task yet" in said
    assert list(columns(figures(report)["methods"])) == ["Sequential fine-tuning", "SLM (ours)"]
    assert "after 3 of 5 tasks" in report.parts[0].answer
    assert said.split(":")[0] in html(report)


def test_a_finished_run_is_not_called_unfinished(run: Path):
    assert "unfinished" not in html(run_report([run]))


def test_tasks_answered_before_they_are_learned_are_shown_and_count_for_nothing(tmp_path: Path):
    run = write_run(tmp_path / "run", tasks=["a", "b"])
    stages = [stage_of(1, {"a": 0.8, "b": 0.1}, tasks=["a", "b"]), stage_of(2, {"a": 0.6, "b": 0.9}, tasks=["a", "b"])]
    write_stages(run / "m" / "seed0", stages)
    shown = figures(run_report([run]))
    assert shown["accuracy-m"].values == [[0.8, 0.1], [0.6, 0.9]]
    row = columns(shown["methods"])["m"]
    assert row["average incremental accuracy, %"].mean == pytest.approx((0.8 + 0.75) / 2)
    assert row["forgetting, points"].mean == pytest.approx(0.2)


def test_the_papers_numbers_stand_beside_its_streams_only_and_say_whose_they_are(tmp_path: Path, run: Path):
    page = html(run_report([run]))
    assert "Results reported in the paper" in page
    assert "another backbone" in page
    for name, accuracy, _ in paper.BERT.methods:
        assert f"<bdi>{name}</bdi>" in page
        assert f"<bdi>{accuracy:.1f}</bdi>" in page
    other = make_run(tmp_path / "run", seeds=1)
    write_run(other, stream="clinc")
    assert "reported in the paper" not in html(run_report([other]))


def test_two_runs_have_a_part_each(tmp_path: Path, run: Path):
    other = write_run(tmp_path / "other", tasks=["a"], stream="another")
    write_stages(other / "m" / "seed0", [stage_of(1, {"a": 0.5}, tasks=["a"])])
    report = run_report([run, other])
    assert [part.title.replace("\u2068", "").replace("\u2069", "")[:8] for part in report.parts] == [
        "order4 o",
        "another ",
    ]
    assert len(set(report.stems())) == len(report.stems())
    assert {"1-methods", "2-methods"} <= set(report.stems())


def test_the_keys_are_those_of_the_store_and_a_damaged_one_is_named(tmp_path: Path):
    run = make_run(tmp_path / "run", seeds=1)
    slm = make_slm("bert")
    knows(slm, *[random_task(slm, topic) for topic in ("farm", "sea", "city", "sky")])
    store = run / "slm" / "seed0" / "store"
    slm.save_pretrained(store)
    shown = figures(run_report([run]))
    assert {group for group, *_ in shown["tsne"].points} == {"farm", "sea", "city", "sky"}
    assert len(shown["similarity"].rows) == 4
    next(store.glob("tasks/farm/*")).write_bytes(b"damaged")
    with pytest.warns(SlmWarning, match="its keys cannot be shown"):
        page = html(run_report([run]))
    assert "cannot be shown" in page


def test_titles_cannot_leave_their_place(tmp_path: Path):
    run = write_run(tmp_path / "run", stream='<i>"s"</i>', machine="<b>", settings={"<u>": 'a"b'})
    title = '<img src=x onerror="alert(1)"> עברית 🐟 $x^2$ ' + "w" * 300
    write_method(run, "slm")
    (run / "slm" / "about.json").write_text(json.dumps({"title": title, "told": False}))
    report = run_report([run], command="slm-fast report '<s>'")
    page = html(report)
    for tag in ("<img", "<i>", "<b>", "<u>", "<s>"):
        assert tag not in page.replace("<i style=", "")
    assert "&lt;img src=x onerror=&quot;alert(1)&quot;&gt; עברית 🐟" in page
    save(report, tmp_path / "page.html", files=True)
    with (tmp_path / "page_files" / "methods.csv").open(newline="", encoding="utf-8") as file:
        assert next(csv.DictReader(file))["method"] == title


def test_the_same_run_is_the_same_bytes(run: Path, tmp_path: Path):
    for name in ("a.html", "b.html"):
        save(run_report([run], command="x"), tmp_path / name, files=True)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    one, other = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("a_files", "b_files"))
    assert one == other
    assert {"methods.csv", "average.png", "forgetting.png", "accuracy-slm.png", "numbers.json"} <= set(one)


# The command line and errors


def test_the_command_writes_into_the_run_unless_told_where(run: Path, tmp_path: Path):
    copy = shutil.copytree(run, tmp_path / "run")
    done = slm_fast("report", copy, "--no-files")
    assert (done.returncode, done.stdout) == (0, f"{copy / 'report.html'}\n"), done.stderr
    done = slm_fast("report", copy, "--output", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page_files" / "numbers.json").exists()
    assert "slm-fast report" in (tmp_path / "page.html").read_text()
    assert slm_fast("report", copy, "--no-files").returncode == 0  # the report is not taken for a method


def test_a_folder_that_is_no_run_is_a_wrong_call(tmp_path: Path):
    one_line(slm_fast("report", tmp_path), 2, "run.json")
    one_line(slm_fast("report", tmp_path / "none"), 2, "no such folder")
    with pytest.raises(InputError, match="no run given"):
        run_report([])
    assert list(tmp_path.iterdir()) == []


def test_a_file_instead_of_a_folder_is_said_to_be_one(run: Path, tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("precious\n")
    one_line(slm_fast("report", file), 2, f"{file}: is a file, expected a folder")
    one_line(slm_fast("report", run, "--output", file / "p.html"), 2, f"folder {file} is a file, expected a folder")
    assert file.read_text() == "precious\n"


def test_the_page_says_what_the_run_was_made_with(run: Path):
    about = dict(run_report([run]).about)
    assert about["machine"] == "cpu a processor of two cores, torch 2.11.0"
    assert about["date"] == "2026-11-28"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"format": 2}', "expected format 1, got 2"),
        ("{", "not JSON"),
        ("[]", "expected an object"),
        ('{"format": 1}', "expected a stream"),
        ('{"format": 1, "stream": {"name": "x", "tasks": ["a", "a"]}}', "twice"),
        ('{"format": 1, "stream": {"name": "x", "tasks": [1]}}', "list of tasks"),
    ],
)
def test_a_run_of_another_format_or_damaged_is_named(text: str, said: str, tmp_path: Path):
    (tmp_path / "run.json").write_text(text)
    one_line(slm_fast("report", tmp_path), 1, "run.json", said)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_run_without_a_stage_is_named(tmp_path: Path):
    run = write_run(tmp_path / "run")
    one_line(slm_fast("report", run), 1, "no stage is done")
    (run / "slm" / "seed0").mkdir(parents=True)
    (run / "slm" / "seed0" / "stages.jsonl").write_text("")
    one_line(slm_fast("report", run), 1, "no stage is done")


GOOD = stage_of(2, {"ag_news": 0.9, "yelp": 0.8})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "Expecting"),
        ("[]", "expected an object"),
        (json.dumps(GOOD | {"after": "amazon"}), "expected what was measured after 'yelp', got after 'amazon'"),
        (json.dumps(GOOD | {"tasks": {"yelp": GOOD["tasks"]["yelp"]}}), "says nothing of 'ag_news'"),
        (json.dumps(GOOD | {"tasks": GOOD["tasks"] | {"what": {}}}), "'what' is not in the stream"),
        (json.dumps(GOOD).replace("0.8", "1.8"), "yelp: accuracy: expected a share"),
        (json.dumps(GOOD).replace("0.8", "NaN"), "yelp: accuracy: expected a share"),
        (json.dumps(GOOD).replace("0.8", "null"), "expected an accuracy"),
        (json.dumps(GOOD).replace(f'"rows": {ROWS}', '"rows": 0'), "expected a number of rows"),
        (json.dumps(GOOD).replace('"rows"', '"also": {"oracle": 3}, "rows"', 1), "oracle: expected a share"),
        (json.dumps(GOOD).replace('"rows"', '"also": [], "rows"', 1), "also: expected an object"),
        (json.dumps(GOOD).replace('"rows"', '"routed_by": {"input": 3}, "rows"', 1), "input: expected a share"),
        (json.dumps(GOOD | {"timed": {"yelp": []}}), "yelp: expected an object"),
        (json.dumps(GOOD | {"timed": {"yelp": {"rows": -1}}}), "rows: expected a number from 0 up"),
        (json.dumps(GOOD | {"peak_mib": "much"}), "peak_mib: expected a number"),
        (json.dumps(GOOD | {"learn_peak_mib": "much"}), "learn_peak_mib: expected a number"),
        ("[" * 100_000, "damaged"),
    ],
)
def test_a_damaged_stage_is_named_by_its_line(line: str, said: str, tmp_path: Path):
    run = write_run(tmp_path / "run")
    write_stages(run / "m" / "seed0", [stage_of(1, {"ag_news": 0.9})])
    with (run / "m" / "seed0" / "stages.jsonl").open("a") as file:
        file.write(f"{line}\n")
    one_line(slm_fast("report", run), 1, "stages.jsonl: line 2 is damaged", said)
    assert not (run / "report.html").exists()


def test_more_stages_than_tasks_are_damage(tmp_path: Path):
    run = write_run(tmp_path / "run", tasks=["a"])
    write_stages(run / "m" / "seed0", [stage_of(1, {"a": 0.9}, tasks=["a"])] * 2)
    with pytest.raises(WorkError, match="line 2 is damaged: the stream has 1 task"):
        run_report([run])


@pytest.mark.parametrize("data", [b"no gzip", b"\x1f\x8b\x08\x00broken"])
def test_damaged_answers_and_titles_are_named(data: bytes, tmp_path: Path):
    run = make_run(tmp_path / "run", seeds=1)
    path = run / "slm" / "seed0" / "answers-5.csv.gz"
    path.write_bytes(data)
    one_line(slm_fast("report", run, "--no-files"), 1, "answers-5.csv.gz", "damaged")
    path.unlink()
    (run / "slm" / "about.json").write_text('{"title": 3}')
    one_line(slm_fast("report", run, "--no-files"), 1, "about.json", "title")


def test_answers_that_name_no_task_have_no_confusion(tmp_path: Path):
    run = make_run(tmp_path / "run", seeds=1)
    for name in METHODS:
        write_answers(run / name / "seed0", 5, [(task, "") for task in TASKS])
    page = html(run_report([run]))
    assert "No method in this run predicts tasks" in page
