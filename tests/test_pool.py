"""The pool: slots numbered through the tasks in name order, and heads that answer for all tasks at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import slm_fast.pool
from slm_fast import ops
from slm_fast.errors import InputError
from slm_fast.ops import Route
from slm_fast.pool import Pool
from slm_fast.tasks import LearnedTask
from tests.interrupt import broken_off

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


# Two tasks share the word "bad", one has a label more than the others, and they differ in slots.
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
    assert not answer[3].any()  # routed nowhere


def test_a_row_is_answered_in_the_words_of_the_tasks_it_is_routed_to() -> None:
    pool = pool_of(ZEBRA, APPLE, MANGO)
    assert pool.heads is not None
    features = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(0))
    answer = pool.heads.answer(features, pool.slot_task, Route(torch.tensor([[2, -1]]), torch.tensor([[1.0, 0.0]])))
    assert {word for word, share in zip(WORDS, answer[0].tolist(), strict=True) if share} == {"hot", "cold"}


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


# Tasks come and go


# Of unlike slots, ranks and labels. Only "f" has the largest rank, and "a" and "d" the next.
COMING = [
    make_task("a", slots=2, rank=3, labels=("no", "yes")),
    make_task("b", slots=1, rank=1, labels=("yes", "maybe", "never")),
    make_task("c", slots=3, rank=2, labels=("blue",)),
    make_task("d", slots=1, rank=3, labels=("red", "blue")),
    make_task("e", slots=1, rank=2, labels=("z", "no")),
    make_task("f", slots=2, rank=5, labels=("m", "n", "o", "p")),
]
BY_NAME = {task.name: task for task in COMING}


def in_slot_order(pool: Pool, module: str) -> tuple[Tensor, Tensor]:
    """The values of slots 0, 1, ..., gathered from the rows in which they lie."""
    ids = torch.arange(pool.slots)[:, None]
    rows = pool.rows(Route(ids, torch.ones(pool.slots, 1))).slot_ids[:, 0]
    lora_a, lora_b = pool.values[module]
    return lora_a[rows], lora_b[rows]


def assert_same(pool: Pool, fresh: Pool) -> None:
    """All that routes and answers are made of is the same, bit for bit."""
    assert pool.names == fresh.names
    assert pool.slot_names == fresh.slot_names
    assert pool.slots == fresh.slots
    assert torch.equal(pool.slot_task, fresh.slot_task)
    assert [id(task) for task in pool.tasks] == [id(task) for task in fresh.tasks]
    assert pool.values.keys() == fresh.values.keys()
    for module in fresh.values:
        for mine, theirs in zip(in_slot_order(pool, module), in_slot_order(fresh, module), strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)  # their ranks too
    assert (pool.heads is None) == (fresh.heads is None)
    if pool.heads is not None and fresh.heads is not None:
        assert pool.heads.words == fresh.heads.words
        for name in ("weight", "bias", "column", "word"):
            assert torch.equal(getattr(pool.heads, name), getattr(fresh.heads, name))


def assert_adapts_the_same(pool: Pool, fresh: Pool) -> None:
    """Routes through all slots, some of them none, change a layer's output by the same bits."""
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 9):
        x = torch.randn(12, tokens, IN, generator=generator)
        ids = torch.randint(-1, fresh.slots, (12, 3), generator=generator)
        route = Route(ids, torch.rand(12, 3, generator=generator))
        for module in fresh.values:
            mine, theirs = (
                ops.multi_lora(x, *each.values[module], each.rows(route).slot_ids, route.weights)
                for each in (pool, fresh)
            )
            assert torch.equal(mine, theirs)


changes = st.lists(st.sampled_from(sorted(BY_NAME)), max_size=24)  # a name that is there goes, another comes


@settings(deadline=None, max_examples=100)
@given(changes, st.sampled_from([torch.float32, torch.bfloat16]), st.sets(st.integers(0, 23)))
def test_a_pool_with_any_history_is_that_of_its_tasks_alone(
    names: list[str], dtype: torch.dtype, remembered: set[int]
) -> None:
    pool = pool_of(dtype=dtype)
    older = []
    for i, name in enumerate(names):
        pool = pool.without(name) if name in pool.names else pool.with_task(BY_NAME[name])
        if i in remembered:  # somebody still reads this one
            older.append(pool)
        fresh = pool_of(*(BY_NAME[name] for name in pool.names), dtype=dtype)
        assert_same(pool, fresh)
        if dtype == torch.float32 and fresh.slots:
            assert_adapts_the_same(pool, fresh)
    for pool in older:
        assert_same(pool, pool_of(*pool.tasks, dtype=dtype))


def test_slot_ids_become_rows_and_none_stays_none() -> None:
    pool = pool_of(ZEBRA).with_task(APPLE).with_task(MANGO)  # the first one has slots 4 and 5 now
    route = Route(torch.tensor([[4, -1, 0], [5, 3, -1]]), torch.rand(2, 3))
    rows = pool.rows(route)
    assert torch.equal(rows.weights, route.weights)
    assert (rows.slot_ids < 0).tolist() == (route.slot_ids < 0).tolist()
    for b, k in ((0, 0), (0, 2), (1, 0), (1, 1)):
        own = [(task, s) for task in (APPLE, MANGO, ZEBRA) for s in range(task.slots)]
        task, slot = own[int(route.slot_ids[b, k])]
        for module in MODULES:
            assert torch.equal(pool.values[module][0][rows.slot_ids[b, k]], task.values[module][0][slot])
    assert list(pool.rows(Route(torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))).slot_ids.shape) == [0, 2]
    assert pool_of().rows(Route(torch.tensor([[-1]]), torch.zeros(1, 1))).slot_ids.tolist() == [[-1]]


def addresses(pool: Pool) -> list[int]:
    return [tensor.data_ptr() for pair in pool.values.values() for tensor in pair]


def names_of(count: int) -> list[str]:
    return [f"task{(7 * i) % count:03d}" for i in range(count)]  # not in order


def test_the_200th_task_is_written_beside_the_others_which_stay_where_they_are() -> None:
    *first, last = (make_task(name) for name in names_of(200))
    pool = pool_of()
    moved = []
    for i, task in enumerate(first):
        before = addresses(pool)
        pool = pool.with_task(task)
        if addresses(pool) != before:
            moved.append(i + 1)
    # Room is doubled: 2, 6, 14, 30, ... rows; seven times for 199 tasks.
    assert moved == [1, 3, 7, 15, 31, 63, 127]
    versions = {name: [tensor._version for tensor in pair] for name, pair in pool.values.items()}
    rows = pool.row_of_slot.tolist()
    grown = pool.with_task(last)
    assert addresses(grown) == addresses(pool)
    assert sorted(set(grown.row_of_slot.tolist()) - set(rows)) == [199]
    # One write to each buffer, into the new row, is all there was.
    assert {name: [tensor._version - 1 for tensor in pair] for name, pair in grown.values.items()} == versions
    assert_same(grown, pool_of(*first, last))


def test_taking_a_task_away_writes_nothing_until_less_than_a_quarter_is_used() -> None:
    tasks = [make_task(name) for name in names_of(40)]
    pool = pool_of(*tasks)
    start, row_of = addresses(pool), dict(zip(pool.slot_names, pool.row_of_slot[:-1].tolist(), strict=True))
    for left in range(39, 9, -1):
        pool = pool.without(tasks[left].name)
        assert addresses(pool) == start
        assert pool.row_of_slot.tolist() == [row_of[name] for name in pool.slot_names] + [-1]
    pool = pool.without(tasks[9].name)
    assert addresses(pool) != start
    assert_same(pool, pool_of(*tasks[:9]))


def test_rows_are_used_again_once_nobody_reads_them() -> None:
    tasks = [make_task(name) for name in ("a", "b", "c", "d", "e", "f", "g")]
    pool = pool_of()
    for task in tasks[:4]:
        pool = pool.with_task(task)
    start, held_by_b = addresses(pool), pool.row_of_slot[1].item()
    reader = pool
    pool = pool.without("b")
    pool = pool.with_task(tasks[4])
    assert held_by_b not in pool.row_of_slot.tolist()  # the reader may still be on its way to them
    assert_same(reader, pool_of(*tasks[:4]))
    del reader
    pool = pool.with_task(tasks[5])
    assert pool.row_of_slot[pool.names.index("f")].item() == held_by_b
    assert addresses(pool) == start
    assert_same(pool, pool_of(tasks[0], *tasks[2:6]))


def test_a_smaller_rank_in_a_row_used_before_leaves_nothing_of_what_was_there() -> None:
    tasks = [make_task("a", rank=4), make_task("b", rank=4)]
    pool = pool_of(*tasks)
    row = pool.row_of_slot[1].item()
    pool = pool.without("b")
    pool = pool.with_task(make_task("c", rank=1))
    assert pool.row_of_slot[1].item() == row
    for module in MODULES:
        assert not pool.values[module][0][row, 1:].any()
        assert not pool.values[module][1][row, 1:].any()


def test_two_pools_that_go_on_from_one_do_not_write_over_each_other() -> None:
    base = pool_of(APPLE).with_task(ZEBRA)
    kiwi = make_task("kiwi", slots=2)
    left, right = base.with_task(MANGO), base.with_task(kiwi)
    assert_same(left, pool_of(APPLE, ZEBRA, MANGO))
    assert_same(right, pool_of(APPLE, ZEBRA, kiwi))
    assert_same(base, pool_of(APPLE, ZEBRA))


def test_the_rank_is_the_largest_of_the_tasks_there_are_now() -> None:
    low, high = make_task("low", rank=2), make_task("high", rank=6)
    pool = pool_of(low)
    for change, rank in ((pool.with_task(high), 6), (pool.with_task(high).without("high"), 2)):
        assert {tensor.shape[1] for pair in change.values.values() for tensor in pair} == {rank}


def test_a_pool_of_texts_has_no_heads_whatever_comes_and_goes() -> None:
    pool = pool_of(make_task("a", labels=None)).with_task(make_task("b", labels=None)).without("a")
    assert pool.heads is None


def test_a_name_that_is_taken_and_one_that_is_not_there_are_wrong_calls() -> None:
    pool = pool_of(APPLE, ZEBRA)
    with pytest.raises(InputError, match="task 'apple': the pool has it already"):
        pool.with_task(make_task("apple"))
    with pytest.raises(InputError, match="task 'kiwi': the pool does not have it; tasks: apple, zebra"):
        pool.without("kiwi")
    with pytest.raises(InputError, match="task 'kiwi': the pool does not have it; tasks: none"):
        pool_of().without("kiwi")


@pytest.mark.parametrize("change", ["beside the others", "laid out anew", "taken away", "taken away, anew"])
def test_a_change_broken_off_anywhere_leaves_the_pool_and_its_room_as_they_were(change: str) -> None:
    tasks = [make_task(f"t{i}", rank=4 if i == 5 else 2) for i in range(6)]
    pool = pool_of()
    for task in tasks:
        pool = pool.with_task(task)
    new = make_task("new", rank=9 if change == "laid out anew" else 4)
    gone = "t5" if change == "taken away, anew" else "t2"
    start, next_row, breaks = addresses(pool), min(set(range(99)) - set(pool.row_of_slot.tolist())), 0
    call = (lambda: pool.without(gone)) if change.startswith("taken") else (lambda: pool.with_task(new))
    for _ in broken_off(call, slm_fast.pool):
        breaks += 1
        assert pool.names == [task.name for task in tasks]
        assert addresses(pool) == start
    assert breaks > 15
    assert_same(pool, pool_of(*tasks))
    # No row was lost: the next task takes the first one that is free.
    after = pool.with_task(make_task("after"))
    assert addresses(after) == start
    assert after.row_of_slot[0].item() == next_row
    assert_same(after, pool_of(*tasks, after.tasks[0]))


def test_what_a_failed_copy_leaves_is_never_seen() -> None:
    pool = pool_of(APPLE).with_task(ZEBRA)
    torn = make_task("torn", labels=("x", "y"))
    bad = LearnedTask("torn", torn.labels, {**torn.values, MODULES[1]: (torch.zeros(1, 2, IN + 1),) * 2}, {}, torn.head)
    with pytest.raises((RuntimeError, IndexError)):  # after the first module was written
        pool.with_task(bad)
    assert_same(pool, pool_of(APPLE, ZEBRA))
    assert_same(pool.with_task(torn), pool_of(APPLE, ZEBRA, torn))


def test_a_pool_made_while_answering_can_be_added_to_afterwards() -> None:
    with torch.inference_mode():
        pool = pool_of(APPLE).with_task(ZEBRA)
        assert pool.heads is not None
    pool = pool.with_task(make_task("kiwi"))
    assert_same(pool, pool_of(APPLE, ZEBRA, pool.tasks[1]))
    weight = torch.zeros(1, HIDDEN, requires_grad=True)
    pool.heads.answer(weight, pool.slot_task, Route(torch.tensor([[0]]), torch.ones(1, 1))).sum().backward()
