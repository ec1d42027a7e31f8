"""Learning a task: what it changes, what it must not, that it repeats bit for bit, and that it learns."""

from __future__ import annotations

import math
import random
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from models import (
    BACKBONES,
    FAMILIES,
    GENERATORS,
    knows,
    make_slm,
    one_thread,  # noqa: F401
    random_task,
    toy_task,
)
from torch import nn

from slm_fast import InputError, ScalableLM, Task, WorkError, examples
from slm_fast import learn as learn_module
from slm_fast.backbone import pad
from slm_fast.learn import LearnOptions
from slm_fast.model import Passage
from slm_fast.store import task_to_bytes
from slm_fast.tasks import LearnedTask


def learned(slm: ScalableLM, name: str) -> LearnedTask:
    return next(task for task in slm.model.pool.tasks if task.name == name)


def saved(slm: ScalableLM, name: str) -> bytes:
    """The bytes of the task's file in a store."""
    return task_to_bytes(learned(slm, name))


def backbone_bits(slm: ScalableLM) -> dict[str, torch.Tensor]:
    model = slm.model.backbone.model
    return {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def easy(name: str, rows: int = 48, seed: int = 0) -> Task:
    """Three-word texts whose last word gives the label away: learned in a second by a model of random weights."""
    rng = random.Random(f"{name} {seed}")
    cues = (("good0", "yes"), ("bad0", "no"))
    return Task(
        name,
        [
            (f"{name}{rng.randrange(20)} {name}{rng.randrange(20)} {cues[i % 2][0]}", cues[i % 2][1])
            for i in range(rows)
        ],
    )


# What it changes and what it does not


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_new_tasks_slots_and_head_change(name, joint):
    slm = make_slm(name)
    slm.learn(toy_task("sea"), epochs=1)
    slm.learn(toy_task("farm"), epochs=1)
    frozen, before = backbone_bits(slm), {task: saved(slm, task) for task in slm.tasks}
    slm.learn(toy_task("city", topic="sea", seed=5), epochs=2, joint=joint)  # of the same topic: its routes reach sea's
    assert same_bits(backbone_bits(slm), frozen)
    assert all(parameter.grad is None for parameter in slm.model.backbone.model.parameters())
    assert {task: saved(slm, task) for task in ("farm", "sea")} == before
    new = learned(slm, "city")
    assert set(new.values) == set(slm.model.modules)
    for module, (lora_a, lora_b) in new.values.items():
        features_in, features_out = slm.model.widths[module]
        assert lora_a.shape == (1, 8, features_in)
        assert lora_b.shape == (1, 8, features_out)
        assert lora_b.abs().max() > 0  # it began as zero
    assert (new.head is not None) == (name == "bert")


@pytest.mark.parametrize("name", FAMILIES)
def test_learning_leaves_the_answers_of_other_tasks_to_the_route_alone(name):
    slm = make_slm(name)
    slm.learn(toy_task("sea"), epochs=1)
    texts = [row.text for row in toy_task("sea", seed=3).rows]
    before = slm.predict(texts, task="sea", max_new_tokens=3)
    slm.learn(toy_task("farm"), epochs=1)
    after = slm.predict(texts, task="sea", max_new_tokens=3)
    assert [(a.label, a.text) for a in after] == [(b.label, b.text) for b in before]
    assert [a.score for a in after] == pytest.approx([b.score for b in before], abs=1e-6)


@pytest.mark.parametrize(("name", "router"), [*((name, "gaussian") for name in FAMILIES), ("bert", "dtkr")])
def test_a_tasks_bytes_do_not_depend_on_what_else_was_learned_or_when(name, router):
    tasks = {topic: toy_task(topic) for topic in ("sea", "farm", "city")}

    def learn(*order: str) -> dict[str, bytes]:
        slm = make_slm(name, router=router, groups=8)
        for topic in order:
            slm.learn(tasks[topic], epochs=1)
        assert slm.tasks == sorted(order)
        return {topic: saved(slm, topic) for topic in order}

    first = learn("sea", "farm", "city")
    assert learn("city", "sea", "farm") == first
    assert learn("farm") | learn("sea") | learn("city") == first


@pytest.mark.parametrize("order", ["sea farm city", "city farm sea"])
def test_answers_do_not_depend_on_the_order_of_learning_or_on_a_task_forgotten(order):
    texts = [row.text for topic in ("sea", "farm", "city") for row in toy_task(topic, seed=4).rows]
    expected = make_slm("bert")
    for topic in ("farm", "sea"):
        expected.learn(toy_task(topic), epochs=1)
    slm = make_slm("bert")
    for topic in order.split():
        slm.learn(toy_task(topic), epochs=1)
    slm.forget("city")
    assert slm.tasks == ["farm", "sea"]
    assert slm.predict(texts) == expected.predict(texts)


@pytest.mark.parametrize(("name", "threads"), [*((name, 1) for name in FAMILIES), ("bert", 2)])
def test_learning_repeats_bit_for_bit(name, threads):
    torch.set_num_threads(threads)
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)  # what happens to be in the global generator plays no part
        slm = make_slm(name)
        slm.learn(toy_task("sea", rows=12), epochs=1)
        runs.append(saved(slm, "sea"))
    assert runs[0] == runs[1]
    torch.set_num_threads(1)
    other = make_slm(name)
    other.learn(toy_task("sea", rows=12), epochs=1, seed=1)
    assert saved(other, "sea") != runs[0]


def test_the_global_generator_is_left_alone():
    slm = make_slm("bert")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    slm.learn(toy_task("sea"), epochs=1)
    assert torch.equal(torch.rand(4), expected)


def test_two_names_draw_different_slots_from_the_same_rows():
    slm = make_slm("bert")
    slm.learn(toy_task("sea", topic="city", seed=2), epochs=1)
    slm.learn(Task("farm", toy_task("sea", topic="city", seed=2).rows), epochs=1)
    module = slm.model.modules[0]
    assert not torch.equal(learned(slm, "sea").values[module][0], learned(slm, "farm").values[module][0])


# Joint routes


@pytest.mark.parametrize(("name", "router"), [*((name, "gaussian") for name in FAMILIES), ("bert", "dtkr")])
def test_joint_training_runs_through_the_other_tasks_slots_and_own_routes_do_not(name, router):
    def learn(scale: float, joint: bool) -> bytes:
        slm = make_slm(name, router=router, groups=8)
        # On both sides of "sea" in the order of names, with another rank, and one whose topic no row is near.
        others = [("city", "sea", 4), ("sky", "sea", 3), ("word", "farm", 4)]
        knows(slm, *[random_task(slm, n, topic=t, rank=r, scale=scale, labels=("no", "yes")) for n, t, r in others])
        slm.learn(toy_task("sea"), epochs=1, joint=joint)
        return replace_options(saved(slm, "sea"))

    assert learn(1.0, joint=False) == learn(0.5, joint=False)
    assert learn(1.0, joint=True) != learn(0.5, joint=True)


def replace_options(data: bytes) -> bytes:
    return data[8 + int.from_bytes(data[:8], "little") :]  # the tensors, without the header that names the options


@pytest.mark.parametrize("router", ["gaussian", "dtkr"])
def test_a_joint_step_follows_the_gradient_through_the_whole_pool(router):
    """One AdamW step from zero moves lora_b by -learning_rate * sign(gradient), and lora_a not at all."""
    slm = make_slm("llama", router=router, groups=8, k=3)
    # Names on both sides of "sea", several ranks, and a task ("word") that no route of three slots need reach.
    others = [("city", "sea", 4), ("farm", "farm", 2), ("sky", "sea", 3), ("word", "word", 4)]
    slots = 1 if router == "gaussian" else 2
    knows(slm, *[random_task(slm, name, topic=topic, rank=rank, slots=slots) for name, topic, rank in others])
    task = toy_task("sea", rows=16)
    options = {"epochs": 1, "batch_size": 16, "weight_decay": 0.0, "learning_rate": 1e-3, "slots": slots}
    slm.learn(task, joint=True, **options)
    new = learned(slm, "sea")

    model, backbone = slm.model, slm.model.backbone
    route = model.find_route(model.queries(task.rows))
    own = model.pool.slots_of("sea")
    assert set(route.slot_ids.flatten().tolist()) - set(own.nonzero().flatten().tolist())  # foreign slots are reached
    values = {name: (a, b.clone().requires_grad_(True)) for name, (a, b) in model.pool.values.items()}
    for _, lora_b in values.values():
        lora_b.data[own] = 0.0  # as it was before the step
    prompts = [backbone.encode([row.prompt], 64).input_ids[0].tolist() for row in task.rows]
    answers = backbone.encode_answers([row.target for row in task.rows], 64)
    tokens, mask = pad([p + a for p, a in zip(prompts, answers, strict=True)], 0)
    labels, _ = pad([[-100] * len(p) + a for p, a in zip(prompts, answers, strict=True)], -100)
    with model.passing(Passage(mask), values, route):
        backbone.model(input_ids=tokens, attention_mask=mask, labels=labels).loss.backward()
    for name, (_, lora_b) in values.items():
        step, gradient = new.values[name][1], lora_b.grad[own][:, : new.values[name][1].shape[1]]
        clear = gradient.abs() > 1e-3 * gradient.abs().max()
        assert torch.equal(step[clear].sign(), -gradient[clear].sign())
        assert step[clear].abs().mean() == pytest.approx(1e-3, rel=0.05)


def test_the_first_task_is_the_same_joint_or_not():
    runs = []
    for joint in (False, True):
        slm = make_slm("bert")
        slm.learn(toy_task("sea"), epochs=1, joint=joint)
        runs.append(replace_options(saved(slm, "sea")))
    assert runs[0] == runs[1]


# It learns


@pytest.mark.parametrize(
    ("name", "taps"),
    [("bert", (0, 1)), ("t5", (0, 1)), ("llama", (0,))],  # LLaMA's last token needs all three layers to find the cue
)
def test_two_tasks_are_learned_above_chance_on_new_rows(name, taps):
    slm = make_slm(name, taps=taps)
    for topic in ("sea", "farm"):
        slm.learn(easy(topic), batch_size=8, epochs=8, learning_rate=2e-2)
    found = slm.evaluate({topic: easy(topic, seed=11) for topic in ("sea", "farm")}, max_new_tokens=2)
    assert min(found.accuracy.values()) > 0.8
    found = slm.evaluate(
        {topic: easy(topic, seed=11) for topic in ("sea", "farm")}, max_new_tokens=2, with_task_id=True
    )
    assert found.routing == {"sea": 1.0, "farm": 1.0}
    assert min(found.accuracy.values()) > 0.8


@pytest.mark.parametrize("name", FAMILIES)
def test_more_epochs_lower_the_training_loss(name):
    """The probability of the right answers, by the model's own score, rises with training."""

    def confidence(epochs: int) -> float:
        slm = make_slm(name, taps=(0,))
        task = easy("sea", rows=40)
        slm.learn(task, batch_size=8, epochs=epochs, learning_rate=1e-2)
        answers = slm.predict([row.text for row in task.rows], max_new_tokens=2)
        right = [a.score * (a.label == row.target) for a, row in zip(answers, task.rows, strict=True)]
        return sum(right) / len(right)

    assert confidence(8) > confidence(1) + 0.1


@pytest.mark.parametrize("name", GENERATORS)
def test_a_free_text_task_with_instructions_is_learned(name):
    rows = [
        {"instruction": "the question :", "input": f"sea{i % 20} {cue}{i % 2}", "output": f"the answer {cue}3"}
        for i in range(24)
        for cue in ("good", "bad")
    ]
    slm = make_slm(name, taps=(0,))
    slm.learn(Task("sea", rows), epochs=8, batch_size=8, learning_rate=1e-2)
    assert learned(slm, "sea").labels is None
    answers = slm.predict([{key: row[key] for key in ("instruction", "input")} for row in rows], max_new_tokens=6)
    assert all(answer.label is None for answer in answers)
    assert sum(a.text == row["output"] for a, row in zip(answers, rows, strict=True)) > 0.75 * len(rows)


# Validation


def test_validation_keeps_the_epoch_that_did_best_on_it():
    task, valid = easy("sea"), easy("sea", seed=11)
    inverted = Task("sea", [(row.text, {"yes": "no", "no": "yes"}[row.target]) for row in valid.rows])
    options = {"epochs": 8, "batch_size": 8, "learning_rate": 2e-2}
    plain, kept, worst = (make_slm("bert") for _ in range(3))
    plain.learn(task, **options)
    kept.learn(task, valid=valid, **options)
    worst.learn(task, valid=inverted, **options)

    def accuracy(slm: ScalableLM) -> float:
        return slm.evaluate({"sea": valid}).average

    assert accuracy(kept) >= accuracy(plain) > 0.8
    assert accuracy(worst) < 0.7  # labels turned round: an early epoch, which knew nothing yet, did best


@pytest.mark.parametrize("name", GENERATORS)
def test_validation_of_a_generating_backbone_keeps_the_epoch_of_the_lowest_loss(name):
    options = {"epochs": 3, "batch_size": 8, "learning_rate": 1e-2}
    task = Task("sea", easy("sea").rows, free_text=True)
    wrong = Task("sea", [(row.text, "maybe") for row in easy("sea", seed=11).rows], training=False)
    plain, kept, worst = (make_slm(name) for _ in range(3))
    plain.learn(task, **options)
    kept.learn(task, valid=task, **options)
    worst.learn(task, valid=wrong, **options)
    assert replace_options(saved(kept, "sea")) == replace_options(saved(plain, "sea"))  # the last epoch was the best
    assert replace_options(saved(worst, "sea")) != replace_options(saved(plain, "sea"))


def test_validation_may_be_a_file_and_have_one_label_only(tmp_path):
    file = tmp_path / "valid.csv"
    file.write_text("text,label\nsea1 good1,yes\nsea2 good0,yes\n")
    slm = make_slm("bert")
    slm.learn(easy("sea"), valid=file, epochs=1)
    assert slm.tasks == ["sea"]


def test_a_validation_label_that_training_lacks_is_named():
    slm = make_slm("bert")
    valid = Task("sea", [("sea1", "maybe"), ("sea2", "yes")])
    with pytest.raises(WorkError, match="validation label 'maybe' is not in the training rows"):
        slm.learn(easy("sea"), valid=valid, epochs=1)
    assert slm.tasks == []


# Options


@pytest.mark.parametrize(("router", "default"), [("gaussian", 1), ("dtkr", 4)])
def test_rank_and_slots_shape_what_is_learned(router, default):
    slm = make_slm("bert", router=router, groups=8)
    slm.learn(toy_task("sea"), epochs=1, rank=3)
    slm.learn(toy_task("farm"), epochs=1, rank=5, slots=3)
    for name, slots, rank in (("sea", default, 3), ("farm", 3, 5)):
        task = learned(slm, name)
        assert task.slots == slots
        for module, (lora_a, lora_b) in task.values.items():
            features_in, features_out = slm.model.widths[module]
            assert (lora_a.shape, lora_b.shape) == ((slots, rank, features_in), (slots, rank, features_out))
        assert task.options["rank"] == rank
    assert slm.model.pool.slots == default + 3
    assert slm.model.pool.slot_task.tolist() == [0] * 3 + [1] * default
    answers = slm.predict([row.text for row in toy_task("farm", seed=1).rows])
    assert {task for answer in answers for task in answer.route.tasks} == {"farm", "sea"}


def test_by_default_a_small_task_gets_more_epochs_and_a_large_one_three():
    options = LearnOptions()
    assert [options.epochs_for(rows) for rows in (2, 96, 160, 320, 640, 641, 100_000)] == [20, 20, 12, 6, 3, 3, 3]
    assert LearnOptions(epochs=1).epochs_for(2) == 1
    slm = make_slm("bert")
    steps: list[int] = []
    slm.model.backbone.layers[2].register_forward_hook(lambda *_: steps.append(1))
    slm.learn(toy_task("sea", rows=2))
    assert len(steps) == 20


def test_a_smaller_rank_beside_a_larger_one_answers_as_it_did_alone():
    slm = make_slm("bert")
    slm.learn(toy_task("sea"), epochs=1, rank=2)
    texts = [row.text for row in toy_task("sea", seed=1).rows]
    before = [answer.score for answer in slm.predict(texts)]
    slm.learn(toy_task("farm"), epochs=1, rank=9)
    assert [answer.score for answer in slm.predict(texts, task="sea")] == pytest.approx(before, abs=1e-6)


def test_max_length_limits_the_tokens_learned_from():
    runs = []
    for tail in ("good1", "bad2"):  # beyond the limit, so it cannot matter
        slm = make_slm("bert")
        rows = [(f"sea{i % 20} word{i} word1 word2 {tail}", ("yes", "no")[i % 2]) for i in range(16)]
        slm.learn(Task("sea", rows), epochs=1, max_length=6)
        runs.append(learned(slm, "sea").values[slm.model.modules[0]][1])
    assert torch.equal(runs[0], runs[1])


@pytest.mark.parametrize("value", [0, 1, -5, 129, 10**6])
def test_a_max_length_that_the_backbone_cannot_read_is_refused(value):
    slm = make_slm("bert")
    long = Task("sea", [(" ".join(["sea1"] * 200), "yes"), (" ".join(["sea2"] * 200), "no")] * 4)
    with pytest.raises(InputError, match=f"max_length: expected .* got {value}"):
        slm.learn(long, epochs=1, max_length=value)
    assert slm.tasks == []


@pytest.mark.parametrize("name", FAMILIES)
def test_a_task_of_two_rows_is_enough(name):
    slm = make_slm(name)
    slm.learn(Task("sea", [("sea1", "yes"), ("farm2", "no")]), epochs=1)
    assert slm.predict(["sea1"], max_new_tokens=2)[0].task == "sea"


def test_rows_that_are_all_alike_are_learned_without_complaint():
    slm = make_slm("bert")
    slm.learn(Task("sea", [("sea1", "yes"), ("sea1", "no")] * 8), epochs=1)
    slm.learn(toy_task("farm"), epochs=1)
    assert math.isfinite(slm.predict(["sea1 sea2"])[0].score)


# Queries and what lies below the increments, once


def passes(slm: ScalableLM) -> Counter:
    """Counts how often each layer runs to its end from now on."""
    left: Counter = Counter()
    for i, layer in enumerate(slm.model.backbone.layers):
        layer.register_forward_hook(lambda *_, i=i: left.update([i]))
    return left


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_training_rows_have_their_queries_and_lower_layers_computed_once_whatever_the_epochs(name, epochs):
    slm = make_slm(name)  # taps 0 and 1: increments begin in layer 1
    left = passes(slm)
    slm.learn(toy_task("sea", rows=40), epochs=epochs, batch_size=8)
    steps = epochs * math.ceil(40 / 8)
    # T5's first layer also makes the position bias of all others, and so runs in every step.
    assert left == {0: math.ceil(40 / 32) + (steps if name == "t5" else 0), 1: steps, 2: steps}


def both_ways(name: str, monkeypatch, **config) -> list[LearnedTask]:
    """A task learned with the states below the increments kept, and with the lower layers run in every step."""
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
    found = examples.batches(lengths, size, torch.Generator().manual_seed(2))
    assert sorted(torch.cat(found).tolist()) == list(range(rows))
    assert len(found) == math.ceil(rows / size)
    assert sorted(len(batch) for batch in found)[1:] == [size] * (len(found) - 1)
    again = examples.batches(lengths, size, torch.Generator().manual_seed(2))
    assert [batch.tolist() for batch in found] == [batch.tolist() for batch in again]


def test_batches_hold_rows_of_like_lengths_and_others_in_the_next_epoch():
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, 128, (1600,), generator=generator)
    first, second = (examples.batches(lengths, 16, generator) for _ in range(2))
    read = sum(int(lengths[batch].max()) * len(batch) for batch in first)
    plain = sum(int(lengths[batch].max()) * len(batch) for batch in torch.randperm(1600, generator=generator).split(16))
    assert read < 1.1 * int(lengths.sum())
    assert plain > 1.5 * int(lengths.sum())
    assert not {tuple(sorted(batch.tolist())) for batch in first} & {tuple(sorted(b.tolist())) for b in second}
    longest = [int(lengths[batch].max()) for batch in first]
    assert longest != sorted(longest)  # short and long batches take turns


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
    assert replace_options(saved(plain, "sea")) != replace_options(runs[0])  # it was bfloat16
    for key, tensor in learned(plain, "sea").router.items():
        assert torch.equal(tensor, learned(slm, "sea").router[key])  # routes are found in full precision all the same


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
    assert (rounded[0] < every) == keep_states  # what is never passed is not held twice


def test_a_joint_step_uses_no_more_slots_than_its_rows_reach(monkeypatch):
    """However many tasks there are."""
    slm = make_slm("bert", k=2)
    knows(slm, *[random_task(slm, f"sea{i}", topic="sea", labels=("no", "yes")) for i in range(30)])
    used: list[int] = []
    using = slm.model.adaptation.using

    def counted(values, route):
        used.extend(len(a) for a, _ in list(values.values())[:1])
        return using(values, route)

    monkeypatch.setattr(slm.model.adaptation, "using", counted)
    slm.learn(toy_task("sea", rows=16), epochs=1, batch_size=4, joint=True)
    assert used
    assert max(used) <= 1 + 4 * 2


def test_a_sentence_encoder_reads_the_training_rows_once_whatever_the_epochs():
    slm = make_slm("bert", query="sentence", encoder="minilm")
    read: list[int] = []
    slm.model.query.encoder[0].register_forward_hook(lambda _, args, out: read.append(len(args[0]["input_ids"])))
    slm.learn(toy_task("sea", rows=40), epochs=3, batch_size=8)
    assert sum(read) == 40


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"batch_size": -1}, "batch_size: expected at least 1, got -1"),
        ({"rank": 0}, "rank: expected at least 1, got 0"),
        ({"accumulate": 0}, "accumulate: expected at least 1, got 0"),
        ({"slots": 0}, "slots: expected at least 1, got 0"),
        ({"slots": 40}, "slots: 40 slots need at least as many rows, got 32"),
        ({"learning_rate": 0.0}, r"learning_rate: expected .* got 0\.0"),
        ({"learning_rate": float("nan")}, r"learning_rate: expected .* got nan"),
        ({"warmup": -0.5}, r"warmup: expected .* got -0\.5"),
        ({"weight_decay": float("nan")}, r"weight_decay: expected .* got nan"),
        ({"epoch": 3}, "epoch: unknown option; options: epochs, batch_size"),
    ],
)
def test_an_option_that_cannot_be_right_is_named_and_nothing_is_learned(options, message):
    slm = make_slm("bert")
    slm.learn(toy_task("farm"), epochs=1)
    before = saved(slm, "farm")
    with pytest.raises(InputError, match=message) as caught:
        slm.learn(toy_task("sea"), **options)
    assert "\n" not in str(caught.value)
    assert slm.tasks == ["farm"]
    assert saved(slm, "farm") == before


def test_a_name_that_is_taken_is_refused():
    slm = make_slm("bert")
    slm.learn(toy_task("sea"), epochs=1)
    before = saved(slm, "sea")
    with pytest.raises(InputError, match="task 'sea': already learned; forget it first"):
        slm.learn(toy_task("sea", seed=1), epochs=1)
    assert saved(slm, "sea") == before


def test_an_encoder_refuses_free_text_before_it_does_anything():
    slm = make_slm("bert")
    passes: list[int] = []
    slm.model.backbone.layers[0].register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(InputError, match="task 'sea': an encoder-only backbone answers with labels, not with free"):
        slm.learn(toy_task("sea", instruction="the question"))
    assert passes == []


@pytest.mark.parametrize("rows", [8, 64])  # one step, after which no loss is computed, and several
@pytest.mark.parametrize(("name", "rate"), [*((name, 1.0) for name in FAMILIES), ("bert", 1e4), ("bert", 1e39)])
def test_an_absurd_learning_rate_is_refused_or_leaves_a_task_that_answers(name, rate, rows):
    slm = make_slm(name)
    slm.learn(toy_task("farm"), epochs=1)
    before = saved(slm, "farm")
    caught = None
    try:
        slm.learn(toy_task("sea", rows=rows), epochs=1, learning_rate=rate, batch_size=8)
    except (InputError, WorkError) as error:
        caught = str(error)
    if caught is None:
        answers = slm.predict([row.text for row in toy_task("sea").rows], task="sea", max_new_tokens=2)
        assert all(0 <= answer.score <= 1 for answer in answers)
    else:
        assert "learning_rate" in caught
        assert "\n" not in caught
        assert slm.tasks == ["farm"]
    assert saved(slm, "farm") == before
    assert slm.predict(["farm1 farm2"], task="farm", max_new_tokens=2)[0].task == "farm"


def test_forgetting_what_was_not_learned_is_refused():
    slm = make_slm("bert")
    with pytest.raises(InputError, match="task 'sea': not learned; tasks: none"):
        slm.forget("sea")
    slm.learn(toy_task("farm"), epochs=1)
    with pytest.raises(InputError, match="task 'sea': not learned; tasks: farm"):
        slm.forget("sea")
    assert slm.tasks == ["farm"]
