"""`Known`: changing tasks without affecting those in use, and pinning other tasks in one thread."""

from __future__ import annotations

import threading

import pytest
from models import (
    farm_and_sea,
    make_slm,
    mixed_texts,
    one_thread,  # noqa: F401
    random_task,
)

from slm_fast.data import Row
from slm_fast.errors import InputError
from slm_fast.known import Known
from slm_fast.options import PredictOptions
from slm_fast.predict import answer_batch


def test_tasks_made_aside_change_nothing_until_a_thread_pins_them() -> None:
    slm = make_slm("bert")
    farm_and_sea(slm)
    model, texts = slm.model, mixed_texts(6)
    before = slm.predict(texts)
    known = Known(model.pool, model.router)
    other = known.changed(add=[random_task(slm, "sky", rank=7)], remove=["sea"])
    assert slm.predict(texts) == before
    with model.pinned(other):
        assert slm.tasks == ["farm", "sky"]
        inside = slm.predict(texts)
        seen = []
        thread = threading.Thread(target=lambda: seen.append(slm.tasks))
        thread.start()
        thread.join()
        with model.pinned():
            assert slm.tasks == ["farm", "sky"]
    assert seen == [["farm", "sea"]]
    assert {answer.task for answer in inside} <= {"farm", "sky"}
    assert slm.predict(texts) == before
    slm.forget("sea")
    slm.add(random_task(slm, "sky", rank=7))
    assert slm.predict(texts) == inside


def test_a_name_that_is_taken_or_not_there_is_a_wrong_call() -> None:
    slm = make_slm("bert")
    tasks = farm_and_sea(slm)
    known = Known(slm.model.pool, slm.model.router)
    with pytest.raises(InputError, match="farm"):
        known.changed(add=tasks[:1])
    with pytest.raises(InputError, match="sky"):
        known.changed(remove=["sky"])


def test_a_batch_of_tokens_is_answered_as_its_rows_are() -> None:
    slm = make_slm("bert")
    farm_and_sea(slm)
    texts = mixed_texts(7)
    rows = [Row(text) for text in texts]
    readings = slm.model.tokenize(rows)
    found = answer_batch(slm.model, rows, readings, PredictOptions())
    assert [(one.task, one.label) for one in found] == [(one.task, one.label) for one in slm.predict(texts)]
    named = answer_batch(slm.model, rows, readings, PredictOptions(), ["sea"] * 7)
    assert {one.task for one in named} == {"sea"}


def test_no_change_is_no_new_router(tmp_path):
    slm = make_slm("bert")
    farm_and_sea(slm)
    slm.save_pretrained(tmp_path / "store")
    slm.predict(mixed_texts(2))
    router = slm.model.router
    slm.refresh()
    slm.save_pretrained(tmp_path / "store")
    assert slm.model.router is router
    assert "discriminant" in vars(router)  # what was computed for answers is still there
