"""A store with several users: shared by models, read during writes, merged, and written without space or permission."""

from __future__ import annotations

import errno
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    easy,
    knows,
    make_slm,
    mixed,
    one_thread,  # noqa: F401
    random_task,
    reopened,
    two_tasks,
)
from stores import ABOUT, A, B, C, D, become_nobody, finish, make_task, start, store_of, summed, tree

from slm_fast import InputError, ScalableLM, Task, WorkError, files
from slm_fast.errors import SlmWarning
from slm_fast.store import Store
from slm_fast.task_file import digest_of, task_to_bytes
from slm_fast.tasks import LearnedTask

# Models that share a store


@pytest.fixture
def slm(tmp_path: Path) -> ScalableLM:
    made = make_slm("bert")
    knows(made, *two_tasks(made))
    made.save_pretrained(tmp_path / "store")
    return made


def test_a_store_born_meanwhile_is_joined(slm: ScalableLM, tmp_path: Path) -> None:
    other = make_slm("bert")
    other.add(random_task(other, "sky"))
    other.save_pretrained(tmp_path / "store")
    assert other.tasks == ["farm", "sea", "sky"] == sorted(Store.open(tmp_path / "store").files)
    assert other.predict(mixed()) == reopened(tmp_path / "store").predict(mixed())


def test_another_task_of_a_name_is_not_saved_over_the_one_there(slm: ScalableLM, tmp_path: Path) -> None:
    other, before = make_slm("bert"), tree(tmp_path / "store")
    other.add(replace(random_task(other, "sky"), name="sea"))
    with pytest.raises(InputError, match=r"task 'sea': .* holds another task of this name"):
        other.save_pretrained(tmp_path / "store")
    assert tree(tmp_path / "store") == before


def test_a_task_forgotten_elsewhere_is_not_brought_back(slm: ScalableLM, tmp_path: Path) -> None:
    reopened(tmp_path / "store").forget("farm")
    slm.learn(easy("city", rows=8), epochs=1)
    assert slm.tasks == ["city", "sea"] == sorted(Store.open(tmp_path / "store").files)
    slm.save_pretrained(tmp_path / "store")
    assert sorted(Store.open(tmp_path / "store").files) == ["city", "sea"]


def test_a_task_learned_elsewhere_can_be_forgotten_and_learned_here(slm: ScalableLM, tmp_path: Path) -> None:
    reopened(tmp_path / "store").learn(easy("city", rows=8), epochs=1)
    slm.forget("city")
    slm.learn(easy("city", rows=8), epochs=1)
    assert slm.tasks == sorted(Store.open(tmp_path / "store").files) == ["city", "farm", "sea"]


def test_a_task_that_somebody_else_has_just_committed_is_added_once(slm: ScalableLM, tmp_path: Path) -> None:
    other = reopened(tmp_path / "store")
    other.learn(easy("city", rows=8), epochs=1)
    city = other.learned["city"]
    slm.add(city)  # this model has not seen that commit yet
    assert slm.tasks == sorted(Store.open(tmp_path / "store").files) == ["city", "farm", "sea"]
    with pytest.raises(InputError, match="has it already"):
        slm.add(city)
    late = reopened(tmp_path / "store")
    other.learn(easy("cat", rows=8), epochs=1)
    with pytest.raises(InputError, match="has it already"):
        late.add(replace(random_task(late, "cat"), origin="0" * 64))


def test_a_task_that_was_replaced_elsewhere_is_taken_over(slm: ScalableLM, tmp_path: Path) -> None:
    other = reopened(tmp_path / "store")
    other.forget("sea")
    other.add(replace(random_task(other, "sky"), name="sea"))
    slm.refresh()
    assert digest_of(slm.learned["sea"]) == digest_of(other.learned["sea"])
    assert slm.predict(mixed()) == other.predict(mixed())


def test_a_damaged_task_of_somebody_elses_is_left_out_and_can_be_forgotten(slm: ScalableLM, tmp_path: Path) -> None:
    store, before = Store.open(tmp_path / "store"), slm.predict(mixed())
    store.commit(add=[replace(slm.learned["sea"], name="bad", values={})])
    with pytest.warns(SlmWarning, match="tasks/bad/.*; left out"):
        slm.refresh()
    assert slm.tasks == ["farm", "sea"]
    assert slm.predict(mixed()) == before
    with pytest.raises(InputError, match="already learned"):
        slm.learn(easy("bad", rows=8), epochs=1)
    slm.forget("bad")
    assert sorted(Store.open(tmp_path / "store").files) == ["farm", "sea"]


def test_a_bad_task_costs_that_task(slm: ScalableLM, tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    store.file("farm").write_bytes(b"x")
    with pytest.raises(WorkError, match=r"tasks/farm/.*: damaged"):
        reopened(tmp_path / "store")
    with pytest.warns(SlmWarning, match="tasks/farm/.*; left out"):
        opened = reopened(tmp_path / "store", skip_damaged=True)
    assert opened.tasks == ["sea"]
    found = [[(a.label, a.score) for a in model.predict(mixed(), task="sea")] for model in (slm, opened)]
    assert found[0] == found[1]


def test_the_same_rows_and_options_are_learned_once(tmp_path: Path) -> None:
    slm = make_slm("bert")
    slm.save_pretrained(tmp_path / "store")
    slm.learn(easy("sky", rows=8), epochs=1)
    before = tree(tmp_path / "store")
    with pytest.warns(SlmWarning, match="task 'sky': already learned from the same rows and options; kept as it is"):
        slm.learn(easy("sky", rows=8), epochs=1)
    assert tree(tmp_path / "store") == before
    for other, options in ((easy("sky", rows=9), {"epochs": 1}), (easy("sky", rows=8), {"epochs": 2})):
        with pytest.raises(InputError, match="already learned; forget it first"):
            slm.learn(other, **options)


def test_what_a_task_is_made_from_decides_its_origin() -> None:
    def origin(task: Task, config: dict | None = None, **options: object) -> str | None:
        slm = make_slm("bert", **(config or {}))
        slm.learn(task, epochs=1, **options)
        return slm.learned[task.name].origin

    rows = [(f"{word} word1", label) for word, label in (("good1", "yes"), ("bad1", "no"), ("good2", "yes"))]
    mine = origin(Task("t", rows))
    assert mine == origin(Task("t", rows))
    others = [origin(Task("u", rows)), origin(Task("t", rows[::-1])), origin(Task("t", rows), rank=4)]
    others += [origin(Task("t", rows), config={"k": 3}), origin(Task("t", rows), valid=Task("t", rows))]
    assert len({mine, *others}) == 6


def test_a_store_that_cannot_be_written_is_said_to_be_so_before_anything_is_learned(
    slm: ScalableLM, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("slm_fast.slm.learn_task", lambda *_, **__: pytest.fail("it was learned"))
    (tmp_path / "store" / ".lock").unlink()
    (tmp_path / "store" / ".lock").mkdir()
    with pytest.raises(WorkError, match="store: cannot be written: Is a directory"):
        slm.learn(easy("sky", rows=8), epochs=1)


# Concurrent writers and readers


def moving(path: Path, monkeypatch: pytest.MonkeyPatch, *, rest: int | None) -> list[str]:
    """Create a store of "a" and "x0" that changes after each read of its manifest: "x<n>" is replaced by "x<n+1>", at
    most `rest` times (None: whenever the lock is free). Returns the list to which removed names are appended."""
    store_of(path, A, replace(B, name="x0"))
    writer, looking, gone = Store.open(path), Store._look_anew, []

    def looked(store: Store) -> dict[str, Any]:
        found = looking(store)
        if store.path == path and (rest is None or len(gone) < rest):
            monkeypatch.setattr(Store, "_look_anew", looking)
            monkeypatch.setattr(Store, "patience", 0.0)
            try:
                writer.commit(add=[replace(B, name=f"x{len(gone) + 1}")], remove=[f"x{len(gone)}"])
                gone.append(f"x{len(gone)}")
            except WorkError:  # a reader holds the lock
                pass
            monkeypatch.setattr(Store, "patience", 1.0)
            monkeypatch.setattr(Store, "_look_anew", looked)
        return found

    monkeypatch.setattr(Store, "_look_anew", looked)
    return gone


@pytest.mark.parametrize("rest", [1, 2, None])
@pytest.mark.parametrize("look", ["load", "verify", "merge"])
def test_a_reader_beside_a_writer_finds_one_whole_version(
    look: str, rest: int | None, tmp_path: Path, monkeypatch
) -> None:
    store = Store(tmp_path / "store", ABOUT, {})
    gone = moving(tmp_path / "store", monkeypatch, rest=rest)
    if look == "load":
        assert [task.name for task in store.load()] == ["a", f"x{len(gone)}"]
    elif look == "verify":
        assert store.verify() == []
    else:
        copy = Store(tmp_path / "copy", ABOUT, {})
        copy.merge([store])
        assert sorted(copy.files) == ["a", f"x{len(gone)}"]
        assert sorted(tree(tmp_path / "copy")) == sorted(
            ["manifest.json", "tasks", *(f"tasks/{n}" for n in copy.files)]
            + [str(copy.file(n).relative_to(copy.path)) for n in copy.files]
        )
    assert len(gone) >= (rest or 3)


def test_a_merge_leaves_no_file_of_a_task_that_its_source_forgets_meanwhile(tmp_path: Path, monkeypatch) -> None:
    into, source = store_of(tmp_path / "into", A), store_of(tmp_path / "source", B, C, D)
    reading = source.read

    def read(name: str, **how: bool) -> Any:
        found = reading(name, **how)
        if name == "b":
            Store.open(source.path).commit(remove=["b", "d"])  # "d" is not found, so the merge looks again
        return found

    monkeypatch.setattr(source, "read", read)
    into.merge([source])
    assert sorted(into.files) == ["a", "c"] == sorted(path.name for path in (into.path / "tasks").iterdir())
    assert into.leftovers() == []


def test_what_is_damaged_is_found_beside_a_writer_too(tmp_path: Path, monkeypatch) -> None:
    store_of(tmp_path / "store", C)
    file = Store.open(tmp_path / "store").file("c")
    moving(tmp_path / "store", monkeypatch, rest=None)
    file.write_bytes(b"x")
    [line] = Store(tmp_path / "store", ABOUT, {}).verify()
    assert str(file) in line


# Tasks with the same origin


@pytest.mark.parametrize("prefer", [None, "one", "two"])
def test_of_two_tasks_made_from_the_same_the_one_that_is_there_stays(prefer: str | None, tmp_path: Path) -> None:
    here = replace(A, origin="ab" * 32)
    there = replace(here, head=(here.head[0] + 1e-7, here.head[1]))
    one, two = store_of(tmp_path / "one", here, B), store_of(tmp_path / "two", there, C)
    one.merge([two], prefer=None if prefer is None else tmp_path / prefer)
    assert one.files["a"] == digest_of(there if prefer == "two" else here)
    assert sorted(one.files) == ["a", "b", "c"]
    assert Store.open(one.path).verify() == []


def test_different_tasks_of_a_name_are_merged_if_it_is_said_whose_to_prefer(tmp_path: Path) -> None:
    other = replace(make_task("z"), name="a", origin="cd" * 32)
    one, two = store_of(tmp_path / "one", replace(A, origin="ab" * 32)), store_of(tmp_path / "two", other)
    with pytest.raises(InputError, match=r"one and .*two hold different tasks of this name; --prefer STORE"):
        one.merge([two])
    assert one.files["a"] != two.files["a"]
    with pytest.raises(InputError, match="prefer: expected one of the stores that are merged, got"):
        one.merge([two], prefer=tmp_path / "three")
    one.merge([two], prefer=two.path)
    assert one.files["a"] == two.files["a"]
    assert len(tree(one.path)) == 4  # the replaced file is deleted


def test_a_task_made_from_the_same_elsewhere_is_saved_once(tmp_path: Path) -> None:
    here = replace(A, origin="ab" * 32)
    store = store_of(tmp_path, here)
    before = tree(tmp_path)
    near = replace(here, head=(here.head[0] + 1e-7, here.head[1]))
    store.commit(add=[near])
    assert store.save([near]) == {}
    assert tree(tmp_path) == before


def test_of_a_commit_that_finds_a_task_made_from_the_same_the_sum_is_not_kept(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Store, "unsummed", 1)
    here = replace(A, origin="ab" * 32)
    near = replace(here, head=(here.head[0] + 1e-7, here.head[1]))
    for name, there in (("new", []), ("has it", [here])):
        store = store_of(tmp_path / name, *there)
        store.commit(add=[near, B], summed=({"a": "", "b": ""}, summed(near, B)[1]))
        named = Store.open(store.path).files
        assert store.added == {task.name: digest_of(task) for task in (near, B) if not (there and task is near)}
        found = store._sum.read()
        assert found is None if there else found.opening.keys() == set(named.values())
    assert named == {"a": digest_of(here), "b": digest_of(B)}
    store.commit(add=[here])  # the same bits, as another process may have committed them just before
    assert store.added == {"a": digest_of(here)}


def test_a_task_becomes_bytes_once_for_its_commit(slm: ScalableLM, monkeypatch) -> None:
    made = []

    def counted(task: LearnedTask) -> bytes:
        made.append(task.name)
        return task_to_bytes(task)

    for module in ("store", "task_file"):
        monkeypatch.setattr(f"slm_fast.{module}.task_to_bytes", counted)
    slm.add(random_task(slm, "sky"))
    slm.refresh()
    assert (made, slm.tasks) == (["sky"], ["farm", "sea", "sky"])


# Disks


def test_a_task_is_forgotten_on_a_full_disk(tmp_path: Path, monkeypatch) -> None:
    store = store_of(tmp_path, A, B)
    writing = files.write

    def full(path: Path, data: bytes) -> None:
        if (tmp_path / ".reserve").exists() or path.name == ".reserve":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        writing(path, data)

    monkeypatch.setattr("slm_fast.store.write", full)
    monkeypatch.setattr("slm_fast.store.write_beside", full)
    with pytest.raises(WorkError, match="cannot be written: the disk is full; the store is as it was"):
        store.commit(add=[C])
    store.commit(remove=["a"])
    assert sorted(Store.open(tmp_path).files) == ["b"]
    monkeypatch.setattr("slm_fast.store.write", writing)
    monkeypatch.setattr("slm_fast.store.write_beside", files.write_beside)
    Store.open(tmp_path).commit(add=[D])
    assert (tmp_path / ".reserve").stat().st_size >= files.LEAST_RESERVE


def test_the_room_in_reserve_grows_with_the_manifest(tmp_path: Path) -> None:
    reserve = files.Reserve(tmp_path / "room")
    for size, kept in ((1, 65536), (65536, 131072), (70_000, 262144), (300, 65536)):
        reserve.keep(size)
        assert (tmp_path / "room").stat().st_size == kept >= size


def test_a_store_of_another_users_is_read_and_not_written() -> None:
    if os.getuid():
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which only root can read
        store = store_of(Path(folder) / "store", A)
        for path in (Path(folder), *Path(folder).rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)

        def work() -> str:
            become_nobody()
            assert store.verify() == []
            assert [task.name for task in store.load()] == ["a"]
            with pytest.raises(WorkError, match="store: cannot be written: Permission denied"):
                store.check_writable()
            return "read"

        assert finish(start(work)) == (0, "done: read")


# Memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_for_a_store_is_one_line(
    error: Exception, slm: ScalableLM, tmp_path: Path, monkeypatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("slm_fast.store_view.task_from_bytes", fail)
    with pytest.raises(WorkError, match=r"store/tasks/farm/.*: not enough memory: ") as caught:
        reopened(tmp_path / "store")
    assert "damaged" not in str(caught.value)
    assert Store.open(tmp_path / "store").verify()[0].startswith(str(tmp_path))
