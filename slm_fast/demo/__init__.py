"""The demonstration: five small tasks learned one after another, then a shuffled batch that mixes them.

The texts beside this file were written for this project. Two tasks are reviews and share their label words.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

from rich.console import Console

from slm_fast.data import Task
from slm_fast.slm import ScalableLM
from slm_fast.tables import accuracy_matrix, answers_table, percent

TASKS = ("restaurant_reviews", "help_desk", "news_desk", "gadget_reviews", "recipe_steps")


def load(split: str) -> dict[str, Task]:
    """The five tasks, `split` being "train" or "test", in the order they are learned."""
    folder = Path(__file__).parent
    return {name: Task.from_file(name, folder / f"{name}.{split}.csv") for name in TASKS}


def run(store: str | None = None, console: Console | None = None) -> None:
    """Learn, evaluate after each task, and show the accuracy matrix and some mixed answers; `store` keeps the tasks."""
    console = console or Console()
    started = time.monotonic()
    slm = ScalableLM.from_backbone("minilm")
    parameters = sum(p.numel() for p in slm.model.backbone.model.parameters()) / 1e6
    console.print(
        f"One frozen model (all-MiniLM-L6-v2, {parameters:.1f} M parameters) learns {len(TASKS)} tasks, one after "
        "another.\nNothing is replayed, and no one tells it which task an input belongs to.\n",
        soft_wrap=True,
    )
    if store is not None:
        slm.save_pretrained(store)
    test = load("test")
    history: list[dict[str, float]] = []
    for number, (name, task) in enumerate(load("train").items(), 1):
        slm.learn(task)
        seen = {known: test[known] for known in list(test)[:number]}
        evaluation = slm.evaluate(seen, progress=False)
        history.append(evaluation.accuracy)
        console.print(
            f"{number}. learned [bold]{name}[/] ({len(task.rows)} rows; {', '.join(task.labels or [])}): "
            f"average accuracy on {number} task{'s' * (number > 1)} {percent(evaluation.average)} %",
            soft_wrap=True,
        )
    console.print()
    console.print(accuracy_matrix(history, "What it knows after each task"))

    pairs = [(row.text, row.target or "") for task in test.values() for row in task.rows[:2]]
    random.Random(0).shuffle(pairs)
    texts, expected = [text for text, _ in pairs], [answer for _, answer in pairs]
    console.print()
    console.print(answers_table(texts, expected, slm.predict(texts), "One mixed batch, no task-ID"))
    evaluation = slm.evaluate(test, progress=False)
    routing = sum(evaluation.routing.values()) / len(evaluation.routing)
    rows = sum(len(task.rows) for task in test.values())
    console.print(
        f"\nAll {rows} test rows shuffled together: {percent(evaluation.average)} % answered right, "
        f"{percent(routing)} % recognised as their task. {time.monotonic() - started:.0f} seconds in all.",
        soft_wrap=True,
    )
    if store is not None:
        console.print(f'\nThe tasks are kept in {store}. Try: echo \'{{"text": "..."}}\' | slm-fast predict {store}')
