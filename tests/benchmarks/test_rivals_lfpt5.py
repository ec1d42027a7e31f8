"""Tests of LFPT5, with a tiny T5 trained to generate samples: pseudo samples, losses, state and memory."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from models import make_model, make_tokenizer
from prompt_rivals import LABELS, assert_resumes, setup_of, task_of

from benchmarks.continual.methods import METHODS, lfpt5
from benchmarks.continual.methods.lfpt5 import KEPT, Lfpt5, Pseudo
from slm_fast.backbone import Backbone
from slm_fast.data import Row, Task
from slm_fast.tokenization import pad

TOPICS = ("sea", "farm")


@functools.cache
def trained():
    """A tiny T5 trained to generate samples like "sea3 sea7 good0 answer yes" from random input embeddings."""
    backbone = Backbone(make_model("t5"), make_tokenizer("t5"), "t5")
    rows = [row for topic in TOPICS for row in task_of("bert", topic, 32).rows]
    texts = [f"{row.text} answer {row.target}" for row in rows]
    labels, mask = pad(backbone.tokenization.encode_answers(texts, 32), 0)
    labels[mask == 0] = -100
    model = backbone.model.requires_grad_(True)
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=5e-3), torch.Generator().manual_seed(0)
    for _ in range(120):
        batch = labels[torch.randint(len(labels), (16,), generator=generator)]
        noise = 0.1 * torch.randn(16, 5, model.config.d_model, generator=generator)
        loss = model(inputs_embeds=noise, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False)


@pytest.fixture(autouse=True)
def writing(monkeypatch):
    """Make `Backbone.load` return a copy of that T5."""
    monkeypatch.setattr(Backbone, "load", lambda name: Backbone(copy.deepcopy(trained()), make_tokenizer("t5"), name))


def made(**options) -> Lfpt5:
    return Lfpt5(setup_of("t5", **options), length=3, separator="answer")


def labelled(topic: str, rows: int = 12) -> Task:
    return task_of("bert", topic, rows)


def knowing(*topics: str) -> Lfpt5:
    method = made()
    method.labels = {topic: list(LABELS) for topic in topics}
    return method


def test_pseudo_samples_have_a_text_and_a_label_of_their_task_and_few_are_kept():
    rows = knowing("sea").pseudo("sea", 0)
    assert {row.target for row in rows} == set(LABELS)
    assert len(rows) == KEPT * len(LABELS)
    assert all(isinstance(row, Pseudo) and row.task == "sea" and row.text and "answer" not in row.text for row in rows)


def test_pseudo_samples_come_from_the_prompt_the_tasks_token_and_the_seed():
    method = knowing(*TOPICS)
    first = method.written("sea", 32, 0)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert method.written("sea", 32, 0) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert method.written("sea", 32, 1) != first
    assert method.written("farm", 32, 0) != first
    method.prompt.data += 1.0
    assert method.written("sea", 32, 0) != first


def test_a_text_without_one_separator_or_with_a_label_of_another_task_is_no_sample():
    method = knowing("sea")
    assert method.parsed("sea", "sea1 sea2 answer yes") == Pseudo("sea1 sea2", "yes", task="sea")
    for text in ("sea1 sea2 yes", "sea1 answer yes answer no", "sea1 answer maybe", "answer yes", "sea1 answer"):
        assert method.parsed("sea", text) is None
    method.labels["sea"] = None
    assert method.parsed("sea", "sea1 answer the question") == Pseudo("sea1", "the question", task="sea")


def test_a_long_text_is_cut_so_that_what_is_generated_still_has_its_answer():
    (row,) = made().generative([Row(" ".join(["sea1"] * 100), "yes")])
    assert row.prompt == ""
    assert row.target.split() == ["sea1"] * 29 + ["answer", "yes"]  # 32 tokens with the end token


def test_kl_is_nothing_until_the_prompt_changes_and_then_that_of_each_answers_tokens():
    method = made()
    rows = [Row("sea1 good0", "yes"), Row("sea2 bad0 bad0 bad1", "the answer")]
    old = method.prompt.detach().clone()
    assert float(method.consistency(rows, old).detach()) == 0.0
    method.prompt.data += torch.randn(old.shape, generator=torch.Generator().manual_seed(0))
    expected = 0.0
    for row in rows:
        said = []
        for prompt in (old, method.prompt.detach()):
            (tokens,), _ = method.backbone.tokenization.tokenize([row.prompt], 32)
            (answer,) = method.backbone.tokenization.encode_answers([row.target], 32)
            text = method.backbone.model.get_input_embeddings()(torch.tensor(tokens))
            whole = torch.cat([prompt, text])[None]
            logits = method.backbone.model(inputs_embeds=whole, labels=torch.tensor([answer])).logits[0]
            said.append(logits.softmax(1))
        expected += float((said[0] * (said[0] / said[1]).log()).sum()) / len(rows)
    found = method.consistency(rows, old)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-3)
    found.backward()
    assert method.prompt.grad.abs().sum() > 0


def test_a_later_task_is_learned_beside_samples_written_before_it_was(monkeypatch):
    method, learned = made(epochs=1), []
    fit = method.solver.fit
    monkeypatch.setattr(
        method.solver, "fit", lambda name, rows, *rest, **named: (learned.append(rows), fit(name, rows, *rest, **named))
    )
    for topic in TOPICS:
        method.learn(labelled(topic), False)
    first, second = learned
    assert first == labelled("sea").rows
    assert second[-12:] == labelled("farm").rows
    pseudo = second[:-12]
    assert pseudo
    assert all(isinstance(row, Pseudo) and row.task == "sea" for row in pseudo)


def test_the_prompt_learns_to_solve_and_to_generate_and_no_byte_of_the_backbone_changes(monkeypatch):
    task, generating = labelled("sea", 24), []
    for weight in (lfpt5.GENERATE, 0.0):
        monkeypatch.setattr(lfpt5, "GENERATE", weight)
        method = made(epochs=8)
        before = {key: value.clone() for key, value in method.backbone.model.state_dict().items()}
        solving = float(method.solver.losses(task.rows).detach().mean())
        method.learn(task, False)
        assert float(method.solver.losses(task.rows).detach().mean()) < 0.9 * solving
        generator = method.generator(["sea"] * len(task.rows))
        generating.append(float(generator.losses(method.generative(task.rows)).detach().mean()))
        after = method.backbone.model.state_dict()
        assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert generating[0] < generating[1]


def test_a_run_resumed_from_its_state_ends_as_one_that_was_never_interrupted():
    assert_resumes(made, [labelled(topic) for topic in TOPICS])


def test_what_is_kept_is_the_prompt_however_many_tasks_there_are():
    method = made(epochs=1)
    for topic in (*TOPICS, "city"):
        method.learn(labelled(topic), False)
        assert method.parameters == 3 * method.backbone.width
        assert method.kept == 4 * method.parameters


def test_rivals_say_which_backbones_they_run_on_and_whether_they_need_the_task():
    kinds = {name: (entry.kinds, entry.told) for name, entry in METHODS.items()}
    every = ("encoder", "seq2seq", "causal")
    assert kinds["lfpt5"] == (("seq2seq",), False)
    assert kinds["prompt"] == kinds["dtkr-prompt"] == (every, False)
    assert kinds["progressive"] == (every, True)
    assert kinds["dtkr-adapter"] == (("encoder", "causal"), False)
