"""Separate: one LoRA model (PEFT) per task; the task of each row is given at inference.

The upper bound of what values of this size can learn: nothing is shared, nothing is routed, nothing can be forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.continual.methods.common import Model, answers_by_task, make_model
from benchmarks.continual.methods.method import Answer, Setup, State
from benchmarks.peers import adapted_layers
from slm_fast.backbone import Backbone
from slm_fast.data import Row, Task
from slm_fast.tasks import name_seed


class Separate:
    """A `Method`: one PEFT LoRA model per task, on the layers and with the rank that slm_fast uses by default."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.models: dict[str, Model] = {}

    def learn(self, task: Task, progress: bool | None = None) -> None:
        self.models[task.name] = self._new(task.name, task.labels or [])
        self.models[task.name].fit(task.name, task.rows, self.setup.options, progress)

    def _new(self, name: str, labels: Sequence[str]) -> Model:
        import peft  # a slow import

        loaded, options = Backbone.load(self.setup.backbone), self.setup.options
        modules = adapted_layers(loaded)
        seed = name_seed(name, options.seed)
        model = make_model(loaded, self.setup, labels, seed)
        torch.manual_seed(seed)
        lora = peft.LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=modules)
        model.network = peft.get_peft_model(loaded.model, lora)
        return model

    def answers(self, rows: Sequence[Row], tasks: Sequence[str] | None = None) -> list[Answer]:
        return answers_by_task(self.models, rows, tasks)

    def state(self) -> State:
        return {
            name: {
                "labels": getattr(model, "labels", []),
                "trained": {key: p.detach() for key, p in model.named_parameters() if p.requires_grad},
            }
            for name, model in self.models.items()
        }

    def restore(self, state: State) -> None:
        for name, own in state.items():
            self.models[name] = self._new(name, own["labels"])
            self.models[name].load_state_dict(own["trained"], strict=False)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for model in self.models.values() for parameter in model.trained())

    @property
    def kept(self) -> int:
        return sum(parameter.nbytes for model in self.models.values() for parameter in model.trained())
