"""Callbacks on training steps, and early stopping."""

from __future__ import annotations

import logging
import math

import pytest
from command import one_line, slm_fast
from models import (
    easy,
    make_slm,
    one_thread,  # noqa: F401
    reopened,
    replace_options,
    saved,
)

from slm_fast import InputError, Task
from slm_fast.epochs import LearnStep

pytestmark = pytest.mark.usefixtures("few_features")
SHORT = {"batch_size": 8, "learning_rate": 2e-2}


def inverted(task: Task) -> Task:
    return Task(task.name, [(row.text, {"yes": "no", "no": "yes"}[row.target]) for row in task.rows])


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_callback_is_told_of_each_step_and_changes_nothing(name):
    plain, watched = make_slm(name), make_slm(name)
    task, valid = easy("sea", rows=20), easy("sea", rows=10, seed=3)
    seen: list[LearnStep] = []
    plain.learn(task, valid=valid, epochs=2, **SHORT)
    watched.learn(task, valid=valid, epochs=2, on_step=seen.append, **SHORT)
    assert saved(plain, "sea") == saved(watched, "sea")
    assert [(at.task, at.step, at.steps, at.epoch) for at in seen] == [
        ("sea", step, 6, epoch) for step, epoch in zip(range(1, 7), (1, 1, 1, 2, 2, 2), strict=True)
    ]
    assert all(math.isfinite(at.loss) and at.loss > 0 for at in seen)
    # Closed form of the schedule: one step of warm-up, then linear decay that reaches 0 after the last step.
    assert [at.learning_rate for at in seen] == pytest.approx([2e-2 * min(s + 1, (6 - s) / 5) for s in range(6)])
    assert [set(at.metrics) - {"loss", "learning_rate", "epoch"} for at in seen] == [
        *([set()] * 2), {"valid_accuracy", "valid_loss"}, *([set()] * 2), {"valid_accuracy", "valid_loss"},
    ]  # fmt: skip


def test_validation_accuracy_is_that_of_the_kept_values():
    slm, valid, seen = make_slm("bert"), easy("sea", rows=15, seed=3), []
    slm.learn(easy("sea", rows=20), valid=valid, epochs=3, on_step=seen.append, **SHORT)
    answers = slm.predict([row.text for row in valid.rows], task="sea")
    right = sum(a.label == row.target for a, row in zip(answers, valid.rows, strict=True)) / len(valid.rows)
    assert max(at.valid_accuracy for at in seen if at.valid_accuracy is not None) == right


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_accuracy_of_generated_text_is_that_of_its_tokens(name):
    slm, seen = make_slm(name), []
    task = Task("sea", easy("sea", rows=20).rows, free_text=True)
    slm.learn(task, valid=task, epochs=20, on_step=seen.append, **SHORT)
    found = [at for at in seen if at.valid_accuracy is not None]
    kept = min(found, key=lambda at: at.valid_loss)
    answers = slm.predict([row.text for row in task.rows], task="sea")
    assert [answer.text for answer in answers] == [row.target for row in task.rows]
    assert found[0].valid_accuracy < kept.valid_accuracy == 1  # right answers have no wrong token


def test_logging_is_one_line(caplog):
    log = logging.getLogger("learning")
    with caplog.at_level(logging.INFO, "learning"):
        make_slm("bert").learn(
            easy("sea", rows=8), epochs=1, on_step=lambda at: log.info("%s %d %s", at.task, at.step, at.metrics)
        )
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("sea 1 {'loss': 0.")


def test_tensorboard_and_trackio_record_every_step(tmp_path, monkeypatch):
    """The lines of docs/learning.md, read back with each tracker's own reader."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter
    from trackio.sqlite_storage import SQLiteStorage

    seen: list[LearnStep] = []
    writer = SummaryWriter(str(tmp_path / "runs"))
    trackio.init(project="reviews", name="sea", auto_log_cpu=False)

    def report(at: LearnStep) -> None:
        seen.append(at)
        for name, value in at.metrics.items():
            writer.add_scalar(f"{at.task}/{name}", value, at.step)
        trackio.log(at.metrics, step=at.step)

    task = easy("sea", rows=16)
    make_slm("bert").learn(task, valid=task, epochs=2, on_step=report, **SHORT)
    writer.close()
    trackio.finish()
    found = event_accumulator.EventAccumulator(str(tmp_path / "runs")).Reload()
    losses = [(event.step, event.value) for event in found.Scalars("sea/loss")]
    assert losses == [(at.step, pytest.approx(at.loss)) for at in seen]
    assert [event.step for event in found.Scalars("sea/valid_accuracy")] == [2, 4]
    logged = SQLiteStorage.get_logs("reviews", "sea")
    assert [(line["step"], line["loss"]) for line in logged] == [(at.step, at.loss) for at in seen]
    assert [line["step"] for line in logged if "valid_accuracy" in line] == [2, 4]


def test_what_a_callback_raises_ends_learning_and_loses_nothing(tmp_path):
    slm = make_slm("bert")
    slm.save_pretrained(tmp_path / "store")
    slm.learn(easy("farm", rows=16), epochs=1)

    def fail(at: LearnStep) -> None:
        if at.step == 2:
            raise ConnectionError("the tracker is gone")

    with pytest.raises(ConnectionError, match="the tracker is gone"):
        slm.learn(easy("sea", rows=24), epochs=1, on_step=fail, batch_size=8)
    assert slm.tasks == ["farm"]
    assert reopened(tmp_path / "store").tasks == ["farm"]
    slm.learn(easy("sea", rows=24), epochs=1)  # learning still works
    assert reopened(tmp_path / "store").tasks == ["farm", "sea"]


def test_early_stopping_keeps_what_learning_to_the_end_keeps():
    task, wrong = easy("sea"), inverted(easy("sea", seed=11))
    whole, stopped = make_slm("bert"), make_slm("bert")
    seen: dict[str, list[LearnStep]] = {"whole": [], "stopped": []}
    whole.learn(task, valid=wrong, epochs=8, on_step=seen["whole"].append, **SHORT)
    stopped.learn(task, valid=wrong, epochs=8, patience=2, on_step=seen["stopped"].append, **SHORT)
    epochs = seen["stopped"][-1].epoch
    assert epochs < 8
    assert seen["stopped"] == seen["whole"][: len(seen["stopped"])]  # including losses and learning rates
    scores = [at.valid_accuracy for at in seen["whole"] if at.valid_accuracy is not None]
    best = scores.index(max(scores[:epochs]))
    assert epochs == best + 1 + 2  # patience: two epochs in a row without improvement
    assert max(scores) == scores[best]  # no later epoch is better, so both keep the same one
    assert replace_options(saved(whole, "sea")) == replace_options(saved(stopped, "sea"))


def test_patience_is_a_part_of_what_a_task_was_made_from():
    slm, task, valid = make_slm("bert"), easy("sea", rows=16), easy("sea", rows=8, seed=3)
    slm.learn(task, valid=valid, patience=1, epochs=2)
    assert slm.learned["sea"].options["patience"] == 1
    with pytest.warns(UserWarning, match="already learned from the same rows and options"):
        slm.learn(task, valid=valid, patience=1, epochs=2)
    for other in (None, 2):
        with pytest.raises(InputError, match="already learned; forget it first"):
            slm.learn(task, valid=valid, patience=other, epochs=2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"patience": 2}, r"^patience: goes with valid= \(--valid\)"),
        ({"patience": 0, "valid": easy("sea", rows=8)}, "^patience: expected at least 1, got 0"),
        ({"patience": "2", "valid": easy("sea", rows=8)}, "^patience: expected an integer or None, got '2'"),
        ({"on_step": "log"}, "^on_step: expected a function of one LearnStep, got a str"),
    ],
)
def test_what_cannot_be_patience_or_a_callback_is_a_wrong_call(options, said):
    slm = make_slm("bert")
    with pytest.raises(InputError, match=said):
        slm.learn(easy("sea", rows=8), **options)
    assert slm.tasks == []


@pytest.fixture(scope="module")
def learning(tmp_path_factory) -> list[object]:
    """Arguments of `slm-fast learn` for two tasks, one with a validation file in which all labels are wrong."""
    folder = tmp_path_factory.mktemp("learning")
    backbone = make_slm("bert").model.backbone
    backbone.model.save_pretrained(folder / "bert")
    backbone.tokenizer.save_pretrained(folder / "bert")
    for name, task in (
        ("sea", easy("sea")),
        ("farm", easy("farm", rows=16)),
        ("wrong", inverted(easy("sea", seed=11))),
    ):
        lines = [f"{row.text},{row.target}" for row in task.rows]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    files = [f"--task={name}={folder}/{name}.csv" for name in ("sea", "farm")]
    options = ["--epochs=8", "--batch-size=8", "--learning-rate=0.02", "--features=32"]
    return [f"--backbone={folder}/bert", *files, f"--valid=sea={folder}/wrong.csv", *options]


def test_the_command_line_stops_early_too(learning, tmp_path):
    assert slm_fast("learn", tmp_path / "store", *learning, "--patience", 2).returncode == 0
    slm = reopened(tmp_path / "store")
    assert [slm.learned[name].options.get("patience") for name in ("sea", "farm")] == [2, None]
    again = slm_fast("learn", tmp_path / "store", *learning, "--patience", 2)
    assert again.returncode == 0
    assert again.stderr.count("already learned") == 2


def test_patience_without_a_validation_file_is_a_wrong_call(learning, tmp_path):
    without = [option for option in learning if not option.startswith("--valid")]
    one_line(slm_fast("learn", tmp_path / "store", *without, "--patience", 2), 2, "patience: goes with valid=")
    assert not (tmp_path / "store").exists()
