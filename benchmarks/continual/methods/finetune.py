"""Finetune: one model, all its weights trained on task after task, one head over all label words.

The lower bound of continual learning (the paper's first row): what is learned first is forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from benchmarks.continual.methods.common import Classifier
from slm_fast.backbone import Backbone
from slm_fast.data import Task
from slm_fast.evaluate import Evaluation
from slm_fast.options import LearnOptions

LEARNING_RATE = 5e-5  # of Devlin et al. 2018 for fine-tuning all of BERT


class Finetune:
    """Learns the tasks of a stream one after another and answers without a task-ID."""

    def __init__(self, backbone: str, tasks: Mapping[str, Task], max_length: int, options: LearnOptions) -> None:
        words = sorted({label for task in tasks.values() for label in task.labels or ()})
        loaded = Backbone.load(backbone)
        loaded.model.requires_grad_(True)
        self.classifier = Classifier(loaded, words, max_length, options.seed)
        self.options = replace(options, learning_rate=LEARNING_RATE)

    def learn(self, task: Task, progress: bool | None = None) -> None:
        self.classifier.fit(task, self.options, progress)

    def evaluate(self, tasks: Mapping[str, Task]) -> Evaluation:
        accuracy = {name: self.classifier.accuracy(task.rows) for name, task in tasks.items()}
        return Evaluation(accuracy, {})
