"""The demonstration's data is what the demonstration says."""

from __future__ import annotations

from slm_fast import demo


def test_five_tasks_two_of_them_reviews_that_share_label_words():
    train = demo.load("train")
    assert len(train) == 5
    shared = set(train["restaurant_reviews"].labels or []) & set(train["gadget_reviews"].labels or [])
    assert shared == {"price", "service"}


def test_no_test_text_is_a_training_text_of_any_task():
    def texts(split: str) -> list[str]:
        return [" ".join(row.text.casefold().split()) for task in demo.load(split).values() for row in task.rows]

    train, test = texts("train"), texts("test")
    assert len(set(train)) == len(train)
    assert len(set(test)) == len(test)
    assert not set(train) & set(test)


def test_every_label_of_a_test_file_is_learned_and_labels_are_balanced():
    train, test = demo.load("train"), demo.load("test")
    for name in demo.TASKS:
        for task in (train[name], test[name]):
            assert task.labels == train[name].labels
            counts = {label: sum(row.target == label for row in task.rows) for label in task.labels or []}
            assert len(set(counts.values())) == 1
