"""Random mutations of a store: its manifest, or one task file whose hash in the manifest is updated, so that only
checks of the content can find the change."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

DEEP = "[" * 3000 + "]" * 3000
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, 1e-40, 4.0),
    *("", "x", "trunk", "sentence", "dtkr", "gaussian", "../..", "/", "a\0b", "\ud800", "é", "x" * 5000, "NaN"),
    *([], [0], ["query"], [1, 3], [[[[[[[]]]]]]], {}, {"a": 1}, [None], list(range(2000))),
)
NUMBERS = (float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e20, 1e-45, -1.0, 0.0, 1e9)
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.complex64)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path (keys and indices) of every nested part of a JSON value."""
    found = [path] if path else []
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        found += _places(part, (*path, key))
    return found


def mutate_json(content: Any, rng: random.Random) -> Any:
    """A copy with one to three mutations: parts are removed, renamed, repeated or replaced, or numbers changed."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = _places(content)
        if not places:
            return content
        *parents, last = rng.choice(places)
        place = content
        for key in parents:
            place = place[key]
        how = rng.randrange(5)
        if how == 0:
            del place[last]
        elif how == 1 and isinstance(place, dict):
            place[rng.choice(("x", "", "é", "\ud800", "config", "tasks", "..", str(last) * 2))] = place.pop(last)
        elif how == 2 and isinstance(place, list):
            place += place * rng.choice((1, 500))
        elif how == 3 and type(place[last]) in (int, float) and abs(place[last]) < 1e300:
            place[last] = place[last] * rng.choice((-1, 0, 1e6, 1e-6, 1e300)) + rng.choice((0, 1, -1, 0.5))
        else:
            place[last] = copy.deepcopy(rng.choice(VALUES))
    return content


def _dump(content: Any, rng: random.Random) -> bytes:
    text = json.dumps(content)
    how = rng.randrange(12)
    if how == 0:
        text = text.replace("null", DEEP, 1)
    elif how == 1:
        text = text[: rng.randrange(len(text))]
    elif how == 2:
        text = text.replace("{", '{"format": 1, ', 1)
    elif how == 3:
        place = rng.randrange(len(text))
        text = text[:place] + rng.choice(("\0", "}", "1e999", "NaN", "\ufeff", '"')) + text[place:]
    return text.encode("utf-8", "surrogatepass")


def _mutate_tensor(tensor: Tensor, rng: random.Random) -> Tensor:
    if not tensor.is_floating_point():  # already cast by an earlier mutation
        return tensor
    how = rng.randrange(9)
    tensor = tensor.clone()
    if how <= 2 and tensor.numel():
        flat = tensor.view(-1)
        chosen = [rng.randrange(len(flat)) for _ in range(rng.choice((1, 3, len(flat))))]
        flat[chosen] = rng.choice(NUMBERS)
    elif how == 3:
        return tensor.to(rng.choice(DTYPES))
    elif how == 4 and tensor.dim():
        return tensor.narrow(0, 0, rng.randrange(len(tensor) + 1)).clone()
    elif how == 5:
        return torch.cat([tensor, tensor], rng.randrange(max(1, tensor.dim()))) if tensor.dim() else tensor[None]
    elif how == 6:
        return tensor.unsqueeze(rng.randrange(tensor.dim() + 1)).contiguous()
    elif how == 7:
        return tensor * rng.choice((-1.0, 0.0, 1e10, 1e30, -1e30, 1e-30))
    else:
        return tensor.flatten().flip(0).view(tensor.shape).contiguous()
    return tensor


def mutate_task(data: bytes, rng: random.Random) -> bytes:
    """A task file with mutated metadata, tensors, header or raw bytes."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    how = rng.randrange(10)
    if how == 0:  # random bytes anywhere
        changed = bytearray(data)
        for _ in range(rng.choice((1, 4, 40))):
            changed[rng.randrange(min(len(changed), rng.choice((16, size + 8, len(changed)))))] = rng.randrange(256)
        return bytes(changed)
    if how == 1:  # a header that does not match the data
        text = _dump(mutate_json(header, rng), rng)
        return len(text).to_bytes(8, "little") + text + data[8 + size :]
    metadata = header["__metadata__"]["slm_fast"]
    tensors = safetensors.torch.load(data)
    if how <= 4:
        metadata = _dump(mutate_json(json.loads(metadata), rng), rng).decode("utf-8", "replace")
    for _ in range(rng.choice((1, 1, 2, 5)) if how > 3 else 0):
        name = rng.choice(sorted(tensors))
        if rng.random() < 0.15:
            tensors.pop(name)
        elif rng.random() < 0.15:
            tensors[rng.choice(("x", "values.x.lora_a", "head.weight", "keys", "scatter", "distance"))] = tensors[
                name
            ].clone()
        else:
            tensors[name] = _mutate_tensor(tensors[name], rng)
        if not tensors:
            break
    return safetensors.torch.save(tensors, {"slm_fast": metadata})


def mutate_store(path: Path, rng: random.Random) -> str:
    """Mutate a store on disk. Returns the name of the task whose file was changed, or "" for the manifest."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    if rng.random() < 0.3:
        file.write_bytes(_dump(mutate_json(manifest, rng), rng))
        return ""
    name = rng.choice(sorted(manifest["tasks"]))
    entry = manifest["tasks"][name]
    data = mutate_task((path / entry["file"]).read_bytes(), rng)
    digest = hashlib.sha256(data).hexdigest()
    entry |= {"sha256": digest, "file": f"tasks/{name}/{digest}.safetensors"}
    (path / entry["file"]).write_bytes(data)
    file.write_text(json.dumps(manifest))
    return name
