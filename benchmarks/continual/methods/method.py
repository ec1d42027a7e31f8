"""The interface between a stream and the methods that learn it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch

from slm_fast.data import Row, Task
from slm_fast.options import LearnOptions

State = Mapping[str, Any]  # tensors, numbers, strings, and lists and mappings of these


class Answer(NamedTuple):
    """The answer to a row.

    Attributes:
        text: a label word, or the generated text.
        task: the task that the row was routed to, if the method reports it.
        slots: the task of each slot retrieved for the row.
        probabilities: of all tasks' labels, if the method reports them.
    """

    text: str
    task: str | None = None
    slots: tuple[str, ...] = ()
    probabilities: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Setup:
    """What a method is given before its first task.

    Attributes:
        backbone: a name or a folder.
        labels: all label words of the stream, sorted, for methods with one head over them.
        max_length: tokens read per text.
        max_new_tokens: tokens generated per answer.
        options: how each task is learned; a method with a learning rate of its own says so in its file. With
            `autocast`, a method that is not slm_fast's own also answers in bfloat16.
    """

    backbone: str
    labels: tuple[str, ...]
    max_length: int
    options: LearnOptions
    max_new_tokens: int = 32

    def precision(self) -> torch.autocast:
        """The context to learn and answer in. Weights are rounded anew in each pass, as learning changes them."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.autocast(device, torch.bfloat16, enabled=self.options.autocast, cache_enabled=False)


class Method(Protocol):
    """Learns the tasks of a stream one after another, and answers rows of those learned so far.

    All randomness in learning a task is seeded by its name and the options' seed, so that a run resumed from a state
    ends like one that was never interrupted.
    """

    def learn(self, task: Task, progress: bool | None = None) -> None: ...

    def answers(self, rows: Sequence[Row], tasks: Sequence[str] | None = None) -> list[Answer]:
        """Answer rows of all tasks, mixed. tasks: each row's, given only if the method's `Entry` needs it."""

    def state(self) -> State:
        """All that `restore` needs."""

    def restore(self, state: State) -> None:
        """Return to the point at which `state` was called; called before anything is learned."""

    @property
    def parameters(self) -> int:
        """Parameters that learning added to the backbone or changed in it, over all tasks so far."""

    @property
    def kept(self) -> int:
        """Bytes kept besides the backbone for all tasks so far: added parameters, statistics, rows to replay."""


class Entry(NamedTuple):
    """A line of the table of methods.

    Attributes:
        kinds: of backbones that it runs on.
        told: whether it needs each row's task to answer.
        retrains: whether it trains on the rows of earlier tasks again, all of them: an upper bound.
        options: fields of LearnOptions that differ from slm_fast's defaults.
    """

    title: str
    make: Callable[..., Method]  # takes a setup and, for slm_fast, fields of its configuration
    kinds: tuple[str, ...] = ("encoder", "seq2seq", "causal")
    told: bool = False
    retrains: bool = False
    options: Mapping[str, Any] = MappingProxyType({})
