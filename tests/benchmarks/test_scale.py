"""Tests of the benchmark of many tasks: which tasks its texts are given."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.speed.scale.in_turns import FIRST, WAYS, asked

NAMES = [f"task{i}" for i in range(40)]


def test_at_first_each_task_is_given_once_and_a_smaller_stores_tasks_in_turns():
    texts, tasks = asked(NAMES, FIRST, len(NAMES))
    assert len(texts) == len(NAMES)
    assert sorted(tasks) == sorted(NAMES)
    assert set(Counter(asked(NAMES[:5], FIRST, 40)[1]).values()) == {8}


@pytest.mark.parametrize("way", [way for way in WAYS if way != FIRST])
def test_then_tasks_are_drawn_by_zipfs_law_or_uniformly(way):
    texts, tasks = asked(NAMES, way, 8000)
    assert len(texts) == len(tasks) == 8000
    frequent = [count / 8000 for _, count in Counter(tasks).most_common(2)]
    shares = [1 / place for place in range(1, 41)] if way == "zipf" else [1.0] * 40
    assert frequent == pytest.approx([share / sum(shares) for share in shares[:2]], abs=0.012)
