"""Finetune: one model, all weights trained on task after task, one head over all label words.

The lower bound of continual learning (the paper's first row): what is learned first is forgotten. Other methods that
train one whole model derive from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.continual.methods.common import Model, make_model
from benchmarks.continual.methods.method import Answer, Setup, State
from slm_fast.backbone import Backbone
from slm_fast.data import Row, Task

LEARNING_RATE = 5e-5  # Devlin et al. 2018, for fine-tuning all of BERT


class Finetune:
    """A `Method`."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.options = setup, replace(setup.options, learning_rate=LEARNING_RATE)
        self.model = self.pretrained()

    def pretrained(self) -> Model:
        """The model before it learns anything."""
        loaded = Backbone.load(self.setup.backbone)
        loaded.model.requires_grad_(True)
        return make_model(loaded, self.setup, self.setup.labels, self.setup.options.seed)

    def learn(self, task: Task, progress: bool | None = None) -> None:
        self.model.fit(task.name, task.rows, self.options, progress)

    def answers(self, rows: Sequence[Row], tasks: Sequence[str] | None = None) -> list[Answer]:
        return [Answer(text) for text in self.model.answer(rows)]

    def state(self) -> State:
        return {"model": self.model.state_dict()}

    def restore(self, state: State) -> None:
        self.model.load_state_dict(state["model"])

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.trained())

    @property
    def kept(self) -> int:
        return sum(parameter.nbytes for parameter in self.model.head_parameters())
