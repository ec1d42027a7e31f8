"""Texts for timing: real ones from a folder, or generated ones of similar lengths."""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from slm_fast import Task

WORDS = "the of a to and in is was for on as with by he at from his an were are which this also be had or has"
# Tokens (25th, 50th, 95th percentile) of the real tasks' texts, for generated ones.
LENGTHS = {"ag_news": (40, 50, 75), "amazon": (55, 85, 195), "dbpedia": (50, 70, 120), "yahoo": (35, 80, 340),
           "yelp": (60, 130, 450)}  # fmt: skip
TASKS = tuple(LENGTHS)


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add `--data`, a path to the five tasks' folders; None if it is not given."""
    about = "folder that contains classification/, as for all benchmarks; default: generated texts"
    parser.add_argument("--data", type=_five_tasks, help=about)


def _five_tasks(text: str) -> Path:
    for folder in (Path(text) / "classification", Path(text)):
        if all((folder / name / f"{split}.jsonl.gz").is_file() for name in TASKS for split in ("train", "test")):
            return folder
    name = Path("classification", TASKS[0], "train.jsonl.gz")
    raise argparse.ArgumentTypeError(f"{text}: expected {name} in it, and so on for {', '.join(TASKS[1:])}")


def task(data: Path | None, name: str, rows: int) -> Task:
    """The first rows of `<data>/<name>/train.jsonl.gz`, or generated ones of ten labels."""
    if data is not None:
        found = load(data, name, "train")
        return Task(name, found.rows[:rows], free_text=False)
    rng = random.Random(name)
    lengths = [min(120, max(4, round(rng.lognormvariate(4, 0.7)))) for _ in range(rows)]
    return Task(name, [(" ".join(rng.choices(WORDS.split(), k=n)), str(i % 10)) for i, n in enumerate(lengths)])


def load(data: Path, name: str, split: str) -> Task:
    words = data / name / "labels.json"
    labels = words if words.is_file() else None
    return Task.from_file(name, data / name / f"{split}.jsonl.gz", labels=labels, training=split == "train")


def texts_of(data: Path | None, split: str, rows: int) -> dict[str, list[str]]:
    """The first texts of each task in `<data>/<task>/<split>.jsonl.gz`, or generated ones."""
    if data is not None:
        files = {name: load(data, name, split) for name in TASKS}
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
