"""Stores that earlier versions wrote: they open and answer as they did when they were written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from models import one_thread  # noqa: F401

from slm_fast import ScalableLM
from slm_fast.predict import Prediction
from slm_fast.store import Store

DATA = Path(__file__).parent / "data"
# tests/data/store_<commit that wrote it>/<backbone>/{backbone,store,answers.json}
OLD = sorted(path.parent for path in DATA.glob("store_*/*/answers.json"))


@pytest.fixture(params=OLD, ids=lambda path: f"{path.parent.name}-{path.name}")
def old(request: pytest.FixtureRequest) -> Path:
    return request.param


def contents(store: Path) -> dict[str, bytes]:
    return {str(file.relative_to(store)): file.read_bytes() for file in (store / "tasks").rglob("*.safetensors")}


def same(found: Prediction, expected: dict) -> bool:
    route = found.route
    return (found.task, found.label, found.text, list(route.slots)) == (
        expected["task"],
        expected["label"],
        expected["text"],
        expected["slots"],
    ) and [found.score, *route.weights] == pytest.approx([expected["score"], *expected["weights"]], abs=1e-4)


def test_there_are_old_stores() -> None:
    assert {path.name for path in OLD} >= {"bert", "llama"}


def test_an_old_store_answers_as_it_did(old: Path) -> None:
    slm = ScalableLM.from_pretrained(old / "store", backbone=str(old / "backbone"))
    rows = json.loads((old / "answers.json").read_text("utf-8"))
    predictions = slm.predict([row["text"] for row in rows])
    wrong = [
        f"{row['text']}: {found}, expected {row['answer']}"
        for row, found in zip(rows, predictions, strict=True)
        if not same(found, row["answer"])
    ]
    assert rows
    assert not wrong, "\n".join(wrong)


def test_nothing_is_wrong_with_an_old_store(old: Path) -> None:
    assert Store.open(old / "store").verify() == []


def test_an_old_store_merges_with_itself_and_into_a_new_one(old: Path, tmp_path: Path) -> None:
    before = contents(old / "store")
    shutil.copytree(old / "store", tmp_path / "copy")
    copy = Store.open(tmp_path / "copy")
    copy.merge([Store.open(old / "store"), Store.open(tmp_path / "copy")])
    Store(tmp_path / "new", copy.about, {}).merge([copy])
    assert before
    assert contents(tmp_path / "copy") == contents(tmp_path / "new") == before


def test_an_old_store_that_forgets_a_task_still_answers(old: Path, tmp_path: Path) -> None:
    shutil.copytree(old / "store", tmp_path / "copy")
    slm = ScalableLM.from_pretrained(tmp_path / "copy", backbone=str(old / "backbone"))
    slm.forget(slm.tasks[0])
    again = ScalableLM.from_pretrained(tmp_path / "copy", backbone=str(old / "backbone"))
    assert again.tasks == slm.tasks
    assert {found.task for found in again.predict(["sea1 sea2 good1"])} == set(slm.tasks)
