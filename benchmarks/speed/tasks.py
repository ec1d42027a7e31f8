"""Tasks with random values: the cost of answering does not depend on what was learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from slm_fast import ScalableLM
from slm_fast.data import Row
from slm_fast.tasks import LearnedTask, name_seed

RANK = 8
LABELS = tuple("abcdefgh")


def random_tasks(slm: ScalableLM, texts: Mapping[str, Sequence[str]], copies: int = 1) -> list[LearnedTask]:
    """Tasks whose router parts are fitted on {name: texts}, with random increments, and heads if the backbone has them.

    copies: tasks per name, with nearby means.
    """
    model = slm.model
    tasks = []
    for task, own in texts.items():
        part = model.new_router().fit(model.queries([Row(text) for text in own]), 1, 0)
        for number in range(copies):
            name = task if copies == 1 else f"{task}-{number}"
            draw = torch.Generator().manual_seed(name_seed(name, 0))
            values = {
                module: (
                    (torch.rand(1, RANK, i, generator=draw) * 2 - 1) / i**0.5,
                    torch.randn(1, RANK, o, generator=draw) * 0.01,
                )
                for module, (i, o) in model.widths.items()
            }
            head = None
            if model.backbone.kind == "encoder":
                weight = torch.randn(len(LABELS), model.backbone.width, generator=draw)
                head = (0.05 * weight, torch.zeros(len(LABELS)))
            moved = dict(part)
            if number and "mean" in part:
                away = 0.1 * torch.randn(part["mean"].shape, generator=draw)
                moved["mean"] = part["mean"] * (1 + away.to(part["mean"]))
            tasks.append(LearnedTask(name, LABELS if head else None, values, moved, head))
    return tasks
