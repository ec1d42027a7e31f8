"""Training rows: prepared once, batched by length; gradient accumulation and bfloat16 autocast."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from models import (
    BACKBONES,
    FAMILIES,
    easy,
    knows,
    learned,
    make_slm,
    one_thread,  # noqa: F401
    random_task,
    replace_options,
    saved,
    toy_task,
)
from torch import nn

from slm_fast import ScalableLM, WorkError, examples
from slm_fast import learn as learn_module
from slm_fast.batching import shuffled_buckets
from slm_fast.tasks import LearnedTask

# Queries and lower layers, computed once


def passes(slm: ScalableLM) -> Counter:
    """A counter of how often each layer's forward completes from now on."""
    left: Counter = Counter()
    for i, layer in enumerate(slm.model.backbone.layers):
        layer.register_forward_hook(lambda *_, i=i: left.update([i]))
    return left


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_training_rows_have_their_queries_and_lower_layers_computed_once_whatever_the_epochs(name, epochs):
    slm = make_slm(name)  # taps 0 and 1: adapted from layer 1 on
    left = passes(slm)
    slm.learn(toy_task("sea", rows=40), epochs=epochs, batch_size=8)
    steps = epochs * math.ceil(40 / 8)
    # T5's first layer also computes the position bias for all others, so it runs in every step.
    assert left == {0: math.ceil(40 / 32) + (steps if name == "t5" else 0), 1: steps, 2: steps}


def both_ways(name: str, monkeypatch, **config) -> list[LearnedTask]:
    """A task learned twice: with the lower layers' hidden states cached, and with these layers run in every step."""
    found = []
    for kept in (examples.STATES_BYTES, 0):
        monkeypatch.setattr(examples, "STATES_BYTES", kept)
        slm = make_slm(name, **config)
        slm.learn(toy_task("sea", rows=24), epochs=2, batch_size=8)
        found.append(learned(slm, "sea"))
    return found


def check_alike(first: LearnedTask, second: LearnedTask) -> None:
    for module, pair in first.values.items():
        for a, b in zip(pair, second.values[module], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-5)
    for key, tensor in first.router.items():
        torch.testing.assert_close(tensor, second.router[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "config"),
    [(name, {"taps": (1,), "first_layer": 2}) for name in BACKBONES]
    + [(name, {"taps": (0, 2)}) for name in FAMILIES]
    + [("bert", {"query": "sentence", "encoder": "minilm", "first_layer": 1})],
)
def test_keeping_what_lies_below_changes_nothing_but_rounding(name, config, monkeypatch):
    check_alike(*both_ways(name, monkeypatch, **config))


def test_rows_too_large_to_keep_have_their_queries_computed_once_all_the_same(monkeypatch):
    monkeypatch.setattr(examples, "STATES_BYTES", 100)
    slm = make_slm("bert")
    left = passes(slm)
    slm.learn(toy_task("sea", rows=40), epochs=3, batch_size=8)
    assert left == {0: 2 + 15, 1: 15, 2: 15}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_lower_layers_are_back_in_place_after_a_task_is_learned_or_fails(name):
    slm = make_slm(name)
    layers = list(slm.model.backbone.layers)
    slm.learn(toy_task("sea"), epochs=1)
    with pytest.raises(WorkError):
        slm.learn(toy_task("farm"), epochs=1, learning_rate=1.0, weight_decay=1e38)
    assert list(slm.model.backbone.layers) == layers


# Batches


@pytest.mark.parametrize(("rows", "size"), [(1, 4), (7, 16), (64, 16), (1000, 16), (333, 10)])
def test_every_row_is_in_one_batch_an_epoch_and_batches_are_full(rows, size):
    lengths = torch.randint(3, 128, (rows,), generator=torch.Generator().manual_seed(1))
    found = shuffled_buckets(lengths, size, torch.Generator().manual_seed(2))
    assert sorted(torch.cat(found).tolist()) == list(range(rows))
    assert len(found) == math.ceil(rows / size)
    assert sorted(len(batch) for batch in found)[1:] == [size] * (len(found) - 1)
    again = shuffled_buckets(lengths, size, torch.Generator().manual_seed(2))
    assert [batch.tolist() for batch in found] == [batch.tolist() for batch in again]


def test_batches_hold_rows_of_like_lengths_and_others_in_the_next_epoch():
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, 128, (1600,), generator=generator)
    first, second = (shuffled_buckets(lengths, 16, generator) for _ in range(2))
    read = sum(int(lengths[batch].max()) * len(batch) for batch in first)
    plain = sum(int(lengths[batch].max()) * len(batch) for batch in torch.randperm(1600, generator=generator).split(16))
    assert read < 1.1 * int(lengths.sum())
    assert plain > 1.5 * int(lengths.sum())
    assert not {tuple(sorted(batch.tolist())) for batch in first} & {tuple(sorted(b.tolist())) for b in second}
    longest = [int(lengths[batch].max()) for batch in first]
    assert longest != sorted(longest)  # batches are not ordered by length


@pytest.mark.parametrize("name", FAMILIES)
def test_accumulated_gradients_are_those_of_the_whole_batch(name):
    found = []
    for parts in (1, 3):
        slm = make_slm(name)
        slm.learn(toy_task("sea", rows=20), epochs=2, batch_size=8, accumulate=parts)
        found.append(learned(slm, "sea"))
    check_alike(*found)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_task_is_learned_in_bfloat16_and_repeats_bit_for_bit(name):
    runs = []
    for _ in range(2):
        slm = make_slm(name, taps=(0, 1) if name != "llama" else (0,))
        slm.learn(easy("sea"), batch_size=8, epochs=8, learning_rate=2e-2, autocast=True)
        runs.append(saved(slm, "sea"))
    assert runs[0] == runs[1]
    assert slm.evaluate({"sea": easy("sea", seed=11)}, max_new_tokens=2).average > 0.8
    plain = make_slm(name, taps=(0, 1) if name != "llama" else (0,))
    plain.learn(easy("sea"), batch_size=8, epochs=8, learning_rate=2e-2)
    assert replace_options(saved(plain, "sea")) != replace_options(runs[0])  # bfloat16 was used
    for key, tensor in learned(plain, "sea").router.items():
        assert torch.equal(tensor, learned(slm, "sea").router[key])  # routing does not use autocast


@pytest.mark.parametrize("keep_states", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_weights_rounded_once_for_autocast_teach_the_same_bit_for_bit(name, keep_states, monkeypatch):
    if not keep_states:
        monkeypatch.setattr("slm_fast.examples.STATES_BYTES", 0)
    rounded: list[int] = []
    really = learn_module.rounded_for_autocast

    def counted(modules, dtype):
        rounded.append(sum(isinstance(module, nn.Linear) for module in modules))
        return really(modules, dtype)

    found, task, valid = [], toy_task("sea", rows=20), toy_task("sea", rows=8, seed=3)
    for context in (counted, lambda modules, dtype: nullcontext()):
        monkeypatch.setattr(learn_module, "rounded_for_autocast", context)
        slm = make_slm(name, taps=(1, 2))
        weights = {id(parameter): parameter.clone() for parameter in slm.model.backbone.model.parameters()}
        slm.learn(task, valid=valid, epochs=2, batch_size=8, autocast=True)
        found.append(saved(slm, "sea"))
        now = {id(parameter): parameter for parameter in slm.model.backbone.model.parameters()}
        assert now.keys() == weights.keys()
        assert all(torch.equal(parameter, weights[key]) for key, parameter in now.items())
    assert found[0] == found[1]
    every = sum(isinstance(module, nn.Linear) for module in slm.model.backbone.model.modules())
    assert len(rounded) == 1
    assert (rounded[0] < every) == keep_states  # layers that training does not run get no rounded copy


def test_a_joint_step_uses_no_more_slots_than_its_rows_reach(monkeypatch):
    """However many tasks the pool has."""
    slm = make_slm("bert", k=2)
    knows(slm, *[random_task(slm, f"sea{i}", topic="sea", labels=("no", "yes")) for i in range(30)])
    used: list[int] = []
    using = slm.model._injection.adaptation.using

    def counted(values, route):
        used.extend(len(a) for a, _ in list(values.values())[:1])
        return using(values, route)

    monkeypatch.setattr(slm.model._injection.adaptation, "using", counted)
    slm.learn(toy_task("sea", rows=16), epochs=1, batch_size=4, joint=True)
    assert used
    assert max(used) <= 1 + 4 * 2


def test_a_sentence_encoder_reads_the_training_rows_once_whatever_the_epochs():
    slm = make_slm("bert", query="sentence", encoder="minilm")
    read: list[int] = []
    slm.model.query.encoder[0].register_forward_hook(lambda _, args, out: read.append(len(args[0]["input_ids"])))
    slm.learn(toy_task("sea", rows=40), epochs=3, batch_size=8)
    assert sum(read) == 40
