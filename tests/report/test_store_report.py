"""Report of a store: it has the numbers of `evaluate`, and labels and texts of any characters are escaped."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command import one_line, slm_fast
from models import (
    beside_its_backbone,
    knows,
    make_slm,
    one_thread,  # noqa: F401
    random_task,
    toy_task,
)

from slm_fast import InputError, ScalableLM, Task
from slm_fast.data import Row
from slm_fast.evaluate import Marked, mark, tally
from slm_fast.options import PredictOptions
from slm_fast.report import html, keys, report_on, save, store_report
from slm_fast.report.figures import Grid, Listing, Note, Part, Points, Report, Section, Table, written

NASTY = (
    '<script>alert("x")</script>',
    'a & b\'s "quotes"',
    "W" * 300,
    "שלום עולם",
    "🐟🐠",
    "\u202eevil\x00\ud800",
    "$x_1$",
)


def two_tasks(**config) -> ScalableLM:
    slm = make_slm("bert", **config)
    return knows(slm, *[random_task(slm, topic) for topic in ("farm", "sea")])


def given() -> dict[str, Task]:
    return {"sea": toy_task("sea", rows=20, seed=6), "farm": toy_task("farm", rows=14, seed=6)}


def figure(report: Report, stem: str):
    return next(figure for name, (_, figure) in zip(report.stems(), report.figures(), strict=True) if name == stem)


@pytest.mark.parametrize("options", [{}, {"abstain": 0.3}])
def test_its_numbers_are_those_of_evaluate(options):
    slm = two_tasks()
    expected = slm.evaluate(given(), **options)
    report = store_report(slm, given(), PredictOptions(**options))
    table = figure(report, "tasks")
    assert isinstance(table, Table)
    *rows, total = table.rows
    assert {row[0]: row[2] for row in rows} == expected.accuracy
    assert {row[0]: row[3] for row in rows} == expected.routing
    assert [row[1] for row in rows] == [20, 14]
    assert total[1:3] == [34, expected.average]
    page = html(report)
    assert f"Average accuracy is {100 * expected.average:.1f} % over 2 tasks." in page
    for value in expected.accuracy.values():
        assert f'<td class="n"><bdi>{100 * value:.1f}</bdi></td>' in page


def test_confusion_shows_where_rows_went_and_those_abstained_from():
    slm = two_tasks()
    report = store_report(slm, given(), PredictOptions(abstain=0.3))
    marked = mark(slm.model, given(), PredictOptions(abstain=0.3))
    grid = figure(report, "confusion")
    assert isinstance(grid, Grid)
    assert list(grid.rows) == ["sea", "farm"]
    assert list(grid.columns) == ["sea", "farm", "(none)"]
    for name, values in zip(grid.rows, grid.values, strict=True):
        own = [one.prediction.task for one in marked if one.task == name]
        assert values == [own.count(other) / len(own) for other in ("sea", "farm", None)]
        assert sum(value or 0.0 for value in values) == pytest.approx(1)


def test_a_told_task_is_said_to_be_told():
    slm = two_tasks()
    report = store_report(slm, given(), with_task_id=True)
    assert report.parts[0].answer.count("Oracle task IDs were given.") == 1
    assert figure(report, "confusion").values == [[1.0, 0.0], [0.0, 1.0]]


def test_wrong_answers_are_the_surest_of_each_task_in_turn():
    slm = two_tasks()
    marked = mark(slm.model, given(), PredictOptions())
    wrong = [one for one in marked if not one.right]
    assert len({one.task for one in wrong}) == 2
    listing = figure(report_on(slm, marked, 1.0), "mistakes")
    assert isinstance(listing, Listing)
    assert len(listing.entries) == min(20, len(wrong))
    surest = {
        name: max((o for o in wrong if o.task == name), key=lambda o: o.prediction.score) for name in ("sea", "farm")
    }
    assert {facts["task"]: text for text, facts in listing.entries[:2]} == {n: o.row.text for n, o in surest.items()}


def test_when_every_answer_is_right_it_says_so():
    slm = two_tasks()
    marked = [replace(one, right=True) for one in mark(slm.model, given(), PredictOptions())]
    assert "All answers are correct." in html(report_on(slm, marked, 1.0))


def nasty(slm: ScalableLM) -> list[Marked]:
    """Wrong answers whose texts and labels try to break out of their HTML element."""
    one = mark(slm.model, given(), PredictOptions())[0]
    return [
        replace(one, row=Row(text, text[::-1]), prediction=replace(one.prediction, label=text), right=False)
        for text in NASTY
    ]


def test_texts_and_labels_cannot_leave_their_place():
    slm = two_tasks()
    report = report_on(slm, nasty(slm), 1.0, command='slm-fast "<b>"')
    page = html(report)
    page.encode()
    assert "<script" not in page
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;" in page
    assert "a &amp; b&#x27;s &quot;quotes&quot;" in page
    assert "<bdi>שלום עולם</bdi>" in page
    assert "\x00" not in page
    assert "🐟🐠" in page
    assert "slm-fast &quot;&lt;b&gt;&quot;" in page
    tags = re.findall(r"</?([a-z0-9]+)", page.split("</style>")[1])
    opened = [
        tag for tag in re.findall(r"<([a-z0-9]+)", page.split("</style>")[1]) if tag not in ("wbr", "line", "circle")
    ]
    assert {"b", "script"} & set(tags) == set()
    assert sum(page.split("</style>")[1].count(f"</{tag}>") for tag in set(opened)) >= len(opened) - page.count("/>")


def test_labels_of_any_kind_are_named_in_the_map_and_the_similarity():
    slm = make_slm("bert", router="gaussian")
    rows = [(row.text, NASTY[i % 2]) for i, row in enumerate(toy_task("sea", rows=16).rows)]
    slm.learn(Task("sea", rows), epochs=1)
    slm.learn(toy_task("farm", rows=16), epochs=1)
    page = html(store_report(slm, {"sea": rows}))
    assert "<script" not in page
    assert "sea: &lt;script&gt;" in page


def test_it_asks_nothing_of_anyone():
    page = html(store_report(two_tasks(), given()))
    assert re.findall(r"""(?:src|href|url\()\s*=?\s*["']?[a-z]*:?//""", page) == []
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', "")
    assert "default-src 'none'" in page


def test_the_same_answers_are_the_same_bytes(tmp_path: Path):
    slm = two_tasks()
    marked = mark(slm.model, given(), PredictOptions())
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save(report_on(slm, marked, 2.0), tmp_path / name / "page.html", files=True)
    one, other = ({p.name: p.read_bytes() for p in (tmp_path / n).rglob("*.*") if p.is_file()} for n in ("a", "b"))
    assert one == other
    assert {"page.html", "numbers.json", "tasks.csv", "confusion.png", "similarity.csv"} <= set(one)


def test_the_files_hold_the_same_numbers(tmp_path: Path):
    slm = two_tasks()
    expected = slm.evaluate(given())
    save(store_report(slm, given()), tmp_path / "page.html", files=True)
    with (tmp_path / "page_files" / "tasks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["task"]: float(row["accuracy, %"]) for row in rows[:-1]} == pytest.approx(expected.accuracy, abs=1e-5)
    numbers = json.loads((tmp_path / "page_files" / "numbers.json").read_text())
    table = numbers["parts"][0]["figures"]["tasks"]["rows"]
    assert {row["task"]: row["routing accuracy, %"] for row in table[:-1]} == pytest.approx(expected.routing, abs=1e-5)
    assert (tmp_path / "page_files" / "confusion.png").read_bytes().startswith(b"\x89PNG")


# Keys


@pytest.mark.parametrize(
    "config", [{"router": "dtkr", "groups": 4}, {"router": "gaussian", "features": 0}, {"router": "gaussian"}]
)
def test_keys_of_every_router_are_compared_as_it_compares_them(config):
    slm = make_slm("bert", **config)
    for topic in ("farm", "sea", "sky"):
        slm.learn(toy_task(topic, rows=24), epochs=1)
    found = keys.keys_of(slm.model.router, list(slm.learned.values()))
    similarity = found.similarity
    assert list(dict.fromkeys(found.tasks)) == slm.tasks
    assert torch.equal(similarity, similarity.T)
    assert similarity.diagonal().tolist() == [1.0] * len(found.tasks)
    assert similarity.abs().max() <= 1
    again = keys.keys_of(keys.router_of(list(slm.learned.values()), {"groups": 4}), list(slm.learned.values()))
    assert torch.allclose(again.gram, found.gram)
    first = {"dtkr": "slot 1", "gaussian": "no" if len(config) == 1 else "slot 1, mean 1"}[config["router"]]
    assert found.names[0] == first


def test_a_few_keys_have_no_map_and_it_says_so():
    slm = knows(make_slm("bert"), *[random_task(make_slm("bert"), topic) for topic in ("farm", "sea", "sky")])
    shown = keys.figures(keys.keys_of(slm.model.router, list(slm.learned.values())))
    assert [block.text for block in shown if isinstance(block, Note)] == [keys.FEW]
    assert not any(isinstance(block, Points) for block in shown)


def test_many_keys_are_compared_by_task():
    gram = torch.eye(80, dtype=torch.float64)
    shown = keys.figures(keys.Keys([f"t{i // 40}" for i in range(80)], [str(i) for i in range(80)], gram))
    grid = next(block for block in shown if isinstance(block, Grid))
    assert list(grid.rows) == ["t0", "t1"]
    assert grid.values == [[pytest.approx(1 / 40), 0.0], [0.0, pytest.approx(1 / 40)]]


def test_the_only_key_of_a_task_goes_by_the_tasks_name():
    points = [("a", "slot 1", 0.0, 0.0), ("b", "slot 1", 0.0, 9.0), ("b", "slot 2", 9.0, 0.0), ("c", "no", 9.0, 9.0)]
    report = Report("t", [Part("t", "", [], [Section("s", [Points("map", "m", points)])])], [])
    assert re.findall(r"<text [^>]*>([^<]*)</text>", html(report)) == ["a", "slot 1", "slot 2", "c"]


def test_keys_that_are_one_point_have_a_map():
    assert keys.embed(torch.ones(5, 5, dtype=torch.float64)) == [(0.0, 0.0)] * 5


# The command line


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose backbone the command line can find, with a CSV file per task beside it."""
    path = tmp_path_factory.mktemp("report")
    beside_its_backbone(path, lambda slm: [random_task(slm, topic) for topic in ("farm", "sea")])
    for name, task in given().items():
        (path / f"{name}.csv").write_text("text,label\n" + "".join(f"{row.text},{row.target}\n" for row in task.rows))
    return path / "store"


def call_of(store: Path) -> list[object]:
    return ["evaluate", store, "--json", *(f"--task={name}={store.parent / name}.csv" for name in ("sea", "farm"))]


def test_evaluate_writes_a_page_of_what_it_prints(store: Path, tmp_path: Path):
    page = tmp_path / "page.html"
    done = slm_fast(*call_of(store), "--report", page)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads(slm_fast(*call_of(store)).stdout)
    text = page.read_text()
    assert f"Average accuracy is {100 * found['average']:.1f} % over 2 tasks." in text
    assert "slm-fast evaluate" in text
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    size = sum(path.stat().st_size for path in store.glob("tasks/*/*"))
    assert f"<bdi>{written(size, 'bytes')}</bdi>" in text


def test_an_output_that_cannot_be_is_refused_before_any_work(store: Path, tmp_path: Path, monkeypatch):
    call = call_of(store)
    one_line(slm_fast(*call, "--report", tmp_path / "none" / "page.html"), 2, "does not exist")
    one_line(slm_fast(*call, "--report", tmp_path), 2, "is a folder")
    one_line(slm_fast(*call, "--files"), 2, "--report")
    monkeypatch.chdir(tmp_path)
    one_line(slm_fast(*call, "--report", "-"), 2, "-: a report is not written to standard output")
    monkeypatch.setattr("slm_fast.report.writing.find_spec", lambda name: None)
    one_line(slm_fast(*call, "--report", tmp_path / "page.html", "--files"), 2, "matplotlib", "pip install", "report")
    assert list(tmp_path.iterdir()) == []


def test_the_labelled_rows_are_not_replaced_by_a_page(store: Path, tmp_path: Path):
    (tmp_path / "page_files").mkdir()
    rows = tmp_path / "page_files" / "tasks.csv"
    rows.write_bytes((store.parent / "sea.csv").read_bytes())
    call = ["evaluate", store, f"--task=sea={rows}", "--report"]
    one_line(slm_fast(*call, rows), 2, str(rows), "not an HTML page")
    one_line(slm_fast(*call, tmp_path / "page.html", "--files"), 2, "page_files", "not a report's folder")
    assert rows.read_bytes() == (store.parent / "sea.csv").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["page_files"]


def test_tasks_that_are_not_named_are_refused():
    with pytest.raises(InputError, match="expected"):
        store_report(two_tasks(), [("text", "yes")])  # type: ignore[arg-type]
    assert tally([]).accuracy == {}
