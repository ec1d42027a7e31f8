"""Tests of Finetune, Separate and the shared Writer: which weights they train, losses and batched answers."""

from __future__ import annotations

import pytest
import torch
from models import GENERATORS, make_model, make_tokenizer, toy_task

from benchmarks.continual.methods.common import Writer
from benchmarks.continual.methods.finetune import Finetune
from benchmarks.continual.methods.method import Setup
from benchmarks.continual.methods.separate import Separate
from slm_fast import demo
from slm_fast.backbone import Backbone
from slm_fast.data import Task
from slm_fast.options import LearnOptions

OPTIONS = LearnOptions(epochs=4, batch_size=8)


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    train = demo.load("train")
    return {name: Task(name, train[name].rows[:24]) for name in ("news_desk", "recipe_steps")}


@pytest.fixture(scope="module")
def setup(tasks) -> Setup:
    return Setup(
        "minilm", tuple(sorted({label for task in tasks.values() for label in task.labels or []})), 32, OPTIONS
    )


def accuracy(method, task, *, told: bool = False) -> float:
    answers = method.answers(task.rows, [task.name] * len(task.rows) if told else None)
    return sum(answer.text == row.target for answer, row in zip(answers, task.rows, strict=True)) / len(task.rows)


def test_finetune_answers_the_last_task_with_one_head_over_all_words_and_trains_every_weight(tasks, setup):
    method = Finetune(setup)
    assert method.model.labels == list(setup.labels)
    before = {name: p.detach().clone() for name, p in method.model.named_parameters()}
    for task in tasks.values():
        method.learn(task)
    changed = [name for name, p in method.model.named_parameters() if not torch.equal(p, before[name])]
    assert len(changed) == len(before)
    assert accuracy(method, tasks["recipe_steps"]) > 0.4  # chance is 1 in 8


def test_separate_trains_a_lora_model_a_task_and_nothing_of_the_backbone(tasks, setup):
    method = Separate(setup)
    for task in tasks.values():
        method.learn(task)
    first, second = (method.models[name] for name in tasks)
    assert first.network is not second.network
    trained = {name for name, p in first.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("head.") for name in trained)
    assert sum("lora_A" in name for name in trained) == 15  # five matrices in each of three layers
    assert min(accuracy(method, task, told=True) for task in tasks.values()) > 0.5  # chance is 0.25
    assert {answer.task for answer in method.answers(tasks["news_desk"].rows, ["news_desk"] * 24)} == {"news_desk"}


@pytest.mark.parametrize("name", GENERATORS)
def test_a_writers_loss_is_transformers_own_and_a_batch_is_answered_as_each_row_alone(name):
    backbone = Backbone(make_model(name), make_tokenizer(name), name)
    writer, text = Writer(backbone, 64, 4), backbone.tokenization
    rows = [row for seed in (0, 1) for row in toy_task("sea", rows=3, seed=seed, instruction="the question :").rows]
    losses = writer.losses(rows)
    for row, loss in zip(rows, losses, strict=True):
        (prompt,), _ = text.tokenize([row.prompt], 64)
        (answer,) = text.encode_answers([row.target], 64)
        if name == "llama":
            inputs = {"input_ids": [prompt + answer], "labels": [[-100] * len(prompt) + answer]}
        else:
            inputs = {"input_ids": [prompt], "labels": [answer]}
        expected = backbone.model(**{key: torch.tensor(value) for key, value in inputs.items()}).loss
        assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    assert writer.answer(rows) == [writer.answer([row])[0] for row in rows]
