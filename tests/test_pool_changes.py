"""A pool after any sequence of changes is bit-identical to one freshly loaded with the same tasks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupt import broken_off
from test_pool import APPLE, HIDDEN, IN, MANGO, MODULES, ZEBRA, make_task, pool_of
from torch import Tensor

import slm_fast.pool
from slm_fast import ops
from slm_fast.errors import InputError
from slm_fast.ops import Route
from slm_fast.pool import Buffers, Pool
from slm_fast.tasks import LearnedTask

# Adding and removing tasks


# Different numbers of slots, ranks and labels. Only "f" has the largest rank, and only "a" and "d" the second largest.
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
    """Values of slots 0, 1, ... of a module, gathered from their rows in the buffers: (lora_a, lora_b)."""
    ids = torch.arange(pool.slots)[:, None]
    rows = pool.rows(Route(ids, torch.ones(pool.slots, 1))).slot_ids[:, 0]
    lora_a, lora_b = pool.values[module]
    return lora_a[rows], lora_b[rows]


def assert_same(pool: Pool, fresh: Pool) -> None:
    """Check that everything which determines routes and predictions is bit-identical."""
    assert pool.names == fresh.names
    assert pool.slot_names == fresh.slot_names
    assert pool.slots == fresh.slots
    assert torch.equal(pool.slot_task, fresh.slot_task)
    assert [id(task) for task in pool.tasks] == [id(task) for task in fresh.tasks]
    assert pool.values.keys() == fresh.values.keys()
    for module in fresh.values:
        for mine, theirs in zip(in_slot_order(pool, module), in_slot_order(fresh, module), strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)  # this compares shapes, and thus ranks, too
    assert (pool.heads is None) == (fresh.heads is None)
    if pool.heads is not None and fresh.heads is not None:
        assert pool.heads.words == fresh.heads.words
        for name in ("weight", "bias", "column", "word"):
            assert torch.equal(getattr(pool.heads, name), getattr(fresh.heads, name))


def assert_adapts_the_same(pool: Pool, fresh: Pool) -> None:
    """Check that random routes over all slots, including unused entries (-1), give bit-identical layer outputs."""
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


changes = st.lists(st.sampled_from(sorted(BY_NAME)), max_size=24)  # each name toggles: removed if present, else added


@settings(deadline=None, max_examples=100)
@given(changes, st.sampled_from([torch.float32, torch.bfloat16]), st.sets(st.integers(0, 23)))
def test_a_pool_with_any_history_is_that_of_its_tasks_alone(
    names: list[str], dtype: torch.dtype, remembered: set[int]
) -> None:
    pool = pool_of(dtype=dtype)
    older = []
    for i, name in enumerate(names):
        pool = pool.without(name) if name in pool.names else pool.with_task(BY_NAME[name])
        if i in remembered:  # a reader still holds this version
            older.append(pool)
        fresh = pool_of(*(BY_NAME[name] for name in pool.names), dtype=dtype)
        assert_same(pool, fresh)
        if dtype == torch.float32 and fresh.slots:
            assert_adapts_the_same(pool, fresh)
    for pool in older:
        assert_same(pool, pool_of(*pool.tasks, dtype=dtype))


def test_slot_ids_become_rows_and_none_stays_none() -> None:
    pool = pool_of(ZEBRA).with_task(APPLE).with_task(MANGO)  # zebra's slots are now 4 and 5
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
    return [f"task{(7 * i) % count:03d}" for i in range(count)]  # not sorted


def test_the_200th_task_is_written_beside_the_others_which_stay_where_they_are(monkeypatch) -> None:
    *first, last = (make_task(name) for name in names_of(200))
    pool = pool_of()
    moved = []
    for i, task in enumerate(first):
        before = addresses(pool)
        pool = pool.with_task(task)
        if addresses(pool) != before:
            moved.append(i + 1)
    # Capacity doubles: 2, 6, 14, 30, ... rows; seven reallocations for 199 tasks.
    assert moved == [1, 3, 7, 15, 31, 63, 127]
    values = {name: [half.clone() for half in pair] for name, pair in pool.values.items()}
    rows, written, write_slot = pool.row_of_slot.tolist(), [], Buffers.write_slot

    def write_and_note(buffers: Buffers, task: LearnedTask, slot: int, where: Sequence[int]) -> None:
        written.append((task.name, slot, list(where)))
        write_slot(buffers, task, slot, where)

    monkeypatch.setattr(Buffers, "write_slot", write_and_note)
    grown = pool.with_task(last)
    assert written == [(last.name, 0, [199])]  # written exactly once, to the new row
    assert addresses(grown) == addresses(pool)
    assert sorted(set(grown.row_of_slot.tolist()) - set(rows)) == [199]
    for name, pair in grown.values.items():
        for half, before in zip(pair, values[name], strict=True):
            assert torch.equal(half[:199], before)
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


def test_of_many_tasks_one_more_finds_room_at_once() -> None:
    tasks = [make_task(name) for name in names_of(65)]
    pool = pool_of(*tasks[:64])
    start = addresses(pool)
    pool = pool.with_task(tasks[64])
    assert addresses(pool) == start
    assert_same(pool, pool_of(*tasks))


def test_rows_are_used_again_once_nobody_reads_them() -> None:
    tasks = [make_task(name) for name in ("a", "b", "c", "d", "e", "f", "g")]
    pool = pool_of()
    for task in tasks[:4]:
        pool = pool.with_task(task)
    start, held_by_b = addresses(pool), pool.row_of_slot[1].item()
    reader = pool
    pool = pool.without("b")
    pool = pool.with_task(tasks[4])
    assert held_by_b not in pool.row_of_slot.tolist()  # the reader may still use that row
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
    # No row leaked: the next task gets the first free one.
    after = pool.with_task(make_task("after"))
    assert addresses(after) == start
    assert after.row_of_slot[0].item() == next_row
    assert_same(after, pool_of(*tasks, after.tasks[0]))


def test_what_a_failed_copy_leaves_is_never_seen() -> None:
    pool = pool_of(APPLE).with_task(ZEBRA)
    torn = make_task("torn", labels=("x", "y"))
    bad = LearnedTask("torn", torn.labels, {**torn.values, MODULES[1]: (torch.zeros(1, 2, IN + 1),) * 2}, {}, torn.head)
    with pytest.raises((RuntimeError, ValueError)):  # fails after the first module was written
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
