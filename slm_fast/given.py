"""Checks of a backbone given as objects: unwrapping the model, removing its head, completing the tokenizer's tokens."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from slm_fast.errors import InputError

_ASIDE = ("sentence_transformers.", "transformers.pipelines.")


def unwrapped(model: Any) -> Any:
    """The transformers model inside torch.compile or DataParallel wrappers.

    Raises InputError for anything else. The message says what to give instead.
    """
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            break
    kind = type(model)
    where = f"{kind.__module__}."
    if kind.__name__ == "SentenceTransformer" or where.startswith(_ASIDE[0]):
        raise InputError(f"backbone: got a {kind.__name__}; give model[0].auto_model, and model.tokenizer beside it")
    if where.startswith(_ASIDE[1]) or kind.__name__.endswith("Pipeline"):
        raise InputError(f"backbone: got a {kind.__name__}; give its .model, and its .tokenizer beside it")
    if not isinstance(model, nn.Module) or not hasattr(getattr(model, "config", None), "model_type"):
        raise InputError(f"backbone: expected a path, a name or a transformers model, got a {kind.__name__}")
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise InputError("backbone: carries PEFT adapters; give what model.merge_and_unload() returns")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError("backbone: its weights are not loaded (they are on the meta device)")
    return model


def without_head(model: Any, kind: str, layers: str, upper: str | None, auto_class: str) -> Any:
    """The part of a model that this package uses: an encoder without its head, or a whole model that generates text.

    Args:
        kind, layers, upper, auto_class: as in its `Family`.

    Raises:
        InputError: the model does not have this part.
    """
    inner = getattr(model, "base_model", model) if kind == "encoder" else model
    there = all(_has(inner, part) for part in (layers, upper) if part)
    if there and (kind == "encoder" or inner.get_output_embeddings() is not None):
        return inner
    lacks = "answers with no texts" if kind != "encoder" else f"has no {layers}"
    name = type(model).__name__
    raise InputError(f"backbone: a {name} {lacks}; load the checkpoint with transformers.{auto_class}.from_pretrained")


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def checked_tokenizer(tokenizer: Any, model: Any, kind: str) -> Any:
    """A copy of a tokenizer with a padding token and, if its model generates text, an end token. The original does not
    change.

    Raises:
        InputError: it is not a tokenizer, lacks a token that no other can replace, or has tokens beyond the model's
            embedding.
    """
    if not (callable(tokenizer) and hasattr(tokenizer, "get_vocab") and hasattr(tokenizer, "pad_token_id")):
        hint = "; wrap it: PreTrainedTokenizerFast(tokenizer_object=...)" if hasattr(tokenizer, "encode_batch") else ""
        name = type(tokenizer).__name__
        raise InputError(f"tokenizer: expected a transformers tokenizer, a path or a name, got a {name}{hint}")
    tokenizer = copy.deepcopy(tokenizer)
    rows = len(model.get_input_embeddings().weight)
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    special = set(tokenizer.all_special_ids)
    beyond = [index for index in vocabulary if index >= rows and index not in special]
    if beyond:
        raise InputError(
            f"tokenizer: has token ids up to {max(beyond)} ({vocabulary[max(beyond)]!r}), the model's embedding has "
            f"{rows} rows; call model.resize_token_embeddings(len(tokenizer)) first"
        )
    if kind != "encoder" and tokenizer.eos_token_id is None:
        tokenizer.eos_token = _first_known(vocabulary, rows, *_ends(model))
        if tokenizer.eos_token is None:
            raise InputError("tokenizer: has no end token, with which answers end; set tokenizer.eos_token")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        others = tokenizer.eos_token_id, model.config.pad_token_id, tokenizer.unk_token_id
        pad = _first_known(vocabulary, rows, *others)
        if pad is None and tokenizer.pad_token_id is None:
            pad = tokenizer.eos_token
        if pad is None:
            raise InputError("tokenizer: has no padding token, nor an end or unknown token; set tokenizer.pad_token")
        tokenizer.pad_token = pad
    return tokenizer


def _ends(model: Any) -> list[int | None]:
    """End tokens according to the model's own configurations."""
    found: list[int | None] = []
    for config in (getattr(model, "generation_config", None), model.config):
        ends = getattr(config, "eos_token_id", None)
        found += ends if isinstance(ends, list) else [ends]
    return found


def _first_known(vocabulary: dict[int, str], rows: int, *ids: int | None) -> str | None:
    """The first of these tokens that is in the vocabulary and the embedding."""
    return next(
        (vocabulary[index] for index in ids if index is not None and index < rows and index in vocabulary), None
    )
