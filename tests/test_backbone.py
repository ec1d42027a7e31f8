"""Loading backbones, their fingerprints, configuration errors, and the linear layers that target words select."""

from __future__ import annotations

import pytest
import torch
import transformers
from models import (
    BACKBONES,
    LAYERS,
    WIDTH,
    make_model,
    make_slm,
    make_tokenizer,
    one_thread,  # noqa: F401
    random_task,
    toy_task,
)
from torch import nn

from slm_fast import InputError, ScalableLM, WorkError
from slm_fast.backbone import Backbone
from slm_fast.identity import fingerprint
from slm_fast.loading import PACKAGED, resolve


def make_backbone(name: str, seed: int = 0) -> Backbone:
    return Backbone(make_model(name, seed), make_tokenizer(name), name)


@pytest.fixture
def saved(tmp_path):
    """A function that saves a tiny backbone and its tokenizer to a folder and returns its path."""

    def save(name: str, seed: int = 0):
        path = tmp_path / f"{name}-{seed}"
        make_model(name, seed).save_pretrained(path)
        make_tokenizer(name).save_pretrained(path)
        return path

    return save


# Loading


@pytest.mark.parametrize("name", ["bert", "t5-gated", "mistral"])
def test_a_backbone_loads_from_a_path_frozen_and_silent(name, saved, capfd):
    path = str(saved(name))
    capfd.readouterr()
    backbone = Backbone.load(path)
    assert backbone.kind == BACKBONES[name][0]
    assert backbone.width == WIDTH
    assert len(backbone.layers) == LAYERS
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert backbone.fingerprint == make_backbone(name).fingerprint
    assert capfd.readouterr() == ("", "")


def test_a_backbone_loads_in_bfloat16_and_is_known_by_the_same_fingerprint(saved):
    path = str(saved("llama"))
    narrow = Backbone.load(path, dtype="bfloat16")
    assert narrow.dtype == torch.bfloat16
    assert narrow.fingerprint == Backbone.load(path).fingerprint


def test_float16_is_known_by_the_same_fingerprint_and_answers_alike(saved):
    path = str(saved("llama"))
    half = Backbone.load(path, dtype="float16")
    assert half.dtype == torch.float16
    assert half.fingerprint == Backbone.load(path).fingerprint
    answers = []
    for dtype in ("float32", "float16"):
        slm = ScalableLM.from_backbone(path, dtype=dtype)
        slm._set([random_task(make_slm("llama"), topic) for topic in ("farm", "sea")])
        answers.append(slm.predict(["sea1 sea2 sea3", "farm1 farm2"], max_new_tokens=1))
    for exact, found in zip(*answers, strict=True):
        assert found.task == exact.task
        assert found.score == pytest.approx(exact.score, abs=0.02)


def test_float16_is_refused_where_it_overflows(saved):
    with pytest.raises(InputError, match="dtype: float16 overflows in t5 models; use bfloat16"):
        Backbone.load(str(saved("t5")), dtype="float16")


@pytest.mark.parametrize(("has", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bfloat16_where_the_processor_has_it(has, expected, saved, monkeypatch):
    monkeypatch.setattr("slm_fast.loading.has_bfloat16", lambda: has)
    assert Backbone.load(str(saved("bert")), dtype="auto", device="cpu").dtype == expected


def test_a_learned_task_answers_in_bfloat16_too(saved):
    slm = ScalableLM.from_backbone(str(saved("llama")), dtype="bfloat16")
    slm.learn(toy_task("sea"), epochs=1)
    assert slm.predict(["sea1 sea2 good0"], max_new_tokens=3)[0].task == "sea"


def test_the_fingerprint_tells_weights_and_vocabularies_apart():
    base = make_backbone("bert").fingerprint
    assert make_backbone("bert", seed=1).fingerprint != base
    model, tokenizer = make_model("bert"), make_tokenizer("bert")
    model.pooler = None
    assert fingerprint(model, tokenizer) == base
    tokenizer.add_tokens(["more"])
    assert fingerprint(model, tokenizer) != base
    model.encoder.layer[2].output.dense.bias += 0.5
    assert fingerprint(model, make_tokenizer("bert")) != base


def test_a_model_given_twice_keeps_its_fingerprint():
    model, tokenizer = make_model("bert"), make_tokenizer("bert")
    first = ScalableLM.from_backbone(model, tokenizer=tokenizer)
    second = ScalableLM.from_backbone(model, tokenizer=tokenizer)
    assert second.model.about == first.model.about


def test_a_refused_configuration_leaves_the_model_as_it_was():
    model, tokenizer = make_model("bert"), make_tokenizer("bert")
    before = list(model.state_dict())
    with pytest.raises(InputError, match="groups: expected a divisor of the query width 64, got 7"):
        ScalableLM.from_backbone(model, tokenizer=tokenizer, router="dtkr", groups=7)
    assert [key for key in before if not key.startswith("pooler")] == list(model.state_dict())


def test_the_packaged_minilm_is_found_and_its_weights_are_checked():
    assert resolve("minilm").endswith("model")
    assert resolve("some/hub-name") == "some/hub-name"
    assert len(PACKAGED["minilm"][2]) == 64


def test_a_backbone_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"backbone '.*missing': no such folder") as caught:
        Backbone.load(str(tmp_path / "missing"))
    assert "\n" not in str(caught.value)


def test_an_unsupported_family_is_named_with_those_supported(tmp_path):
    transformers.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"'vit' is not supported; supported: bert, .*t5, .*llama"):
        Backbone.load(str(tmp_path))


def test_damaged_weights_are_named(saved):
    path = saved("bert")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(WorkError, match=r"backbone .*bert-0.*damaged") as caught:
        Backbone.load(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("option", "value"), [("dtype", "float99"), ("dtype", "Tensor"), ("device", "abacus")])
def test_an_unknown_dtype_or_device_is_a_wrong_call(option, value, saved):
    with pytest.raises(InputError, match=f"{option}.*{value}"):
        ScalableLM.from_backbone(str(saved("bert")), **{option: value})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"query": "bert"}, "query: expected 'trunk' or 'sentence', got 'bert'"),
        ({"router": "nearest"}, "router: expected 'gaussian' or 'dtkr', got 'nearest'"),
        ({"route_on": "text"}, "route_on: expected 'input' or 'prompt', got 'text'"),
        ({"aggregate": "max"}, "aggregate: expected 'mean' or 'vote', got 'max'"),
        ({"k": 0}, "k: expected at least 1, got 0"),
        ({"k": -2, "router": "dtkr"}, "k: expected at least 1, got -2"),
        ({"taps": (0, 3)}, r"taps: expected layer numbers in 0..2, got \[0, 3\]"),
        ({"taps": (-1, 1)}, "taps: expected a layer's number from 0 on, got -1"),
        ({"first_layer": 0, "taps": (1,)}, r"first_layer: expected 1..2 \(not below the last tap\), got 0"),
        ({"first_layer": 3}, "first_layer: expected 1..2"),
        ({"targets": ("query", "gat")}, "targets: .gat. matches no layer; choose from query, key, value, out, up, d"),
        ({"max_length": 129}, "max_length: expected 4..128 for this backbone, got 129"),
        ({"max_length": 2}, "max_length: expected 4..128 for this backbone, got 2"),
        ({"kk": 3}, "kk: unknown option; options: query, router"),
        ({"query": "sentence", "encoder": "no/such-encoder"}, "encoder 'no/such-encoder': cannot be loaded"),
    ],
)
def test_an_option_that_cannot_be_right_is_named(config, message):
    with pytest.raises(InputError, match=message) as caught:
        make_slm("bert", **config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [{"targets": ()}, {"temperature": 0.0}, {"groups": 0, "router": "dtkr"}])
def test_an_option_that_would_fail_later_is_refused_at_once(config):
    with pytest.raises(InputError, match=next(iter(config))):
        make_slm("bert", **config)


def test_a_target_that_this_model_lacks_is_named():
    with pytest.raises(InputError, match="targets: 'gate' matches no layer from 1 on in this seq2seq model"):
        make_slm("t5", targets=("gate",))
    assert make_slm("t5-gated", targets=("gate",)).model.modules


def test_a_model_without_its_tokenizer_is_a_wrong_call():
    with pytest.raises(InputError, match="tokenizer: required with a backbone given as a model"):
        ScalableLM.from_backbone(make_model("bert"))


def test_a_folder_without_a_tokenizer_is_refused_though_transformers_makes_one_up(tmp_path):
    make_model("bert").save_pretrained(tmp_path / "model")
    for call in (
        lambda: Backbone.load(str(tmp_path / "model")),
        lambda: ScalableLM.from_backbone(make_model("bert"), tokenizer=str(tmp_path / "model")),
    ):
        with pytest.raises(InputError, match=r"model': has no tokenizer; save the model's own there"):
            call()


# Linear layers

SHORT = {
    "bert": {"query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
             "out": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"},
    "llama": {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
              "out": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"},
}  # fmt: skip


@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "mistral", "qwen2"])
def test_each_word_means_one_linear_of_each_layer_from_the_first_on(name):
    backbone = make_backbone(name)
    prefix, words = ("encoder.layer", SHORT["bert"]) if backbone.kind == "encoder" else ("model.layers", SHORT["llama"])
    for word, inner in words.items():
        assert backbone.find_linears([word], 1) == [f"{prefix}.{layer}.{inner}" for layer in (1, 2)]
    every = backbone.find_linears(list(words), 0)
    inside = [n for n, m in backbone.model.named_modules() if isinstance(m, nn.Linear) and n.startswith(prefix)]
    assert every == sorted(inside)


@pytest.mark.parametrize("name", ["t5", "t5-gated", "mt5"])
def test_in_a_seq2seq_model_the_whole_decoder_carries_increments_and_the_encoder_from_the_first_layer_on(name):
    backbone = make_backbone(name)
    assert backbone.find_linears(["query"], 2) == [
        "decoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.1.EncDecAttention.q",
        "decoder.block.1.layer.0.SelfAttention.q",
        "decoder.block.1.layer.1.EncDecAttention.q",
        "encoder.block.2.layer.0.SelfAttention.q",
    ]
    up = "wi" if name == "t5" else "wi_1"
    assert backbone.find_linears(["up"], 2) == [
        f"decoder.block.0.layer.2.DenseReluDense.{up}",
        f"decoder.block.1.layer.2.DenseReluDense.{up}",
        f"encoder.block.2.layer.1.DenseReluDense.{up}",
    ]
    words = ["query", "key", "value", "out", "up", "down"] + (["gate"] if name != "t5" else [])
    linears = [n for n, m in backbone.model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert backbone.find_linears(words, 0) == sorted(linears)


def test_the_fewer_key_value_heads_of_a_grouped_attention_are_seen():
    widths = make_slm("llama", targets=("query", "key", "down")).model.widths
    assert widths["model.layers.1.self_attn.q_proj"] == (32, 32)
    assert widths["model.layers.1.self_attn.k_proj"] == (32, 16)
    assert widths["model.layers.1.mlp.down_proj"] == (48, 32)
