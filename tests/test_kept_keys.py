"""What routing computes of all tasks, kept beside the manifest: the same bits as without it, and of no other tasks."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from models import bits, make_slm, random_task, reopened
from stores import broken_anywhere, die, fail

from slm_fast import ScalableLM
from slm_fast.files import locked
from slm_fast.kept_keys import KeysFile
from slm_fast.store import Store

NAMES = ("city", "farm", "sea")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three tasks with their keys, over random features."""
    slm, path = make_slm("bert", features=32), tmp_path_factory.mktemp("large") / "store"
    slm.save_pretrained(path)
    slm.add([random_task(slm, name) for name in NAMES])
    reopened(path)
    assert keys_of(path)
    return path


@pytest.fixture
def path(large: Path, tmp_path: Path) -> Path:
    shutil.copytree(large, tmp_path / "store")
    return tmp_path / "store"


def file_of(store: Store) -> KeysFile:
    return KeysFile(store.path / ".keys", store.about)


def keys_of(path: Path) -> bool:
    """Whether a store's keys are kept and are those of its tasks."""
    store = Store.open(path)
    found = file_of(store).read()
    return found is not None and found.rows.keys() == set(store.files.values()) and not is_stale(store)


def is_stale(store: Store) -> bool:
    return file_of(store).is_stale(store.files)


def assert_same_bits(one: ScalableLM, other: ScalableLM) -> None:
    assert one.tasks == other.tasks
    for here, there in zip(bits(one), bits(other), strict=True):
        assert torch.equal(here, there)


def without_keys(path: Path, into: Path) -> ScalableLM:
    shutil.copytree(path, into)
    for name in (".keys", ".sum"):
        (into / name).unlink(missing_ok=True)
    return reopened(into)


def test_a_store_opened_with_its_keys_is_to_the_bit_the_one_opened_without(path: Path, tmp_path: Path) -> None:
    slm = reopened(path)
    assert not slm.model.router.sketch.is_summed
    assert_same_bits(slm, without_keys(path, tmp_path / "without"))


def test_what_is_learned_and_forgotten_after_opening_with_keys_is_as_without(path: Path, tmp_path: Path) -> None:
    slm, other = reopened(path), without_keys(path, tmp_path / "without")
    Store.open(path).commit(remove=["sea"])  # so that what was kept when it was opened is no longer there
    assert not (path / ".keys").exists()
    for each in (slm, other):
        each.add(random_task(each, "word"))
        each.forget("farm")
    other.forget("sea")
    assert_same_bits(slm, other)


def test_opening_keeps_the_keys_where_it_may_write(path: Path) -> None:
    (path / ".keys").unlink()
    with locked(path / ".lock", 0) as held:
        assert held
        reopened(path)
        assert not (path / ".keys").exists()
    reopened(path)
    assert keys_of(path)


@pytest.mark.parametrize("change", ["learn", "forget", "merge"])
def test_a_change_removes_the_keys_and_the_next_opening_makes_them(path: Path, tmp_path: Path, change: str) -> None:
    slm = reopened(path)
    if change == "learn":
        slm.add(random_task(slm, "word"))
    elif change == "forget":
        slm.forget("sea")
    else:
        other = make_slm("bert", features=32)
        other.save_pretrained(tmp_path / "other")
        other.add(random_task(other, "word"))
        Store.open(path).merge([Store.open(tmp_path / "other")])
    assert not (path / ".keys").exists()
    assert_same_bits(reopened(path), without_keys(path, tmp_path / "without"))
    assert keys_of(path)


def test_keys_that_are_damaged_anywhere_or_cut_short_are_not_used(path: Path) -> None:
    data, store = (path / ".keys").read_bytes(), Store.open(path)
    assert store.verify() == []
    for at in [*range(0, 128, 5), *range(128, len(data), 97)]:
        (path / ".keys").write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        assert file_of(store).read() is None
    for size in (0, 1, 64, 127, 128, 200, len(data) - 4, len(data) - 1):
        (path / ".keys").write_bytes(data[:size])
        assert file_of(store).read() is None
    [line] = store.verify()
    assert line.startswith(f"{path / '.keys'}: not of the store's tasks")
    store.load()
    assert store.kept.keys is None
    reopened(path)
    assert (path / ".keys").read_bytes() == data


def test_keys_of_other_tasks_are_not_used_and_cleared_away(path: Path, tmp_path: Path) -> None:
    other = make_slm("bert", features=32)
    other.save_pretrained(tmp_path / "other")
    other.add([random_task(other, name) for name in ("city", "farm", "word")])
    shutil.copy(path / ".keys", tmp_path / "other")
    store = Store.open(tmp_path / "other")
    store.load()
    assert store.kept.keys is None
    assert tmp_path / "other" / ".keys" in store.leftovers()
    [line] = store.verify()
    assert ".keys: not of the store's tasks" in line
    store.commit(remove=["word"])
    assert not (tmp_path / "other" / ".keys").exists()


def test_the_papers_router_keeps_no_keys(tmp_path: Path) -> None:
    slm = make_slm("bert", router="dtkr")
    slm.save_pretrained(tmp_path)
    slm.add([random_task(slm, name) for name in NAMES])
    assert reopened(tmp_path).tasks == list(NAMES)
    assert not (tmp_path / ".keys").exists()


@pytest.fixture
def begin(large: Path) -> Iterator[Path]:
    """The store in memory where there is some: what is tried many times is the order of calls, not the disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        shutil.copytree(large, Path(folder) / "begin")
        yield Path(folder) / "begin"


@pytest.mark.parametrize("act", [die, fail])
def test_a_commit_broken_anywhere_leaves_no_keys_of_other_tasks(begin: Path, act: Callable[[], object]) -> None:
    seen = set()
    for path in broken_anywhere(begin, lambda store: store.commit(remove=["sea"]), act):
        there = (path / ".keys").exists()
        assert not there or keys_of(path)
        seen.add((there, "sea" in Store.open(path).files))
        assert Store.open(path).verify() == []
    assert seen == {(True, True), (False, True), (False, False)}
