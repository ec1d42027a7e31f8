"""Small stores and tasks of random tensors, and forked processes with faults injected at chosen system calls."""

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

from slm_fast import ScalableLM
from slm_fast.covariance import pack
from slm_fast.errors import SlmError
from slm_fast.exact_sum import ExactSum
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


def damage_values(slm: ScalableLM, name: str) -> Path:
    """Overwrite one byte of a task's values in its file in the model's store. Returns the file's path."""
    assert slm.store is not None
    file = slm.store.file(name)
    begin = file.read_bytes().index(next(iter(slm.learned[name].values.values()))[0].numpy().tobytes())
    with file.open("r+b") as opened:
        opened.seek(begin)
        opened.write(b"\xff")
    return file


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
    """A store to which these tasks were committed one after another."""
    store = Store(path, ABOUT, {})
    for task in tasks:
        store.commit(add=[task])
    return store


def writer(path: Path) -> Store:
    return Store.open(path) if Store.exists(path) else Store(path, ABOUT, {})


def summed(*tasks: LearnedTask) -> tuple[dict[str, str], ExactSum]:
    """The `summed` argument of `commit` for these tasks: digests of their files, by name, and their exact sum."""
    files = {task.name: digest_of(task) for task in tasks}
    return files, ExactSum.of(scatter_of(task.router) for task in tasks)


def summed_store(path: Path, *tasks: LearnedTask) -> Store:
    """A store of these tasks with their sum in its .sum file."""
    store = Store(path, ABOUT, {})
    store.commit(add=tasks, summed=summed(*tasks))
    assert SumFile(path / ".sum", ABOUT).tasks() == set(store.files.values())
    return store


def same(one: ExactSum, other: ExactSum) -> bool:
    return torch.equal(one.coarse, other.coarse) and torch.equal(one.fine, other.fine)


def kept(path: Path) -> KeptSum | None:
    return SumFile(path / ".sum", Store.open(path).about).read()


def tree(path: Path) -> dict[str, bytes]:
    """Content of every file by relative path (folders: empty), without the lock, the reserved space and the keys, which
    opening the store creates."""
    found = {str(p.relative_to(path)): p.read_bytes() if p.is_file() else b"" for p in path.rglob("*")}
    return {name: data for name, data in found.items() if name not in (".lock", ".reserve", ".keys")}


def version(path: Path) -> dict[str, bytes]:
    """Name -> content of each task, as a reader finds it, all read in full; empty if there is no store yet."""
    return contents(Store.open(path).load()) if Store.exists(path) else {}


def contents(tasks: Sequence[LearnedTask]) -> dict[str, bytes]:
    return {task.name: task_to_bytes(task) for task in tasks}


def edit_manifest(path: Path, change: Callable[[dict], None]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


# Faults are injected in forked processes: they start in milliseconds, and their crashes do not affect this one.


def start(work: Callable[[], object], seconds: int = 30) -> tuple[int, int]:
    """Run `work` in a forked process; returns its PID and the read end of a pipe for its result or error, as text."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(seconds)  # so that a test fails rather than hangs
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
    """Wait for a process of `start`; returns its exit status (minus the signal number if killed) and its text."""
    pid, reading = child
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), answer


def announce(hook: Callable[[str, tuple], None]) -> None:
    """Call `hook` before every file-system call of this process. Cannot be undone.

    Python raises audit events (sys.audit) for all of them except os.fsync, which is therefore wrapped.
    """
    fsync = os.fsync

    def announced_fsync(descriptor: int) -> None:
        sys.audit("os.fsync", descriptor)
        fsync(descriptor)

    os.fsync = announced_fsync
    sys.addaudithook(hook)


def before_call(n: int, act: Callable[[], object], only: str = "") -> Callable[[], int]:
    """Call `act` just before the n-th file-system call from now on (n-th event named `only`, if given).

    Returns a function that returns the number of calls so far.
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
    """Yield a copy of the store `begin` after a commit in a forked process that calls `act` before its n-th file-system
    call, for n = 1, 2, ... until a commit makes fewer calls."""
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
    """Drop root, who ignores file permissions, in a forked process; no-op for other users."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def fail() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))
