"""The model card of a store: its tasks, their accuracy, and how to use them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from slm_fast.errors import some_of
from slm_fast.tasks import LearnedTask

HUB_NAMES = {  # of packaged backbones
    "minilm": "sentence-transformers/all-MiniLM-L6-v2",
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
LISTED = 8  # maximum number of labels listed per task
CARD = """---
{head}
---

# {title}

{count} of [slm_fast](https://arxiv.org/abs/2404.07470): LoRA adapters on one frozen language model, and a router that
finds the right ones for each input by what it says. No adapter name in the request, no task ID.

{table}

## How to use

```python
from slm_fast import ScalableLM

slm = ScalableLM.from_pretrained({where}{backbone_option})
for answer in slm.predict([{sample}]):
    print(answer.task, answer.{field}, answer.score)
```

`slm-fast merge my-store {where_cli}` copies the tasks into a store of yours that has the same backbone and
configuration (`--task NAME` copies one of them). `slm.export_adapter(name, folder)` writes a task as an adapter that
PEFT loads.

## What it is made of

- Backbone: {backbone}, which is not in here; fingerprint `{fingerprint}`
- Configuration: {config}
"""
SHOWN = ("query", "router", "k", "route_on", "max_length")  # configuration fields on the card


def base_model_of(about: Mapping[str, Any], base_model: str | None = None) -> str | None:
    """The backbone's hub name: `base_model`, else its own name. None if that is a path or empty."""
    name = base_model or HUB_NAMES.get(about["backbone"], about["backbone"])
    return name if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) else None


def model_card(
    about: Mapping[str, Any],
    tasks: Sequence[LearnedTask],
    *,
    accuracy: Mapping[str, float] | None = None,
    base_model: str | None = None,
    repo_id: str | None = None,
) -> str:
    """The README.md of a store: the hub's YAML header and Markdown. It depends on the tasks alone, not on their
    history.

    Args:
        about: what the tasks have in common (`Store.about`).
        accuracy: accuracies by task, as measured by `evaluate`. May include other tasks.
        base_model: the backbone's hub name, if it has one.
        repo_id: hub repository that the card is for.
    """
    heads = [task.head is not None for task in tasks]
    base, writes = base_model, not any(heads)
    head: dict[str, Any] = {"library_name": "slm-fast"}
    if base is not None:
        head |= {"base_model": base, "base_model_relation": "adapter"}
    head["pipeline_tag"] = "text-generation" if writes else "text-classification"
    head["tags"] = ["slm-fast", "lora", "continual-learning"]
    names = [task.name for task in tasks]
    config = {field: about["config"][field] for field in SHOWN}
    return CARD.format(
        head="\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items()),  # JSON is YAML
        title=escaped(repo_id or some_of(names, 3)),
        count="1 task" if len(tasks) == 1 else f"{len(tasks)} tasks",
        table=_table(tasks, accuracy or {}),
        where=json.dumps(repo_id or "path of this folder"),
        where_cli=repo_id or "FOLDER",
        backbone_option="" if base is not None else ', backbone="where the backbone is"',
        sample='"..."' if not writes else '{"instruction": "...", "input": "..."}',
        field="text" if writes else "label" if all(heads) else "label or answer.text",
        backbone=f"[{base}](https://huggingface.co/{base})" if base else f"`{about['backbone'] or 'without a name'}`",
        fingerprint=about["fingerprint"],
        config=", ".join(f"`{field}={value!r}`" for field, value in config.items()),
    )


def _table(tasks: Sequence[LearnedTask], accuracy: Mapping[str, float]) -> str:
    rows = [["task", "answers", "rows", "rank", *(["accuracy"] if accuracy else [])]]
    for task in tasks:
        labels = [escaped(label) for label in task.labels or ()]
        many = f"{len(labels):,} labels: " if len(labels) > LISTED else ""
        answers = "free text" if task.labels is None else many + some_of(labels, LISTED)
        measured = f"{accuracy[task.name]:.3f}" if task.name in accuracy else ""
        rows.append([escaped(task.name), answers, rows_of(task), str(task.rank), *([measured] if accuracy else [])])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def rows_of(task: LearnedTask) -> str:
    """The number of rows a task was learned from (examples, for an imported task); empty if it does not say."""
    count = task.router.get("count")
    rows = task.options.get("rows") if count is None else int(count.sum())  # the dtkr router counts none
    if type(rows) is not int:
        return ""
    return f"{rows:,}{' examples (imported)' if task.adapter is not None else ''}"


def escaped(text: str) -> str:
    """Escape a text for Markdown, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(text.split()))
