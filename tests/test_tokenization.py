"""Tokenization: special tokens, padding, truncation and end tokens."""

from __future__ import annotations

import pytest
from models import (
    FAMILIES,
    GENERATORS,
    make_model,
    make_slm,
    make_tokenizer,
    one_thread,  # noqa: F401
    toy_task,
)

from slm_fast import InputError
from slm_fast.backbone import Backbone


def make_backbone(name: str, seed: int = 0) -> Backbone:
    return Backbone(make_model(name, seed), make_tokenizer(name), name)


# Tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_are_padded_cut_and_ended_as_the_tokenizer_says(name):
    backbone, tokenizer = make_backbone(name), make_tokenizer(name)
    newline = [tokenizer.get_vocab()["\n"]] if name == "llama" else []
    texts = ["sea1", "sea1 sea2 sea3 sea4", " ".join(["farm1"] * 30)]
    encoded = backbone.tokenization.encode(texts, 8)
    for row, text in enumerate(texts):
        expected = tokenizer(text, truncation=True, max_length=8 - len(newline))["input_ids"] + newline
        real = encoded.attention_mask[row].bool()
        assert encoded.input_ids[row][real].tolist() == expected
        assert len(expected) <= 8
        assert bool(real[: len(expected)].all())
    assert encoded.truncated == [False, False, True]
    left = backbone.tokenization.encode(texts, 8, padding_side="left")
    assert left.attention_mask.tolist() == encoded.attention_mask.flip(1).tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_only_a_text_that_lost_tokens_counts_as_truncated(name):
    backbone = make_backbone(name)
    room = 10 - len(backbone.tokenization.separator) - {"bert": 2, "t5": 1, "llama": 1}[name]
    assert backbone.tokenization.encode([" ".join(["sea1"] * room)], 10).truncated == [False]
    assert backbone.tokenization.encode([" ".join(["sea1"] * (room + 1))], 10).truncated == [True]


@pytest.mark.parametrize("name", GENERATORS)
def test_answers_end_with_the_token_that_ends_them(name):
    backbone = make_backbone(name)
    vocabulary = backbone.tokenizer.get_vocab()
    end = vocabulary["</s>"]
    assert backbone.tokenization.encode_answers(["yes", "the answer"], 16) == [
        [vocabulary["yes"], end],
        [vocabulary["the"], vocabulary["answer"], end],
    ]
    assert backbone.tokenization.encode_answers([" ".join(["word1"] * 30)], 5) == [[vocabulary["word1"]] * 5]
    assert backbone.tokenization.encode_answers([" ".join(["word1"] * 4)], 5) == [[vocabulary["word1"]] * 4 + [end]]


def test_roberta_reads_no_more_than_its_positions_allow():
    backbone = make_backbone("roberta")
    assert backbone.max_positions() == 127  # padding takes position 0
    slm = make_slm("roberta", max_length=127)
    slm.learn(toy_task("sea"), epochs=1)
    assert slm.predict([" ".join(["sea1"] * 300)])[0].truncated
    with pytest.raises(InputError, match=r"max_length: expected 4..127"):
        make_slm("roberta", max_length=128)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_long_text_is_cut_as_if_it_had_been_read_whole(name):
    backbone, tokenizer = make_backbone(name), make_tokenizer(name)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"] if name == "llama" else []
    texts = ["sea1 farm2 " * 3000, "sea1" + " " * 30_000 + "farm1", "sea1 " * 500 + "x" * 50_000 + " farm1", "sea2"]
    for length in (7, 64, 800):
        rows, cut = backbone.tokenization.tokenize(texts, length)
        whole = [tokenizer(text, truncation=True, max_length=length - len(newline))["input_ids"] for text in texts]
        assert rows == [row + newline for row in whole]
        assert cut == [True, False, length < 500, False]
