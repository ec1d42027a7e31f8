"""What is measured of slm_fast only after the last task, with routes that it finds itself.

Times of all rows: routing alone. By task, for its first rows: routing alone and the whole answer, as the paper's
comparison of retrieval and generation times. And the share of rows routed to their task by the input alone and by the
whole prompt, for rows that have an instruction: instructions are the same in all rows of a task, so that they give it
away. Both use the router as it is; `slm:route_on=prompt` is one that has also learned from prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks.continual.clock import Clock
from benchmarks.continual.methods.slm import Slm
from slm_fast import Task
from slm_fast.data import Row

TIMED_ROWS = 200  # rows per task that are answered once more to time them


def times(method: Slm, tasks: Mapping[str, Task]) -> dict[str, Any]:
    """The time to route all rows, and in "timed" the times of some of each task's rows."""
    clock = Clock()
    method.find_routes([row for task in tasks.values() for row in task.rows])
    spent = clock.spent("route")
    return {**spent, "timed": {name: _timed(method, task.rows[:TIMED_ROWS]) for name, task in tasks.items()}}


def _timed(method: Slm, rows: Sequence[Row]) -> dict[str, float]:
    clock = Clock()
    method.find_routes(rows)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    routing, clock = clock.spent("route"), Clock()
    method.answers(rows)
    return {"rows": len(rows), **routing, **clock.spent("answer")}


def routed_by(method: Slm, task: Task) -> dict[str, float] | None:
    """The shares of the task's rows with an instruction that are routed to it by the "input" alone and by the whole
    "prompt"; None without such rows."""
    rows = [row for row in task.rows if row.instruction and row.text]
    if not rows:
        return None
    return {
        "input": routed_share(method, task.name, [Row(row.text) for row in rows]),
        "prompt": routed_share(method, task.name, [Row(row.prompt) for row in rows]),
    }


def routed_share(method: Slm, name: str, rows: Sequence[Row]) -> float:
    """The share of rows that the method routes to a task by their texts."""
    model = method.slm.model
    with torch.no_grad(), model.pinned():
        winners = model.pool.task_weights(model.route(model.queries(rows))).argmax(1)
        return float((winners == model.pool.place[name]).float().mean())
