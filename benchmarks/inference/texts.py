"""Texts of five tasks: real ones from a folder, or made-up ones of about the same lengths."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from slm_fast.data import Task

# Tokens (25th, 50th, 95th percentile) of the real tasks' texts, for made-up ones.
LENGTHS = {"ag_news": (40, 50, 75), "amazon": (55, 85, 195), "dbpedia": (50, 70, 120), "yahoo": (35, 80, 340),
           "yelp": (60, 130, 450)}  # fmt: skip
TASKS = tuple(LENGTHS)


def texts_of(data: Path | None, split: str, rows: int) -> dict[str, list[str]]:
    """The first rows of each task's texts in `<data>/<task>/<split>.jsonl.gz`, or made-up ones."""
    if data is not None:
        files = {name: Task.from_file(name, data / name / f"{split}.jsonl.gz", training=False) for name in TASKS}
        return {name: [row.text for row in task.rows[:rows]] for name, task in files.items()}
    made = {}
    for name, (low, middle, high) in LENGTHS.items():
        rng = random.Random(f"{name}/{split}")
        own = [f"{name[:2]}{i}" for i in range(50)]
        lengths = [int(rng.choice((low, middle, middle, high)) * rng.uniform(0.6, 1.2)) // 3 for _ in range(rows)]
        made[name] = [" ".join(rng.choice(own) for _ in range(max(3, n))) for n in lengths]
    return made


def mixed(texts: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """(task, text) of all tasks, shuffled."""
    rows = [(name, text) for name, own in texts.items() for text in own]
    random.Random(0).shuffle(rows)
    return rows
