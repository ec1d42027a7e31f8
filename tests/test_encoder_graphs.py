"""Passes of encoders as CUDA graphs: same answers as without, also after tasks change, and few batch shapes."""

from __future__ import annotations

import pytest
import torch
from models import (
    farm_and_sea,
    learned,
    make_slm,
    mixed_texts,
    on_gpu,
    one_thread,  # noqa: F401
)
from recorder import Counted, Recorder, cannot_be_captured

from slm_fast import PredictOptions, ScalableLM, encoder_graphs, query
from slm_fast.batching import few_shapes, length_buckets
from slm_fast.data import Row
from slm_fast.predict import answer
from slm_fast.windows import windows_of

ENCODERS = ("bert", "roberta")


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    """Record passes as a GPU captures them, and pool queries by the code path of a GPU."""
    found = Recorder()
    monkeypatch.setattr(encoder_graphs, "graphs_on", lambda device: found)
    monkeypatch.setattr(query, "_columns", lambda hidden, mask: (None, [slice(hidden.shape[1])]))
    return found


def known(name: str) -> ScalableLM:
    slm = make_slm(name)
    farm_and_sea(slm)
    return slm


def same(got: list, want: list) -> None:
    for one, other in zip(got, want, strict=True):
        assert (one.task, one.label, one.route.slots) == (other.task, other.label, other.route.slots)
        assert one.score == pytest.approx(other.score, abs=1e-5)
        assert one.route.weights == pytest.approx(other.route.weights, abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"task": "farm"}, {"head": "winner"}, {"abstain": 0.9}, {"bare": True}])
@pytest.mark.parametrize("name", ENCODERS)
def test_captured_passes_give_the_same_answers(name, options, recorder, monkeypatch):
    texts = mixed_texts(60)
    slm = known(name)
    found = slm.predict(texts, batch_size=5, **options)
    assert 0 < recorder.captured < recorder.replayed
    with monkeypatch.context() as patch:
        patch.setattr(encoder_graphs, "graphs_on", lambda device: None)
        same(found, known(name).predict(texts, batch_size=5, **options))


def test_tasks_that_come_and_go_are_seen(recorder, monkeypatch):
    texts, slm = mixed_texts(40), known("bert")
    before = slm.predict(texts, batch_size=5)
    farm = learned(slm, "farm")
    slm.forget("farm")
    captured = recorder.captured
    assert {answer.task for answer in slm.predict(texts, batch_size=5)} == {"sea"}
    assert recorder.captured > captured
    slm.add([farm])
    same(slm.predict(texts, batch_size=5), before)


@pytest.mark.parametrize("when", ["waits", "capture"])
def test_where_a_pass_cannot_be_captured_rows_are_answered_all_the_same(when, recorder, monkeypatch):
    slm, texts = known("bert"), mixed_texts(20)
    cannot_be_captured(slm.model.backbone.model, recorder, when)
    with pytest.warns(UserWarning, match=r"passes without CUDA graphs, which are slower: .* waits for the device$"):
        found = slm.predict(texts, batch_size=5)
    assert (recorder.tried, recorder.replayed) == (1, 0)
    with monkeypatch.context() as patch:
        patch.setattr(encoder_graphs, "graphs_on", lambda device: None)
        same(found, known("bert").predict(texts, batch_size=5))


def test_no_more_shapes_are_kept_than_said(recorder, monkeypatch):
    monkeypatch.setattr(encoder_graphs, "MOST_SHAPES", 2)
    slm, texts = known("bert"), mixed_texts(20)
    for rows in (2, 3, 2, 3, 4, 3, 2):  # the first pass is not captured
        slm.predict(texts[:rows], batch_size=rows)
    assert recorder.captured == 4  # 3, 2, 4, and 2 again: it was least recently used when 4 came
    assert len(encoder_graphs._graphs[slm.model].met) == 2


def test_rows_are_cut_into_batches_of_few_shapes():
    lengths = [1 + i * i % 250 for i in range(5000)]
    batches = length_buckets(lengths, 8192, few=True)
    assert sorted(i for batch in batches for i in batch) == list(range(5000))
    shapes = [(len(batch), max(lengths[i] for i in batch)) for batch in batches]
    assert all(few_shapes(rows, 1)[0] * few_shapes(1, columns)[1] <= 8192 for rows, columns in shapes)
    assert all(few_shapes(rows, 1)[0] == rows for rows, _ in shapes[:-1])
    assert len({few_shapes(*shape) for shape in shapes}) <= 17
    for number in range(1, 3000):
        rows, columns = few_shapes(number, number)
        assert 0 <= rows - number <= number / 4
        assert 0 <= columns - number < max(16, number / 8)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("name", ENCODERS)
def test_a_gpu_replays_what_it_computes_pass_by_pass(name, monkeypatch):
    texts, before = mixed_texts(200), Counted.replayed

    found = []
    for kind in (Counted, lambda device: None):
        monkeypatch.setattr(encoder_graphs, "graphs_on", kind)
        found.append(on_gpu(name).predict(texts, batch_size=8))
    assert Counted.replayed > before + 5
    same(*found)


@needs_gpu  # on a CPU the operators check for numbers that are not finite
def test_a_row_that_is_not_a_number_takes_no_other_with_it():
    slm, texts = on_gpu("bert"), mixed_texts(40)
    before = slm.predict(texts, batch_size=8)
    word = texts[3].split()[0]
    vocabulary = slm.model.backbone.tokenizer.get_vocab()
    slm.model.backbone.model.get_input_embeddings().weight.data[vocabulary[word]] = torch.nan
    [after] = answer(slm.model, windows_of(map(Row, texts), None), PredictOptions(batch_size=8))
    assert encoder_graphs._graphs[slm.model].met
    spoiled = [word in text.split() for text in texts]
    assert 0 < sum(spoiled) < len(texts)
    for text_is, old, new in zip(spoiled, before, after, strict=True):
        if text_is:
            assert str(new) == "its query holds a number that is not finite"
        else:
            assert (new.label, new.route.slots) == (old.label, old.route.slots)
