"""A task's file, mapped: opening a store of many tasks needs little of each, the rest is read when it is used.

That little, the task's `Opening`, is what the file begins with, its head, and the router's few numbers. It is kept
beside the manifest (`slm_fast.kept_keys`), all tasks' together, so that opening reads none of their files: of a file
that is touched the system maps sixteen pages around. Tasks are mostly laid out alike, and what their headers have in
common is parsed once, and held once.
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

import torch
from torch import Tensor

from slm_fast.errors import WorkError
from slm_fast.fields import Unfit
from slm_fast.schema import about_task, task_of
from slm_fast.task_file import damaged, task_from_bytes
from slm_fast.task_tensors import modules_of
from slm_fast.tasks import LearnedTask, ValuesShape, shape_of

# What answering needs not: a scatter counts in the sum of all, and the sample says how far a row is.
LATER = ("factor", "exponent", "diagonal", "scatter", "sample")
DTYPES = {"F32": torch.float32, "I8": torch.int8}
METADATA = re.compile(r'\s*{\s*"__metadata__"\s*:\s*')
AT_ONCE = 96 << 10  # bytes read of a file's beginning
SMALL = 4 << 10  # bytes of a router's tensor that an opening holds
LAYOUTS = 1024  # that are held
ALIGNED = max(dtype.itemsize for dtype in DTYPES.values())
# What a header that lies may raise.
LIES = (ValueError, LookupError, ArithmeticError, TypeError, AttributeError, RecursionError, Unfit)
Span = tuple[int, int]


class Opening(NamedTuple):
    """What opening a store needs of a task's file.

    digest: SHA-256 of its header and all tensors but those of `LATER`. start: its header, and the tensors that are
    held, each from a multiple of `ALIGNED` bytes on.
    """

    digest: str
    start: memoryview


class Bytes(Protocol):
    """Parts of a file."""

    def __getitem__(self, part: slice, /) -> bytes | memoryview: ...


class Place(NamedTuple):
    """A tensor of a file: its numbers, and where its bytes are."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    span: Span

    def of(self, data: Tensor) -> Tensor:
        """A view of the file's tensors."""
        return data[slice(*self.span)].view(self.dtype).view(self.shape)

    def read(self, data: memoryview) -> Tensor:
        """A view of an opening's tensors."""
        first, last = self.span
        count = (last - first) // self.dtype.itemsize
        if not count:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(data, dtype=self.dtype, count=count, offset=first).view(self.shape)


class Layout(NamedTuple):
    """What a header says but for its metadata. Spans are from where tensors begin, those of values from `first` on; a
    task without values is damaged, and has no shape.

    heads, held: tensors of an opening, spans as there; held_spans: where in the file. later: what `Opening.digest`
    leaves out, in order. size: bytes of all tensors. aligned: whether all numbers may be viewed, where tensors begin at
    a multiple of `ALIGNED`.
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
    """Of a file that was checked when it was written or read whole. begin: where its tensors do."""

    metadata: Any
    layout: Layout
    begin: int


class _Read:
    """A file's bytes, read when they are asked for."""

    def __init__(self, file: int) -> None:
        self._file, self._size = file, os.fstat(file).st_size
        self._start = os.pread(file, AT_ONCE, 0)

    def __getitem__(self, part: slice) -> bytes | memoryview:
        first, last, _ = part.indices(self._size)
        if last <= len(self._start):
            return memoryview(self._start)[first:last]
        return os.pread(self._file, max(0, last - first), first)


def opening_of(data: bytes | memoryview) -> Opening:
    """That of a whole file. Raises ValueError or KeyError for what is no task's file."""
    return _opening(memoryview(data))


def read_opening(path: Path) -> Opening | None:
    """That of a file, of which it reads no more; None for what is no task's file."""
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
    """text: JSON, of which each entry but the metadata is a tensor."""
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
    told: Callable[[Path], str] = lambda file: "",
) -> LearnedTask | None:
    """A task whose file was read whole and checked before, of which this was the opening.

    Heads and the router's small tensors are views of the opening. The others are views of the file, which the kernel
    reads when they are used and may let go of. When one of them is used first the file is compared with the opening's
    digest, unless it was just now (`checked`). Those of `LATER` are not part of that: the first use of one of them
    compares the whole file with `digest`, checks it, and raises WorkError as `task_from_file` does. `told` hears of a
    file that is another one, and what it says ends the error. None where the file cannot be mapped or is of another
    size, or the opening lies: reading it whole says what is wrong.
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
    file = _File(path, whole, digest, opening.digest, header, told)
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
    """A mapped file, which is compared with digests when its parts are used first.

    digest: of the whole file. opening, header: the `Opening.digest` that it should have, and the header. told: hears
    that it has not.
    """

    def __init__(
        self, path: Path, whole: Tensor, digest: str, opening: str, header: Header, told: Callable[[Path], str]
    ) -> None:
        self.path, self.digest, self.opening, self.header, self.told = path, digest, opening, header, told
        self.is_opened = self.is_whole = False  # whether they were found to be so
        self._whole = whole

    def check_opening(self) -> None:
        """Raises WorkError where the file has another opening."""
        if not self.is_opened:
            if _digest(self._data, self.header) != self.opening:
                raise self._damaged()
            self.is_opened = True

    def check(self) -> None:
        """Raises WorkError where the file is another, or holds no task."""
        if not self.is_whole:
            if self._found() != self.digest:
                raise self._damaged()
            task_from_bytes(bytes(self._data), self.path)
            self.is_opened = self.is_whole = True

    @property
    def _data(self) -> memoryview:
        return memoryview(self._whole.numpy().data)

    def _found(self) -> str:
        return hashlib.sha256(self._data).hexdigest()

    def _damaged(self) -> WorkError:
        return WorkError(f"{damaged(self.path, self._found(), self.digest)}{self.told(self.path)}")


class _Values(Mapping[str, tuple[Tensor, Tensor]]):
    """Values by module. Views are made when they are asked for."""

    def __init__(self, file: _File, data: Tensor, places: dict[str, tuple[Place, Place]]) -> None:
        self._file, self._data, self._places = file, data, places

    def __getitem__(self, module: str) -> tuple[Tensor, Tensor]:
        lora_a, lora_b = self._places[module]
        self._file.check_opening()
        return lora_a.of(self._data), lora_b.of(self._data)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class _Part(Mapping[str, Tensor]):
    """A task's part of the router: tensors that are held, and views that are made when they are asked for."""

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
