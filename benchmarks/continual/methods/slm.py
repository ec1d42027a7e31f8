"""slm_fast itself, behind the face its rivals have."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

from slm_fast import ScalableLM, Task
from slm_fast.evaluate import Evaluation
from slm_fast.options import LearnOptions
from slm_fast.task_file import task_to_bytes


class Slm:
    """MiniLM, with these fields of the model's configuration."""

    def __init__(self, options: LearnOptions, **config: Any) -> None:
        self.slm, self.options = ScalableLM.from_backbone("minilm", **config), options

    def learn(self, task: Task, progress: bool | None = None) -> None:
        self.slm.learn(task, progress=progress, epochs=self.options.epochs, seed=self.options.seed)

    def evaluate(self, tasks: Mapping[str, Task]) -> Evaluation:
        return self.slm.evaluate(tasks, progress=False)

    def digest(self, name: str) -> str:
        return hashlib.sha256(task_to_bytes(self.slm.learned[name])).hexdigest()

    def invariance(self, tasks: Mapping[str, Task], rows: int) -> tuple[int, float]:
        """Rows whose slots change, and the largest change of a weight or score, when a mixed batch is answered in
        another order and batch size."""
        texts = [row.text for task in tasks.values() for row in task.rows]
        random.Random(0).shuffle(texts)
        texts = texts[:rows]
        first = self.slm.predict(texts, batch_size=32)
        order = random.Random(1).sample(range(len(texts)), len(texts))
        second = dict(zip(order, self.slm.predict([texts[i] for i in order], batch_size=7), strict=True))
        rerouted = sum(a.route.slots != second[i].route.slots for i, a in enumerate(first))
        change = max(
            abs(x - y)
            for i, a in enumerate(first)
            for x, y in zip((*a.route.weights, a.score), (*second[i].route.weights, second[i].score), strict=True)
        )
        return rerouted, change
