"""`predict`: row order, batching, failed rows, heads and task IDs."""

from __future__ import annotations

import random
import re
import threading

import pytest
import torch
from models import (
    FAMILIES,
    knows,
    make_model,
    make_slm,
    make_tokenizer,
    merge,
    mixed,
    one_thread,  # noqa: F401
    random_task,
    sentence,
    two_tasks,
)

from slm_fast import InputError, ScalableLM, WorkError, predict
from slm_fast.batching import length_buckets
from slm_fast.data import Row
from slm_fast.options import PredictOptions
from slm_fast.predict import RouteTaken
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
    """softmax(head_t(h)) of each task, where h is the mean last hidden state of the merged model."""
    model = merge(make_model("bert"), tasks, route)
    with torch.inference_mode():
        hidden = model(**make_tokenizer("bert")(text, return_tensors="pt", return_token_type_ids=False))
    feature = hidden.last_hidden_state[0].mean(0)
    return [(task.head[0] @ feature + task.head[1]).softmax(0) for task in tasks]


@pytest.mark.parametrize("router", ["gaussian", "dtkr"])
def test_the_answer_is_the_route_weighted_mixture_of_the_heads_over_united_label_words(router):
    slm = make_slm("bert", router=router, groups=8 if router == "dtkr" else None, k=3)
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
    slm = make_slm("bert", temperature=40.0)  # both tasks get substantial weight
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


# Task IDs


@pytest.mark.parametrize("router", ["gaussian", "dtkr"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_task_id_masks_the_pool_to_that_task(name, router):
    slm = make_slm(name, router=router, groups=8 if router == "dtkr" else None)
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
    for task in ("city", 5, ["sea"]):
        with pytest.raises(InputError, match="not learned; tasks: farm, sea"):
            slm.predict_stream(mixed(), task=task)


def test_a_stream_goes_on_with_the_tasks_of_the_moment():
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    stream = slm.predict_stream(["farm1"] * 3000)
    first = next(stream).task
    slm.forget(first)
    assert [answer.task for answer in stream][-1] in slm.tasks


@pytest.mark.parametrize("task", ["city", ["sea", "city"], ["sea", ["city"]], ["sea", None]])
def test_an_unknown_task_id_is_named_with_those_learned_before_a_row_is_answered(task, monkeypatch):
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    monkeypatch.setattr("slm_fast.predict.answer", lambda *_: pytest.fail("rows are answered"))
    said = f"task {(task if isinstance(task, str) else task[1])!r}: not learned; tasks: farm, sea"
    for call in (slm.predict, slm.predict_proba):
        with pytest.raises(InputError, match=f"^{re.escape(said)}$"):
            call(["sea1", "sea2"], task=task)


def test_a_list_of_task_ids_must_be_as_long_as_the_rows():
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    with pytest.raises(InputError, match="task: 1 names for 2 rows"):
        slm.predict(["sea1", "sea2"], task=["sea"])
