"""Files of imported tasks: all fields and tensors are checked, including how the task reads its input and answers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stores import A
from torch import Tensor

from slm_fast.errors import WorkError
from slm_fast.schema import check_fits, check_task
from slm_fast.task_file import task_from_bytes, task_to_bytes
from slm_fast.tasks import Adapter, LearnedTask

FILE = Path("task.safetensors")
HIDDEN = 3


def imported(**changes: Any) -> LearnedTask:
    """A task whose modules have different ranks, with a head that includes a dense layer."""
    values = {
        "layer.0.value": (torch.ones(1, 2, 4), torch.ones(1, 2, 3)),
        "other": (torch.ones(1, 9, 5), torch.ones(1, 9, 7)),
    }
    adapter = Adapter(pooling="first", chat_template="{{ x }}", ends=(3, 5))
    dense = torch.ones(HIDDEN, HIDDEN), torch.ones(HIDDEN)
    return dataclasses.replace(A, **{"values": values, "adapter": adapter, "dense": dense, **changes})


def test_an_imported_task_comes_back_from_its_file() -> None:
    task = imported()
    again = task_from_bytes(task_to_bytes(task), FILE)
    assert again.adapter == task.adapter
    assert task_to_bytes(again) == task_to_bytes(task)
    assert again.dense is not None


def test_an_activation_is_written_only_where_it_is_another_than_ever() -> None:
    assert b"activation" not in task_to_bytes(imported())
    task = imported(adapter=Adapter(pooling="first", activation="gelu_norm"))
    assert task_from_bytes(task_to_bytes(task), FILE).adapter == task.adapter


def test_a_learned_tasks_file_says_nothing_of_adapters() -> None:
    assert b"adapter" not in task_to_bytes(A)


def parts() -> tuple[dict[str, Any], dict[str, Tensor]]:
    data = task_to_bytes(imported())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    import safetensors.torch

    return json.loads(header["__metadata__"]["slm_fast"]), safetensors.torch.load(data)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda about, _: about["adapter"].pop("prompt"), "adapter.prompt: missing"),
        (lambda about, _: about["adapter"].update(later=1), "adapter.later: not known"),
        (lambda about, _: about["adapter"].update(pooling="sum"), "adapter.pooling: expected"),
        (lambda about, _: about["adapter"].update(pooling=None), "adapter.pooling: expected one of a head's"),
        (lambda about, _: about["adapter"].update(activation="norm"), "adapter.activation: expected"),
        (lambda about, _: about["adapter"].update(ends=[-1]), "adapter.ends: expected"),
        (lambda about, _: about["adapter"].update(ends=None), "adapter.ends: expected"),
        (lambda about, _: about["adapter"].update(chat_template=""), "adapter.chat_template: expected"),
        (lambda about, _: about.update(adapter=[]), "adapter: expected an object"),
        (lambda about, _: about.pop("adapter"), "head.dense.bias: not known"),
        (lambda _, found: found.pop("head.dense.bias"), "head.dense.bias: missing"),
        (
            lambda _, found: found.update({"head.dense.weight": torch.ones(2, 3)}),
            r"head.dense.weight: expected \[3, 3\]",
        ),
        (lambda _, found: [found.pop("head.weight"), found.pop("head.bias")], "head.dense.weight: goes with a head"),
        (lambda _, found: found.update({"values.other.lora_b": torch.ones(1, 8, 7)}), r"values.other.lora_b: expected"),
        (lambda _, found: found.update({"values.other.lora_a": torch.ones(2, 9, 5)}), r"values.other.lora_a: expected"),
        (lambda _, found: found.update({"values.other.lora_a": torch.ones(9, 5)}), r"values.other.lora_a: expected"),
    ],
)
def test_a_file_whose_parts_do_not_fit_is_refused(change: Callable[[Any, Any], object], said: str) -> None:
    about, tensors = parts()
    change(about, tensors)
    with pytest.raises(WorkError, match=f"task.safetensors: .*{said}"):
        check_task(json.dumps(about), tensors, FILE)


def test_modules_that_the_store_knows_have_to_fit_and_others_may_be_there() -> None:
    layers = {"layer.0.value": (4, 3), "layer.1.query": (4, 3)}
    shapes = {"layers": layers, "hidden": HIDDEN, "query": 4}
    config = {"router": "gaussian", "features": 0}
    check_fits(imported(), shapes, config)
    check_fits(imported(), {**shapes, "hidden": None}, config)  # has its own head, where learned tasks generate
    with pytest.raises(WorkError, match=r"values\.layer\.0\.value\.lora_a: expected \[1, r, 5\]"):
        check_fits(imported(), {**shapes, "layers": {"layer.0.value": (5, 3)}}, config)
    with pytest.raises(WorkError, match=r"values\.layer\.1\.query: missing"):
        check_fits(imported(adapter=None, dense=None), shapes, config)
