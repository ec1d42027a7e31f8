"""Tasks learned by parallel workers equal those of one process, even if workers or their parent are killed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from command import one_line, slm_fast
from models import easy, make_slm, one_thread, tasks_as_files  # noqa: F401
from stores import finish, start, tree
from test_data import write_csv

from slm_fast import LearnOptions, ScalableLM, Task, __version__, jobs
from slm_fast.errors import InputError, WorkError
from slm_fast.jobs import Job, Worker, Workers
from slm_fast.origin import is_same
from slm_fast.store import Store
from slm_fast.task_file import task_to_bytes
from slm_fast.tasks import LearnedTask
from slm_fast.worker import Message, receive, send, task_message, task_of

NAMES = ("farm", "sea", "sky", "city")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, task files of different sizes, and the store `one` that a single process learned from them."""
    folder = tmp_path_factory.mktemp("jobs")
    tasks_as_files(folder, NAMES)
    done = slm_fast(*call(folder, "one"))
    assert done.returncode == 0, done.stderr
    return folder


def call(folder: Path, store: str, *more: object, names: tuple[str, ...] = NAMES) -> list[str]:
    files = [f"--task={name}={folder / f'{name}.csv'}" for name in names]
    valid = [f"--valid=sea={folder / 'sea.csv'}", "--patience=1"] if "sea" in names else []
    options = ["--backbone", folder / "bert", "--epochs", 2, "--threads", 1]
    return list(map(str, ["learn", folder / store, *options, *files, *valid, *more]))


def workers_of(parent: int) -> list[int]:
    """PIDs of the workers among a process's children, whichever of its threads started them."""
    found: list[int] = []
    for thread in Path(f"/proc/{parent}/task").glob("*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            for pid in map(int, (thread / "children").read_text().split()):
                with suppress(FileNotFoundError, ProcessLookupError):
                    if b"slm_fast.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        found.append(pid)
    return found


def is_there(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_for(what: str, holds, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, what
        time.sleep(0.02)


def quick_worker(folder: Path, monkeypatch: pytest.MonkeyPatch, *, dies: str = "", sticks: str = "") -> None:
    """Replace workers by stubs that are ready at once and send the task files of the store `one`. Task `dies` kills its
    worker; task `sticks` never finishes."""
    slm = ScalableLM.from_pretrained(folder / "one")
    ready = json.dumps({"ready": slm.model.about, "version": __version__})
    code = f"""
import os, json, pathlib, sys, time
from slm_fast.worker import receive, send
source, sink = os.fdopen(0, "rb"), os.fdopen(1, "wb")
receive(source)
send(sink, json.loads({ready!r}))
while True:
    name = receive(source)[0]["task"]["name"]
    if name == {dies!r}:
        os.kill(os.getpid(), 9)
    time.sleep(1000 * (name == {sticks!r}))
    send(sink, {{"learned": name}}, next((pathlib.Path({str(folder)!r}) / "one/tasks" / name).iterdir()).read_bytes())
"""
    monkeypatch.setattr(jobs, "WORKER", (sys.executable, "-c", code))


def test_a_task_whose_worker_always_dies_is_named_and_the_others_land(folder: Path, monkeypatch) -> None:
    quick_worker(folder, monkeypatch, dies="sky")
    done = slm_fast(*call(folder, "dies", "--jobs", 2))
    assert done.returncode == 1
    again = "slm-fast: warning: task 'sky': its worker was killed by SIGKILL; it is learned again"
    last = "slm-fast: error: task 'sky': not learned: its worker was killed by SIGKILL, 3 times; try fewer --jobs"
    assert [line for line in done.stderr.splitlines() if "sky" in line] == [again, again, last]
    one = Store.open(folder / "one").files
    assert Store.open(folder / "dies").files == {name: one[name] for name in NAMES if name != "sky"}


def test_a_task_that_was_learned_from_other_rows_is_not_committed(folder: Path, monkeypatch) -> None:
    quick_worker(folder, monkeypatch)
    shutil.copy(folder / "farm.csv", folder / "kept.csv")
    write_csv(folder / "farm.csv", ("sea1", "yes"), ("farm2", "no"))
    try:
        done = slm_fast(*call(folder, "other", "--jobs", 2))
    finally:
        shutil.move(folder / "kept.csv", folder / "farm.csv")
    assert done.returncode == 1
    assert "task 'farm': its worker learned it from other rows, options or backbone" in done.stderr
    assert sorted(Store.open(folder / "other").files) == sorted({*NAMES} - {"farm"})


def test_a_task_whose_router_counts_no_rows_is_the_one_requested() -> None:
    slm, task = make_slm("bert", router="dtkr", groups=4), easy("sea")
    options = LearnOptions(epochs=1, slots=2)
    slm.learn(task, options=options, progress=False)
    learned = slm.learned["sea"]
    assert learned.options["rows"] == len(task.rows)
    assert is_same(learned, slm.model, task, options, None)
    assert isinstance(jobs._checked(slm, Job(task, options), task_to_bytes(learned)), LearnedTask)


def test_ctrl_c_ends_all_workers_and_keeps_what_was_committed(interruptible, folder: Path, monkeypatch) -> None:
    quick_worker(folder, monkeypatch, sticks="city")
    store = folder / "stopped"

    def interrupt() -> None:
        wait_for("tasks", lambda: Store.exists(store) and len(Store.open(store).files) == len(NAMES) - 1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    done = slm_fast(*call(folder, "stopped", "--jobs", 2))
    assert (done.returncode, done.stderr.splitlines()[-1]) == (130, "slm-fast: error: interrupted")
    assert workers_of(os.getpid()) == []
    assert Store.open(store).verify() == []
    assert sorted(Store.open(store).files) == sorted({*NAMES} - {"city"})


def test_workers_whose_parent_is_killed_end_by_themselves(folder: Path) -> None:
    def work() -> None:
        with Workers(2, str(folder / "bert"), {}):
            time.sleep(60)

    pid, answer = start(work, 120)
    wait_for("no workers", lambda: len(workers_of(pid)) == 2)
    workers = workers_of(pid)
    os.kill(pid, signal.SIGKILL)
    finish((pid, answer))
    wait_for("workers stay", lambda: not any(map(is_there, workers)), 60)


def test_two_committers_at_once_share_a_store(folder: Path, monkeypatch) -> None:
    quick_worker(folder, monkeypatch)
    pids = [start(lambda: slm_fast(*call(folder, "shared", "--jobs", 2)).returncode, 120) for _ in range(2)]
    assert [finish(pid) for pid in pids] == [(0, "done: 0")] * 2
    assert tree(folder / "shared") == tree(folder / "one")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": "0.0"}, f"worker: is slm_fast 0.0, this is {__version__}"),
        ({"ready": {"fingerprint": "f00d"}}, "worker: fingerprint is 'f00d', this model has "),
    ],
)
def test_a_worker_of_another_version_or_backbone_is_refused(
    changes: dict, said: str, folder: Path, monkeypatch
) -> None:
    slm = ScalableLM.from_pretrained(folder / "one")
    answer = {"ready": slm.model.about, "version": __version__}
    answer = {**answer, **{name: {**answer[name], **new} if name == "ready" else new for name, new in changes.items()}}
    code = f"import sys; sys.stdin.readline(); print({json.dumps(answer)!r}, flush=True); sys.stdin.read()"
    monkeypatch.setattr(jobs, "WORKER", (sys.executable, "-c", code))
    with Workers(2, str(folder / "bert"), {}) as workers, pytest.raises((InputError, WorkError), match=said):
        list(workers.learn(slm, [Job(easy("new"), LearnOptions())]))


def test_a_worker_that_never_has_its_model_ends_the_call(folder: Path, monkeypatch) -> None:
    slm = ScalableLM.from_pretrained(folder / "one")
    monkeypatch.setattr(jobs, "WORKER", (sys.executable, "-c", "raise SystemExit(3)"))
    with Workers(1, str(folder / "bert"), {}) as workers, pytest.raises(WorkError, match="ended with status 3 before"):
        list(workers.learn(slm, [Job(easy("new"), LearnOptions())]))


class Raises(Worker):
    """A worker with a bug."""

    def ask(self, message: Mapping[str, Any], data: bytes, told: Callable[[str], None]) -> tuple[Message, bytes]:
        raise RuntimeError("a bug\nmore lines")

    def kill(self) -> None:
        pass

    def close(self) -> None:
        pass


def no_memory(opening: Message, start: bytes) -> Worker:
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Raises, "worker: RuntimeError: a bug; please report this"),
        (no_memory, "worker: cannot be started: Resource temporarily unavailable; try fewer --jobs"),
    ],
)
def test_an_error_of_any_kind_in_a_workers_thread_ends_the_call(make: Any, said: str, folder: Path) -> None:
    slm = ScalableLM.from_pretrained(folder / "one")

    def work() -> None:
        with Workers(2, str(folder / "bert"), {}, make=make) as workers:
            list(workers.learn(slm, [Job(easy("new"), LearnOptions())]))

    assert finish(start(work)) == (0, f"WorkError: {said}")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--jobs", 0), "--jobs: expected at least 1, got 0"),
        (("--jobs", 2, "--joint"), "--jobs: does not go with --joint"),
        (("--jobs", 2, "--warm-start"), "--jobs: does not go with --warm-start without a TASK"),
    ],
)
def test_what_jobs_do_not_go_with_is_said_before_anything_starts(folder: Path, more: tuple, said: str) -> None:
    one_line(slm_fast(*call(folder, "bad", *more)), 2, said)
    assert not (folder / "bad").exists()


def test_learning_again_side_by_side_keeps_all(folder: Path) -> None:
    before = tree(folder / "one")
    done = slm_fast(*call(folder, "one", "--jobs", 2))
    assert done.returncode == 0
    assert sorted(line for line in done.stderr.splitlines() if line.startswith("kept")) == sorted(
        f"kept {name} from {12 + 7 * i} rows; tasks in {folder / 'one'}: 4" for i, name in enumerate(NAMES)
    )
    assert tree(folder / "one") == before


@pytest.mark.parametrize(
    "task",
    [
        easy("t", 3),
        Task("odd", [("a\u2028b\n", "1.0"), ("\U0001f600", "né")]),
        Task("free", [{"instruction": "Say.", "input": "", "output": " a b "}, {"input": "x", "output": "y"}]),
    ],
)
def test_a_task_passes_to_a_worker_unchanged(task: Task) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as sink, os.fdopen(reading, "rb") as source:
        send(sink, task_message(task), b"\n{}\n")
        message, data = receive(source)
    found = task_of(message)
    assert (found.name, found.rows, found.labels, data) == (task.name, task.rows, task.labels, b"\n{}\n")
