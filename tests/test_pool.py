"""The pool of tasks: slot numbering in name order, and heads that classify over the labels of all tasks at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slm_fast import ops
from slm_fast.ops import Route
from slm_fast.pool import Pool
from slm_fast.tasks import LearnedTask

CPU = torch.device("cpu")
IN, OUT, HIDDEN = 5, 4, 6
MODULES = ("layer.1.query", "layer.0.value")


def make_task(name: str, *, slots: int = 1, rank: int = 2, labels: Sequence[str] | None = ("no", "yes")) -> LearnedTask:
    generator = torch.Generator().manual_seed(sum(name.encode()))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return LearnedTask(
        name=name,
        labels=None if labels is None else tuple(labels),
        values={module: (random(slots, rank, IN), random(slots, rank, OUT)) for module in MODULES},
        router={},
        head=None if labels is None else (random(len(labels), HIDDEN), random(len(labels))),
    )


def pool_of(*tasks: LearnedTask, dtype: torch.dtype = torch.float32) -> Pool:
    return Pool(tasks, CPU, dtype)


# Two tasks share the label "bad", one has one more label than the others, and the numbers of slots differ.
ZEBRA = make_task("zebra", slots=2, labels=("bad", "good"))
APPLE = make_task("apple", slots=1, labels=("bad", "fair", "ripe"))
MANGO = make_task("mango", slots=3, labels=("hot", "cold"))
WORDS = ["bad", "cold", "fair", "good", "hot", "ripe"]
# Slots: 0 = apple, 1..3 = mango, 4..5 = zebra.
ROUTE = Route(
    torch.tensor([[0, 2, 4], [5, 4, 3], [1, -1, -1], [-1, -1, -1], [0, 3, -1]]),
    torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.6, 0.4, 0.0]]),
)


def test_tasks_stand_in_name_order_however_they_were_learned() -> None:
    for order in ([ZEBRA, APPLE, MANGO], [MANGO, ZEBRA, APPLE]):
        pool = pool_of(*order)
        assert pool.names == ["apple", "mango", "zebra"]
        assert pool.slot_task.tolist() == [0, 1, 1, 1, 2, 2]
        assert pool.slots == 6
        assert pool.heads is not None
        assert pool.heads.words == WORDS
        for module in MODULES:
            for which in (0, 1):
                expected = torch.cat([task.values[module][which] for task in (APPLE, MANGO, ZEBRA)])
                assert torch.equal(pool.values[module][which], expected)


def test_the_slots_of_a_task_are_those_that_hold_its_values() -> None:
    pool = pool_of(ZEBRA, APPLE, MANGO)
    for task in (ZEBRA, APPLE, MANGO):
        for module in MODULES:
            assert torch.equal(pool.values[module][0][pool.slots_of(task.name)], task.values[module][0])
            assert torch.equal(pool.values[module][1][pool.slots_of(task.name)], task.values[module][1])


def test_values_take_the_backbones_dtype_and_heads_stay_float32() -> None:
    pool = pool_of(APPLE, MANGO, dtype=torch.bfloat16)
    assert {tensor.dtype for pair in pool.values.values() for tensor in pair} == {torch.bfloat16}
    assert pool.heads is not None
    assert (pool.heads.weight.dtype, pool.heads.bias.dtype) == (torch.float32, torch.float32)


def test_tasks_of_smaller_rank_are_filled_up_without_changing_their_increments() -> None:
    tasks = [make_task("a", rank=1), make_task("b", rank=4, slots=2), make_task("c", rank=3)]
    pool = pool_of(*tasks)
    x = torch.randn(4, 3, IN, generator=torch.Generator().manual_seed(0))
    for module in MODULES:
        lora_a, lora_b = pool.values[module]
        assert (list(lora_a.shape), list(lora_b.shape)) == ([4, 4, IN], [4, 4, OUT])
        for slot, (task, own) in enumerate([(0, 0), (1, 0), (1, 1), (2, 0)]):
            a, b = tasks[task].values[module]
            rank = a.shape[1]
            assert torch.equal(lora_a[slot, :rank], a[own])
            assert torch.equal(lora_b[slot, :rank], b[own])
            assert not lora_a[slot, rank:].any()
            assert not lora_b[slot, rank:].any()
            ids, weights = torch.full((4, 1), slot), torch.ones(4, 1)
            expected = ops.multi_lora(x, a, b, torch.full((4, 1), own), weights)
            torch.testing.assert_close(ops.multi_lora(x, lora_a, lora_b, ids, weights), expected)


def test_a_tasks_weight_is_the_sum_over_its_slots_and_none_counts_for_none() -> None:
    weights = pool_of(ZEBRA, APPLE, MANGO).task_weights(ROUTE)
    expected = [[0.5, 0.3, 0.2], [0, 0.2, 0.8], [0, 1, 0], [0, 0, 0], [0.6, 0.4, 0]]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32))


def answer_one_task_at_a_time(tasks: Sequence[LearnedTask], features: Tensor, task_weights: Tensor) -> Tensor:
    """sum_t p(t) softmax(head_t(h)) over the union of words, in float64."""
    answer = torch.zeros(len(features), len(WORDS), dtype=torch.float64)
    for t, task in enumerate(tasks):
        assert task.head is not None
        assert task.labels is not None
        weight, bias = task.head
        share = (features.double() @ weight.double().T + bias.double()).softmax(-1)
        for column, word in enumerate(task.labels):
            answer[:, WORDS.index(word)] += task_weights[:, t].double() * share[:, column]
    return answer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_answer_mixes_every_tasks_own_distribution_and_shared_words_add_up(dtype: torch.dtype) -> None:
    pool = pool_of(ZEBRA, APPLE, MANGO)
    assert pool.heads is not None
    features = 3 * torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0)).to(dtype)
    answer = pool.heads.answer(features, pool.slot_task, ROUTE)
    expected = answer_one_task_at_a_time([APPLE, MANGO, ZEBRA], features, pool.task_weights(ROUTE))
    assert answer.dtype == torch.float32
    torch.testing.assert_close(answer, expected.float(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(answer.sum(1), ROUTE.weights.sum(1))
    assert not answer[3].any()  # no slots in its route


def test_a_row_is_answered_in_the_words_of_the_tasks_it_is_routed_to() -> None:
    pool = pool_of(ZEBRA, APPLE, MANGO)
    assert pool.heads is not None
    features = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(0))
    answer = pool.heads.answer(features, pool.slot_task, Route(torch.tensor([[2, -1]]), torch.tensor([[1.0, 0.0]])))
    assert {word for word, share in zip(WORDS, answer[0].tolist(), strict=True) if share} == {"hot", "cold"}


def test_of_many_labels_those_of_the_routes_tasks_alone_answer_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [make_task(f"t{i}", labels=[f"w{j}" for j in range(i % 5 + 1)]) for i in range(30)]
    pool = pool_of(*tasks, make_task("written", labels=None))
    random = torch.Generator().manual_seed(0)
    features = torch.randn(40, HIDDEN, generator=random)
    route = Route(torch.randint(-1, 6, (40, 2), generator=random), torch.rand(40, 2, generator=random))
    label = torch.arange(90) % 6 - 1  # -1 is no label; some label numbers do not exist in their task
    seen = torch.randn(40, 90, generator=random), torch.arange(90) % len(pool.tasks), label
    heads = pool.heads
    assert heads is not None
    assert pool.heads_for(route) is heads
    monkeypatch.setattr("slm_fast.pool.MANY_LABELS", 10)
    few = pool.heads_for(route)
    assert few is not None
    asked = set(route.slot_ids.clamp(min=0).flatten().tolist())
    assert len(few.bias) == sum(len(pool.tasks[i].labels or ()) for i in asked) < len(heads.bias)
    for prior in (None, True):
        answers = [own.answer(features, pool.slot_task, route, prior and own.prior(*seen)) for own in (few, heads)]
        torch.testing.assert_close(*answers, atol=1e-6, rtol=1e-5)
    assert answers[0].sum() > 1


def test_labels_need_not_stand_in_the_order_of_the_words() -> None:
    task = make_task("a", labels=("z", "y", "x"))
    pool = pool_of(task)
    assert pool.heads is not None
    assert task.head is not None
    features = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(0))
    answer = pool.heads.answer(features, pool.slot_task, Route(torch.zeros(4, 1).long(), torch.ones(4, 1)))
    expected = (features @ task.head[0].T + task.head[1]).softmax(-1)
    assert pool.heads.words == ["x", "y", "z"]
    torch.testing.assert_close(answer, expected.flip(1))


def test_no_rows_give_no_answers() -> None:
    pool = pool_of(APPLE, MANGO)
    assert pool.heads is not None
    route = Route(torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
    assert list(pool.heads.answer(torch.empty(0, HIDDEN), pool.slot_task, route).shape) == [0, 5]
    assert list(pool.task_weights(route).shape) == [0, 2]


def test_a_pool_of_no_tasks_is_empty() -> None:
    pool = pool_of()
    assert (pool.slots, pool.names, dict(pool.values), pool.heads) == (0, [], {}, None)


def test_tasks_that_answer_in_free_text_have_no_heads() -> None:
    assert pool_of(make_task("a", labels=None), make_task("b", labels=None)).heads is None


def test_words_that_many_tasks_share_keep_their_order_and_the_lower_one_wins_a_tie() -> None:
    tasks = [make_task(f"t{i:02d}", labels=(f"word{i:02d}", "same")) for i in range(40)]
    pool = pool_of(*tasks)
    assert pool.heads is not None
    assert pool.heads.words == ["same", *(f"word{i:02d}" for i in range(40))]
    for i, task in enumerate(tasks):
        assert [pool.heads.words[w] for w in pool.heads.word[i].tolist()] == list(task.labels or ())
    heads = replace(pool.heads, weight=torch.zeros_like(pool.heads.weight), bias=torch.zeros_like(pool.heads.bias))
    answer = heads.answer(torch.ones(1, HIDDEN), pool.slot_task, Route(torch.tensor([[7]]), torch.ones(1, 1)))
    best = answer.max(1).indices
    assert answer[0, [0, 8]].tolist() == [0.5, 0.5]
    assert pool.heads.words[int(best)] == "same"


def test_what_a_router_says_of_labels_is_put_to_the_heads() -> None:
    heads = pool_of(APPLE, MANGO, ZEBRA).heads
    assert heads is not None
    # Means of: apple's labels 0 and 2, a slot without a label, mango's labels 0 and 1, and zebra's label 1 twice.
    task, label = torch.tensor([0, 0, 0, 1, 1, 2, 2]), torch.tensor([0, 2, -1, 0, 1, 1, 1])
    scores = torch.tensor([[4.0, -2.0, 99.0, 6.0, 8.0, 1.0, 3.0]])
    lowest = -2.0  # for labels without a mean: apple's 1, zebra's 0
    expected = torch.tensor([[4.0, lowest, -2.0, 6.0, 8.0, lowest, 3.0]])
    torch.testing.assert_close(heads.prior(scores, task, label), expected)


def test_a_prior_is_added_to_the_heads_before_each_tasks_softmax() -> None:
    pool = pool_of(APPLE, MANGO, ZEBRA)
    assert pool.heads is not None
    features = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
    prior = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    found = pool.heads.answer(features, pool.slot_task, ROUTE, prior)
    heads = dataclasses.replace(pool.heads, bias=torch.zeros(7), weight=torch.eye(7))
    logits = features @ pool.heads.weight.T + pool.heads.bias + prior
    torch.testing.assert_close(found, heads.answer(logits, pool.slot_task, ROUTE))
    assert not torch.allclose(found, pool.heads.answer(features, pool.slot_task, ROUTE))
