"""Stores written by earlier versions open, and answer as they did when they were written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
from models import one_thread  # noqa: F401
from stores import ABOUT, CONFIG, A, B, C, contents, store_of, version

from slm_fast import ScalableLM, schema
from slm_fast.errors import InputError
from slm_fast.fields import word
from slm_fast.predict import Prediction
from slm_fast.store import Store

DATA = Path(__file__).parent / "data"
# tests/data/store_<commit that wrote it>/<backbone>/{backbone,store,answers.json}
OLD = sorted(path.parent for path in DATA.glob("store_*/*/answers.json"))


@pytest.fixture(params=OLD, ids=lambda path: f"{path.parent.name}-{path.name}")
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of an old store, because opening a store may write caches to it."""
    shutil.copytree(request.param, tmp_path / "old")
    return tmp_path / "old"


def task_files(store: Path) -> dict[str, bytes]:
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
    before = task_files(old / "store")
    shutil.copytree(old / "store", tmp_path / "copy")
    copy = Store.open(tmp_path / "copy")
    copy.merge([Store.open(old / "store"), Store.open(tmp_path / "copy")])
    Store(tmp_path / "new", copy.about, {}).merge([copy])
    assert before
    assert task_files(tmp_path / "copy") == task_files(tmp_path / "new") == before


def test_an_old_store_that_forgets_a_task_still_answers(old: Path, tmp_path: Path) -> None:
    shutil.copytree(old / "store", tmp_path / "copy")
    slm = ScalableLM.from_pretrained(tmp_path / "copy", backbone=str(old / "backbone"))
    slm.forget(slm.tasks[0])
    again = ScalableLM.from_pretrained(tmp_path / "copy", backbone=str(old / "backbone"))
    assert again.tasks == slm.tasks
    assert {found.task for found in again.predict(["sea1 sea2 good1"])} == set(slm.tasks)


def test_an_old_store_of_two_hundred_tasks_opens_and_answers_as_it_did(old: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(old / "store", tmp_path / "many"))
    texts = [row["text"] for row in json.loads((old / "answers.json").read_text("utf-8"))]
    expected = ScalableLM.from_pretrained(old / "store", backbone=str(old / "backbone")).predict(texts, task="sea")
    manifest = json.loads((store / "manifest.json").read_text("utf-8"))
    (sea,) = (store / "tasks" / "sea").iterdir()
    names = [f"{letter}{number:02}" for letter in "xy" for number in range(99)]
    for name in names:  # as long as "sea", so that the file stays as it was written
        data = sea.read_bytes().replace(b"sea", name.encode())
        digest = hashlib.sha256(data).hexdigest()
        file = store / "tasks" / name / f"{digest}.safetensors"
        file.parent.mkdir()
        file.write_bytes(data)
        manifest["tasks"][name] = {"file": str(file.relative_to(store)), "sha256": digest}
    (store / "manifest.json").write_text(json.dumps(manifest))
    assert Store.open(store).verify() == []
    slm = ScalableLM.from_pretrained(store, backbone=str(old / "backbone"))
    assert slm.tasks == sorted(["farm", "sea", *names])
    for name in ("sea", names[0], names[-1]):
        found = slm.predict(texts, task=name)
        assert [answer.task for answer in found] == [name] * len(texts)
        assert [(a.label, a.text) for a in found] == [(a.label, a.text) for a in expected]
        assert [a.score for a in found] == pytest.approx([a.score for a in expected], abs=1e-5)


# New configuration fields


@pytest.fixture
def new_field(monkeypatch: pytest.MonkeyPatch) -> str:
    """Adds a configuration field that older stores lack; for them it defaults to "old"."""
    monkeypatch.setitem(schema.CONFIG, "pooling", word("old", "new"))
    monkeypatch.setitem(schema.WHEN_ABSENT, "pooling", "old")
    return "pooling"


def now(value: str) -> dict:
    """The `about` of this version's models, with this value of the new field."""
    return {**ABOUT, "config": {**CONFIG, "pooling": value}}


def test_a_store_without_a_new_field_opens_with_what_that_meant(tmp_path: Path, new_field: str) -> None:
    store_of(tmp_path, A)
    store = Store.open(tmp_path)
    assert store.about == now("old")
    assert contents(store.load()) == contents([A])
    assert store.verify() == []


def test_a_store_without_a_new_field_takes_tasks_of_models_that_mean_the_same(tmp_path: Path, new_field: str) -> None:
    store_of(tmp_path, A)
    Store(tmp_path, now("old"), {}).commit(add=[B])
    assert version(tmp_path) == contents([A, B])
    with pytest.raises(InputError, match=r"config\.pooling is 'old', this model has 'new'"):
        Store(tmp_path, now("new"), {}).commit(add=[C])
    assert version(tmp_path) == contents([A, B])


def test_stores_with_and_without_a_new_field_are_merged_if_they_mean_the_same(tmp_path: Path, new_field: str) -> None:
    store_of(tmp_path / "before", A)
    for value, task in (("old", B), ("new", C)):
        Store(tmp_path / value, now(value), {}).commit(add=[task])
    for into, source in (("before", "old"), ("old", "before")):
        Store.open(tmp_path / into).merge([Store.open(tmp_path / source)])
        assert version(tmp_path / into) == contents([A, B])
    with pytest.raises(InputError, match=r"config\.pooling is 'new', .* has 'old'"):
        Store.open(tmp_path / "before").merge([Store.open(tmp_path / "new")])


def test_the_next_commit_writes_what_an_older_store_lacked(tmp_path: Path, new_field: str) -> None:
    store_of(tmp_path, A)
    Store.open(tmp_path).commit(add=[B])
    assert json.loads((tmp_path / "manifest.json").read_text())["model"] == now("old")


def test_options_that_another_version_wrote_in_a_task_are_kept(tmp_path: Path) -> None:
    task = dataclasses.replace(A, options={**A.options, "later": {"a": [1, None]}})
    store = store_of(tmp_path, task)
    assert store.load()[0].options["later"] == {"a": [1, None]}
    assert store.verify() == []
