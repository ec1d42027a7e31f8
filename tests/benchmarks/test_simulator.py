"""Tests of the many-task simulator against exact results and against a simulated LRU cache."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.speed.scale.simulator import Costs, Recent, Setting, distinct, missed, rate, shares, waits

FREE = Costs(batch=0.0, row=0.0, part=0.0, page=0.0, disk=0.0, keys=0.0, scores=0.0)


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.2])
@pytest.mark.parametrize("room", [1, 50, 400])
def test_as_many_rows_miss_their_task_as_in_a_cache_that_is_played_through(exponent: float, room: int) -> None:
    share, draw, recent = shares(1000, exponent), np.random.default_rng(0), Recent(room)
    there = [recent.ask(task) for task in draw.choice(1000, 60_000, p=share).tolist()]
    assert missed(share, room) == pytest.approx(1 - np.mean(there[20_000:]), abs=0.01)


def test_nothing_is_missed_where_there_is_room_for_all_and_most_where_all_are_alike() -> None:
    assert missed(shares(100, 1.0), 100) == 0.0
    assert missed(shares(100, 0.0), 25) == pytest.approx(0.75, abs=0.01)
    assert shares(7, 1.0).sum() == pytest.approx(1.0)
    assert (distinct(shares(1, 1.0), 9), distinct(shares(1000, 0.0), 1)) == (1.0, pytest.approx(1.0))


def test_a_full_batch_costs_its_parts() -> None:
    costs = Costs(batch=1.0, row=0.1, part=0.5, page=0.01, disk=0.02, keys=0.001, scores=0.0001)
    everything_there = Setting(tasks=100, rows=10, keys=3)
    assert rate(costs, everything_there) == pytest.approx(10 / (1 + 1 + 300 * (0.001 + 0.0001 * 10)))
    assert rate(costs, Setting(tasks=100, rows=10, keys=3, replicas=4)) == pytest.approx(
        4 * rate(costs, everything_there)
    )
    alike = Setting(tasks=1000, exponent=0.0, device=2, host=500, rows=10, keys=0)
    pages = 10 * missed(shares(1000, 0.0), 2)
    # ten tasks per batch, in five parts of two
    assert rate(costs, alike) == pytest.approx(10 / (2 + 4 * 0.5 + 0.01 * pages + 0.02 * 5), rel=0.002)


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_rows_that_pass_one_by_one_wait_as_an_m_d_1_queue_has_it(load: float) -> None:
    costs = Costs(**{**vars(FREE), "row": 0.01, "request": 0.002})
    found = waits(costs, Setting(tasks=5, rows=1, keys=0), load, 100_000)
    assert found.mean() == pytest.approx(0.012 + 0.01 * load / (2 * (1 - load)), rel=0.03)
    assert found.min() == pytest.approx(0.012)


def test_pages_are_read_only_while_their_tasks_are_not_there() -> None:
    costs = Costs(**{**vars(FREE), "row": 0.001, "page": 0.1})
    assert waits(costs, Setting(tasks=20, rows=4, keys=0), 0.01, 500).max() < 0.02
    few = waits(costs, Setting(tasks=20, device=10, rows=1, exponent=0.0, keys=0), 0.01, 2000)
    assert np.mean(few > 0.1) == pytest.approx(0.5, abs=0.05)
