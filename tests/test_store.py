"""The store on disk: deterministic bytes, atomic commits, concurrent readers and merging."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from interrupt import broken_off
from stores import (
    ABOUT,
    CONFIG,
    A,
    B,
    C,
    before_call,
    contents,
    edit_manifest,
    finish,
    make_task,
    start,
    store_of,
    tree,
    version,
)

from slm_fast import store as store_module
from slm_fast import store_view
from slm_fast.errors import InputError, SlmError, WorkError
from slm_fast.files import write, write_beside
from slm_fast.store import Store, task_to_bytes
from slm_fast.tasks import LearnedTask

# Deterministic bytes


def test_the_same_task_gives_the_same_bytes_every_time() -> None:
    assert len({task_to_bytes(make_task("a")) for _ in range(50)}) == 1


def test_the_same_task_gives_the_same_bytes_in_another_process_with_another_hash_seed() -> None:
    code = "import hashlib, stores as t; print(hashlib.sha256(t.task_to_bytes(t.A)).hexdigest())"
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert run.stdout.strip() == hashlib.sha256(task_to_bytes(A)).hexdigest(), run.stderr


@pytest.mark.parametrize("task", [A, make_task("free", labels=None), make_task("three", slots=3)], ids=lambda t: t.name)
def test_a_task_comes_back_from_disk_exactly(tmp_path: Path, task: LearnedTask) -> None:
    [found] = store_of(tmp_path, task).load()
    assert (found.name, found.labels, found.options) == (task.name, task.labels, task.options)
    assert found.slots == task.slots
    assert found.values.keys() == task.values.keys()
    assert found.router.keys() == task.router.keys()
    pairs = [(found.router[key], task.router[key]) for key in task.router]
    for module in task.values:
        pairs += zip(found.values[module], task.values[module], strict=True)
    if task.head is None:
        assert found.head is None
    else:
        assert found.head is not None
        pairs += zip(found.head, task.head, strict=True)
    for got, expected in pairs:
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


# Commits


def test_forgetting_a_task_gives_the_store_that_never_had_it(tmp_path: Path) -> None:
    store_of(tmp_path / "both", A, B).commit(remove=["b"])
    store_of(tmp_path / "alone", A)
    assert tree(tmp_path / "both") == tree(tmp_path / "alone")


def test_neither_the_order_of_commits_nor_that_of_the_models_fields_leaves_a_trace(tmp_path: Path) -> None:
    store_of(tmp_path / "1", A, B, C)
    store_of(tmp_path / "2", C, A, B)
    Store(tmp_path / "3", dict(reversed(ABOUT.items())), {}).commit(add=[B, C, A])
    assert tree(tmp_path / "1") == tree(tmp_path / "2") == tree(tmp_path / "3")


def test_a_commit_does_not_touch_the_files_of_other_tasks(tmp_path: Path) -> None:
    store = store_of(tmp_path, A, B)
    before = {name: (store.file(name).stat(), store.file(name).read_bytes()) for name in "ab"}
    store.commit(add=[C])
    store.commit(remove=["b"])
    was, data = before["a"]
    now = store.file("a").stat()
    assert store.file("a").read_bytes() == data
    assert (now.st_mtime_ns, now.st_ctime_ns, now.st_ino) == (was.st_mtime_ns, was.st_ctime_ns, was.st_ino)


def test_a_writer_builds_on_what_is_on_disk_now(tmp_path: Path) -> None:
    store_of(tmp_path, A)
    first, second = Store.open(tmp_path), Store.open(tmp_path)
    first.commit(add=[B])
    second.commit(add=[C])
    assert version(tmp_path) == contents([A, B, C])


def test_a_name_that_is_there_already_is_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path, A)
    before = tree(tmp_path)
    with pytest.raises(InputError, match=r"task 'a': already in .*; forget it first"):
        store.commit(add=[B, make_task("a", slots=2)])
    assert tree(tmp_path) == before


def test_removing_a_task_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"task 'c': not in .*; tasks: a, b"):
        store_of(tmp_path, A, B).commit(remove=["c"])


def test_a_model_of_another_fingerprint_cannot_write_and_both_are_named(tmp_path: Path) -> None:
    store_of(tmp_path, A)
    before = tree(tmp_path)
    with pytest.raises(InputError, match=r"fingerprint.*'f00d'.*'beef'") as caught:
        Store(tmp_path, {**ABOUT, "fingerprint": "beef"}, {}).commit(add=[B])
    assert str(tmp_path) in str(caught.value)
    assert tree(tmp_path) == before


def test_two_backbones_are_named_where_their_names_differ(tmp_path: Path) -> None:
    store_of(tmp_path, A)
    large = {**ABOUT, "backbone": "large", "fingerprint": "beef", "tokens": "0" * 64}
    with pytest.raises(InputError, match=f"^{tmp_path}: its backbone is 'tiny', that of this model is 'large'$"):
        Store(tmp_path, large, {}).commit(add=[B])


def test_a_commit_removes_nothing_that_no_store_wrote(tmp_path: Path) -> None:
    mine = {"notes.txt": "n", "film.mkv.part": "f", "tasks/todo.md": "t", "tasks/mine/data.csv": "d"}
    for name, text in mine.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with suppress(InputError):  # refusing such a folder would be fine, too
        store_of(tmp_path, A, B).commit(remove=["a"])
    assert {name for name in mine if not (tmp_path / name).exists()} == set()


def test_a_second_writer_is_refused_while_the_first_is_in_its_commit(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Store, "patience", 0.2)
    store_of(tmp_path, A)
    (told, tell), (hear, say) = os.pipe(), os.pipe()

    def slow_commit() -> None:
        before_call(1, lambda: (os.write(tell, b"."), os.read(hear, 1)), only="os.rename")
        Store.open(tmp_path).commit(add=[B])

    child = start(slow_commit)
    os.read(told, 1)  # now it is about to rename its first file
    with pytest.raises(WorkError, match="another process is writing") as caught:
        Store.open(tmp_path).commit(add=[C])
    assert str(tmp_path) in str(caught.value)
    assert version(tmp_path) == contents([A])
    os.write(say, b".")
    assert finish(child) == (0, "done: None")
    Store.open(tmp_path).commit(add=[C])
    assert version(tmp_path) == contents([A, B, C])


# Concurrent readers


def test_a_reader_beside_a_writer_always_finds_one_whole_version(tmp_path: Path) -> None:
    store_of(tmp_path, A, B)

    def write() -> None:
        store = Store.open(tmp_path)
        for _ in range(25):
            store.commit(add=[C])
            store.commit(remove=["a"])
            store.commit(add=[A])
            store.commit(remove=["c"])

    possible = [contents(tasks) for tasks in ([A, B], [A, B, C], [B, C])]
    seen = set()
    child = start(write)
    lasting = Store.open(tmp_path)
    while os.waitid(os.P_PID, child[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        for found in (version(tmp_path), contents(lasting.load())):
            assert found in possible
            seen.add(possible.index(found))
    assert finish(child) == (0, "done: None")
    assert len(seen) > 1


def test_a_reader_finds_a_task_that_was_forgotten_and_learned_again_while_it_read(tmp_path: Path) -> None:
    file = store_of(tmp_path, A, B).file("a")

    def read() -> list[str]:
        reader, other = Store.open(tmp_path), Store.open(tmp_path)
        # Just before the reader opens a, b is removed. When the reader rereads the manifest, b is added again.
        turns = [
            (file, lambda: other.commit(remove=["b"])),
            (tmp_path / "manifest.json", lambda: other.commit(add=[B])),
        ]

        def hook(event: str, args: tuple) -> None:
            if event == "open" and turns and str(args[0]) == str(turns[0][0]):
                (_, act), rest = turns[0], turns[1:]
                turns.clear()  # so that the other writer's own file accesses do not trigger the hook
                act()
                turns.extend(rest)

        sys.addaudithook(hook)
        found = [task.name for task in reader.load()]
        assert not turns
        return found

    assert finish(start(read)) == (0, "done: ['a', 'b']")


# Merging


def test_stores_merged_equal_the_store_that_learned_all_in_sequence(tmp_path: Path) -> None:
    store_of(tmp_path / "one", C)
    store_of(tmp_path / "two", A, B)
    merged = Store(tmp_path / "merged", ABOUT, {})
    merged.merge([Store.open(tmp_path / "one"), Store.open(tmp_path / "two")])
    store_of(tmp_path / "sequence", A, B, C)
    assert tree(tmp_path / "merged") == tree(tmp_path / "sequence")


def test_the_same_task_in_two_stores_is_merged_once(tmp_path: Path) -> None:
    into = store_of(tmp_path / "into", A, B)
    file = into.file("a").stat()
    into.merge([store_of(tmp_path / "other", A, C)])
    assert version(tmp_path / "into") == contents([A, B, C])
    assert into.file("a").stat().st_mtime_ns == file.st_mtime_ns
    assert into.leftovers() == []


@pytest.mark.parametrize("where", ["destination", "sources"])
def test_different_tasks_of_one_name_are_refused_naming_both_stores(tmp_path: Path, where: str) -> None:
    into = store_of(tmp_path / "into", make_task("c", slots=2) if where == "destination" else B)
    sources = [store_of(tmp_path / "x", A)]
    sources += [store_of(tmp_path / "y", make_task("c", slots=2))] if where == "sources" else []
    sources += [store_of(tmp_path / "z", C)]
    before = version(tmp_path / "into")
    with pytest.raises(InputError, match="task 'c'") as caught:
        into.merge(sources)
    assert str(tmp_path / ("into" if where == "destination" else "y")) in str(caught.value)
    assert str(tmp_path / "z") in str(caught.value)
    assert version(tmp_path / "into") == before


def test_a_refused_merge_leaves_nothing_behind(tmp_path: Path) -> None:
    into = store_of(tmp_path / "into", B)
    with pytest.raises(InputError):
        into.merge([store_of(tmp_path / "x", A), store_of(tmp_path / "y", make_task("b", slots=2))])
    assert into.leftovers() == []


def test_a_store_of_another_configuration_is_not_merged(tmp_path: Path) -> None:
    other = Store(tmp_path / "other", {**ABOUT, "config": {**CONFIG, "k": 5}}, {})
    other.commit(add=[B])
    with pytest.raises(InputError, match=r"config\.k is 5, .* has 2") as caught:
        store_of(tmp_path / "into", A).merge([other])
    assert str(tmp_path / "other") in str(caught.value)
    assert version(tmp_path / "into") == contents([A])
    with pytest.raises(InputError, match=r"config\.k"):
        Store(tmp_path / "new", ABOUT, {}).merge([store_of(tmp_path / "x", B), other])
    assert not (tmp_path / "new").exists()


def test_another_configuration_is_told_rather_than_the_shapes_it_leads_to(tmp_path: Path) -> None:
    shapes = {"hidden": 4, "query": 8, "layers": {"layer.0": [4, 4]}}
    other = {**ABOUT, "config": {**CONFIG, "k": 5}, "shapes": {**shapes, "query": 9}}
    Store(tmp_path / "other", other, {}).commit(add=[B])
    Store(tmp_path / "into", {**ABOUT, "shapes": shapes}, {}).commit(add=[A])
    with pytest.raises(InputError, match=r"other: config\.k is 5, .* has 2$"):
        Store.open(tmp_path / "into").merge([Store.open(tmp_path / "other")])
    Store(tmp_path / "third", {**ABOUT, "shapes": {**shapes, "query": 9}}, {}).commit(add=[C])
    with pytest.raises(InputError, match=r"third: shapes\.query is 9, .* has 8$"):
        Store.open(tmp_path / "into").merge([Store.open(tmp_path / "third")])


def test_stores_of_one_backbone_loaded_from_different_places_are_merged(tmp_path: Path) -> None:
    other = Store(tmp_path / "other", {**ABOUT, "backbone": "/elsewhere/tiny"}, {})
    other.commit(add=[B])
    store_of(tmp_path / "into", A).merge([other])
    assert version(tmp_path / "into") == contents([A, B])


def test_a_damaged_file_is_not_merged(tmp_path: Path) -> None:
    other = store_of(tmp_path / "other", B, C)
    other.file("c").write_bytes(other.file("c").read_bytes()[:-1])
    with pytest.raises(WorkError, match=str(other.file("c"))):
        store_of(tmp_path / "into", A).merge([other])
    assert version(tmp_path / "into") == contents([A])


def test_a_name_in_a_manifest_cannot_lead_out_of_the_store(tmp_path: Path) -> None:
    other = store_of(tmp_path / "deep" / "other", B)
    shutil.copytree(other.path / "tasks" / "b", tmp_path / "deep" / "evil")
    edit_manifest(other.path, lambda manifest: manifest["tasks"].update({"../../evil": manifest["tasks"].pop("b")}))
    into = store_of(tmp_path / "into", A)
    before = tree(tmp_path)
    with pytest.raises(SlmError, match="evil"):
        into.merge([Store.open(other.path)])
    assert tree(tmp_path) == before


@pytest.mark.parametrize("file", ["manifest.json", "safetensors"])
def test_an_interrupt_right_behind_a_file_leaves_the_old_store_or_the_new_one(tmp_path, monkeypatch, file):
    Store(tmp_path, ABOUT, {}).commit(add=[A])

    def interrupted(writing: Callable[..., Path | None], path: Path, data: bytes) -> Path | None:
        part = writing(path, data)
        if path.name.endswith(file):
            raise KeyboardInterrupt
        return part

    for writing in (write, write_beside):
        monkeypatch.setattr(f"slm_fast.store.{writing.__name__}", partial(interrupted, writing))
    with pytest.raises(KeyboardInterrupt):
        Store.open(tmp_path).commit(add=[B], remove=["a"])
    found = Store.open(tmp_path)
    assert sorted(found.files) == (["b"] if file == "manifest.json" else ["a"])
    assert found.verify() == []
    assert found.leftovers() == []


def test_after_an_interrupt_anywhere_a_store_that_others_took_back_is_seen_as_it_is(tmp_path: Path) -> None:
    store = store_of(tmp_path, A)
    undone = 0
    for _ in broken_off(lambda: store.commit(add=[B]), store_module, store_view):
        if "b" in Store.open(tmp_path).files:
            undone += 1
            Store.open(tmp_path).commit(remove=["b"])  # the manifest has the bytes that it had before the interrupt
        store.commit(add=[C])
        assert version(tmp_path) == contents([A, C])
        store.commit(remove=["c"])
    assert undone > 5


def test_a_commit_looks_everywhere_for_leftovers_where_the_writer_before_it_may_have_left_some(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", A, B)
    stray = store.file("b").with_name("0" * 64 + ".safetensors")
    stray.write_bytes(b"")
    store.commit(add=[C])
    assert store.leftovers() == [stray]  # the previous commit completed, so only the folder of "c" was searched
    shutil.copytree(store.path, tmp_path / "copy")
    copy = Store.open(tmp_path / "copy")
    copy.commit(remove=["c"])
    assert copy.leftovers() == []
    (store.path / ".lock").write_bytes(b"")  # as left by a killed writer
    store.commit(remove=["c"])
    assert store.leftovers() == []
