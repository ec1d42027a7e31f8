"""Streams of tasks: which tasks, in what order, and how their rows are read."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slm_fast import Task
from slm_fast.data import Row

# The paper's task sequences (Table 7): 1 to 3 for T5, with 16 rows per class, 4 to 7 for BERT, 8 and 9 for LLaMA.
ORDERS = {
    1: ("dbpedia", "amazon", "yahoo", "ag_news"),
    2: ("dbpedia", "amazon", "ag_news", "yahoo"),
    3: ("yahoo", "amazon", "ag_news", "dbpedia"),
    4: ("ag_news", "yelp", "amazon", "yahoo", "dbpedia"),
    5: ("yelp", "yahoo", "amazon", "dbpedia", "ag_news"),
    6: ("dbpedia", "yahoo", "ag_news", "amazon", "yelp"),
    7: ("yelp", "ag_news", "dbpedia", "amazon", "yahoo"),
    8: ("medical", "mmlu", "finance"),
    9: ("finance", "mmlu", "medical"),
}


@dataclass(frozen=True)
class Stream:
    """A stream of tasks.

    Attributes:
        folder: of the data, with one folder per task.
        rows: training rows per task, at most.
        seeds: number of drawings of the training rows, each in a folder seed<k> of the task; 0 if there is only one.
        out_of_scope: a folder next to the tasks' whose test rows belong to none of them.
        elsewhere: the folder of each task that is not in `folder`.
    """

    folder: str
    tasks: tuple[str, ...]
    rows: int
    seeds: int = 0
    out_of_scope: str | None = None
    elsewhere: Mapping[str, str] = field(default_factory=dict)

    def drawings(self, seeds: Sequence[int]) -> list[int]:
        """The drawing of rows that each seed uses."""
        return [seed % self.seeds if self.seeds else 0 for seed in seeds]

    def load(self, data: Path, split: str, seed: int, rows: int | None = None) -> dict[str, Task]:
        """Each task's rows of a split, only the first `rows` if given."""
        part = f"seed{seed % self.seeds}" if self.seeds else ""
        folders = {name: data / self.elsewhere.get(name, self.folder) for name in self.tasks}
        return {name: load(folder, name, split, rows, part) for name, folder in folders.items()}


CLINC = tuple(
    f"clinc_{name}"
    for name in (
        *("auto_and_commute", "banking", "credit_cards", "home", "kitchen_and_dining"),
        *("meta", "small_talk", "travel", "utility", "work"),
    )
)
HWU = tuple(
    f"hwu_{name}"
    for name in (
        *("alarm", "audio", "calendar", "datetime", "email", "general", "iot", "lists", "music"),
        *("other", "play", "qa", "recommendation", "social", "takeaway", "transport"),
    )
)
GENERATION = ("finance", "mmlu", "medical", "medical_synth")
MULTIPLE_CHOICE = ("arc_easy", "piqa", "winogrande")
STREAMS = {
    "far": Stream("classification", ORDERS[4], 1500),  # news, two kinds of reviews, questions, encyclopedia articles
    "clinc": Stream("intents", CLINC, 1500, out_of_scope="out_of_scope"),  # ten domains of one assistant's requests
    "intents": Stream("intents", ("atis", "banking77", *CLINC, *HWU, "snips"), 600, out_of_scope="out_of_scope"),
    "few": Stream("fewshot", ORDERS[4], 1500, seeds=2),  # 16 rows per class
    "thirteen": Stream(  # six tasks with labels, two of them Yahoo's, and seven answered in free text
        "classification",
        (*ORDERS[4], "yahoo_titles", *GENERATION, *MULTIPLE_CHOICE),
        400,
        elsewhere=dict.fromkeys(GENERATION, "generation") | dict.fromkeys(MULTIPLE_CHOICE, "zeroshot"),
    ),
    **{f"order{n}": Stream("fewshot", ORDERS[n], 1500, seeds=2) for n in (1, 2, 3)},
    **{f"order{n}": Stream("classification", ORDERS[n], 1500) for n in (4, 5, 6, 7)},
    **{f"order{n}": Stream("generation", ORDERS[n], 1500) for n in (8, 9)},
}
TRAINING_OF_TEST = 400  # rows of a task with only test rows that are used for training: the first ones


def load(data: Path, name: str, split: str, rows: int | None, part: str = "") -> Task:
    """The first rows of `<data>/<name>/<part>/<split>.jsonl.gz`, all if `rows` is None."""
    training = split == "train"
    folder = data / name / part
    if not (folder / "train.jsonl.gz").is_file() and (folder / "test.jsonl.gz").is_file():
        found = multiple_choice(folder / "test.jsonl.gz")
        found = found[:TRAINING_OF_TEST] if training else found[TRAINING_OF_TEST:]
        return Task(name, found[:rows], free_text=True, training=training)
    words = data / name / "labels.json"
    labels = words if words.is_file() else None
    task = Task.from_file(name, folder / f"{split}.jsonl.gz", labels=labels, training=training)
    return Task(name, task.rows[:rows], free_text=task.labels is None, training=training)


def multiple_choice(path: Path) -> list[Row]:
    """Rows with a question, choices and an answer index, as questions with lettered choices answered by a letter."""
    found = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            choices = [f"{letter}. {choice}" for letter, choice in zip("ABCDE", row["choices"], strict=False)]
            found.append(Row("\n".join([row["question"], *choices]), "ABCDE"[row["answer"]]))
    return found
