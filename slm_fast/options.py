"""What users set: how a model is put together, how a task is learned, how rows are answered.

Each kind is a frozen dataclass; the functions that take one also accept its fields as keywords. `LearnKeywords` and the
like spell these out for type checkers, and a test holds them to the fields. This module imports no torch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from slm_fast.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class ModelConfig:
    """How a model is put together. It is part of a store and the same for all its tasks.

    Attributes:
        query: "trunk" (the backbone's own early hidden states) or "sentence" (a second, frozen sentence encoder).
        router: "gaussian" (linear discriminant analysis) or "dtkr" (grouped cosine to learned keys, the paper's).
        taps: layers that the trunk query reads; None means chosen from the backbone's depth.
        encoder: model of the sentence query; None means the paper's.
        targets: linear layers that carry LoRA increments, in the words of the backbone's family.
        first_layer: the lowest layer that carries them; None means the last tap.
        k: slots retrieved for an input; None means 2 (gaussian) or 4 (dtkr).
        groups, aggregate: of the dtkr router; "mean" or "vote".
        temperature: of the gaussian router's weights.
        route_on: "input" (a row's instruction does not help routing) or "prompt".
        max_length: tokens read of an input; None means 256, or fewer where the backbone holds fewer.
    """

    query: str = "trunk"
    router: str = "gaussian"
    taps: tuple[int, ...] | None = None
    encoder: str | None = None
    targets: tuple[str, ...] = ("query", "value", "out", "up", "down")
    first_layer: int | None = None
    k: int | None = None
    groups: int | None = None
    aggregate: str = "mean"
    temperature: float = 4.0
    route_on: str = "input"
    max_length: int | None = None

    def __post_init__(self) -> None:
        for name, choices in (
            ("query", ("trunk", "sentence")),
            ("router", ("gaussian", "dtkr")),
            ("route_on", ("input", "prompt")),
            ("aggregate", ("mean", "vote")),
        ):
            if getattr(self, name) not in choices:
                raise InputError(f"{name}: expected {' or '.join(map(repr, choices))}, got {getattr(self, name)!r}")
        _positive("temperature", self.temperature)
        if self.k is not None and self.k < 1:
            raise InputError(f"k: expected at least 1, got {self.k}")
        if self.encoder is not None and self.query == "trunk":
            raise InputError(f"encoder: goes with query='sentence', got query='trunk' and encoder {self.encoder!r}")
        if self.taps is not None and self.query != "trunk":
            raise InputError(f"taps: go with query='trunk', got query='sentence' and taps {list(self.taps)}")


@dataclass(frozen=True)
class LearnOptions:
    """How a task is learned.

    Attributes:
        epochs: None means 3, and for a small task as many as make 120 steps, at most 20.
        batch_size: rows of one optimiser step.
        learning_rate: the peak of a linear warm-up and decay.
        rank: r of the task's LoRA increments.
        slots: S, the slots the task brings; None means 1 (gaussian) or 4 (dtkr, as the paper).
        seed: everything random is drawn from it and the task's name.
        max_length: tokens read of an input; None means the model's.
        joint: train on routes over all tasks' slots, as the paper does, rather than over the task's own.
        weight_decay: of AdamW. warmup: the share of all steps that warm up.
        accumulate: gradient accumulation: a step's gradients are computed in so many parts, to save memory.
        autocast: compute in bfloat16 though the weights are float32; queries, values and optimiser stay as they are.
    """

    epochs: int | None = None
    batch_size: int = 16
    learning_rate: float = 1e-3
    rank: int = 8
    slots: int | None = None
    seed: int = 0
    max_length: int | None = None
    joint: bool = False
    weight_decay: float = 0.01
    warmup: float = 0.06
    accumulate: int = 1
    autocast: bool = False

    def __post_init__(self) -> None:
        _at_least_one(self, "epochs", "batch_size", "accumulate", "rank", "slots")
        if not 0 < self.learning_rate <= 1:
            raise InputError(f"learning_rate: expected more than 0 and at most 1, got {self.learning_rate}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise InputError(f"weight_decay: expected a number not below 0, got {self.weight_decay}")
        if not 0 <= self.warmup <= 1:
            raise InputError(f"warmup: expected a share of 0 to 1, got {self.warmup}")

    def epochs_for(self, rows: int) -> int:
        """Epochs over so many rows."""
        return self.epochs or max(3, min(20, math.ceil(120 / math.ceil(rows / self.batch_size))))


@dataclass(frozen=True)
class PredictOptions:
    """How rows are answered.

    Attributes:
        batch_size: rows of a batch at most.
        batch_tokens: tokens of a batch at most, padding and new tokens included; None means what suits the device.
        max_new_tokens: of a generated answer.
        top_k: how many labels `Prediction.probabilities` gives, the most probable first; None means all.
        head: "mixed" weighs the heads of all tasks on the route, "winner" uses the best task's.
        abstain: answer with the bare backbone (or no task) when a row is farther from its task than this share of the
            task's training rows; True means 0.99.
        bare: always answer with the bare backbone.
        sample, temperature, top_p, seed: draw generated text (nucleus sampling) rather than take the likeliest token.
        beams: beam search over so many hypotheses.
    """

    batch_size: int | None = None
    batch_tokens: int | None = None
    max_new_tokens: int = 64
    top_k: int | None = 1
    head: str = "mixed"
    abstain: bool | float = False
    bare: bool = False
    sample: bool = False
    beams: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least_one(self, "batch_size", "batch_tokens", "max_new_tokens", "top_k", "beams")
        if self.head not in ("mixed", "winner"):
            raise InputError(f"head: expected 'mixed' or 'winner', got {self.head!r}")
        _positive("temperature", self.temperature)
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: expected more than 0 and at most 1, got {self.top_p}")
        if not 0.0 <= float(self.abstain) <= 1.0:
            raise InputError(f"abstain: expected True, False or a share of 0 to 1, got {self.abstain}")

    @property
    def abstain_share(self) -> float | None:
        """The share of training rows that `abstain` means; None when rows are never abstained from."""
        return None if self.abstain is False else 0.99 if self.abstain is True else float(self.abstain)


def _at_least_one(options: Any, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"{name}: expected at least 1, got {value}")


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{name}: expected a positive number, got {value}")


# The same fields as keywords.


class ModelKeywords(TypedDict, total=False):
    query: str
    router: str
    taps: tuple[int, ...] | None
    encoder: str | None
    targets: tuple[str, ...]
    first_layer: int | None
    k: int | None
    groups: int | None
    aggregate: str
    temperature: float
    route_on: str
    max_length: int | None


class LearnKeywords(TypedDict, total=False):
    epochs: int | None
    batch_size: int
    learning_rate: float
    rank: int
    slots: int | None
    seed: int
    max_length: int | None
    joint: bool
    weight_decay: float
    warmup: float
    accumulate: int
    autocast: bool


class PredictKeywords(TypedDict, total=False):
    batch_size: int | None
    batch_tokens: int | None
    max_new_tokens: int
    top_k: int | None
    head: str
    abstain: bool | float
    bare: bool
    sample: bool
    beams: int
    temperature: float
    top_p: float
    seed: int


def combine(kind: type[Options], options: Options | None, keywords: Mapping[str, Any]) -> Options:
    """These options (None: the defaults) with what the keywords change.

    Raises InputError for a keyword that is no field, or a value that does not fit.
    """
    names = [field.name for field in fields(kind)]
    unknown = sorted(keywords.keys() - set(names))
    if unknown:
        raise InputError(f"{unknown[0]}: unknown option; options: {', '.join(names)}")
    return replace(kind() if options is None else options, **keywords)


def shows(kind: type[DataclassInstance]) -> Callable[[Function], Function]:
    """Show the fields of an options class in the signature of a function that takes them as `**keywords`: in `help()`,
    in a notebook's completion, in the documentation."""

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        own = [
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
            for field in fields(kind)
        ]
        function.__signature__ = signature.replace(parameters=[*named, *own])  # type: ignore[attr-defined]
        return function

    return decorate
