"""Routing keys cached beside the manifest: same bits as without them, and no keys of tasks that the store lacks."""

from __future__ import annotations

import copy
import hashlib
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from keyed_stores import (
    NAMES,
    assert_same_bits,
    file_of,
    has_openings_alone,
    keys_of,
    without_keys,
)
from models import make_slm, random_task, reopened
from stores import broken_anywhere, die, fail
from torch import Tensor

from slm_fast.errors import WorkError
from slm_fast.files import locked
from slm_fast.mapped_task import Opening
from slm_fast.store import Store


def test_a_store_opened_with_its_keys_is_to_the_bit_the_one_opened_without(keyed: Path, tmp_path: Path) -> None:
    slm = reopened(keyed)
    assert not slm.model.router.sketch.is_summed
    assert_same_bits(slm, without_keys(keyed, tmp_path / "without"))


def test_what_is_learned_and_forgotten_after_opening_with_keys_is_as_without(keyed: Path, tmp_path: Path) -> None:
    slm, other = reopened(keyed), without_keys(keyed, tmp_path / "without")
    Store.open(keyed).commit(remove=["sea"])  # replaces the file that `slm` was opened with
    assert has_openings_alone(keyed, "city", "farm")
    for each in (slm, other):
        each.add(random_task(each, "word"))
        each.forget("farm")
    other.forget("sea")
    assert_same_bits(slm, other)


def test_opening_keeps_the_keys_where_it_may_write(keyed: Path) -> None:
    (keyed / ".keys").unlink()
    with locked(keyed / ".lock", 0) as held:
        assert held
        reopened(keyed)
        assert not (keyed / ".keys").exists()
    reopened(keyed)
    assert keys_of(keyed)


@pytest.mark.parametrize("change", ["learn", "forget", "merge"])
def test_the_opening_after_a_change_reads_new_tasks_alone_and_makes_the_keys(
    keyed: Path, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slm, data, read = reopened(keyed), (keyed / ".keys").read_bytes(), []
    if change == "learn":
        slm.add(random_task(slm, "word"))
    elif change == "forget":
        slm.forget("sea")
    else:
        other = make_slm("bert", features=32)
        other.save_pretrained(tmp_path / "other")
        other.add(random_task(other, "word"))
        Store.open(keyed).merge([Store.open(tmp_path / "other")])
    if change == "forget":
        assert has_openings_alone(keyed, "city", "farm")
    else:
        assert (keyed / ".keys").read_bytes() == data
    assert Store.open(keyed).verify() == []
    plain = Store.read
    with monkeypatch.context() as patch:
        patch.setattr(Store, "read", lambda self, name, **how: read.append(name) or plain(self, name, **how))
        slm = reopened(keyed)
    assert read == ([] if change == "forget" else ["word"])
    assert keys_of(keyed)
    data = (keyed / ".keys").read_bytes()
    assert_same_bits(slm, without_keys(keyed, tmp_path / "without"))
    assert (tmp_path / "without" / ".keys").read_bytes() == data


def test_forgetting_leaves_no_key_that_the_task_took_part_in(keyed: Path) -> None:
    slm = reopened(keyed)
    centre, keys, _ = slm.model.router.discriminant
    opening = file_of(Store.open(keyed)).read().openings[Store.open(keyed).files["sea"]]
    traces = [part.numpy().tobytes() for part in (centre, *keys)] + [bytes(opening.start)]
    assert all(trace in (keyed / ".keys").read_bytes() for trace in traces)
    slm.forget("sea")
    assert has_openings_alone(keyed, "city", "farm")
    assert not any(trace in (keyed / ".keys").read_bytes() for trace in traces)


def test_keys_that_are_damaged_anywhere_or_cut_short_are_not_used(keyed: Path) -> None:
    data, store = (keyed / ".keys").read_bytes(), Store.open(keyed)
    assert store.verify() == []
    for at in [*range(0, 128, 5), *range(128, len(data), 97)]:
        (keyed / ".keys").write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        assert file_of(store).read() is None
    for size in (0, 1, 64, 127, 128, 200, len(data) - 4, len(data) - 1):
        (keyed / ".keys").write_bytes(data[:size])
        assert file_of(store).read() is None
    [line] = store.verify()
    assert line.startswith(f"{keyed / '.keys'}: a cache that is damaged or not of the store's tasks")
    store.load()
    assert store.kept.keys is None
    reopened(keyed)
    assert (keyed / ".keys").read_bytes() == data


def test_opening_with_the_keys_reads_no_tasks_file(keyed: Path) -> None:
    whole = reopened(keyed)
    for file in (keyed / "tasks").rglob("*.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))
    found = {task.name: task for task in Store.open(keyed).load()}
    for task in whole.learned.values():
        same = found[task.name]
        assert (same.labels, same.options, same.origin) == (task.labels, task.options, task.origin)
        assert (same.slots, same.shape) == (task.slots, task.shape)
        for one, other in zip(task.head or (), same.head or (), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(same.router["count"], task.router["count"])
        for damaged in (same.values, same.router):
            with pytest.raises(WorkError, match="damaged: SHA-256"):
                list(damaged.values())


@pytest.mark.parametrize("kept", [".keys", ".sum"])
def test_a_header_that_is_damaged_anywhere_is_a_damaged_file(keyed: Path, kept: str, monkeypatch) -> None:
    """Replaces one comma at a time by a point, which may still leave valid JSON."""
    monkeypatch.setattr(Store, "unsummed", 1)
    reopened(keyed)
    (keyed / ({".keys", ".sum"} - {kept}).pop()).unlink()
    assert (keyed / kept).exists()
    file = Store.open(keyed).file("farm")
    data = file.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    for at in [at for at in range(begin) if data[at] == ord(",")]:
        file.write_bytes(data[:at] + b"." + data[at + 1 :])
        with pytest.raises(WorkError, match="damaged: SHA-256"):
            [list(task.values.values()) for task in Store.open(keyed).load()]


def test_a_model_that_was_opened_can_be_copied_and_a_store_that_was_written_sent(keyed: Path) -> None:
    slm = reopened(keyed)
    assert_same_bits(copy.deepcopy(slm), slm)
    store = Store.open(keyed)
    assert store.verify() == []
    store.commit(add=[replace(slm.learned["sea"], name="word")])
    assert pickle.loads(pickle.dumps(store)).files == store.files


def test_a_file_of_another_size_is_found_when_the_store_is_opened(keyed: Path) -> None:
    file = Store.open(keyed).file("farm")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(WorkError, match=f"{file}: damaged: SHA-256"):
        reopened(keyed)


def test_verify_finds_keys_with_the_opening_of_another_task(keyed: Path) -> None:
    store = Store.open(keyed)
    kept = file_of(store).read()
    assert kept is not None
    openings = kept.openings
    one, other = (store.files[name] for name in ("city", "farm"))
    openings[one] = Opening(openings[one].digest, openings[other].start)
    known = file_of(store).known(kept, store.files)
    assert known is not None
    file_of(store).write(store.files, openings, known)
    assert keys_of(keyed)
    [line] = Store.open(keyed).verify()
    assert line.startswith(f"{keyed / '.keys'}: a cache that is damaged or not of the store's tasks")


def test_keys_of_other_tasks_are_not_used_and_cleared_away(keyed: Path, tmp_path: Path) -> None:
    other = make_slm("bert", features=32)
    other.save_pretrained(tmp_path / "other")
    other.add([random_task(other, name) for name in ("city", "farm", "word")])
    shutil.copy(keyed / ".keys", tmp_path / "other")
    store = Store.open(tmp_path / "other")
    store.load()
    assert store.kept.keys is None
    assert tmp_path / "other" / ".keys" in store.leftovers()
    [line] = store.verify()
    assert ".keys: a cache that is damaged or not of the store's tasks" in line
    store.commit(remove=["word"])
    assert has_openings_alone(tmp_path / "other", "city", "farm")


def test_the_papers_router_keeps_no_keys(tmp_path: Path) -> None:
    slm = make_slm("bert", router="dtkr")
    slm.save_pretrained(tmp_path)
    slm.add([random_task(slm, name) for name in NAMES])
    assert reopened(tmp_path).tasks == list(NAMES)
    assert not (tmp_path / ".keys").exists()


@pytest.mark.parametrize("act", [die, fail])
def test_a_commit_broken_anywhere_leaves_no_keys_of_other_tasks(
    keyed_in_memory: Path, act: Callable[[], object]
) -> None:
    seen = set()
    for path in broken_anywhere(keyed_in_memory, lambda store: store.commit(remove=["sea"]), act):
        whole = keys_of(path)
        assert whole or not (path / ".keys").exists() or has_openings_alone(path, "city", "farm")
        seen.add((whole, "sea" in Store.open(path).files))
        assert Store.open(path).verify() == []
    assert seen == {(True, True), (False, True), (False, False)}


# Files of earlier versions


def of_all_tasks(centre: Tensor, keys: Tensor, bias: Tensor, files: list[str]) -> bytes:
    """Format with a covariance of all tasks: SHA-256 of what follows and of the tasks, N, M, D, a table, and floats."""
    head = struct.pack("<32sQQQ", b"\7" * 32, len(NAMES), *keys.shape).ljust(96, b"\0")
    rest = head + b"".join(3 * bytes.fromhex(file) for file in files)
    rest += b"".join(part.numpy().tobytes() for part in (2 * bias, centre, keys))
    return hashlib.sha256(rest).digest() + rest


def without_openings(centre: Tensor, keys: Tensor, bias: Tensor, files: list[str]) -> bytes:
    """Today's format, except for version 2, table rows of four digests and a count, and nothing after the keys."""
    head = struct.pack("<32sQQQQ", b"\7" * 32, len(NAMES), *keys.shape, 2).ljust(96, b"\0")
    table = b"".join(4 * bytes.fromhex(file) + struct.pack("<Q", len(keys) // len(files)) for file in files)
    content = head + table + centre.numpy().tobytes()
    return hashlib.sha256(content).digest() + content + (2 * bias).numpy().tobytes() + keys.numpy().tobytes()


def with_one_digest(centre: Tensor, keys: Tensor, bias: Tensor, files: list[str]) -> bytes:
    """Today's format, except for version 3, and table rows of three digests; here with empty openings."""
    head = struct.pack("<32sQQQQ", b"\7" * 32, len(NAMES), *keys.shape, 3).ljust(96, b"\0")
    table = b"".join(3 * bytes.fromhex(file) + struct.pack("<QQ", len(keys) // len(files), 0) for file in files)
    content = head + table + centre.numpy().tobytes()
    return hashlib.sha256(content).digest() + content + (2 * bias).numpy().tobytes() + keys.numpy().tobytes()


@pytest.mark.parametrize("made", [of_all_tasks, without_openings, with_one_digest])
def test_keys_of_an_earlier_version_are_ignored_and_made_anew(keyed: Path, made: Callable[..., bytes]) -> None:
    expected = (keyed / ".keys").read_bytes()
    kept = file_of(Store.open(keyed)).read()
    assert kept is not None
    (keyed / ".keys").write_bytes(made(*kept.discriminant, sorted(entry.file for entry in kept.entries)))
    store = Store.open(keyed)
    assert store.verify() == []
    store.load()
    assert store.kept.keys is None
    assert keyed / ".keys" in store.leftovers()
    shutil.copytree(keyed, keyed.parent / "changed")
    Store.open(keyed.parent / "changed").commit(remove=["sea"])
    assert not (keyed.parent / "changed" / ".keys").exists()
    reopened(keyed)
    assert (keyed / ".keys").read_bytes() == expected
