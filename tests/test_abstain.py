"""Abstaining, distances, and the bare backbone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from models import (
    FAMILIES,
    FAR,
    GENERATORS,
    bare_text,
    knows,
    make_slm,
    mixed,
    one_thread,  # noqa: F401
    toy_task,
    two_tasks,
)

from slm_fast import InputError, Task
from slm_fast.predict import Prediction, RouteTaken


def test_an_encoder_abstains_from_text_of_another_domain():
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    near = [row.text for row in toy_task("sea", rows=20, seed=2).rows]
    *kept, far = slm.predict([*near, FAR], abstain=True)
    assert far == Prediction(None, None, None, 0.0, RouteTaken((), (), ()), False, {}, distance=far.distance)
    assert far.distance > 0.99
    assert slm.predict([FAR])[0].task is not None
    assert sum(answer.task is not None for answer in kept) > 15


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_a_dtkr_task_abstains_from_its_share_of_its_own_training_rows(share):
    slm = make_slm("bert", router="dtkr", groups=8)
    task = toy_task("sea", rows=40)
    slm.learn(task, epochs=1)
    answers = slm.predict([row.text for row in task.rows], abstain=share)
    assert abs(sum(answer.task is None for answer in answers) - 40 * (1 - share)) <= 1


@pytest.mark.parametrize("name", GENERATORS)
def test_abstaining_gives_the_bare_backbones_text(name):
    slm = make_slm(name)
    knows(slm, *two_tasks(slm))
    far, near = slm.predict([FAR, "sea1 sea2 sea3 sea4 sea5"], abstain=1.0, max_new_tokens=5)
    assert far.task is None
    assert far.route == RouteTaken((), (), ())
    assert far.text == bare_text(name, FAR, 5)
    assert near.task == "sea"
    assert near.text != bare_text(name, "sea1 sea2 sea3 sea4 sea5", 5)


@pytest.mark.parametrize("router", ["gaussian", "dtkr"])
@pytest.mark.parametrize("texts", [["sea1 sea2"], ["sea1 sea2", "sea3 good1"], ["sea1", "sea2 sea3", "sea4 bad1 sea5"]])
def test_no_training_row_is_abstained_from_at_the_share_of_all_whatever_stands_beside_it(router, texts):
    slm = make_slm("bert", router=router)
    slm.learn(Task("sea", [(text, "ab"[i % 2]) for i, text in enumerate(texts * 10)]), epochs=1)
    slm.learn(toy_task("farm", rows=12), epochs=1)
    long = " ".join(["farm1"] * 40)
    alone = [slm.predict([text], abstain=1.0)[0].task for text in texts]
    beside = [slm.predict([long, text, *texts], abstain=1.0)[1].task for text in texts]
    assert alone == beside == ["sea"] * len(texts)
    if router == "gaussian":
        assert slm.predict([FAR], abstain=1.0, task="sea")[0].task is None


@pytest.mark.parametrize("name", ["bert", *GENERATORS])
@pytest.mark.parametrize("router", ["gaussian", "dtkr"])
def test_a_distance_says_how_unlike_its_task_a_row_is_and_what_abstaining_goes_by(name, router):
    slm = make_slm(name, router=router)
    knows(slm, *two_tasks(slm))
    texts = [row.text for topic in ("sea", "farm") for row in toy_task(topic, rows=9, seed=5).rows] + [FAR]
    options = {"max_new_tokens": 3}
    plain, measured = slm.predict(texts, **options), slm.predict(texts, distance=True, **options)
    assert [answer.distance for answer in plain] == [None] * len(texts)
    assert [replace(answer, distance=None, score=0, route=None) for answer in measured] == [
        replace(answer, score=0, route=None) for answer in plain
    ]
    assert len({answer.distance for answer in measured}) > 5
    for share in (0.2, 0.8, 1.0):
        for answer, whole in zip(slm.predict(texts, abstain=share, **options), measured, strict=True):
            assert answer.distance == whole.distance
            assert (answer.task is None) == (whole.distance > share)


def test_a_smaller_share_abstains_from_more():
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    texts = [row.text for topic in ("sea", "farm") for row in toy_task(topic, rows=30, seed=5).rows]
    counts = [sum(a.task is None for a in slm.predict(texts, abstain=share)) for share in (0.0, 0.5, 1.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]
    assert sum(a.task is None for a in slm.predict(texts, abstain=False)) == 0


def test_abstaining_follows_from_the_tasks_there_are_not_from_how_they_came():
    slm = make_slm("bert")
    texts = [row.text for row in toy_task("sea", rows=30, seed=5).rows]
    slm.learn(toy_task("sea", rows=20), epochs=1)
    before = slm.predict(texts, abstain=0.5)
    slm.learn(toy_task("farm", rows=20), epochs=1)
    slm.predict(texts, abstain=0.5)
    slm.forget("farm")
    assert slm.predict(texts, abstain=0.5) == before
    assert {"sea", None} == {answer.task for answer in before}


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("known", [False, True])
def test_the_bare_backbone_answers_before_any_task_is_learned_and_when_asked(name, known):
    slm = make_slm(name)
    if known:
        knows(slm, *two_tasks(slm))
    for text, answer in zip(mixed(), slm.predict(mixed(), bare=known, max_new_tokens=6), strict=True):
        assert (answer.task, answer.label, answer.route) == (None, None, RouteTaken((), (), ()))
        assert answer.text == bare_text(name, text, 6)


def test_an_encoder_without_tasks_has_no_answer():
    with pytest.raises(InputError, match="no task is learned yet: an encoder-only backbone"):
        make_slm("bert").predict(["sea1"])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_task_id_without_any_task_is_a_wrong_call(name):
    with pytest.raises(InputError, match=r"task 'sea': not learned; tasks: none|no task is learned yet"):
        make_slm(name).predict(["sea1"], task="sea")


def test_a_bare_encoder_names_no_task():
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    assert slm.predict(["sea1"], bare=True) == [Prediction(None, None, None, 0.0, RouteTaken((), (), ()), False, {})]
