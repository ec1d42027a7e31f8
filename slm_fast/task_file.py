"""A task as a safetensors file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from slm_fast.errors import WorkError, lacks_memory, one_line
from slm_fast.fields import read_json
from slm_fast.memory import zeros
from slm_fast.schema import check_task
from slm_fast.tasks import TANH, LearnedTask

SPARE = 16 << 20  # bytes for what reading a file allocates besides its data


class DamagedFile(WorkError):
    """A task's file is missing, or not what the manifest says: reading it again will not help."""


def contents_of(task: LearnedTask) -> tuple[str, dict[str, Tensor]]:
    """The metadata and the tensors of a task's file."""
    tensors = dict(task.router)
    for module, (lora_a, lora_b) in task.values.items():
        tensors[f"values.{module}.lora_a"] = lora_a
        tensors[f"values.{module}.lora_b"] = lora_b
    if task.head is not None:
        tensors["head.weight"], tensors["head.bias"] = task.head
    if task.dense is not None:
        tensors["head.dense.weight"], tensors["head.dense.bias"] = task.dense
    about: dict[str, Any] = {
        "labels": task.labels and list(task.labels),
        "name": task.name,
        "options": dict(task.options),
    }
    if task.origin is not None:
        about["origin"] = task.origin
    if task.adapter is not None:
        adapter = asdict(task.adapter)
        if task.adapter.activation == TANH:  # the default is omitted, as in older files
            del adapter["activation"]
        about["adapter"] = adapter
    return json.dumps(about, sort_keys=True, ensure_ascii=False), tensors


def task_to_bytes(task: LearnedTask) -> bytes:
    """A task as a safetensors file. The same task always gives the same bytes."""
    metadata, tensors = contents_of(task)
    # A single entry: safetensors writes several in an order that varies between runs.
    return safetensors.torch.save(
        {key: t.cpu().contiguous() for key, t in sorted(tensors.items())}, {"slm_fast": metadata}
    )


def digest_of(task: LearnedTask) -> str:
    """SHA-256 of a task's file, which is also its name."""
    return hashlib.sha256(task_to_bytes(task)).hexdigest()


def task_from_file(path: Path, digest: str) -> LearnedTask:
    """Read a task. Raises WorkError if the file is missing, truncated, or not what the manifest says."""
    return task_from_bytes(read_file(path, digest), path)


def read_file(path: Path, digest: str) -> bytes:
    """The bytes of a task's file. Raises WorkError if they are not what the manifest says."""
    try:
        data = path.read_bytes()
    except OSError as error:
        is_lost = isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError))
        raise (DamagedFile if is_lost else WorkError)(f"{path}: cannot be read: {error.strerror}") from None
    check_digest(data, digest, path)
    return data


def check_digest(data: bytes, digest: str, path: Path | str) -> None:
    """Raise WorkError unless these bytes have the digest that the manifest says."""
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise damaged(path, found, digest)


def damaged(path: Path | str, found: str, digest: str) -> DamagedFile:
    return DamagedFile(f"{path}: damaged: SHA-256 is {found[:12]}..., the manifest says {digest[:12]}...")


def tensors_of(data: bytes) -> dict[str, Tensor]:
    """The tensors in a safetensors file's bytes.

    Raises an error of that library for a file that is none, and one that `lacks_memory` knows where memory is short:
    without memory for its copy of the data, the library panics, and may hang in doing so.
    """
    zeros(2 * len(data) + SPARE, device=torch.device("cpu"), dtype=torch.uint8)  # freed at once, never touched
    return dict(safetensors.torch.load(data))


def task_from_bytes(data: bytes, path: Path) -> LearnedTask:
    """The task in a file's bytes. Raises WorkError, naming the file, if there is none."""
    try:
        tensors = tensors_of(data)
        header = read_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = (header.get("__metadata__") or {}).get("slm_fast")
    except Exception as error:  # the library's error depends on how the header is wrong
        if lacks_memory(error):
            raise
        raise WorkError(f"{path}: not a task file: {one_line(error)}") from None
    return check_task(metadata, tensors, path)
