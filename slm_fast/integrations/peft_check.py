"""An imported task compared with PEFT itself: same adapter, same backbone, same tokens."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slm_fast.backbone import Backbone
from slm_fast.data import Row
from slm_fast.errors import InputError, WorkError, one_line
from slm_fast.heads import Heads
from slm_fast.integrations.peft_files import PeftAdapter
from slm_fast.integrations.peft_heads import unsaved
from slm_fast.model import AdaptedModel
from slm_fast.ops import Route
from slm_fast.query import TrunkQuery
from slm_fast.reading import prompt_of
from slm_fast.tasks import LearnedTask
from slm_fast.tokenization import Encoded

TOLERANCE = 1e-4  # in float32


@torch.no_grad()
def difference(model: AdaptedModel, task: LearnedTask, adapter: PeftAdapter, rows: Sequence[Row]) -> float:
    """The largest difference of any logit between this task and the adapter in PEFT, with rows run one by one.

    A generating backbone is compared on all tokens of its prompt (T5: on the first of its answer), a head on its
    labels. A row on which they differ by more than 1e-4 is compared again with PEFT in float64: float32 rounds some
    rows far more than others, in PEFT as here.

    Raises:
        InputError: PEFT is not installed, or cannot load the adapter.
        WorkError: the difference exceeds 1e-4.
    """
    if model.backbone.dtype != torch.float32:
        word = str(model.backbone.dtype).removeprefix("torch.")
        raise InputError(f"check: compares in float32, and the backbone is in {word}; check with dtype='float32'")
    theirs = _in_peft(model, task, adapter)
    largest = 0.0
    for row in rows:
        inputs = _inputs(model, task, row)
        ours, other = _our_logits(model, task, inputs), _their_logits(theirs, task, adapter, inputs)
        apart = _apart(ours, other)
        if not apart <= TOLERANCE:
            apart = _apart(ours, _their_logits(theirs.double(), task, adapter, inputs))
            theirs.float()
        if not apart <= TOLERANCE:
            raise WorkError(
                f"adapter {adapter.source!r}: differs from PEFT by {apart:.1e}, expected at most {TOLERANCE:g} (in "
                "float32); no task was added"
            )
        largest = max(largest, apart)
    return largest


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


def _in_peft(model: AdaptedModel, task: LearnedTask, adapter: PeftAdapter) -> Any:
    try:
        import peft
    except ImportError:
        raise InputError("check: needs PEFT; pip install 'slm-fast[peft]'") from None
    own_head = "pooling" in adapter.own
    base = twin(model.backbone, None if task.head is None or own_head else len(task.head[0]))
    base.load_state_dict(unsaved(adapter, model.backbone), strict=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns about fields that it does not know
            return peft.PeftModel.from_pretrained(base, str(adapter.folder)).eval()
    except Exception as error:  # whatever PEFT raises for an adapter that it cannot load
        raise InputError(f"adapter {adapter.source!r}: PEFT cannot load it: {one_line(error)}") from None


def twin(backbone: Backbone, labels: int | None = None) -> Any:
    """A new transformers model with a backbone's weights; with `labels`, of its sequence classification class, with a
    new head.

    Raises:
        InputError: the weights cannot be copied (they are quantised), or transformers has no such class.
    """
    import transformers

    config = copy.deepcopy(backbone.model.config)
    if labels is None:
        model: Any = type(backbone.model)(config)
    else:
        config.num_labels, config.pad_token_id = labels, backbone.tokenizer.pad_token_id
        try:
            model = transformers.AutoModelForSequenceClassification.from_config(config)
        except ValueError:
            raise InputError(
                f"check: transformers has no sequence classification class for {config.model_type} models; import the "
                "adapter without it"
            ) from None
    inner = model.base_model if backbone.kind == "encoder" else model
    if backbone.pooler is not None and getattr(inner, "pooler", None) is not None:
        inner.pooler.load_state_dict(backbone.pooler.state_dict())
    try:
        lost = inner.load_state_dict(backbone.model.state_dict(), strict=False).missing_keys
    except RuntimeError as error:
        raise InputError(f"backbone: its weights cannot be copied: {one_line(error)}") from None
    if any(not re.match(r"(pooler|classifier|score)\.", name) for name in lost):
        raise InputError(f"backbone: its weights cannot be copied: no {lost[0]}")
    return model.to(device=backbone.device, dtype=backbone.dtype).eval().requires_grad_(False)


def _inputs(model: AdaptedModel, task: LearnedTask, row: Row) -> dict[str, Tensor]:
    backbone, limit = model.backbone, model.config.max_length or 0
    assert task.adapter is not None
    ids, _ = prompt_of(row, task.adapter, backbone.tokenization, limit)
    encoded = backbone.tokenization.collate([ids]).to(backbone.device)
    inputs = {"input_ids": encoded.input_ids, "attention_mask": encoded.attention_mask}
    if backbone.kind == "seq2seq":
        inputs["decoder_input_ids"] = torch.full((1, 1), backbone.start_token, device=backbone.device)
    return inputs


def _our_logits(model: AdaptedModel, task: LearnedTask, inputs: dict[str, Tensor]) -> Tensor:
    device, dtype = model.backbone.device, model.backbone.dtype
    model.carry([task])
    values = {name: (a.to(device, dtype), b.to(device, dtype)) for name, (a, b) in task.values.items()}
    route = Route(torch.zeros(1, 1, dtype=torch.int64, device=device), torch.ones(1, 1, device=device))
    mask = inputs["attention_mask"]
    if task.head is None:
        out, _, _ = model.call(lambda: model.backbone.model(**inputs), mask, route, values=values)
        logits: Tensor = out.logits
        return logits
    hidden = model.forward(Encoded(inputs["input_ids"], mask), route, values=values).hidden
    heads, winner = Heads.of([task], device), torch.zeros(1, dtype=torch.int64, device=device)
    features = heads.features(TrunkQuery.pool(hidden, mask), hidden, mask, winner)
    return features @ heads.weight.T + heads.bias


def _their_logits(theirs: Any, task: LearnedTask, adapter: PeftAdapter, inputs: dict[str, Tensor]) -> Tensor:
    if "pooling" not in adapter.own:
        logits: Tensor = theirs(**inputs).logits
        return logits
    assert task.head is not None
    hidden = theirs(**inputs, output_hidden_states=True).hidden_states[-1]
    pooled = {"mean": hidden.float().mean(1), "first": hidden[:, 0].float(), "last": hidden[:, -1].float()}
    weight, bias = (half.to(hidden.device) for half in task.head)
    return pooled[adapter.own["pooling"]] @ weight.T + bias
