"""One task as one safetensors file, read whole, or mapped so that what is seldom needed is read when it is."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from slm_fast.errors import WorkError, lacks_memory, one_line
from slm_fast.fields import Unfit, read_json
from slm_fast.schema import about_task, check_task, task_of
from slm_fast.task_tensors import modules_of
from slm_fast.tasks import LearnedTask, ValuesShape, shape_of

# What answering needs not: a scatter counts in the sum of all, and the sample says how far a row is.
LATER = ("factor", "exponent", "diagonal", "scatter", "sample")
DTYPES = {"F32": torch.float32, "I8": torch.int8}


def task_to_bytes(task: LearnedTask) -> bytes:
    """A task as one safetensors file: the same task always gives the same bytes."""
    tensors = dict(task.router)
    for module, (lora_a, lora_b) in task.values.items():
        tensors[f"values.{module}.lora_a"] = lora_a
        tensors[f"values.{module}.lora_b"] = lora_b
    if task.head is not None:
        tensors["head.weight"], tensors["head.bias"] = task.head
    if task.dense is not None:
        tensors["head.dense.weight"], tensors["head.dense.bias"] = task.dense
    about = {"labels": task.labels and list(task.labels), "name": task.name, "options": dict(task.options)}
    if task.origin is not None:
        about["origin"] = task.origin
    if task.adapter is not None:
        about["adapter"] = asdict(task.adapter)
    # One entry: with several, safetensors writes them in an order that changes from run to run.
    metadata = {"slm_fast": json.dumps(about, sort_keys=True, ensure_ascii=False)}
    return safetensors.torch.save({key: t.cpu().contiguous() for key, t in sorted(tensors.items())}, metadata)


def digest_of(task: LearnedTask) -> str:
    """SHA-256 of a task's file, which names it."""
    return hashlib.sha256(task_to_bytes(task)).hexdigest()


def task_from_file(path: Path, digest: str) -> LearnedTask:
    """Read a task back. Raises WorkError when the file is missing, cut short, or not what the manifest says."""
    return task_from_bytes(read_file(path, digest), path)


def read_file(path: Path, digest: str) -> bytes:
    """The bytes of a task's file, if they are those that the manifest means."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WorkError(f"{path}: cannot be read: {error.strerror}") from None
    check_digest(data, digest, path)
    return data


def check_digest(data: bytes, digest: str, path: Path | str) -> None:
    """Raise WorkError unless these are the bytes of the task's file that the manifest means."""
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise _damaged(path, found, digest)


def _damaged(path: Path | str, found: str, digest: str) -> WorkError:
    return WorkError(f"{path}: damaged: SHA-256 is {found[:12]}..., the manifest says {digest[:12]}...")


def task_from_bytes(data: bytes, path: Path) -> LearnedTask:
    """The task that a file's bytes hold. Raises WorkError, naming the file, when they do not hold one."""
    try:
        tensors = safetensors.torch.load(data)
        header = read_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = (header.get("__metadata__") or {}).get("slm_fast")
    except Exception as error:  # what the library raises for a header that lies depends on the lie
        if lacks_memory(error):
            raise
        raise WorkError(f"{path}: not a task file: {one_line(error)}") from None
    return check_task(metadata, tensors, path)


# Mapped


class Digests(NamedTuple):
    """SHA-256 of what is read of a task's file at a time.

    opening: its header and all tensors but those of `LATER`. start: neither those nor values.
    """

    opening: str
    start: str


def digests_of(data: bytes | memoryview) -> Digests:
    """Raises ValueError or KeyError for what is no task's file."""
    data = memoryview(data)
    header, begin = _header(data)
    return Digests(_digest(data, header, begin), _digest(data, header, begin, values=False))


def _header(data: memoryview) -> tuple[dict[str, Any], int]:
    """The header of a file that was checked when it was written or read whole, and where its tensors begin."""
    begin = 8 + int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(bytes(data[8:begin]))
    return header, begin


def _digest(data: memoryview, header: Mapping[str, Any], begin: int, *, values: bool = True) -> str:
    digest, at = hashlib.sha256(), 0
    left_out = [name for name in header if name in LATER or (name.startswith("values.") and not values)]
    for first, last in sorted(header[name]["data_offsets"] for name in left_out):
        digest.update(data[at : begin + first])
        at = begin + last
    digest.update(data[at:])
    return digest.hexdigest()


def map_task(path: Path, digest: str, opening: str, start: str | None = None) -> tuple[LearnedTask, Digests] | None:
    """A task whose file was read whole and checked before, if what is read of it now has the SHA-256 `start`, or where
    that is not known `opening` (`Digests`); and both of these.

    Its tensors are views of the file, which the kernel reads when they are used and may let go of. With `start` values
    are compared with `opening` when one of them is used first. Those of `LATER` are not looked at: the first use of one
    of them compares the whole file with `digest`, checks it, and raises WorkError as `task_from_file` does. None where
    the file cannot be mapped, or is another: reading it whole says what is wrong.
    """
    try:
        whole = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        data = memoryview(whole.numpy().data)
        header, begin = _header(data)
        found = _digest(data, header, begin, values=False)
        if found != start and (start is not None or _digest(data, header, begin) != opening):
            return None
        about = about_task((header.get("__metadata__") or {}).get("slm_fast"))
        tensors = {name: place for name, place in header.items() if name != "__metadata__"}
        others = {
            name: _view(whole[begin:], place) for name, place in tensors.items() if not name.startswith("values.")
        }
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, Unfit):  # of a header that lies
        return None

    def check_whole() -> None:
        found = hashlib.sha256(data).hexdigest()
        if found != digest:
            raise _damaged(path, found, digest)
        task_from_bytes(bytes(data), path)

    def check_values() -> None:
        if _digest(data, *_header(data)) != opening:  # parsed again: kept, headers of many tasks would take much memory
            raise _damaged(path, hashlib.sha256(data).hexdigest(), digest)

    task = task_of(about, others)
    places = {name: place for name, place in tensors.items() if name not in others}
    first = begin + min(place["data_offsets"][0] for place in places.values())
    values = _Values(whole[first:], places, first - begin, None if start is None else check_values)
    task = replace(task, values=values, router=_Part(task.router, check_whole))
    vars(task)["shape"] = values.shape
    return task, Digests(opening, found)


def _view(data: Tensor, place: Mapping[str, Any]) -> Tensor:
    """A tensor of a file, by its entry in the header."""
    first, last = place["data_offsets"]
    return data[first:last].view(DTYPES[place["dtype"]]).view(place["shape"])


class _Values(Mapping[str, tuple[Tensor, Tensor]]):
    """Values by module, checked before the first use of one of them. Views are made when they are asked for, and tasks
    that are laid out alike share what says where they are: of many tasks both would take more memory than the rest."""

    def __init__(self, data: Tensor, places: Mapping[str, Any], begin: int, check: Callable[[], None] | None) -> None:
        self._data, self._check = data, check
        self._layout, self.shape = _layout(
            tuple(
                (module, place["dtype"], tuple(place["shape"]), *(at - begin for at in place["data_offsets"]))
                for module in modules_of(places)
                for half in ("lora_a", "lora_b")
                for place in [places[f"values.{module}.{half}"]]
            )
        )

    def __getitem__(self, module: str) -> tuple[Tensor, Tensor]:
        if self._check is not None:
            self._check()
            self._check = None
        lora_a, lora_b = (_view(self._data, place) for place in self._layout[module])
        return lora_a, lora_b

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)

    def __len__(self) -> int:
        return len(self._layout)


@functools.lru_cache(maxsize=64)
def _layout(places: tuple[tuple[Any, ...], ...]) -> tuple[dict[str, list[dict[str, Any]]], ValuesShape]:
    found: dict[str, list[dict[str, Any]]] = {}
    for module, dtype, shape, first, last in places:
        found.setdefault(module, []).append({"dtype": dtype, "shape": shape, "data_offsets": (first, last)})
    return found, shape_of({module: [place["shape"] for place in pair] for module, pair in found.items()})


class _Part(Mapping[str, Tensor]):
    """A task's part of the router, whose tensors of `LATER` are checked before the first use of one of them."""

    def __init__(self, tensors: Mapping[str, Tensor], check_whole: Callable[[], None]) -> None:
        self._tensors, self._check_whole, self._checked = tensors, check_whole, False

    def __getitem__(self, name: str) -> Tensor:
        if name in LATER and name in self._tensors and not self._checked:
            self._check_whole()
            self._checked = True
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
