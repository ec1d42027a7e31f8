"""Answering under torch.compile: the same answers, few graphs, and one line where it cannot be."""

from __future__ import annotations

import pytest
import torch
from models import (
    GENERATORS,
    knows,
    make_model,
    make_slm,
    make_tokenizer,
    one_thread,  # noqa: F401
    random_task,
    texts_of,
    toy_task,
)
from test_cli import one_line, slm_fast
from torch._dynamo.utils import counters

from slm_fast import InputError, ScalableLM, WorkError


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make(name: str = "bert") -> ScalableLM:
    slm = make_slm(name)
    labels = ("no", "yes") if name == "bert" else None
    return knows(slm, *(random_task(slm, topic, labels=labels) for topic in ("farm", "sea")))


def rows(seed: int, each: int = 12) -> list[str]:
    return texts_of(*(toy_task(topic, rows=each, seed=seed) for topic in ("farm", "sea")))


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_answers_are_those_of_layers_as_they_are_and_other_lengths_need_no_new_graphs():
    slm, texts = make(), rows(1)
    plain = slm.predict(texts, batch_size=3)
    assert graphs() == 0
    compiled = slm.predict(texts, batch_size=3, compile=True)
    made = graphs()
    # Layers with increments and without, and a batch padded and not.
    assert 2 <= made <= 4
    others = rows(2, 30)
    pairs = [
        (plain, compiled),
        (slm.predict(others, batch_tokens=70), slm.predict(others, batch_tokens=70, compile=True)),
    ]
    assert graphs() <= 4
    for expected, found in pairs:
        assert [(a.label, a.task, a.route.slots) for a in found] == [(a.label, a.task, a.route.slots) for a in expected]
        assert [a.score for a in found] == pytest.approx([a.score for a in expected], abs=1e-5)
    assert any(a.score != b.score for expected, found in pairs for a, b in zip(expected, found, strict=True))
    # What is asked for without it runs without it.
    assert slm.predict(texts, batch_size=3) == plain
    assert all("forward" not in vars(layer) for layer in slm.model.backbone.layers)


@pytest.mark.parametrize("name", GENERATORS)
def test_backbones_that_write_are_refused(name):
    with pytest.raises(InputError, match=r"compile: goes with encoder-only backbones, got a \w+ one"):
        make(name).predict(["sea1"], compile=True)


def test_a_missing_compiler_is_one_line_and_leaves_the_model_as_it_was():
    slm, texts = make(), rows(3)
    plain = slm.predict(texts, batch_size=3)
    missing = {"cpp.cxx": (None, "no-such-compiler"), "fx_graph_cache": False}
    with torch._inductor.config.patch(missing), pytest.raises(WorkError, match=r"compile: .*C\+\+ compiler") as caught:
        slm.predict(texts, batch_size=3, compile=True)
    assert "\n" not in str(caught.value)
    assert slm.predict(texts, batch_size=3) == plain


def test_the_command_line_answers_with_it_or_refuses_before_it_writes(tmp_path):
    for name, status in (("bert", 0), ("llama", 2)):
        folder = tmp_path / name
        slm = make(name)
        make_model(name).save_pretrained(folder / "backbone")
        make_tokenizer(name).save_pretrained(folder / "backbone")
        saved = knows(ScalableLM.from_backbone(str(folder / "backbone")), *slm.learned.values())
        saved.save_pretrained(folder / "store")
        (folder / "in.jsonl").write_text('{"text": "sea1 sea2"}\n{"text": "farm1"}\n')
        output = folder / "out.jsonl"
        done = slm_fast("predict", folder / "store", "--input", folder / "in.jsonl", "--output", output, "--compile")
        assert done.returncode == status, done.stderr
        assert output.exists() == (status == 0)
    one_line(done, 2, "compile", "encoder-only", "causal")
