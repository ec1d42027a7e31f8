"""Generation steps as CUDA graphs, with rounded shapes: same texts as without, also after rows and columns change."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import (
    GENERATORS,
    WRITERS,
    farm_and_sea,
    make_slm,
    mixed_texts,
    on_gpu,
    one_thread,  # noqa: F401
    sentence,
)
from recorder import Counted, Recorder, cannot_be_captured

from slm_fast import PredictOptions, ScalableLM, cuda_graphs, generate, kv_cache, ops
from slm_fast.data import Row
from slm_fast.predict import answer
from slm_fast.windows import windows_of


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    """Record steps of rounded shapes as a GPU captures them; rounding is fine, so that there are many shapes."""
    found = Recorder()
    monkeypatch.setattr(kv_cache, "graphs_on", lambda device: found)
    monkeypatch.setattr(kv_cache, "COLUMNS", 8)
    return found


def exactly(name: str, write: Callable[[ScalableLM], list[Any]]) -> list[Any]:
    """Result of `write` without rounding or capturing of steps."""
    slm = make_slm(name)
    farm_and_sea(slm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache, "graphs_on", lambda device: None)
        return write(slm)


@pytest.mark.parametrize("name", WRITERS)
def test_captured_steps_write_the_same_texts(name, recorder):
    texts = mixed_texts(20)
    expected = exactly(name, lambda slm: slm.predict(texts, batch_size=3, max_new_tokens=11))
    for at_once in (1, 3, 8):
        slm = make_slm(name)
        farm_and_sea(slm)
        before = recorder.captured, recorder.replayed
        answers = slm.predict(texts, batch_size=at_once, max_new_tokens=11)
        for got, want in zip(answers, expected, strict=True):
            assert (got.text, got.route.slots) == (want.text, want.route.slots)
            assert got.score == pytest.approx(want.score, abs=1e-5)
        captured, replayed = recorder.captured - before[0], recorder.replayed - before[1]
        assert captured > 1
        assert replayed > 2 * captured


@pytest.mark.parametrize("name", GENERATORS)
def test_captured_steps_sample_the_same_texts(name, recorder):
    texts = mixed_texts(14)
    options = {"batch_size": 5, "max_new_tokens": 9, "sample": True, "temperature": 1.4, "top_p": 0.8, "seed": 5}
    slm = make_slm(name)
    farm_and_sea(slm)
    answers = slm.predict(texts, **options)
    assert [a.text for a in answers] == [a.text for a in exactly(name, lambda slm: slm.predict(texts, **options))]
    assert recorder.replayed > recorder.captured > 1


def columns_move(monkeypatch) -> list[str]:
    """Let short texts be prefilled first; returns texts of which longer ones join later. Columns then move right, and
    left again when that reads less or the buffer is full."""
    monkeypatch.setattr(generate, "sorted", lambda rows, key=int: sorted(rows, key=lambda i: -key(i)), raising=False)
    rng = random.Random(3)
    return [sentence("sea", rng, words=n) for n in (1, 2, 1, 2, *(28 + i % 4 for i in range(20)))]


def test_rows_that_join_later_and_columns_that_move_are_seen_by_steps_captured_before(recorder, monkeypatch):
    texts, options = columns_move(monkeypatch), {"batch_size": 3, "max_new_tokens": 20}
    moves: list[int] = []
    move = kv_cache.Decoder._move

    def spied(self: kv_cache.Decoder, by: int) -> None:
        moves.append(by)
        move(self, by)

    slm = make_slm("llama")
    farm_and_sea(slm)
    monkeypatch.setattr(kv_cache.Decoder, "_move", spied)
    answers = slm.predict(texts, **options)
    assert min(moves) < 0 < max(moves)
    assert recorder.replayed > 2 * recorder.captured
    assert [a.text for a in answers] == [a.text for a in exactly("llama", lambda slm: slm.predict(texts, **options))]


@pytest.mark.parametrize("when", ["waits", "capture"])
@pytest.mark.parametrize("name", GENERATORS)
def test_where_a_step_cannot_be_captured_texts_are_written_all_the_same(name, when, recorder, monkeypatch):
    slm = make_slm(name)
    farm_and_sea(slm)
    cannot_be_captured(slm.model.backbone.model, recorder, when)
    texts = mixed_texts(12)
    with pytest.warns(UserWarning, match=r"writing without CUDA graphs, which is slower: .* waits for the device$"):
        answers = slm.predict(texts, batch_size=12, max_new_tokens=8)
    assert recorder.captured == recorder.replayed == 0
    assert recorder.tried == 1
    wanted = exactly(name, lambda slm: slm.predict(texts, batch_size=12, max_new_tokens=8))
    assert [a.text for a in answers] == [a.text for a in wanted]


@pytest.mark.parametrize("captured", [False, True])
def test_a_row_that_is_no_longer_a_number_spoils_no_row_that_takes_its_place(captured, request):
    """Keys and values of an ended row are masked for the next row in its place, but zero times NaN is NaN."""
    if captured:
        request.getfixturevalue("recorder")
    slm, texts = make_slm("llama"), mixed_texts(40)  # longest first: short ones join where many columns are masked
    farm_and_sea(slm)
    options = {"batch_size": 3, "max_new_tokens": 12}
    before = slm.predict(texts, **options)
    vocabulary = slm.model.backbone.tokenizer.get_vocab()
    # A word that some rows generate and others do not, and that is in no prompt.
    written = Counter(word for answer in before for word in set(answer.text.split()))
    read = {word for text in texts for word in text.split()}
    word, rows = next((w, n) for w, n in written.most_common() if w not in read and n < len(texts) - 5)
    slm.model.backbone.model.get_input_embeddings().weight.data[vocabulary[word]] = torch.nan
    [after] = answer(slm.model, windows_of(map(Row, texts), None), PredictOptions(**options))
    assert rows > 3
    for old, new in zip(before, after, strict=True):
        assert word in old.text.split() or new.text == old.text


def test_columns_are_rounded_to_few_numbers_and_by_little():
    for columns in range(1, 5000):
        assert 0 <= kv_cache.round_up(columns) - columns < max(64, columns / 4)
    assert len({kv_cache.round_up(columns) for columns in range(1, 4097)}) < 30


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("name", WRITERS)
def test_a_gpu_replays_what_it_computes_step_by_step(name, monkeypatch):
    slm, texts, before = on_gpu(name), mixed_texts(20), Counted.replayed

    class StepByStep(cuda_graphs.Graphs):
        def capture(self, step: cuda_graphs.Step) -> cuda_graphs.Step:
            return step

    found = []
    for kind in (Counted, StepByStep):
        monkeypatch.setattr(kv_cache, "graphs_on", kind)
        found.append([(a.text, a.route.slots) for a in slm.predict(texts, batch_size=6, max_new_tokens=11)])
    assert Counted.replayed > before + 20
    assert found[0] == found[1]


@needs_gpu
def test_a_gpu_that_cannot_capture_a_step_is_left_as_it_was():
    slm, texts = on_gpu("llama"), mixed_texts(8)
    stream = torch.cuda.current_stream()
    with ops.use_backend("reference"), pytest.warns(UserWarning, match="writing without CUDA graphs"):
        assert all(a.text for a in slm.predict(texts, max_new_tokens=6))  # the reference backend waits
    torch.cuda.empty_cache()
    assert torch.cuda.current_stream() == stream
