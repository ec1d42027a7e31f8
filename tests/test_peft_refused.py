"""Adapters that cannot be imported: a one-line error names the field and a remedy, and the model is unchanged."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from models import make_model, make_slm, make_tokenizer, one_thread  # noqa: F401
from peft_adapters import edit, texts, write_adapter
from safetensors.torch import load_file, save_file

from slm_fast import InputError, ScalableLM, SlmError, WorkError
from slm_fast.errors import SlmWarning
from slm_fast.integrations import peft_files
from slm_fast.integrations.peft_files import check_config, read_adapter

MERGE = "merge the adapter into its base model with PEFT's merge_and_unload, or train it without this option"
AGAIN = "; save the adapter again, or download it again"
# PEFT's methods that train virtual tokens.
VIRTUAL = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "ADAPTION_PROMPT")
QUERY = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_adapter(folder, "llama")
    return folder


@pytest.fixture(scope="module")
def slm() -> ScalableLM:
    return make_slm("llama")


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Path:
    """A copy of the adapter, for a test to modify."""
    return Path(shutil.copytree(llama, tmp_path / "adapter"))


def refused(
    slm: ScalableLM, adapter: Path | str, *parts: str, status: int = 2, examples: list[str] | None = None
) -> None:
    """Check that the import fails with a one-line error that contains `parts`, and that no task is added."""
    with pytest.raises(SlmError) as caught:
        slm.import_adapter(adapter, "sky", texts("sky") if examples is None else examples)
    said = str(caught.value)
    assert "\n" not in said
    for part in parts:
        assert part in said
    assert caught.value.status == status
    assert slm.tasks == []


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        *[("peft_type", kind, "virtual tokens, not layers; train a LoRA adapter instead") for kind in VIRTUAL],
        ("peft_type", "IA3", "expected LORA, got 'IA3'"),
        (
            "task_type",
            "TOKEN_CLS",
            "SEQ_2_SEQ_LM or FEATURE_EXTRACTION, got 'TOKEN_CLS'; train an adapter that answers",
        ),
        ("task_type", "QUESTION_ANS", "got 'QUESTION_ANS'"),
        (
            "task_type",
            "SEQ_CLS",
            "has no head, and llama models write text without; save it with modules_to_save: score",
        ),
        ("auto_mapping", {"base_model_class": "LlamaForTokenClassification"}, "train it as SEQ_CLS"),
        ("use_dora", True, "DoRA scales the columns"),
        ("use_qalora", True, "QALoRA"),
        ("use_bdlora", {"nblocks": 2}, "block-diagonal"),
        ("lora_bias", True, "biases"),
        ("bias", "all", "expected 'none', got 'all'"),
        ("bias", "lora_only", "expected 'none', got 'lora_only'"),
        ("init_lora_weights", "pissa", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "pissa_niter_4", "changed the base's weights"),
        ("init_lora_weights", "olora", "changed the base's weights"),
        ("init_lora_weights", "corda", "changed the base's weights"),
        ("init_lora_weights", "loftq", "changed the base's weights"),
        ("init_lora_weights", "lora_ga", "changed the base's weights"),
        ("loftq_config", {"loftq_bits": 4}, "LoftQ"),
        ("kasa_config", {"beta": 1e-4}, f"KaSA changes the formula; {MERGE}"),
        ("corda_config", {"corda_method": "ipm"}, f"CorDA changed the base's weights; {MERGE}"),
        ("lora_ga_config", {"direction": "ArB2r"}, f"LoRA-GA changed the base's weights; {MERGE}"),
        ("layer_replication", [[0, 2]], "repeats layers"),
        ("trainable_token_indices", [1, 2], "embeddings"),
        ("target_parameters", ["mlp.experts"], "no linear layers"),
        ("alora_invocation_tokens", [5], "some tokens only"),
        ("arrow_config", {"top_k": 2}, "import those one by one"),
        ("megatron_core", "other.core", "not known"),
        ("qalora_group_size", 32, "not known"),
        ("a_new_field", {"on": True}, "not known"),
        ("lora_alpha", "high", "expected numbers"),
        ("alpha_pattern", {"(": 3}, "no regular expression"),
        ("alpha_pattern", [3], "expected numbers by module, got [3]"),
        ("alpha_pattern", "q_proj", "expected numbers by module"),
        ("alpha_pattern", {"q_proj": True}, "expected numbers up to 1e+12, got True"),
        ("lora_alpha", None, "expected numbers up to 1e+12, got None"),
        ("lora_alpha", 10**400, "expected numbers up to 1e+12"),
        ("bias", None, "expected 'none', got None; "),
        ("init_lora_weights", "loftq", f"changed the base's weights; {MERGE}"),
        ("init_lora_weights", "mica", f"changed the base's weights; {MERGE}"),
        ("a_new_field", 0, "not known"),
        ("a_new_field", 0.0, "not known"),
    ],
)
def test_a_field_that_asks_for_more_than_lora_is_named(
    slm: ScalableLM, adapter: Path, field: str, value: object, said: str
) -> None:
    edit(adapter, lambda config: config.update({field: value}))
    refused(slm, adapter, "" if value == "SEQ_CLS" else "adapter_config.json", field, said)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("a_new_field", value) for value in (None, False, "", [], {})],
        *[("init_lora_weights", value) for value in (True, False, "gaussian", "eva", "orthogonal")],
        ("fan_in_fan_out", True),
        ("target_modules", None),
        ("megatron_core", "megatron.core"),
    ],
)
def test_a_field_that_asks_for_nothing_is_accepted(adapter: Path, field: str, value: object) -> None:
    edit(adapter, lambda config: config.update({field: value}))
    assert len(read_adapter(adapter).lora) == 9


def test_every_default_of_the_installed_peft_is_accepted() -> None:
    config = peft.LoraConfig()
    found = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    found["peft_type"] = "LORA"
    check_config(found, Path("adapter_config.json"))
    with pytest.raises(InputError, match="use_dora"):
        check_config(found | {"use_dora": True}, Path("adapter_config.json"))


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        found = load_file(folder / "adapter_model.safetensors")
        change(found)
        save_file({key: tensor.contiguous() for key, tensor in found.items()}, folder / "adapter_model.safetensors")

    return damage


def more(name: str, *shape: int) -> Callable[[Path], None]:
    return tensors(lambda found: found.update({f"base_model.model.{name}": torch.ones(*shape)}))


def halves(a: tuple[int, ...], b: tuple[int, ...]) -> Callable[[Path], None]:
    """Give one module halves of these shapes."""
    shapes = {f"{QUERY}.lora_A.weight": torch.zeros(a), f"{QUERY}.lora_B.weight": torch.zeros(b)}
    return tensors(lambda found: found.update(shapes))


def rename(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("damage", "status", "parts"),
    [
        (halves((0, 32), (32, 0)), 1, ("q_proj", "rank 0, expected at least 1", AGAIN)),
        (halves((4, 32), (32, 3)), 1, ("q_proj", "[r, I] and lora_B [O, r], got [4, 32] and [32, 3]", AGAIN)),
        (halves((4, 32), (32,)), 1, ("q_proj", "expected lora_A [r, I] and lora_B", AGAIN)),
        (halves((4, 32, 1), (32, 4)), 1, ("q_proj", "got [4, 32, 1] and [32, 4]", AGAIN)),
        *[
            (
                tensors(lambda f, key=key, x=x: f[key].__setitem__((0, 0), x)),
                1,
                (key, "a number that is not finite", AGAIN),
            )
            for key in (f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight")
            for x in (torch.nan, -torch.inf)
        ],
        (tensors(lambda f: f[f"{QUERY}.lora_B.weight"].mul_(1e9)), 1, ("q_proj", "expected numbers from")),
        (tensors(lambda f: f.pop(f"{QUERY}.lora_B.weight")), 1, ("q_proj", "has lora_A alone", AGAIN)),
        (tensors(lambda f: f.pop(f"{QUERY}.lora_A.weight")), 1, ("q_proj", "has lora_B alone", AGAIN)),
        (tensors(lambda f: f.clear()), 2, ("no increments",)),
        (more(f"{QUERY.removeprefix('base_model.model.')}.lora_magnitude_vector", 32), 2, ("DoRA",)),
        (more("model.embed_tokens.weight", 9, 32), 2, ("embed_tokens", "trained embeddings")),
        (more("model.embed_tokens.lora_embedding_A", 2, 9), 2, ("embeddings",)),
        (more("model.layers.0.input_layernorm.weight", 32), 2, ("input_layernorm", "norms")),
        (more("lm_head.weight", 9, 32), 2, ("lm_head", "output layer")),
        (more("v_head.weight", 1, 32), 2, ("modules_to_save", "v_head")),
        (more("score.weight", 1, 32), 2, ("one output",)),
        (rename, 2, ("adapter_model.bin is pickled", "save it again")),
        (lambda f: (f / "adapter_model.safetensors").unlink(), 2, ("no adapter_model.safetensors",)),
        (lambda f: (f / "adapter_config.json").unlink(), 2, ("no adapter_config.json",)),
        (lambda f: (f / "model.safetensors").write_bytes(b""), 2, ("a full model (model.safetensors) and an adapter",)),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"nonsense"), 1, ("damaged", AGAIN)),
        (lambda f: (f / "adapter_config.json").write_text("{"), 1, ("adapter_config.json: cannot be read", AGAIN)),
        (lambda f: (f / "adapter_config.json").write_text("[]"), 1, ("expected a JSON object, got list", AGAIN)),
        (lambda f: (f / "slm_fast.json").write_text("3"), 1, ("slm_fast.json: expected a JSON object, got int", AGAIN)),
    ],
)
def test_a_damaged_adapter_or_one_of_more_than_lora_is_refused(
    slm: ScalableLM, adapter: Path, damage: Callable[[Path], object], status: int, parts: tuple[str, ...]
) -> None:
    damage(adapter)
    refused(slm, adapter, *parts, status=status)


def test_every_method_of_peft_that_trains_virtual_tokens_is_refused_as_such() -> None:
    assert VIRTUAL == peft_files.VIRTUAL
    assert set(VIRTUAL) <= {kind.value for kind in peft.PeftType}


def test_lora_on_layers_that_cannot_be_adapted_is_refused(tmp_path: Path) -> None:
    """OPT flattens the batch before these layers; no head of a DeBERTa of the first version is known."""
    write_adapter(tmp_path / "opt", "opt", target_modules=["q_proj", "fc1"])
    write_adapter(tmp_path / "deberta", "deberta", target_modules=["in_proj"])
    with pytest.warns(SlmWarning, match=r"is not in the table of families.*\(and these are not: fc1, fc2\)"):
        slm = make_slm("opt")
    refused(slm, tmp_path / "opt", "layers.0.fc1: increments of a layer that stays as it is here", "train the adapter")
    with pytest.warns(SlmWarning, match="is not in the table of families"):
        slm = make_slm("deberta")
    said = ("classifier.bias, classifier.weight: not known as part of a head that deberta models answer with", "train")
    refused(slm, tmp_path / "deberta", *said)


def test_lora_on_the_output_layer_is_refused(slm: ScalableLM, tmp_path: Path) -> None:
    write_adapter(tmp_path, "llama", target_modules=["q_proj", "lm_head"])
    refused(slm, tmp_path, "lm_head", "output layer")


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_an_adapter_for_another_base_is_refused(slm: ScalableLM, tmp_path: Path, llama: Path, name: str) -> None:
    write_adapter(tmp_path, "bert")
    other, adapter = (slm, tmp_path) if name == "llama" else (make_slm("bert"), llama)
    refused(other, adapter, "no such layer", "another base")


def test_an_adapter_of_other_widths_is_refused(slm: ScalableLM, adapter: Path) -> None:
    tensors(lambda f: f.update({f"{QUERY}.lora_A.weight": torch.ones(4, 64)}))(adapter)
    edit(adapter, lambda config: config.update(base_model_name_or_path="org/wide"))
    refused(slm, adapter, "q_proj.lora_A: expected [4, 32] for this backbone, got [4, 64]", "'org/wide'")


def test_an_adapter_for_another_vocabulary_is_refused(slm: ScalableLM, adapter: Path) -> None:
    tokenizer = make_tokenizer("llama")
    tokenizer.save_pretrained(adapter)
    slm.import_adapter(adapter, "same", texts("sky"))
    slm.forget("same")
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(adapter)
    refused(slm, adapter, "tokenizer.json", "'<tool>'", "no such token", "another vocabulary")


def test_an_encoders_adapter_without_a_head_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, "bert")
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: t for key, t in load_file(file).items() if "classifier" not in key}, file)
    refused(make_slm("bert"), tmp_path, "has no head", "SEQ_CLS")


@pytest.mark.parametrize(
    ("name", "trained", "target"),
    [("t5", "T5ForSequenceClassification", "q"), ("bart", "BartForSequenceClassification", "q_proj")],
)
def test_a_classifier_on_an_encoder_decoder_is_refused_with_its_head_and_without(
    tmp_path: Path, name: str, trained: str, target: str
) -> None:
    base = getattr(transformers, trained)(make_model(name).config)
    for saved, said in (
        (None, f"task_type SEQ_CLS: has no head, and {name} models write text without; train it as SEQ_2_SEQ_LM"),
        (["classification_head"], "modules_to_save: classification_head.dense.bias, classification_head.dense.weight"),
    ):
        config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=[target], modules_to_save=saved)
        peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path / str(saved))
        refused(make_slm(name), tmp_path / str(saved), said)


def test_a_head_that_transformers_has_no_class_for_cannot_be_checked(tmp_path: Path) -> None:
    write_adapter(tmp_path, "granite")
    more("score.weight", 3, 32)(tmp_path)
    slm = make_slm("granite")
    with pytest.raises(
        InputError, match=r"^check: transformers has no sequence classification class for granite models"
    ):
        slm.import_adapter(tmp_path, "sky", texts("sky"), check=True)
    slm.import_adapter(tmp_path, "sky", texts("sky"))


def test_a_head_that_reads_a_pooler_which_the_checkpoint_lacks_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", "bert")
    model = make_model("bert")
    model.pooler = None
    model.save_pretrained(tmp_path / "backbone")
    make_tokenizer("bert").save_pretrained(tmp_path / "backbone")
    slm = ScalableLM.from_backbone(tmp_path / "backbone")
    refused(
        slm,
        tmp_path / "adapter",
        "its head reads bert.pooler.dense, which it was saved without",
        "modules_to_save: classifier, pooler",
    )


def test_a_head_that_lacks_a_layer_which_no_checkpoint_has_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, "deberta-v2")  # PEFT does not save its pooler by default
    said = ("its head reads pooler.dense, which it was saved without", "modules_to_save: classifier, pooler")
    refused(make_slm("deberta-v2"), tmp_path, *said)


def test_a_head_whose_activation_or_norm_is_another_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, "modernbert", modules_to_save=["classifier", "head"])
    slm = make_slm("modernbert")
    config = slm.model.backbone.model.config
    config.norm_eps = 1e-3
    refused(slm, tmp_path, "norm_eps: expected 1e-05 for its head, got 0.001")
    config.classifier_activation = "swiglu"
    refused(slm, tmp_path, "classifier_activation: expected one of tanh, relu, gelu for its head, got 'swiglu'")


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("classifier.weight", (), "its head's weight: expected [32], got []"),
        ("classifier.bias", (2,), "its head's bias: expected [3], got [2]"),
        ("classifier.bias", (1,), "its head's bias: expected [3], got [1]"),
        ("classifier.bias", None, "classifier.weight"),
        ("head.norm.weight", (5,), "its head's norm.weight: expected [32], got [5]"),
        ("head.dense.weight", (32, 5), "its head's dense.weight: expected [32, 32], got [32, 5]"),
    ],
)
def test_a_head_whose_parts_do_not_fit_is_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...] | None, said: str
) -> None:
    write_adapter(tmp_path, "modernbert", modules_to_save=["classifier", "head"])
    file = tmp_path / "adapter_model.safetensors"
    tensors = {key: tensor for key, tensor in load_file(file).items() if shape is not None or not key.endswith(name)}
    if shape is not None:
        [key] = [key for key in tensors if key.endswith(name)]
        tensors[key] = torch.ones(shape)
    save_file(tensors, file)
    refused(make_slm("modernbert"), tmp_path, said)


def test_increments_of_a_heads_own_layer_are_refused_as_such(tmp_path: Path) -> None:
    write_adapter(tmp_path, "bert", target_modules=["query", "pooler.dense"])
    refused(make_slm("bert"), tmp_path, "pooler.dense: increments of a layer that stays as it is here")


def test_a_checkpoint_that_is_gone_has_nothing_for_a_head(tmp_path: Path) -> None:
    write_adapter(tmp_path, "deberta-v2")
    slm = make_slm("deberta-v2")
    slm.model.backbone.name = str(tmp_path / "gone")
    refused(slm, tmp_path, "its head reads pooler.dense, which it was saved without")


def test_labels_have_to_be_those_of_the_head(slm: ScalableLM, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"labels: .* has no classification head; leave labels out"):
        slm.import_adapter(llama, "sky", texts("sky"), labels=["a", "b"])
    write_adapter(tmp_path, "bert", labels=3)
    bert = make_slm("bert")
    with pytest.raises(InputError, match="labels: expected 3 words, as the adapter's head has, got 2"):
        bert.import_adapter(tmp_path, "sky", texts("sky"), labels=["a", "b"])
    with pytest.raises(InputError, match="labels: 'a' occurs twice"):
        bert.import_adapter(tmp_path, "sky", texts("sky"), labels=["a", "b", "a"])


def test_examples_are_needed_and_few_are_warned_of(slm: ScalableLM, llama: Path) -> None:
    refused(slm, llama, "examples: expected texts of the task", examples=[])
    with pytest.warns(SlmWarning, match="examples: got 3; about 50 texts of the task are recommended"):
        slm.import_adapter(llama, "few", texts("sky", 3))
    slm.forget("few")


@pytest.mark.parametrize("name", ["./nowhere", "nowhere/at/all", "nowhere"])
def test_a_folder_that_is_not_there_is_said(slm: ScalableLM, name: str) -> None:
    refused(slm, name, name, "no such folder")


def test_a_name_of_the_hub_that_cannot_be_had_is_said(slm: ScalableLM) -> None:
    refused(slm, "nobody/nothing", "cannot be downloaded from the hub")


def test_a_task_whose_layers_the_backbone_does_not_have_is_refused_when_it_comes(llama: Path) -> None:
    slm = make_slm("llama")
    slm.import_adapter(llama, "sky", texts("sky"))
    task = slm.learned["sky"]
    values = {**task.values, "model.layers.9.mlp.up_proj": next(iter(task.values.values()))}
    with pytest.raises(WorkError, match=r"values\.model\.layers\.9\.mlp\.up_proj: the backbone has no such layer"):
        make_slm("llama").add(dataclasses.replace(task, values=values))
