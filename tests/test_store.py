"""The store on disk: the same bytes from the same tasks, and the old store or the new one whatever happens."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors.torch
import torch

from slm_fast.errors import InputError, SlmError, WorkError
from slm_fast.store import Store, task_from_file, task_to_bytes
from slm_fast.tasks import LearnedTask

CONFIG = {
    "query": "trunk",
    "router": "gaussian",
    "taps": [1, 3],
    "encoder": None,
    "targets": ["query", "value"],
    "first_layer": 3,
    "k": 2,
    "groups": 4,
    "aggregate": "mean",
    "temperature": 4.0,
    "route_on": "input",
    "max_length": 128,
}
ABOUT = {"backbone": "tiny", "fingerprint": "f00d", "config": CONFIG}


def make_task(name: str, *, slots: int = 1, labels: tuple[str, ...] | None = ("né", "pos")) -> LearnedTask:
    """A small task of random tensors, the same in every process."""
    generator = torch.Generator().manual_seed(int.from_bytes(name.encode(), "big") % 2**31)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return LearnedTask(
        name=name,
        labels=labels,
        values={m: (random(slots, 2, 4), random(slots, 2, 3)) for m in ("layer.1.query", "layer.0.value")},
        router={"count": random(slots), "mean": random(slots, 4), "scatter": random(10), "distance": random(101)},
        head=None if labels is None else (random(len(labels), 3), random(len(labels))),
        options={"rank": 2, "learning_rate": 1e-3, "targets": ["query", "value"], "label": "…", "slots": None},
    )


A, B, C, D = (make_task(name) for name in "abcd")


def store_of(path: Path, *tasks: LearnedTask) -> Store:
    """A store that learned these tasks one after another."""
    store = Store(path, ABOUT, {})
    for task in tasks:
        store.commit(add=[task])
    return store


def writer(path: Path) -> Store:
    return Store.open(path) if Store.exists(path) else Store(path, ABOUT, {})


def tree(path: Path) -> dict[str, bytes]:
    """Every file's bytes (a folder's are empty), but for the lock."""
    found = {str(p.relative_to(path)): p.read_bytes() if p.is_file() else b"" for p in path.rglob("*")}
    found.pop(".lock", None)
    return found


def version(path: Path) -> dict[str, bytes]:
    """What a reader finds, every task read in full. No store yet is a store without tasks."""
    return contents(Store.open(path).load()) if Store.exists(path) else {}


def contents(tasks: Sequence[LearnedTask]) -> dict[str, bytes]:
    return {task.name: task_to_bytes(task) for task in tasks}


def edit_manifest(path: Path, change: Callable[[dict], None]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


# A forked process starts in milliseconds, and what breaks there breaks nothing here.


def start(work: Callable[[], object]) -> tuple[int, int]:
    """Run `work` in a forked process: its id and a pipe that will hold what `work` returned or raised."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)  # a test may fail, but not hang
        try:
            answer = f"done: {work()}"
        except SlmError as error:
            answer = f"{type(error).__name__}: {error}"
        except BaseException:
            answer = traceback.format_exc()
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    return pid, reading


def finish(child: tuple[int, int]) -> tuple[int, str]:
    """Exit status (minus the signal that killed it) and answer."""
    pid, reading = child
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), answer


def announce(hook: Callable[[str, tuple], None]) -> None:
    """In this process, for good: call `hook` before every file-system call.

    The interpreter announces each (sys.audit) but os.fsync, which is replaced by one that does.
    """
    fsync = os.fsync

    def announced_fsync(descriptor: int) -> None:
        sys.audit("os.fsync", descriptor)
        fsync(descriptor)

    os.fsync = announced_fsync
    sys.addaudithook(hook)


def before_call(n: int, act: Callable[[], object], only: str = "") -> Callable[[], int]:
    """`act` just before the n-th file-system call from now (of one kind, if `only` names it).

    Returns what tells how many there were.
    """
    seen = 0

    def hook(event: str, _: tuple) -> None:
        nonlocal seen
        if event == only if only else event == "open" or event.split(".")[0] in ("os", "shutil", "fcntl"):
            seen += 1
            if seen == n:
                act()

    announce(hook)
    return lambda: seen


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def become_nobody() -> None:
    """Root may read and write anywhere, so a forked process of root's becomes another user."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def fail() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


# The bytes


def test_the_same_task_gives_the_same_bytes_every_time() -> None:
    assert len({task_to_bytes(make_task("a")) for _ in range(50)}) == 1


def test_the_same_task_gives_the_same_bytes_in_another_process_with_another_hash_seed() -> None:
    code = "import hashlib, test_store as t; print(hashlib.sha256(t.task_to_bytes(t.A)).hexdigest())"
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


def test_a_commit_removes_nothing_that_no_store_wrote(tmp_path: Path) -> None:
    mine = {"notes.txt": "n", "film.mkv.part": "f", "tasks/todo.md": "t", "tasks/mine/data.csv": "d"}
    for name, text in mine.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with suppress(InputError):  # to refuse such a folder would be as good
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


# Readers beside a writer


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
        # Just before the reader opens a, b is forgotten. When it comes back for the manifest, b is learned again.
        turns = [
            (file, lambda: other.commit(remove=["b"])),
            (tmp_path / "manifest.json", lambda: other.commit(add=[B])),
        ]

        def hook(event: str, args: tuple) -> None:
            if event == "open" and turns and str(args[0]) == str(turns[0][0]):
                (_, act), rest = turns[0], turns[1:]
                turns.clear()  # what the other does is not the reader's doing
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


# Damage


def test_a_folder_without_a_manifest_is_not_a_store(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=f"{path}: not a store"):
            Store.open(path)


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


# Killed, out of space, or not allowed

COMMITS: dict[str, tuple[tuple[LearnedTask, ...], Callable[[Store], None], tuple[LearnedTask, ...]]] = {
    "first": ((), lambda store: store.commit(add=[A]), (A,)),
    "add": ((A, B), lambda store: store.commit(add=[C]), (A, B, C)),
    "remove": ((A, B), lambda store: store.commit(remove=["b"]), (A,)),
    "add and remove": ((A, B), lambda store: store.commit(add=[C], remove=["a"]), (B, C)),
    "merge": ((A,), lambda store: store.merge([Store.open(store.path.parent / "other")]), (A, B, C)),
}


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: what these tests try many times is the order of calls, not the disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


class Stage:
    """A store before and after one commit, and how a commit that follows leaves it."""

    def __init__(self, folder: Path, commit: str) -> None:
        before, self.act, after = COMMITS[commit]
        self.begin, self.path = folder / "begin", folder / "store"
        store_of(folder / "other", B, C)
        store_of(self.begin, *before)
        self.old, self.new = contents(before), contents(after)
        self.following = [
            tree(store_of(folder / name, *tasks, D).path) for name, tasks in (("old", before), ("new", after))
        ]
        self.act(self.reset())  # whatever is imported late is imported now

    def reset(self) -> Store:
        shutil.rmtree(self.path, ignore_errors=True)
        if self.begin.exists():
            shutil.copytree(self.begin, self.path)
        return writer(self.path)

    def run(self, n: int, act: Callable[[], object]) -> tuple[int, str]:
        """The commit in a process of its own, with `act` before its n-th file-system call."""

        def work() -> int:
            calls = before_call(n, act)
            self.act(writer(self.path))
            return calls()

        self.reset()
        return finish(start(work))

    def calls(self) -> range:
        """The numbers of the commit's file-system calls."""
        code, answer = self.run(0, die)
        assert (code, answer[:6]) == (0, "done: ")
        return range(1, int(answer[6:]) + 1)

    def outcome(self) -> bool:
        """Whether the store is the new one; it must be that or the old one, and the next commit must leave it clean."""
        found = version(self.path)
        assert found in (self.old, self.new)
        is_new = found == self.new
        writer(self.path).commit(add=[D])
        assert tree(self.path) == self.following[is_new]
        return is_new


@pytest.mark.parametrize("commit", COMMITS)
def test_a_commit_killed_before_any_of_its_file_system_calls_leaves_the_old_store_or_the_new(
    memory: Path, commit: str
) -> None:
    stage = Stage(memory, commit)
    outcomes = []
    for n in stage.calls():
        assert stage.run(n, die)[0] == -signal.SIGKILL
        outcomes.append(stage.outcome())
    assert outcomes == sorted(outcomes)  # once it is the new one it stays the new one
    assert set(outcomes) == {False, True}
    assert len(outcomes) > 10


@pytest.mark.parametrize("commit", COMMITS)
def test_a_commit_killed_in_the_middle_of_a_write_leaves_the_old_store(memory: Path, commit: str) -> None:
    stage = Stage(memory, commit)
    before, after = tree(stage.begin) if stage.begin.exists() else {}, tree(stage.path)
    written = [len(data) for name, data in after.items() if data and before.get(name) != data]
    for size in sorted({0, 1, *(size // 2 for size in written), max(written) - 1}):
        stage.reset()

        def work(size: int = size) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel kills the process as a file grows beyond `size`
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            stage.act(writer(stage.path))

        assert finish(start(work))[0] == -signal.SIGXFSZ
        assert stage.outcome() is False


@pytest.mark.parametrize("commit", COMMITS)
def test_a_commit_in_which_a_file_system_call_fails_says_truly_whether_it_was_made(memory: Path, commit: str) -> None:
    stage = Stage(memory, commit)
    outcomes, wrong = [], []
    for n in stage.calls():
        code, answer = stage.run(n, fail)
        is_new = stage.outcome()
        outcomes.append(is_new)
        told_old, told_new = "as it was" in answer, answer.startswith("done")
        if code or not answer.startswith(("done", "WorkError")) or "\n" in answer or (told_old if is_new else told_new):
            wrong.append(f"call {n}, {'new' if is_new else 'old'} store: {answer}")
    assert not wrong, "\n".join(wrong)
    assert set(outcomes) == {False, True}


@pytest.mark.parametrize("commit", COMMITS)
def test_a_file_is_on_disk_before_it_takes_its_place_and_the_manifest_takes_it_last(memory: Path, commit: str) -> None:
    stage = Stage(memory, commit)

    def work() -> str:
        log: list[tuple[str, str]] = []

        def hook(event: str, args: tuple) -> None:
            if event == "os.fsync":
                log.append(("flush", os.readlink(f"/proc/self/fd/{args[0]}")))
            elif event == "os.rename":
                log.append((str(args[0]), str(args[1])))

        announce(hook)
        stage.act(stage.reset())
        for i, (source, target) in enumerate(log):
            if source != "flush":
                assert log[i - 1] == ("flush", source), log
                assert log[i + 1] == ("flush", str(Path(target).parent)), log
        return " ".join(Path(target).suffix for source, target in log if source != "flush")

    files = len(set(stage.new) - set(stage.old))
    assert finish(start(work)) == (0, "done: " + " ".join([".safetensors"] * files + [".json"]))


def test_what_a_killed_commit_leaves_is_no_damage_and_the_next_commit_clears_it(tmp_path: Path) -> None:
    def work() -> None:
        before_call(2, die, only="os.rename")  # the manifest's; the task's file is in its place
        Store.open(tmp_path).commit(add=[B])

    store = store_of(tmp_path, A)
    assert finish(start(work))[0] == -signal.SIGKILL
    assert store.verify() == []
    left = {path.name for path in store.leftovers()}
    assert "manifest.json.part" in left
    assert any((tmp_path / "tasks" / "b") in (path, path.parent) for path in store.leftovers())
    store.commit(add=[C])
    assert store.leftovers() == []
    assert {path.name for path in (tmp_path / "tasks").iterdir()} == {"a", "c"}


def test_a_file_that_cannot_grow_is_one_line_and_changes_nothing(memory: Path) -> None:
    stage = Stage(memory, "add")
    for size in (0, 1, 1000, writer(stage.path).file("c").stat().st_size - 1):
        stage.reset()

        def work(size: int = size) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            stage.act(writer(stage.path))

        code, answer = finish(start(work))
        assert code == 0
        assert answer == f"WorkError: {stage.path}: cannot be written: File too large; the store is as it was"
        assert stage.outcome() is False


def _own_disk(path: Path, kilobytes: int) -> bool:
    """Give this process, and no other, a small disk at `path`. False where the kernel does not allow that."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    new_user, new_mounts = 0x10000000, 0x00020000
    if libc.unshare(new_user | new_mounts) != 0:
        return False
    with suppress(OSError):
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        return libc.mount(b"tmpfs", str(path).encode(), b"tmpfs", 0, f"size={kilobytes}k".encode()) == 0
    return False


def test_a_full_disk_is_one_line_and_changes_nothing(tmp_path: Path) -> None:
    def work() -> str:
        if not _own_disk(tmp_path, 128):
            return "no disk"
        store_of(tmp_path / "store", A, B)
        old, new = contents([A, B]), contents([A, B, C])
        ballast = tmp_path / "ballast"
        answers = []
        for free in range(12):  # pages of 4 KiB left
            with suppress(OSError), open(ballast, "wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
            os.truncate(ballast, ballast.stat().st_size - 4096 * free)
            try:
                Store.open(tmp_path / "store").commit(add=[C])
                answers.append("made")
                assert version(tmp_path / "store") == new
                Store.open(tmp_path / "store").commit(remove=["c"])
            except WorkError as error:
                answers.append(str(error).removeprefix(f"{tmp_path / 'store'}: "))
                assert version(tmp_path / "store") == old
            ballast.unlink()
        Store.open(tmp_path / "store").commit(add=[D])
        assert Store.open(tmp_path / "store").leftovers() == []
        return "|".join(dict.fromkeys(answers))

    code, answer = finish(start(work))
    if answer == "done: no disk":
        pytest.skip("the kernel lends no disk of one's own")
    assert (code, answer) == (0, "done: cannot be written: the disk is full; the store is as it was|made")


def test_a_store_that_may_not_be_written_can_be_read_and_a_commit_is_one_line() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        store_of(path, A)
        before = tree(path)
        os.chmod(folder, 0o755)
        for made in (path, path / "tasks", path / "tasks" / "a"):
            made.chmod(0o555)

        def work() -> str:
            become_nobody()
            assert version(path) == contents([A])
            refused = []
            for store in (Store.open(path), Store(path / "new", ABOUT, {})):
                with pytest.raises(WorkError, match="cannot be written: Permission denied") as caught:
                    store.commit(add=[B])
                refused.append(str(caught.value).count("\n"))
            return str(refused)

        assert finish(start(work)) == (0, "done: [0, 0]")
        assert tree(path) == before
        for made in (path, path / "tasks", path / "tasks" / "a"):
            made.chmod(0o755)


@pytest.mark.parametrize("closed", ["store", "store/manifest.json", "store/tasks", "."])
def test_a_store_that_may_not_be_read_is_one_line_that_names_it(closed: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "open" / "store"
        store_of(path, A)
        os.chmod(folder, 0o755)
        (path.parent / closed).chmod(0)

        def work() -> None:
            become_nobody()
            Store.open(path).load()

        code, answer = finish(start(work))
        (path.parent / closed).chmod(0o755)
        assert (code, answer.count("\n")) == (0, 0), answer
        assert answer.startswith(f"WorkError: {path}"), answer
