"""Generated texts: labels, end tokens and scores."""

from __future__ import annotations

import math

import pytest
import torch
from models import (
    FAMILIES,
    GENERATORS,
    knows,
    make_model,
    make_slm,
    make_tokenizer,
    merge,
    mixed,
    one_thread,  # noqa: F401
    prompt_ids,
    random_task,
    two_tasks,
)
from torch import nn

from slm_fast import Task

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
    assert len({answer.text for answer in answers}) > 80  # of 191 almost equally likely tokens


@pytest.mark.parametrize("name", GENERATORS)
def test_a_text_may_end_with_any_of_the_backbones_end_tokens(name):
    """Instruction-tuned checkpoints list several end tokens. Finished rows are padded in batches, not when alone."""
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
    """Probability of each token under greedy decoding, with one forward pass per token and no KV cache."""
    ids, found = prompt_ids(name, text), []
    answer = torch.tensor([[0]])  # T5's decoder start token
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
    assert len(lengths) > 1  # some rows ended early while others in the batch continued


@pytest.mark.parametrize("options", [{"beams": 3}, {"sample": True}, {"sample": True, "top_p": 0.5}])
@pytest.mark.parametrize("name", GENERATORS)
def test_scores_of_beams_and_samples_are_the_probability_of_the_text_returned(name, options):
    slm = make_slm(name)
    tasks = two_tasks(slm)
    knows(slm, *tasks)
    vocabulary = make_tokenizer(name).get_vocab()
    for text, answer in zip(mixed(), slm.predict(mixed(), max_new_tokens=4, **options), strict=True):
        words = answer.text.split(" ")
        if len(words) < 4 or "" in words:  # ended early or has line breaks: the words do not determine the tokens
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
