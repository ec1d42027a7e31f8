"""Separate: for each task a LoRA model of its own (PEFT), told at inference which task a row belongs to.

The upper bound of what values of this size can learn: nothing is shared, nothing is routed, nothing can be forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping

import peft
import torch

from benchmarks.continual.methods.common import Classifier
from benchmarks.peers import adapted_layers
from slm_fast.backbone import Backbone
from slm_fast.data import Task
from slm_fast.evaluate import Evaluation
from slm_fast.options import LearnOptions
from slm_fast.tasks import name_seed


class Separate:
    """One PEFT LoRA model a task, on the layers and with the rank that slm_fast uses by default."""

    def __init__(self, backbone: str, max_length: int, options: LearnOptions) -> None:
        self.backbone, self.max_length, self.options = backbone, max_length, options
        self.models: dict[str, Classifier] = {}

    def learn(self, task: Task, progress: bool | None = None) -> None:
        loaded = Backbone.load(self.backbone)
        modules = adapted_layers(loaded)
        seed = name_seed(task.name, self.options.seed)
        classifier = Classifier(loaded, task.labels or [], self.max_length, seed)
        torch.manual_seed(seed)
        lora = peft.LoraConfig(r=self.options.rank, lora_alpha=self.options.rank, target_modules=modules)
        classifier.encoder = peft.get_peft_model(loaded.model, lora)
        classifier.fit(task, self.options, progress)
        self.models[task.name] = classifier

    def evaluate(self, tasks: Mapping[str, Task]) -> Evaluation:
        accuracy = {name: self.models[name].accuracy(task.rows) for name, task in tasks.items()}
        return Evaluation(accuracy, {})
