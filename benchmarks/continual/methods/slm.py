"""slm_fast itself, behind the interface of its rivals: with its defaults, and as in the paper.

`slm-paper` follows "Scalable Language Model with Generalized Continual Learning" (ICLR 2024) and its released code:
queries from a frozen sentence encoder, DTKR with six groups and four slots per task, the attention output of every
layer adapted with rank 12, and routes over the slots of all tasks during training. It differs in three ways. The
sentence encoder is MiniLM instead of nli-mpnet-base-v2. Epochs, batches, optimiser and learning rates of the values are
those of all methods here; the paper trains BERT for five epochs in batches of eight at 2e-4 to 3e-4. And the heads of
the retrieved tasks answer, mixed by weight; the released code selects the head by the number of classes of the row's
own task, which gives the task away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.continual.methods.common import BATCH
from benchmarks.continual.methods.method import Answer, Setup, State
from slm_fast import InputError, ScalableLM, Task
from slm_fast.data import Row
from slm_fast.dtkr import DtkrRouter
from slm_fast.options import PredictOptions
from slm_fast.router import Router
from slm_fast.task_file import task_from_bytes, task_to_bytes

PAPER_CONFIG: Mapping[str, Any] = {
    **{"query": "sentence", "encoder": "minilm", "router": "dtkr", "groups": 6, "k": 4},
    **{"targets": ("out",), "first_layer": 0},
}
MASK = DtkrRouter.mask_prob
PAPER_OPTIONS: Mapping[str, Any] = {"rank": 12, "slots": 4, "joint": True}


class Slm:
    """A `Method`.

    Args:
        told: each row's task is given (SLM-TI).
        mask: probability with which DTKR hides a slot while keys are trained, the paper's random keys mask.
        config: fields of ModelConfig.
    """

    def __init__(self, setup: Setup, *, told: bool = False, mask: float = MASK, **config: Any) -> None:
        self.slm = ScalableLM.from_backbone(setup.backbone, max_length=setup.max_length, **config)
        self.setup, self.told = setup, told
        if mask != MASK:
            self._set_mask(mask)

    def _set_mask(self, mask: float) -> None:
        """Train keys with another mask than the paper's, which slm_fast has no option for."""
        model = self.slm.model
        if model.config.router != "dtkr":
            raise InputError(f"mask: goes with router='dtkr', got {model.config.router!r} and mask {mask}")
        if not 0 <= mask <= 1:
            raise InputError(f"mask: expected a number from 0 to 1, got {mask}")
        new_router = model.new_router

        def masked(*tasks: Any) -> Router:
            router = new_router(*tasks)
            assert isinstance(router, DtkrRouter)
            router.mask_prob = mask
            return router

        setattr(model, "new_router", masked)  # noqa: B010

    def learn(self, task: Task, progress: bool | None = None) -> None:
        self.slm.learn(task, options=self.setup.options, progress=progress)

    def answers(self, rows: Sequence[Row], tasks: Sequence[str] | None = None) -> list[Answer]:
        if not self.slm.tasks:  # `repro --unseen` also asks the untrained model
            return [Answer("")] * len(rows)
        writes = self.slm.model.backbone.kind != "encoder"
        options = PredictOptions(max_new_tokens=self.setup.max_new_tokens) if writes else PredictOptions(top_k=None)
        told = list(tasks) if self.told and tasks is not None else None
        found = self.slm.predict(rows, options, task=told, progress=False)
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
