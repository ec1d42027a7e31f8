"""Memory-mapped task files: opening a store of many tasks needs little of each file; the rest is read on use.

That little, the task's `Opening`, consists of the header, the head and the router's small tensors. All tasks' openings
are kept together beside the manifest (`slm_fast.kept_keys`), so that opening a store reads none of their files (of each
file touched the system would map sixteen pages). Most tasks have the same layout, so what their headers have in common
is parsed and held once.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from slm_fast.errors import WorkError
from slm_fast.fields import Unfit
from slm_fast.memory import unmap
from slm_fast.schema import about_task, task_of
from slm_fast.task_file import damaged, task_from_bytes
from slm_fast.task_tensors import modules_of
from slm_fast.tasks import LearnedTask, MappedValues, ValuesShape, shape_of

# Not needed for answering: a scatter is part of the sum of all, and the sample only serves for distances.
LATER = ("factor", "exponent", "diagonal", "scatter", "sample")
DTYPES = {"F32": torch.float32, "I8": torch.int8}
NUMPY = {torch.float32: np.float32, torch.int8: np.int8}
METADATA = re.compile(r'\s*{\s*"__metadata__"\s*:\s*')
AT_ONCE = 96 << 10  # bytes read from the start of a file
SMALL = 4 << 10  # maximum bytes of a router's tensor in an opening
LAYOUTS = 1024  # maximum layouts held
ALIGNED = max(dtype.itemsize for dtype in DTYPES.values())
# What a damaged header may raise.
LIES = (ValueError, LookupError, ArithmeticError, TypeError, AttributeError, RecursionError, Unfit)
Span = tuple[int, int]


class Opening(NamedTuple):
    """What opening a store needs of a task's file.

    Attributes:
        digest: SHA-256 of the header and all tensors except those of `LATER`.
        start: the header, and the tensors that are held, each aligned to `ALIGNED` bytes.
    """

    digest: str
    start: memoryview


class Bytes(Protocol):
    """A file's bytes, by slice."""

    def __getitem__(self, part: slice, /) -> bytes | memoryview: ...


class Place(NamedTuple):
    """A tensor in a file: its dtype and shape, and where its bytes are."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    span: Span

    def of(self, data: Tensor) -> Tensor:
        """A view of the file's tensors."""
        return data[slice(*self.span)].view(self.dtype).view(self.shape)

    def array(self, data: np.ndarray) -> np.ndarray:
        """A view of the file's tensors."""
        return data[slice(*self.span)].view(NUMPY[self.dtype]).reshape(self.shape)

    def read(self, data: memoryview) -> Tensor:
        """A view of an opening's tensors."""
        first, last = self.span
        count = (last - first) // self.dtype.itemsize
        if not count:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(data, dtype=self.dtype, count=count, offset=first).view(self.shape)


class Layout(NamedTuple):
    """What a header says, except its metadata. Spans are relative to the start of the tensors, those of values to
    `first`.

    Attributes:
        heads, held: tensors of an opening, with spans relative to its tensors.
        shape: None for a task without values, which is damaged.
        later: spans that `Opening.digest` leaves out, in order.
        held_spans: spans in the file of the tensors of an opening.
        size: bytes of all tensors.
        aligned: whether all tensors can be viewed if they start at a multiple of `ALIGNED`.
    """

    router: dict[str, Place]
    heads: dict[str, Place]
    held: dict[str, Place]
    values: dict[str, tuple[Place, Place]]
    shape: ValuesShape | None
    first: int
    later: tuple[Span, ...]
    held_spans: tuple[Span, ...]
    size: int
    aligned: bool


class Header(NamedTuple):
    """Header of a file that was checked when it was written or read whole. begin: start of its tensors."""

    metadata: Any
    layout: Layout
    begin: int


class _Read:
    """A file's bytes, read on demand."""

    def __init__(self, file: int) -> None:
        self._file, self._size = file, os.fstat(file).st_size
        self._start = os.pread(file, AT_ONCE, 0)

    def __getitem__(self, part: slice) -> bytes | memoryview:
        first, last, _ = part.indices(self._size)
        if last <= len(self._start):
            return memoryview(self._start)[first:last]
        return os.pread(self._file, max(0, last - first), first)


def opening_of(data: bytes | memoryview) -> Opening:
    """The opening of a whole file. Raises ValueError or KeyError if it is not a task's file."""
    return _opening(memoryview(data))


def read_opening(path: Path) -> Opening | None:
    """The opening of a file, read without the rest; None if it is not a task's file."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _opening(_Read(file))
        finally:
            os.close(file)
    except (OSError, *LIES):
        return None


def _opening(data: Bytes) -> Opening:
    header = _header(data)
    start = bytearray(data[: header.begin])
    for first, last in header.layout.held_spans:
        start += data[header.begin + first : header.begin + last]
        start += bytes(-len(start) % ALIGNED)
    return Opening(_digest(data, header), memoryview(start))


def _header(data: Bytes) -> Header:
    begin = 8 + int.from_bytes(data[:8], "little")
    text = bytes(data[8:begin]).decode()
    if first := METADATA.match(text):
        metadata, end = json.JSONDecoder().raw_decode(text, first.end())
        layout = _layout_of("{" + text[end:].lstrip().removeprefix(","))
    else:
        metadata, layout = json.loads(text).get("__metadata__"), _layout_of(text)
    return Header((metadata or {}).get("slm_fast"), layout, begin)


@functools.lru_cache(maxsize=LAYOUTS)
def _layout_of(text: str) -> Layout:
    """Parse JSON in which each entry, except the metadata, is a tensor."""
    tensors = {
        name: Place(DTYPES[place["dtype"]], tuple(place["shape"]), tuple(place["data_offsets"]))
        for name, place in json.loads(text).items()
        if name != "__metadata__"
    }
    own = {name: place for name, place in tensors.items() if name.startswith("values.")}
    heads = {name: place for name, place in tensors.items() if name.startswith("head.")}
    router = {name: place for name, place in tensors.items() if name not in own and name not in heads}
    first = min((place.span[0] for place in own.values()), default=0)

    def value(name: str) -> Place:
        begin, end = own[name].span
        return own[name]._replace(span=(begin - first, end - first))

    values = {
        module: (value(f"values.{module}.lora_a"), value(f"values.{module}.lora_b")) for module in modules_of(own)
    }
    small = [name for name, place in router.items() if name not in LATER and place.span[1] - place.span[0] <= SMALL]
    held, end = dict[str, Place](), 0
    for name in (*heads, *small):
        begin, size = end, tensors[name].span[1] - tensors[name].span[0]
        held[name], end = tensors[name]._replace(span=(begin, begin + size)), begin + size + -size % ALIGNED
    return Layout(
        router,
        {name: held[name] for name in heads},
        {name: held[name] for name in small},
        values,
        shape_of({module: [place.shape for place in pair] for module, pair in values.items()}) if values else None,
        first,
        tuple(sorted(place.span for name, place in router.items() if name in LATER)),
        tuple(tensors[name].span for name in held),
        max((place.span[1] for place in tensors.values()), default=0),
        all(place.span[0] % place.dtype.itemsize == 0 for place in tensors.values()),
    )


def _digest(data: Bytes, header: Header) -> str:
    digest, at = hashlib.sha256(), 0
    for first, last in header.layout.later:
        if at < header.begin + first:
            digest.update(data[at : header.begin + first])
        at = header.begin + last
    digest.update(data[at:])
    return digest.hexdigest()


def map_task(
    path: Path,
    digest: str,
    opening: Opening,
    *,
    checked: bool = False,
    on_damage: Callable[[Path], str] = lambda file: "",
) -> LearnedTask | None:
    """Map a task whose file was once read whole and checked, and then had this opening.

    Heads and the router's small tensors are views of the opening. Other tensors are views of the file, which the kernel
    reads on use and may evict. On first use of any of them the file is compared with the opening's digest, unless that
    was just done (`checked`). It does not cover tensors of `LATER`: on first use of any of these the whole file is
    compared with `digest` and checked, and WorkError is raised as by `task_from_file`. If the file has changed,
    `on_damage` is called once, and its result ends the error message.

    Returns:
        The task; None if the file cannot be mapped, has another size, or the opening is inconsistent: reading the file
        whole then says what is wrong.
    """
    try:
        header = _header(opening.start)
        metadata, layout, begin = header
        if layout.shape is None or not layout.aligned or begin % ALIGNED:
            return None
        if os.stat(path).st_size != begin + layout.size:
            return None
        held = opening.start[begin:]
        heads = {name: place.read(held) for name, place in layout.heads.items()}
        small = {name: place.read(held) for name, place in layout.held.items()}
        about = about_task(metadata)
        whole = torch.from_file(str(path), shared=False, size=begin + layout.size, dtype=torch.uint8)
    except (OSError, RuntimeError, *LIES):
        return None
    file = _File(path, whole, digest, opening.digest, header, on_damage)
    file.is_opened = checked
    tensors = whole[begin:]
    task = replace(
        task_of(about, heads),
        values=_Values(file, tensors[layout.first :], layout.values),
        router=_Part(file, tensors, layout.router, small),
    )
    vars(task)["shape"] = layout.shape
    return task


class _File:
    """A mapped file, compared with digests when its parts are first used.

    Args:
        digest: expected SHA-256 of the whole file.
        opening: expected `Opening.digest`.
        header: its header.
        on_damage: called once if a digest differs; returns an addition to the error message.
    """

    def __init__(
        self, path: Path, whole: Tensor, digest: str, opening: str, header: Header, on_damage: Callable[[Path], str]
    ) -> None:
        self.path, self.digest, self.opening, self.header, self.on_damage = path, digest, opening, header, on_damage
        self._said = ""  # the error of a damaged file
        self.is_opened = self.is_whole = False  # whether they were checked
        self._whole = whole

    def check_opening(self) -> None:
        """Raise WorkError if the file has another opening."""
        if not self.is_opened:
            if _digest(self._data, self.header) != self.opening:
                raise self._damaged()
            self.is_opened = True

    def check(self) -> None:
        """Raise WorkError if the file is another one, or not a task's."""
        if not self.is_whole:
            if self._found() != self.digest:
                raise self._damaged()
            task_from_bytes(bytes(self._data), self.path)
            self.is_opened = self.is_whole = True

    def unmap(self) -> None:
        unmap(self._whole)

    @property
    def _data(self) -> memoryview:
        return memoryview(self._whole.numpy().data)

    def _found(self) -> str:
        return hashlib.sha256(self._data).hexdigest()

    def _damaged(self) -> WorkError:
        if not self._said:
            self._said = f"{damaged(self.path, self._found(), self.digest)}{self.on_damage(self.path)}"
        return WorkError(self._said)


class _Values(MappedValues):
    """Values by module. Views are created on demand."""

    def __init__(self, file: _File, data: Tensor, places: dict[str, tuple[Place, Place]]) -> None:
        self._file, self._data, self._places = file, data, places

    def __getitem__(self, module: str) -> tuple[Tensor, Tensor]:
        lora_a, lora_b = self._places[module]
        self._file.check_opening()
        return lora_a.of(self._data), lora_b.of(self._data)

    def arrays(self, module: str) -> tuple[np.ndarray, np.ndarray]:
        lora_a, lora_b = self._places[module]
        self._file.check_opening()
        data = self._data.numpy()
        return lora_a.array(data), lora_b.array(data)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def unmap(self) -> None:
        self._file.unmap()


class _Part(Mapping[str, Tensor]):
    """A task's part of the router: tensors of the opening, and views created on demand."""

    def __init__(self, file: _File, data: Tensor, places: Mapping[str, Place], held: Mapping[str, Tensor]) -> None:
        self._file, self._data, self._places, self._held = file, data, places, held

    def __getitem__(self, name: str) -> Tensor:
        if name in self._held:
            return self._held[name]
        place = self._places[name]
        if name in LATER:
            self._file.check()
        else:
            self._file.check_opening()
        return place.of(self._data)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
