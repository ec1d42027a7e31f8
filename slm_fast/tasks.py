"""What is kept of a task once it is learned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

TANH = "tanh"


@dataclass(frozen=True)
class Adapter:
    """How a task that was imported answers, so that it equals the adapter it was.

    It is never mixed with others: where its slot is the best of a row's route, it is all of the route, and it is part
    of no other route.

    Attributes:
        pooling: which hidden state its head reads: the "first" or "last" real token's, or their "mean". None without a
            head.
        prompt: what a causal backbone reads: the text as it is ("plain"), or with the separator behind it that learned
            tasks have ("separator").
        chat_template: Jinja, as transformers' tokenizers have it, to write the text as a user's turn; None without.
        ends: ids of tokens that end a written text, beside the backbone's.
        activation: of the dense layer below its head, if it has one: a word of `slm_fast.task_tensors.ACTIVATIONS`,
            with `_norm` a layer norm without weights after it.
    """

    pooling: str | None = None
    prompt: str = "plain"
    chat_template: str | None = None
    ends: tuple[int, ...] = ()
    activation: str = TANH


class ValuesShape(NamedTuple):
    """slots: of a task. rank: the largest of its modules'. widths: module name -> (I, O)."""

    slots: int
    rank: int
    widths: Mapping[str, tuple[int, int]]


def shape_of(shapes: Mapping[str, Sequence[Sequence[int]]]) -> ValuesShape:
    """shapes: module name -> those of its lora_a [S, r, I] and lora_b [S, r, O]."""
    widths = {module: (lora_a[2], lora_b[2]) for module, (lora_a, lora_b) in shapes.items()}
    first = next(iter(shapes.values()))[0]
    return ValuesShape(first[0], max(lora_a[1] for lora_a, _ in shapes.values()), widths)


@dataclass(frozen=True)
class LearnedTask:
    """All that is kept of a task: what its file in the store holds, and nothing else depends on it.

    values: module name -> (lora_a [S, r, I], lora_b [S, r, O]) float32. An imported task has modules and ranks of its
        own, which need not be the same for all modules.
    router: what the router needs of this task (`slm_fast.schema.ROUTERS`): its keys, or its counts, means and scatter,
        and what says how far its own training queries are.
    head: (weight [C, H], bias [C]) for encoder-only backbones, in the order of `labels`; else None. An imported task of
        any backbone may have one.
    dense: (weight [H, H], bias [H]) of a layer between pooled states and the head, of imported tasks only.
    adapter: of imported tasks only.
    origin: SHA-256 of what it was made from (`origin_of`). Processors of another kind make other last bits of the same;
        None where it is not known.
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
        """Of its values. It is known without reading them where the task lies in a file."""
        return shape_of({module: [tuple(half.shape) for half in pair] for module, pair in self.values.items()})

    @property
    def rank(self) -> int:
        """The largest of its modules' ranks."""
        return self.shape.rank

    @property
    def slots(self) -> int:
        """S, the number of slots this task brings to the pool."""
        return self.shape.slots


def origin_of(name: str, about: Mapping[str, Any], rows: Iterable[Sequence[Any]]) -> str:
    """SHA-256 of what a task is made from: its name, what is said `about` model and options, and its rows in order."""
    digest = hashlib.sha256()
    for part in ([name, about], *rows):
        digest.update(json.dumps(part, sort_keys=True, allow_nan=False).encode() + b"\n")
    return digest.hexdigest()


def name_seed(name: str, seed: int) -> int:
    """A seed from a task's name, so that what is drawn for a task does not depend on when it is learned."""
    digest = hashlib.sha256(f"{name}\n{seed}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def in_name_order(tasks: Sequence[LearnedTask]) -> list[LearnedTask]:
    return sorted(tasks, key=lambda task: task.name)
