"""Options for building a model, learning a task and predicting.

Each kind is a frozen dataclass. Functions that take one also accept its fields as keyword arguments, which
`LearnKeywords` and the other TypedDicts declare for type checkers (a test keeps them in sync). This module does not
import torch.
"""

from __future__ import annotations

import inspect
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from numbers import Real
from operator import index
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from slm_fast.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# Upper limits: far above any practical use, yet small enough to be tried.
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
TEMPERATURES = (1e-4, 1e4)  # beyond these, float32 probabilities degenerate

Options = TypeVar("Options", bound="DataclassInstance")
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class ModelConfig:
    """Configuration of a model. It is saved in the store and shared by all of its tasks.

    Attributes:
        query: "trunk" (hidden states of early backbone layers) or "sentence" (a separate, frozen sentence encoder).
        router: "gaussian" (linear discriminant analysis) or "dtkr" (the paper's: grouped cosine to learned keys).
        taps: layers whose hidden states form the trunk query. Default: chosen from the backbone's depth.
        encoder: model of the sentence query. Default: the paper's.
        targets: linear layers to adapt, by the names of the backbone's family. Default: those of query, value, out, up
            and down that it has.
        first_layer: lowest layer to adapt. Default: the last tap, or the middle layer with query="sentence".
        k: number of slots retrieved per input. Default: 2 (gaussian) or 4 (dtkr).
        groups, aggregate: number of key groups of the dtkr router, and how it combines them: "mean" or "vote".
        temperature: softmax temperature of the gaussian router's weights.
        features: number of random ReLU features that the gaussian router adds to the query. Unless 0, the trunk query
            also includes maxima over tokens. Default: twice the query width, at most 2,048; 0 with dtkr.
        route_on: text used for routing: "input" (without the row's instruction) or "prompt" (with it).
        max_length: maximum tokens read per input. Default: 256, or the backbone's limit if that is lower.
        chat_template: for causal chat models: format each row as a user turn (its instruction as the system turn) with
            the tokenizer's chat template, or with the given Jinja template. Saved in the store.
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
    """Options for learning a task.

    Attributes:
        epochs: number of epochs. Default: 3, or for a small task as many as give 120 steps, at most 20.
        batch_size: rows per optimiser step.
        learning_rate: peak of a schedule with linear warm-up and decay. The head of an encoder-only backbone uses three
            times this rate, and more if it has over 24 labels (`head_rate`).
        rank: LoRA rank r of the task.
        slots: number of slots S of the task. Default: 1 (gaussian) or 4 (dtkr, as in the paper).
        seed: random seed, combined with the task's name.
        max_length: maximum tokens read per input. Default: the model's.
        joint: train on routes over the slots of all tasks, as in the paper, instead of the task's own.
        warm_start: initialise the LoRA values from a learned task: the one named or, if True, the one that most
            training rows would be routed to (if any). The result then depends on that task.
        weight_decay: weight decay of AdamW.
        warmup: fraction of all steps used for warm-up.
        accumulate: gradient accumulation: number of parts in which a step's gradients are computed, to save memory.
        autocast: compute in bfloat16 with float32 weights; queries, LoRA values and optimiser state are unaffected.
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
        """Peak learning rate of a head with `labels` labels. It grows with their number, since each label then has
        fewer of a step's rows."""
        return self.learning_rate * max(3, min(10, labels / 8))

    def epochs_for(self, rows: int) -> int:
        """Number of epochs for a task of `rows` rows."""
        return self.epochs or max(3, min(20, math.ceil(120 / math.ceil(rows / self.batch_size))))


@dataclass(frozen=True)
class PredictOptions:
    """Options for prediction.

    Attributes:
        batch_size: maximum rows per batch.
        batch_tokens: token budget per batch, including padding and generated tokens. Default: depends on the device.
        max_new_tokens: maximum tokens of a generated answer.
        top_k: number of labels in `Prediction.probabilities`, most probable first. None: all labels.
        head: "mixed" mixes the heads of all tasks on the route by weight; "winner" uses the best task's head alone.
        abstain: treat a row as out-of-distribution if it is farther from its task than this fraction of the task's
            training rows, and answer it with the bare backbone (or no task). True means 0.99.
        distance: also set `Prediction.distance` without `abstain`, for a threshold of your own.
        bare: always answer with the bare backbone.
        sample, temperature, top_p, seed: generate text by nucleus sampling instead of greedy decoding.
        beams: number of beams for beam search.
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
        """The `abstain` threshold as a fraction; None if abstention is off."""
        return None if self.abstain is False else 0.99 if self.abstain is True else float(self.abstain)

    @property
    def measures(self) -> bool:
        """Whether distances are needed."""
        return self.distance or self.abstain_share is not None


# Validation. Numbers of numpy or from a configuration file become plain Python numbers.


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
    """Return `value`, an integer of any type, as a Python int.

    Raises:
        InputError: it is not an integer (expected: `what`), below `least`, or above `LARGEST[name]`.
    """
    number = _whole(value)
    if number is None:
        raise InputError(f"{name}: expected {what}, got {reprlib.repr(value)}")
    if number < least:
        raise InputError(f"{name}: expected at least {least}, got {number}")
    if number > LARGEST[name]:
        raise InputError(f"{name}: expected at most {LARGEST[name]:,}, got {reprlib.repr(value)}")
    return number


def _whole(value: Any) -> int | None:
    """Return an integer of any type except bool as a Python int, and None for anything else."""
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
    return tuple(dict.fromkeys(value))  # without duplicates


def _numbers(options: Any, name: str, least: float, most: float, *, above: bool = False, otherwise: str = "") -> None:
    """Check that a field is a number from `least` (excluded if `above`) to `most`, and make it a float."""
    value = getattr(options, name)
    number = math.nan
    if isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError):
            number = float(value)
    if not (least < number <= most if above else least <= number <= most):
        bounds = f"more than {least:g} and at most {most:g}" if above else f"a number from {least:g} to {most:g}"
        raise InputError(f"{name}: expected {otherwise}{bounds}, got {reprlib.repr(value)}")
    object.__setattr__(options, name, number)


def check_switch(name: str, value: Any, otherwise: str = "") -> bool:
    """The value of an option that is True or False. Raises InputError if it is neither."""
    if type(value).__name__ in ("bool", "bool_"):  # bool_ is numpy's
        return bool(value)
    raise InputError(f"{name}: expected True{',' if otherwise else ' or'} False{otherwise}, got {reprlib.repr(value)}")


def _switches(options: Any, *names: str, otherwise: str = "") -> None:
    for name in names:
        object.__setattr__(options, name, check_switch(name, getattr(options, name), otherwise))


# The same fields as keyword arguments.


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


def combine(
    kind: type[Options], options: Options | None, keywords: Mapping[str, Any], by: Callable[..., Any] | None = None
) -> Options:
    """`options` (the defaults if None) with the fields given as keywords to `by` replaced. Raises InputError."""
    names = {field.name: None for field in fields(kind)}
    for name in sorted(keywords.keys() - names):
        own = inspect.signature(by).parameters if by else {}
        names |= {each: None for each, parameter in own.items() if parameter.kind is parameter.KEYWORD_ONLY}
        raise InputError(f"{name}: unknown option; options: {', '.join(names)}{nearest(name, names)}")
    if options is not None and not isinstance(options, kind):
        raise InputError(f"options: expected {kind.__name__}, got a {type(options).__name__}")
    return replace(kind() if options is None else options, **keywords)


def nearest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """A clause for an error message that suggests the name most like this one, if any is, after `prefix`."""
    found = get_close_matches(name, list(names), 1)
    return f"; did you mean {prefix}{found[0]}?" if found else ""


def shows(kind: type[DataclassInstance]) -> Callable[[Function], Function]:
    """Decorator for a function that takes the fields of an options class as `**keywords`: lists them in its signature,
    for `help()`, notebook completion and the documentation."""

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
