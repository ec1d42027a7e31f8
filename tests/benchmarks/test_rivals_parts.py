"""Tests of the defining parts of MbPA++, O-LoRA and IDBR."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from models import one_thread  # noqa: F401
from rivals import make_setup, make_tasks, same, watch, weights

from benchmarks.continual.methods import METHODS
from benchmarks.continual.methods.common import Classifier
from benchmarks.continual.methods.finetune import Finetune
from benchmarks.continual.methods.idbr import Idbr, central, distance
from benchmarks.continual.methods.mbpa import Mbpa
from benchmarks.continual.methods.olora import OLora
from slm_fast.options import LearnOptions

KINDS = ("bert", "t5", "llama")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("backbones")


def taught(method, tasks):
    for task in tasks:
        method.learn(task, progress=False)
    return method


def test_mbpa_has_the_papers_constants():
    method = METHODS["mbpa"].make
    defaults = method.__init__.__kwdefaults__
    assert (defaults["neighbours"], defaults["steps"], defaults["pull"]) == (32, 30, 1e-3)
    assert defaults["rate"] in (1e-3, 5e-3)


@pytest.mark.parametrize("name", KINDS)
def test_mbpas_neighbours_are_the_nearest_of_all_rows_by_keys_that_learning_leaves_alone(name, folder):
    tasks = make_tasks(name, rows=24)
    method = taught(Mbpa(make_setup(folder, name), neighbours=5), tasks)
    fresh, memories = Mbpa(make_setup(folder, name)), [row for task in tasks for row in task.rows]
    asked = make_tasks(name, rows=32)[0].rows[24:]
    keys, queries = (np.stack([fresh.keys_of([row])[0].numpy() for row in rows]) for rows in (memories, asked))
    for query, found in zip(queries, method.nearest(asked), strict=True):
        distances = np.linalg.norm(keys - query, axis=1)
        np.testing.assert_allclose(distances[found], np.sort(distances)[:5], rtol=1e-4)
    assert method.nearest([memories[7]])[0][0] in [i for i, row in enumerate(memories) if row.text == memories[7].text]


def test_mbpas_key_is_the_mean_of_the_frozen_encoders_last_states(folder):
    method, (task, _) = Mbpa(make_setup(folder)), make_tasks()
    encoded = method.key_network.tokenization.encode([task.rows[0].prompt], 32)
    expected = method.key_network.model(encoded.input_ids).last_hidden_state.mean(1)
    torch.testing.assert_close(method.keys_of(task.rows[:9])[:1], expected)
    assert method.keys_of([]).shape == (0, 32)


@pytest.mark.parametrize("name", KINDS)
def test_mbpa_adapts_to_each_row_and_restores_every_weight(name, folder, monkeypatch):
    method, tasks = Mbpa(make_setup(folder, name), rate=0.5, steps=2), make_tasks(name, rows=24)
    taught(method, tasks)
    before, during, adapt = weights(method), [], method.adapt

    def watched(rows, base):
        assert len(rows) == 32
        adapt(rows, base)
        during.append(weights(method))

    monkeypatch.setattr(method, "adapt", watched)
    together = method.answers(tasks[0].rows[:3])
    assert len(during) == 3
    assert not any(same(before, adapted) for adapted in during)
    assert not same(during[0], during[1])
    assert same(before, weights(method))
    assert together == [method.answers([row])[0] for row in tasks[0].rows[:3]]


def test_mbpa_restores_the_weights_of_a_row_that_fails(folder, monkeypatch):
    method = taught(Mbpa(make_setup(folder), steps=1), make_tasks())
    before = weights(method)
    monkeypatch.setattr(method.model, "answers", lambda rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        method.answers(make_tasks()[0].rows[:1])
    assert same(before, weights(method))


@pytest.mark.parametrize("name", KINDS)
def test_mbpa_without_local_steps_answers_as_its_base_model(name, folder):
    method, tasks = Mbpa(make_setup(folder, name), steps=0), make_tasks(name, rows=24)
    taught(method, tasks)
    assert method.answers(tasks[0].rows) == Finetune.answers(method, tasks[0].rows)


def test_mbpas_local_steps_are_gradient_descent_on_the_neighbours_loss_and_the_pull_to_the_base(folder):
    method, tasks = Mbpa(make_setup(folder), steps=3, rate=0.02, pull=0.5), make_tasks()
    taught(method, tasks)
    rows, model = tasks[1].rows[:8], copy.deepcopy(method.model)
    base = [weight.detach().clone() for weight in model.trained()]
    optimizer = torch.optim.SGD(model.trained(), lr=0.02)
    for _ in range(3):
        pull = sum((weight - start).square().sum() for weight, start in zip(model.trained(), base, strict=True))
        optimizer.zero_grad()
        (model.losses(rows).mean() + 0.5 * pull).backward()
        optimizer.step()
    method.adapt(rows, base)
    for found, expected in zip(method.model.trained(), model.trained(), strict=True):
        torch.testing.assert_close(found, expected)


def test_mbpa_replays_a_batch_of_what_it_has_seen_after_every_so_many(folder, monkeypatch):
    method, (first, second) = Mbpa(make_setup(folder), every=4), make_tasks()
    seen = watch(method, monkeypatch)
    taught(method, (first, second))
    assert len(seen) == 24 + 24 // 4  # 6 batches x 2 epochs x 2 tasks, and a replay after every 4
    own = {row.text for row in first.rows}
    assert set(seen[4]) <= {text for batch in seen[:4] for text in batch}  # replays only rows seen so far
    replayed = [text for batch in seen[19::5] for text in batch]
    assert own & set(replayed)  # rows of the first task are replayed while the second is learned
    assert method.batches == 24
    assert len(method.memory.rows) == len(method.keys) == 96


def test_mbpa_refuses_more_rows_than_its_budget_rather_than_shorten_anything(folder):
    method, tasks = Mbpa(make_setup(folder), steps=1, most_rows=2), make_tasks()
    taught(method, tasks[:1])
    assert len(method.answers(tasks[0].rows[:2])) == 2
    with pytest.raises(ValueError, match="at most 2 to answer, got 3"):
        method.answers(tasks[0].rows[:3])


def test_oloras_penalty_is_zero_of_orthogonal_subspaces_and_the_sum_of_overlaps_of_others(folder):
    method = OLora(make_setup(folder), strength=0.5)
    method.add(1)
    assert float(method.penalty().detach()) == 0
    method.add(2)
    expected = sum(
        (a @ b.T).abs().sum().item() for a, b in zip(method.reading("lora0"), method.reading("lora1"), strict=True)
    )
    assert float(method.penalty().detach()) == pytest.approx(0.5 * expected, rel=1e-5)
    assert expected > 0
    for number, name in enumerate(method.loras):
        for a in method.reading(name):
            a.data = torch.eye(16, a.shape[1])[8 * number :][:8].contiguous()
    assert float(method.penalty().detach()) == 0
    method.add(3)
    assert float(method.penalty().detach()) > 0


@pytest.mark.parametrize("name", KINDS)
def test_olora_leaves_earlier_loras_and_the_backbone_as_they_are(name, folder):
    method, (first, second) = OLora(make_setup(folder, name)), make_tasks(name, rows=24)
    method.learn(first, progress=False)
    before = weights(method)
    method.learn(second, progress=False)
    after = weights(method)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed <= {"head.weight", "head.bias"}
    assert (changed == {"head.weight", "head.bias"}) == (name == "bert")
    added = after.keys() - before.keys()
    assert added
    assert all(".lora1." in key for key in added)
    assert all(float(after[key].abs().max()) > 0 for key in added)


def test_olora_answers_with_all_loras_summed(folder):
    method, tasks = OLora(make_setup(folder)), make_tasks()
    taught(method, tasks)
    rows, loras = tasks[0].rows[:4], method.loras
    found = method.model(rows)
    bare = Finetune(make_setup(folder)).model
    bare.head.load_state_dict(method.model.head.state_dict())
    with torch.no_grad():
        for module in method.modules:
            layer = method.model.network.base_model.model.get_submodule(module)
            for name in loras:
                bare.network.get_submodule(module).weight += layer.lora_B[name].weight @ layer.lora_A[name].weight
    torch.testing.assert_close(found, bare(rows), rtol=1e-4, atol=1e-4)


def test_oloras_penalty_makes_subspaces_less_alike(folder):
    overlaps, setup = [], make_setup(folder, options=LearnOptions(epochs=4, batch_size=8))
    for strength in (0.0, 0.5):
        method = taught(OLora(setup, strength=strength), make_tasks())
        method.strength = 1.0
        overlaps.append(float(method.penalty().detach()))
    assert overlaps[1] < 0.8 * overlaps[0]


def test_idbr_keeps_the_rows_nearest_to_the_centres_of_clusters():
    generator = torch.Generator().manual_seed(0)
    blobs = torch.randn(3, 20, 5, generator=generator) + 50 * torch.randn(3, 1, 5, generator=generator)
    expected = [20 * i + int((blob - blob.mean(0)).norm(dim=1).argmin()) for i, blob in enumerate(blobs)]
    assert sorted(central(blobs.flatten(0, 1), 3, seed=4)) == expected


def test_idbrs_spaces_are_held_by_nothing_while_nothing_has_changed(folder):
    method, (first, second) = Idbr(make_setup(folder)), make_tasks()
    method.learn(first, progress=False)
    model, rows = method.model, second.rows[:8]
    before = model.spaces(model.embed_all(rows)).detach()
    assert float(distance(model.features(rows), before)) == pytest.approx(0, abs=1e-10)
    model.generic.bias.data += 0.1
    moved = float(distance(model.features(rows), before))
    assert moved > 0
    assert moved == pytest.approx(0.5 * float((model.features(rows) - before)[:, :128].square().mean()), rel=1e-5)
    model.specific.bias.data += 0.1
    assert float(distance(model.features(rows), before)) > moved


def test_idbr_cuts_a_text_in_two_and_turns_its_halves_around(folder, monkeypatch):
    method, (task, _) = Idbr(make_setup(folder)), make_tasks()
    asked, network = [], method.model.network

    class Watched(torch.nn.Module):
        def forward(self, **inputs):
            asked.append(inputs)
            return network(**inputs)

    method.model.network = Watched()
    row, tokenizer = task.rows[:1], method.model.backbone.tokenizer
    start, *words, end = tokenizer(row[0].text)["input_ids"]
    half = len(words) // 2
    method.model.embed(row)
    method.model.embed(row, swapped=True)
    cuts = set()
    for seed in range(30):
        method.model.embed(row, torch.Generator().manual_seed(seed))
        ids = asked[-1]["input_ids"][0].tolist()
        cuts.add(ids.index(end) - 1)
        assert [i for i in ids if i not in (start, end)] == words
    assert asked[0]["input_ids"].tolist() == [[start, *words[:half], end, *words[half:], end]]
    assert asked[0]["token_type_ids"].tolist() == [[0] * (half + 2) + [1] * (len(words) - half + 1)]
    assert asked[1]["input_ids"].tolist() == [[start, *words[half:], end, *words[:half], end]]
    assert cuts <= set(range(1, len(words)))
    assert len(cuts) > 1


def test_idbr_learns_the_order_of_halves_always_and_tasks_only_of_replayed_batches(folder, monkeypatch):
    method, (first, second) = Idbr(make_setup(folder)), make_tasks(rows=104)
    asked, losses = [], method.model.task_losses

    def watched(rows, generator, tasks):
        found = losses(rows, generator, tasks)
        asked.append(([row.text for row in rows], None if tasks is None else tasks.tolist()))
        return found

    monkeypatch.setattr(method.model, "task_losses", watched)
    order = method.model.order.weight.clone()
    method.learn(first, progress=False)
    assert not torch.equal(order, method.model.order.weight)
    assert all(tasks is None for _, tasks in asked)
    (kept,) = method.memory.rows
    asked.clear()
    method.learn(second, progress=False)
    replayed = [(texts, tasks) for texts, tasks in asked if tasks is not None]
    assert len(replayed) == 2 * 2  # two replays in 26 batches, each of nine rows in batches of eight
    named = Counter(
        (text == kept.text, task) for texts, tasks in replayed for text, task in zip(texts, tasks, strict=True)
    )
    assert named == {(True, 0): 2, (False, 1): 16}
    assert method.model.task.weight.shape == (2, 128)


def test_idbr_has_a_new_task_named_without_changing_how_others_are(folder):
    model = Idbr(make_setup(folder)).model
    first = model.task.weight.clone()
    model.add_task(4)
    assert torch.equal(model.task.weight[:1], first)
    assert isinstance(model, Classifier)
    assert "seq2seq" not in METHODS["idbr"].kinds
