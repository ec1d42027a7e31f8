"""Tests of the rivals that learn soft prompts: how prompts are read, which task reads which, and what is frozen."""

from __future__ import annotations

import pytest
import torch
from models import FAMILIES
from prompt_rivals import LABELS, assert_resumes, ragged, setup_of, task_of, tiny  # noqa: F401

from benchmarks.continual.methods.common import make_model as bare_model
from benchmarks.continual.methods.progressive_prompts import ProgressivePrompts, Reparameterised
from benchmarks.continual.methods.prompt_tuning import PromptTuning
from benchmarks.continual.methods.prompts import make_prompted, prompt_inputs, starting_prompt
from slm_fast.backbone import Backbone

SEQUENTIAL = [PromptTuning, ProgressivePrompts]
SMALL = {PromptTuning: {"length": 3}, ProgressivePrompts: {"length": 2, "bottleneck": 400}}


def prompted(name: str, length: int):
    backbone = Backbone.load(name)
    prompt = starting_prompt(backbone, length, 0)
    return make_prompted(backbone, setup_of(name), LABELS, 0, lambda rows: prompt)


@pytest.mark.parametrize("name", ["bert", "roberta", "t5", "llama"])
def test_a_prompt_of_no_vectors_changes_no_bit_of_a_loss_or_answer(name):
    rows, setup = ragged(), setup_of(name)
    bare, empty = bare_model(Backbone.load(name), setup, LABELS, 0), prompted(name, 0)
    assert torch.equal(bare.losses(rows), empty.losses(rows))
    assert bare.answer(rows) == empty.answer(rows)


@pytest.mark.parametrize("name", ["bert", "roberta", "t5", "llama", "mistral"])
def test_a_batch_is_answered_as_each_row_alone(name):
    rows, model = ragged(), prompted(name, 5)
    torch.testing.assert_close(model.losses(rows), torch.cat([model.losses([row]) for row in rows]))
    assert model.answer(rows) == [model.answer([row])[0] for row in rows]


def test_an_encoders_prompt_stands_at_its_first_position_and_texts_keep_theirs():
    backbone = Backbone.load("roberta")
    ids, mask = torch.tensor([[5, 6, 7], [5, 6, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    inputs = prompt_inputs(backbone, torch.zeros(2, 2, backbone.width), ids, mask)
    first = backbone.model.config.pad_token_id + 1
    assert inputs["position_ids"][0].tolist() == [first, first, first, first + 1, first + 2]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]


def test_a_causal_prompt_is_read_as_tokens_of_these_embeddings_would_be():
    backbone, rows = Backbone.load("llama"), ragged(2)
    tokens = torch.tensor([9, 4, 30])
    prompt = backbone.model.get_input_embeddings().weight[tokens]
    model = make_prompted(backbone, setup_of("llama"), (), 0, lambda rows: prompt)
    for row in rows:
        encoded = backbone.tokenization.encode([row.prompt], 32)
        whole = torch.cat([tokens[None], encoded.input_ids], 1)
        expected = backbone.model(input_ids=whole, attention_mask=torch.ones_like(whole)).logits[:, 3:]
        model.prompt = prompt[None]
        torch.testing.assert_close(model.logits(encoded.input_ids, encoded.attention_mask, None), expected)


def test_a_prompt_begins_at_the_mean_embedding_of_each_word_and_then_at_random_tokens_of_the_seed():
    backbone = Backbone.load("bert")
    table = backbone.model.get_input_embeddings().weight
    vocabulary = backbone.tokenizer.get_vocab()
    prompt = starting_prompt(backbone, 4, 0, ("yes", "the question"))
    assert torch.equal(prompt[0], table[vocabulary["yes"]])
    torch.testing.assert_close(prompt[1], (table[vocabulary["the"]] + table[vocabulary["question"]]) / 2)
    drawn = [int((table == vector).all(1).nonzero()) for vector in prompt[2:]]
    assert not set(drawn) & set(backbone.tokenizer.all_special_ids)
    assert torch.equal(prompt, starting_prompt(backbone, 4, 0, ("yes", "the question")))
    assert not torch.equal(prompt, starting_prompt(backbone, 4, 1, ("yes", "the question")))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", SEQUENTIAL)
def test_a_run_resumed_from_its_state_ends_as_one_that_was_never_interrupted(method, name):
    tasks = [task_of(name, topic) for topic in ("sea", "farm")]
    assert_resumes(lambda: method(setup_of(name), **SMALL[method]), tasks)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", SEQUENTIAL)
def test_learning_lowers_the_loss_and_changes_no_byte_of_the_backbone(method, name):
    task, losses = task_of(name, "sea", 24), []
    for epochs in (1, 16):
        learner = method(setup_of(name, epochs=epochs), **SMALL[method])
        backbone = learner.backbone if method is ProgressivePrompts else learner.model.backbone
        before = {key: value.clone() for key, value in backbone.model.state_dict().items()}
        learner.learn(task, False)
        after = backbone.model.state_dict()
        assert all(torch.equal(value, after[key]) for key, value in before.items())
        assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
        model = learner.models["sea"] if method is ProgressivePrompts else learner.model
        losses.append(float(model.losses(task.rows).detach().mean()))
    assert losses[1] < 0.97 * losses[0]


def test_prompt_tuning_keeps_as_much_after_two_tasks_as_after_one():
    method = PromptTuning(setup_of("bert"), length=3)
    width = method.prompt.shape[1]
    method.learn(task_of("bert", "sea"), False)
    before = method.prompt.detach().clone()
    method.learn(task_of("bert", "farm"), False)
    assert not torch.equal(before, method.prompt)
    assert method.parameters == 3 * width + 2 * width + 2
    assert method.kept == 4 * method.parameters


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_progressive_prompts_never_changes_an_earlier_prompt_and_grows_by_as_much_with_each_task(name):
    method, sizes, kept = ProgressivePrompts(setup_of(name), **SMALL[ProgressivePrompts]), [], []
    seen: dict[str, torch.Tensor] = {}
    for topic in ("sea", "farm", "city"):
        method.learn(task_of(name, topic), False)
        for earlier, prompt in seen.items():
            assert prompt.numpy().tobytes() == method.prompts[earlier].numpy().tobytes()
        seen = {each: prompt.clone() for each, prompt in method.prompts.items()}
        sizes.append(method.parameters)
        kept.append(method.kept)
    head = 2 * method.backbone.width + 2 if name == "bert" else 0
    assert sizes == [i * (2 * method.backbone.width + head) for i in (1, 2, 3)]
    assert kept == [4 * size for size in sizes]


def test_each_task_is_answered_with_its_own_prompt_before_those_of_earlier_tasks():
    method = ProgressivePrompts(setup_of("t5"), **SMALL[ProgressivePrompts])
    tasks = [task_of("t5", topic) for topic in ("sea", "farm", "city")]
    for task in tasks:
        method.learn(task, False)
    sea, farm, city = (method.prompts[task.name] for task in tasks)
    assert torch.equal(method.read("sea"), sea)
    assert torch.equal(method.read("farm"), torch.cat([farm, sea]))
    assert torch.equal(method.read("city"), torch.cat([city, farm, sea]))
    before = method.answers(tasks[0].rows + tasks[1].rows, ["sea"] * 12 + ["farm"] * 12)
    method.prompts["city"] = torch.randn_like(city)
    assert method.answers(tasks[0].rows + tasks[1].rows, ["sea"] * 12 + ["farm"] * 12) == before
    model, rows, whole = method.models["city"], tasks[2].rows, torch.cat([method.prompts["city"], farm, sea])
    by_hand = make_prompted(method.backbone, method.setup, (), 0, lambda rows: whole)
    assert torch.equal(model.losses(rows), by_hand.losses(rows))
    method.prompts["sea"] = torch.randn_like(sea)  # city reads this prompt too
    assert not torch.equal(model.losses(rows), by_hand.losses(rows))


def test_a_reparameterised_prompt_is_itself_and_what_an_mlp_of_one_hidden_layer_makes_of_it():
    prompt = torch.randn(3, 8)
    own = Reparameterised(prompt.clone(), 16, 0)
    first, second = own.mlp[0], own.mlp[2]
    hidden = (prompt @ first.weight.T + first.bias).clamp(min=0)
    torch.testing.assert_close(own(), prompt + hidden @ second.weight.T + second.bias)
