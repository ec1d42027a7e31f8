"""Tests of the defining parts of Joint, Replay and EWC, and of resuming rivals from a saved state."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from models import one_thread  # noqa: F401
from rivals import OPTIONS, make_setup, make_tasks, same, watch, weights
from torch import nn

from benchmarks.continual.methods import METHODS
from benchmarks.continual.methods.ewc import Ewc
from benchmarks.continual.methods.finetune import Finetune
from benchmarks.continual.methods.joint import Joint
from benchmarks.continual.methods.memory import Memory, mix, sample
from benchmarks.continual.methods.replay import Replay
from slm_fast.data import Row
from slm_fast.options import LearnOptions

ONCE = LearnOptions(epochs=1, batch_size=8)
SHORT = {"ewc": {"fisher_rows": 8}, "mbpa": {"steps": 3, "every": 4}, "replay": {"share": 0.1}}
RESUMED = [(method, "bert") for method in ("joint", "replay", "ewc", "mbpa", "olora", "idbr")]
RESUMED += [("ewc", "t5"), ("olora", "t5"), ("replay", "llama"), ("mbpa", "llama")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("backbones")


@pytest.mark.parametrize(("method", "name"), RESUMED)
def test_a_run_that_goes_on_from_a_state_ends_as_one_that_was_never_interrupted(method, name, folder):
    setup, (first, second) = make_setup(folder, name, ONCE), make_tasks(name, rows=88)
    whole, begun, resumed = (METHODS[method].make(setup, **SHORT.get(method, {})) for _ in range(3))
    whole.learn(first, progress=False)
    begun.learn(first, progress=False)
    file = io.BytesIO()
    torch.save(begun.state(), file)
    file.seek(0)
    torch.manual_seed(17)  # random draws in between must not matter
    resumed.restore(torch.load(file, weights_only=True))
    assert (resumed.parameters, resumed.kept) == (begun.parameters, begun.kept)
    for each in (whole, resumed):
        each.learn(second, progress=False)
    assert same(weights(whole), weights(resumed))
    rows = [*first.rows[:2], *second.rows[:2]]
    assert whole.answers(rows) == resumed.answers(rows)
    assert not same(weights(whole), weights(begun))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_gradients_in_parts_are_those_of_the_whole_batch(name, folder):
    (task, _), sizes = make_tasks(name, rows=21), []
    whole, parts = (Finetune(make_setup(folder, name, replace(ONCE, accumulate=n))) for n in (1, 3))
    losses = parts.model.losses
    parts.model.losses = lambda rows: sizes.append(len(rows)) or losses(rows)
    before = weights(whole)
    for each in (whole, parts):
        each.learn(task, progress=False)
    assert sorted(sizes) == [1, 2, 2, 2, 2, 3, 3, 3, 3]  # of 8, 8 and 5
    assert not same(weights(whole), before)
    torch.testing.assert_close(weights(whole), weights(parts), rtol=1e-3, atol=1e-5)


def test_joint_is_one_training_on_the_rows_of_all_tasks_so_far(folder):
    setup, tasks = make_setup(folder), make_tasks()
    joint, union = Joint(setup), Finetune(setup)
    for task in tasks:
        joint.learn(task, progress=False)
    union.model.fit(tasks[1].name, [row for task in tasks for row in task.rows], union.options, progress=False)
    assert same(weights(joint), weights(union))


def test_a_share_of_a_tasks_rows_is_kept_and_at_least_one():
    rows = [Row(f"word{i}", "yes") for i in range(250)]
    assert [len(sample("sea", rows[:n], 0.01, 0)) for n in (1, 40, 199, 200, 250)] == [1, 1, 1, 2, 2]
    drawn = sample("sea", rows, 0.1, 0)
    assert set(drawn) <= set(rows)
    assert len(set(drawn)) == 25
    assert drawn == sample("sea", rows, 0.1, 0)
    assert drawn != sample("farm", rows, 0.1, 0)
    assert drawn != sample("sea", rows, 0.1, 1)


def test_memory_numbers_the_rows_of_each_task_and_counts_bytes():
    memory = Memory()
    memory.keep("a", [Row("x", "yes"), Row("é", "no", "say")])
    memory.keep("b", [Row("z", "no")])
    assert [numbers.tolist() for numbers in memory.numbers(5)] == [[5, 6], [7]]
    assert memory.nbytes == 4 + 7 + 3
    again = Memory()
    again.restore(memory.state())
    assert again.tasks == memory.tasks
    assert Memory().numbers(5) == []


def test_mix_adds_a_batch_of_each_earlier_task_to_every_tenth_and_loses_no_row():
    batches = list(torch.arange(84).split(4))  # 21 batches
    kept = [torch.arange(100, 110), torch.arange(200, 202)]
    found, mixed = mix(batches, kept, 4, 10, torch.Generator().manual_seed(0))
    assert sum(mixed) == 2 * 3  # two replays, each of 4 + 4 + 2 rows in batches of 4
    assert [len(batch) for batch, replays in zip(found, mixed, strict=True) if replays] == [4, 4, 2] * 2
    assert [b.tolist() for b, replays in zip(found, mixed, strict=True) if not replays] == [
        batch.tolist() for i, batch in enumerate(batches, 1) if i % 10
    ]
    counts = Counter(torch.cat(found).tolist())
    assert all(counts[i] == 1 for i in range(84))
    assert sum(counts[i] for i in range(100, 110)) == 8
    assert [counts[i] for i in (200, 201)] == [2, 2]
    assert mix(batches, [], 4, 10, torch.Generator())[0] == batches


def test_replay_learns_a_task_from_its_rows_and_those_kept_of_earlier_ones(folder, monkeypatch):
    method, (first, second) = Replay(make_setup(folder), share=0.25, every=3), make_tasks()
    method.learn(first, progress=False)
    kept = {row.text for row in method.memory.rows}
    assert len(kept) == 12
    assert kept < {row.text for row in first.rows}
    seen = watch(method, monkeypatch)
    method.learn(second, progress=False)
    counts = Counter(text for batch in seen for text in batch)
    assert len(seen) == 2 * 6 + 4  # one extra batch after every third of twelve
    assert {counts[row.text] for row in second.rows} == {OPTIONS.epochs}
    assert sum(counts[text] for text in kept) == 4 * 8
    assert counts.keys() == kept | {row.text for row in second.rows}
    assert any(kept & set(batch) and set(batch) - kept for batch in seen)
    assert set(method.memory.tasks) == {"sea", "farm"}


class Logistic(nn.Module):
    """Logistic regression: the logit of the second label is weight * x, where x is the row's text as a float."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([weight]))

    def trained(self):
        return [self.weight]

    def predictions(self, rows):
        x = torch.tensor([float(row.text) for row in rows])
        logits = torch.stack([torch.zeros_like(x), self.weight * x], 1)
        return logits.unsqueeze(1), torch.zeros(len(rows), 1, dtype=torch.int64)


@pytest.mark.parametrize(("weight", "tolerance"), [(0.0, 1e-6), (0.7, 0.1)])
def test_ewcs_fisher_is_that_of_logistic_regression(weight, tolerance, folder):
    method = Ewc(make_setup(folder))
    method.model = Logistic(weight)
    x = torch.linspace(-3, 3, 2001)  # at w = 0 the sampled label does not matter; elsewhere it averages out
    (fisher,) = method.fisher_of([Row(f"{value}") for value in x.tolist()], torch.Generator().manual_seed(0))
    p = torch.sigmoid(weight * x)
    assert float(fisher) == pytest.approx(float((p * (1 - p) * x.square()).mean()), rel=tolerance)


def test_ewcs_penalty_and_its_gradient_vanish_at_the_weights_of_the_task_and_are_quadratic_around():
    method = Ewc.__new__(Ewc)
    method.strength, method.fisher, method.anchor = 6.0, [], []
    method.model = Logistic(0.5)
    method.hold([torch.tensor([2.0])])
    penalty = method.penalty()
    (gradient,) = torch.autograd.grad(penalty, method.model.weight)
    assert penalty.item() == gradient.item() == 0
    method.model.weight.data += 0.1
    penalty = method.penalty()
    (gradient,) = torch.autograd.grad(penalty, method.model.weight)
    assert penalty.item() == pytest.approx(0.5 * 6 * 2 * 0.1**2, rel=1e-5)
    assert float(gradient) == pytest.approx(6 * 2 * 0.1, rel=1e-5)


def test_ewcs_one_quadratic_pulls_as_the_penalties_of_all_tasks_together():
    model = SimpleNamespace(weights=[nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(2))])
    model.trained = lambda: model.weights
    method = Ewc.__new__(Ewc)
    method.strength, method.fisher, method.anchor, method.model = 5.0, [], [], model
    expected = [torch.zeros_like(weight) for weight in model.weights]
    penalties = []
    for _ in range(3):
        fisher = [torch.rand_like(weight) for weight in model.weights]
        fisher[0][0] = 0  # weights that no task needs are not penalised
        penalties.append(([f.clone() for f in fisher], [w.detach().clone() for w in model.weights]))
        method.hold(fisher)
        for weight in model.weights:
            weight.data += torch.randn_like(weight)
    for fisher, anchor in penalties:
        for total, f, w, a in zip(expected, fisher, model.weights, anchor, strict=True):
            total += 5.0 * f * (w.detach() - a)
    for found, wanted in zip(torch.autograd.grad(method.penalty(), model.weights), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["bert", "t5", "llama"])
def test_ewc_holds_the_weights_that_a_task_needs(name, folder):
    setup, (first, second) = make_setup(folder, name), make_tasks(name, rows=24)
    held, free = (Ewc(setup, strength=strength, fisher_rows=16) for strength in (1e6, 0.0))
    moved = []
    for method in (held, free):
        method.learn(first, progress=False)
        fisher, before = [f.clone() for f in method.fisher], [w.detach().clone() for w in method.model.trained()]
        method.learn(second, progress=False)
        parts = zip(fisher, before, method.model.trained(), strict=True)
        moved.append(sum((f * (w - b).square()).sum().item() for f, b, w in parts))
    assert 0 < moved[0] < 0.2 * moved[1]
