"""The demo with a chat model: SmolLM2-135M-Instruct learns three small instruction tasks.

The bare model is prompted with its chat template, the learned tasks without one.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from slm_fast.data import Row, Task
from slm_fast.options import LearnOptions
from slm_fast.predict import Prediction
from slm_fast.slm import ScalableLM
from slm_fast.tables import percent

TASKS = ("booking_slots", "error_codes", "make_questions")
FIRST_LAYER = 20  # of 30: fewer layers with LoRA make learning faster
LEARN = LearnOptions(epochs=6, batch_size=8, learning_rate=3e-3)
SHOWN, NEW_TOKENS = 3, 32  # rows shown per task; tokens per answer


def load(split: str) -> dict[str, Task]:
    """The three tasks in learning order. `split`: "train" or "test"."""
    folder = Path(__file__).parent
    return {name: Task.from_file(name, folder / f"{name}.{split}.csv", training=split == "train") for name in TASKS}


def run(
    store: str | None = None,
    console: Console | None = None,
    *,
    backbone: Any = "smollm2",
    first_layer: int = FIRST_LAYER,
    options: LearnOptions = LEARN,
) -> None:
    """Learn, and show answers before and after learning side by side; `store`: where to save the tasks.

    Args:
        backbone: a decoder with a chat template. first_layer: the lowest layer with LoRA. options: for learning.
    """
    console = console or Console()
    started = time.monotonic()
    slm = ScalableLM.from_backbone(backbone, first_layer=first_layer)
    model = slm.model.backbone.model
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    console.print(
        f"One frozen chat model ({slm.model.backbone.name or type(model).__name__}, {size:.1f} M parameters) learns "
        f"{len(TASKS)} instruction tasks one after another.\n",
        soft_wrap=True,
    )
    test = load("test")
    rows = [row for task in test.values() for row in task.rows]
    random.Random(0).shuffle(rows)
    prompts = [_in_chat(slm, row) for row in rows]
    bare = _texts(slm.predict(prompts, bare=True, max_new_tokens=NEW_TOKENS))
    if store is not None:
        slm.save_pretrained(store)
    for number, (name, task) in enumerate(load("train").items(), 1):
        before = time.monotonic()
        slm.learn(task, options)
        took = time.monotonic() - before
        console.print(f"{number}. learned [bold]{name}[/] from {len(task.rows)} rows in {took:.0f} s")
    answers = slm.predict(rows, max_new_tokens=NEW_TOKENS)
    learned = _texts(answers)

    table = Table(title="Mixed batch, no task IDs", title_justify="left", show_lines=True)
    for column in ("input", "bare model", "with learned tasks"):
        table.add_column(column, ratio=1)
    shown = dict.fromkeys(TASKS, 0)
    owner = {id(row): name for name, task in test.items() for row in task.rows}
    for row, untaught, taught in zip(rows, bare, learned, strict=True):
        name = owner[id(row)]
        shown[name] += 1
        if shown[name] <= SHOWN:
            said = Text(taught, style="green" if taught == row.target else "")
            if taught != row.target:
                said.append(f"\nexpected {row.target}", style="red")
            table.add_row(Text(f"{row.instruction}\n{row.text}"), Text(untaught), said)
    console.print()
    console.print(table)
    right = [sum(text == row.target for text, row in zip(texts, rows, strict=True)) for texts in (bare, learned)]
    routed = sum(answer.task == owner[id(row)] for answer, row in zip(answers, rows, strict=True))
    console.print(
        f"\nExact matches on {len(rows)} test rows: {right[0]} with the bare model, {right[1]} with learned tasks. "
        f"Routing accuracy: {percent(routed / len(rows))} %. Total time: {time.monotonic() - started:.0f} s.",
        soft_wrap=True,
    )
    if store is not None:
        console.print(f"\nTasks saved to {store}. Try: slm-fast lm-eval {store} --tasks arc_easy --limit 20")


def _texts(answers: Sequence[Prediction]) -> list[str]:
    return [answer.text or "" for answer in answers]


def _in_chat(slm: ScalableLM, row: Row) -> str:
    """A row as a prompt in the chat template, without the final newline, which `predict` adds."""
    said = [{"role": "user", "content": row.prompt}]
    text: str = slm.model.backbone.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    return text.removesuffix("\n")
