"""Every model family: which layers are adapted, and that mixed batches equal each row alone with merged weights."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from families import FOUND, OTHERS, REFUSED
from models import (
    KNOWN,
    POSITIONS,
    easy,
    farm_and_sea,
    knows,
    learned,
    make_model,
    make_slm,
    make_tokenizer,
    merge,
    mixed_texts,
    one_thread,  # noqa: F401
    random_task,
    route_of,
    saved,
    toy_task,
    two_tasks,
)
from test_generate import count_passes, end_early
from torch import Tensor, nn

from slm_fast import InputError, ScalableLM, Task, examples
from slm_fast.errors import SlmWarning
from slm_fast.families import FAMILIES
from slm_fast.predict import RouteTaken
from slm_fast.scheduler import Scheduler
from slm_fast.tasks import LearnedTask
from slm_fast.tokenization import pad

NAMES = [name for name in KNOWN if name not in REFUSED]
WRITERS = [name for name, (kind, _, _) in (OTHERS | FOUND).items() if kind != "encoder"]
DOCUMENT = Path(__file__).parents[1] / "docs" / "families.md"
LIKE_LLAMA = ("qwen3", "smollm3", "olmo2", "granite", "phi")  # their layers have the inputs and outputs of LLaMA's
ROUTES = (((0,), (1.0,)), ((1,), (0.5,)), ((2, 0), (0.7, 0.3)), ((), ()))  # slots and weights of four rows' routes


pytestmark = pytest.mark.filterwarnings("ignore:backbone. model type")


def all_words(name: str) -> tuple[str, ...] | None:
    """All target words of this model (plain T5 has no gate); None if it is not in the table, for the default."""
    model_type = make_model(name).config.model_type
    family = next((family for family in FAMILIES if model_type in family.model_types), None)
    if family is None:
        return None
    return tuple(word for word in family.words if not (word == "gate" and name == "t5"))


def three_tasks(slm: ScalableLM) -> list[LearnedTask]:
    tasks = [random_task(slm, "city"), random_task(slm, "farm", rank=3), random_task(slm, "sea", rank=1)]
    knows(slm, *tasks)
    return tasks


def rows_of(name: str, *lengths: int) -> list[list[int]]:
    ids = torch.randint(4, len(make_tokenizer(name)), (sum(lengths),), generator=torch.Generator().manual_seed(7))
    return [part.tolist() for part in ids.split(lengths)]


def passed(name: str, model: nn.Module, rows: list[list[int]]) -> list[Tensor]:
    """Outputs at the tokens of each row of a padded batch: logits, or last hidden states of an encoder."""
    ids, mask = pad(rows, make_tokenizer(name).pad_token_id or 0)
    options = {}
    if KNOWN[name][0] == "seq2seq":
        options["decoder_input_ids"] = torch.tensor([[0, 9, 12, 15]]).expand(len(rows), -1)
    out = model(input_ids=ids, attention_mask=mask, **options)
    said = out[0] if KNOWN[name][0] == "encoder" else out.logits
    return [one[: 4 if options else len(row)] for one, row in zip(said, rows, strict=True)]


@pytest.mark.parametrize("name", NAMES)
def test_a_mixed_batch_says_what_merged_weights_say_of_each_row_alone(name):
    slm = make_slm(name, targets=all_words(name))
    tasks, rows = three_tasks(slm), rows_of(name, 5, 11, 1, 8)
    route = route_of(*zip(*[((*s, -1, -1)[:2], (*w, 0.0, 0.0)[:2]) for s, w in ROUTES], strict=True))
    lm = slm.model.backbone.model
    with torch.inference_mode():
        found, _, _ = slm.model.call(lambda: passed(name, lm, rows), torch.ones(4, 1), route)
        side = slm.model.backbone.tokenization.padding_side
        batch = slm.model.backbone.tokenization.collate(rows, padding_side=side)
        hidden = slm.model.forward(batch, route).hidden
        for i, (slots, weights) in enumerate(ROUTES):
            alone = merge(make_model(name), tasks, RouteTaken(slots, ("",) * len(slots), weights))
            [said] = passed(name, alone, rows[i : i + 1])
            torch.testing.assert_close(found[i], said, rtol=0, atol=1e-5 * max(1.0, float(said.abs().max())))
            [bare] = passed(name, make_model(name), rows[i : i + 1])
            assert not slots or (said - bare).abs().max() > 0.02  # the increments have an effect
            if KNOWN[name][0] == "causal":  # padded on the left
                [states] = alone.base_model(torch.tensor(rows[i : i + 1])).last_hidden_state
                torch.testing.assert_close(hidden[i, -len(rows[i]) :], states, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if KNOWN[name][0] == "encoder"])
def test_a_mixed_batch_answers_as_heads_on_merged_weights_do_for_each_row_alone(name):
    slm, tokenizer = make_slm(name, k=2), make_tokenizer(name)
    tasks, texts = two_tasks(slm), mixed_texts(7)  # one slot each, no statistics of labels in the router
    answers = knows(slm, *tasks).predict(texts, top_k=None, batch_size=7)
    assert {len(answer.route.slots) for answer in answers} == {2}
    for text, answer in zip(texts, answers, strict=True):
        alone = merge(make_model(name), tasks, answer.route)
        with torch.inference_mode():
            [states] = alone(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state
        wanted = dict.fromkeys(("maybe", "no", "yes"), 0.0)
        for slot, share in zip(answer.route.slots, answer.route.weights, strict=True):
            weight, bias = tasks[slot].head
            for label, p in zip(tasks[slot].labels, (weight @ states.mean(0) + bias).softmax(0), strict=True):
                wanted[label] += share * float(p)
        assert answer.probabilities == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("name", [name for name in OTHERS if "conv" not in name])
def test_words_mean_all_linear_layers_of_a_layer_and_the_default_is_five_of_them(name):
    slm = make_slm(name, targets=all_words(name), first_layer=1)
    backbone = slm.model.backbone
    inside = [f"{backbone.family.layers}.{i}." for i in (1, 2)]
    if backbone.family.upper:
        inside.append(f"{backbone.family.upper}.")
    linears = {
        module
        for module, layer in make_model(name).named_modules()
        if isinstance(layer, (nn.Linear, transformers.Conv1D)) and module.startswith(tuple(inside))
    }
    assert {module.partition("[")[0] for module in slm.model.modules} == linears
    default = make_slm(name).model.config.targets
    assert default == tuple(w for w in ("query", "value", "out", "up", "down") if w in backbone.family.words)
    if name != "qwen3_moe":
        assert len(default) == 5


def test_a_fused_layers_parts_are_phi3s_query_key_and_value_as_a_llama_has_them_apart():
    fused, llama = make_model("phi3"), make_model("llama")
    state = {}
    for name, weight in fused.state_dict().items():
        if "qkv_proj" in name:
            for word, part in zip("qkv", weight.split([32, 16, 16]), strict=True):
                state[name.replace("qkv", word)] = part
        elif "gate_up_proj" in name:
            for word, part in zip(("gate", "up"), weight.chunk(2), strict=True):
                state[name.replace("gate_up", word)] = part
        else:
            state[name] = weight
    for module in llama.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = fused.config.rms_norm_eps
    llama.load_state_dict(state)
    words = ("query", "key", "value", "gate", "up", "down")
    slm = ScalableLM.from_backbone(fused, tokenizer=make_tokenizer("phi3"), targets=words)
    apart = ScalableLM.from_backbone(llama, tokenizer=make_tokenizer("llama"), targets=words)
    for one in (slm, apart):
        assert [w for n, w in one.model.widths.items() if "key" in n or "k_proj" in n] == [(32, 16)] * 2
    short = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "gate": "gate_proj", "up": "up_proj"}
    names = {
        name: name.replace("qkv_proj", "").replace("gate_up_proj", "").replace(f"[{word}]", short.get(word, ""))
        for name in slm.model.modules
        for word in [name.rstrip("]").partition("[")[2]]
    }
    assert set(names.values()) == set(apart.model.modules)
    knows(slm, random_task(slm, "sea"))
    values = slm.model.pool.values
    rows, route = rows_of("phi3", 5, 9), route_of([[0], [0]], [[1.0], [0.5]])
    with torch.inference_mode():
        found, _, _ = slm.model.call(lambda: passed("phi3", fused, rows), torch.ones(2, 1), route)
        options = {"route": route, "values": {names[name]: pair for name, pair in values.items()}}
        wanted, _, _ = apart.model.call(lambda: passed("llama", llama, rows), torch.ones(2, 1), **options)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["roberta", "mt5", "mistral", "qwen2", *OTHERS, "opt", "xglm", "bloom", "deberta", "m2m_100"]
)
def test_every_family_learns_and_answers_and_is_saved_opened_and_forgets(name, tmp_path):
    slm = make_slm(name)
    slm.save_pretrained(tmp_path / "store")
    task = easy("sea", rows=8)
    slm.learn(task, epochs=30, batch_size=8, learning_rate=2e-2)
    slm.learn(toy_task("farm", rows=16), epochs=1, batch_size=8)
    named = slm.predict([row.text for row in task.rows], task="sea", max_new_tokens=2)
    assert sum((a.label or a.text) == row.target for a, row in zip(named, task.rows, strict=True)) >= 7
    texts = mixed_texts(8)
    answers = slm.predict(texts, max_new_tokens=3)
    assert {answer.task for answer in answers} == {"farm", "sea"}
    options = {"backbone": make_model(name), "tokenizer": make_tokenizer(name)}
    again = ScalableLM.from_pretrained(tmp_path / "store", **options)
    assert again.predict(texts, max_new_tokens=3) == answers
    farm = saved(slm, "farm")
    again.forget("sea")
    assert saved(again, "farm") == farm
    assert {answer.task for answer in again.predict(texts, max_new_tokens=1)} == {"farm"}


@pytest.mark.parametrize(
    ("name", "first_layer"),
    [*((name, 2) for name in OTHERS if name not in LIKE_LLAMA), ("bloom", 2), ("deberta-v2:conv", 1)],
)
def test_learning_over_kept_states_is_learning_through_all_layers(name, first_layer, monkeypatch):
    found = []
    for kept in (examples.STATES_BYTES, 0):
        monkeypatch.setattr(examples, "STATES_BYTES", kept)
        slm = make_slm(name, taps=(1,), first_layer=first_layer)
        slm.learn(toy_task("sea", rows=8), epochs=1, batch_size=8, rank=2)
        found.append(learned(slm, "sea"))
    for module, (lora_a, lora_b) in found[0].values.items():
        torch.testing.assert_close(lora_a, found[1].values[module][0], rtol=2e-3, atol=2e-5)
        torch.testing.assert_close(lora_b, found[1].values[module][1], rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("name", WRITERS)
def test_rows_that_take_turns_write_what_merged_weights_write_of_each_alone(name):
    slm, tokenizer, causal = make_slm(name), make_tokenizer(name), KNOWN[name][0] == "causal"
    tasks, texts = farm_and_sea(slm), mixed_texts(6, seed=2)
    loop = slm.model.backbone.family.loop  # continuous batching, tested with texts that end early
    ends = end_early(slm, texts) if loop else slm.model.backbone.end_tokens().tolist()
    seen = count_passes(slm)
    answers = slm.predict(texts, batch_size=3, max_new_tokens=7)
    assert not loop or sum(seen) < 6 * 7  # rows that have ended are not computed
    for text, answer in zip(texts, answers, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"] + (tokenizer("\n")["input_ids"][1:] if causal else [])])
        merged = merge(make_model(name), tasks, answer.route)
        options = {
            "pad_token_id": tokenizer.pad_token_id or (2 if causal else 0),
            "max_new_tokens": 7,
            "eos_token_id": ends,
        }
        out = merged.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        written = out[0, ids.shape[1] if causal else 1 :]
        assert answer.text == tokenizer.decode(written, skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("name", "words", "beams"),
    [("gemma3_text", 90, 1), ("gemma2", 90, 1), ("gemma3_text", 9, 2), ("phi3", 9, 2), ("gpt2", 9, 2), ("bart", 9, 2)],
)
def test_rows_beyond_a_sliding_window_and_beams_are_what_merged_weights_write_alone(name, words, beams):
    slm, tokenizer, causal = make_slm(name), make_tokenizer(name), KNOWN[name][0] == "causal"
    tasks, texts = farm_and_sea(slm), [" ".join(f"{topic}{i % 20}" for i in range(words)) for topic in ("sea", "farm")]
    for text, answer in zip(texts, slm.predict(texts, max_new_tokens=5, beams=beams), strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"] + (tokenizer("\n")["input_ids"][1:] if causal else [])])
        merged = merge(make_model(name), tasks, answer.route)
        options = {"pad_token_id": 2 if causal else 0, "max_new_tokens": 5, "num_beams": beams}
        out = merged.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        written = out[0, ids.shape[1] if causal else 1 :]
        assert answer.text == tokenizer.decode(written, skip_special_tokens=True).strip()


@pytest.mark.parametrize(("name", "positions"), [("camembert", 126), ("mpnet", 126), ("gpt2", 128), ("bart", 128)])
def test_texts_are_read_as_far_as_there_are_positions(name, positions):
    assert POSITIONS == 128
    with pytest.raises(InputError, match=f"max_length: expected 4..{positions} for this backbone, got {positions + 1}"):
        make_slm(name, max_length=positions + 1)
    slm = make_slm(name, max_length=positions - 8)
    farm_and_sea(slm)
    long = " ".join(["sea1 sea2"] * 100)
    [answer] = slm.predict([long], max_new_tokens=8)
    assert answer.truncated
    if name == "gpt2":
        with pytest.raises(InputError, match=r"max_new_tokens: expected at most 8 .* has 128 positions, .*, got 9"):
            slm.predict([long], max_new_tokens=9)
        with pytest.raises(
            InputError, match=r"task 'city': row 2 has 132 tokens to learn, .* 128 positions; set a small"
        ):
            slm.learn(Task("city", [("sea1 sea2", "yes"), (long, " ".join(["yes"] * 11))]))
    if name == "bart":
        with pytest.raises(InputError, match=r"max_new_tokens: expected at most 127 .*, got 128"):
            slm.predict(["sea1"], max_new_tokens=128)


def test_bart_learns_answers_that_begin_as_its_generation_begins_them():
    model = make_model("bart")
    model.generation_config.forced_bos_token_id = 2
    slm = ScalableLM.from_backbone(model, tokenizer=make_tokenizer("bart"))
    assert slm.model.backbone.tokenization.encode_answers(["yes", "sea1 sea2 sea3"], 4)[0][::2] == [2, 1]
    assert len(slm.model.backbone.tokenization.encode_answers(["sea1 sea2 sea3"], 4)[0]) == 4
    slm.learn(easy("sea", rows=8), epochs=30, batch_size=8, learning_rate=2e-2)
    answers = slm.predict([row.text for row in easy("sea", rows=8).rows], max_new_tokens=4)
    assert [a.text for a in answers] == [row.target for row in easy("sea", rows=8).rows]
    with pytest.raises(
        InputError, match=r"model: rows of a bart backbone cannot take turns; `ScalableLM.predict` writes"
    ):
        Scheduler(slm.model, max_rows=2, max_prompt=4, max_new_tokens=4)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_family_whose_answers_generate_writes_says_so_once(tmp_path, dtype):
    for part in (make_model("bart"), make_tokenizer("bart")):
        part.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", SlmWarning)
        slm = ScalableLM.from_backbone(tmp_path, dtype=dtype)
        farm_and_sea(slm)
        slm.predict(mixed_texts(2), max_new_tokens=1)
    [said] = [str(one.message) for one in told if one.category is SlmWarning]
    assert said == "backbone: model type 'bart': answers are written by transformers' generate"


def test_a_gemmas_soft_cap_and_a_granites_scale_are_in_the_logits_that_learning_sees():
    for name in ("gemma2", "granite", "llama", "gpt2", "opt"):
        slm, [row] = make_slm(name), rows_of(name, 9)
        lm, ids = slm.model.backbone.model, torch.tensor([row])
        with torch.inference_mode():
            hidden = lm.base_model(ids).last_hidden_state[0, 2:7]
            torch.testing.assert_close(slm.model.backbone.logits(hidden), lm(ids).logits[0, 2:7], rtol=0, atol=2e-6)
            assert torch.equal(lm(ids).logits, make_model(name)(ids).logits)  # `logits` has put the trunk back


def test_the_documentation_names_every_family_with_what_is_adapted():
    rows = [line.split("|")[1:-1] for line in DOCUMENT.read_text("utf-8").splitlines() if line.startswith("| `")]
    assert len(rows) == len(FAMILIES)
    told = {}
    for types, answers, default, more, writes in rows:
        words = [*default.split(", "), *re.sub(r" \(.*?\)", "", more).split(", ")]
        for model_type in re.findall("`(.*?)`", types):
            told[model_type] = (answers.strip(), {word.strip() for word in words}, writes.strip())
    for family in FAMILIES:
        writes = "" if family.kind == "encoder" else ("in turns" if family.loop else "in batches")
        for model_type in family.model_types:
            answers = "labels" if family.kind == "encoder" else "text"
            assert told[model_type] == (answers, set(family.words), writes)
