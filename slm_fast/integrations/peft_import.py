"""A PEFT adapter as a task: its values, its head, and routing statistics from example texts.

An imported task has a hard route (K = 1): if it is the best for a row, it answers alone, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from torch import Tensor

from slm_fast.backbone import Backbone
from slm_fast.card import HUB_NAMES
from slm_fast.configure import leaves_out_words
from slm_fast.data import Row, check_name
from slm_fast.errors import InputError, NotFinite, WorkError, some_of, warn
from slm_fast.fields import Unfit, repeated
from slm_fast.hub import HUB_NAME
from slm_fast.identity import OVERRULED
from slm_fast.integrations.peft_files import (
    PeftAdapter,
    as_float32,
    chat_template,
    check_vocabulary,
    generation_settings,
    labels_of,
    unread_vocabulary,
)
from slm_fast.integrations.peft_heads import class_of, head_of
from slm_fast.labels import check_label
from slm_fast.model import AdaptedModel
from slm_fast.reading import prompt_of
from slm_fast.schema import WHEN_KNOWN, check_contents
from slm_fast.task_file import contents_of
from slm_fast.tasks import Adapter, LearnedTask, name_seed, origin_of

FEW = 20  # examples: fewer tell the router little about a task; about 50 are recommended


def import_task(
    model: AdaptedModel, adapter: PeftAdapter, name: str, rows: Sequence[Row], *, labels: Sequence[str] | None = None
) -> LearnedTask:
    """Make a task, which the model does not know yet, from an adapter.

    Args:
        rows: example texts of the task, about 50. Answers are ignored.
        labels: labels of the adapter's head, in its order. Default: those that an export of this package or a
            config.json beside the adapter names, else LABEL_0, LABEL_1, ... as in transformers.

    Raises:
        InputError: there are no examples, the adapter is for another backbone, or this family does not support its
            head.
        WorkError: a query is not finite, or a number is too large for a store.
    """
    check_name(name)
    if not rows:
        raise InputError("examples: expected texts of the task, about 50, got none")
    backbone = model.backbone
    check_vocabulary(adapter.folder, backbone.tokenizer.get_vocab())
    values = values_of(adapter, backbone)
    head = head_of(adapter, backbone)
    prompt = adapter.own.get("prompt", "plain")
    settings, ends = generation_settings(adapter.folder) if backbone.kind != "encoder" else ({}, ())
    if (size := vocabulary_size(backbone)) and ends and ends[-1] >= size:
        raise InputError(
            f"{adapter.folder / 'generation_config.json'}: eos_token_id: {ends[-1]}, the backbone has {size:,} tokens; "
            "name a token that ends its answers, or delete the file"
        )
    template = chat_template(adapter.folder) if backbone.kind == "causal" and head is None else None
    about = Adapter(prompt=prompt, chat_template=template, ends=ends)
    if template is not None:
        _check_template(about, adapter, rows, model)
    if head is not None:
        about = replace(about, pooling=head.pooling, activation=head.activation)
    own_words = tuple(adapter.own.get("labels") or ()) or None  # an exported task may generate its labels
    words = own_words if head is None else _labels(adapter, len(head.top[0]), labels)
    if labels is not None and head is None:
        raise InputError(f"labels: adapter {adapter.source!r} has no classification head; leave labels out")
    query = model.queries(rows)
    try:
        part = model.new_router().fit(query, 1, name_seed(name, 0))
    except NotFinite as error:
        raise WorkError(f"examples: row {error.rows[0] + 1}: {error.reason}") from None
    options: dict[str, Any] = {"base": str(adapter.config.get("base_model_name_or_path") or "")}
    if "count" not in part:
        options["rows"] = len(rows)
    if settings := {key: value for key, value in settings.items() if key != "eos_token_id"}:
        options["generation"] = settings
    task = LearnedTask(
        name=name,
        labels=words,
        values=values,
        router={key: tensor.cpu() for key, tensor in part.items()},
        head=None if head is None else head.top,
        options=options,
        origin=_origin(model, adapter, name, rows, words),
        adapter=about,
        dense=None if head is None else head.dense,
    )
    try:
        check_contents(*contents_of(task))
    except (Unfit, InputError, ValueError) as error:  # a store would refuse to read it
        raise WorkError(f"adapter {adapter.source!r}: {error}") from None
    _warn(adapter, backbone, settings, len(rows))
    return task


def vocabulary_size(backbone: Backbone) -> int:
    """The number of tokens that a backbone can write, or 0 if its configuration does not say."""
    config = backbone.model.config
    return int(getattr(config, "vocab_size", 0) or 0)


def _check_template(about: Adapter, adapter: PeftAdapter, rows: Sequence[Row], model: AdaptedModel) -> None:
    """Raise WorkError if the adapter's chat template cannot write the examples, or leaves their words out."""
    tokenization, template = model.backbone.tokenization, about.chat_template
    try:
        for row in rows:
            prompt_of(row, about, tokenization, model.config.max_length or 0)
        if template and leaves_out_words(template, tokenization):
            raise WorkError("chat_template: writes the same for every text, without its words")
    except WorkError as error:
        raise WorkError(f"adapter {adapter.source!r}: {error}; mend the template, or delete it") from None


def _warn(adapter: PeftAdapter, backbone: Backbone, settings: Mapping[str, Any], examples: int) -> None:
    """Say what of an imported adapter may surprise."""
    if examples < FEW:
        warn(f"examples: got {examples}; about 50 texts of the task are recommended for routing")
    idle = sorted(name for name, value in settings.items() if name not in OVERRULED and value not in (None, False))
    if idle:
        warn(f"generation_config.json: {some_of(idle)}: not applied; prediction options set how text is decoded")
    if unread := unread_vocabulary(adapter.folder):
        warn(f"{unread}: not compared with the backbone's vocabulary; a tokenizer.json beside the adapter is")
    made_for, here = adapter.config.get("base_model_name_or_path"), HUB_NAMES.get(backbone.name, backbone.name)
    if isinstance(made_for, str) and made_for != here and all(map(HUB_NAME.fullmatch, (made_for, here))):
        warn(f"adapter {adapter.source!r}: was trained on {made_for!r}, and answers here with {here!r}")


def _origin(
    model: AdaptedModel, adapter: PeftAdapter, name: str, rows: Sequence[Row], labels: Sequence[str] | None
) -> str:
    about = {key: value for key, value in model.about.items() if key not in ("backbone", *WHEN_KNOWN)}
    about |= {"adapter": adapter.digest, "labels": labels, "rows": len(rows)}
    return origin_of(name, about, ([row.text, row.instruction] for row in rows))


# Values


def values_of(adapter: PeftAdapter, backbone: Backbone) -> dict[str, tuple[Tensor, Tensor]]:
    """The adapter's increments by the backbone's modules: (lora_a [1, r, I], lora_b [1, r, O]) float32, with lora_b
    already scaled.

    Raises:
        InputError: the backbone has no such module, or one of other widths.
    """
    names = modules_of(adapter, backbone)
    fused = _fused(backbone)
    widths = backbone.widths([name for name in names.values() if name not in fused])
    for name, parts in fused.items():
        own = backbone.widths(list(parts))
        widths[name] = next(iter(own.values()))[0], sum(features_out for _, features_out in own.values())
    values = {}
    for module, name in names.items():
        lora_a, lora_b = (as_float32(half) for half in adapter.lora[module])
        for key, found, wanted in (
            ("lora_A", lora_a.shape, (lora_a.shape[0], widths[name][0])),
            ("lora_B", lora_b.shape, (widths[name][1], lora_a.shape[0])),
        ):
            if tuple(found) != wanted:
                raise InputError(
                    f"adapter {adapter.source!r}: {module}.{key}: expected {list(wanted)} for this backbone, got "
                    f"{list(found)}; {adapter.made_for}"
                )
        lora_b = (lora_b * adapter.scaling(module)).T
        if name not in fused:
            values[name] = lora_a[None], lora_b[None].contiguous()
            continue
        for part, rows in _rows_of_parts(adapter, name, fused[name], lora_b).items():
            if rows:  # all parts share lora_a; each keeps its own rows
                values[part] = lora_a[rows][None], lora_b[rows][:, fused[name][part]][None].contiguous()
    return dict(sorted(values.items()))


def _rows_of_parts(
    adapter: PeftAdapter, module: str, parts: Mapping[str, slice], lora_b: Tensor
) -> dict[str, list[int]]:
    """The rows of lora_a that each layer of a fused module keeps: those that affect its output features of lora_b
    [r, O], and those that were its own before an export of ours. Without such an export and with lora_b = 0, all."""
    rank, own = len(lora_b), dict[str, range]()
    counts = adapter.own.get("ranks", {}).get(module, {})
    if sum(counts.values()) == rank:  # else PEFT has changed the rank since
        ends = list(accumulate(counts.get(part, 0) for part in parts))
        own = {part: range(end - counts.get(part, 0), end) for part, end in zip(parts, ends, strict=True)}
    if not own and not lora_b.any():
        return {part: list(range(rank)) for part in parts}
    used = {part: lora_b[:, features].any(1).nonzero()[:, 0].tolist() for part, features in parts.items()}
    return {part: sorted({*rows, *own.get(part, ())}) for part, rows in used.items()}


def _fused(backbone: Backbone) -> dict[str, dict[str, slice]]:
    """Modules that hold several layers side by side, with the names and output features of these layers."""
    return {module: parts for module, parts in backbone.parts(sorted(backbone.adaptable)).items() if parts}


def modules_of(adapter: PeftAdapter, backbone: Backbone) -> dict[str, str]:
    """The backbone's name for each module of an adapter. PEFT's names may have the prefix of the class that was trained
    (`bert.`), or lack one of the backbone's (`model.`)."""
    known = {name.partition("[")[0] for name in backbone.adaptable}  # for layers side by side, their module
    found: dict[str, str] = {}
    for module in adapter.lora:
        names = [module] if module in known else []
        names = names or [n for n in known if n.endswith(f".{module}") or module.endswith(f".{n}")]
        if len(names) != 1:
            what = "no such layer" if not names else f"several such layers ({some_of(sorted(names), 3)})"
            if not names and _has_module(backbone, module):
                raise InputError(
                    f"adapter {adapter.source!r}: {module}: increments of a layer that stays as it is here (output "
                    "layer, embeddings, a head or another module); train the adapter on the linear layers of the blocks"
                )
            raise InputError(f"adapter {adapter.source!r}: {module}: the backbone has {what}; {adapter.made_for}")
        found[module] = names[0]
    if (twice := repeated(found.values())) is not None:
        raise InputError(f"adapter {adapter.source!r}: {twice}: two modules of the adapter mean it")
    return found


def _has_module(backbone: Backbone, module: str) -> bool:
    """Whether the backbone, or its class for sequence classification, has a module."""
    known = class_of(backbone)
    names = [name for name, _ in backbone.model.named_modules() if name]
    names += [] if known is None else [name for name in (known.out, known.dense) if name]
    return any(module == name or f".{module}".endswith(f".{name}") for name in names)


def _labels(adapter: PeftAdapter, count: int, given: Sequence[str] | None) -> tuple[str, ...]:
    own = adapter.own.get("labels")
    names = given or own or labels_of(adapter.folder, count) or [f"LABEL_{i}" for i in range(count)]
    if len(names) != count:
        raise InputError(f"labels: expected {count} words, as the adapter's head has, got {len(names)}")
    try:
        names = [check_label(name) for name in names]
    except WorkError as error:
        raise InputError(f"adapter {adapter.source!r}: {error}; name the labels with labels= (--labels)") from None
    if (twice := repeated(names)) is not None:
        raise InputError(f"labels: {twice!r} is listed twice")
    return tuple(names)
