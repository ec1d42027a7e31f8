"""Learning a task: what changes and what must not, bitwise reproducibility, joint routes, accuracy."""

from __future__ import annotations

import pytest
import torch
from models import (
    FAMILIES,
    GENERATORS,
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

from slm_fast import ScalableLM, Task
from slm_fast.tokenization import pad


def backbone_bits(slm: ScalableLM) -> dict[str, torch.Tensor]:
    model = slm.model.backbone.model
    return {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# What changes and what does not


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_new_tasks_slots_and_head_change(name, joint):
    slm = make_slm(name)
    slm.learn(toy_task("sea"), epochs=1)
    slm.learn(toy_task("farm"), epochs=1)
    frozen, before = backbone_bits(slm), {task: saved(slm, task) for task in slm.tasks}
    slm.learn(toy_task("city", topic="sea", seed=5), epochs=2, joint=joint)  # same topic: routes reach sea's
    assert same_bits(backbone_bits(slm), frozen)
    assert all(parameter.grad is None for parameter in slm.model.backbone.model.parameters())
    assert {task: saved(slm, task) for task in ("farm", "sea")} == before
    new = learned(slm, "city")
    assert set(new.values) == set(slm.model.modules)
    for module, (lora_a, lora_b) in new.values.items():
        features_in, features_out = slm.model.widths[module]
        assert lora_a.shape == (1, 8, features_in)
        assert lora_b.shape == (1, 8, features_out)
        assert lora_b.abs().max() > 0  # it started at zero
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
        slm = make_slm(name, router=router, groups=8 if router == "dtkr" else None)
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
        torch.manual_seed(seed)  # the state of the global generator has no effect
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
        slm = make_slm(name, router=router, groups=8 if router == "dtkr" else None)
        # Names that sort before and after "sea", different ranks, and a topic (farm) that is far from all rows.
        others = [("city", "sea", 4), ("sky", "sea", 3), ("word", "farm", 4)]
        knows(slm, *[random_task(slm, n, topic=t, rank=r, scale=scale, labels=("no", "yes")) for n, t, r in others])
        slm.learn(toy_task("sea"), epochs=1, joint=joint)
        return replace_options(saved(slm, "sea"))

    assert learn(1.0, joint=False) == learn(0.5, joint=False)
    assert learn(1.0, joint=True) != learn(0.5, joint=True)


@pytest.mark.parametrize("router", ["gaussian", "dtkr"])
def test_a_joint_step_follows_the_gradient_through_the_whole_pool(router):
    """AdamW's first step moves lora_b from zero by -learning_rate * sign(gradient), and leaves lora_a unchanged."""
    slm = make_slm("llama", router=router, groups=8 if router == "dtkr" else None, k=3)
    # Names that sort before and after "sea", different ranks, and a task ("word") that routes of three slots may miss.
    others = [("city", "sea", 4), ("farm", "farm", 2), ("sky", "sea", 3), ("word", "word", 4)]
    slots = 1 if router == "gaussian" else 2
    knows(slm, *[random_task(slm, name, topic=topic, rank=rank, slots=slots) for name, topic, rank in others])
    task = toy_task("sea", rows=16)
    options = {"epochs": 1, "batch_size": 16, "weight_decay": 0.0, "learning_rate": 1e-3, "slots": slots}
    slm.learn(task, joint=True, **options)
    new = learned(slm, "sea")

    model, backbone = slm.model, slm.model.backbone
    route = model.route(model.queries(task.rows))
    own = model.pool.slots_of("sea")
    assert set(route.slot_ids.flatten().tolist()) - set(own.nonzero().flatten().tolist())  # other tasks' slots
    values = {name: (a, b.clone().requires_grad_(True)) for name, (a, b) in model.pool.values.items()}
    for _, lora_b in values.values():
        lora_b.data[own] = 0.0  # as it was before the step
    prompts = [backbone.tokenization.encode([row.prompt], 64).input_ids[0].tolist() for row in task.rows]
    answers = backbone.tokenization.encode_answers([row.target for row in task.rows], 64)
    tokens, mask = pad([p + a for p, a in zip(prompts, answers, strict=True)], 0)
    labels, _ = pad([[-100] * len(p) + a for p, a in zip(prompts, answers, strict=True)], -100)
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    model.call(lambda: backbone.model(**inputs).loss.backward(), mask, route, values=values)
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


# Accuracy


@pytest.mark.parametrize(
    ("name", "taps"),
    [("bert", (0, 1)), ("t5", (0, 1)), ("llama", (0,))],  # LLaMA's last token finds the cue only if all layers adapt
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
    """The mean score of correct answers rises with the number of epochs."""

    def confidence(epochs: int) -> float:
        slm = make_slm(name, taps=(0,))
        task = easy("sea", rows=40)
        slm.learn(task, batch_size=8, epochs=epochs, learning_rate=1e-2)
        answers = slm.predict([row.text for row in task.rows], max_new_tokens=2)
        right = [a.score * (a.label == row.target) for a, row in zip(answers, task.rows, strict=True)]
        return sum(right) / len(right)

    assert confidence(8) > confidence(1) + 0.05


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
