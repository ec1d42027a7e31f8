"""Outputs of the adapted model equal those of PEFT, of merged weights, and of other orders and batch sizes."""

from __future__ import annotations

import copy
import random
import warnings

import peft
import pytest
import torch
from models import (
    BACKBONES,
    FAMILIES,
    GENERATORS,
    check_invariance,
    knows,
    make_model,
    make_slm,
    make_tokenizer,
    merge,
    one_thread,  # noqa: F401
    random_task,
    route_of,
    sentence,
    texts_of,
    toy_task,
)
from torch import nn

from slm_fast import ScalableLM
from slm_fast.data import Row
from slm_fast.ops import Route
from slm_fast.query import TrunkQuery
from slm_fast.scheduler import row_seed
from slm_fast.tokenization import Encoded

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")  # transformers warns when PEFT reads it

SOME_TEXTS = ["sea1 sea2 good3", "farm1 farm2 farm3 farm4 word5 bad0 the question :", "sky9"]


def outputs(slm: ScalableLM, model: nn.Module, texts: list[str]) -> dict[str, torch.Tensor]:
    """Hidden states and logits of a bare, adapted or PEFT model for a padded batch of texts, at real tokens."""
    encoded = slm.model.backbone.tokenization.encode(texts, 64)
    kind = slm.model.backbone.kind
    inputs = {"input_ids": encoded.input_ids, "attention_mask": encoded.attention_mask}
    real = encoded.attention_mask.bool()
    with torch.no_grad():
        if kind == "encoder":
            return {"hidden": model(**inputs).last_hidden_state[real]}
        if kind == "causal":
            out = model(**inputs, output_hidden_states=True)
            return {"logits": out.logits[real], "hidden": out.hidden_states[-1][real]}
        answer = torch.tensor([[0, 9, 12, 15]]).expand(len(texts), -1)
        out = model(**inputs, decoder_input_ids=answer, output_hidden_states=True)
        return {"logits": out.logits, "hidden": out.encoder_last_hidden_state[real]}


def adapted_outputs(slm, route: Route) -> dict[str, torch.Tensor]:
    """`outputs` of the adapted model for `SOME_TEXTS`, with one route per text."""
    found, _, _ = slm.model.call(
        lambda: outputs(slm, slm.model.backbone.model, SOME_TEXTS), torch.ones(len(SOME_TEXTS), 1), route
    )
    return found


@torch.inference_mode()
def features_of(slm, encoded: Encoded, route: Route | None = None) -> torch.Tensor:
    """Mean last hidden states [B, H] of real tokens."""
    return TrunkQuery.pool(slm.model.forward(encoded, route).hidden, encoded.attention_mask)


def with_peft(name: str, tasks: list, modules: list[str]) -> peft.PeftModel:
    """A PEFT model with one LoRA adapter per task, named after it, that holds its first slot."""
    model = None
    for task in tasks:
        rank = next(iter(task.values.values()))[0].shape[1]
        config = peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=modules, bias="none")
        if model is None:
            model = peft.get_peft_model(make_model(name), config, adapter_name=task.name)
        else:
            model.add_adapter(task.name, config)
        for module, (lora_a, lora_b) in task.values.items():
            layer = model.base_model.model.get_submodule(module)
            layer.lora_A[task.name].weight.data = lora_a[0].clone()
            layer.lora_B[task.name].weight.data = lora_b[0].T.clone()
    assert model is not None
    return model.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_one_hot_route_equals_pefts_lora_with_the_same_weights(name):
    slm = make_slm(name)
    tasks = [random_task(slm, "farm"), random_task(slm, "sea", rank=3)]
    knows(slm, *tasks)
    expected = with_peft(name, tasks, slm.model.modules)
    bare = outputs(slm, make_model(name), SOME_TEXTS)
    for slot, task in enumerate(tasks):
        expected.set_adapter(task.name)
        route = route_of([[slot, -1]] * 3, [[1.0, 0.0]] * 3)
        got = adapted_outputs(slm, route)
        for what, value in outputs(slm, expected, SOME_TEXTS).items():
            torch.testing.assert_close(got[what], value, rtol=1e-4, atol=1e-4)
            assert (value - bare[what]).abs().max() > 0.1  # the increments have an effect


@pytest.mark.parametrize("name", FAMILIES)
def test_a_weighted_route_equals_pefts_weighted_adapter(name):
    slm = make_slm(name)
    tasks = [random_task(slm, "city", rank=2), random_task(slm, "farm"), random_task(slm, "sea")]
    knows(slm, *tasks)
    expected = with_peft(name, tasks, slm.model.modules)
    expected.add_weighted_adapter(["sea", "city"], [0.7, 0.3], "mixed", combination_type="cat")
    expected.set_adapter("mixed")
    got = adapted_outputs(slm, route_of([[2, 0]] * 3, [[0.7, 0.3]] * 3))
    for what, value in outputs(slm, expected, SOME_TEXTS).items():
        torch.testing.assert_close(got[what], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_features_are_the_mean_over_real_tokens_of_each_rows_merged_model(name):
    slm = make_slm(name)
    tasks = [random_task(slm, "farm"), random_task(slm, "sea", slots=2)]
    knows(slm, *tasks)
    texts = texts_of(toy_task("farm", rows=4), toy_task("sea", rows=4))
    features = features_of(slm, slm.model.backbone.tokenization.encode(texts, 64))
    answers = slm.predict(texts)
    tokenizer = make_tokenizer(name)
    for text, feature, answer in zip(texts, features, answers, strict=True):
        alone = merge(make_model(name), tasks, answer.route)
        with torch.inference_mode():
            hidden = alone(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state
        torch.testing.assert_close(feature, hidden[0].mean(0), rtol=1e-4, atol=1e-4)


def alone(slm: ScalableLM, bare: nn.Module, tasks: list, row: Row, route, seed: int = 0, **options) -> str:
    """Text that plain transformers generates for one row with its route's increments merged into the weights."""
    tokenizer, kind = slm.model.backbone.tokenizer, slm.model.backbone.kind
    ids = tokenizer(row.prompt)["input_ids"]
    if kind == "causal":
        ids = ids + tokenizer("\n", add_special_tokens=False)["input_ids"]
    merged = merge(bare, tasks, route)
    torch.manual_seed(seed)
    out = merged.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    return tokenizer.decode(out[0, len(ids) if kind == "causal" else 1 :], skip_special_tokens=True).strip()


def mixed_rows() -> list[Row]:
    rng = random.Random(5)
    rows = [
        Row(sentence(topic, rng, words=n)) for topic, n in zip(("sea", "farm", "city") * 3, range(1, 10), strict=True)
    ]
    return [*rows, Row("sky1 sea2 farm3 city4 word5"), Row("word1 word2")]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    ("name", "router"),
    [(name, "gaussian") for name, row in BACKBONES.items() if row[0] != "encoder"]
    + [(name, "dtkr") for name in GENERATORS],
)
def test_a_mixed_batch_generates_what_each_row_alone_does_with_merged_weights(name, router, beams):
    slm = make_slm(name, router=router, groups=4 if router == "dtkr" else None, k=3)
    bare = make_model(name)
    tasks = [random_task(slm, topic, slots=2 if router == "dtkr" else 1) for topic in ("city", "farm", "sea")]
    knows(slm, *tasks)
    rows = mixed_rows()
    answers = slm.predict(rows, batch_size=len(rows), max_new_tokens=7, beams=beams)
    assert len({answer.task for answer in answers}) > 1
    assert all(len(answer.route.slots) == 3 for answer in answers)
    without = slm.predict(rows, max_new_tokens=7, beams=beams, bare=True)
    differ = 0
    for row, answer, plain in zip(rows, answers, without, strict=True):
        assert answer.text == alone(slm, bare, tasks, row, answer.route, max_new_tokens=7, num_beams=beams)
        differ += answer.text != plain.text
    assert differ > len(rows) / 2


@pytest.mark.parametrize("name", GENERATORS)
def test_instruction_rows_generate_what_each_does_alone_with_merged_weights(name):
    slm = make_slm(name)
    tasks = [random_task(slm, topic) for topic in ("farm", "sea")]
    knows(slm, *tasks)
    rows = [
        Row("sea1 sea2 sea3 sea4", instruction="the question :"),
        Row("farm5 farm6"),
        Row("farm7 farm8 farm9", instruction="word1 word2 answer"),
    ]
    for beams in (1, 2):
        for row, answer in zip(rows, slm.predict(rows, max_new_tokens=6, beams=beams), strict=True):
            expected = alone(slm, make_model(name), tasks, row, answer.route, max_new_tokens=6, num_beams=beams)
            assert answer.text == expected


@pytest.mark.parametrize("name", GENERATORS)
def test_sampling_repeats_with_its_seed_and_equals_merged_weights_row_by_row(name):
    slm = make_slm(name)
    tasks = [random_task(slm, topic) for topic in ("farm", "sea")]
    knows(slm, *tasks)
    rows = mixed_rows()
    options = {"sample": True, "temperature": 1.3, "top_p": 0.9, "max_new_tokens": 8}
    first = slm.predict(rows, **options)
    assert slm.predict(rows, **options) == first
    assert [answer.text for answer in slm.predict(rows, seed=1, **options)] != [answer.text for answer in first]
    generation = {"do_sample": True, "top_k": 0, "temperature": 1.3, "top_p": 0.9, "max_new_tokens": 8}
    for i, answer in enumerate(slm.predict(rows, batch_size=1, **options)):
        assert answer.text == alone(
            slm, make_model(name), tasks, rows[i], answer.route, seed=row_seed(0, i), **generation
        )
    alike = slm.predict([rows[0]] * 8, batch_size=4, **options)
    assert [answer.text for answer in alike[:4]] != [answer.text for answer in alike[4:]]


@pytest.mark.parametrize("router", ["gaussian", "dtkr"])
@pytest.mark.parametrize("name", FAMILIES)
def test_order_and_batch_size_do_not_change_a_tiny_models_answers(name, router):
    slm = make_slm(name, router=router, groups=4 if router == "dtkr" else None, k=3)
    knows(slm, *[random_task(slm, topic) for topic in ("city", "farm", "sea", "sky")])
    rows = [*mixed_rows(), *mixed_rows()[::-1], {"instruction": "answer", "input": "sea1 sea2"}]
    check_invariance(slm, rows, max_new_tokens=4)


class Opaque(nn.Module):
    """A linear layer without a weight, sizes or other attributes of nn.Linear."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def opaque_model(name: str) -> nn.Module:
    model = make_model(name)
    for module in make_slm(name).model.modules:
        if "DenseReluDense" in module:  # transformers accesses the weight of this one
            continue
        parent, _, child = module.rpartition(".")
        setattr(model.get_submodule(parent), child, Opaque(model.get_submodule(module)))
    return model


def quantised_model(name: str) -> nn.Module:
    model = make_model(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantised.modules())
    return quantised


@pytest.mark.parametrize("name", FAMILIES)
def test_opaque_linear_layers_answer_as_open_ones_do(name):
    slm = ScalableLM.from_backbone(opaque_model(name), tokenizer=make_tokenizer(name))
    open_slm = make_slm(name)
    assert slm.model.widths == open_slm.model.widths
    tasks = [random_task(open_slm, topic) for topic in ("farm", "sea")]
    texts = texts_of(toy_task("farm", rows=4), toy_task("sea", rows=4))
    expected = knows(open_slm, *tasks).predict(texts, max_new_tokens=5)
    assert knows(slm, *tasks).predict(texts, max_new_tokens=5) == expected


@pytest.mark.filterwarnings("ignore:quantized")  # torch's dynamically quantised layers have no backward
def test_a_task_is_learned_on_a_dynamically_quantised_backbone():
    slm = ScalableLM.from_backbone(quantised_model("bert"), tokenizer=make_tokenizer("bert"))
    slm.learn(toy_task("sea"), epochs=10, batch_size=8, learning_rate=1e-2)
    assert slm.evaluate({"sea": toy_task("sea", rows=60, seed=1)}).average > 0.7


def test_increments_are_added_to_a_dynamically_quantised_layers_own_output():
    slm = ScalableLM.from_backbone(quantised_model("bert"), tokenizer=make_tokenizer("bert"))
    tasks = [random_task(slm, topic) for topic in ("farm", "sea")]
    knows(slm, *tasks)
    module = slm.model.modules[0]
    layer, x = slm.model.backbone.model.get_submodule(module), torch.randn(2, 3, slm.model.widths[module][0])
    got, _, _ = slm.model.call(lambda: layer(x), torch.ones(2, 3), route_of([[1], [0]], [[1.0], [0.5]]))
    lora_a, lora_b = slm.model.pool.values[module]
    increments = torch.stack([x[0] @ lora_a[1].T @ lora_b[1], 0.5 * x[1] @ lora_a[0].T @ lora_b[0]])
    torch.testing.assert_close(got, layer.base(x) + increments, rtol=1e-5, atol=1e-5)
    assert {answer.label for answer in slm.predict(texts_of(toy_task("farm"), toy_task("sea")))} == {"yes", "no"}


@pytest.mark.parametrize(
    ("name", "build"),
    [(name, build) for name in FAMILIES for build in (make_model, opaque_model)] + [("bert", quantised_model)],
)
def test_with_an_empty_route_the_model_is_bit_identical_to_the_bare_one(name, build):
    model = build(name)
    bare = copy.deepcopy(model)
    slm = ScalableLM.from_backbone(model, tokenizer=make_tokenizer(name))
    knows(slm, *[random_task(slm, topic) for topic in ("farm", "sea")])
    expected = outputs(slm, bare, SOME_TEXTS)
    got = adapted_outputs(slm, slm.model.empty_route(len(SOME_TEXTS)))
    outside = outputs(slm, slm.model.backbone.model, SOME_TEXTS)
    for what, value in expected.items():
        assert torch.equal(got[what], value)
        assert torch.equal(outside[what], value)


def test_a_batch_may_hold_rows_with_and_without_a_route():
    slm = make_slm("bert")
    tasks = [random_task(slm, topic) for topic in ("farm", "sea")]
    knows(slm, *tasks)
    route = route_of([[0], [-1], [1]], [[1.0], [0.0], [1.0]])
    encoded = slm.model.backbone.tokenization.encode(["sea1 sea2 sea3"] * 3, 64)
    rows, bare = features_of(slm, encoded, route), features_of(slm, encoded, slm.model.empty_route(3))
    torch.testing.assert_close(rows[1], bare[1])
    assert (rows[0] - bare[0]).abs().max() > 0.05
    assert (rows[2] - rows[0]).abs().max() > 0.05


def test_only_one_batch_passes_at_a_time():
    slm = make_slm("bert")
    with pytest.raises(RuntimeError, match="one batch"):
        slm.model.call(lambda: slm.model.queries([Row("sea1")]), torch.ones(1, 1))
    assert slm.model.queries([Row("sea1")]).shape == (1, 96)  # the next batch succeeds


def test_increments_are_never_added_below_the_last_tap():
    slm = make_slm("bert", taps=(2,))
    knows(slm, random_task(slm, "sea"))
    assert {int(module.split(".")[2]) for module in slm.model.modules} == {2}
    encoded = slm.model.backbone.tokenization.encode(["sea1 sea2"], 64)
    plain = make_model("bert")
    with torch.inference_mode():
        states = plain(input_ids=encoded.input_ids, output_hidden_states=True).hidden_states
        query = slm.model.forward(encoded).query
    torch.testing.assert_close(query, torch.cat([states[2].mean(1), states[2].amax(1) / 4], 1))
