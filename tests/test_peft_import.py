"""PEFT adapters imported as tasks: outputs equal PEFT's, one at a time and in mixed batches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from models import (  # noqa: F401
    easy,
    knows,
    make_model,
    make_slm,
    make_tokenizer,
    one_thread,
    random_task,
    reopened,
    saved,
)
from peft_adapters import TINY, edit, loaded, logits_of, our_logits, probabilities, texts, write_adapter, written_by

from slm_fast import InputError, ScalableLM
from slm_fast.errors import SlmWarning
from slm_fast.heads import Heads
from slm_fast.scheduler import Generated, Request, Scheduler

# Every setting that may differ between adapters, with odd sizes.
CONFIGS = {
    "plain": {},
    "rank 1": {"r": 1, "lora_alpha": 3},
    "rank over a page": {"r": 19, "lora_alpha": 7},
    "rslora": {"r": 6, "lora_alpha": 4, "use_rslora": True},
    "patterns": {"r": 3, "rank_pattern": {"down": 9}, "alpha_pattern": {"1.*(q|query|q_proj)": 2, "v": 5}},
    "one layer": {"r": 5, "layers_to_transform": [1]},
}
RANKS = {"bert": "value", "roberta": "key", "llama": "down_proj", "qwen2": "o_proj", "t5": "wo", "phi3": "qkv_proj"}


def configured(name: str, config: str) -> dict:
    made = dict(CONFIGS[config])
    if "rank_pattern" in made:
        made["rank_pattern"] = {RANKS[name]: 9}
    if name == "t5" and "layers_to_transform" in made:
        made["layers_pattern"] = "block"
    return made


def difference(slm: ScalableLM, model: torch.nn.Module, name: str, task: str = "sky", count: int = 4) -> float:
    """Maximum absolute difference between PEFT's and our outputs on texts of the task."""
    rows = texts("sky", count, seed=1)
    theirs = [logits_of(model, name, row) for row in rows]
    if slm.model.backbone.kind == "encoder":
        return float((probabilities(slm, rows, task) - torch.cat(theirs).softmax(1)).abs().max())
    ours = [our_logits(slm, row, task) for row in rows]
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


GRID = [(name, config) for name in ("bert", "llama", "t5") for config in CONFIGS]
GRID += [(name, config) for name in ("roberta", "qwen2") for config in ("rank over a page", "patterns")]
GRID += [("phi3", "patterns"), ("gpt2", "rslora")]  # query, key and value are a single module


@pytest.mark.parametrize(("name", "config"), GRID)
def test_an_imported_adapter_gives_what_peft_gives(tmp_path: Path, name: str, config: str) -> None:
    model = write_adapter(tmp_path, name, **configured(name, config))
    slm = make_slm(name)
    knows(slm, random_task(slm, "farm", labels=("no", "yes") if slm.model.backbone.kind == "encoder" else None))
    slm.import_adapter(tmp_path, "sky", texts("sky"))
    assert difference(slm, model, name) < 1e-4
    with model.disable_adapter():
        assert difference(slm, model, name) > 1e-3  # the adapter has an effect


# PEFT saves modules named `classifier` by default, and other modules of a head only if `modules_to_save` lists them.
HEADS = [
    ("mpnet", None),
    ("camembert", None),
    ("electra", None),
    ("distilbert", None),
    ("deberta-v2", ["classifier", "pooler"]),
    ("modernbert", ["classifier", "head"]),
]


@pytest.mark.parametrize(("name", "saved_too"), HEADS)
def test_a_familys_own_head_gives_what_peft_gives(tmp_path: Path, name: str, saved_too: list[str] | None) -> None:
    model = write_adapter(tmp_path / "in", name, r=5, modules_to_save=saved_too, scale=0.1)
    slm = make_slm(name)
    knows(slm, random_task(slm, "farm", labels=("no", "yes")))
    found = slm.import_adapter(tmp_path / "in", "sky", texts("sky"), check=True)
    assert found is not None
    assert found < 1e-4
    assert difference(slm, model, name) < 1e-5
    with model.disable_adapter():
        assert difference(slm, model, name) > 1e-3
    slm.export_adapter("sky", tmp_path / "out")
    again = loaded(tmp_path / "out", name, labels=3)
    assert difference(slm, again, name) < 1e-5
    slm.import_adapter(tmp_path / "out", "back", texts("sky"))
    assert difference(slm, model, name, "back") < 1e-5


OTHERS = sorted(TINY.keys() - {name for name, _ in (*GRID, *HEADS)})


@pytest.mark.filterwarnings("ignore:backbone. model type", "ignore:examples")
@pytest.mark.parametrize("name", OTHERS)
def test_an_adapter_of_any_other_family_gives_what_peft_gives(tmp_path: Path, name: str) -> None:
    first, *_, last = TINY[name]
    config = {"use_rslora": True, "rank_pattern": {last: 9}, "alpha_pattern": {first: 5}}
    model = write_adapter(tmp_path, name, r=3, scale=0.1, **config)
    slm = make_slm(name)
    found = slm.import_adapter(tmp_path, "sky", texts("sky", 3), check=True)
    assert found is not None
    assert found < 1e-4
    assert difference(slm, model, name, count=1) < 1e-4
    with model.disable_adapter():
        assert difference(slm, model, name, count=1) > 1e-3  # the adapter has an effect


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_what_a_head_was_saved_without_is_the_checkpoints(tmp_path: Path, pooling: str) -> None:
    config = make_model("modernbert").config
    config.classifier_pooling, config.norm_bias, config.classifier_bias = pooling, True, True
    torch.manual_seed(3)
    whole = transformers.AutoModelForSequenceClassification.from_config(config)
    for part in (whole.head.norm.weight, whole.head.norm.bias, whole.head.dense.bias):
        torch.nn.init.normal_(part)
    whole.save_pretrained(tmp_path / "base")
    make_tokenizer("modernbert").save_pretrained(tmp_path / "base")
    whole.config.num_labels = 2
    model = peft.get_peft_model(
        whole, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["Wqkv"], init_lora_weights=False)
    ).eval()
    model.save_pretrained(tmp_path / "adapter")
    slm = ScalableLM.from_backbone(tmp_path / "base")
    found = slm.import_adapter(tmp_path / "adapter", "sky", texts("sky"), check=True)
    assert found is not None
    assert found < 1e-4
    assert difference(slm, model, "modernbert") < 1e-5
    slm.export_adapter("sky", tmp_path / "out")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
    assert difference(slm, peft.PeftModel.from_pretrained(base, tmp_path / "out").eval(), "modernbert") < 1e-5


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_an_imported_task_writes_what_peft_writes(tmp_path: Path, name: str) -> None:
    model = write_adapter(tmp_path, name, r=9)
    slm = make_slm(name)
    knows(slm, random_task(slm, "farm", labels=None))
    slm.import_adapter(tmp_path, "sky", texts("sky"))
    rows = texts("sky", 5, seed=2)
    names = ["farm"] * 3 + ["sky"] * 5
    found = slm.predict([*texts("farm", 3, seed=2), *rows], task=names, max_new_tokens=6)
    assert [one.task for one in found] == names
    assert [one.text for one in found[3:]] == [written_by(model, name, row) for row in rows]


@pytest.mark.parametrize("way", ["beams", "scheduler", "sentence"])
def test_other_ways_of_writing_give_peft_s_texts_too(tmp_path: Path, way: str) -> None:
    model = write_adapter(tmp_path, "llama", r=9)
    slm = make_slm("llama", **({"query": "sentence", "encoder": "minilm"} if way == "sentence" else {}))
    knows(slm, random_task(slm, "farm", labels=None))
    slm.import_adapter(tmp_path, "sky", texts("sky"))
    rows, tokenizer = texts("sky", 3, seed=5), slm.model.backbone.tokenizer
    expected = [written_by(model, "llama", row, beams=2 if way == "beams" else 1) for row in rows]
    if way != "scheduler":
        found = slm.predict(rows, task="sky", max_new_tokens=6, beams=2 if way == "beams" else 1)
        assert [one.text for one in found] == expected
        return
    scheduler = Scheduler(slm.model, max_rows=2, max_prompt=40, max_new_tokens=6)
    allowed = slm.model.pool.slots_of("sky")
    numbers = [scheduler.add_request(Request(tokenizer(row)["input_ids"], 6, slot_mask=allowed)) for row in rows]
    ended: dict[int, Generated] = {}
    while scheduler.unfinished or len(ended) < len(rows):
        ended |= scheduler.step()
    texts_found = [tokenizer.decode(ended[number].tokens, skip_special_tokens=True).strip() for number in numbers]
    assert texts_found == expected


def test_a_batch_of_tokens_finds_its_routes_ahead_of_the_pass(tmp_path: Path) -> None:
    model = write_adapter(tmp_path, "bert", r=9)
    slm = make_slm("bert")
    slm.import_adapter(tmp_path, "sky", texts("sky"))
    batch = slm.model.backbone.tokenization.encode(texts("sky", 5), 128)
    inner = model.base_model.model.bert
    with torch.no_grad():
        theirs = inner(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    real = batch.attention_mask[..., None]
    found = slm.model.forward(batch).hidden
    torch.testing.assert_close(found * real, theirs * real, atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="route: needed with the tasks imported here; `find_routes` finds it"):
        slm.model.call(lambda: slm.model.backbone.model(batch.input_ids), batch.attention_mask)


def test_a_causal_models_head_reads_its_last_token(tmp_path: Path) -> None:
    model = write_adapter(tmp_path, "llama", labels=4, r=3)
    slm = make_slm("llama")
    knows(slm, random_task(slm, "farm", labels=None))
    labels = ["north", "east", "south", "west"]
    slm.import_adapter(tmp_path, "sky", texts("sky"), labels=labels)
    rows = texts("sky", 5, seed=2)
    theirs = torch.cat([logits_of(model, "llama", row) for row in rows]).softmax(1)
    mixed = [rows[0], *texts("farm", 1, seed=2), *rows[1:]]
    found = slm.predict(mixed, task=["sky", "farm", *["sky"] * 4], top_k=None, max_new_tokens=3)
    assert found[1].text is not None
    assert found[1].label is None
    for one, row in zip([found[0], *found[2:]], theirs, strict=True):
        assert one.label == labels[int(row.argmax())]
        assert [one.probabilities[label] for label in labels] == pytest.approx(row.tolist(), abs=1e-4)


@pytest.mark.parametrize("query", ["trunk", "embeddings"])
def test_twelve_adapters_of_unlike_ranks_and_layers_answer_a_mixed_batch_as_one_by_one(
    tmp_path: Path, query: str
) -> None:
    slm = make_slm("bert", taps=(0,) if query == "embeddings" else None)
    slm.save_pretrained(tmp_path / "store")
    topics = ("sea", "farm", "city", "sky")
    models = {}
    for i in range(12):
        task, folder = f"task{i:02}", tmp_path / str(i)
        modules = [["query"], ["query", "value"], ["key", "intermediate.dense"]][i % 3]
        models[task] = write_adapter(
            folder, "bert", labels=2 + i % 3, seed=i, r=1 + 3 * i, lora_alpha=2, target_modules=modules
        )
        slm.import_adapter(folder, task, texts(topics[i % 4], seed=i))
    assert slm.model.ahead == (query == "trunk")
    rows = [row for topic in topics for row in texts(topic, 6, seed=99)]
    names = [f"task{i % 12:02}" for i in range(24)]
    told = slm.predict(rows, top_k=None, task=names)
    for row, name, one in zip(rows, names, told, strict=True):
        assert one.route.tasks == (name,)
        theirs = logits_of(models[name], "bert", row)[0].softmax(0).tolist()
        assert [one.probabilities[f"LABEL_{j}"] for j in range(len(theirs))] == pytest.approx(theirs, abs=1e-4)
    found = slm.predict(rows, top_k=None)
    for row, one in zip(rows, found, strict=True):  # without task IDs
        assert one.route.weights == (1.0,)
        theirs = logits_of(models[one.task], "bert", row)[0].softmax(0)
        assert one.score == pytest.approx(float(theirs.max()), abs=1e-4)
    again = reopened(tmp_path / "store")
    assert again.tasks == sorted(models)
    assert again.predict(rows, top_k=None) == found
    assert again.predict(rows, top_k=None, task=names) == told


def test_twelve_adapters_write_in_a_mixed_batch_and_after_the_store_is_reopened_as_one_by_one(tmp_path: Path) -> None:
    slm = make_slm("llama")
    slm.save_pretrained(tmp_path / "store")
    topics, models = ("sea", "farm", "city", "sky"), {}
    for i in range(12):
        name, modules = f"task{i:02}", [["q_proj"], ["v_proj", "down_proj"], ["k_proj", "gate_proj", "o_proj"]][i % 3]
        models[name] = write_adapter(
            tmp_path / name, "llama", seed=i, r=1 + 2 * i, lora_alpha=4, target_modules=modules
        )
        slm.import_adapter(tmp_path / name, name, texts(topics[i % 4], seed=i))
    rows = [row for i in range(12) for row in texts(topics[i % 4], 1, seed=90 + i)]
    again = reopened(tmp_path / "store", "llama")
    for names, some in ((list(models), rows), (None, rows[:6])):  # with task IDs and without
        found = slm.predict(some, task=names, max_new_tokens=3)
        assert names is None or [one.task for one in found] == names
        assert {one.route.weights for one in found} == {(1.0,)}
        theirs = [written_by(models[one.task], "llama", row, tokens=3) for row, one in zip(some, found, strict=True)]
        assert [one.text for one in found] == theirs
        assert again.predict(some, task=names, max_new_tokens=3) == found
        bare = slm.predict(some, max_new_tokens=3, bare=True)
        assert all(one.text != other.text for one, other in zip(found[:4], bare, strict=False))


def test_a_store_keeps_what_was_imported_and_forgets_it_exactly(tmp_path: Path) -> None:
    model = write_adapter(tmp_path / "adapter", "bert", r=20)
    slm = make_slm("bert")
    slm.save_pretrained(tmp_path / "store")
    slm.learn(easy("farm"), epochs=1)
    rows = [*texts("sky", 4, seed=3), *texts("farm", 4, seed=3)]
    before = slm.predict(rows)
    slm.import_adapter(tmp_path / "adapter", "sky", texts("sky"))
    kept = saved(slm, "sky")
    assert str(tmp_path).encode() not in kept  # the adapter's path is not stored with the task
    again = reopened(tmp_path / "store")
    assert saved(again, "sky") == kept
    assert again.predict(rows) == slm.predict(rows)
    # The router's label statistics, which are added to the heads of learned tasks, do not change imported heads.
    routed = [
        (row, one) for row, one in zip(rows, again.predict(rows, distance=True), strict=True) if one.task == "sky"
    ]
    assert routed
    for row, one in routed:
        assert one.score == pytest.approx(float(logits_of(model, "bert", row).softmax(1).max()), abs=1e-4)
        assert one.distance is not None
    assert again.store is not None
    assert again.store.verify() == []
    again.forget("sky")
    assert again.predict(rows) == before


def test_learning_beside_an_imported_task_gives_the_bytes_that_it_gives_without(tmp_path: Path) -> None:
    write_adapter(tmp_path, "bert", r=11)
    alone, beside = make_slm("bert"), make_slm("bert")
    beside.import_adapter(tmp_path, "sky", texts("sky"))
    for options in ({}, {"joint": True}, {"warm_start": True}):
        for slm in (alone, beside):
            slm.learn(easy("farm"), epochs=1, **options)
        assert saved(alone, "farm") == saved(beside, "farm")
        for slm in (alone, beside):
            slm.forget("farm")
    with pytest.raises(InputError, match="warm_start: task 'sky' is not learned; tasks: none"):
        beside.learn(easy("farm"), warm_start="sky")


def test_the_same_import_twice_is_one_and_another_of_its_name_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, "llama")
    slm = make_slm("llama")
    slm.import_adapter(tmp_path, "sky", texts("sky"))
    with pytest.warns(SlmWarning, match="already imported from the same adapter"):
        slm.import_adapter(tmp_path, "sky", texts("sky"))
    with pytest.raises(InputError, match="task 'sky': already exists"):
        slm.import_adapter(tmp_path, "sky", texts("sea"))
    assert slm.tasks == ["sky"]


def test_an_adapters_chat_template_and_end_tokens_come_along(tmp_path: Path) -> None:
    model = write_adapter(tmp_path, "llama", r=2)
    template = (
        "{% for m in messages %}{{ m.content }} question {% endfor %}{% if add_generation_prompt %}answer{% endif %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    slm = make_slm("llama")
    slm.import_adapter(tmp_path, "sky", texts("sky"))
    rows = texts("sky", 3, seed=4)
    # Rendered templates are tokenized without special tokens: this one writes no <s>, and none is added.
    tokenizer = slm.model.backbone.tokenizer
    expected = []
    for row in rows:
        ids = torch.tensor([tokenizer(f"{row} question answer", add_special_tokens=False)["input_ids"]])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, pad_token_id=0)
        expected.append(out[0, ids.shape[1] :].tolist())
    found = slm.predict(rows, max_new_tokens=6)
    assert [one.text for one in found] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    end = expected[0][0]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": end, "repetition_penalty": 1.3}))
    with pytest.warns(SlmWarning, match="repetition_penalty: not applied"):
        slm.import_adapter(tmp_path, "sky2", texts("sky"))
    one = slm.predict(rows[:1], task="sky2", max_new_tokens=6)[0]
    assert (one.text, one.finish_reason) == (tokenizer.decode([end]), "stop")
    slm.export_adapter("sky2", tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert kept == {"eos_token_id": [end], "repetition_penalty": 1.3}


def test_where_in_memory_a_heads_dense_layer_begins_changes_no_bit(tmp_path: Path) -> None:
    write_adapter(tmp_path, "bert")
    slm = make_slm("bert")
    slm.import_adapter(tmp_path, "sky", texts("sky"))
    task = slm.learned["sky"]
    weight, bias = task.dense
    moved = torch.empty(weight.numel() + 1)[1:].view(weight.shape).copy_(weight)
    assert moved.data_ptr() % 64 == 4
    states, mask = torch.randn(5, 7, weight.shape[1], generator=torch.Generator().manual_seed(0)), torch.ones(5, 7)
    found = [
        Heads.of([replace(task, dense=(one, bias))], torch.device("cpu")).features(
            states.mean(1), states, mask, torch.zeros(5, dtype=torch.int64)
        )
        for one in (weight, moved)
    ]
    assert torch.equal(*found)
    assert not torch.equal(found[0], states.mean(1))


def test_examples_may_name_their_column_and_an_empty_path_is_no_adapter(tmp_path: Path, monkeypatch) -> None:
    write_adapter(tmp_path, "llama")
    slm, rows = make_slm("llama"), [{"said": text} for text in texts("sky")]
    with pytest.raises(InputError, match="no column 'text'"):
        slm.import_adapter(tmp_path, "sky", rows, text="text")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    slm.import_adapter(tmp_path, "sky", rows, text="said")
    with pytest.warns(SlmWarning, match="already imported"):
        slm.import_adapter(tmp_path, "sky", tmp_path / "rows.jsonl", text="said")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="adapter: empty path; name its folder"):
        slm.import_adapter("", "rain", texts("sky"))


def test_ranks_lie_in_pages_so_that_a_large_one_does_not_widen_the_others(tmp_path: Path) -> None:
    write_adapter(tmp_path / "small", "llama", r=3)
    write_adapter(tmp_path / "large", "llama", r=20)
    slm = make_slm("llama")
    for i in range(3):
        slm.import_adapter(tmp_path / "small", f"small{i}", texts("sky"))
    slm.import_adapter(tmp_path / "large", "large", texts("sea"))
    lora_a, lora_b = slm.model.pool.values["model.layers.0.self_attn.q_proj"]
    assert (lora_a.shape[:2], lora_b.shape[:2]) == ((6, 8), (6, 8))  # 3 slots of one page, 1 slot of 3 pages
    assert difference(slm, loaded(tmp_path / "large", "llama"), "llama", "large") < 1e-4
    edit(tmp_path / "small", lambda config: config.update(lora_alpha=5))
    slm.import_adapter(tmp_path / "small", "other", texts("sky"))
    assert difference(slm, loaded(tmp_path / "small", "llama"), "llama", "other") < 1e-4
