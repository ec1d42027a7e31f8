"""Tests of the measures of a task's answers other than accuracy."""

from __future__ import annotations

import pytest

from benchmarks.continual.methods.method import Answer
from benchmarks.continual.scoring import Also
from slm_fast import InputError, Task
from slm_fast.data import Row


def test_heads_see_the_labels_that_leak_so_much_of_the_task():
    rows = [Row("a", "yes"), Row("b", "yes"), Row("c", "no")]
    tasks = {"own": Task("own", rows), "other": Task("other", [Row("d", "one"), Row("e", "two")])}
    answers = [
        Answer("yes", "own", (), {"yes": 0.5, "one": 0.3, "no": 0.2}),
        Answer("one", "other", (), {"one": 0.6, "yes": 0.3, "two": 0.1}),  # wrong task; its own labels alone give "yes"
        Answer("yes", "own", (), {"one": 0.5, "yes": 0.3, "no": 0.2}),
    ]
    found = Also(tasks).measures("own", answers)
    assert found == {"retrieved": pytest.approx(1 / 3), "unified": pytest.approx(1 / 3), "oracle": pytest.approx(2 / 3)}
    assert Also(tasks).measures("own", [Answer("yes", "own")] * 3) == {}


def test_bertscore_is_one_for_the_same_words_and_nothing_for_none():
    task = Task("texts", [Row("a", "the heart is fine"), Row("b", "take two pills")], free_text=True)
    also = Also({"texts": task}, "minilm")
    said = [("take two pills", 1.0), ("", 0.5), ("...", 0.5)]
    for text, expected in said:
        found = also.measures("texts", [Answer("the heart is fine"), Answer(text)])
        assert found == {"BERTScore": pytest.approx(expected, abs=1e-5)}
    near, far = (
        also.measures("texts", [Answer(text), Answer("take two pills")])["BERTScore"]
        for text in ("the heart is well", "a rocket in the sky")
    )
    assert 0.5 < far < near < 1
    with pytest.raises(InputError, match="--bertscore: nowhere"):
        Also({"texts": task}, "nowhere")
