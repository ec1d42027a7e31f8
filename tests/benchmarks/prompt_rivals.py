"""Shared helpers for tests of prompt-based rivals: tiny backbones, tasks for them, and state comparison."""

from __future__ import annotations

import io

import pytest
import torch
from models import BACKBONES, easy, make_model, make_tokenizer, toy_task

from benchmarks.continual.methods.method import Setup
from slm_fast.backbone import Backbone
from slm_fast.data import Row, Task
from slm_fast.options import LearnOptions

LABELS = ("no", "yes")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Make `Backbone.load` return tiny random models, named by type. Active in each test module that imports it."""
    monkeypatch.setattr(Backbone, "load", lambda name: Backbone(make_model(name), make_tokenizer(name), name))


def setup_of(name: str, **options) -> Setup:
    return Setup(name, LABELS, 32, LearnOptions(**({"epochs": 2, "batch_size": 8} | options)), max_new_tokens=4)


def task_of(backbone: str, topic: str, rows: int = 12) -> Task:
    """A task with labels for encoders, or with free-text outputs for backbones that generate."""
    task = easy(topic, rows)
    if BACKBONES[backbone][0] == "encoder":
        return task
    return Task(topic, [{"instruction": row.text, "output": row.target} for row in task.rows])


def ragged(each: int = 3) -> list[Row]:
    """Rows of varied length, `each` per topic."""
    return [row for topic in ("sea", "farm") for row in toy_task(topic, rows=each).rows]


def saved_and_loaded(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same(one, other) -> None:
    """Assert that two nested states are equal, with equal tensors."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def assert_resumes(make, tasks) -> None:
    """Assert that a run resumed from its state after the first task ends exactly like an uninterrupted one."""
    whole, resumed = make(), make()
    whole.learn(tasks[0], False)
    state = saved_and_loaded(whole.state())
    resumed.restore(state)
    for seed, learner in enumerate((whole, resumed)):
        torch.manual_seed(seed)  # results must not depend on the global generator
        for task in tasks[1:]:
            learner.learn(task, False)
    rows, told = [row for task in tasks for row in task.rows], [task.name for task in tasks for _ in task.rows]
    assert whole.answers(rows, told) == resumed.answers(rows, told)
    assert_same(whole.state(), resumed.state())
    assert (whole.kept, whole.parameters) == (resumed.kept, resumed.parameters)
