"""Tiny saved backbones, toy tasks and a stub method for the tests of rival methods."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from models import make_model, make_tokenizer, toy_task

from benchmarks.continual import run
from benchmarks.continual.methods.method import Setup
from slm_fast.data import Task
from slm_fast.options import LearnOptions

OPTIONS = LearnOptions(epochs=2, batch_size=8)


class Listing:
    """What every stub of a method shares: it learns only the names of its tasks."""

    parameters, kept = 7, 28

    def __init__(self, setup: Setup) -> None:
        self.learned: list[str] = []

    def learn(self, task: Task, progress: bool | None = None) -> None:
        self.learned.append(task.name)

    def state(self) -> dict[str, Any]:
        return {"learned": self.learned, "random": torch.ones(2)}

    def restore(self, state: dict[str, Any]) -> None:
        self.learned = state["learned"]


class Here:
    """Runs a cell in this process instead of a new one."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.returncode = run.main(arguments)

    def poll(self) -> int:
        return self.returncode


def run_here(arguments: Sequence[str]) -> None:
    """Run `repro` with its cells in this process and exit with its status."""
    run.started = Here
    sys.exit(run.main(arguments))


def make_setup(folder: Path, name: str = "bert", options: LearnOptions = OPTIONS) -> Setup:
    """A setup whose backbone is the tiny random model of this type, saved to a subfolder."""
    place = folder / name
    if not place.exists():
        make_model(name).save_pretrained(place)
        make_tokenizer(name).save_pretrained(place)
    return Setup(str(place), ("no", "yes"), 32, options, 4)


def make_tasks(name: str = "bert", rows: int = 48) -> list[Task]:
    """Two toy tasks: classification for BERT, else instruction rows."""
    instruction = "" if name == "bert" else "the question :"
    return [toy_task(topic, rows=rows, instruction=instruction) for topic in ("sea", "farm")]


def weights(method) -> dict[str, torch.Tensor]:
    """A copy of the model's state dict."""
    return {name: weight.clone() for name, weight in method.model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def watch(method, monkeypatch) -> list[list[str]]:
    """Record the texts of each batch that `losses` gets from now on, in the list that is returned."""
    seen: list[list[str]] = []
    losses = method.model.losses

    def watched(rows):
        seen.append([row.text for row in rows])
        return losses(rows)

    monkeypatch.setattr(method.model, "losses", watched)
    return seen
