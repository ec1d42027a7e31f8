"""Tests of the generation benchmark: each way generates the expected text and number of tokens."""

from __future__ import annotations

import sys

import pytest
import torch
from models import GENERATORS, make_model, make_tokenizer, mixed_texts, one_thread  # noqa: F401

from benchmarks.speed import generation
from benchmarks.speed.backbones import copies
from benchmarks.speed.generation import Writers, endless
from benchmarks.speed.layers import base_only, released, replace_layers
from benchmarks.tables import read_csv


def make_writers(name: str) -> Writers:
    return Writers(copies(*endless(make_model(name), make_tokenizer(name))), mixed_texts(11), batch_size=4, alone=3)


@pytest.mark.parametrize("name", GENERATORS)
def test_the_bare_model_writes_in_our_loop_what_transformers_writes(name: str) -> None:
    writers = make_writers(name)
    texts = writers.bare(9)
    assert texts == writers.transformers(9)
    assert len(set(texts)) > 1


@pytest.mark.parametrize("name", GENERATORS)
def test_a_text_has_as_many_tokens_as_are_asked_for(name: str) -> None:
    plain = make_model(name)
    ended = plain.generation_config.eos_token_id
    model, tokenizer = endless(plain, make_tokenizer(name))
    assert tokenizer.eos_token_id != ended
    assert tokenizer.eos_token_id >= model.get_output_embeddings().weight.shape[0]
    prompt = torch.tensor([[5, 6, 7]])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=60, do_sample=False)
    assert out.shape[1] == 60 + (3 if name == "llama" else 1)


@pytest.mark.parametrize("name", GENERATORS)
def test_the_papers_way_adds_increments_to_the_attention_outputs_alone(name: str) -> None:
    writers = make_writers(name)
    model = writers.paper_slm.model
    outputs = set(model.backbone.find_linears(("out",), 0))
    adapted = {layer for layer in model.modules if model.backbone.model.get_submodule(layer).way is released}
    assert adapted == outputs & set(model.modules)
    assert adapted
    assert adapted < set(model.modules)
    # With base_only in every layer, slm_fast generates what the bare model does.
    replace_layers(writers.slm, dict.fromkeys(writers.slm.model.modules, base_only))
    assert writers.slm_fast(9) == writers.bare(9)


def test_the_command_saves_a_line_for_each_way_beside_other_models(tmp_path, monkeypatch) -> None:
    model, tokenizer = make_model("llama"), make_tokenizer("llama")
    monkeypatch.setattr(generation, "pretrained", lambda *_: (model, tokenizer))
    output = tmp_path / "generation.csv"
    few = ["--rows", "10", "--batch-size", "4", "--new-tokens", "3", "--rounds", "1", "--output", str(output)]
    for layers in ("1", "2", "1"):
        monkeypatch.setattr(sys, "argv", ["generation", "--layers", layers, *few])
        assert generation.main() == 0
    rows = read_csv(output)
    assert [row["model"] for row in rows] == [
        f"llama-2-7b shape, {n} layers" for n in (2, 1) for _ in generation.TITLES
    ]
    assert [row["rows"] for row in rows if row["method"] == "paper"] == ["1", "1"]
    assert rows[0]["slm_fast_times"] == "1.0"
    assert output.with_suffix(".png").exists()
