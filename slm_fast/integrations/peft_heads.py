"""Sequence classification heads as in transformers' classes: reading that of an adapter, writing that of a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slm_fast.backbone import Backbone
from slm_fast.errors import InputError, memory_for, some_of
from slm_fast.heads import ACTIVATE, EPSILON
from slm_fast.integrations.peft_files import OWN, PeftAdapter, as_float32
from slm_fast.loading import GGUF, loading, resolve
from slm_fast.tasks import LearnedTask

Layer = tuple[Tensor, Tensor]  # weight [O, I], bias [O]


@dataclass(frozen=True)
class HeadClass:
    """How a family's class turns the last hidden states into logits: pooling, a dense layer, an activation, a norm and
    the last layer. Dropout is off.

    Attributes:
        out, dense, norm: modules of the class.
        saved: PEFT's modules_to_save for them.
        pooling, activation: as in `slm_fast.tasks.Adapter`, or names of the configuration's fields for them.
        unbiased: modules that may have no bias.
    """

    out: str
    dense: str | None = None
    norm: str | None = None
    saved: tuple[str, ...] = ("classifier",)
    pooling: str = "first"
    activation: str = "tanh"
    unbiased: tuple[str, ...] = ()


ROBERTA = HeadClass("classifier.out_proj", "classifier.dense")
CLASSES = {
    "bert": HeadClass("classifier", "bert.pooler.dense", saved=("classifier", "pooler")),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert", "mpnet"), ROBERTA),
    "electra": HeadClass("classifier.out_proj", "classifier.dense", activation="gelu"),
    "distilbert": HeadClass("classifier", "pre_classifier", saved=("classifier", "pre_classifier"), activation="relu"),
    "deberta-v2": HeadClass(
        "classifier", "pooler.dense", saved=("classifier", "pooler"), activation="pooler_hidden_act"
    ),
    "modernbert": HeadClass(
        *("classifier", "head.dense", "head.norm", ("classifier", "head")),
        *("classifier_pooling", "classifier_activation", ("head.dense", "head.norm")),
    ),
}
CAUSAL = HeadClass("score", saved=("score",), pooling="last", unbiased=("score",))


@dataclass(frozen=True)
class Head:
    """A task's head: pooled states, dense (weight [H, H], bias [H]), activation, norm (weight [H], bias [H]), top
    (weight [C, H], bias [C])."""

    top: Layer
    dense: Layer | None
    pooling: str
    activation: str = "tanh"
    norm: Layer | None = None

    def folded(self) -> Head:
        """The head with the norm's weights folded into the top."""
        if self.norm is None:
            return self
        (weight, bias), (scale, shift) = self.top, self.norm
        return Head((weight * scale, bias + weight @ shift), self.dense, self.pooling, f"{self.activation}_norm")


def class_of(backbone: Backbone) -> HeadClass | None:
    """The head class of a backbone's family; None if it is not known."""
    return CAUSAL if backbone.kind == "causal" else CLASSES.get(backbone.model.config.model_type)


def head_of(adapter: PeftAdapter, backbone: Backbone) -> Head | None:
    """An adapter's head; None if it has none. Layers of its class that it lacks come from the backbone's checkpoint.

    Raises:
        InputError: its head is not supported, or it has none and the backbone can answer with nothing else.
    """
    saved, model_type = {**adapter.saved, **unsaved(adapter, backbone)}, backbone.model.config.model_type
    known, head, where = class_of(backbone), None, f"adapter {adapter.source!r}"
    if "pooling" in adapter.own:  # an export of ours
        pooling = adapter.own["pooling"]
        if pooling not in ("mean", "first", "last"):
            raise InputError(f"{where}: {OWN}: pooling: expected mean, first or last, got {pooling!r}")
        top = _taken(saved, "head", backbone)
        head = None if top is None else Head(top, None, pooling)
    elif known is not None:
        head = _as_class(saved, known, backbone, where)
    if saved:
        raise InputError(
            f"{where}: modules_to_save: {some_of(sorted(saved), 3)}: not known as part of a head that {model_type} "
            "models answer with; train the adapter without"
        )
    if head is not None:
        _check(head, backbone, adapter, where)
        head = head.folded()
    elif backbone.kind == "encoder":
        raise InputError(f"{where}: has no head, and an encoder-only backbone answers with labels; train it as SEQ_CLS")
    elif adapter.config.get("task_type") == "SEQ_CLS":
        train = "train it as SEQ_2_SEQ_LM" if known is None else f"save it with modules_to_save: {known.out}"
        raise InputError(
            f"{where}: task_type SEQ_CLS: has no head, and {model_type} models write text without; {train}"
        )
    return head


def unsaved(adapter: PeftAdapter, backbone: Backbone) -> dict[str, Tensor]:
    """Layers of the head's class that the adapter lacks, from the backbone's checkpoint.

    Raises:
        InputError: the checkpoint does not have them.
    """
    known, found = class_of(backbone), dict[str, Tensor]()
    if known is None or "pooling" in adapter.own or not _names(known.out, backbone) & adapter.saved.keys():
        return found
    for name in filter(None, (known.dense, known.norm)):
        own = {own.removesuffix("weight") for own in _names(name, backbone)}
        if any(key.startswith(tuple(own)) for key in adapter.saved):
            continue
        parts = _pooler(backbone)
        if f"{name}.weight" not in parts:
            parts = _class_parts(backbone)
        found |= {key: tensor for key, tensor in parts.items() if key.rpartition(".")[0] == name}
        if f"{name}.weight" not in found:
            raise InputError(
                f"adapter {adapter.source!r}: its head reads {name}, which it was saved without, and the backbone's "
                f"checkpoint has none; train it with modules_to_save: {', '.join(known.saved)}"
            )
    return found


def _pooler(backbone: Backbone) -> dict[str, Tensor]:
    """Parameters of the backbone's pooler, which the backbone itself does not use, by their names in the class."""
    prefix = f"{backbone.model.base_model_prefix}.pooler."
    state = {} if backbone.pooler is None else backbone.pooler.state_dict()
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def _class_parts(backbone: Backbone) -> dict[str, Tensor]:
    """Parameters of the class that the backbone's checkpoint has, by name."""
    if not backbone.name or backbone.name.endswith(GGUF):
        return {}
    import transformers

    path = resolve(backbone.name)
    try:
        with loading(), memory_for(path):
            model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                path, output_loading_info=True
            )
    except (OSError, ValueError):  # the checkpoint is gone, or the backbone was given as a model
        return {}
    drawn = set(info["missing_keys"])  # randomly initialised
    return {name: tensor for name, tensor in model.state_dict().items() if name not in drawn}


def _as_class(saved: dict[str, Tensor], known: HeadClass, backbone: Backbone, where: str) -> Head | None:
    """The head among the saved tensors, which are removed from `saved`."""
    top = _taken(saved, known.out, backbone, known)
    if top is None:
        return None
    config = backbone.model.config
    pooling = str(getattr(config, known.pooling, known.pooling))
    activation = str(getattr(config, known.activation, known.activation))
    dense, norm = (module and _taken(saved, module, backbone, known) for module in (known.dense, known.norm))
    if activation not in ACTIVATE:
        words = ", ".join(ACTIVATE)
        raise InputError(f"{where}: {known.activation}: expected one of {words} for its head, got {activation!r}")
    if known.norm is not None and config.norm_eps != EPSILON:
        raise InputError(f"{where}: norm_eps: expected {EPSILON:g} for its head, got {config.norm_eps:g}")
    return Head(top, dense or None, {"cls": "first"}.get(pooling, pooling), activation, norm or None)


def _names(module: str, backbone: Backbone) -> set[str]:
    """Names of a module's weight: in the class, and in the backbone if it belongs to that."""
    return {f"{module}.weight", f"{module.removeprefix(f'{backbone.model.base_model_prefix}.')}.weight"}


def _taken(saved: dict[str, Tensor], module: str, backbone: Backbone, known: HeadClass | None = None) -> Layer | None:
    """A layer, removed from `saved`, with zeros for a bias that its class may lack. None if it is not there."""
    for name in _names(module, backbone) & saved.keys():
        bias = saved.get(name.removesuffix("weight") + "bias")
        if bias is None and (known is None or module not in known.unbiased):
            continue
        weight = as_float32(saved.pop(name)).cpu()
        saved.pop(name.removesuffix("weight") + "bias", None)
        return weight, weight.new_zeros(weight.shape[:1]) if bias is None else as_float32(bias).cpu()
    return None


def _check(head: Head, backbone: Backbone, adapter: PeftAdapter, where: str) -> None:
    width, count = backbone.width, head.top[0].shape[:1]
    layers = ("", head.top, (*count, width)), ("dense.", head.dense, (width, width)), ("norm.", head.norm, (width,))
    for prefix, layer, wanted in layers:
        for name, part, shape in zip(("weight", "bias"), layer or (), (wanted, wanted[:1]), strict=False):
            if tuple(part.shape) != shape:
                raise InputError(
                    f"{where}: its head's {prefix}{name}: expected {list(shape)}, got {list(part.shape)}; "
                    f"{adapter.made_for}"
                )
    if count[0] < 2:
        raise InputError(f"{where}: its head has one output, a regression; expected two labels or more")


@dataclass(frozen=True)
class Written:
    """How a task's head is written.

    Attributes:
        modules: modules of the class that have tensors in `saved`.
        saved: tensors stored with the adapter's.
        beside: tensors stored in a file of their own.
    """

    modules: tuple[str, ...] = ()
    saved: Mapping[str, Tensor] | None = None
    beside: Mapping[str, Tensor] | None = None


def written(task: LearnedTask, backbone: Backbone) -> Written:
    """A task's head in the form of the family's class if possible, else for a file of its own."""
    if task.head is None:
        return Written()
    (weight, bias), known = task.head, class_of(backbone)
    if task.adapter is not None and known is not None:
        saved: dict[str, Any] = {f"{known.out}.weight": weight}
        if known is CAUSAL and task.adapter.pooling == "last" and not bias.any():
            return Written(known.saved, saved)
        if known.dense is not None and task.dense is not None and task.adapter.pooling != "last":
            saved |= {f"{known.out}.bias": bias, f"{known.dense}.weight": task.dense[0]}
            if task.dense[1].any() or getattr(backbone.model.config, "classifier_bias", True):
                saved[f"{known.dense}.bias"] = task.dense[1]
            if known.norm is not None:
                saved[f"{known.norm}.weight"] = torch.ones(len(task.dense[1]))
                if backbone.model.config.norm_bias:
                    saved[f"{known.norm}.bias"] = torch.zeros(len(task.dense[1]))
            return Written(known.saved, saved)
    return Written(beside={"head.weight": weight, "head.bias": bias})
