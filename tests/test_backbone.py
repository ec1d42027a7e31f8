"""Every family loads, names its linear layers, tokenises and finds queries; all four query and router pairs work."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
import transformers
from models import (
    BACKBONES,
    FAMILIES,
    GENERATORS,
    LAYERS,
    WIDTH,
    knows,
    make_model,
    make_slm,
    make_tokenizer,
    one_thread,  # noqa: F401
    random_task,
    sentence,
    texts_of,
    toy_task,
)
from torch import nn

from slm_fast import InputError, ScalableLM, WorkError
from slm_fast.backbone import PACKAGED, Backbone, fingerprint, resolve
from slm_fast.data import Row
from slm_fast.model import Config, Passage
from slm_fast.query import MAX_WIDTH, TrunkQuery, default_taps


def make_backbone(name: str, seed: int = 0) -> Backbone:
    return Backbone(make_model(name, seed), make_tokenizer(name), name)


@pytest.fixture
def saved(tmp_path):
    """A function that writes a tiny backbone to a folder as from_pretrained reads it."""

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
    monkeypatch.setattr("slm_fast.backbone.has_bfloat16", lambda: has)
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
    with pytest.raises(InputError, match=r"backbone '.*missing': cannot be loaded") as caught:
        Backbone.load(str(tmp_path / "missing"))
    assert "\n" not in str(caught.value)


def test_an_unsupported_family_is_named_with_those_supported(tmp_path):
    transformers.GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"'gpt2' is not supported; supported: bert, .*t5, .*llama"):
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
        ({"taps": (-1, 1)}, r"taps: expected layer numbers in 0..2, got \[-1, 1\]"),
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
    with pytest.raises(InputError, match="tokenizer: needed beside"):
        ScalableLM.from_backbone(make_model("bert"))


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


# Tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_are_padded_cut_and_ended_as_the_tokenizer_says(name):
    backbone, tokenizer = make_backbone(name), make_tokenizer(name)
    newline = [tokenizer.get_vocab()["\n"]] if name == "llama" else []
    texts = ["sea1", "sea1 sea2 sea3 sea4", " ".join(["farm1"] * 30)]
    encoded = backbone.encode(texts, 8)
    for row, text in enumerate(texts):
        expected = tokenizer(text, truncation=True, max_length=8 - len(newline))["input_ids"] + newline
        real = encoded.attention_mask[row].bool()
        assert encoded.input_ids[row][real].tolist() == expected
        assert len(expected) <= 8
        assert bool(real[: len(expected)].all())
    assert encoded.truncated == [False, False, True]
    left = backbone.encode(texts, 8, padding_side="left")
    assert left.attention_mask.tolist() == encoded.attention_mask.flip(1).tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_only_a_text_that_lost_tokens_counts_as_truncated(name):
    backbone = make_backbone(name)
    room = 10 - len(backbone.separator) - {"bert": 2, "t5": 1, "llama": 1}[name]
    assert backbone.encode([" ".join(["sea1"] * room)], 10).truncated == [False]
    assert backbone.encode([" ".join(["sea1"] * (room + 1))], 10).truncated == [True]


@pytest.mark.parametrize("name", GENERATORS)
def test_answers_end_with_the_token_that_ends_them(name):
    backbone = make_backbone(name)
    vocabulary = backbone.tokenizer.get_vocab()
    end = vocabulary["</s>"]
    assert backbone.encode_answers(["yes", "the answer"], 16) == [
        [vocabulary["yes"], end],
        [vocabulary["the"], vocabulary["answer"], end],
    ]
    assert backbone.encode_answers([" ".join(["word1"] * 30)], 5) == [[vocabulary["word1"]] * 4 + [end]]


def test_roberta_reads_no_more_than_its_positions_allow():
    backbone = make_backbone("roberta")
    assert backbone.longest() == 127  # position 0 is the padding's
    slm = make_slm("roberta", max_length=127)
    slm.learn(toy_task("sea"), epochs=1)
    assert slm.predict([" ".join(["sea1"] * 300)])[0].truncated
    with pytest.raises(InputError, match=r"max_length: expected 4..127"):
        make_slm("roberta", max_length=128)


# Queries


@pytest.mark.parametrize(("layers", "taps"), [(6, (1, 3)), (12, (2, 6)), (32, (5, 16)), (3, (0, 1)), (1, (0,))])
def test_default_taps_stand_a_sixth_and_half_of_the_way_up(layers, taps):
    assert default_taps(layers) == taps


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_a_trunk_query_is_the_mean_hidden_state_at_each_tap(name):
    slm = make_slm(name, taps=(0, 2))
    texts = ["sea1 sea2", "farm1 farm2 farm3 farm4 farm5 word6"]
    queries = slm.model.queries([Row(text) for text in texts])
    model = make_model(name)
    model = model.get_encoder() if BACKBONES[name][0] == "seq2seq" else model
    for text, query in zip(texts, queries, strict=True):
        ids = slm.model.backbone.encode([text], 64).input_ids
        with torch.inference_mode():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        expected = torch.cat([states[0][0].mean(0), states[2][0].mean(0)])
        torch.testing.assert_close(query, expected, rtol=1e-4, atol=1e-4)


def test_a_wide_query_is_projected_by_the_same_matrix_everywhere():
    wide, again = (TrunkQuery((0, 1), 600, torch.device("cpu")) for _ in range(2))
    assert wide.width == MAX_WIDTH
    matrix = wide.projection.weight.T
    assert matrix.shape == (1200, 1024)
    assert torch.equal(matrix, again.projection.weight.T)
    assert matrix.abs().unique().tolist() == [1 / 32]
    assert (matrix[0, :8] * 32).tolist() == [-1, -1, 1, -1, 1, -1, -1, 1]
    pooled = [torch.randn(5, 600) for _ in range(2)]
    query = wide.join(pooled)
    torch.testing.assert_close(query, torch.cat(pooled, 1) @ matrix)
    distance, before = torch.cdist(query, query), torch.cdist(torch.cat(pooled, 1), torch.cat(pooled, 1))
    assert (distance - before).abs().max() < 0.1 * before.max()


def test_a_query_that_needs_no_projection_is_left_as_it_is():
    narrow = TrunkQuery((0, 1), 512, torch.device("cpu"))
    assert (narrow.width, narrow.projection) == (1024, None)


def rows_of(topics=("farm", "sea"), each=4) -> list[Row]:
    rng = random.Random(3)
    return [Row(sentence(topic, rng)) for _ in range(each) for topic in topics]


def count_layers(slm: ScalableLM) -> Counter:
    """How often each trunk layer has been entered and has been left, from now on."""
    counts: Counter = Counter()
    for i, layer in enumerate(slm.model.backbone.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: counts.update([("in", i)]))
        layer.register_forward_hook(lambda *_, i=i: counts.update([("out", i)]))
    return counts


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_of_texts_passes_each_trunk_layer_once(name):
    slm = make_slm(name)
    knows(slm, *[random_task(slm, topic) for topic in ("farm", "sea")])
    counts = count_layers(slm)
    slm.predict(rows_of(), max_new_tokens=1)  # the first token comes out of the first pass
    assert counts == {(way, i): 1 for way in ("in", "out") for i in range(LAYERS)}


@pytest.mark.parametrize("name", FAMILIES)
def test_with_instructions_only_the_layers_below_the_last_tap_run_twice(name):
    slm = make_slm(name)  # taps 0 and 1
    knows(slm, *[random_task(slm, topic) for topic in ("farm", "sea")])
    counts = count_layers(slm)
    slm.predict([Row("sea1 sea2", instruction="the question"), Row("farm3")], max_new_tokens=1)
    assert {i: counts["out", i] for i in range(LAYERS)} == {0: 2, 1: 1, 2: 1}


@pytest.mark.parametrize("name", FAMILIES)
def test_finding_queries_stops_at_the_last_tap(name):
    slm = make_slm(name)
    counts = count_layers(slm)
    slm.model.queries(rows_of(), batch_size=3)
    assert {i: counts["out", i] for i in range(LAYERS)} == {0: 3, 1: 0, 2: 0}


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_the_query_found_on_the_way_is_the_one_that_queries_gives(name):
    slm = make_slm(name)
    knows(slm, *[random_task(slm, topic) for topic in ("farm", "sea")])
    rows = rows_of()
    causal = BACKBONES[name][0] == "causal"
    encoded = slm.model.encode(rows, padding_side="left" if causal else "right")
    for options in ({"num_beams": 1}, {"num_beams": 3}):
        passage = Passage(encoded.attention_mask)
        with torch.inference_mode(), slm.model.passing(passage, slm.model.pool.values):
            if BACKBONES[name][0] == "encoder":
                slm.model.features(encoded)
            else:
                ids, mask = encoded.input_ids, encoded.attention_mask
                slm.model.backbone.model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=2, do_sample=False, **options
                )
        beams = len(passage.query) // len(rows)
        expected = slm.model.queries(rows).repeat_interleave(beams, 0)
        torch.testing.assert_close(passage.query, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(passage.route.slot_ids, slm.model.find_route(expected).slot_ids)


@pytest.mark.parametrize("query", ["trunk", "sentence"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_query_ignores_the_instruction_unless_routing_is_on_the_prompt(name, query):
    encoder = "minilm" if query == "sentence" else None
    rows = [Row("sea1 sea2", instruction=i) for i in ("", "the question :", "farm1 farm2 farm3 answer")]
    on_input = make_slm(name, query=query, encoder=encoder).model.queries(rows)
    assert torch.equal(on_input[0], on_input[1])
    assert torch.equal(on_input[0], on_input[2])
    on_prompt = make_slm(name, query=query, encoder=encoder, route_on="prompt").model.queries(rows)
    torch.testing.assert_close(on_prompt[0], on_input[0], rtol=1e-4, atol=1e-5)
    assert (on_prompt[1] - on_prompt[2]).abs().max() > 1e-2
    assert (on_prompt[1] - on_prompt[0]).abs().max() > 1e-2


def test_a_row_with_an_instruction_alone_is_routed_on_it():
    slm = make_slm("bert")
    alone = slm.model.queries([Row("", instruction="sea1 sea2")])
    assert torch.equal(alone, slm.model.queries([Row("sea1 sea2")]))


@pytest.mark.parametrize("name", FAMILIES)
def test_an_instruction_row_in_the_batch_does_not_change_the_others_routes(name):
    slm = make_slm(name)
    knows(slm, *[random_task(slm, topic) for topic in ("farm", "sea")])
    rows = rows_of()
    expected = slm.predict(rows, max_new_tokens=3)
    got = slm.predict([Row("sea1", instruction="the question"), *rows], max_new_tokens=3)[1:]
    for a, b in zip(expected, got, strict=True):
        assert (a.task, a.label, a.text, a.route.slots) == (b.task, b.label, b.text, b.route.slots)
        assert a.route.weights == pytest.approx(b.route.weights, abs=1e-5)


def test_a_query_that_is_not_finite_is_named_by_its_row():
    slm = make_slm("bert")
    knows(slm, random_task(slm, "sea"))
    words = slm.model.backbone.model.embeddings.word_embeddings.weight
    words[make_tokenizer("bert").get_vocab()["word7"]] = float("nan")
    with pytest.raises(WorkError, match="query: row 1 holds a number that is not finite"):
        slm.model.find_route(slm.model.queries([Row("sea1"), Row("word7")]))
    with pytest.raises(WorkError, match="not finite"):
        slm.learn(toy_task("sky", topic="word"))
    assert slm.tasks == ["sea"]


# All pairs


@pytest.mark.parametrize("router", ["gaussian", "dtkr"])
@pytest.mark.parametrize("query", ["trunk", "sentence"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_query_and_router_learns_routes_and_answers(name, query, router):
    encoder, groups = ("minilm", 6) if query == "sentence" else (None, 8)
    slm = make_slm(name, query=query, router=router, encoder=encoder, groups=groups)
    tasks = {topic: toy_task(topic, rows=40) for topic in ("sea", "farm")}
    for task in tasks.values():
        slm.learn(task, epochs=1)
    texts = texts_of(*(toy_task(topic, rows=5, seed=1) for topic in tasks))
    k = 2 if router == "gaussian" else 4
    for answer in slm.predict(texts, max_new_tokens=3):
        assert answer.task in tasks
        assert len(answer.route.slots) == len(set(answer.route.slots)) == k
        assert sum(answer.route.weights) == pytest.approx(1, abs=1e-5)
        assert list(answer.route.weights) == sorted(answer.route.weights, reverse=True)
        owners = ["farm", "sea"] if router == "gaussian" else ["farm"] * 4 + ["sea"] * 4
        assert [owners[slot] for slot in answer.route.slots] == list(answer.route.tasks)
        by_task = Counter()
        for task, weight in zip(answer.route.tasks, answer.route.weights, strict=True):
            by_task[task] += weight
        assert answer.task == by_task.most_common(1)[0][0]
        assert (answer.label in ("no", "yes")) if name == "bert" else isinstance(answer.text, str)
    found = slm.evaluate({topic: toy_task(topic, rows=20, seed=1) for topic in tasks}, max_new_tokens=3)
    assert set(found.accuracy) == set(found.routing) == set(tasks)
    if router == "gaussian":
        assert sum(found.routing.values()) / 2 > 0.65  # chance is 0.5


def test_dtkr_tells_small_tasks_of_distinct_topics_apart():
    slm = make_slm("bert", query="sentence", router="dtkr", encoder="minilm")
    for topic in ("sea", "farm"):
        slm.learn(toy_task(topic, rows=48), epochs=1)
    found = slm.evaluate({topic: toy_task(topic, rows=32, seed=1) for topic in ("sea", "farm")})
    assert min(found.routing.values()) > 0.8


@pytest.mark.parametrize("name", ["roberta", "t5-gated", "mt5", "mistral", "qwen2"])
def test_the_other_models_of_each_family_learn_and_answer(name):
    slm = make_slm(name)
    for topic in ("sea", "farm"):
        slm.learn(toy_task(topic), epochs=1)
    answers = slm.predict(texts_of(toy_task("sea", rows=8), toy_task("farm", rows=8)), max_new_tokens=3)
    assert {answer.task for answer in answers} == {"farm", "sea"}


@pytest.mark.parametrize("aggregate", ["mean", "vote"])
def test_both_aggregations_of_dtkr_route(aggregate):
    slm = make_slm("bert", router="dtkr", groups=8, aggregate=aggregate)
    knows(slm, *[random_task(slm, topic, slots=4) for topic in ("farm", "sea")])
    for answer in slm.predict(rows_of()):
        assert sum(answer.route.weights) == pytest.approx(1, abs=1e-5)


def test_the_number_of_groups_follows_from_the_width_of_the_query():
    encoder = {"query": "sentence", "encoder": "minilm", "router": "dtkr"}
    assert make_slm("bert", **encoder).model.config.groups == 6  # of 384
    assert make_slm("bert", router="dtkr").model.config.groups == 4  # of 64, which 6 and 5 do not divide


def test_the_configuration_records_every_choice_made():
    config = make_slm("bert").model.config
    assert config == Config(
        taps=(0, 1), targets=("query", "value", "out", "up", "down"), first_layer=1, k=2, groups=4, max_length=128
    )
