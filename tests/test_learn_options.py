"""Learning options: validation rows, effects on shapes and steps, and errors."""

from __future__ import annotations

import math

import pytest
import torch
from models import (
    FAMILIES,
    GENERATORS,
    easy,
    learned,
    make_slm,
    one_thread,  # noqa: F401
    replace_options,
    saved,
    toy_task,
)

from slm_fast import InputError, ScalableLM, Task, WorkError
from slm_fast.learn import Trainer
from slm_fast.options import LearnOptions

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
        answers = slm.predict([row.text for row in valid.rows], task="sea")  # routed to the task
        return sum(a.label == row.target for a, row in zip(answers, valid.rows, strict=True)) / len(valid.rows)

    assert accuracy(kept) >= accuracy(plain) > 0.8
    assert accuracy(worst) < 0.75  # inverted labels: an early, untrained epoch scored best


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


def test_a_validation_label_that_training_lacks_is_named(tmp_path):
    slm, file = make_slm("bert"), tmp_path / "valid.csv"
    file.write_text("text,label\nsea1,yes\nsea2,maybe\n")
    with pytest.raises(WorkError, match=r"valid\.csv: line 3: label 'maybe' is not one of no, yes"):
        slm.learn(easy("sea"), valid=file, epochs=1)
    valid = Task("sea", [("sea1", "maybe"), ("sea2", "yes")])
    with pytest.raises(WorkError, match="validation label 'maybe' is not in the training rows"):
        slm.learn(easy("sea"), valid=valid, epochs=1)
    assert slm.tasks == []


# Options


@pytest.mark.parametrize(("router", "default"), [("gaussian", 1), ("dtkr", 4)])
def test_rank_and_slots_shape_what_is_learned(router, default):
    slm = make_slm("bert", router=router, groups=8 if router == "dtkr" else None)
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


def test_a_head_of_many_labels_learns_faster():
    options = LearnOptions(learning_rate=1e-2)
    rates = [options.head_rate(labels) for labels in (1, 5, 24, 40, 80, 1000)]
    assert rates == pytest.approx([3e-2, 3e-2, 3e-2, 5e-2, 0.1, 0.1])


def test_a_heads_first_step_is_three_times_as_long_as_the_values(monkeypatch):
    slm, before = make_slm("bert"), []
    fine_tune = Trainer.fine_tune

    def watched(trainer: Trainer, *args: object) -> None:
        before.append(trainer.head[0].detach().clone())
        fine_tune(trainer, *args)

    monkeypatch.setattr(Trainer, "fine_tune", watched)
    slm.learn(toy_task("sea"), epochs=1, batch_size=32, weight_decay=0.0, learning_rate=1e-3)
    task = learned(slm, "sea")
    # AdamW's first step has the length of the learning rate for any gradient; lora_b starts at zero.
    assert (task.head[0] - before[0]).abs().median() == pytest.approx(3e-3, rel=0.01)
    assert all(lora_b.abs().median() == pytest.approx(1e-3, rel=0.01) for _, lora_b in task.values.values())


def test_a_smaller_rank_beside_a_larger_one_answers_as_it_did_alone():
    slm = make_slm("bert")
    slm.learn(toy_task("sea"), epochs=1, rank=2)
    texts = [row.text for row in toy_task("sea", seed=1).rows]
    before = [answer.score for answer in slm.predict(texts, task="sea")]
    slm.learn(toy_task("farm"), epochs=1, rank=9)
    assert [answer.score for answer in slm.predict(texts, task="sea")] == pytest.approx(before, abs=1e-6)


def test_max_length_limits_the_tokens_learned_from():
    runs = []
    for tail in ("good1", "bad2"):  # beyond max_length, so it has no effect
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


# Errors


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


@pytest.mark.parametrize("rows", [8, 64])  # a single step, after which no loss is computed; several steps
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
