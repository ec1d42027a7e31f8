"""Tasks exported as PEFT adapters: loaded by PEFT, they give the outputs of the routed model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import FOUND
from models import KNOWN, knows, learned, make_slm, one_thread, random_task  # noqa: F401
from peft_adapters import TINY, base_of, edit, loaded, logits_of, our_logits, probabilities, texts, write_adapter
from safetensors.torch import load_file, save_file

from slm_fast import InputError, ScalableLM, WorkError, card, loading
from slm_fast.ops import Route
from slm_fast.tasks import LearnedTask

pytestmark = pytest.mark.filterwarnings("ignore:backbone. model type", "ignore:examples")
TABLE = [name for name in KNOWN if name in TINY and name not in FOUND]
WRITERS = [*(name for name in TABLE if KNOWN[name][0] != "encoder"), "gpt_neox"]
ENCODERS = [name for name in TABLE if KNOWN[name][0] == "encoder"]
# transformers has no such class for Granite.
CLASSIFIERS = [name for name in TABLE if KNOWN[name][0] != "seq2seq" and name != "granite"]
# PEFT's modules_to_save that heads need, besides those that it saves by itself.
SAVED = {"modernbert": ["classifier", "head"], "deberta-v2": ["classifier", "pooler"]}


def with_a_task(name: str, **options: object) -> ScalableLM:
    slm = make_slm(name, router="dtkr", groups=4, k=4) if options.get("slots", 1) != 1 else make_slm(name)
    labels = ("no", "yes") if slm.model.backbone.kind == "encoder" else None
    knows(slm, random_task(slm, "farm", labels=labels, **options))
    return slm


@pytest.mark.parametrize("name", WRITERS)
def test_peft_merges_an_exported_task_into_what_the_routed_model_is(tmp_path: Path, name: str) -> None:
    slm = with_a_task(name, rank=5)
    slm.export_adapter("farm", tmp_path)
    merged = loaded(tmp_path, name).merge_and_unload()
    for text in texts("farm", 3):
        theirs = logits_of(merged, name, text)
        assert float((our_logits(slm, text, "farm") - theirs).abs().max()) < 1e-4
        assert float((logits_of(base_of(name), name, text) - theirs).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoders_own_head_stands_beside_the_adapter(tmp_path: Path, name: str) -> None:
    slm = with_a_task(name, rank=3)
    slm.export_adapter("farm", tmp_path)
    head = load_file(tmp_path / "slm_fast_head.safetensors")
    merged = loaded(tmp_path, name).merge_and_unload()
    rows = texts("farm", 3)
    for text, ours in zip(rows, probabilities(slm, rows, "farm"), strict=True):
        ids = torch.tensor([slm.model.backbone.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            pooled = merged(input_ids=ids).last_hidden_state.mean(1)
        theirs = (pooled @ head["head.weight"].T + head["head.bias"]).softmax(1)[0]
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert "slm_fast_head.safetensors" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_an_imported_head_goes_out_as_the_familys_class_has_it(tmp_path: Path, name: str) -> None:
    model = write_adapter(tmp_path / "in", name, labels=3, r=3, modules_to_save=SAVED.get(name))
    slm = make_slm(name)
    slm.import_adapter(tmp_path / "in", "sky", texts("sky", 4), check=True)
    slm.export_adapter("sky", tmp_path / "out")
    merged, rows = loaded(tmp_path / "out", name, labels=3).merge_and_unload(), texts("sky", 3, seed=1)
    for text, ours in zip(rows, probabilities(slm, rows, "sky"), strict=True):
        theirs = logits_of(merged, name, text)
        torch.testing.assert_close(theirs, logits_of(model, name, text), atol=1e-4, rtol=0)
        torch.testing.assert_close(ours, theirs.softmax(1)[0], atol=1e-4, rtol=0)
    slm.import_adapter(tmp_path / "out", "back", texts("sky", 4), check=True)
    assert same(learned(slm, "sky"), learned(slm, "back"))


def same(one: LearnedTask, other: LearnedTask) -> bool:
    parts = [
        ([t for pair in task.values.values() for t in pair], task.head or (), task.dense or ()) for task in (one, other)
    ]
    assert one.values.keys() == other.values.keys()
    assert one.labels == other.labels
    return all(
        torch.equal(a, b) for mine, theirs in zip(*parts, strict=True) for a, b in zip(mine, theirs, strict=True)
    )


@pytest.mark.parametrize("name", TABLE)
def test_what_goes_out_comes_in_with_the_same_tensors(tmp_path: Path, name: str) -> None:
    slm = with_a_task(name)
    ranks = {"value": 2, "v_proj": 2, "wo": 2, "v_lin": 2, "Wi": 2, "c_fc": 2}
    config = {"r": 11, "rank_pattern": ranks, "use_rslora": True, "modules_to_save": SAVED.get(name)}
    write_adapter(tmp_path / "peft", name, scale=0.1, **config)
    slm.import_adapter(tmp_path / "peft", "sky", texts("sky"))
    for task in ("farm", "sky"):
        slm.export_adapter(task, tmp_path / task)
        found = slm.import_adapter(tmp_path / task, f"{task}-again", texts(task, 4), check=True)
        assert found is not None
        assert found < 1e-4
        assert same(learned(slm, task), learned(slm, f"{task}-again"))


@pytest.mark.parametrize(
    ("name", "zero"),
    [
        *[("phi3", zero) for zero in ("a row", "a layer", "everything")],
        *[("gpt2", "a layer"), ("modernbert", "a layer")],
    ],
)
def test_a_fused_module_comes_back_whole_if_some_of_its_increments_are_zero(
    tmp_path: Path, name: str, zero: str
) -> None:
    slm = with_a_task(name)
    task = learned(slm, "farm")
    values = {module: (a, b.clone()) for module, (a, b) in task.values.items()}
    queries = [module for module in values if module.endswith("[query]")]
    for module in values if zero == "everything" else queries:
        values[module][1][:, slice(1, 2) if zero == "a row" else slice(None)] = 0
    knows(slm, dataclasses.replace(task, values=values))
    slm.export_adapter("farm", tmp_path)
    found = slm.import_adapter(tmp_path, "again", texts("farm", 4), check=True)
    assert found is not None
    assert found < 1e-4
    assert queries
    assert same(learned(slm, "farm"), learned(slm, "again"))


def test_an_adapter_that_does_nothing_yet_keeps_its_rows_in_and_out(tmp_path: Path) -> None:
    write_adapter(tmp_path / "in", "phi3", r=3)
    file = tmp_path / "in" / "adapter_model.safetensors"
    save_file({key: t * ("lora_A" in key) for key, t in load_file(file).items()}, file)
    slm = make_slm("phi3")
    slm.import_adapter(tmp_path / "in", "sky", texts("sky"))
    assert {len(lora_a[0]) for lora_a, _ in learned(slm, "sky").values.values()} == {3}
    slm.export_adapter("sky", tmp_path / "out")
    slm.import_adapter(tmp_path / "out", "again", texts("sky"))
    assert same(learned(slm, "sky"), learned(slm, "again"))


def test_an_export_that_was_trained_further_comes_back_as_what_it_is_now(tmp_path: Path) -> None:
    slm = with_a_task("phi3", rank=2)
    slm.export_adapter("farm", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = {"r": 3, "lora_alpha": 3, "rank_pattern": {}, "alpha_pattern": {}}
    for rank in (None, 3):  # training fills the zeros in lora_B; a new configuration changes the rank
        found = load_file(file)
        for key, tensor in found.items():
            shape = (
                (rank or len(tensor), tensor.shape[1]) if "lora_A" in key else (len(tensor), rank or tensor.shape[1])
            )
            found[key] = torch.rand(shape) / 10
        save_file(found, file)
        edit(tmp_path, lambda config, rank=rank: config.update(whole if rank else {}))
        difference = slm.import_adapter(tmp_path, f"again-{rank}", texts("farm", 4), check=True)
        assert difference is not None
        assert difference < 1e-4


@pytest.mark.parametrize("ranks", [[4], {"a": 4}, {"a": {"b": -1}}, {"a": {"b": "4"}}, {"a": {"b": 1e99}}, None])
def test_ranks_of_an_export_that_are_none_are_named(tmp_path: Path, ranks: Any) -> None:
    slm = with_a_task("phi3")
    slm.export_adapter("farm", tmp_path)
    file = tmp_path / "slm_fast.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "ranks": ranks}))
    with pytest.raises(WorkError, match=r"slm_fast\.json: ranks: expected numbers by module and layer, got .*; save"):
        slm.import_adapter(tmp_path, "again", texts("farm"))
    assert slm.tasks == ["farm"]


def test_a_learned_task_that_comes_back_reads_the_prompt_it_was_learned_on(tmp_path: Path) -> None:
    slm = with_a_task("llama")
    slm.export_adapter("farm", tmp_path)
    slm.import_adapter(tmp_path, "back", texts("farm"))
    rows = texts("farm", 4, seed=2)
    mine, back = (slm.predict(rows, task=task, max_new_tokens=5) for task in ("farm", "back"))
    assert [one.text for one in back] == [one.text for one in mine]


def test_several_slots_need_fixed_weights_and_are_then_concatenated(tmp_path: Path) -> None:
    slm = with_a_task("llama", slots=3, rank=2)
    with pytest.raises(InputError, match="its 3 slots are weighted by the input, which an adapter cannot do") as caught:
        slm.export_adapter("farm", tmp_path)
    suggested = [float(weight) for weight in str(caught.value).rpartition(" ")[2].split(",")]
    slm.export_adapter("farm", tmp_path / "suggested", weights=suggested)
    with pytest.raises(InputError, match="weights: expected 3, one for each slot of task 'farm', got 2"):
        slm.export_adapter("farm", tmp_path / "out", weights=[0.5, 0.5])
    weights = [0.5, 0.3, 0.2]
    slm.export_adapter("farm", tmp_path / "out", weights=weights)
    merged = loaded(tmp_path / "out", "llama").merge_and_unload()
    text = texts("farm", 1)[0]
    ids = torch.tensor([slm.model.backbone.tokenizer(text)["input_ids"]])
    route = Route(torch.tensor([[0, 1, 2]]), torch.tensor([weights]))
    with torch.no_grad():
        out, _, _ = slm.model.call(lambda: slm.model.backbone.model(input_ids=ids), torch.ones_like(ids), route)
    torch.testing.assert_close(out.logits, logits_of(merged, "llama", text), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([-0.2, 1.2], r"at least 0 with a sum of 1, got \[-0.2, 1.2\]"),
        ([0.5, 0.4], "a sum of 1"),
        ([1e30, 0.0], "a sum of 1"),
        ([float("nan"), 1.0], "a sum of 1"),
        ([0.5, "b"], "weights: expected 2 numbers"),
        (0.5, "weights: expected 2 numbers, got 0.5"),
    ],
)
def test_weights_are_convex(tmp_path: Path, weights: Any, said: str) -> None:
    slm = with_a_task("llama", slots=2, rank=2)
    with pytest.raises(InputError, match=said):
        slm.export_adapter("farm", tmp_path / "out", weights=weights)
    assert not (tmp_path / "out").exists()


def test_a_task_with_one_slot_takes_no_weights(tmp_path: Path) -> None:
    slm = with_a_task("llama")
    for weights in ([0.5], [1.0]):
        with pytest.raises(InputError, match="weights: task 'farm' has one slot, which is exported exactly"):
            slm.export_adapter("farm", tmp_path / "out", weights=weights)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "backbone", "base", "call"),
    [
        ("bert", "minilm", "sentence-transformers/all-MiniLM-L6-v2", "'sentence-transformers/all-MiniLM-L6-v2'"),
        ("llama", "smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", "'HuggingFaceTB/SmolLM2-135M-Instruct'"),
        ("llama", "org/model", "org/model", "'org/model'"),
        ("llama", "org/model/x.gguf", "org/model", "'org/model', gguf_file='x.gguf'"),
        ("llama", "/models/x.gguf", "/models", "'/models', gguf_file='x.gguf'"),
        ("llama", "", None, "'path of the backbone'"),
    ],
)
def test_the_base_is_named_as_transformers_loads_it(
    tmp_path: Path, name: str, backbone: str, base: str | None, call: str
) -> None:
    slm = with_a_task(name)
    slm.model.backbone.name = backbone
    slm.export_adapter("farm", tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    readme = (tmp_path / "README.md").read_text()
    assert f".from_pretrained({call})" in readme
    header = yaml.safe_load(readme.split("---\n")[1])
    assert header.get("base_model") == (None if backbone in ("", "/models/x.gguf") else base)
    assert ("not quantised" in readme) == (backbone == "smollm2")
    slm.import_adapter(tmp_path, "again", texts("farm"))
    assert same(learned(slm, "farm"), learned(slm, "again"))


@pytest.mark.parametrize("name", ["bert", "t5", "llama"])
def test_the_readme_says_what_a_prompt_of_a_task_looks_like(tmp_path: Path, name: str) -> None:
    slm = with_a_task(name)
    slm.export_adapter("farm", tmp_path / "out")
    readme = (tmp_path / "out" / "README.md").read_text()
    slm.import_adapter(tmp_path / "out", "again", texts("farm"))
    slm.export_adapter("again", tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == readme.replace("# farm", "# again")
    assert ("An instruction and its input are one text, joined by a line break." in readme) == (name != "bert")
    assert ("learned on prompts that end in a line break" in readme) == (name == "llama")
    assert "\n\n\n" not in readme


def test_every_packaged_backbone_has_a_name_on_the_hub() -> None:
    assert card.HUB_NAMES.keys() == loading.PACKAGED.keys()


def test_nothing_is_overwritten_and_a_task_has_to_be_there(tmp_path: Path) -> None:
    slm = with_a_task("t5")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="already exists; expected an empty folder, or a path that does not exist"):
        slm.export_adapter("farm", tmp_path)
    with pytest.raises(InputError, match="task 'sea': not learned; tasks: farm"):
        slm.export_adapter("sea", tmp_path / "sea")
    with pytest.raises(InputError, match="folder: empty path"):
        slm.export_adapter("farm", "")
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
