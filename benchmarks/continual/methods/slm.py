"""slm_fast itself, behind the interface of its rivals."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.continual.methods.common import BATCH
from benchmarks.continual.methods.method import Answer, Setup, State
from slm_fast import ScalableLM, Task
from slm_fast.data import Row
from slm_fast.task_file import task_from_bytes, task_to_bytes


class Slm:
    """A `Method`. config: fields of ModelConfig. told: each row's task is given (SLM-TI)."""

    def __init__(self, setup: Setup, *, told: bool = False, **config: Any) -> None:
        self.slm = ScalableLM.from_backbone(setup.backbone, max_length=setup.max_length, **config)
        self.setup, self.told = setup, told

    def learn(self, task: Task, progress: bool | None = None) -> None:
        self.slm.learn(task, options=self.setup.options, progress=progress)

    def answers(self, rows: Sequence[Row], tasks: Sequence[str] | None = None) -> list[Answer]:
        if not self.slm.tasks:  # `repro --unseen` also asks the untrained model
            return [Answer("")] * len(rows)
        found = self.slm.predict(
            rows,
            task=list(tasks) if self.told and tasks is not None else None,
            max_new_tokens=self.setup.max_new_tokens,
            top_k=None,
            progress=False,
        )
        # One task can own more than half of the retrieved slots only if tasks have that many.
        most = max((task.slots for task in self.slm.learned.values()), default=0)
        countable = 2 * most > (self.slm.model.config.k or 0)
        return [
            Answer(
                a.label or a.text or "",
                a.task,
                a.route.tasks if countable else (),
                None if self.told else a.probabilities,
            )
            for a in found
        ]

    def find_routes(self, rows: Sequence[Row]) -> None:
        """Only route rows, to measure its cost; not for a model that is given the tasks."""
        readings = sorted(self.slm.model.tokenize(rows), key=lambda reading: len(reading.ids))
        for start in range(0, len(readings), BATCH):
            self.slm.model.find_routes(self.slm.model.collate(readings[start : start + BATCH]))

    def state(self) -> State:
        files = {name: task_to_bytes(task) for name, task in self.slm.learned.items()}
        return {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in files.items()}

    def restore(self, state: State) -> None:
        self.slm.add([task_from_bytes(data.numpy().tobytes(), Path(name)) for name, data in state.items()])

    def digest(self, name: str) -> str:
        """SHA-256 of the task's file, which shows whether runs in other orders learned the same."""
        return hashlib.sha256(task_to_bytes(self.slm.learned[name])).hexdigest()

    @property
    def parameters(self) -> int:
        tasks = self.slm.learned.values()
        values = sum(a.numel() + b.numel() for task in tasks for a, b in task.values.values())
        return values + sum(part.numel() for task in tasks for part in task.head or ())

    @property
    def kept(self) -> int:
        return sum(len(task_to_bytes(task)) for task in self.slm.learned.values())
