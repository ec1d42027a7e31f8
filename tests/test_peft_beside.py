"""Files beside an adapter: damaged ones are named in one line, and what is imported can be read from a store again."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import one_line, slm_fast
from models import make_model, make_slm, make_tokenizer, one_thread  # noqa: F401
from peft_adapters import edit, texts, write_adapter
from safetensors.torch import load_file, save_file

from slm_fast import InputError, SlmError, WorkError
from slm_fast.errors import SlmWarning
from slm_fast.store import Store

AGAIN = "; save the adapter again, or download it again"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter of a LLaMA, and one with a head of a BERT."""
    found = {}
    for name, labels in (("llama", None), ("bert", 3)):
        found[name] = tmp_path_factory.mktemp(name)
        write_adapter(found[name], name, labels=labels)
    return found


def content(value: Any) -> Callable[[Path], object]:
    return lambda file: file.write_text(value if isinstance(value, str) else json.dumps(value))


def raw(data: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(data)


def labels(last: object) -> dict[str, dict[str, object]]:
    return {"id2label": {"0": "a", "1": "b", "2": last}}


TEMPLATE, SETTINGS, OWN, CONFIG = "chat_template.jinja", "generation_config.json", "slm_fast.json", "config.json"


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("tokenizer.json", content({"model": [1]}), "is not as the tokenizers library writes it" + AGAIN),
        ("tokenizer.json", content({"model": "bpe"}), "is not as the tokenizers library writes it"),
        ("tokenizer.json", content({"model": {"vocab": [1, 2]}}), "is not as the tokenizers library writes it"),
        ("tokenizer.json", content({"added_tokens": [{"content": "a"}]}), "is not as the tokenizers library writes it"),
        ("tokenizer.json", content({"added_tokens": {"a": 1}}), "is not as the tokenizers library writes it"),
        ("vocab.json", content([1]), "expected a JSON object, got list" + AGAIN),
        ("vocab.json", content({"yes": "1"}), "token 'yes' has id 1, the backbone has id "),
        ("added_tokens.json", content("{"), "cannot be read: "),
        ("vocab.txt", raw("\u00e4".encode("latin-1")), "cannot be read: "),
        (TEMPLATE, raw("{{ 1 }}".encode("utf-16")), "cannot be read: "),
        (TEMPLATE, raw("\u00e4".encode("latin-1")), "cannot be read: "),
        (TEMPLATE, content("{{ raise_exception('no system turns') }}"), "no system turns; mend the template"),
        (TEMPLATE, content("{% if %}"), "chat_template: cannot write the turns: "),
        (TEMPLATE, content("{# nothing #}"), "chat_template: writes nothing for these turns; mend the template"),
        (TEMPLATE, content("chatml"), "chat_template: writes the same for every text, without its words; mend the"),
        (SETTINGS, content({"eos_token_id": [2, 10**6]}), "eos_token_id: 1000000, the backbone has "),
        (SETTINGS, content({"eos_token_id": -1}), "eos_token_id: expected ids of tokens, got -1"),
        (SETTINGS, content({"eos_token_id": True}), "eos_token_id: expected ids of tokens, got True"),
        (SETTINGS, content({"eos_token_id": [1, "a"]}), "eos_token_id: expected ids of tokens, got [1, 'a']"),
        (SETTINGS, content([1]), "expected a JSON object, got list" + AGAIN),
        (OWN, content({"prompt": "weird"}), "prompt: expected 'plain' or 'separator', got 'weird'"),
        (OWN, content({"prompt": 3}), "prompt: expected 'plain' or 'separator', got 3"),
        (OWN, content({"labels": [1, 2]}), "labels: expected"),
        (OWN, content({"labels": "abc"}), "labels: expected"),
        (OWN, content({"labels": 3}), "labels: expected"),
        (CONFIG, content(labels("c\u0001d")), "holds a control character"),
        (CONFIG, content(labels("x" * 5000)), "expected at most 1,000 characters, got 5,000"),
        (CONFIG, content(labels("")), "id2label: expected words, got"),
        (CONFIG, content(labels(["q"])), "id2label: expected words, got"),
        (CONFIG, content(labels("\ud800")), "id2label: expected words, got"),
    ],
)
def test_a_damaged_file_is_named_and_nothing_is_imported(
    adapters: dict[str, Path], tmp_path: Path, file: str, change: Callable[[Path], object], said: str
) -> None:
    name = "bert" if file == CONFIG else "llama"
    adapter, slm = Path(shutil.copytree(adapters[name], tmp_path / "adapter")), make_slm(name)
    slm.save_pretrained(tmp_path / "store")
    change(adapter / file)
    with pytest.raises(SlmError) as caught:
        slm.import_adapter(adapter, "sky", texts("sky"))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(adapter) in str(caught.value)
    assert slm.tasks == []
    assert Store.open(tmp_path / "store").files == {}


def test_labels_that_are_numbers_become_words(adapters: dict[str, Path], tmp_path: Path) -> None:
    adapter, slm = Path(shutil.copytree(adapters["bert"], tmp_path / "adapter")), make_slm("bert")
    content(labels(7))(adapter / CONFIG)
    slm.import_adapter(adapter, "sky", texts("sky"))
    assert slm.learned["sky"].labels == ("a", "b", "7")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.int8, torch.float8_e4m3fn])
def test_weights_that_are_no_floating_point_numbers_are_refused(
    adapters: dict[str, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    adapter, slm = Path(shutil.copytree(adapters["llama"], tmp_path / "adapter")), make_slm("llama")
    file = adapter / "adapter_model.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in load_file(file).items()}, file)
    word = str(dtype).removeprefix("torch.")
    with pytest.raises(
        InputError, match=f"lora_A.weight: expected numbers in float16, bfloat16 or float32, got {word}"
    ):
        slm.import_adapter(adapter, "sky", texts("sky"))


@pytest.mark.parametrize(
    "file", ["model.fp16.safetensors", "consolidated.safetensors", "model-00001-of-00002.safetensors", "model.q4.gguf"]
)
def test_a_full_model_beside_an_adapter_is_named(adapters: dict[str, Path], tmp_path: Path, file: str) -> None:
    adapter = Path(shutil.copytree(adapters["llama"], tmp_path / "adapter"))
    (adapter / "training_args.bin").write_bytes(b"")  # what a trainer leaves beside an adapter is no model
    make_slm("llama").import_adapter(adapter, "sky", texts("sky"))
    (adapter / file).write_bytes(b"")
    with pytest.raises(InputError, match=rf"holds a full model \({file}\) and an adapter"):
        make_slm("llama").import_adapter(adapter, "sky", texts("sky"))


def test_a_text_that_a_chat_template_refuses_does_not_fail_the_others(
    adapters: dict[str, Path], tmp_path: Path
) -> None:
    adapter, slm = Path(shutil.copytree(adapters["llama"], tmp_path / "adapter")), make_slm("llama")
    refusing = "{% if 'tractor' in messages[0].content %}{{ raise_exception('no tractors') }}{% endif %}"
    (adapter / "chat_template.jinja").write_text(refusing + "{{ messages[0].content }} :")
    slm.import_adapter(adapter, "sky", [text for text in texts("sky", 40) if "tractor" not in text])
    slm.save_pretrained(tmp_path / "store")
    for name, part in (("base", make_model("llama")), ("base", make_tokenizer("llama"))):
        part.save_pretrained(tmp_path / name)
    lines = "".join(
        json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(["a cloud", "a tractor", "rain"])
    )
    done = slm_fast("predict", tmp_path / "store", "--backbone", tmp_path / "base", "--max-new-tokens", 3, stdin=lines)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["id"] for answer in answers] == [0, 1, 2]
    assert answers[1]["error"] == "task 'sky': chat_template: cannot write the turns: no tractors"
    alone = [slm.predict([text], max_new_tokens=3)[0] for text in ("a cloud", "rain")]
    assert [answers[0]["text"], answers[2]["text"]] == [answer.text for answer in alone]


def test_a_check_in_another_dtype_asks_for_float32(adapters: dict[str, Path], tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "base")
    make_tokenizer("llama").save_pretrained(tmp_path / "base")
    examples = tmp_path / "examples.jsonl"
    examples.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts("sky")))
    given = ("--adapter", adapters["llama"], "--name", "sky", "--examples", examples, "--check")
    done = slm_fast("import", tmp_path / "store", "--backbone", tmp_path / "base", *given, "--dtype", "bfloat16")
    one_line(done, 2, "compares in float32, and the backbone is in bfloat16; check with", "float32")


def test_an_adapter_of_another_base_of_the_same_shapes_is_told_of(adapters: dict[str, Path], tmp_path: Path) -> None:
    adapter, slm = Path(shutil.copytree(adapters["llama"], tmp_path / "adapter")), make_slm("llama")
    slm.model.backbone.name = "here/llama"
    edit(adapter, lambda config: config.update(base_model_name_or_path="there/mistral"))
    with pytest.warns(SlmWarning, match="was trained on 'there/mistral', and answers here with 'here/llama'"):
        slm.import_adapter(adapter, "sky", texts("sky"))
    edit(adapter, lambda config: config.update(base_model_name_or_path="/home/someone/llama"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlmWarning)  # a path elsewhere says nothing about the base
        slm.import_adapter(adapter, "rain", texts("rain"))


@pytest.mark.parametrize(("name", "file"), [("llama", "vocab.json"), ("bert", "vocab.txt")])
def test_a_vocabulary_in_an_older_format_is_compared_with_the_backbones(
    adapters: dict[str, Path], tmp_path: Path, name: str, file: str
) -> None:
    adapter, slm = Path(shutil.copytree(adapters[name], tmp_path / "adapter")), make_slm(name)
    words = {word: i for word, i in make_tokenizer(name).get_vocab().items() if word != "\n"}

    def write() -> None:
        lines = "".join(word + "\n" for word in sorted(words, key=words.__getitem__))
        (adapter / file).write_text(json.dumps(words) if file == "vocab.json" else lines)

    write()
    (adapter / "added_tokens.json").write_text(json.dumps({"yes": words["yes"]}))
    slm.import_adapter(adapter, "sky", texts("sky"))
    (adapter / "added_tokens.json").write_text(json.dumps({"<tool>": 400}))
    said = r"added_tokens\.json: token '<tool>' has id 400, the backbone has no such token; .*, delete the file$"
    with pytest.raises(InputError, match=said):
        slm.import_adapter(adapter, "rain", texts("rain"))
    (adapter / "added_tokens.json").unlink()
    words["yes"], words["no"] = words["no"], words["yes"]
    write()
    said = (
        rf"{file}: token '(yes|no)' has id \d+, the backbone has id \d+; the adapter is for another vocabulary: open "
    )
    with pytest.raises(InputError, match=said):
        slm.import_adapter(adapter, "rain", texts("rain"))
    make_tokenizer(name).save_pretrained(adapter)  # transformers reads this file only
    slm.import_adapter(adapter, "rain", texts("rain"))


def test_a_vocabulary_that_is_not_read_is_told_of(adapters: dict[str, Path], tmp_path: Path) -> None:
    adapter, slm = Path(shutil.copytree(adapters["llama"], tmp_path / "adapter")), make_slm("llama")
    (adapter / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.warns(SlmWarning, match=r"^tokenizer\.model: not compared with the backbone's vocabulary; a tokenizer"):
        slm.import_adapter(adapter, "sky", texts("sky"))
    make_tokenizer("llama").save_pretrained(adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlmWarning)
        slm.import_adapter(adapter, "rain", texts("rain"))


def test_few_examples_are_told_of_only_once_the_adapter_is_read(adapters: dict[str, Path], tmp_path: Path) -> None:
    adapter, slm = Path(shutil.copytree(adapters["llama"], tmp_path / "adapter")), make_slm("llama")
    with pytest.warns(SlmWarning, match="examples: got 3; about 50"):
        slm.import_adapter(adapter, "sky", texts("sky", 3))
    (adapter / "generation_config.json").write_text('{"eos_token_id": -1}')
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlmWarning)
        with pytest.raises(WorkError, match="eos_token_id"):
            slm.import_adapter(adapter, "rain", texts("rain", 3))
