"""What a stream asks of a method, whatever it is inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from slm_fast.data import Row, Task
from slm_fast.options import LearnOptions

State = Mapping[str, Any]  # tensors, numbers, words, and lists and mappings of these


class Answer(NamedTuple):
    """What is answered to a row.

    text: a label word, or what was written. task: which task the row was taken for, if the method says so. slots: the
    task of each slot that was retrieved for it. probabilities: of all tasks' labels, of a method that says them.
    """

    text: str
    task: str | None = None
    slots: tuple[str, ...] = ()
    probabilities: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Setup:
    """What a method is told before its first task.

    backbone: a name or a folder. labels: all label words of the stream, sorted, for methods that have one head over
    them. max_length: tokens read of a text. max_new_tokens: written of an answer. options: how each task is learned;
    a method that has a learning rate of its own says so in its file.
    """

    backbone: str
    labels: tuple[str, ...]
    max_length: int
    options: LearnOptions
    max_new_tokens: int = 32


class Method(Protocol):
    """Learns the tasks of a stream one after another, and answers rows of those learned so far.

    Everything random in learning a task is drawn from its name and the options' seed, so that a run that goes on from a
    state ends as one that was never interrupted.
    """

    def learn(self, task: Task, progress: bool | None = None) -> None: ...

    def answers(self, rows: Sequence[Row], tasks: Sequence[str] | None = None) -> list[Answer]:
        """Rows of all tasks mixed. tasks: each row's, given only to a method whose `Entry` needs it."""

    def state(self) -> State:
        """All that `restore` needs."""

    def restore(self, state: State) -> None:
        """Be what the method was when it gave its `state`; called before anything is learned."""

    @property
    def parameters(self) -> int:
        """Numbers that learning has added to the backbone or changed in it, of all tasks so far."""

    @property
    def kept(self) -> int:
        """Bytes kept beside the backbone for all tasks so far: added parameters, statistics, rows to replay."""


class Entry(NamedTuple):
    """A line of the table of methods.

    kinds: of backbones that it runs on. told: it needs each row's task to answer.
    """

    title: str
    make: Callable[..., Method]  # (setup), and for slm_fast fields of its configuration
    kinds: tuple[str, ...] = ("encoder", "seq2seq", "causal")
    told: bool = False
