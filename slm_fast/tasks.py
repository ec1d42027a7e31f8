"""What is kept of a learned task."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

TANH = "tanh"


@dataclass(frozen=True)
class Adapter:
    """How an imported task answers, so that it equals the original adapter.

    It is never mixed with others: if its slot is the best of a row's route, it is the whole route, else it has no part
    in it.

    Attributes:
        pooling: hidden state that its head reads: that of the "first" or "last" real token, or their "mean". None
            without a head.
        prompt: what a causal backbone reads: the text alone ("plain"), or followed by the separator of learned tasks
            ("separator").
        chat_template: Jinja chat template, as in transformers' tokenizers, to format the text as a user turn, if any.
        ends: ids of further end tokens, besides the backbone's.
        activation: of the dense layer below its head, if any: a word of `slm_fast.task_tensors.ACTIVATIONS`, where
            `_norm` means a subsequent layer norm without weights.
    """

    pooling: str | None = None
    prompt: str = "plain"
    chat_template: str | None = None
    ends: tuple[int, ...] = ()
    activation: str = TANH


class ValuesShape(NamedTuple):
    """Shape of a task's values.

    Attributes:
        slots: number of slots.
        rank: largest rank of its modules.
        widths: module name -> (I, O).
    """

    slots: int
    rank: int
    widths: Mapping[str, tuple[int, int]]


def shape_of(shapes: Mapping[str, Sequence[Sequence[int]]]) -> ValuesShape:
    """The shape of values. shapes: module name -> shapes of its lora_a [S, r, I] and lora_b [S, r, O]."""
    widths = {module: (lora_a[2], lora_b[2]) for module, (lora_a, lora_b) in shapes.items()}
    first = next(iter(shapes.values()))[0]
    return ValuesShape(first[0], max(lora_a[1] for lora_a, _ in shapes.values()), widths)


class MappedValues(Mapping[str, tuple[Tensor, Tensor]], ABC):
    """A task's values, by module, in a mapped file."""

    @abstractmethod
    def arrays(self, module: str) -> tuple[np.ndarray, np.ndarray]:
        """One module's values as views that take less time to make than tensors."""

    @abstractmethod
    def unmap(self) -> None:
        """Let the system take the memory. The file is mapped again on use."""


@dataclass(frozen=True)
class LearnedTask:
    """Everything that is kept of a task, which is the content of its file in the store. Nothing else depends on the
    task.

    Attributes:
        values: module name -> (lora_a [S, r, I], lora_b [S, r, O]) float32. An imported task has its own modules and
            ranks, which may differ between modules.
        router: the task's part of the router (`slm_fast.task_tensors.ROUTERS`): its keys, or its counts, means and
            scatter, and the distances of its training queries, or what these are computed from.
        head: (weight [C, H], bias [C]) for encoder-only backbones, in the order of `labels`, else None. An imported
            task may have one with any backbone.
        dense: (weight [H, H], bias [H]) of a layer between pooled states and the head; imported tasks only.
        adapter: imported tasks only.
        options: how it was learned. Also its number of rows if its router keeps no count, and an imported task's base
            and `generation` settings, which are not applied.
        origin: SHA-256 of what the task was made from (`origin_of`); None if unknown. Other kinds of processors make
            different last bits of the same origin.
    """

    name: str
    labels: tuple[str, ...] | None
    values: Mapping[str, tuple[Tensor, Tensor]]
    router: Mapping[str, Tensor]
    head: tuple[Tensor, Tensor] | None
    options: Mapping[str, Any] = field(default_factory=dict)
    origin: str | None = None
    adapter: Adapter | None = None
    dense: tuple[Tensor, Tensor] | None = None

    @cached_property
    def shape(self) -> ValuesShape:
        """Shape of its values. For a task in a file it is known without reading them."""
        return shape_of({module: [tuple(half.shape) for half in pair] for module, pair in self.values.items()})

    @property
    def rank(self) -> int:
        """Largest rank of its modules."""
        return self.shape.rank

    @property
    def slots(self) -> int:
        """S, the number of this task's slots in the pool."""
        return self.shape.slots


def origin_of(name: str, about: Mapping[str, Any], rows: Iterable[Sequence[Any]]) -> str:
    """SHA-256 of what a task is made from: its name, `about` its model and options, and its rows in order."""
    digest = hashlib.sha256()
    for part in ([name, about], *rows):
        digest.update(json.dumps(part, sort_keys=True, allow_nan=False).encode() + b"\n")
    return digest.hexdigest()


def name_seed(name: str, seed: int) -> int:
    """A seed derived from a task's name, so that random numbers for a task do not depend on when it is learned."""
    digest = hashlib.sha256(f"{name}\n{seed}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def in_name_order(tasks: Sequence[LearnedTask]) -> list[LearnedTask]:
    return sorted(tasks, key=lambda task: task.name)
