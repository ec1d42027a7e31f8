"""Cached routing keys of a store in which only some tasks are sampled for covariance and centre."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from keyed_stores import assert_same_bits, file_of, has_openings_alone, keys_of, without_keys
from models import random_task, reopened
from stores import broken_anywhere, die, fail

import slm_fast.kept_keys
import slm_fast.sketch
from slm_fast.store import Store


@pytest.fixture
def of_one_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample one task for covariance and centre: city, whose name has the lowest SHA-256 except for sky's."""
    monkeypatch.setattr(slm_fast.sketch, "SAMPLED", 1)
    monkeypatch.setattr(slm_fast.sketch, "ALL", 1)


@pytest.fixture
def sample_of_one(of_one_task: None, keyed: Path) -> Path:
    (keyed / ".keys").unlink()
    reopened(keyed)
    assert keys_of(keyed)
    return keyed


def test_learning_outside_the_sample_leaves_the_keys_and_opening_computes_what_they_lack(
    sample_of_one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, computed = (sample_of_one / ".keys").read_bytes(), []
    slm = reopened(sample_of_one)
    slm.add(random_task(slm, "word"))
    assert (sample_of_one / ".keys").read_bytes() == data
    assert Store.open(sample_of_one).verify() == []
    kind = type(slm.model.router)
    means = kind.means
    monkeypatch.setattr(kind, "means", lambda self, part: computed.append(len(part["mean"])) or means(self, part))
    opened = reopened(sample_of_one)
    assert len(computed) == 2  # means of city, for the centre, and of word
    assert_same_bits(opened, slm)
    assert_same_bits(opened, without_keys(sample_of_one, tmp_path / "without"))
    assert keys_of(sample_of_one)
    assert (sample_of_one / ".keys").read_bytes() == (tmp_path / "without" / ".keys").read_bytes()


def test_forgetting_outside_the_sample_leaves_the_others_keys_and_nothing_of_the_task(
    sample_of_one: Path, tmp_path: Path
) -> None:
    slm = reopened(sample_of_one)
    own = slm.model.router.known_keys.rows["farm"]
    traces = [part[own].numpy().tobytes() for part in slm.model.router.discriminant[1:]]
    traces.append(bytes.fromhex(Store.open(sample_of_one).files["farm"]))

    def found() -> list[bool]:
        data = b"".join(file.read_bytes() for file in sample_of_one.rglob("*") if file.is_file())
        return [trace in data for trace in traces]

    assert found() == [True, True, True]
    slm.forget("farm")
    assert found() == [False, False, False]
    assert keys_of(sample_of_one)
    assert_same_bits(reopened(sample_of_one), slm)
    assert_same_bits(slm, without_keys(sample_of_one, tmp_path / "without"))
    assert (sample_of_one / ".keys").read_bytes() == (tmp_path / "without" / ".keys").read_bytes()


def test_forgetting_a_sampled_task_removes_the_keys(sample_of_one: Path, tmp_path: Path) -> None:
    slm = reopened(sample_of_one)
    slm.forget("city")
    assert has_openings_alone(sample_of_one, "farm", "sea")
    assert_same_bits(reopened(sample_of_one), without_keys(sample_of_one, tmp_path / "without"))
    assert_same_bits(slm, reopened(sample_of_one))


def test_keys_of_another_sample_are_not_used_and_removed_when_a_task_is(sample_of_one: Path, tmp_path: Path) -> None:
    slm = reopened(sample_of_one)
    slm.add(random_task(slm, "sky"))
    store = Store.open(sample_of_one)
    store.load()
    assert store.kept.keys is None
    shutil.copytree(sample_of_one, tmp_path / "changed")
    Store.open(tmp_path / "changed").commit(remove=["sea"])
    assert has_openings_alone(tmp_path / "changed", "city", "farm")
    assert_same_bits(reopened(sample_of_one), without_keys(sample_of_one, tmp_path / "without"))
    assert_same_bits(slm, reopened(sample_of_one))


def test_keys_that_cannot_be_written_anew_are_removed(sample_of_one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        fail()

    monkeypatch.setattr(slm_fast.kept_keys, "write", full)
    Store.open(sample_of_one).commit(remove=["farm"])
    assert not (sample_of_one / ".keys").exists()
    assert Store.open(sample_of_one).verify() == []


@pytest.mark.parametrize("act", [die, fail])
def test_a_commit_outside_the_sample_broken_anywhere_leaves_keys_of_the_stores_tasks_alone(
    keyed_in_memory: Path, of_one_task: None, act: Callable[[], object]
) -> None:
    (keyed_in_memory / ".keys").unlink()
    reopened(keyed_in_memory)
    farm, seen = Store.open(keyed_in_memory).files["farm"], set()
    for path in broken_anywhere(keyed_in_memory, lambda store: store.commit(remove=["farm"]), act):
        store = Store.open(path)
        kept = file_of(store).read()
        assert (kept is None) == (not (path / ".keys").exists())
        rows = {} if kept is None else kept.rows
        assert rows.keys() <= set(store.files.values())
        assert store.verify() == []
        seen.add((kept is not None, farm in rows, "farm" in store.files))
        store.commit(remove=["sea"])
        assert store.leftovers() == []
        assert not (path / ".keys.part").exists()
    assert seen >= {(True, True, True), (True, False, True), (True, False, False)}
