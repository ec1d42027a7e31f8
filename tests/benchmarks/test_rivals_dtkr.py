"""Tests of DTKR with prompts and with gated prefixes as values: which slots it retrieves and how they are used."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from models import make_model, make_tokenizer
from prompt_rivals import LABELS, assert_resumes, ragged, setup_of, task_of, tiny  # noqa: F401

from benchmarks.continual.methods.common import make_model as bare_model
from benchmarks.continual.methods.dtkr_adapter import DtkrAdapter, Prefix, prefix_attention
from benchmarks.continual.methods.dtkr_prompt import DtkrPrompt
from benchmarks.continual.methods.prompts import make_prompted
from slm_fast.backbone import Backbone
from slm_fast.dtkr import DtkrRouter
from slm_fast.ops import Route
from slm_fast.tasks import name_seed

KINDS = [(DtkrPrompt, "bert"), (DtkrPrompt, "t5"), (DtkrPrompt, "llama"), (DtkrAdapter, "bert"), (DtkrAdapter, "llama")]
TOPICS = ("sea", "farm")


def drawn(word: str) -> torch.Tensor:
    return torch.randn(12, generator=torch.Generator().manual_seed(name_seed(word, 0)))


def query(texts):
    """Queries [B, 12]: each word adds a fixed random vector of its stem and a quarter of one of the whole word."""
    return torch.stack([sum(drawn(word.rstrip("0123456789")) + drawn(word) / 4 for word in t.split()) for t in texts])


def made(method, name: str, **options):
    return method(setup_of(name, **options), length=2, query=query)


@pytest.fixture(scope="module")
def learned():
    """DtkrPrompt and DtkrAdapter with a tiny BERT, after learning two tasks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Backbone, "load", lambda name: Backbone(make_model(name), make_tokenizer(name), name))
        methods = [made(method, "bert", epochs=8) for method in (DtkrPrompt, DtkrAdapter)]
        for method in methods:
            for topic in TOPICS:
                method.learn(task_of("bert", topic, 32), False)
    return methods


@pytest.mark.parametrize(("method", "name"), KINDS)
def test_a_run_resumed_from_its_state_ends_as_one_that_was_never_interrupted(method, name):
    assert_resumes(lambda: made(method, name), [task_of(name, topic) for topic in TOPICS])


@pytest.mark.parametrize(("method", "name"), KINDS)
def test_learning_lowers_the_loss_and_changes_no_byte_of_the_backbone(method, name):
    losses = []
    for epochs in (1, 12):
        learner, task = made(method, name, epochs=epochs), task_of(name, "sea", 24)
        before = {key: value.clone() for key, value in learner.backbone.model.state_dict().items()}
        learner.learn(task, False)
        after = learner.backbone.model.state_dict()
        assert all(torch.equal(value, after[key]) for key, value in before.items())
        learner.route = learner.router.route(learner.queries(task.rows))
        losses.append(float(learner.models["sea"].losses(task.rows).detach().mean()))
    assert losses[1] < 0.97 * losses[0]


@pytest.mark.parametrize(("method", "name"), KINDS)
def test_a_batch_is_answered_as_each_row_alone(method, name):
    learner, rows = made(method, name), ragged()
    for topic in TOPICS:
        learner.learn(task_of(name, topic), False)
    answers = learner.answers(rows)
    assert answers == [learner.answers([row])[0] for row in rows]
    model = learner.models["sea"]
    learner.route = learner.router.route(learner.queries(rows))
    together, alone = model.losses(rows), []
    for row in rows:
        learner.route = learner.router.route(learner.queries([row]))
        alone.append(model.losses([row]))
    torch.testing.assert_close(together, torch.cat(alone))


def test_the_slots_retrieved_are_those_that_the_router_finds_among_all_tasks_keys(learned):
    rows = ragged()
    keys = {
        topic: DtkrRouter(k=4).fit(query([row.text for row in task_of("bert", topic, 32).rows]), 4, name_seed(topic, 0))
        for topic in TOPICS
    }
    router = DtkrRouter(k=4)
    router.load(keys, torch.device("cpu"))
    expected = router.route(query([row.text for row in rows])).slot_ids
    for method in learned:
        assert all(torch.equal(method.parts[topic]["keys"], keys[topic]["keys"]) for topic in TOPICS)
        found = [answer.slots for answer in method.answers(rows)]
        assert found == [tuple(router.names[router.task_of_slot[slot]] for slot in row) for row in expected.tolist()]


def test_retrieved_prompts_stand_before_the_text_in_the_order_of_retrieval(learned):
    method, rows = learned[0], ragged()
    method.route = route = method.router.route(method.queries(rows))
    model = method.models["farm"]
    for i, row in enumerate(rows):
        slots = torch.cat([method.values[name]["prompt"] for name in ("farm", "sea")])[route.slot_ids[i]]
        by_hand = make_prompted(method.backbone, method.setup, LABELS, 0, lambda _, slots=slots: slots.flatten(0, 1))
        torch.testing.assert_close(model.features(rows)[i], by_hand.features([row])[0])


@pytest.mark.parametrize("name", ["bert", "roberta", "llama"])
def test_with_gates_at_zero_the_output_is_the_bare_backbones_to_the_last_bit(name):
    rows, bare = ragged(), bare_model(Backbone.load(name), setup_of(name), LABELS, name_seed("sea", 0))
    learner = made(DtkrAdapter, name)
    model = learner.new_model(LABELS, name_seed("sea", 0))
    learner.parts["sea"] = learner.router.fit(query(["sea0", "sea1"]), 4, 0)
    learner.router.load(learner.parts, torch.device("cpu"))
    learner.values["sea"] = learner.new_values(0)
    learner.route = learner.router.route(learner.queries(rows))
    assert torch.equal(model.losses(rows), bare.losses(rows))
    assert model.answer(rows) == bare.answer(rows)
    learner.values["sea"]["gate"] += 0.5
    assert not torch.equal(model.losses(rows), bare.losses(rows))


def test_one_prefix_adds_the_gated_value_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    query_BNTD = torch.randn(1, 4, 3, 8, generator=generator)
    keys, values = (torch.randn(1, 1, 2, 8, generator=generator) for _ in range(2))
    gate = torch.randn(1, 1, 4, generator=generator)
    found = prefix_attention(query_BNTD, Prefix(keys, values, gate), 8**-0.5)
    for head in range(4):  # the softmax over one vector is 1
        expected = gate[0, 0, head].tanh() * values[0, 0, head // 2]
        torch.testing.assert_close(found[0, :, head], expected.expand(3, -1))


def test_several_prefixes_are_softmaxed_apart_from_the_text_and_each_scaled_by_its_gate():
    generator = torch.Generator().manual_seed(1)
    query_BNTD = torch.randn(2, 2, 3, 8, generator=generator)
    keys, values = (torch.randn(2, 5, 2, 8, generator=generator) for _ in range(2))
    gate = torch.randn(2, 5, 2, generator=generator)
    found = prefix_attention(query_BNTD, Prefix(keys, values, gate), 8**-0.5)
    for b in range(2):
        for head in range(2):
            for t in range(3):
                score = (keys[b, :, head] @ query_BNTD[b, head, t]) / 8**0.5
                share = score.exp() / score.exp().sum() * gate[b, :, head].tanh()
                torch.testing.assert_close(found[b, t, head], share @ values[b, :, head])


def test_a_layers_output_is_its_attention_and_what_the_prefix_adds(learned):
    method, rows, order = learned[1], ragged(2)[:1], [1, 6, 0, 4]
    method.route = Route(torch.tensor([order]), torch.full((1, 4), 0.25))
    encoded = method.backbone.tokenization.encode([rows[0].prompt], 32)
    attention, seen = method.attentions[0], {}
    hook = attention.register_forward_hook(lambda _, args, output: seen.update(x=args[0], y=output[0]))
    with method.prefixed():
        method.backbone.model(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask)
    hook.remove()
    heads, width = attention.num_attention_heads, attention.attention_head_size
    q, k, v = (each(seen["x"])[0].view(-1, heads, width) for each in (attention.query, attention.key, attention.value))
    values = method.values
    pool = {key: torch.cat([values[name][key] for name in ("farm", "sea")])[order, 0] for key in values["sea"]}
    for head in range(heads):
        own = (q[:, head] @ k[:, head].T / width**0.5).softmax(1) @ v[:, head]
        prefix_k, prefix_v = (pool[key][:, :, head].flatten(0, 1) for key in ("keys", "values"))
        share = (q[:, head] @ prefix_k.T / width**0.5).softmax(1) * pool["gate"][:, head].tanh().repeat_interleave(2)
        found = seen["y"][0].view(-1, heads, width)[:, head]
        torch.testing.assert_close(found, own + share @ prefix_v, rtol=1e-4, atol=1e-5)


def test_heads_of_tasks_are_mixed_by_their_weights_on_the_route(learned):
    method, rows = learned[0], ragged()
    method.route = route = method.router.route(method.queries(rows))
    names, texts = method.router.names, [answer.text for answer in method.answers(rows)]
    method.route = route
    features = method.models["sea"].features(rows)
    for i, text in enumerate(texts):
        mixed = torch.zeros(2)
        for slot, weight in zip(route.slot_ids[i].tolist(), route.weights[i], strict=True):
            head = method.models[names[method.router.task_of_slot[slot]]].head
            mixed += weight * head(features[i]).softmax(0).detach()
        assert text == LABELS[int(mixed.argmax())]


def test_rows_of_all_tasks_are_answered_right_without_being_told_which_they_are_of(learned):
    rows = [row for topic in TOPICS for row in task_of("bert", topic, 32).rows]
    for method in learned:
        answers = method.answers(rows)
        assert sum(a.text == row.target for a, row in zip(answers, rows, strict=True)) > 0.7 * len(
            rows
        )  # chance is half
        assert {answer.task for answer in answers} == set(TOPICS)


@pytest.mark.parametrize("method", [DtkrPrompt, DtkrAdapter])
def test_a_task_trains_on_its_own_slots_or_with_joint_on_all_and_never_changes_anothers(method):
    values = []
    for joint in (False, True):
        learner = made(method, "bert", joint=joint)
        learner.learn(task_of("bert", "sea"), False)
        before = {name: value.clone() for name, value in learner.values["sea"].items()}
        learner.learn(task_of("bert", "farm"), False)
        assert all(torch.equal(learner.values["sea"][name], value) for name, value in before.items())
        values.append(learner.values)
    own, joint = values
    assert all(torch.equal(own["sea"][name], joint["sea"][name]) for name in own["sea"])
    assert not all(torch.equal(own["farm"][name], joint["farm"][name]) for name in own["farm"])


@pytest.mark.parametrize(("method", "name"), KINDS)
def test_each_task_adds_as_many_numbers_and_bytes(method, name):
    learner, sizes, kept = made(method, name, epochs=1), [0], [0]
    for topic in ("sea", "farm", "city"):
        learner.learn(task_of(name, topic), False)
        sizes.append(learner.parameters)
        kept.append(learner.kept)
    width = learner.backbone.width
    head = 2 * width + 2 if name == "bert" else 0
    layers = len(learner.backbone.layers)
    groups = 2 if name == "llama" else 4
    slot = 2 * width if method is DtkrPrompt else layers * (2 * 2 * groups * 8 + 4)
    assert [b - a for a, b in pairwise(sizes)] == [4 * slot + head] * 3
    keys = 4 * 12 + 101  # 4 keys of 12 numbers, and 101 percentiles of distances
    assert [b - a for a, b in pairwise(kept)] == [4 * (4 * slot + head + keys)] * 3
