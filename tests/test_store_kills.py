"""A store whose writer is killed, runs out of space or lacks permission has either the old or the new content."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from stores import (
    ABOUT,
    A,
    B,
    C,
    D,
    announce,
    become_nobody,
    before_call,
    contents,
    die,
    fail,
    finish,
    start,
    store_of,
    tree,
    version,
    writer,
)

from slm_fast.errors import InputError, WorkError
from slm_fast.store import Store
from slm_fast.tasks import LearnedTask

# Killed, out of space, or without permission

COMMITS: dict[str, tuple[tuple[LearnedTask, ...], Callable[[Store], None], tuple[LearnedTask, ...]]] = {
    "first": ((), lambda store: store.commit(add=[A]), (A,)),
    "first merge": ((), lambda store: store.merge([Store.open(store.path.parent / "other")]), (B, C)),
    "add": ((A, B), lambda store: store.commit(add=[C]), (A, B, C)),
    "remove": ((A, B), lambda store: store.commit(remove=["b"]), (A,)),
    "add and remove": ((A, B), lambda store: store.commit(add=[C], remove=["a"]), (B, C)),
    "merge": ((A,), lambda store: store.merge([Store.open(store.path.parent / "other")]), (A, B, C)),
}


@pytest.fixture
def memory() -> Iterator[Path]:
    """A temporary folder, in memory if possible: these tests depend on the order of calls, not on the disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


class Stage:
    """A store before and after a commit, and the files expected after one more commit."""

    def __init__(self, folder: Path, commit: str) -> None:
        before, self.act, after = COMMITS[commit]
        self.begin, self.path = folder / "begin", folder / "store"
        store_of(folder / "other", B, C)
        store_of(self.begin, *before)
        self.old, self.new = contents(before), contents(after)
        self.following = [
            tree(store_of(folder / name, *tasks, D).path) for name, tasks in (("old", before), ("new", after))
        ]
        self.act(self.reset())  # trigger lazy imports here, before processes are forked

    def reset(self) -> Store:
        shutil.rmtree(self.path, ignore_errors=True)
        if self.begin.exists():
            shutil.copytree(self.begin, self.path)
        return writer(self.path)

    def run(self, n: int, act: Callable[[], object]) -> tuple[int, str]:
        """Run the commit in a subprocess that calls `act` before its n-th file-system call: (exit status, output)."""

        def work() -> int:
            calls = before_call(n, act)
            self.act(writer(self.path))
            return calls()

        self.reset()
        return finish(start(work))

    def calls(self) -> range:
        """Numbers of the commit's file-system calls, from 1."""
        code, answer = self.run(0, die)
        assert (code, answer[:6]) == (0, "done: ")
        return range(1, int(answer[6:]) + 1)

    def outcome(self) -> bool:
        """Whether the store is the new one. Checks that it is the old or new one and that the next commit cleans up."""
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
    assert outcomes == sorted(outcomes)  # once a kill leaves the new content, all later ones do
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
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel kills the process if a file would exceed `size`
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
            elif event == "os.rename" and not str(args[1]).endswith(".reserve"):
                log.append((str(args[0]), str(args[1])))

        announce(hook)
        stage.act(stage.reset())
        moves = [(i, source, target) for i, (source, target) in enumerate(log) if source != "flush"]
        *files, (last, source, target) = moves
        assert (log[last - 1], log[last + 1]) == (("flush", source), ("flush", str(Path(target).parent))), log
        for i, source, target in files:
            assert ("flush", source) in log[:i], log
            for folder in Path(target).parents[:3]:
                assert ("flush", str(folder)) in log[i:last], log
        return " ".join(Path(target).suffix for _, _, target in moves)

    files = len(set(stage.new) - set(stage.old))
    assert finish(start(work)) == (0, "done: " + " ".join([".safetensors"] * files + [".json"]))


def test_a_first_commit_that_was_killed_twice_is_no_store_without_its_manifest(tmp_path: Path) -> None:
    path = tmp_path / "store"
    for task in (A, B):

        def work(task: LearnedTask = task) -> None:
            before_call(2, die, only="os.rename")  # of the manifest; the task's file has been renamed
            writer(path).commit(add=[task])

        assert finish(start(work))[0] == -signal.SIGKILL
    assert {file.parent.name for file in path.glob("tasks/*/*.safetensors")} == {"a", "b"}
    shutil.copytree(store_of(tmp_path / "other", D).path / "tasks", path / "tasks", dirs_exist_ok=True)
    before = tree(path)
    with pytest.raises(InputError, match="has task files but no manifest"):
        writer(path)
    assert tree(path) == before
    shutil.rmtree(path / "tasks" / "d")
    writer(path).commit(add=[C])
    assert version(path) == contents([C])
    assert tree(path) == tree(store_of(tmp_path / "same", C).path)
    (path / "manifest.json").unlink()  # the lock file no longer lists files
    with pytest.raises(InputError, match="has task files but no manifest"):
        writer(path)


def test_what_a_killed_commit_leaves_is_no_damage_and_the_next_commit_clears_it(tmp_path: Path) -> None:
    def work() -> None:
        before_call(2, die, only="os.rename")  # of the manifest; the task's file has been renamed
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


def test_what_a_power_cut_leaves_is_cleared_by_the_next_commit(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", A)
    lock, flushed = store.path / ".lock", tmp_path / "flushed"
    shutil.copy(lock, flushed)

    def work() -> None:
        def hook(event: str, args: tuple) -> None:
            if event == "os.fsync" and os.readlink(f"/proc/self/fd/{args[0]}") == str(lock):
                flushed.write_bytes(lock.read_bytes())
            elif event == "os.rename" and str(args[0]).endswith("manifest.json.part"):
                die()

        announce(hook)
        store.commit(add=[B])

    assert finish(start(work))[0] == -signal.SIGKILL
    assert [path.name for path in (store.path / "tasks").iterdir() if path.name != "a"] == ["b"]
    shutil.copy(flushed, lock)  # what was written and not flushed is lost
    store.commit(add=[C])
    assert store.leftovers() == []


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
    """Mount a small tmpfs at `path`, visible to this process only. False if the kernel does not permit that."""
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
        for free in range(12):  # number of free 4 KiB pages
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
