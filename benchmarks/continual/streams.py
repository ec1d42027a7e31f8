"""Streams of tasks: which, in what order, and how their rows are read."""

from __future__ import annotations

from pathlib import Path

from slm_fast import Task

# The paper's task sequences (Table 7), less those of LLaMA.
ORDERS = {
    1: ("dbpedia", "amazon", "yahoo", "ag_news"),
    2: ("dbpedia", "amazon", "ag_news", "yahoo"),
    3: ("yahoo", "amazon", "ag_news", "dbpedia"),
    4: ("ag_news", "yelp", "amazon", "yahoo", "dbpedia"),
    5: ("yelp", "yahoo", "amazon", "dbpedia", "ag_news"),
    6: ("dbpedia", "yahoo", "ag_news", "amazon", "yelp"),
    7: ("yelp", "ag_news", "dbpedia", "amazon", "yahoo"),
}


def load(data: Path, name: str, split: str, rows: int) -> Task:
    """The first rows of `<data>/<name>/<split>.jsonl.gz`."""
    training = split == "train"
    words = data / name / "labels.json"
    labels = words if words.is_file() else None
    task = Task.from_file(name, data / name / f"{split}.jsonl.gz", labels=labels, training=training)
    return Task(name, task.rows[:rows], free_text=False, training=training)
