"""Tasks learned side by side: a task a worker, each worker a process of its own, and this one commits.

What a task is learned to does not depend on other tasks, so what N workers learn is what one process would. A worker
that ends before its task is learned (killed, out of memory) loses only that; the task is tried again.
"""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, cast

import torch

from slm_fast import __version__
from slm_fast.data import Task
from slm_fast.errors import InputError, SlmError, WorkError, warn
from slm_fast.loading import dtype_word
from slm_fast.options import LearnOptions
from slm_fast.origin import origin
from slm_fast.schema import check_same
from slm_fast.slm import ScalableLM
from slm_fast.task_file import task_from_bytes
from slm_fast.tasks import LearnedTask
from slm_fast.worker import Message, receive, send, task_message

TRIES = 3  # of a task whose worker ends before it is learned, and of a worker that ends before it has a model
WORKER = (sys.executable, "-m", "slm_fast.worker")


class Job(NamedTuple):
    """A task to learn, and how."""

    task: Task
    options: LearnOptions
    valid: Task | None = None
    patience: int | None = None

    @property
    def validation(self) -> dict[str, Any]:
        """Its validation, as keywords of whatever learns it."""
        return {"valid": self.valid, "patience": self.patience}


class Ended(Exception):
    """A worker is no more; the message says how it ended."""


class Worker(ABC):
    """What learns tasks elsewhere. It is started at once and opens its model meanwhile.

    Args:
        opening: how it opens its model. start: the file of the task that others begin at, or nothing.
    """

    def __init__(self, opening: Message, start: bytes) -> None:
        self.about: Message | None = None  # of its model, once that is open
        self._opening = opening, start

    def open(self, told: Callable[[str], None]) -> None:
        if self.about is None:
            answer, _ = self.ask(*self._opening, told)
            if answer["version"] != __version__:
                raise WorkError(f"worker: is slm_fast {answer['version']}, this is {__version__}")
            self.about = answer["ready"]

    @abstractmethod
    def ask(self, message: Mapping[str, Any], data: bytes, told: Callable[[str], None]) -> tuple[Message, bytes]:
        """The answer to a request; warnings on the way are `told`. Raises Ended, or the SlmError it answers with."""

    @abstractmethod
    def kill(self) -> None:
        """End it, whatever it does."""

    @abstractmethod
    def close(self) -> None:
        """Wait until it has ended."""


class ProcessWorker(Worker):
    """A process of this machine."""

    def __init__(self, opening: Message, start: bytes) -> None:
        super().__init__(opening, start)
        # In a session of its own, so that Ctrl-C reaches the parent alone, which ends it.
        self.process = subprocess.Popen(WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)

    def ask(self, message: Mapping[str, Any], data: bytes, told: Callable[[str], None]) -> tuple[Message, bytes]:
        try:
            send(cast("IO[bytes]", self.process.stdin), message, data)
            while True:
                answer, found = receive(cast("IO[bytes]", self.process.stdout))
                if "warning" not in answer:
                    break
                told(answer["warning"])
        except (OSError, EOFError, ValueError):
            self.kill()
            code = self.process.wait()
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            raise Ended(how) from None
        if "error" in answer:
            raise (InputError if answer["status"] == InputError.status else WorkError)(answer["error"])
        return answer, found

    def kill(self) -> None:
        self.process.kill()

    def close(self) -> None:
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with suppress(OSError):  # what was not written yet is lost
                cast("IO[bytes]", stream).close()


class Workers:
    """So many workers, which start at once and open their models while the caller opens its own.

    Args:
        count: of workers. backbone, config, dtype, device: of the model, as for `ScalableLM.from_backbone`.
        threads: of the processor, shared out among them; None: as many as torch takes.
        start: the file of a task that others begin at (`warm_start`).
        make: starts a worker.
    """

    def __init__(
        self,
        count: int,
        backbone: str,
        config: Mapping[str, Any],
        *,
        dtype: str | torch.dtype = "float32",
        device: str = "auto",
        threads: int | None = None,
        start: bytes = b"",
        make: Callable[[Message, bytes], Worker] = ProcessWorker,
    ) -> None:
        self._make = make
        self._opening: Message = {"backbone": backbone, "config": dict(config), "dtype": dtype_word(dtype)}
        self._opening |= {"device": device, "threads": threads, "jobs": count}
        self._start = start
        self._about: Mapping[str, Any] = {}  # of the model that commits
        self._lock, self._closed = threading.Lock(), False
        self._workers: list[Worker | None] = [None] * count
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._said: queue.SimpleQueue[tuple[Job | None, bytes | str | SlmError]] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all workers, whatever they do."""
        with self._lock:
            self._closed = True
            for worker in filter(None, self._workers):
                worker.kill()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        for worker in filter(None, self._workers):
            worker.close()

    def learn(self, slm: ScalableLM, jobs: Sequence[Job]) -> Iterator[tuple[Job, LearnedTask | SlmError]]:
        """Each job with what it came to, as they are done: what was learned, for `slm.add`, or why it was not.

        Raises WorkError where no worker gets as far as its model, or theirs is not this one.
        """
        self._about = slm.model.about
        # The longest first, so that no worker is left alone with one at the end.
        for each in sorted(jobs, key=lambda job: -sum(len(row.text) for row in job.task.rows)):
            self._jobs.put(each)
        left = len(jobs)
        while left:
            job, said = self._said.get()
            if isinstance(said, str):
                warn(said)
            elif job is None:
                raise cast("SlmError", said)
            else:
                left -= 1
                yield job, said if isinstance(said, SlmError) else _checked(slm, job, said)

    def _run(self, place: int) -> None:
        try:
            self._open(place)
            while (job := self._jobs.get()) is not None:
                self._said.put((job, self._learn(place, job)))
        except Ended:  # while all are ended
            pass
        except SlmError as error:
            self._said.put((None, error))

    def _open(self, place: int) -> Worker:
        """The worker of a place, with a model. Raises SlmError where that cannot be had, Ended if all are to end."""
        for _ in range(TRIES):
            worker = self._workers[place]
            if worker is None:
                with self._lock:
                    if self._closed:
                        raise Ended
                    self._workers[place] = worker = self._make(self._opening, self._start)
            try:
                worker.open(self._tell)
                return worker
            except Ended as end:
                how = self._gone(place, end)
        raise WorkError(f"worker: {how} before it had its model, {TRIES} times")

    def _learn(self, place: int, job: Job) -> bytes | SlmError:
        valid = None if job.valid is None else task_message(job.valid)
        request: Message = {"task": task_message(job.task), "options": asdict(job.options), "valid": valid}
        request["patience"] = job.patience
        for attempt in range(1, TRIES + 1):
            worker = self._open(place)
            check_same(worker.about or {}, self._about, "worker", "this model")
            try:
                return worker.ask(request, b"", self._tell)[1]
            except Ended as end:
                how = self._gone(place, end)
            except SlmError as error:
                return error
            if attempt < TRIES:
                self._tell(f"task {job.task.name!r}: its worker {how}; it is learned again")
        return WorkError(f"task {job.task.name!r}: not learned: its worker {how}, {TRIES} times; try fewer --jobs")

    def _gone(self, place: int, end: Ended) -> str:
        self._workers[place] = None
        if self._closed:
            raise end
        return str(end)

    def _tell(self, message: str) -> None:
        self._said.put((None, message))


def _checked(slm: ScalableLM, job: Job, data: bytes) -> LearnedTask | SlmError:
    """What a worker has learned, if it is what it was asked for."""
    try:
        learned = task_from_bytes(data, Path(f"task {job.task.name!r} from a worker"))
        if learned.name != job.task.name or learned.origin != origin(slm.model, job.task, learned.options, job.valid):
            raise WorkError(f"task {job.task.name!r}: its worker learned it from other rows, options or backbone")
    except SlmError as error:
        return error
    return learned
