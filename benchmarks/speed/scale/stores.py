"""Stores of any number of untrained tasks, and rows that request them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.tasks import LABELS, random_tasks
from slm_fast import ScalableLM
from slm_fast.demo import load
from slm_fast.store import Store
from slm_fast.tasks import LearnedTask, name_seed

ROWS = 240  # of the demonstration, from which the router's part is made
AT_ONCE = 16  # tasks per commit
TRAFFIC = 2048  # rows
LEAST_PAGED = 100  # tasks of a store that may have room for a tenth of their values


class Maker:
    """Makes any number of tasks of a model, always the same for the same name."""

    def __init__(self, slm: ScalableLM) -> None:
        rows = [row.text for task in load("train").values() for row in task.rows][:ROWS]
        [self.like] = random_tasks(slm, {"like": rows})

    def __call__(self, name: str) -> LearnedTask:
        draw = torch.Generator().manual_seed(name_seed(name, 0))
        values = {
            module: (lora_a[:, :, torch.randperm(lora_a.shape[2], generator=draw)], lora_b)
            for module, (lora_a, lora_b) in self.like.values.items()
        }
        assert self.like.head is not None
        weight, bias = self.like.head
        head = (0.05 * torch.randn(weight.shape, generator=draw), bias)
        return LearnedTask(name, LABELS, values, moved(self.like.router, draw), head, {"rank": 8})


def moved(part: Mapping[str, Tensor], draw: torch.Generator) -> dict[str, Tensor]:
    """Another task's part of the router: three moved means, and a scatter whose directions are turned."""
    mean = part["mean"] * (1 + 0.2 * torch.randn(3, part["mean"].shape[1], generator=draw))
    signs = torch.randint(0, 2, (part["factor"].shape[1],), generator=draw) * 2 - 1
    turns = torch.randint(-1, 2, part["exponent"].shape, generator=draw)
    rows = part["count"].sum() / 3
    sample = part["sample"] + 0.1 * torch.randn(part["sample"].shape, generator=draw)
    return dict(part) | {
        "count": rows.floor().expand(3).contiguous(),
        "mean": mean,
        "mean_slot": torch.zeros(3),
        "mean_label": torch.arange(3.0),
        "factor": (part["factor"] * signs).to(torch.int8),
        "exponent": (part["exponent"] + turns).clamp(-40, 12).to(torch.int8),
        "diagonal": part["diagonal"] * torch.rand(part["diagonal"].shape, generator=draw),
        "sample": sample,
        "sample_mean": torch.randint(0, 3, part["sample_mean"].shape, generator=draw).float(),
    }


def name_of(number: int) -> str:
    return f"task-{number:06d}"


def make(folder: Path, count: int) -> Store:
    """A store of `count` tasks; existing ones are kept."""
    slm = ScalableLM.from_backbone("minilm")
    maker = Maker(slm)
    if not Store.exists(folder):
        slm.save_pretrained(folder)
    store = Store.open(folder)
    wanted = [name for name in map(name_of, range(count)) if name not in store.files]
    for start in range(0, len(wanted), AT_ONCE):
        store.commit(add=[maker(name) for name in wanted[start : start + AT_ONCE]])
    return store


def traffic(names: Sequence[str], exponent: float, rows: int = TRAFFIC, seed: int = 0) -> tuple[list[str], list[str]]:
    """Texts of the demonstration, and for each a task drawn with Zipf-distributed frequencies (0: uniform)."""
    draw, names = random.Random(seed), list(names)
    draw.shuffle(names)
    known = [row.text for task in load("train").values() for row in task.rows]
    weights = [place**-exponent for place in range(1, len(names) + 1)]
    return draw.choices(known, k=rows), draw.choices(names, weights, k=rows)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, and the result of `work`."""
    start = time.process_time()
    found = work()
    return time.process_time() - start, found
