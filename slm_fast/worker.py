"""A process that learns tasks for its parent (`jobs.py`): `python -m slm_fast.worker`.

Requests arrive on standard input, answers go to standard output. A message is a line of JSON; if it has "bytes", that
many bytes follow it. The first request says how to open the model, each later one is a task. An answer is "ready",
"learned", "warning" or "error". The process ends when standard input does: its parent is gone.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from slm_fast.errors import SlmError, SlmWarning, memory_for

if TYPE_CHECKING:
    from slm_fast.data import Task
    from slm_fast.slm import ScalableLM

Message = dict[str, Any]


def send(stream: IO[bytes], message: Mapping[str, Any], data: bytes = b"") -> None:
    """Write a message, followed by bytes."""
    more = {"bytes": len(data)} if data else {}
    stream.write(json.dumps({**message, **more}).encode() + b"\n" + data)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[Message, bytes]:
    """Read a message and the bytes that follow it. Raises EOFError if the stream ends before they do."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    message: Message = json.loads(line)
    size = message.pop("bytes", 0)
    data = stream.read(size) if size else b""
    if len(data) < size:
        raise EOFError
    return message, data


def task_message(task: Task) -> Message:
    """A task as part of a message."""
    rows = [[row.text, row.target, row.instruction, row.turns] for row in task.rows]
    return {"name": task.name, "free_text": task.labels is None, "rows": rows}


def task_of(message: Message) -> Task:
    from slm_fast.data import Row, Task

    rows = [
        Row(text, target, instruction, tuple((speaker, said) for speaker, said in turns))
        for text, target, instruction, turns in message["rows"]
    ]
    return Task(message["name"], rows, free_text=message["free_text"], training=False)


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of libraries must not mix with answers
    requests: queue.SimpleQueue[tuple[Message, bytes]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()

    def tell(message: Warning | str, category: type[Warning], *_: object) -> None:
        if issubclass(category, SlmWarning):
            send(answers, {"warning": str(message)})

    warnings.simplefilter("always", SlmWarning)
    warnings.showwarning = tell  # type: ignore[assignment]
    try:
        _serve(requests, answers)
    except BrokenPipeError:  # the parent is gone
        os._exit(1)


def _serve(requests: queue.SimpleQueue[tuple[Message, bytes]], answers: IO[bytes]) -> None:
    learner = Learner()
    while True:
        request = requests.get()
        try:
            answer = learner.answer(*request)
        except SlmError as error:  # other errors are bugs: their tracebacks go to standard error
            answer = {"error": str(error), "status": error.status}, b""
        send(answers, *answer)


class Learner:
    """A model in memory. The first request opens it; each later one is a task."""

    def __init__(self) -> None:
        self._slm: ScalableLM | None = None

    def answer(self, request: Message, data: bytes) -> tuple[Message, bytes]:
        """Describe the model, or learn a task and return its file. Raises SlmError if that is impossible."""
        from slm_fast import __version__

        with memory_for("worker"):
            if self._slm is None:
                self._slm = _open(request, data)
                return {"ready": self._slm.model.about, "version": __version__}, b""
            return {"learned": request["task"]["name"]}, _learn(self._slm, request)


def _read(requests: queue.SimpleQueue[tuple[Message, bytes]]) -> None:
    try:
        with os.fdopen(os.dup(0), "rb") as stream:
            while True:
                requests.put(receive(stream))
    except BaseException:
        os._exit(1)


def _open(request: Message, start: bytes) -> ScalableLM:
    """Create the model, in memory only. start: file of a task that others start from."""
    import torch

    from slm_fast.options import ModelConfig
    from slm_fast.slm import ScalableLM
    from slm_fast.task_file import task_from_bytes

    torch.set_num_threads(max(1, (request["threads"] or torch.get_num_threads()) // request["jobs"]))
    slm = ScalableLM.from_backbone(
        request["backbone"], ModelConfig(**request["config"]), dtype=request["dtype"], device=request["device"]
    )
    if start:
        slm.add(task_from_bytes(start, Path("warm_start")))
    return slm


def _learn(slm: ScalableLM, request: Message) -> bytes:
    """Learn a task and return its file."""
    from slm_fast.learn import learn_task
    from slm_fast.options import LearnOptions
    from slm_fast.task_file import task_to_bytes

    task, valid = task_of(request["task"]), request["valid"] and task_of(request["valid"])
    options, patience = LearnOptions(**request["options"]), request["patience"]
    return task_to_bytes(learn_task(slm.model, task, options, valid=valid, patience=patience, progress=False))


if __name__ == "__main__":
    main()
