"""Small stores and tasks of random tensors, and processes that break where they are told to."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from slm_fast.covariance import ExactSum, pack
from slm_fast.errors import SlmError
from slm_fast.kept_sum import KeptSum, SumFile
from slm_fast.scatter import scatter_of
from slm_fast.store import Store, task_to_bytes
from slm_fast.task_file import digest_of
from slm_fast.tasks import LearnedTask

CONFIG = {
    "query": "trunk",
    "router": "gaussian",
    "features": 0,
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

    rows = random(9, 4)
    router = {"count": random(slots).abs() + 1, "mean": random(slots, 4), "scatter": pack(rows.T @ rows)}
    return LearnedTask(
        name=name,
        labels=labels,
        values={m: (random(slots, 2, 4), random(slots, 2, 3)) for m in ("layer.1.query", "layer.0.value")},
        router=router | {"distance": random(101).abs().sort().values},
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


def summed(*tasks: LearnedTask) -> tuple[dict[str, str], ExactSum]:
    """What a caller of `commit` has who knows these tasks."""
    files = {task.name: digest_of(task) for task in tasks}
    return files, ExactSum.of(scatter_of(task.router) for task in tasks)


def summed_store(path: Path, *tasks: LearnedTask) -> Store:
    """A store of these tasks that keeps their sum."""
    store = Store(path, ABOUT, {})
    store.commit(add=tasks, summed=summed(*tasks))
    assert SumFile(path / ".sum", ABOUT).tasks() == set(store.files.values())
    return store


def same(one: ExactSum, other: ExactSum) -> bool:
    return torch.equal(one.coarse, other.coarse) and torch.equal(one.fine, other.fine)


def kept(path: Path) -> KeptSum | None:
    return SumFile(path / ".sum", Store.open(path).about).read()


def tree(path: Path) -> dict[str, bytes]:
    """Every file's bytes (a folder's are empty), but for the lock, the room kept in reserve and the keys, which are
    there once somebody has opened the store."""
    found = {str(p.relative_to(path)): p.read_bytes() if p.is_file() else b"" for p in path.rglob("*")}
    return {name: data for name, data in found.items() if name not in (".lock", ".reserve", ".keys")}


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


def start(work: Callable[[], object], seconds: int = 30) -> tuple[int, int]:
    """Run `work` in a forked process: its id and a pipe that will hold what `work` returned or raised."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(seconds)  # a test may fail, but not hang
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


def broken_anywhere(begin: Path, commit: Callable[[Store], object], act: Callable[[], object]) -> Iterator[Path]:
    """A copy of the store `begin` after a commit in a process of its own, with `act` before each of its file-system
    calls in turn."""
    path, n = begin.parent / "store", 0
    while True:
        n += 1
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(begin, path)

        def broken(n: int = n) -> int:
            calls = before_call(n, act)
            commit(Store.open(path))
            return calls()

        code, answer = finish(start(broken))
        if code == 0 and answer.startswith("done: ") and int(answer[6:]) < n:
            return
        assert code in (0, -signal.SIGKILL)
        yield path


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
