"""Parallel learning of tasks: each worker process learns one task at a time, and this process commits.

What is learned of a task does not depend on other tasks, so N workers learn what one process would. A worker that ends
early (killed, out of memory) loses only its current task, which is tried again.
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
from slm_fast.errors import InputError, SlmError, WorkError, one_line, warn
from slm_fast.loading import dtype_word
from slm_fast.options import LearnOptions
from slm_fast.origin import origin
from slm_fast.schema import check_same
from slm_fast.slm import ScalableLM
from slm_fast.task_file import task_from_bytes
from slm_fast.tasks import LearnedTask
from slm_fast.worker import Message, receive, send, task_message

TRIES = 3  # attempts at a task whose worker ends early, and at starting a worker that ends before it has a model
WORKER = (sys.executable, "-m", "slm_fast.worker")


class Job(NamedTuple):
    """A task to learn, with its options."""

    task: Task
    options: LearnOptions
    valid: Task | None = None
    patience: int | None = None

    @property
    def validation(self) -> dict[str, Any]:
        """The keyword arguments about validation of a function that learns it."""
        return {"valid": self.valid, "patience": self.patience}


class Ended(Exception):
    """A worker has ended; the message says how."""


class Worker(ABC):
    """Learns tasks in another process. It starts at once, and opens its model in the background.

    Args:
        opening: the request that opens its model.
        start: file of the `warm_start` task, or empty.
    """

    def __init__(self, opening: Message, start: bytes) -> None:
        self.about: Message | None = None  # its model's `about`, once open
        self._opening = opening, start

    def open(self, told: Callable[[str], None]) -> None:
        if self.about is None:
            answer, _ = self.ask(*self._opening, told)
            if answer["version"] != __version__:
                raise WorkError(f"worker: is slm_fast {answer['version']}, this is {__version__}")
            self.about = answer["ready"]

    @abstractmethod
    def ask(self, message: Mapping[str, Any], data: bytes, told: Callable[[str], None]) -> tuple[Message, bytes]:
        """Send a request and return the answer. `told` gets each warning. Raises Ended or the worker's SlmError."""

    @abstractmethod
    def kill(self) -> None:
        """End it immediately."""

    @abstractmethod
    def close(self) -> None:
        """Wait until it has ended."""


class ProcessWorker(Worker):
    """A process on this machine."""

    def __init__(self, opening: Message, start: bytes) -> None:
        super().__init__(opening, start)
        # Detached, so that Ctrl-C only reaches the parent, which ends it.
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
            with suppress(OSError):  # unwritten data is lost
                cast("IO[bytes]", stream).close()


class Workers:
    """Several workers. They start at once, and open their models while the caller opens its own.

    Args:
        count: number of workers.
        backbone, config, dtype, device: as for `ScalableLM.from_backbone`.
        threads: CPU threads, divided among the workers. Default: as many as torch uses.
        start: file of the `warm_start` task.
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
        self._about: Mapping[str, Any] = {}  # `about` of the model that commits
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
        """End all workers immediately."""
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
        """Yield each job when it is done, with the learned task, for `slm.add`, or the error.

        Raises WorkError if a worker cannot open its model, and InputError if that differs from this one.
        """
        self._about = slm.model.about
        # Longest first, so that no worker is left alone with a long one at the end.
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
        except Ended:  # all workers are being ended
            pass
        except SlmError as error:
            self._said.put((None, error))
        except BaseException as error:  # a bug, but `learn` must not wait for a thread that has ended
            failed = WorkError(f"worker: {type(error).__name__}: {one_line(error)}; please report this")
            failed.__cause__ = error
            self._said.put((None, failed))

    def _open(self, place: int) -> Worker:
        """Worker number `place`, with its model open. Raises SlmError if that fails, Ended if all are being ended."""
        for _ in range(TRIES):
            worker = self._workers[place]
            if worker is None:
                with self._lock:
                    if self._closed:
                        raise Ended
                    try:
                        self._workers[place] = worker = self._make(self._opening, self._start)
                    except OSError as error:
                        says = f"cannot be started: {error.strerror or one_line(error)}; try fewer --jobs"
                        raise WorkError(f"worker: {says}") from None
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
    """The task that a worker learned, or an error if it is damaged or not the one requested."""
    try:
        learned = task_from_bytes(data, Path(f"task {job.task.name!r} from a worker"))
        if learned.name != job.task.name or learned.origin != origin(slm.model, job.task, learned.options, job.valid):
            raise WorkError(f"task {job.task.name!r}: its worker learned it from other rows, options or backbone")
    except SlmError as error:
        return error
    return learned
