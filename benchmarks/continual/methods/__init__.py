"""Rivals, one file each: ways to learn a stream of tasks, with the table of them, and `Identifier`s.

These only name the task of a row; `benchmarks/continual/routers.py` has their table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from benchmarks.continual.methods.finetune import Finetune
from benchmarks.continual.methods.separate import Separate
from benchmarks.continual.methods.slm import Slm
from slm_fast.data import Task
from slm_fast.evaluate import Evaluation
from slm_fast.options import LearnOptions


class Method(Protocol):
    """What a stream asks of a method: to learn its tasks one after another, and to answer those learned so far."""

    def learn(self, task: Task, progress: bool | None = None) -> None: ...
    def evaluate(self, tasks: Mapping[str, Task]) -> Evaluation: ...


class Entry(NamedTuple):
    title: str
    make: Callable[[Mapping[str, Task], int, LearnOptions], Method]  # (training tasks, max_length, options)


METHODS = {
    "slm": Entry("SLM, trunk + gaussian (the default)", lambda _, length, options: Slm(options, max_length=length)),
    "slm-paper": Entry(
        "SLM, sentence + dtkr (as the paper)",
        lambda _, length, options: Slm(options, max_length=length, query="sentence", router="dtkr", encoder="minilm"),
    ),
    "separate": Entry("Separate LoRA, task-ID given", lambda _, length, options: Separate("minilm", length, options)),
    "finetune": Entry(
        "Finetune, one model in sequence", lambda train, length, options: Finetune("minilm", train, length, options)
    ),
}
