"""Answering: mixed rows in any order, heads, task-IDs, abstaining, streams, and the scores that come with answers."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from models import (
    DEMO,
    FAMILIES,
    FAR,
    GENERATORS,
    bare_text,
    demo_slm,
    knows,
    make_model,
    make_slm,
    make_tokenizer,
    merge,
    mixed,
    one_thread,  # noqa: F401
    random_task,
    sentence,
    texts_of,
    toy_task,
    two_tasks,
)

from slm_fast import InputError, ScalableLM, Task, WorkError, predict
from slm_fast.batching import length_buckets
from slm_fast.data import Row
from slm_fast.options import PredictOptions
from slm_fast.predict import Prediction, RouteTaken
from slm_fast.tasks import LearnedTask
from slm_fast.windows import WINDOW, windows_of

# Order


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_come_in_the_order_of_the_rows(name):
    slm = make_slm(name)
    knows(slm, *two_tasks(slm))
    texts = mixed(8)
    expected = [slm.predict([text], max_new_tokens=3)[0] for text in texts]
    for batch_size in (1, 3, 16, 100):
        answers = slm.predict(texts, batch_size=batch_size, max_new_tokens=3)
        assert [(a.task, a.label, a.text) for a in answers] == [(e.task, e.label, e.text) for e in expected]


def test_more_rows_than_a_window_come_in_order_too():
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    rng = random.Random(0)
    kinds = [sentence(topic, rng) for topic in ("sea", "farm") for _ in range(5)]
    rows = [rng.choice(kinds) for _ in range(WINDOW + 90)]
    expected = {text: slm.predict([text])[0] for text in kinds}
    answers = slm.predict(rows, batch_size=256)
    assert len(answers) == len(rows)
    for text, answer in zip(rows, answers, strict=True):
        assert (answer.task, answer.label) == (expected[text].task, expected[text].label)
        assert answer.score == pytest.approx(expected[text].score, abs=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_rows_give_no_answers(name):
    slm = make_slm(name)
    assert slm.predict([]) == []
    knows(slm, *two_tasks(slm))
    assert slm.predict([]) == []
    assert slm.predict([], task=[]) == []
    assert list(slm.predict_stream([])) == []


def test_strings_rows_and_mappings_may_be_mixed():
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    rows = ["sea1 sea2", Row("sea1 sea2"), {"text": "sea1 sea2"}, {"instruction": "", "input": "sea1 sea2"}]
    first, *others = slm.predict(rows)
    for other in others:
        assert (other.task, other.label) == (first.task, first.label)


# Batches


@pytest.mark.parametrize("most", [None, 1, 3, 50])
@pytest.mark.parametrize("budget", [1, 7, 40, 1000])
def test_a_plan_holds_every_row_once_longest_first_within_its_budget(budget, most):
    lengths = [random.Random(0).randrange(1, 30) for _ in range(57)] + [0, 29, 1]
    batches = length_buckets(lengths, budget, most)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    for batch, width in zip(batches, longest, strict=True):
        assert len(batch) == 1 or len(batch) * width <= budget
        assert len(batch) <= (most or len(lengths))
    for batch, following, width in zip(batches, batches[1:], longest, strict=False):
        full = len(batch) + 1 > (most or len(lengths)) or (len(batch) + 1) * width > budget
        assert full, (batch, following)
    assert length_buckets([], budget, most) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_batches_are_padded_to_no_more_than_their_tokens(name):
    slm = make_slm(name)
    knows(slm, *two_tasks(slm))
    shapes = []
    slm.model.backbone.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append((args[0] if args else kwargs["hidden_states"]).shape[:2]),
        with_kwargs=True,
    )
    answers = slm.predict(mixed(20), batch_tokens=60, max_new_tokens=1)
    assert max(rows * tokens for rows, tokens in shapes) <= 60
    assert max(rows for rows, _ in shapes) > 1
    expected = slm.predict(mixed(20), batch_size=1, max_new_tokens=1)
    assert [(a.task, a.label, a.text) for a in answers] == [(e.task, e.label, e.text) for e in expected]


def test_rows_are_tokenised_once_each_in_a_thread_of_their_own():
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    backbone, seen, threads = slm.model.backbone, [], set()

    def reader(texts, **options):
        seen.extend(texts)
        threads.add(threading.current_thread())
        return make_tokenizer("bert")(texts, **options)

    backbone.tokenization._reader = reader
    texts = [*mixed(8), " ".join(["sea1"] * 300)]
    assert slm.predict(texts)[-1].truncated
    assert seen == texts
    assert threading.main_thread() not in threads


def test_an_encoder_with_the_backbones_tokenizer_shares_its_tokens(monkeypatch):
    slm = ScalableLM.from_backbone("minilm", query="sentence", router="dtkr", encoder="minilm", max_length=32)
    texts = ["Fry the onions.", "A long text " * 30, "My laptop does not start at all. " * 60]
    readings = slm.model.tokenize([Row(text) for text in texts])
    alone, _ = slm.model.backbone.tokenization.tokenize(texts, 32)
    assert [reading.ids for reading in readings] == alone
    assert [reading.truncated for reading in readings] == [False, True, True]
    found = slm.model.find_queries(slm.model.collate(readings))
    monkeypatch.setattr(slm.model.query, "encode_tokens", None)
    expected = slm.model.queries([Row(text) for text in texts])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert max(len(reading.query_input) for reading in readings) == 256


# Rows that fail


def with_a_row_that_fails() -> tuple[ScalableLM, list[str], int]:
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    embeddings = slm.model.backbone.model.embeddings.word_embeddings.weight
    embeddings[make_tokenizer("bert").get_vocab()["word79"]] = torch.nan
    texts = mixed(8)
    texts[5] += " word79"
    return slm, texts, 5


def test_a_row_whose_query_is_not_finite_is_named():
    slm, texts, _ = with_a_row_that_fails()
    with pytest.raises(WorkError, match="row 6: its query holds a number that is not finite"):
        slm.predict(texts)


def test_a_row_that_fails_does_not_take_its_batch_with_it():
    slm, texts, bad = with_a_row_that_fails()
    (answers,) = predict.answer(slm.model, windows_of([Row(text) for text in texts], None), PredictOptions())
    assert [isinstance(found, WorkError) for found in answers] == [i == bad for i in range(len(texts))]
    expected = slm.predict(texts[:bad] + texts[bad + 1 :])
    for found, alone in zip(answers[:bad] + answers[bad + 1 :], expected, strict=True):
        assert (found.task, found.label) == (alone.task, alone.label)
        assert found.score == pytest.approx(alone.score, abs=1e-5)


# Heads


def probabilities(slm: ScalableLM, tasks: list[LearnedTask], text: str, route: RouteTaken) -> list[torch.Tensor]:
    """softmax(head_t(h)) of each task, h being the mean last hidden state of the merged model."""
    model = merge(make_model("bert"), tasks, route)
    with torch.inference_mode():
        hidden = model(**make_tokenizer("bert")(text, return_tensors="pt", return_token_type_ids=False))
    feature = hidden.last_hidden_state[0].mean(0)
    return [(task.head[0] @ feature + task.head[1]).softmax(0) for task in tasks]


@pytest.mark.parametrize("router", ["gaussian", "dtkr"])
def test_the_answer_is_the_route_weighted_mixture_of_the_heads_over_united_label_words(router):
    slm = make_slm("bert", router=router, groups=8, k=3)
    tasks = two_tasks(slm, slots=2 if router == "dtkr" else 1)
    knows(slm, *tasks)
    words = ("maybe", "no", "yes")
    for text, answer in zip(mixed(), slm.predict(mixed()), strict=True):
        mixture = torch.zeros(3)
        for task, p in zip(tasks, probabilities(slm, tasks, text, answer.route), strict=True):
            share = sum(w for t, w in zip(answer.route.tasks, answer.route.weights, strict=True) if t == task.name)
            for label, value in zip(task.labels, p.tolist(), strict=True):
                mixture[words.index(label)] += share * value
        assert mixture.sum() == pytest.approx(1, abs=1e-5)
        assert answer.label == words[int(mixture.argmax())]
        assert answer.score == pytest.approx(float(mixture.max()), abs=1e-5)
        assert answer.text is None


def test_the_winners_head_alone_answers_when_asked():
    slm = make_slm("bert", temperature=40.0)  # so that both tasks weigh in
    tasks = two_tasks(slm)
    knows(slm, *tasks)
    texts = mixed(16)
    winner, blend = slm.predict(texts, head="winner"), slm.predict(texts, head="mixed")
    assert {answer.task for answer in winner} == {"farm", "sea"}
    for text, answer in zip(texts, winner, strict=True):
        which = [task.name for task in tasks].index(answer.task)
        own = probabilities(slm, tasks, text, answer.route)[which]
        assert answer.label == tasks[which].labels[int(own.argmax())]
        assert answer.score == pytest.approx(float(own.max()), abs=1e-5)
    assert [answer.route for answer in winner] == [answer.route for answer in blend]
    assert any(a.score != pytest.approx(b.score, abs=0.01) for a, b in zip(winner, blend, strict=True))


# Task-ID


@pytest.mark.parametrize("router", ["gaussian", "dtkr"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_task_id_masks_the_pool_to_that_task(name, router):
    slm = make_slm(name, router=router, groups=8)
    tasks = [random_task(slm, topic, slots=2 if router == "dtkr" else 1) for topic in ("city", "farm", "sea")]
    knows(slm, *tasks)
    texts = mixed()
    for task in slm.tasks:
        for answer in slm.predict(texts, task=task, max_new_tokens=3):
            assert answer.task == task
            assert set(answer.route.tasks) == {task}
            assert sum(answer.route.weights) == pytest.approx(1, abs=1e-5)
    names = [slm.tasks[i % 3] for i in range(len(texts))]
    answers = slm.predict(texts, task=names, batch_size=3, max_new_tokens=3)
    assert [answer.task for answer in answers] == names
    alone = [slm.predict([t], task=n, max_new_tokens=3)[0] for t, n in zip(texts, names, strict=True)]
    assert [(a.label, a.text) for a in answers] == [(a.label, a.text) for a in alone]


def test_a_task_id_goes_with_instructions_and_beams():
    slm = make_slm("llama")
    knows(slm, *two_tasks(slm))
    rows = [{"instruction": "the question", "input": "sea1 sea2"}, "sea3 sea4 sea5"]
    for beams in (1, 3):
        answers = slm.predict(rows, task=["farm", "sea"], beams=beams, max_new_tokens=3)
        assert [answer.task for answer in answers] == ["farm", "sea"]
        answers = slm.predict(rows[1:] * 2, task=["farm", "sea"], beams=beams, max_new_tokens=3)
        assert [answer.task for answer in answers] == ["farm", "sea"]


def test_a_stream_may_be_given_its_task():
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    assert {answer.task for answer in slm.predict_stream(mixed(), task="farm")} == {"farm"}


@pytest.mark.parametrize("task", ["city", ["sea", "city"]])
def test_an_unknown_task_id_is_named_with_those_learned(task):
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    with pytest.raises(InputError, match="task 'city': not learned; tasks: farm, sea"):
        slm.predict(["sea1", "sea2"], task=task)


def test_a_list_of_task_ids_must_be_as_long_as_the_rows():
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    with pytest.raises(InputError, match="task: 1 names for 2 rows"):
        slm.predict(["sea1", "sea2"], task=["sea"])


# Abstaining and the bare backbone


def test_an_encoder_abstains_from_text_of_another_domain():
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    near = [row.text for row in toy_task("sea", rows=20, seed=2).rows]
    *kept, far = slm.predict([*near, FAR], abstain=True)
    assert far == Prediction(None, None, None, 0.0, RouteTaken((), (), ()), False, {})
    assert slm.predict([FAR])[0].task is not None
    assert sum(answer.task is not None for answer in kept) > 15


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_a_dtkr_task_abstains_from_its_share_of_its_own_training_rows(share):
    slm = make_slm("bert", router="dtkr", groups=8)
    task = toy_task("sea", rows=40)
    slm.learn(task, epochs=1)
    answers = slm.predict([row.text for row in task.rows], abstain=share)
    assert abs(sum(answer.task is None for answer in answers) - 40 * (1 - share)) <= 1


def test_on_real_text_what_a_task_was_learned_for_is_kept_and_what_is_far_from_all_is_not():
    slm = demo_slm()
    rows = texts_of(*(Task.from_file(name, DEMO / f"{name}.test.csv") for name in ("help_desk", "recipe_steps")))
    far = ["01001 0101 11 0 0 1 1 1 0", "ὅτι οὐκ ἔστιν", "x = lambda y: [z ** 2 for z in y]"]
    answers = slm.predict([*rows, *far], abstain=True)
    kept = [answer.task is not None for answer in answers]
    assert sum(kept[: len(rows)]) / len(rows) > 0.85
    assert kept[len(rows) :] == [False] * 3
    for answer, whole in zip(answers, slm.predict(rows), strict=False):
        if answer.task is not None:
            assert (answer.task, answer.label, answer.route.slots) == (whole.task, whole.label, whole.route.slots)


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
