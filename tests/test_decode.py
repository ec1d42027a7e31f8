"""Steps of rounded shapes, as a GPU has them captured: the same texts, and nothing baked in that changes later.

A CUDA graph replays the same kernels, on the same addresses, with the same plain numbers. What would go wrong there
goes wrong on a CPU too when the torch operators of one step are recorded and called again.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import (
    GENERATORS,
    WRITERS,
    farm_and_sea,
    make_model,
    make_slm,
    make_tokenizer,
    mixed_texts,
    one_thread,  # noqa: F401
    sentence,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from slm_fast import ScalableLM, decode
from slm_fast import generate as generate_module

aten = torch.ops.aten
# What a stream must not do while it is captured: wait for numbers, or have them brought from the host.
WAITING = (aten._local_scalar_dense.default, aten.nonzero.default, aten.lift_fresh.default, aten.equal.default)


class Recorder:
    """Captures a step as the calls of torch operators that it makes, and counts what is captured and replayed."""

    def __init__(self) -> None:
        self.captured, self.replayed = 0, 0

    def __call__(self, step: decode.Step) -> decode.Step:
        calls: list[tuple[Any, ...]] = []

        class Record(TorchDispatchMode):
            def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if operator in WAITING:
                    raise RuntimeError(f"{operator} is not permitted in a capture")
                out = operator(*args, **(kwargs or {}))
                calls.append((operator, args, kwargs or {}, out))
                return out

        with Record():
            logits = step()
        self.captured += 1

        def replay() -> Tensor:
            self.replayed += 1
            now: dict[int, Tensor] = {}  # what each tensor that a recorded call returned is this time

            def current(x: Any) -> Any:
                return now.get(id(x), x) if isinstance(x, Tensor) else x

            for operator, args, kwargs, out in calls:
                new = operator(*tree_map(current, args), **tree_map(current, kwargs))
                for old, fresh in zip(tree_leaves(out), tree_leaves(new), strict=True):
                    now[id(old)] = fresh
            return now[id(logits)]

        return replay


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    """Steps have rounded shapes, many of them, and are recorded, as a GPU's are captured."""
    found = Recorder()
    monkeypatch.setattr(decode, "capturing", lambda device: found)
    monkeypatch.setattr(decode, "COLUMNS", 8)
    return found


def exactly(name: str, write: Callable[[ScalableLM], list[Any]]) -> list[Any]:
    """What `write` gives when steps are neither rounded nor captured."""
    slm = make_slm(name)
    farm_and_sea(slm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "capturing", lambda device: None)
        return write(slm)


@pytest.mark.parametrize("at_once", [1, 3, 8])
@pytest.mark.parametrize("name", WRITERS)
def test_captured_steps_write_the_same_texts(name, at_once, recorder):
    texts = mixed_texts(20)
    options = {"batch_size": at_once, "max_new_tokens": 11}
    slm = make_slm(name)
    farm_and_sea(slm)
    answers = slm.predict(texts, **options)
    for got, want in zip(answers, exactly(name, lambda slm: slm.predict(texts, **options)), strict=True):
        assert (got.text, got.route.slots) == (want.text, want.route.slots)
        assert got.score == pytest.approx(want.score, abs=1e-5)
    assert recorder.captured > 1
    assert recorder.replayed > 2 * recorder.captured


@pytest.mark.parametrize("name", GENERATORS)
def test_captured_steps_sample_the_same_texts(name, recorder):
    texts = mixed_texts(14)
    options = {"batch_size": 5, "max_new_tokens": 9, "sample": True, "temperature": 1.4, "top_p": 0.8, "seed": 5}
    slm = make_slm(name)
    farm_and_sea(slm)
    answers = slm.predict(texts, **options)
    assert [a.text for a in answers] == [a.text for a in exactly(name, lambda slm: slm.predict(texts, **options))]
    assert recorder.replayed > recorder.captured > 1


def test_rows_that_join_later_and_columns_that_move_are_seen_by_steps_captured_before(recorder):
    """Short prompts first, so that longer ones join later and rows move to the right; back when that reads less."""
    rng = random.Random(3)
    texts = [sentence("sea", rng, words=n) for n in (1, 2, 1, 2, *(28 + i % 4 for i in range(20)))]
    options = {"batch_size": 3, "max_new_tokens": 20}
    moves: list[int] = []
    move = decode.Decoder._move

    def spied(self: decode.Decoder, by: int) -> None:
        moves.append(by)
        move(self, by)

    slm = make_slm("llama")
    farm_and_sea(slm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            generate_module, "sorted", lambda rows, key=int: sorted(rows, key=lambda i: -key(i)), raising=False
        )
        patch.setattr(decode.Decoder, "_move", spied)
        answers = slm.predict(texts, **options)
    assert min(moves) < 0 < max(moves)
    assert recorder.replayed > 2 * recorder.captured
    assert [a.text for a in answers] == [a.text for a in exactly("llama", lambda slm: slm.predict(texts, **options))]


@pytest.mark.parametrize("name", GENERATORS)
def test_where_a_step_cannot_be_captured_texts_are_written_all_the_same(name, monkeypatch):
    def refuse(step: decode.Step) -> decode.Step:
        tried.append(step)
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore lines")

    tried: list[decode.Step] = []
    monkeypatch.setattr(decode, "capturing", lambda device: refuse)
    texts = mixed_texts(12)
    slm = make_slm(name)
    farm_and_sea(slm)
    with pytest.warns(UserWarning, match=r"writing without CUDA graphs, which is slower: CUDA error: .* capturing$"):
        answers = slm.predict(texts, batch_size=4, max_new_tokens=8)
    assert len(tried) == 1
    wanted = exactly(name, lambda slm: slm.predict(texts, batch_size=4, max_new_tokens=8))
    assert [a.text for a in answers] == [a.text for a in wanted]


@pytest.mark.parametrize("captured", [False, True])
def test_a_row_that_is_no_longer_a_number_spoils_no_row_that_takes_its_place(captured, request):
    """Keys and values of an ended row are masked for the next in its place, but zero times NaN is NaN."""
    if captured:
        request.getfixturevalue("recorder")
    texts = mixed_texts(12)
    plain = make_slm("llama")
    farm_and_sea(plain)
    (first, *others) = plain.predict(texts, batch_size=2, max_new_tokens=6)
    spoilt = plain.model.backbone.tokenizer(first.text, add_special_tokens=False)["input_ids"][0]
    apart = [a.text for a in others if spoilt not in plain.model.backbone.tokenizer(a.text)["input_ids"]]
    plain.model.backbone.model.get_input_embeddings().weight.data[spoilt] = torch.nan
    texts = [text for text in texts if spoilt not in plain.model.backbone.tokenizer(text)["input_ids"]]
    after = [answer.text for answer in plain.predict(texts, batch_size=2, max_new_tokens=6)]
    assert len(apart) > 3
    assert set(apart) <= set(after)


def test_columns_are_rounded_to_few_numbers_and_by_little():
    for columns in range(1, 5000):
        assert 0 <= decode.rounded(columns) - columns < max(64, columns / 4)
    assert len({decode.rounded(columns) for columns in range(1, 4097)}) < 30


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", WRITERS)
def test_a_gpu_replays_what_it_computes_step_by_step(name, monkeypatch):
    texts = mixed_texts(20)
    slm = ScalableLM.from_backbone(make_model(name).cuda(), tokenizer=make_tokenizer(name))
    farm_and_sea(slm)
    real, replayed = decode.capturing, []

    def counted(device: torch.device) -> Callable[[decode.Step], decode.Step] | None:
        capture = real(device)
        assert capture is not None

        def captured(step: decode.Step) -> decode.Step:
            replay = capture(step)
            return lambda: replayed.append(1) or replay()

        return captured

    monkeypatch.setattr(decode, "capturing", counted)
    answers = slm.predict(texts, batch_size=6, max_new_tokens=11)
    assert len(replayed) > 20
    monkeypatch.setattr(decode, "capturing", lambda device: lambda step: step)
    steps = slm.predict(texts, batch_size=6, max_new_tokens=11)
    assert [(a.text, a.route.slots) for a in answers] == [(a.text, a.route.slots) for a in steps]
