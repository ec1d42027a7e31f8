"""Tests of `slm-fast learn --warm-start`, and of how `slm-fast tasks` lists what each task started from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import one_line, slm_fast
from models import easy, make_model, make_tokenizer, one_thread  # noqa: F401
from test_data import write_csv

from slm_fast.store import Store

TOPICS = ("farm", "sea", "sky")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("warm") / "bert"
    make_model("bert").save_pretrained(folder)
    make_tokenizer("bert").save_pretrained(folder)
    for topic in TOPICS:
        write_csv(folder / f"{topic}.csv", *((row.text, row.target or "") for row in easy(topic, 16).rows))
    return folder


def learn(store: Path, bert: Path, *names: str, start: tuple[str, ...] = ()):
    files = [f"--task={name}={bert / name}.csv" for name in names]
    return slm_fast("learn", store, "--backbone", bert, "--epochs", 1, *files, *start)


def listed(store: Path) -> dict[str, object]:
    tasks = json.loads(slm_fast("tasks", store, "--json").stdout)
    return {name: task["options"].get("warm_start") for name, task in tasks.items()}


def test_tasks_of_one_call_start_from_those_before_and_the_list_says_from_which(bert: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    done = learn(store, bert, *TOPICS, start=("--warm-start",))
    assert done.returncode == 0, done.stderr
    starts, files = listed(store), Store.open(store).files
    assert starts["farm"] is True
    assert starts["sea"] == {"task": "farm", "sha256": files["farm"]}
    assert starts["sky"]["task"] in ("farm", "sea")
    shown = slm_fast("tasks", store).stdout
    assert "warm start" in shown
    assert f"farm {files['farm'][:12]}" in shown

    done = learn(store, bert, *TOPICS, start=("--warm-start",))  # the same call again changes nothing
    assert done.returncode == 0, done.stderr
    assert Store.open(store).files == files


def test_a_task_named_is_the_start_and_one_that_is_not_learned_a_wrong_call(bert: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert learn(store, bert, "farm", "sea").returncode == 0
    assert "warm start" not in slm_fast("tasks", store).stdout
    files = Store.open(store).files
    one_line(learn(store, bert, "sky", start=("--warm-start", "moon")), 2, "'moon' is not learned; tasks: farm, sea")
    assert Store.open(store).files == files
    assert learn(store, bert, "sky", start=("--warm-start", "sea")).returncode == 0
    assert listed(store) == {"farm": None, "sea": None, "sky": {"task": "sea", "sha256": files["sea"]}}


def test_a_start_that_no_new_store_can_have_leaves_no_store(bert: Path, tmp_path: Path) -> None:
    done = learn(tmp_path / "store", bert, "sea", start=("--warm-start", "farm"))
    one_line(done, 2, "error: --warm-start: task 'farm' is not learned; tasks: none")
    assert not Store.exists(tmp_path / "store")
