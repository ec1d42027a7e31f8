"""The rivals train what they say they train."""

from __future__ import annotations

import pytest
import torch

from benchmarks.continual.methods.finetune import Finetune
from benchmarks.continual.methods.separate import Separate
from slm_fast import demo
from slm_fast.data import Task
from slm_fast.options import LearnOptions

OPTIONS = LearnOptions(epochs=4, batch_size=8)


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    train = demo.load("train")
    return {name: Task(name, train[name].rows[:40]) for name in ("news_desk", "recipe_steps")}


def test_finetune_answers_the_last_task_with_one_head_over_all_words_and_trains_every_weight(tasks):
    method = Finetune("minilm", tasks, 32, OPTIONS)
    assert method.classifier.labels == sorted({label for task in tasks.values() for label in task.labels or []})
    before = {name: p.detach().clone() for name, p in method.classifier.named_parameters()}
    for task in tasks.values():
        method.learn(task)
    changed = [name for name, p in method.classifier.named_parameters() if not torch.equal(p, before[name])]
    assert len(changed) == len(before)
    assert method.evaluate(tasks).accuracy["recipe_steps"] > 0.4  # chance is 1 in 8


def test_separate_trains_a_lora_model_a_task_and_nothing_of_the_backbone(tasks):
    method = Separate("minilm", 32, OPTIONS)
    for task in tasks.values():
        method.learn(task)
    first, second = (method.models[name] for name in tasks)
    assert first.encoder is not second.encoder
    trained = {name for name, p in first.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("head.") for name in trained)
    assert sum("lora_A" in name for name in trained) == 15  # five matrices in each of three layers
    assert min(method.evaluate(tasks).accuracy.values()) > 0.5  # chance is 0.25
