"""Text generation with continuous batching: a row's text does not depend on the other rows of its batch."""

from __future__ import annotations

import gc
import math
import random
import weakref

import pytest
import torch
from models import (
    BACKBONES,
    GENERATORS,
    WRITERS,
    farm_and_sea,
    make_model,
    make_slm,
    make_tokenizer,
    merge,
    mixed_texts,
    one_thread,  # noqa: F401
    sentence,
)

from slm_fast import ScalableLM, WorkError, generate, kv_cache, passes
from slm_fast.data import Row
from slm_fast.errors import NOT_FINITE
from slm_fast.options import PredictOptions
from slm_fast.scheduler import row_seed
from slm_fast.tasks import LearnedTask


def alone(name: str, tasks: list[LearnedTask], text: str, route, model=None, seed: int = 0, **options) -> str:
    """Text that plain transformers generates for one row with its route's increments merged into the weights."""
    tokenizer, causal = make_tokenizer(name), BACKBONES[name][0] == "causal"
    ids = tokenizer(text)["input_ids"] + (tokenizer("\n", add_special_tokens=False)["input_ids"] if causal else [])
    merged = merge(model or make_model(name), tasks, route)
    torch.manual_seed(seed)
    inputs = torch.tensor([ids])
    pad = 2 if causal else 0
    out = merged.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), pad_token_id=pad, **options)
    return tokenizer.decode(out[0, len(ids) if causal else 1 :], skip_special_tokens=True).strip()


def end_early(slm: ScalableLM, texts: list[str]) -> list[int]:
    """Make some tokens of the current answers end tokens, so that answers get many lengths; returns all end tokens."""
    tokenizer, ends = slm.model.backbone.tokenizer, slm.model.backbone.end_tokens().tolist()
    for i, answer in enumerate(slm.predict(texts[:6], max_new_tokens=12)):
        words = tokenizer(answer.text, add_special_tokens=False)["input_ids"]
        ends += words[2 * i : 2 * i + 1]
    slm.model.backbone.model.generation_config.eos_token_id = ends
    return ends


def count_passes(slm: ScalableLM) -> list[int]:
    """A list of the number of rows in each pass through the last layer from now on."""
    family, model = slm.model.backbone.family, slm.model.backbone.model
    seen: list[int] = []
    last = model.get_submodule(family.upper or family.layers)[-1]
    last.register_forward_hook(lambda _, args, kwargs, out: seen.append(len(args[0])), with_kwargs=True)
    return seen


@pytest.mark.parametrize("name", WRITERS)
def test_rows_that_take_turns_write_what_each_does_alone_with_merged_weights(name):
    slm = make_slm(name)
    tasks = farm_and_sea(slm)
    texts = mixed_texts(24)
    first = slm.predict(texts, batch_size=1, max_new_tokens=9)
    assert {answer.task for answer in first} == {"farm", "sea"}
    expected = [
        alone(name, tasks, text, answer.route, max_new_tokens=9) for text, answer in zip(texts, first, strict=True)
    ]
    for at_once in (1, 3, 8, 64):
        answers = slm.predict(texts, batch_size=at_once, max_new_tokens=9)
        assert [answer.text for answer in answers] == expected
        for answer, one in zip(answers, first, strict=True):
            assert answer.route.slots == one.route.slots
            assert answer.route.weights == pytest.approx(one.route.weights, abs=1e-5)


@pytest.mark.parametrize("name", GENERATORS)
def test_rows_that_have_ended_are_not_computed_any_more(name):
    slm = make_slm(name)
    farm_and_sea(slm)
    texts = mixed_texts(20)
    ends = end_early(slm, texts)
    seen = count_passes(slm)
    written: list[list[int]] = []
    write = passes.generate

    def kept(*args, **options):
        found = write(*args, **options)
        written.extend(found.tokens)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "generate", kept)
        slm.predict(texts, batch_size=6, max_new_tokens=12)
    lengths = [len(words) for words in written]
    assert len(set(lengths)) > 2  # some end early
    assert sum(seen) == sum(lengths)  # the prefill computes each row's first token
    assert max(seen) == 6
    assert len(seen) < math.ceil(20 / 6) * 12  # waiting rows join before the slowest row has ended
    assert not any(set(words[:-1]) & set(ends) for words in written)


def test_columns_move_when_the_buffer_is_full_or_a_prompt_is_too_long_and_nothing_changes():
    slm = make_slm("llama")
    tasks = farm_and_sea(slm)
    moves: list[int] = []
    move = kv_cache.Decoder._move

    def spied(self, by):
        moves.append(by)
        move(self, by)

    rng = random.Random(3)
    texts = [sentence("sea", rng, words=n) for n in (1, 2, 1, 2, *(28 + i % 4 for i in range(20)))]
    ends = end_early(slm, texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache.Decoder, "_move", spied)
        # Short prompts first, so that longer ones join later.
        patch.setattr(generate, "sorted", lambda rows, key=int: sorted(rows, key=lambda i: -key(i)), raising=False)
        answers = slm.predict(texts, batch_size=3, max_new_tokens=20)
    assert min(moves) < 0 < max(moves)
    for text, answer in zip(texts, answers, strict=True):
        assert answer.text == alone("llama", tasks, text, answer.route, max_new_tokens=20, eos_token_id=ends)


@pytest.mark.parametrize("name", GENERATORS)
def test_what_is_sampled_for_a_row_depends_on_its_number_alone(name):
    slm = make_slm(name)
    tasks = farm_and_sea(slm)
    texts = mixed_texts(14)
    options = {"sample": True, "temperature": 1.4, "top_p": 0.8, "max_new_tokens": 7, "seed": 5}
    answers = slm.predict(texts, batch_size=14, **options)
    generation = {"do_sample": True, "top_k": 0, "temperature": 1.4, "top_p": 0.8, "max_new_tokens": 7}
    for i, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        assert answer.text == alone(name, tasks, text, answer.route, seed=row_seed(5, i), **generation)
    for batch_size in (1, 4):
        assert [a.text for a in slm.predict(texts, batch_size=batch_size, **options)] == [a.text for a in answers]
    assert [a.text for a in slm.predict_stream(iter(texts), batch_size=5, **options)] == [a.text for a in answers]
    beside = slm.predict([*texts[:7], *mixed_texts(7, seed=9)], batch_size=14, **options)
    assert [a.text for a in beside[:7]] == [a.text for a in answers[:7]]


def test_nearby_seeds_share_no_samples():
    seeds = [row_seed(seed, row) for seed in range(-20, 20) for row in range(500)]
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)  # a generator on a CPU takes 32 bits
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("name", GENERATORS)
def test_buffers_are_given_back_when_all_is_written(name):
    slm = make_slm(name)
    farm_and_sea(slm)
    made: list[weakref.ref] = []
    init = kv_cache.KVCacheLayer.__init__

    def noted(self, *args, **options):
        init(self, *args, **options)
        made.append(weakref.ref(self))

    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kv_cache.KVCacheLayer, "__init__", noted)
            slm.predict(mixed_texts(6), batch_size=3, max_new_tokens=5)
        assert made
        assert [buffer for buffer in made if buffer() is not None] == []
    finally:
        gc.enable()


@pytest.mark.parametrize("name", GENERATORS)
def test_the_route_is_found_once_a_row_whatever_the_length_of_its_text(name):
    slm = make_slm(name)
    farm_and_sea(slm)
    routed: list[int] = []
    find = slm.model.route
    slm.model.route = lambda query, *args, **options: routed.append(len(query)) or find(query, *args, **options)
    slm.predict(mixed_texts(20), batch_size=6, max_new_tokens=12)
    assert sum(routed) == 20


@pytest.mark.parametrize("name", GENERATORS)
def test_a_checkpoints_own_way_of_writing_is_kept(name):
    """With a setting that the generation loop does not support, transformers' `generate` is used."""
    model = make_model(name)
    model.generation_config.repetition_penalty = 1.8
    slm = ScalableLM.from_backbone(model, tokenizer=make_tokenizer(name))
    tasks = farm_and_sea(slm)
    texts = mixed_texts(10)
    penalised = make_model(name)
    penalised.generation_config.repetition_penalty = 1.8
    answers = slm.predict(texts, batch_size=4, max_new_tokens=8)
    for text, answer in zip(texts, answers, strict=True):
        assert answer.text == alone(name, tasks, text, answer.route, penalised, max_new_tokens=8)
    plain = make_slm(name)
    farm_and_sea(plain)
    assert [a.text for a in plain.predict(texts, max_new_tokens=8)] != [a.text for a in answers]


def test_texts_longer_than_a_sliding_window_are_written_through_it():
    model = make_model("mistral")
    model.config.sliding_window = 8
    slm = ScalableLM.from_backbone(model, tokenizer=make_tokenizer("mistral"))
    tasks = farm_and_sea(slm)
    narrow = make_model("mistral")
    narrow.config.sliding_window = 8
    for text in ("sea1 sea2", " ".join(f"sea{i % 20}" for i in range(14))):
        (answer,) = slm.predict([text], max_new_tokens=10)
        assert answer.text == alone("mistral", tasks, text, answer.route, narrow, max_new_tokens=10)


@pytest.mark.parametrize("name", GENERATORS)
def test_attention_written_out_gives_the_same_texts(name):
    model = make_model(name)
    model.set_attn_implementation("eager")
    slm = ScalableLM.from_backbone(model, tokenizer=make_tokenizer(name))
    farm_and_sea(slm)
    fast = make_slm(name)
    farm_and_sea(fast)
    texts = mixed_texts(12)
    expected = fast.predict(texts, batch_size=4, max_new_tokens=6)
    for got, want in zip(slm.predict(texts, batch_size=4, max_new_tokens=6), expected, strict=True):
        assert got.text == want.text
        assert got.score == pytest.approx(want.score, abs=1e-5)


@pytest.mark.parametrize("name", GENERATORS)
def test_bfloat16_backbones_write_with_scores_close_to_float32(name):
    slm = ScalableLM.from_backbone(make_model(name).bfloat16(), tokenizer=make_tokenizer(name))
    farm_and_sea(slm)
    full = make_slm(name)
    farm_and_sea(full)
    texts = mixed_texts(12)
    pairs = zip(slm.predict(texts, batch_size=4, max_new_tokens=1), full.predict(texts, max_new_tokens=1), strict=True)
    close = [a.score == pytest.approx(b.score, abs=0.03) for a, b in pairs if a.route.slots == b.route.slots]
    assert len(close) > 6
    assert all(close)


@pytest.mark.parametrize("name", GENERATORS)
def test_instructions_abstaining_and_task_ids_go_with_rows_that_take_turns(name):
    slm = make_slm(name)
    farm_and_sea(slm)
    rows = [Row(text, instruction="the question :" if i % 2 else "") for i, text in enumerate(mixed_texts(11))]
    names = [("farm", "sea")[i % 2] for i in range(11)]
    for options in ({}, {"task": names}, {"abstain": 0.5}, {"abstain": 0.5, "task": names}):
        whole = slm.predict(rows, batch_size=11, max_new_tokens=5, **options)
        turns = slm.predict(rows, batch_size=2, max_new_tokens=5, **options)
        assert [(a.task, a.text, a.route.slots) for a in turns] == [(a.task, a.text, a.route.slots) for a in whole]
        if "task" in options and "abstain" not in options:
            assert [a.task for a in turns] == names


@pytest.mark.parametrize("beams", [1, 2])
def test_rows_whose_query_is_not_finite_are_named_and_the_others_written(beams):
    slm = make_slm("llama")
    farm_and_sea(slm)
    texts = mixed_texts(9)
    expected = [answer.text for answer in slm.predict(texts, max_new_tokens=5, beams=beams)]
    bad = slm.model.backbone.tokenizer.get_vocab()["word79"]
    slm.model.backbone.model.get_input_embeddings().weight.data[bad] = torch.nan
    mixed = [*texts[:4], "sea1 word79", *texts[4:], "word79"]
    encoded = slm.model.collate(slm.model.tokenize([Row(text) for text in mixed]))
    options, ended = PredictOptions(max_new_tokens=5, beams=beams), []
    written = generate.generate(slm.model, encoded, options, seeds=range(11), max_rows=4, report=ended.append)
    assert sum(ended) == 11  # every row is reported once, while the others are still being written
    assert len(ended) > 1
    assert written.failed == dict.fromkeys([4, 10], NOT_FINITE)
    assert [written.texts[4], written.texts[10]] == ["", ""]
    assert [text for i, text in enumerate(written.texts) if i not in (4, 10)] == expected
    assert written.route.slot_ids[[4, 10]].tolist() == [[-1, -1]] * 2
    with pytest.raises(WorkError, match=r"row (5|11): its query holds a number that is not finite"):
        slm.predict(mixed, max_new_tokens=5, beams=beams)
