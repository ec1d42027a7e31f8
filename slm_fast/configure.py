"""Completion of a model configuration: all defaults, chosen for a backbone."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import replace
from os.path import isfile
from typing import Any

import torch

from slm_fast.backbone import Backbone
from slm_fast.dtkr import DtkrRouter
from slm_fast.errors import InputError, WorkError
from slm_fast.loading import located
from slm_fast.options import LARGEST, ModelConfig
from slm_fast.query import DEFAULT_ENCODER, SentenceQuery, TrunkQuery, check_taps, default_taps
from slm_fast.random_features import RandomFeatureRouter, feature_matrix
from slm_fast.router import GaussianRouter, Router
from slm_fast.tokenization import Tokenization

MAX_FEATURES = 2048  # maximum default number of random features


def complete(config: ModelConfig, backbone: Backbone) -> ModelConfig:
    """Fill in all fields of the configuration except those of `complete_for`.

    Raises InputError if it does not fit the backbone.
    """
    layers, trunk = len(backbone.layers), config.query == "trunk"
    taps = check_taps(default_taps(layers) if config.taps is None else config.taps, layers) if trunk else None
    lowest = taps[-1] if taps else 0
    first_layer = config.first_layer if config.first_layer is not None else (lowest if taps else layers // 2)
    if not lowest <= first_layer < layers:
        raise InputError(f"first_layer: expected {lowest}..{layers - 1} (not below the last tap), got {first_layer}")
    targets = backbone.family.targets if config.targets is None else config.targets
    if not targets:
        raise InputError(f"targets: expected at least one of {', '.join(backbone.family.words)}, got none")
    limit = backbone.max_positions()
    max_length = min(256, limit or 256) if config.max_length is None else config.max_length
    if max_length < 4 or (limit is not None and max_length > limit):
        raise InputError(f"max_length: expected 4..{limit or 'any'} for this backbone, got {max_length}")
    gaussian = config.router == "gaussian"
    return replace(
        config,
        chat_template=_chat_template(config.chat_template, backbone),
        taps=taps,
        encoder=None if trunk else located(config.encoder or DEFAULT_ENCODER, "encoder"),
        targets=tuple(targets),
        first_layer=first_layer,
        k=config.k if config.k is not None else (2 if gaussian else 4),
        features=config.features if gaussian else 0,
        max_length=max_length,
    )


def _chat_template(wanted: bool | str | None, backbone: Backbone) -> bool | str:
    """The chat template to use, or False. Raises InputError if there is none or it cannot be used."""
    if not wanted:
        return False
    if backbone.kind != "causal":
        raise InputError("chat_template: goes with a causal backbone; this one reads no chats")
    template = backbone.tokenization.chat_template if wanted is True else wanted
    if template is None:
        raise InputError("chat_template: the tokenizer has none; set tokenizer.chat_template, or give one for True")
    try:
        backbone.tokenization.tokenize_chat("", [("user", "a")], template, LARGEST["max_length"])
    except WorkError as error:
        raise InputError(str(error)) from None
    return template


def check_given(given: Mapping[str, Any], router: str) -> None:
    """Raise InputError if one of the options given for a new model goes with the other router. Stores are not checked:
    a complete configuration has values for both."""
    for name, own in (("temperature", "gaussian"), ("groups", "dtkr"), ("aggregate", "dtkr")):
        value = given.get(name, getattr(ModelConfig, name))
        if own != router and value != getattr(ModelConfig, name):
            raise InputError(f"{name}: goes with router={own!r}, got router={router!r} and {name} {value!r}")


def check_template(config: ModelConfig, backbone: Backbone) -> None:
    """Raise InputError if the chat template of a new model leaves the user's words out."""
    template = config.chat_template
    if isinstance(template, str) and leaves_out_words(template, backbone.tokenization):
        wanted = "is a file; give its content" if isfile(template) else "expected Jinja that writes the turns"
        raise InputError(f"chat_template: {reprlib.repr(template)} writes no word of the user's: {wanted}")


def leaves_out_words(template: str, tokenization: Tokenization) -> bool:
    """Whether a chat template writes the same whatever the user says. Raises WorkError if it cannot write a turn."""
    short, long = (
        tokenization.tokenize_chat("", [("user", text)], template, LARGEST["max_length"]) for text in ("a", "a a a")
    )
    return short == long


def complete_for(config: ModelConfig, width: int) -> ModelConfig:
    """Fill in the fields that depend on the query's width."""
    features = min(MAX_FEATURES, 2 * width) if config.features is None else config.features
    return replace(config, groups=groups_of(config.groups, width), features=features)


def router_of(config: ModelConfig, query: TrunkQuery | SentenceQuery, device: torch.device) -> Router:
    """The router of a complete configuration, without tasks."""
    k = config.k or 1
    if config.router == "dtkr":
        return DtkrRouter(k=k, groups=config.groups or 1, aggregate=config.aggregate)
    if not config.features:  # includes stores older than random features
        return GaussianRouter(k=k, temperature=config.temperature)
    leading = query.means if isinstance(query, TrunkQuery) else query.width
    matrix = feature_matrix(leading, config.features, device)
    return RandomFeatureRouter(k=k, temperature=config.temperature, matrix=matrix)


def groups_of(groups: int | None, width: int) -> int:
    """The number of key groups: the given one or, by default, the largest divisor of `width` up to the paper's six."""
    found = next(g for g in (6, 5, 4, 3, 2, 1) if width % g == 0) if groups is None else groups
    if found < 1 or width % found:
        raise InputError(f"groups: expected a divisor of the query width {width}, got {found}")
    return found
