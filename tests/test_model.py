"""Queries, from the main pass or a separate one, and all pairs of query and router for each kind of backbone."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from models import (
    BACKBONES,
    FAMILIES,
    LAYERS,
    knows,
    make_model,
    make_slm,
    make_tokenizer,
    one_thread,  # noqa: F401
    random_task,
    reopened,
    sentence,
    texts_of,
    toy_task,
)

from slm_fast import InputError, ScalableLM, WorkError
from slm_fast.data import Row
from slm_fast.options import ModelConfig
from slm_fast.query import MAX_WIDTH, TrunkQuery, default_taps

# Queries


@pytest.mark.parametrize(("layers", "taps"), [(6, (1, 3)), (12, (2, 6)), (32, (5, 16)), (3, (0, 1)), (1, (0,))])
def test_default_taps_stand_a_sixth_and_half_of_the_way_up(layers, taps):
    assert default_taps(layers) == taps


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_a_trunk_query_is_the_mean_state_at_each_tap_and_the_highest_at_the_last(name):
    slm = make_slm(name, taps=(0, 2))
    texts = ["sea1 sea2", "farm1 farm2 farm3 farm4 farm5 word6"]
    queries = slm.model.queries([Row(text) for text in texts])
    model = make_model(name)
    model = model.get_encoder() if BACKBONES[name][0] == "seq2seq" else model
    for text, query in zip(texts, queries, strict=True):
        ids = slm.model.backbone.tokenization.encode([text], 64).input_ids
        with torch.inference_mode():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        expected = torch.cat([states[0][0].mean(0), states[2][0].mean(0), states[2][0].amax(0) / 4])
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
    """A counter of how often each trunk layer is entered and completes, from now on."""
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
    slm.predict(rows_of(), max_new_tokens=1)  # the first pass yields the first token
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
    encoded = slm.model.collate(slm.model.tokenize(rows))
    for beams in (1, 3):
        with torch.inference_mode():
            if BACKBONES[name][0] == "encoder":
                _, query, route = slm.model.forward(encoded)
            else:
                inputs = {"input_ids": encoded.input_ids, "attention_mask": encoded.attention_mask}
                inputs |= {"max_new_tokens": 2, "do_sample": False, "num_beams": beams}
                _, query, route = slm.model.call(
                    lambda inputs=inputs: slm.model.backbone.model.generate(**inputs), encoded.attention_mask
                )
        expected = slm.model.queries(rows).repeat_interleave(len(query) // len(rows), 0)
        torch.testing.assert_close(query, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(route.slot_ids, slm.model.route(expected).slot_ids)
        assert torch.equal(slm.model.find_routes(encoded).slot_ids, slm.model.route(slm.model.queries(rows)).slot_ids)


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
        slm.model.route(slm.model.queries([Row("sea1"), Row("word7")]))
    with pytest.raises(WorkError, match="not finite"):
        slm.learn(toy_task("sky", topic="word"))
    assert slm.tasks == ["sea"]


# All pairs of query and router


@pytest.mark.parametrize("router", ["gaussian", "dtkr"])
@pytest.mark.parametrize("query", ["trunk", "sentence"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_query_and_router_learns_routes_and_answers(name, query, router):
    encoder, groups = ("minilm", 6) if query == "sentence" else (None, 8)
    groups = groups if router == "dtkr" else None
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
    assert make_slm("bert", **encoder).model.config.groups == 6  # query width 384
    assert make_slm("bert", router="dtkr").model.config.groups == 4  # query width 64, which 6 and 5 do not divide


@pytest.mark.parametrize(
    ("router", "option", "said"),
    [
        ("gaussian", {"groups": 4}, "groups: goes with router='dtkr', got router='gaussian' and groups 4"),
        ("gaussian", {"aggregate": "vote"}, "aggregate: goes with router='dtkr', got router='gaussian' and aggregate"),
        ("dtkr", {"temperature": 3.0}, "temperature: goes with router='gaussian', got router='dtkr' and temperature 3"),
        ("dtkr", {"features": 8}, "features: go with router='gaussian', got router='dtkr' and features 8"),
    ],
)
def test_an_option_of_the_other_router_is_refused_unless_it_is_the_default_or_from_a_store(
    router, option, said, tmp_path
):
    with pytest.raises(InputError, match=f"^{said}"):
        make_slm("bert", router=router, **option)
    made = make_slm("bert", router=router, **{name: getattr(ModelConfig, name) for name in option})
    assert make_slm("bert", config=made.model.config).model.config == made.model.config
    if "features" not in option:  # as earlier versions made them
        kept = replace(made.model.config, **option)
        make_slm("bert", config=kept).save_pretrained(tmp_path / "store")
        assert reopened(tmp_path / "store").model.config == kept


def test_the_configuration_records_every_choice_made():
    config = make_slm("bert").model.config
    assert config == ModelConfig(
        taps=(0, 1),
        targets=("query", "value", "out", "up", "down"),
        first_layer=1,
        k=2,
        groups=6,
        max_length=128,
        features=192,
    )
