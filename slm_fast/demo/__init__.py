"""The demo: learns five small tasks one after another, then answers a shuffled batch that mixes them.

The texts next to this file were written for this project. Two tasks are reviews and share label words.
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
    """The five tasks in learning order. `split`: "train" or "test"."""
    folder = Path(__file__).parent
    return {name: Task.from_file(name, folder / f"{name}.{split}.csv") for name in TASKS}


def run(store: str | None = None, console: Console | None = None) -> None:
    """Learn, evaluate after each task, show the accuracy matrix and a mixed batch; `store`: where to save the tasks."""
    console = console or Console()
    started = time.monotonic()
    slm = ScalableLM.from_backbone("minilm")
    parameters = sum(p.numel() for p in slm.model.backbone.model.parameters()) / 1e6
    console.print(
        f"One frozen model (all-MiniLM-L6-v2, {parameters:.1f} M parameters) learns {len(TASKS)} tasks one after "
        "another,\nwithout replay, and routes each input without a task ID.\n",
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
            f"{number}. learned [bold]{name}[/] ({len(task.rows)} rows; labels: {', '.join(task.labels or [])}): "
            f"average accuracy over {number} task{'s' * (number > 1)}: {percent(evaluation.average)} %",
            soft_wrap=True,
        )
    console.print()
    console.print(accuracy_matrix(history, "Accuracy matrix R"))

    pairs = [(row.text, row.target or "") for task in test.values() for row in task.rows[:2]]
    random.Random(0).shuffle(pairs)
    texts, expected = [text for text, _ in pairs], [answer for _, answer in pairs]
    console.print()
    console.print(answers_table(texts, expected, slm.predict(texts), "Mixed batch, no task IDs"))
    evaluation = slm.evaluate(test, progress=False)
    routing = sum(evaluation.routing.values()) / len(evaluation.routing)
    rows = sum(len(task.rows) for task in test.values())
    console.print(
        f"\nAll {rows} test rows as one mixed stream: average accuracy {percent(evaluation.average)} %, "
        f"routing accuracy {percent(routing)} %. Total time: {time.monotonic() - started:.0f} s.",
        soft_wrap=True,
    )
    if store is not None:
        console.print(f'\nTasks saved to {store}. Try: echo \'{{"text": "..."}}\' | slm-fast predict {store}')
