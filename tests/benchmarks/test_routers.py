"""Tests of the router comparison, on held-out training rows and on test rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from benchmarks.continual import routers
from benchmarks.continual.methods.any_ssr import AnySsr
from benchmarks.continual.methods.slm_router import SlmRouter
from benchmarks.continual.states import States, states
from benchmarks.continual.streams import STREAMS, Stream
from benchmarks.tables import read_csv, read_head
from slm_fast.backbone import Backbone
from slm_fast.data import Row
from slm_fast.model import AdaptedModel
from slm_fast.options import ModelConfig

WORDS = {"sea": ("wave fish", "boat salt"), "farm": ("cow hay", "barn seed")}


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data folder with a stream "toy": two labelled tasks and, in other folders, an instruction and a choice task."""
    for split, count in (("train", 20), ("test", 6)):
        for name, words in WORDS.items():
            rows = [{"text": f"{words[i % 2]} {split} {i}", "label": "ab"[i % 2]} for i in range(count)]
            write(tmp_path / "labelled" / name / f"{split}.jsonl.gz", rows)
        sung = [{"instruction": "Sing.", "input": f"song of {split} {i}", "output": "la"} for i in range(1, count)]
        write(tmp_path / "written" / "songs" / f"{split}.jsonl.gz", sung)
    asked = [{"question": f"What is {i} + 1?", "choices": [str(i), str(i + 1)], "answer": 1} for i in range(410)]
    write(tmp_path / "asked" / "sums" / "test.jsonl.gz", asked)
    stream = Stream("labelled", (*WORDS, "songs", "sums"), 20, elsewhere={"songs": "written", "sums": "asked"})
    monkeypatch.setitem(STREAMS, "toy", stream)
    return tmp_path


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keep only some router variants of each kind, with fewer random features to save memory and time; their names."""
    chosen = (
        *(variant for variant in routers.VARIANTS if variant.name in ("a mean a task", "a mean a label")),
        routers.Variant("features", "query", lambda: SlmRouter(64)),
        *(variant for variant in routers.VARIANTS if variant.name.startswith("EPI")),
        routers.Variant("Any-SSR", "means", lambda: AnySsr(features=300)),
    )
    monkeypatch.setattr(routers, "VARIANTS", chosen)
    return [variant.name for variant in chosen]


def test_a_streams_tasks_may_lie_in_several_folders_and_be_answered_in_free_text(data: Path) -> None:
    train, test = (STREAMS["toy"].load(data, split, 0) for split in ("train", "test"))
    assert {name: task.labels for name, task in train.items()} == {
        "sea": ["a", "b"],
        "farm": ["a", "b"],
        "songs": None,
        "sums": None,
    }
    assert [len(task.rows) for task in train.values()] == [20, 20, 19, 400]
    assert [len(task.rows) for task in test.values()] == [6, 6, 5, 10]
    assert train["songs"].rows[0].query_text("input") == "song of train 1"
    assert train["sums"].rows[3] == Row("What is 3 + 1?\nA. 3\nB. 4", "B")
    assert test["sums"].rows[0].text.startswith("What is 400 + 1?")
    assert len(STREAMS["toy"].load(data, "train", 0, 7)["sums"].rows) == 7


def test_the_stream_of_thirteen_names_a_folder_for_each_task() -> None:
    stream = STREAMS["thirteen"]
    assert len(stream.tasks) == len(set(stream.tasks)) == 13
    assert set(stream.elsewhere) < set(stream.tasks)
    assert (stream.folder, stream.rows) == ("classification", 400)


def test_each_label_is_dealt_out_over_the_folds() -> None:
    labels = torch.arange(30) % 3
    fold = routers.folds_of(labels, 30, 5)
    for label in range(3):
        assert torch.bincount(fold[labels == label], minlength=5).tolist() == [2] * 5
    assert torch.bincount(routers.folds_of(None, 13, 5)).tolist() == [3, 3, 3, 2, 2]


def test_each_row_is_answered_once_by_what_did_not_have_it() -> None:
    tasks = {
        name: routers.Rows(States(torch.arange(float(count))[:, None], 1, torch.zeros(count, 1)), None)
        for name, count in (("a", 7), ("b", 10))
    }
    seen: dict[str, list[float]] = {"a": [], "b": []}
    for learned, answered in routers.held_out(tasks, 3):
        for name, rows in answered.items():
            own, others = rows.states.query.flatten().tolist(), learned[name].states.query.flatten().tolist()
            assert not set(own) & set(others)
            assert len(own) + len(others) == len(tasks[name].states.query)
            seen[name] += own
    assert {name: sorted(rows) for name, rows in seen.items()} == {"a": list(range(7)), "b": list(range(10))}


def test_frozen_states_are_the_models_queries_and_last_states_and_are_kept(tmp_path: Path) -> None:
    backbone = Backbone.load("minilm")
    rows = [Row("a wave"), Row("hay and seed for a cow " * 9), Row("", instruction="this"), Row("x", "y", "Say x.")]
    found = states(backbone, rows, 24, tmp_path)
    queries = AdaptedModel(Backbone.load("minilm"), ModelConfig(max_length=24)).queries(rows)
    torch.testing.assert_close(found.query, queries, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.read("means"), found.query[:, : 2 * backbone.width])
    encoded = backbone.tokenization.encode([rows[1].text], 24)
    last = backbone.model(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask).last_hidden_state
    torch.testing.assert_close(found.read("last")[1], last[0].mean(0), rtol=1e-4, atol=1e-5)
    (path,) = tmp_path.iterdir()
    before = path.stat().st_mtime_ns
    again = states(backbone, rows, 24, tmp_path)
    assert torch.equal(again.query, found.query)
    assert torch.equal(again.last, found.last)
    assert path.stat().st_mtime_ns == before
    states(backbone, rows, 12, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("test", [False, True])
def test_each_variant_has_a_line_and_what_it_gains_over_the_first(data: Path, variants: list[str], test: bool) -> None:
    output = data / "out.csv"
    call = ["--data", str(data), "--stream", "toy", "--folds", "2", "--output", str(output)]
    assert routers.main([*call, *(["--test"] if test else [])]) == 0
    lines = read_csv(output)
    assert [line["router"] for line in lines] == variants
    assert len(variants) == 6
    assert float(lines[0]["gain"]) == 0
    for line in lines:
        assert int(line["bytes_a_task"]) > 0
        assert 60 <= float(line["mean_over_tasks"]) <= 100  # percent; chance is 25
        assert 60 <= float(line["right_task"]) <= 100
        assert float(line["gain"]) == pytest.approx(float(line["right_task"]) - float(lines[0]["right_task"]), abs=0.02)
    assert read_head(output)["setup"].startswith("test rows;" if test else "training rows, 2 folds;")
    rest = ["--test", "--answer", "3", "--routers", "EPI", "Any-SSR"]
    assert routers.main([*call, *rest]) == 0
    assert [line["router"] for line in read_csv(output)] == ["EPI", "Any-SSR"]
    assert read_head(output)["setup"].startswith("test rows, at most 3 a task;")


def test_what_is_wrong_with_the_data_is_one_line(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert routers.main(["--data", str(data / "nowhere"), "--stream", "toy"]) == 2
    assert capsys.readouterr().err.startswith("routers: error: ")
