"""Answering: mixed rows in any order, heads, task-IDs, abstaining, streams, and the scores that come with answers."""

from __future__ import annotations

import itertools
import math
import random
import threading
from collections.abc import Iterator

import pytest
import torch
from models import (
    DEMO,
    FAMILIES,
    GENERATORS,
    demo_slm,
    knows,
    make_model,
    make_slm,
    make_tokenizer,
    merge,
    one_thread,  # noqa: F401
    random_task,
    sentence,
    texts_of,
    toy_task,
)
from torch import nn

from slm_fast import InputError, ScalableLM, Task, WorkError, predict
from slm_fast.data import Row
from slm_fast.predict import WINDOW, Prediction, PredictOptions, RouteTaken, plan, windows_of
from slm_fast.tasks import LearnedTask

FAR = " ".join(["word7"] * 12)  # like nothing the random tasks were made of


def two_tasks(slm: ScalableLM, **options) -> list[LearnedTask]:
    tasks = [random_task(slm, "farm", labels=("no", "yes"), **options)]
    return [*tasks, random_task(slm, "sea", labels=("maybe", "no", "yes"), **options)]


def mixed(each: int = 4, seed: int = 1) -> list[str]:
    return texts_of(*(toy_task(topic, rows=each, seed=seed) for topic in ("sea", "farm")))


def bare_text(name: str, text: str, max_new_tokens: int) -> str:
    """What plain transformers generates from the model nobody touched."""
    model, tokenizer = make_model(name), make_tokenizer(name)
    ids = prompt_ids(name, text)
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, pad_token_id=0
    )
    return tokenizer.decode(out[0, ids.shape[1] if name == "llama" else 1 :], skip_special_tokens=True).strip()


def prompt_ids(name: str, text: str) -> torch.Tensor:
    tokenizer = make_tokenizer(name)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"] if name == "llama" else []
    return torch.tensor([tokenizer(text)["input_ids"] + newline])


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
    batches = plan(lengths, budget, most)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    for batch, width in zip(batches, longest, strict=True):
        assert len(batch) == 1 or len(batch) * width <= budget
        assert len(batch) <= (most or len(lengths))
    for batch, following, width in zip(batches, batches[1:], longest, strict=False):
        full = len(batch) + 1 > (most or len(lengths)) or (len(batch) + 1) * width > budget
        assert full, (batch, following)
    assert plan([], budget, most) == []


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

    backbone._reader = reader
    texts = [*mixed(8), " ".join(["sea1"] * 300)]
    assert slm.predict(texts)[-1].truncated
    assert seen == texts
    assert threading.main_thread() not in threads


def test_an_encoder_with_the_backbones_tokenizer_shares_its_tokens(monkeypatch):
    slm = ScalableLM.from_backbone("minilm", query="sentence", router="dtkr", encoder="minilm", max_length=32)
    texts = ["Fry the onions.", "A long text " * 30, "My laptop does not start at all. " * 60]
    readings = slm.model.read([Row(text) for text in texts])
    alone, _ = slm.model.backbone.tokenise(texts, 32)
    assert [reading.ids for reading in readings] == alone
    assert [reading.truncated for reading in readings] == [False, True, True]
    found = slm.model.query_ahead([reading.ahead for reading in readings])
    monkeypatch.setattr(slm.model.query, "encode_tokens", None)
    expected = slm.model.queries([Row(text) for text in texts])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert max(len(reading.ahead) for reading in readings) == 256


# Rows that fail


def with_a_row_that_fails() -> tuple[ScalableLM, list[str], int]:
    model = make_model("bert")
    model.embeddings.word_embeddings.weight[make_tokenizer("bert").get_vocab()["word79"]] = torch.nan
    slm = ScalableLM.from_backbone(model, tokenizer=make_tokenizer("bert"))
    knows(slm, *two_tasks(slm))
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
    assert far == Prediction(None, None, None, 0.0, RouteTaken((), (), ()), False)
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


def test_a_smaller_share_abstains_from_more():
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    texts = [row.text for topic in ("sea", "farm") for row in toy_task(topic, rows=30, seed=5).rows]
    counts = [sum(a.task is None for a in slm.predict(texts, abstain=share)) for share in (0.0, 0.5, 1.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]
    assert sum(a.task is None for a in slm.predict(texts, abstain=False)) == 0


def test_abstaining_does_not_depend_on_the_other_tasks_learned():
    slm = make_slm("bert")
    texts = [row.text for row in toy_task("sea", rows=30, seed=5).rows]
    tasks = two_tasks(slm)
    knows(slm, tasks[1])
    before = [answer.task for answer in slm.predict(texts, abstain=0.5, task="sea")]
    knows(slm, *tasks)
    assert [answer.task for answer in slm.predict(texts, abstain=0.5, task="sea")] == before
    assert {"sea", None} == set(before)


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
    assert slm.predict(["sea1"], bare=True) == [Prediction(None, None, None, 0.0, RouteTaken((), (), ()), False)]


# Text and labels


@pytest.mark.parametrize("name", GENERATORS)
def test_a_text_that_is_a_label_word_of_the_task_is_a_label_and_another_is_not(name):
    slm = make_slm(name)
    rows = [(f"sea{i} {cue}0", label) for i in range(16) for cue, label in (("good", "yes"), ("bad", "no"))]
    slm.learn(Task("sea", rows), epochs=6, batch_size=8, learning_rate=2e-2)
    answers = slm.predict([text for text, _ in rows], max_new_tokens=3)
    assert {"yes"} <= {answer.label for answer in answers} <= {"yes", "no", None}
    for answer in answers:
        assert answer.label == (answer.text if answer.text in ("yes", "no") else None)
    for answer in slm.predict([text for text, _ in rows], max_new_tokens=3, bare=True):
        assert answer.label is None


@pytest.mark.parametrize("name", GENERATORS)
def test_a_free_text_task_never_answers_with_a_label(name):
    slm = make_slm(name)
    knows(slm, random_task(slm, "farm", labels=None), random_task(slm, "sea", labels=None))
    for answer in slm.predict(mixed(), max_new_tokens=4):
        assert answer.label is None
        assert isinstance(answer.text, str)


@pytest.mark.parametrize("name", GENERATORS)
def test_no_more_than_the_tokens_asked_for_are_generated(name):
    slm = make_slm(name)
    knows(slm, *two_tasks(slm))
    for most in (1, 4):
        lengths = [len(answer.text.split(" ")) for answer in slm.predict(mixed(), max_new_tokens=most)]
        assert max(lengths) <= most
    assert max(lengths) > 1


def test_samples_come_from_the_whole_vocabulary():
    slm = make_slm("llama")
    answers = slm.predict(["sea1 sea2"] * 300, batch_size=300, sample=True, temperature=1000.0, max_new_tokens=1)
    assert len({answer.text for answer in answers}) > 80  # of 191 all but equally likely


@pytest.mark.parametrize("name", GENERATORS)
def test_a_text_may_end_with_any_of_the_backbones_end_tokens(name):
    """Instruction-tuned checkpoints list several; a row that has ended is filled up in a batch and not when alone."""
    slm = make_slm(name)
    knows(slm, *two_tasks(slm))
    written = [answer.text.split(" ") for answer in slm.predict(mixed(8), max_new_tokens=8)]
    stop = next(words[-3] for words in written if len(words) == 8 and words[-3] != "")
    end = make_tokenizer(name).get_vocab()
    slm.model.backbone.model.generation_config.eos_token_id = [end["</s>"], end[stop]]
    answers = slm.predict(mixed(8), max_new_tokens=8)
    shorter = 0
    for text, answer, words in zip(mixed(8), answers, written, strict=True):
        (alone,) = slm.predict([text], max_new_tokens=8)
        assert answer.text == alone.text
        assert answer.score == pytest.approx(alone.score, abs=1e-5)
        shorter += len(answer.text.split(" ")) < len(words)
    assert shorter


# Scores


@torch.inference_mode()
def token_probabilities(name: str, model: nn.Module, text: str, steps: int) -> list[float]:
    """Greedy decoding by hand, one forward pass a token and no cache."""
    ids, found = prompt_ids(name, text), []
    answer = torch.tensor([[0]])  # T5's start
    end = make_tokenizer(name).eos_token_id
    for _ in range(steps):
        logits = model(ids).logits if name == "llama" else model(input_ids=ids, decoder_input_ids=answer).logits
        probability, token = logits[0, -1].softmax(-1).max(-1)
        found.append(float(probability))
        if int(token) == end:
            break
        if name == "llama":
            ids = torch.cat([ids, token.view(1, 1)], 1)
        answer = torch.cat([answer, token.view(1, 1)], 1)
    return found


@pytest.mark.parametrize("name", GENERATORS)
def test_the_score_of_a_greedy_text_is_its_tokens_mean_probability(name):
    slm = make_slm(name)
    tasks = two_tasks(slm)
    knows(slm, *tasks)
    texts = mixed(8)
    lengths = set()
    for text, answer in zip(texts, slm.predict(texts, max_new_tokens=40), strict=True):
        tokens = token_probabilities(name, merge(make_model(name), tasks, answer.route), text, 40)
        assert answer.score == pytest.approx(sum(tokens) / len(tokens), abs=1e-4)
        assert 0 < answer.score < 1
        lengths.add(len(tokens))
    assert len(lengths) > 1  # some ended early, in a batch where others went on


@pytest.mark.parametrize("options", [{"beams": 3}, {"sample": True}, {"sample": True, "top_p": 0.5}])
@pytest.mark.parametrize("name", GENERATORS)
def test_scores_of_beams_and_samples_are_the_probability_of_the_text_returned(name, options):
    slm = make_slm(name)
    tasks = two_tasks(slm)
    knows(slm, *tasks)
    vocabulary = make_tokenizer(name).get_vocab()
    for text, answer in zip(mixed(), slm.predict(mixed(), max_new_tokens=4, **options), strict=True):
        words = answer.text.split(" ")
        if len(words) < 4 or "" in words:  # it ended early, or has line breaks: the words do not tell all tokens
            assert 0 <= answer.score <= 1
            continue
        tokens = torch.tensor([[vocabulary[word] for word in words]])
        model, ids = merge(make_model(name), tasks, answer.route), prompt_ids(name, text)
        with torch.inference_mode():
            if name == "llama":
                logits = model(torch.cat([ids, tokens], 1)).logits[:, ids.shape[1] - 1 : -1]
            else:
                logits = model(
                    input_ids=ids, decoder_input_ids=torch.cat([torch.tensor([[0]]), tokens[:, :-1]], 1)
                ).logits
        probability = logits.softmax(-1).gather(2, tokens[..., None]).mean()
        assert answer.score == pytest.approx(float(probability), abs=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_score_is_a_probability(name):
    slm = make_slm(name)
    knows(slm, *two_tasks(slm))
    for options in ({}, {"head": "winner"}, {"abstain": 0.5}, {"task": "sea"}):
        for answer in slm.predict(mixed(8), max_new_tokens=3, **options):
            assert 0 <= answer.score <= 1
            assert math.isfinite(answer.score)


# Truncation


@pytest.mark.parametrize("name", FAMILIES)
def test_over_long_rows_are_cut_and_say_so(name):
    slm = make_slm(name, max_length=16)
    knows(slm, *two_tasks(slm))
    long, longer = (" ".join(["sea1"] * n) for n in (30, 60))
    answers = slm.predict([long, "sea1", longer], max_new_tokens=3)
    assert [answer.truncated for answer in answers] == [True, False, True]
    assert (answers[0].label, answers[0].text) == (answers[2].label, answers[2].text)


def test_the_instruction_counts_towards_the_length():
    slm = make_slm("llama", max_length=16)
    knows(slm, *two_tasks(slm))
    row = {"instruction": " ".join(["word1"] * 10), "input": "sea1 sea2 sea3 sea4 sea5"}
    assert slm.predict([row], max_new_tokens=2)[0].truncated
    assert not slm.predict([row["input"]], max_new_tokens=2)[0].truncated


# Streams


def test_a_stream_reads_no_more_than_two_windows_ahead():
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    read = itertools.count()

    def endless() -> Iterator[str]:
        for i in itertools.cycle(range(20)):
            next(read)
            yield f"sea{i} sea{(i * 3) % 20}"

    stream = slm.predict_stream(endless(), batch_size=256)
    assert next(read) == 0  # nothing is read before the first answer is asked for
    first = [next(stream) for _ in range(5)]
    assert next(read) <= 2 * WINDOW + 1
    expected = slm.predict([f"sea{i} sea{(i * 3) % 20}" for i in range(5)])
    assert [(a.task, a.label) for a in first] == [(a.task, a.label) for a in expected]


def test_a_stream_answers_as_predict_does():
    slm = make_slm("t5")
    knows(slm, *two_tasks(slm))
    assert list(slm.predict_stream(iter(mixed()), max_new_tokens=3)) == slm.predict(mixed(), max_new_tokens=3)


def test_an_unknown_option_of_a_stream_is_refused_when_it_is_made():
    slm = make_slm("bert")
    with pytest.raises(InputError, match="beam: unknown option"):
        slm.predict_stream(["sea1"], beam=3)


# Refusals


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"words": "sea1"}, r"no 'text' \(nor 'instruction' and 'input'\); fields: 'words'"),
        ({}, "fields: none"),
        ("", "empty text"),
        ("   ", "empty text"),
        ({"instruction": "", "input": " "}, "empty input"),
        ({"text": 3}, "'text': expected a string, got 3"),
        (7, "expected a text or an object with 'text'"),
        (None, "expected a text or an object with 'text'"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(row, message):
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    with pytest.raises(WorkError, match=message) as caught:
        slm.predict(["sea1", row])
    assert "\n" not in str(caught.value)


def test_a_bad_row_among_many_says_which_it_is():
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    with pytest.raises(WorkError, match="row 3"):
        slm.predict(["sea1", "sea2", {"words": "sea3"}, "sea4"])


def test_a_stream_gives_the_answers_before_a_bad_row():
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    stream = slm.predict_stream(["sea1 sea2", "sea3 sea4", {"words": "sea5"}, "sea6"])
    assert [next(stream).task, next(stream).task] == [answer.task for answer in slm.predict(["sea1 sea2", "sea3 sea4"])]
    with pytest.raises(WorkError, match="row 3"):
        next(stream)


def test_a_single_text_is_not_taken_for_a_list_of_letters():
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    for single in ("sea1", {"text": "sea1"}):
        with pytest.raises(InputError, match="rows: expected a list of texts, got a single one"):
            slm.predict(single)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"batch_tokens": 0}, "batch_tokens: expected at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"beams": 0}, "beams: expected at least 1, got 0"),
        ({"head": "both"}, "head: expected 'mixed' or 'winner', got 'both'"),
        ({"abstain": 1.5}, r"abstain: expected True, False or a share of 0 to 1, got 1\.5"),
        ({"temperature": 0.0, "sample": True}, "temperature: expected .* got 0"),
        ({"temperature": -1.0, "sample": True}, "temperature: expected .* got -1"),
        ({"top_p": 1.5, "sample": True}, r"top_p: expected .* got 1\.5"),
        ({"tokens": 3}, "tokens: unknown option; options: batch_size, max_new_tokens"),
    ],
)
def test_an_option_that_cannot_be_right_is_named(options, message):
    slm = make_slm("t5")
    knows(slm, *two_tasks(slm))
    with pytest.raises(InputError, match=message) as caught:
        slm.predict(["sea1"], **options)
    assert "\n" not in str(caught.value)


def test_a_failed_batch_leaves_the_model_ready_for_the_next():
    slm = make_slm("bert")
    knows(slm, *two_tasks(slm))
    expected = slm.predict(mixed())
    layer = slm.model.backbone.layers[2]

    def fail(*_):
        raise MemoryError("no room")

    hook = layer.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        slm.predict(mixed())
    hook.remove()
    assert slm.predict(mixed()) == expected


def test_predicting_leaves_no_trace_in_the_model_or_the_global_generator():
    slm = make_slm("t5")
    knows(slm, *two_tasks(slm))
    before = {name: tensor.clone() for name, tensor in slm.model.backbone.model.state_dict().items()}
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    slm.predict(mixed(), max_new_tokens=3)
    assert torch.equal(torch.rand(3), expected)
    after = slm.model.backbone.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
