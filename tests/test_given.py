"""Models and tokenizers passed in by users: supported, or refused with a one-line error that says what to pass."""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from models import (
    farm_and_sea,
    make_model,
    make_slm,
    make_tokenizer,
    mixed_texts,
    one_thread,  # noqa: F401
)
from torch import nn

from slm_fast import InputError, ScalableLM, Task, WorkError
from slm_fast.backbone import Backbone
from slm_fast.loading import located


def head_model(class_name: str, name: str):
    model = getattr(transformers, class_name)(make_model(name).config)
    model.base_model.load_state_dict(make_model(name).base_model.state_dict(), strict=False)
    return model


@pytest.mark.parametrize(
    ("class_name", "name"),
    [
        ("BertForSequenceClassification", "bert"),
        ("BertForMaskedLM", "bert"),
        ("RobertaForTokenClassification", "roberta"),
    ],
)
def test_an_encoder_below_a_head_is_the_encoder(class_name, name):
    expected = Backbone(make_model(name), make_tokenizer(name), "")
    assert Backbone(head_model(class_name, name), make_tokenizer(name), "").fingerprint == expected.fingerprint


@pytest.mark.parametrize(
    ("class_name", "name", "auto_class"),
    [
        ("LlamaModel", "llama", "AutoModelForCausalLM"),
        ("LlamaForSequenceClassification", "llama", "AutoModelForCausalLM"),
        ("T5Model", "t5", "AutoModelForSeq2SeqLM"),
        ("T5EncoderModel", "t5", "AutoModelForSeq2SeqLM"),
    ],
)
def test_a_model_that_writes_nothing_is_refused_with_the_class_that_does(class_name, name, auto_class):
    model = getattr(transformers, class_name)(make_model(name).config)
    with pytest.raises(InputError, match=rf"a {class_name} .*transformers\.{auto_class}\.from_pretrained"):
        ScalableLM.from_backbone(model, tokenizer=make_tokenizer(name))


def test_a_wrapped_model_is_the_model_inside():
    expected = Backbone(make_model("bert"), make_tokenizer("bert"), "").fingerprint
    for wrap in (nn.DataParallel, lambda model: torch.compile(model, backend="eager")):
        assert Backbone(wrap(make_model("bert")), make_tokenizer("bert"), "").fingerprint == expected


def test_what_is_no_transformers_model_is_refused_with_what_to_give():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(make_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with torch.device("meta"):
        empty = transformers.BertModel(make_model("bert").config)
    for given, message in (
        (adapted, "merge_and_unload"),
        (adapted.base_model.model, "merge_and_unload"),
        (empty, "meta device"),
        (nn.Linear(2, 2), "expected a path, a name or a transformers model, got a Linear"),
        (7, "got a int"),
        ("", "empty name"),
    ):
        with pytest.raises(InputError, match=message):
            ScalableLM.from_backbone(given, tokenizer=None if given == "" else make_tokenizer("bert"))


def test_a_tokenizer_may_be_a_path_and_nothing_else_but_a_tokenizer(tmp_path):
    make_tokenizer("bert").save_pretrained(tmp_path)
    slm = ScalableLM.from_backbone(make_model("bert"), tokenizer=tmp_path)
    assert slm.model.backbone.tokens == make_slm("bert").model.backbone.tokens
    for given, message in (
        (make_tokenizer("bert").backend_tokenizer, "wrap it"),
        (3, "got a int"),
        ("./no", "no such"),
    ):
        with pytest.raises(InputError, match=message):
            ScalableLM.from_backbone(make_model("bert"), tokenizer=given)


# Tokens


def without(name: str, *roles: str):
    tokenizer = make_tokenizer(name)
    for role in roles:
        setattr(tokenizer, role, None)
    return tokenizer


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_an_end_that_the_tokenizer_lacks_is_the_models(name):
    slm = ScalableLM.from_backbone(make_model(name), tokenizer=without(name, "eos_token"))
    assert slm.model.backbone.tokenizer.eos_token == "</s>"
    model = make_model(name)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    with pytest.raises(InputError, match=r"tokenizer: has no end token"):
        ScalableLM.from_backbone(model, tokenizer=without(name, "eos_token"))


def test_the_tokenizer_that_was_given_stays_as_it_is():
    tokenizer = make_tokenizer("llama")
    slm = ScalableLM.from_backbone(make_model("llama"), tokenizer=tokenizer)
    assert (tokenizer.pad_token, slm.model.backbone.tokenizer.pad_token) == (None, "</s>")


def test_padding_is_some_token_that_the_model_has():
    assert Backbone(make_model("bert"), without("bert", "pad_token"), "").tokenizer.pad_token == "<pad>"  # the model's
    tokenizer = make_tokenizer("llama")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    backbone = Backbone(make_model("llama"), tokenizer, "")
    assert backbone.tokenizer.pad_token == "</s>"
    rows, _ = backbone.tokenization.tokenize(["sea1 [PAD] sea2"], 16)
    assert max(rows[0]) < backbone.vocabulary


def test_tokens_beyond_the_embedding_are_refused():
    tokenizer = make_tokenizer("bert")
    tokenizer.add_tokens(["refundxyz"])
    with pytest.raises(InputError, match=r"'refundxyz'.*embedding has \d+ rows; call model.resize_token_embeddings"):
        ScalableLM.from_backbone(make_model("bert"), tokenizer=tokenizer)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_with_an_end_token_beyond_the_embedding_nothing_can_be_learned(name):
    tokenizer = make_tokenizer(name)
    tokenizer.add_special_tokens({"eos_token": "<END>"})
    slm = ScalableLM.from_backbone(make_model(name), tokenizer=tokenizer)
    with pytest.raises(InputError, match=r"its end token '<END>' has id \d+, the model's embedding has \d+ rows"):
        slm.learn(Task("sea", [("sea1", "yes"), ("sea2", "no")]))


def test_a_decoder_that_begins_with_nothing_is_refused():
    model = make_model("t5")
    model.config.decoder_start_token_id = None
    with pytest.raises(InputError, match="names no decoder_start_token_id"):
        ScalableLM.from_backbone(model, tokenizer=make_tokenizer("t5"))


def test_a_compiled_model_opens_a_store(tmp_path):
    make_slm("bert").save_pretrained(tmp_path / "store")
    compiled = torch.compile(make_model("bert"))
    slm = ScalableLM.from_pretrained(tmp_path / "store", backbone=compiled, tokenizer=make_tokenizer("bert"))
    assert slm.tasks == []


def test_a_weight_that_is_not_finite_is_named():
    model = make_model("bert")
    model.encoder.layer[1].output.dense.bias[3] = torch.nan
    with pytest.raises(
        WorkError, match=r"weight encoder\.layer\.1\.output\.dense\.bias holds a number that is not finite"
    ):
        ScalableLM.from_backbone(model, tokenizer=make_tokenizer("bert"))


# The same model passed in again


def test_a_model_that_is_given_many_times_is_adapted_once():
    model, tokenizer = make_model("llama"), make_tokenizer("llama")
    first = ScalableLM.from_backbone(model, tokenizer=tokenizer)
    names = list(model.state_dict())
    farm_and_sea(first)
    texts = mixed_texts(6)
    expected = first.predict(texts, max_new_tokens=5)
    for _ in range(30):
        again = ScalableLM.from_backbone(model, tokenizer=tokenizer)
    farm_and_sea(again)
    assert list(model.state_dict()) == names
    assert again.model.about == first.model.about
    assert sum(len(layer._forward_pre_hooks) for layer in again.model.backbone.layers) < 10
    for slm in (again, first, again):
        assert slm.predict(texts, max_new_tokens=5) == expected


def test_a_copy_of_an_adapted_model_answers_alone():
    slm = make_slm("bert")
    farm_and_sea(slm)
    copied = copy.deepcopy(slm)
    assert copied.model.lock is not slm.model.lock
    injection = copied.model._injection
    assert all(layer.adaptation is injection.adaptation for layer in injection.adaptation.layers)
    assert copied.predict(mixed_texts(4)) == slm.predict(mixed_texts(4))


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_an_adapted_model_is_saved_under_its_own_names(name, tmp_path):
    model, bare = make_model(name), make_model(name)
    ScalableLM.from_backbone(model, tokenizer=make_tokenizer(name))
    assert list(model.state_dict()) == list(bare.state_dict())
    model.save_pretrained(tmp_path)
    again, info = type(bare).from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] | info["unexpected_keys"] == set()
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), bare.parameters(), strict=True))
    changed = {key: value + 1 for key, value in bare.state_dict().items()}
    model.load_state_dict(changed)
    assert all(torch.equal(value, changed[key]) for key, value in model.state_dict().items())


def test_a_model_that_is_given_again_keeps_no_earlier_sentence_encoder():
    model, tokenizer = make_model("bert"), make_tokenizer("bert")
    slm = ScalableLM.from_backbone(model, tokenizer=tokenizer)
    for _ in range(2):
        again = ScalableLM.from_backbone(model, tokenizer=tokenizer, query="sentence", encoder="minilm")
        encoder = weakref.ref(again.model.query.encoder)
        del again
        gc.collect()
    assert encoder() is None
    assert slm.model.lock.models == [model]


def test_models_may_be_loaded_by_several_threads(tmp_path):
    make_model("t5").save_pretrained(tmp_path)
    make_tokenizer("t5").save_pretrained(tmp_path)
    with ThreadPoolExecutor(4) as several:
        found = {slm.model.backbone.fingerprint for slm in several.map(ScalableLM.from_backbone, [str(tmp_path)] * 8)}
    assert found == {make_slm("t5").model.backbone.fingerprint}


# Paths


def test_a_folder_is_kept_by_its_whole_path(tmp_path, monkeypatch):
    (tmp_path / "models" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("models/x", "./models/x", "~/models/x"):
        assert located(name) == str(tmp_path / "models" / "x")
    assert located("some/hub-name") == "some/hub-name"
    for name in ("models/y", "./y", "/y", "~/y", "a/b/c", r"models\x"):
        with pytest.raises(InputError, match="no such folder"):
            located(name)


def test_a_store_opens_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model("bert").save_pretrained("m")
    make_tokenizer("bert").save_pretrained("m")
    slm = ScalableLM.from_backbone("m")
    slm.save_pretrained("store")
    slm.learn(Task("t", [("sea1", "a"), ("farm1", "b")]), epochs=1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert ScalableLM.from_pretrained("../store").tasks == ["t"]
    (tmp_path / "m").rename(tmp_path / "n")
    with pytest.raises(InputError, match=r"no such folder; say where .* backbone= \(--backbone\)"):
        ScalableLM.from_pretrained("../store")
