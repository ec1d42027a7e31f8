"""A store checks its backbone's settings and tokenizer; older stores that do not record them still open."""

from __future__ import annotations

import json
import warnings

import pytest
from models import make_model, make_slm, make_tokenizer, one_thread, random_task  # noqa: F401
from tokenizers import normalizers

from slm_fast import InputError, ScalableLM
from slm_fast.errors import SlmWarning
from slm_fast.identity import settings, tokens
from slm_fast.store import Store


@pytest.fixture
def store(tmp_path):
    """A function that saves a backbone and a store, and returns one that edits a JSON file and opens the store."""

    def make(name, **config):
        make_model(name).save_pretrained(tmp_path / "m")
        make_tokenizer(name).save_pretrained(tmp_path / "m")
        ScalableLM.from_backbone(str(tmp_path / "m"), **config).save_pretrained(tmp_path / "store")

        def reopen(file="", change=lambda content: None):
            if file:
                path = tmp_path / file
                content = json.loads(path.read_text())
                change(content)
                path.write_text(json.dumps(content))
            return ScalableLM.from_pretrained(tmp_path / "store")

        return reopen

    return make


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("bert", "hidden_act", "relu", "settings.hidden_act is 'relu', store .* has 'gelu'"),
        ("bert", "layer_norm_eps", 1e-5, "settings.layer_norm_eps is 1e-05, store .* has 1e-12"),
        ("t5", "relative_attention_max_distance", 64, "settings.relative_attention_max_distance is 64"),
        ("llama", "rms_norm_eps", 1e-5, "settings.rms_norm_eps is 1e-05"),
        ("mistral", "sliding_window", None, "settings.sliding_window is None, store .* has 64"),
    ],
)
def test_a_changed_setting_is_named(name, field, value, message, store):
    with pytest.raises(InputError, match=message):
        store(name)("m/config.json", lambda content: content.update({field: value}))


def test_changed_rules_of_the_tokenizer_are_told(store):
    with pytest.raises(InputError, match="its tokenizer makes other tokens than that of store"):
        store("llama")("m/tokenizer.json", lambda content: content.update(post_processor=None))


@pytest.mark.parametrize("name", ["t5", "llama"])
@pytest.mark.parametrize(
    ("field", "value"),
    [("repetition_penalty", 5.0), ("no_repeat_ngram_size", 1), ("eos_token_id", [1, 2, 9]), ("suppress_tokens", [5])],
)
def test_what_a_checkpoint_asks_for_in_writing_is_a_setting(name, field, value, store):
    with pytest.raises(InputError, match=r"settings\.generation is .*, store .* has"):
        store(name)("m/generation_config.json", lambda content: content.update({field: value}))


@pytest.mark.parametrize(("field", "value"), [("temperature", 0.3), ("max_length", 9), ("num_beams", 4)])
def test_what_is_overruled_in_writing_is_none(field, value, store):
    store("llama")("m/generation_config.json", lambda content: content.update({field: value}))


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("tokenizer.json", "decoder", {"type": "Replace", "pattern": {"String": "e"}, "content": "b"}),
        ("tokenizer_config.json", "truncation_side", "left"),
    ],
)
def test_how_a_tokenizer_writes_and_where_it_cuts_are_told(file, field, value, store):
    with pytest.raises(InputError, match="its tokenizer makes other tokens"):
        store("t5")(f"m/{file}", lambda content: content.update({field: value}))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_model_loaded_in_float16_is_the_same(name, store, tmp_path):
    store(name)
    assert ScalableLM.from_pretrained(tmp_path / "store", dtype="float16").tasks == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("attention_dropout", 0.5), ("architectures", ["X"]), ("initializer_range", 0.1), ("use_cache", False)],
)
def test_what_decides_no_answer_may_change(field, value, store):
    store("llama")("m/config.json", lambda content: content.update({field: value}))


def test_settings_that_only_one_library_has_are_not_compared(store):
    reopen = store("llama")
    reopen("store/manifest.json", lambda content: content["model"]["settings"].update(of_tomorrow=[1, "x"]))
    reopen("store/manifest.json", lambda content: content["model"]["settings"].pop("rms_norm_eps"))


def test_a_store_that_does_not_say_opens_with_a_warning_and_says_it_from_the_next_commit_on(store, tmp_path):
    reopen = store("bert")

    def forget(content):
        for field in ("tokens", "settings"):
            del content["model"][field]

    with pytest.warns(SlmWarning, match="keeps no settings of its backbone and tokenizer"):
        slm = reopen("store/manifest.json", forget)
    slm.add(random_task(slm, "sea"))
    assert Store.open(tmp_path / "store").about["settings"] == slm.model.about["settings"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reopen()


def test_settings_survive_the_manifest_bit_for_bit():
    about = make_slm("llama").model.about
    assert json.loads(json.dumps(about)) == about


def test_the_precision_a_model_is_loaded_in_is_no_setting():
    model = make_model("llama")
    assert settings(model.half().config.to_dict(), "causal") == settings(make_model("llama").config.to_dict(), "causal")


def test_tokens_do_not_depend_on_what_the_tokenizer_did_last():
    tokenizer = make_tokenizer("bert")
    expected = tokens(tokenizer)
    tokenizer("sea1 sea2 sea3", truncation=True, max_length=4, padding="max_length")
    assert tokens(tokenizer) == expected
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert tokens(tokenizer) != expected
