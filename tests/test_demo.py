"""The demos: properties of their data, and an end-to-end run of the chat model demo."""

from __future__ import annotations

import io

from rich.console import Console

from slm_fast import ScalableLM, Task, demo
from slm_fast.demo import chat
from slm_fast.options import LearnOptions
from tests.gguf_file import write_gguf
from tests.models import one_thread  # noqa: F401

PARTS = ("train", "test")


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


def test_instruction_tasks_are_of_like_size_and_no_row_is_tested_that_was_learned():
    train, test = chat.load("train"), chat.load("test")
    assert list(train) == list(chat.TASKS)
    for name in chat.TASKS:
        assert (len(train[name].rows), len(test[name].rows)) == (48, 12)
        assert len({row.instruction for task in (train[name], test[name]) for row in task.rows}) == 1
        texts = [[row.text.casefold() for row in task.rows] for task in (train[name], test[name])]
        assert len({*texts[0], *texts[1]}) == 60
        assert all(row.target for task in (train[name], test[name]) for row in task.rows)


def test_the_demonstration_on_a_chat_model_shows_both_answers_and_keeps_its_tasks(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf")
    few = {split: {name: Task(name, task.rows[:4]) for name, task in chat.load(split).items()} for split in PARTS}
    monkeypatch.setattr(chat, "load", few.get)
    out = io.StringIO()
    options = LearnOptions(epochs=1, batch_size=48)
    store = str(tmp_path / "store")
    console = Console(file=out, width=200)
    chat.run(store, console, backbone=str(tmp_path / "tiny.gguf"), first_layer=2, options=options)
    said = out.getvalue()
    for name in chat.TASKS:
        assert f"learned {name} from 4 rows" in said
    assert said.count("\nExtract the city and the date.") + said.count("│ Extract the city and the date.") == chat.SHOWN
    assert "Exact matches on 12 test rows: 0 with the bare model" in said
    assert ScalableLM.from_pretrained(store).tasks == sorted(chat.TASKS)
