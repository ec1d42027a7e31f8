"""A task as a PEFT adapter: exact for one slot; several slots are concatenated with fixed weights."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from slm_fast.backbone import Backbone
from slm_fast.card import base_model_of
from slm_fast.errors import InputError, WorkError, some_of
from slm_fast.integrations.peft_files import CONFIG, OWN, OWN_HEAD, PREFIX, WEIGHTS
from slm_fast.integrations.peft_heads import Written, written
from slm_fast.loading import GGUF, PACKAGED
from slm_fast.model import AdaptedModel
from slm_fast.tasks import LearnedTask

README = """---
library_name: peft{base_model}
---

# {name}

A LoRA adapter that slm_fast exported.

```python
from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained({base!r}{more})
model = PeftModel.from_pretrained(base, "path of this folder")
```
{notes}
PEFT applies the adapter to every input: routing, and distances of rows from the task, are not exported.
"""
BESIDE = """
The head is not one of a transformers class: it reads the mean of the last hidden states over real tokens. It is
saved in `{head}` as `head.weight` [C, H] and `head.bias` [C], and its labels in `{own}`.
`logits = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True) @ weight.T + bias`
"""
JOINED = """
An instruction and its input are one text, joined by a line break.
"""
SEPARATED = f"""{JOINED}
The task was learned on prompts that end in a line break: `tokenizer(text)["input_ids"]`, then the tokens of "\\n".
"""

CHATTED = """
The task was learned on prompts in the chat template of `chat_template.jinja`: the text as a user's turn, an instruction
as the system's, and the beginning of the assistant's.
"""
PROMPTS = {"plain": JOINED, "separator": SEPARATED, "chat": CHATTED}

QUANTISED = """
The task was learned on quantised weights: the file `{file}` of the Python package `{package}`.
Those of `{base}` are not quantised, so the outputs differ from those of slm_fast.
For the same outputs, load that file as the base:
`{auto_class}.from_pretrained("folder of the file", gguf_file={file!r})`
"""


def export_task(model: AdaptedModel, name: str, folder: str | Path, *, weights: Sequence[float] | None = None) -> None:
    """Export a task as an adapter with which PEFT gives the same outputs on the same backbone.

    Args:
        folder: folder to create; it must be empty or not exist.
        weights: weights of the task's slots, if it has several: at least 0, with a sum of 1. Here they depend on the
            input; in the adapter they are fixed.

    Raises:
        InputError: there is no such task, the folder is not empty, or the weights do not fit the slots.
        WorkError: the adapter cannot be written.
    """
    if name not in model.pool.place:
        raise InputError(f"task {name!r}: not learned; tasks: {some_of(model.pool.names)}")
    if not str(folder):
        raise InputError("folder: empty path; name a folder that is empty or does not exist")
    task, path = model.pool.tasks[model.pool.place[name]], Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: already exists; expected an empty folder, or a path that does not exist")
    backbone, shares = model.backbone, _shares(task, weights)
    head = written(task, backbone)
    prefix = f"{backbone.model.base_model_prefix}." if head.saved and backbone.kind == "encoder" else ""
    tensors = {f"{PREFIX}{key}": tensor for key, tensor in (head.saved or {}).items()}
    ranks = {}
    for module, (lora_a, lora_b) in _by_module(task, shares, backbone).items():
        ranks[module] = len(lora_a)
        tensors[f"{PREFIX}{prefix}{module}.lora_A.weight"] = lora_a
        tensors[f"{PREFIX}{prefix}{module}.lora_B.weight"] = lora_b.T
    own: dict[str, Any] = {"labels": None if task.labels is None else list(task.labels)}
    template = model.config.chat_template or None if task.adapter is None else task.adapter.chat_template
    own["prompt"] = task.adapter.prompt if task.adapter is not None else "plain" if template else "separator"
    if parts := _ranks_of_parts(task, backbone):
        own["ranks"] = parts
    if head.beside:
        own["pooling"] = "mean" if task.adapter is None else task.adapter.pooling
    files: dict[str, bytes] = {
        CONFIG: _json(_config(ranks, head, backbone)),
        WEIGHTS: _safetensors(tensors),
        OWN: _json(own),
        "README.md": _readme(task, head, backbone, PROMPTS["chat" if template else own["prompt"]]).encode(),
    }
    if head.beside:
        files[OWN_HEAD] = _safetensors(head.beside)
    if isinstance(template, str):
        files["chat_template.jinja"] = template.encode()
    settings = dict(task.options.get("generation", {}))
    if task.adapter is not None and task.adapter.ends:
        settings["eos_token_id"] = list(task.adapter.ends)
    if settings:
        files["generation_config.json"] = _json(settings)
    try:
        path.mkdir(parents=True, exist_ok=True)
        for file, data in files.items():
            (path / file).write_bytes(data)
    except OSError as error:
        raise WorkError(f"{path}: cannot be written: {error.strerror}") from None


def _by_module(task: LearnedTask, shares: Tensor, backbone: Backbone) -> dict[str, tuple[Tensor, Tensor]]:
    """lora_a [r, I] and lora_b [r, O] of each module, with its slots stacked. Layers that share a module are stacked,
    too, with zeros at the output features of the others."""
    found = {}
    for module, parts in backbone.parts(sorted(task.values)).items():
        a, b = [], []
        for name in [name for name in parts or (module,) if name in task.values]:
            lora_a, lora_b = task.values[name]
            a.append(lora_a.flatten(0, 1))
            b.append((lora_b * shares[:, None, None]).flatten(0, 1))
            if parts:
                whole = b[-1].new_zeros(len(b[-1]), max(part.stop for part in parts.values()))
                whole[:, parts[name]] = b[-1]
                b[-1] = whole
        found[module] = torch.cat(a), torch.cat(b)
    return found


def _ranks_of_parts(task: LearnedTask, backbone: Backbone) -> dict[str, dict[str, int]]:
    """How many rows of each fused module's lora_a belong to each of its layers, in the order of `_by_module`. Zeros in
    lora_b do not tell, since a layer's own part may be zero, too."""
    parts = backbone.parts(sorted(task.values))
    return {
        module: {name: task.values[name][0].shape[:2].numel() for name in names if name in task.values}
        for module, names in parts.items()
        if names
    }


def _shares(task: LearnedTask, weights: Sequence[float] | None) -> Tensor:
    """The weight of each of the task's slots, [S]. Those of several slots are convex weights, as a router's are."""
    if task.slots == 1:
        if weights is not None:
            raise InputError(f"weights: task {task.name!r} has one slot, which is exported exactly; leave weights out")
        return torch.ones(1)
    if weights is None:
        raise InputError(
            f"task {task.name!r}: its {task.slots} slots are weighted by the input, which an adapter cannot do; give "
            "fixed weights (--weights), such as " + ",".join(["%.9g" % (1 / task.slots)] * task.slots)
        )
    try:
        shares = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        raise InputError(f"weights: expected {task.slots} numbers, got {weights!r}") from None
    if len(shares) != task.slots:
        raise InputError(f"weights: expected {task.slots}, one for each slot of task {task.name!r}, got {len(shares)}")
    if not (all(share >= 0 for share in shares) and abs(sum(shares) - 1) <= 1e-6):
        raise InputError(f"weights: expected numbers of at least 0 with a sum of 1, got {shares}")
    return torch.tensor(shares, dtype=torch.float32)


def _base(backbone: Backbone) -> tuple[str, str]:
    """What transformers loads the backbone from: a folder or hub name, and in it a GGUF file, if it is one."""
    folder, file = os.path.split(backbone.name) if backbone.name.endswith(GGUF) else (backbone.name, "")
    return base_model_of({"backbone": folder}) or folder, file


def _config(ranks: Mapping[str, int], head: Written, backbone: Backbone) -> dict[str, Any]:
    """The content of adapter_config.json. Each module's alpha is its rank, so that nothing is scaled."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: own for module, own in sorted(ranks.items()) if own != rank}
    kinds = {"encoder": "FEATURE_EXTRACTION", "seq2seq": "SEQ_2_SEQ_LM", "causal": "CAUSAL_LM"}
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if head.saved else kinds[backbone.kind],
        "base_model_name_or_path": _base(backbone)[0] or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "modules_to_save": list(head.modules) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": any(hasattr(backbone.model.get_submodule(module), "nf") for module in ranks),  # GPT-2's
        "init_lora_weights": True,
    }


def _readme(task: LearnedTask, head: Written, backbone: Backbone, prompt: str) -> str:
    classifies = bool(head.saved)
    base, gguf = _base(backbone)
    hub_name = base_model_of({"backbone": base})
    notes = BESIDE.format(head=OWN_HEAD, own=OWN) if head.beside else ""
    if backbone.kind != "encoder":
        notes += prompt if backbone.kind == "causal" else JOINED
    packaged, auto_class = PACKAGED.get(backbone.name), backbone.family.auto_class
    if packaged is not None and packaged.weights.endswith(GGUF):
        notes += QUANTISED.format(base=base, file=packaged.weights, package=packaged.package, auto_class=auto_class)
    more = f", gguf_file={gguf!r}" if gguf else ""
    return README.format(
        name=task.name,
        base_model=f"\nbase_model: {hub_name}" if hub_name else "",
        base=base or "path of the backbone",
        auto_class="AutoModelForSequenceClassification" if classifies else auto_class,
        more=more + (f", num_labels={len(task.labels or ())}" if classifies else ""),
        notes=notes,
    )


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    data: bytes = safetensors.torch.save(
        {key: tensor.detach().cpu().contiguous() for key, tensor in sorted(tensors.items())}, {"format": "pt"}
    )
    return data
