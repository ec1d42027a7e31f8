"""Model types outside the table of families: adapted by their structure with a warning, or refused in one line."""

from __future__ import annotations

import pytest
import torch
import transformers
from models import (
    KNOWN,
    farm_and_sea,
    make_model,
    make_slm,
    make_tokenizer,
    mixed_texts,
    one_thread,  # noqa: F401
)
from torch import nn

from slm_fast import InputError, ScalableLM
from slm_fast.backbone import Backbone


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "gpt_neox",
            r"model type 'gpt_neox' is not in the table of families. By its structure these linear layers of "
            r"gpt_neox.layers are adapted: attention.query_key_value, attention.dense, mlp.dense_h_to_4h, "
            r"mlp.dense_4h_to_h; answers are written by transformers' generate$",
        ),
        ("opt", r"model.decoder.layers are adapted: .*self_attn.out_proj \(and these are not: fc1, fc2\); answers"),
        ("deberta", r"encoder.layer are adapted: .* \(and these are not: attention.self.pos_proj, .*pos_q_proj\)$"),
        ("pegasus", r"layers of model.encoder.layers and model.decoder.layers are adapted: .*, encoder_attn.out_proj;"),
    ],
)
def test_what_is_adapted_is_said_once_when_the_model_is_given(name, said):
    with pytest.warns(UserWarning, match=said) as caught:
        slm = make_slm(name)
    assert len([w for w in caught if "structure" in str(w.message)]) == 1
    words = slm.model.backbone.family.words
    assert slm.model.config.targets == tuple(words)
    assert {module.split(".", 4 if name in ("opt", "pegasus") else 3)[-1] for module in slm.model.modules} == set(words)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("albert", "its layers do not each run once and in order on the batch's tokens"),
        ("fnet", "padding changes a row's output"),
        ("longformer", "its layers do not each run once and in order on the batch's tokens"),
        ("ibert", "its layers have no linear layers with inputs .B, T, I."),
    ],
)
def test_what_cannot_be_adapted_safely_is_refused_in_one_line(name, why):
    said = (
        f"model type '{name}' is not in the table of families, and {why}; use a model of the table .docs/families.md.$"
    )
    with pytest.raises(InputError, match=said) as caught:
        make_slm(name)
    assert "\n" not in str(caught.value)


def test_a_model_without_the_layers_that_it_calls_is_refused_in_one_line():
    model = make_model("gpt_neox")
    model.gpt_neox.layers[1].attention.dense = nn.Linear(7, 32)
    with pytest.raises(InputError, match=r"and a pass of a small batch fails: mat1 and mat2.*; use a model") as caught:
        ScalableLM.from_backbone(model, tokenizer=make_tokenizer("gpt_neox"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "distilbert", "modernbert"])
@pytest.mark.filterwarnings("ignore:backbone. model type")
def test_a_model_loads_from_a_folder_and_may_be_given_twice(name, tmp_path):
    make_model(name).save_pretrained(tmp_path)
    make_tokenizer(name).save_pretrained(tmp_path)
    slm = ScalableLM.from_backbone(str(tmp_path))
    assert slm.model.backbone.kind == KNOWN[name][0]
    farm_and_sea(slm)
    texts = mixed_texts(4)
    expected = slm.predict(texts, max_new_tokens=3)
    again = ScalableLM.from_backbone(slm.model.backbone.model, tokenizer=make_tokenizer(name))
    assert again.model.modules == slm.model.modules
    assert again.model.widths == slm.model.widths
    assert again.model.backbone.fingerprint == slm.model.backbone.fingerprint
    farm_and_sea(again)
    assert again.predict(texts, max_new_tokens=3) == expected
    assert slm.predict(texts, max_new_tokens=3) == expected


@pytest.mark.filterwarnings("ignore:backbone. model type")
def test_targets_of_what_is_found_are_the_names_of_its_layers():
    slm = make_slm("gpt_neox", targets=("attention.dense",))
    assert slm.model.modules == [f"gpt_neox.layers.{i}.attention.dense" for i in (1, 2)]
    with pytest.raises(InputError, match=r"targets: 'query' matches no layer; choose from attention.query_key_value, "):
        make_slm("gpt_neox", targets=("query",))


def test_a_model_whose_experts_are_linear_layers_keeps_them_as_they_are():
    """A ModuleList of experts is not the list of layers, and the experts' inputs are not [B, T, I]."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(32, 32) for _ in range(3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = x.flatten(0, 1)
            return torch.stack([expert(flat) for expert in self.experts]).sum(0).view_as(x)

    model = make_model("gpt_neox")
    for layer in model.gpt_neox.layers:
        layer.mlp = Experts()
    with pytest.warns(UserWarning, match=r"attention.dense \(and these are not: mlp.experts.0, mlp.experts.1, mlp.exp"):
        backbone = Backbone(model, make_tokenizer("gpt_neox"), "")
    assert backbone.family.words == ["attention.query_key_value", "attention.dense"]


def test_other_kinds_of_models_are_refused_with_what_is_supported():
    model = transformers.ViTModel(transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(InputError, match=r"'vit' is not supported; supported: bert, .*gpt2, and other language models"):
        ScalableLM.from_backbone(model, tokenizer=make_tokenizer("bert"))
