"""Labels are compared as the tokenizer writes them; labels it cannot write are refused, such answers cause warnings."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import transformers
from models import make_model, one_thread  # noqa: F401
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from slm_fast import InputError, ScalableLM, Task
from slm_fast.errors import SlmWarning


@pytest.fixture(scope="module")
def tokenizer():
    """A Unigram tokenizer like T5's sentencepiece tokenizer."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = {"special_tokens": ["<pad>", "</s>", "<unk>"], "unk_token": "<unk>"}
    words = ["late parcel broken screen star good bad 1/2 3/4 (a) 正面 负面"] * 9
    made.train_from_iterator(words, trainers.UnigramTrainer(vocab_size=120, show_progress=False, **special))
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    roles = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **roles)


@pytest.fixture
def slm(tokenizer):
    model = make_model("t5")
    model.resize_token_embeddings(len(tokenizer))
    return ScalableLM.from_backbone(model, tokenizer=tokenizer)


def rows(*labels: str) -> list[tuple[str, str]]:
    return [("late parcel " * (1 + i % 3), label) for i, label in enumerate(labels * 4)]


@pytest.mark.parametrize(
    ("labels", "written"),
    [
        (("\uff08正面\uff09", "\uff08负面\uff09"), ["(正面)", "(负面)"]),
        (("{late}", "{bad}"), ["late", "bad"]),
        (("late  parcel", "broken  screen"), ["late parcel", "broken screen"]),
    ],
)
def test_a_label_is_known_by_what_is_written_for_it(labels, written, slm):
    assert slm.model.backbone.tokenization.written(labels, 32) == written
    slm.learn(Task("t", rows(*labels)), epochs=1)
    task = slm.learned["t"]
    assert [slm.model.label_of(task, text) for text in written] == list(labels)
    assert [slm.model.label_of(task, text) for text in labels] == list(labels)
    assert slm.model.label_of(task, "screen") is None


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            ("{late}", "late"),
            "labels 'late' and '{late}' are one to the .* which writes 'late' for both",
        ),
        (("late  parcel", "late parcel"), "labels 'late  parcel' and 'late parcel' are one"),
        (("good", "{}"), "label '{}' cannot be written"),
        (("good", "bad</s>star"), "label 'bad</s>star' holds a token that ends texts"),
        (("good", "1 4 3 " * 160), "is longer than max_length=256 tokens"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_refused_by_name(labels, message, slm):
    with pytest.raises(InputError, match=message):
        slm.learn(Task("t", rows(*labels)), epochs=1)
    assert slm.tasks == []


def test_labels_of_different_tasks_have_nothing_to_do_with_each_other(slm):
    slm.learn(Task("one", rows("{late}", "bad")), epochs=1)
    slm.learn(Task("two", rows("late", "bad")), epochs=1)
    assert slm.model.label_of(slm.learned["one"], "late") == "{late}"
    assert slm.model.label_of(slm.learned["two"], "late") == "late"


def test_a_task_that_is_forgotten_leaves_the_memory(slm):
    slm.learn(Task("one", rows("{late}", "bad")), epochs=1)
    slm.learn(Task("two", rows("late", "bad")), epochs=1)
    task = slm.learned["two"]
    assert slm.model.label_of(task, "late") == "late"
    assert slm.model.label_of(slm.learned["one"], "late") == "{late}"
    copied = copy.deepcopy(slm)
    slm.forget("two")
    held = [weakref.ref(task), *map(weakref.ref, (*task.router.values(), *next(iter(task.values.values()))))]
    del task
    gc.collect()
    assert [one() for one in held] == [None] * len(held)
    assert len(slm.model._label_words) == 1
    assert [copied.model.label_of(copied.learned[name], "late") for name in ("one", "two")] == ["{late}", "late"]


def test_what_is_cut_or_cannot_be_written_is_said_once(slm):
    texts = ["late", "late " * 30, "good"]
    answers = ["bad {star}", "bad", "bad " * 30]
    free = Task("free", [{"input": text, "output": answer} for text, answer in zip(texts, answers, strict=True)])
    with pytest.warns(SlmWarning) as said:
        slm.learn(free, epochs=1, max_length=16)
    assert [str(warning.message) for warning in said if warning.category is SlmWarning] == [
        "task 'free': 1 of 3 inputs are longer than max_length=16 tokens and are read up to there",
        "task 'free': 1 of 3 answers are longer than max_length=16 tokens and are learned up to there",
        "task 'free': 1 of 3 answers hold what the tokenizer cannot write, such as 'bad {star}'",
    ]


def test_answers_that_end_early_or_are_written_otherwise_are_said(slm):
    answers = ["late</s>bad", "1/2  star", "\uff08a\uff09", "good"]
    with pytest.warns(SlmWarning) as said:
        slm.learn(Task("free", [{"input": answer, "output": answer} for answer in answers]), epochs=1)
    assert [str(warning.message) for warning in said if warning.category is SlmWarning] == [
        "task 'free': 1 of 4 answers hold a token that ends texts, such as 'late</s>bad'",
        "task 'free': 2 of 4 answers are written otherwise: '1/2  star' as '1/2 star'",
    ]
