"""What users set: how a model is put together, how a task is learned, how rows are answered.

Each kind is a frozen dataclass; the functions that take one also accept its fields as keywords. `LearnKeywords` and the
like spell these out for type checkers, and a test holds them to the fields. This module imports no torch.
"""

from __future__ import annotations

import inspect
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from numbers import Real
from operator import index
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from slm_fast.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# The largest of what is counted: far more than anybody uses, and little enough to be tried.
LARGEST = {
    "layer": 10_000,
    "k": 1024,
    "groups": 4096,
    "features": 1 << 14,
    "rank": 4096,
    "slots": 4096,
    "epochs": 1_000_000,
    "patience": 1_000_000,
    "accumulate": 1_000_000,
    "batch_size": 1 << 20,
    "batch_tokens": 1 << 30,
    "max_length": 1 << 20,
    "max_new_tokens": 1 << 20,
    "top_k": 1 << 20,
    "beams": 1024,
    "seed": (1 << 63) - 1,
}
TEMPERATURES = (1e-4, 1e4)  # outside of these float32 has no probabilities left

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
        targets: linear layers that carry LoRA increments, in the words of the backbone's family; None means query,
            value, out, up, down, as far as it has them.
        first_layer: the lowest layer that carries them; None means the last tap.
        k: slots retrieved for an input; None means 2 (gaussian) or 4 (dtkr).
        groups, aggregate: of the dtkr router; "mean" or "vote".
        temperature: of the gaussian router's weights.
        features: random ReLU features that the gaussian router adds to a query, which then reads maxima over tokens,
            too; None means twice the query's width, at most 2,048; 0 with dtkr.
        route_on: "input" (a row's instruction does not help routing) or "prompt".
        max_length: tokens read of an input; None means 256, or fewer where the backbone holds fewer.
        chat_template: of a causal chat model: write each row as a user's turn (its instruction as the system's) in the
            tokenizer's chat template, or in the one given (Jinja). A store keeps it.
    """

    query: str = "trunk"
    router: str = "gaussian"
    taps: tuple[int, ...] | None = None
    encoder: str | None = None
    targets: tuple[str, ...] | None = None
    first_layer: int | None = None
    k: int | None = None
    groups: int | None = None
    aggregate: str = "mean"
    temperature: float = 4.0
    features: int | None = None
    route_on: str = "input"
    max_length: int | None = None
    chat_template: bool | str = False

    def __post_init__(self) -> None:
        for name, choices in (
            ("query", ("trunk", "sentence")),
            ("router", ("gaussian", "dtkr")),
            ("route_on", ("input", "prompt")),
            ("aggregate", ("mean", "vote")),
        ):
            _word(self, name, *choices)
        _numbers(self, "temperature", *TEMPERATURES)
        _integers(self, "k", "groups", "max_length", optional=True)
        _integers(self, "features", least=0, optional=True)
        if self.first_layer is not None:
            object.__setattr__(self, "first_layer", _layer("first_layer", self.first_layer))
        if self.taps is not None:
            object.__setattr__(self, "taps", tuple(_layer("taps", tap) for tap in _listed("taps", self.taps)))
        if self.targets is not None:
            object.__setattr__(self, "targets", _listed("targets", self.targets))
            for value in self.targets:
                if not isinstance(value, str):
                    raise InputError(f"targets: expected words, got {value!r}")
        if self.encoder is not None and not isinstance(self.encoder, str):
            raise InputError(f"encoder: expected a name or a path, got {reprlib.repr(self.encoder)}")
        if self.encoder is not None and self.query == "trunk":
            raise InputError(f"encoder: goes with query='sentence', got query='trunk' and encoder {self.encoder!r}")
        if self.taps is not None and self.query != "trunk":
            raise InputError(f"taps: go with query='trunk', got query='sentence' and taps {list(self.taps)}")
        if not isinstance(self.chat_template, str) or not self.chat_template:
            _switches(self, "chat_template", otherwise=" or a template")
        if self.features and self.router != "gaussian":
            raise InputError(f"features: go with router='gaussian', got router='dtkr' and features {self.features}")


@dataclass(frozen=True)
class LearnOptions:
    """How a task is learned.

    Attributes:
        epochs: None means 3, and for a small task as many as make 120 steps, at most 20.
        batch_size: rows of one optimiser step.
        learning_rate: the peak of a linear warm-up and decay. The head of an encoder-only backbone learns three times
            as fast, one of more than 24 labels faster still (`head_rate`).
        rank: r of the task's LoRA increments.
        slots: S, the slots the task brings; None means 1 (gaussian) or 4 (dtkr, as the paper).
        seed: everything random is drawn from it and the task's name.
        max_length: tokens read of an input; None means the model's.
        joint: train on routes over all tasks' slots, as the paper does, rather than over the task's own.
        warm_start: begin at the values of a task that is learned already, rather than anew: True (the one that most of
            the training rows would be routed to, if there is any) or its name. They then depend on that task's.
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
    warm_start: bool | str = False
    weight_decay: float = 0.01
    warmup: float = 0.06
    accumulate: int = 1
    autocast: bool = False

    def __post_init__(self) -> None:
        _integers(self, "batch_size", "accumulate", "rank")
        _integers(self, "epochs", "slots", "max_length", optional=True)
        _integers(self, "seed", least=-LARGEST["seed"])
        _numbers(self, "learning_rate", 0, 1, above=True)
        _numbers(self, "weight_decay", 0, 1e38)
        _numbers(self, "warmup", 0, 1)
        _switches(self, "joint", "autocast")
        if not isinstance(self.warm_start, str):
            _switches(self, "warm_start", otherwise=" or a task's name")

    def head_rate(self, labels: int) -> float:
        """The peak of the learning rate of a head of so many labels. The more there are, the fewer of a step's rows are
        any one label's."""
        return self.learning_rate * max(3, min(10, labels / 8))

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
        distance: give each prediction's `distance` without `abstain`, too, for a threshold of one's own.
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
    distance: bool = False
    bare: bool = False
    sample: bool = False
    beams: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _integers(self, "max_new_tokens", "beams")
        _integers(self, "batch_size", "batch_tokens", "top_k", optional=True)
        _integers(self, "seed", least=-LARGEST["seed"])
        _word(self, "head", "mixed", "winner")
        _numbers(self, "temperature", *TEMPERATURES)
        _numbers(self, "top_p", 0, 1, above=True)
        _switches(self, "distance", "bare", "sample")
        if not isinstance(self.abstain, bool):
            _numbers(self, "abstain", 0, 1, otherwise="True, False or ")

    @property
    def abstain_share(self) -> float | None:
        """The share of training rows that `abstain` means; None when rows are never abstained from."""
        return None if self.abstain is False else 0.99 if self.abstain is True else float(self.abstain)

    @property
    def measures(self) -> bool:
        """Whether distances are asked for."""
        return self.distance or self.abstain_share is not None


# Checks. What numpy or a configuration file gives as a number of another type becomes Python's own.


def _word(options: Any, name: str, *choices: str) -> None:
    value = getattr(options, name)
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name}: expected {' or '.join(map(repr, choices))}, got {reprlib.repr(value)}")


def _integers(options: Any, *names: str, least: int = 1, optional: bool = False) -> None:
    for name in names:
        value = getattr(options, name)
        if value is None and optional:
            continue
        what = "an integer or None" if optional else "an integer"
        object.__setattr__(options, name, at_least_one(name, value, what, least))


def at_least_one(name: str, value: Any, what: str = "an integer or None", least: int = 1) -> int:
    """An integer of any type, from `least` to the largest that `LARGEST` has of this name, as Python's own. Raises
    InputError, with the words `what` for it."""
    number = _whole(value)
    if number is None:
        raise InputError(f"{name}: expected {what}, got {reprlib.repr(value)}")
    if number < least:
        raise InputError(f"{name}: expected at least {least}, got {number}")
    if number > LARGEST[name]:
        raise InputError(f"{name}: expected at most {LARGEST[name]:,}, got {reprlib.repr(value)}")
    return number


def _whole(value: Any) -> int | None:
    """An integer of any type (but a truth value) as Python's own; None for anything else."""
    if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):
        return None
    try:
        return index(value)
    except TypeError:
        return None


def _layer(name: str, value: Any) -> int:
    number = _whole(value)
    if number is None or not 0 <= number <= LARGEST["layer"]:
        raise InputError(f"{name}: expected a layer's number from 0 on, got {reprlib.repr(value)}")
    return number


def _listed(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise InputError(f"{name}: expected a list, got {reprlib.repr(value)}")
    return tuple(dict.fromkeys(value))  # each once


def _numbers(options: Any, name: str, least: float, most: float, *, above: bool = False, otherwise: str = "") -> None:
    """A number from `least` (which it must exceed, if `above`) to `most`."""
    value = getattr(options, name)
    number = math.nan
    if isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError):
            number = float(value)
    if not (least < number <= most if above else least <= number <= most):
        bounds = f"more than {least:g} and at most {most:g}" if above else f"a number from {least:g} to {most:g}"
        raise InputError(f"{name}: expected {otherwise}{bounds}, got {reprlib.repr(value)}")
    object.__setattr__(options, name, number)


def _switches(options: Any, *names: str, otherwise: str = "") -> None:
    for name in names:
        value = getattr(options, name)
        if type(value).__name__ not in ("bool", "bool_"):  # the other is numpy's
            said = f"True, False{otherwise}" if otherwise else "True or False"
            raise InputError(f"{name}: expected {said}, got {reprlib.repr(value)}")
        object.__setattr__(options, name, bool(value))


# The same fields as keywords.


class ModelKeywords(TypedDict, total=False):
    query: str
    router: str
    taps: tuple[int, ...] | None
    encoder: str | None
    targets: tuple[str, ...] | None
    first_layer: int | None
    k: int | None
    groups: int | None
    aggregate: str
    temperature: float
    features: int | None
    route_on: str
    max_length: int | None
    chat_template: bool | str


class LearnKeywords(TypedDict, total=False):
    epochs: int | None
    batch_size: int
    learning_rate: float
    rank: int
    slots: int | None
    seed: int
    max_length: int | None
    joint: bool
    warm_start: bool | str
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
    distance: bool
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
    if options is not None and not isinstance(options, kind):
        raise InputError(f"options: expected {kind.__name__}, got a {type(options).__name__}")
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
