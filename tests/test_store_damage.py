"""Damaged stores: a one-line error names the file, and `verify` finds everything that `load` refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from models import make_slm
from stores import (
    ABOUT,
    A,
    B,
    C,
    contents,
    edit_manifest,
    store_of,
    tree,
)

from slm_fast.errors import InputError, SlmWarning, WorkError
from slm_fast.schema import task_path
from slm_fast.store import Store, task_from_file
from slm_fast.task_file import task_to_bytes

# Damage


def test_a_folder_without_a_manifest_is_not_a_store(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=f"{path}: not a store"):
            Store.open(path)


USES = [  # calls that open or create a store
    pytest.param(Store.open, id="open"),
    pytest.param(Store.exists, id="exists"),
    pytest.param(lambda path: Store(path, ABOUT, {}).check_writable(), id="check"),
    pytest.param(lambda path: Store(path, ABOUT, {}).commit(add=[C]), id="commit"),
    pytest.param(lambda path: make_slm("bert").save_pretrained(path), id="save_pretrained"),
]


def _opened_while_complete(path: Path) -> Store:
    """A store that was opened before its manifest was lost."""
    shutil.copy(path.parent / "manifest.json", path)
    store = Store.open(path)
    (path / "manifest.json").unlink()
    return store


@pytest.mark.parametrize("lock", [True, False], ids=["with its lock file", "without its lock file"])
@pytest.mark.parametrize(
    "act",
    [
        *USES,
        pytest.param(lambda path: Store(path, ABOUT, {}).save([C]), id="save"),
        pytest.param(lambda path: Store(path, ABOUT, {}).merge([Store.open(path.parent / "other")]), id="merge"),
        pytest.param(lambda path: _opened_while_complete(path).commit(add=[C]), id="commit of an open store"),
    ],
)
def test_a_folder_of_tasks_that_has_lost_its_manifest_is_refused_and_kept(tmp_path: Path, act, lock: bool) -> None:
    store_of(tmp_path / "other", C)
    path = store_of(tmp_path / "store", A, B).path
    shutil.move(path / "manifest.json", tmp_path / "manifest.json")
    if not lock:
        (path / ".lock").unlink()
    before = tree(path)
    says = "has task files but no manifest.json; restore manifest.json, or name another folder"
    with pytest.raises(InputError, match=f"^{path}: {says}$"):
        act(path)
    assert tree(path) == before
    shutil.move(tmp_path / "manifest.json", path)
    assert contents(Store.open(path).load()) == contents([A, B])


@pytest.mark.parametrize("act", USES)
def test_a_file_is_not_a_store(tmp_path: Path, act) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n")
    with pytest.raises(InputError, match=f"^{file}: is a file, expected a folder$"):
        act(file)
    with pytest.raises(InputError, match=f"^{file / 'a' / 'b'}: {file} is a file, expected a folder$"):
        act(file / "a" / "b")
    assert file.read_text() == "text,label\n"


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b'{"format": 1',
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"format": 1, "model": {}}',
        b'{"format": 1, "model": {}, "tasks": []}',
        b'{"format": 1, "model": {}, "tasks": {"a": {}}}',
        b'{"format": 1, "model": null, "tasks": {}}',
    ],
)
def test_a_damaged_manifest_is_named(tmp_path: Path, manifest: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(manifest)
    with pytest.raises(WorkError, match="damaged") as caught:
        Store.open(tmp_path)
    assert str(tmp_path / "manifest.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rest", [{"model": ABOUT, "tasks": {}}, {"adapters": []}])
def test_a_newer_format_is_refused_naming_both(tmp_path: Path, rest: dict) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 2, **rest}))
    with pytest.raises(WorkError, match=r"manifest.json: format 2; .* format 1"):
        Store.open(tmp_path)


@pytest.mark.parametrize("damage", ["cut short", "empty", "longer", "missing", "a folder"])
def test_a_damaged_task_file_is_named(tmp_path: Path, damage: str) -> None:
    store = store_of(tmp_path, A, B)
    file, data = store.file("b"), store.file("b").read_bytes()
    file.unlink()
    if damage == "a folder":
        file.mkdir()
    elif damage != "missing":
        file.write_bytes({"cut short": data[:-1], "empty": b"", "longer": data + b"\0"}[damage])
    with pytest.raises(WorkError) as caught:
        Store.open(tmp_path).load()
    assert str(file) in str(caught.value)
    [line] = Store.open(tmp_path).verify()
    assert str(file) in line
    assert "\n" not in str(caught.value) + line
    says = "; --skip-damaged (skip_damaged=True) opens the store without it, "
    for said in (str(caught.value), line):
        assert said.endswith(f"{says}`slm-fast forget {tmp_path} b` removes it")
    with pytest.warns(SlmWarning, match=f"{file}: .*; left out$") as warned:
        assert contents(Store.open(tmp_path).load(skip_damaged=True)) == contents([A])
    assert "--skip-damaged" not in str(warned[0].message)
    Store.open(tmp_path).commit(remove=["b"])
    assert contents(Store.open(tmp_path).load()) == contents([A])


@pytest.mark.parametrize("cause", [OSError(5, "Input/output error"), MemoryError()], ids=["disk", "memory"])
def test_a_task_that_cannot_be_read_now_is_not_said_to_be_damaged(tmp_path: Path, cause, monkeypatch) -> None:
    store = store_of(tmp_path, A)

    def fail(path: Path) -> bytes:
        raise cause

    monkeypatch.setattr(
        Path, "read_bytes", lambda path: fail(path) if path == store.file("a") else path.open("rb").read()
    )
    with pytest.raises(WorkError, match=f"^{store.file('a')}: ") as caught:
        store.load()
    assert "forget" not in str(caught.value) + store.verify()[0]


def test_one_flipped_bit_anywhere_in_a_task_file_is_found(tmp_path: Path) -> None:
    file = store_of(tmp_path, A, B).file("a")
    data = file.read_bytes()
    for at in range(0, len(data), 37):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        with pytest.raises(WorkError, match=str(file)):
            Store.open(tmp_path).load()


def _safetensors(about: object, **tensors: torch.Tensor) -> bytes:
    return safetensors.torch.save(tensors, None if about is None else {"slm_fast": json.dumps(about)})


@pytest.mark.parametrize(
    "data",
    [
        b"junk",
        _safetensors(None, x=torch.ones(1)),
        _safetensors([], x=torch.ones(1)),
        _safetensors({}, x=torch.ones(1)),
        _safetensors({"name": "a", "labels": None, "options": {}}, **{"values.m.lora_a": torch.ones(1, 1, 1)}),
        _safetensors({"name": "a", "labels": ["x"], "options": {}}, **{"head.weight": torch.ones(1, 1)}),
    ],
    ids=["junk", "no metadata", "a list", "no name", "half an increment", "half a head"],
)
def test_a_file_that_is_no_task_is_named(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(data)
    with pytest.raises(WorkError, match=f"{file}: not a task file") as caught:
        task_from_file(file, hashlib.sha256(data).hexdigest())
    assert "\n" not in str(caught.value)


def test_verify_finds_nothing_wrong_with_a_sound_store(tmp_path: Path) -> None:
    assert store_of(tmp_path, A, B, C).verify() == []


def test_verify_names_a_task_that_stands_under_another_name(tmp_path: Path) -> None:
    store = store_of(tmp_path, A)
    store.file("a").parent.rename(tmp_path / "tasks" / "z")
    digest = store.files["a"]
    renamed = {"z": {"file": f"tasks/z/{digest}.safetensors", "sha256": digest}}
    edit_manifest(tmp_path, lambda manifest: manifest.update(tasks=renamed))
    for refused in (Store.open(tmp_path).load, lambda: store_of(tmp_path / "x", B).merge([Store.open(tmp_path)])):
        with pytest.raises(WorkError, match="holds task 'a', the manifest says 'z'"):
            refused()
    [line] = Store.open(tmp_path).verify()
    assert "holds task 'a', the manifest says 'z'" in line


def test_a_file_in_the_place_of_a_tasks_folder_is_damage_and_not_a_crash(tmp_path: Path) -> None:
    store = store_of(tmp_path, A, B)
    shutil.rmtree(store.file("a").parent)
    store.file("a").parent.write_text("not a folder")
    assert [str(store.file("a")) in line for line in store.verify()] == [True]
    store.leftovers()
    store.commit(remove=["b"])
    assert list(Store.open(tmp_path).files) == ["a"]


# Valid files of other writers


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (" ,\n", " :\t")], ids=repr)
@pytest.mark.parametrize("spaces", range(4))
@pytest.mark.parametrize("first", [True, False])
def test_a_header_is_read_however_another_program_writes_it(tmp_path, separators, spaces, first) -> None:
    """The header's length determines where tensors begin. Unaligned ones cannot be memory-mapped."""
    store, data = store_of(tmp_path / "s", A, B), task_to_bytes(A)
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    metadata = {"__metadata__": header.pop("__metadata__")}
    header = metadata | header if first else header | metadata
    text = json.dumps(header, separators=separators).encode() + b" " * spaces
    data = len(text).to_bytes(8, "little") + text + data[begin:]
    digest = hashlib.sha256(data).hexdigest()
    file = task_path("a", digest)
    store.file("a").rename(store.path / file).write_bytes(data)
    edit_manifest(store.path, lambda manifest: manifest["tasks"]["a"].update(sha256=digest, file=file))
    assert contents(Store.open(store.path).load()) == contents([A, B])
    assert Store.open(store.path).verify() == []


READ_WITH_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from slm_fast.errors import lacks_memory
from slm_fast.task_file import task_from_file

file, digest = sys.argv[1:]
task_from_file(Path(file), digest)
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
for more in range(0, 160, 4):  # MiB
    resource.setrlimit(resource.RLIMIT_AS, (held + (more << 20), resource.RLIM_INFINITY))
    try:
        task_from_file(Path(file), digest)
        print("read")
    except BaseException as error:
        print("too little" if lacks_memory(error) and isinstance(error, Exception) else repr(error))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_too_little_memory_for_a_file_is_an_error_that_says_so(tmp_path: Path) -> None:
    """The library that reads it panics without memory, and may hang in doing so."""
    large = replace(A, values={"m": (torch.zeros(1, 8, 600_000), torch.zeros(1, 8, 100_000))})
    (file := tmp_path / "large.safetensors").write_bytes(data := task_to_bytes(large))
    command = [sys.executable, "-c", READ_WITH_LITTLE_MEMORY, file, hashlib.sha256(data).hexdigest()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert set(done.stdout.splitlines()) == {"too little", "read"}
    assert done.stderr == ""
