"""Answers of MiniLM on real text: what abstaining keeps, and that order and batch size change nothing."""

from __future__ import annotations

import pytest
from models import check_invariance, one_thread, texts_of  # noqa: F401

from slm_fast import ScalableLM, Task, demo


@pytest.fixture(scope="module")
def slm() -> ScalableLM:
    """MiniLM that learned 40 rows of each demo task for one epoch."""
    slm = ScalableLM.from_backbone("minilm")
    for name, task in demo.load("train").items():
        slm.learn(Task(name, task.rows[:40]), epochs=1)
    return slm


def test_on_real_text_what_a_task_was_learned_for_is_kept_and_what_is_far_from_all_is_not(slm):
    test = demo.load("test")
    rows = texts_of(test["help_desk"], test["recipe_steps"])
    far = ["01001 0101 11 0 0 1 1 1 0", "ὅτι οὐκ ἔστιν", "x = lambda y: [z ** 2 for z in y]"]
    answers = slm.predict([*rows, *far], abstain=True)
    kept = [answer.task is not None for answer in answers]
    assert sum(kept[: len(rows)]) / len(rows) > 0.85
    assert kept[len(rows) :] == [False] * 3
    for answer, whole in zip(answers, slm.predict(rows), strict=False):
        if answer.task is not None:
            assert (answer.task, answer.label, answer.route.slots) == (whole.task, whole.label, whole.route.slots)


def test_order_and_batch_size_do_not_change_answers_on_real_text(slm):
    rows = texts_of(*demo.load("test").values(), demo.load("train")["gadget_reviews"])
    assert len(rows) > 190
    check_invariance(slm, rows)
