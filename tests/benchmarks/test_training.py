"""Tests of the training benchmark: what rivals train, their loss and layer, and kept results of other shapes."""

from __future__ import annotations

import sys

import pytest
import torch
from models import FAMILIES, make_model, make_tokenizer, toy_task
from torch.nn.functional import cross_entropy

from benchmarks.speed.training import __main__ as training
from benchmarks.speed.training.paper import SLOTS, DenseLinear, Passing
from benchmarks.speed.training.rows import LENGTH, Rows
from benchmarks.tables import read_csv, write_csv
from slm_fast import ops
from slm_fast.backbone import Backbone
from slm_fast.ops import Route
from slm_fast.options import LearnOptions
from slm_fast.query import TrunkQuery

FEW = ["--rows", "8", "--epochs", "1", "--batch-size", "2", "--rounds", "1"]


def run(module, monkeypatch, output, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", [module.__name__, "--output", str(output), *arguments])
    status: int = module.main()
    return status


def test_learning_is_timed_beside_other_shapes_and_its_memory_stays(few_features, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "peak", lambda method, _: len(method))
    output = tmp_path / "training.csv"
    assert run(training, monkeypatch, output, "--shape", "minilm", *FEW) == 0
    rows = read_csv(output)
    assert [row["method"] for row in rows] == list(training.METHODS)
    write_csv(output, [*rows, *(row | {"shape": "bert-base"} for row in rows)])
    assert run(training, monkeypatch, output, "--shape", "minilm", *FEW, "--memory") == 0
    assert run(training, monkeypatch, output, "--shape", "minilm", *FEW) == 0
    kept = {(row["shape"], row["method"]): row["peak_mib"] for row in read_csv(output)}
    assert kept == {("minilm", name): str(len(name)) for name in training.METHODS} | {
        ("bert-base", name): "" for name in training.METHODS
    }
    with pytest.raises(SystemExit):
        run(training, monkeypatch, output, "--shape", "minilm", "--memory", "--batch-size", "4")
    assert "was timed with rows 8" in capsys.readouterr().err


@pytest.mark.parametrize("method", [name for name in training.METHODS if not name.startswith(training.OURS)])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_rival_trains_increments_and_nothing_of_the_backbone(name: str, method: str) -> None:
    model, task = make_model(name), toy_task("farm", rows=8)
    before = [(weight, weight.clone()) for weight in model.parameters()]
    options = LearnOptions(epochs=1, batch_size=3)
    training.METHODS[method].make(lambda: (model, make_tokenizer(name)), task, options)()
    assert all(torch.equal(weight, kept) for weight, kept in before)
    raised = [parameter for module, parameter in model.named_parameters() if "lora_b" in module.lower()]
    assert raised
    assert all(parameter.abs().max() > 0 for parameter in raised)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_rivals_loss_is_the_mean_over_labels_or_over_tokens_of_answers(name: str) -> None:
    backbone = Backbone(make_model(name), make_tokenizer(name), name)
    task = toy_task("sea", rows=5)
    rows, head = Rows(backbone, task), torch.nn.Linear(backbone.width, 2)
    losses = []
    for row in task.rows[1:4]:  # one at a time, without padding
        prompt = torch.tensor(backbone.tokenization.tokenize([row.prompt], LENGTH)[0])
        if backbone.kind == "encoder":
            hidden = backbone.model(input_ids=prompt).last_hidden_state
            label = torch.tensor([task.labels.index(row.target)])
            losses.append(cross_entropy(head(TrunkQuery.pool(hidden, torch.ones_like(prompt))), label))
            continue
        answer = torch.tensor(backbone.tokenization.encode_answers([row.target], LENGTH))
        if backbone.kind == "causal":
            logits = backbone.model(torch.cat([prompt, answer], 1)).logits[0, prompt.shape[1] - 1 : -1]
        else:
            start = torch.zeros(1, 1, dtype=torch.int64)
            logits = backbone.model(prompt, decoder_input_ids=torch.cat([start, answer[:, :-1]], 1)).logits[0]
        losses.append(cross_entropy(logits, answer[0]))
    torch.testing.assert_close(rows.loss(backbone.model, head, [1, 2, 3]), torch.stack(losses).mean())


def test_the_papers_layer_has_the_operators_output_and_gradients() -> None:
    torch.manual_seed(0)
    route = Route(torch.tensor([[0, 3, 1], [2, 2, 0]]), torch.rand(2, 3))
    layer = DenseLinear(torch.nn.Linear(7, 5), 2, Passing(route))
    layer.reset()
    assert layer.lora_a.shape == (SLOTS, 2, 7)
    assert (layer.lora_b == 0).all()
    with torch.no_grad():
        layer.lora_b.normal_()
    x, grad = torch.randn(2, 3, 7, requires_grad=True), torch.randn(2, 3, 5)
    values = (x, layer.lora_a, layer.lora_b)
    ours = ops.multi_lora(*values, route.slot_ids, route.weights, base=layer.base(x))
    theirs = layer(x)
    torch.testing.assert_close(theirs, ours)
    expected, found = (torch.autograd.grad(y, values, grad) for y in (ours, theirs))
    for mine, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, mine)
