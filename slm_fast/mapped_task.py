"""A task's file, mapped: opening a store of many tasks reads what it needs of each, the rest is read when it is used.

Tasks are mostly laid out alike. What their headers have in common is parsed once, and held once, as it would take more
memory than the rest of what is held of a task. And what every pass needs of a task, its head and little else, is read
rather than mapped: of a file that is touched the system maps sixteen pages around, and where memory is short it would
read all tasks' files again whenever heads are put together.
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
SMALL = 4 << 10  # bytes of a router's tensor that is held
LAYOUTS = 1024  # that are held
ALIGNED = max(dtype.itemsize for dtype in DTYPES.values())
Span = tuple[int, int]


class Digests(NamedTuple):
    """SHA-256 of what is read of a task's file at a time.

    opening: its header and all tensors but those of `LATER`. start: neither those nor values.
    """

    opening: str
    start: str


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

    def read(self, data: Bytes, begin: int) -> Tensor:
        """A copy of what begins there in the file."""
        own = bytearray(data[begin + self.span[0] : begin + self.span[1]])
        return torch.frombuffer(own, dtype=self.dtype).view(self.shape) if own else torch.empty(self.shape)


class Layout(NamedTuple):
    """What a header says but for its metadata. Spans are from where tensors begin, those of values from `first` on; a
    task without values is damaged, and has no shape.

    later, skipped: what `Digests.opening` and `Digests.start` leave out, in order. aligned: whether all numbers may be
    viewed, where tensors begin at a multiple of `ALIGNED`.
    """

    router: dict[str, Place]
    heads: dict[str, Place]
    values: dict[str, tuple[Place, Place]]
    shape: ValuesShape | None
    first: int
    later: tuple[Span, ...]
    skipped: tuple[Span, ...]
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

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes | memoryview:
        first, last, _ = part.indices(self._size)
        if last <= len(self._start):
            return memoryview(self._start)[first:last]
        return os.pread(self._file, max(0, last - first), first)


def digests_of(data: bytes | memoryview) -> Digests:
    """Raises ValueError or KeyError for what is no task's file."""
    data = memoryview(data)
    header = _header(data)
    return Digests(_digest(data, header), _digest(data, header, values=False))


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
        place = own[name]
        return place._replace(span=(place.span[0] - first, place.span[1] - first))

    values = {
        module: (value(f"values.{module}.lora_a"), value(f"values.{module}.lora_b")) for module in modules_of(own)
    }
    shape = shape_of({module: [place.shape for place in pair] for module, pair in values.items()}) if values else None
    later = sorted(place.span for name, place in router.items() if name in LATER)
    skipped = sorted([*later, *(place.span for place in own.values())])
    aligned = all(place.span[0] % place.dtype.itemsize == 0 for place in tensors.values())
    return Layout(router, heads, values, shape, first, tuple(later), tuple(skipped), aligned)


def _digest(data: Bytes, header: Header, *, values: bool = True) -> str:
    digest, at = hashlib.sha256(), 0
    for first, last in header.layout.later if values else header.layout.skipped:
        if at < header.begin + first:
            digest.update(data[at : header.begin + first])
        at = header.begin + last
    digest.update(data[at:])
    return digest.hexdigest()


def map_task(path: Path, digest: str, opening: str, start: str | None = None) -> tuple[LearnedTask, Digests] | None:
    """A task whose file was read whole and checked before, if what is read of it now has the SHA-256 `start`, or where
    that is not known `opening` (`Digests`); and both of these.

    Heads and the router's small tensors are copies. The others are views of the file, which the kernel reads when they
    are used and may let go of. With `start` values
    are compared with `opening` when one of them is used first. Those of `LATER` are not looked at: the first use of one
    of them compares the whole file with `digest`, checks it, and raises WorkError as `task_from_file` does. None where
    the file cannot be mapped, or is another: reading it whole says what is wrong.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            read = _Read(file)
            header = _header(read)
            if header.layout.shape is None or not header.layout.aligned or header.begin % ALIGNED:
                return None
            found = _digest(read, header, values=False)
            if found != start and (start is not None or _digest(read, header) != opening):
                return None
            layout, begin = header.layout, header.begin
            heads = {name: place.read(read, begin) for name, place in layout.heads.items()}
            small = {
                name: place.read(read, begin)
                for name, place in layout.router.items()
                if name not in LATER and place.span[1] - place.span[0] <= SMALL
            }
        finally:
            os.close(file)
        about = about_task(header.metadata)
        whole = torch.from_file(str(path), shared=False, size=len(read), dtype=torch.uint8)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, Unfit):  # of a header that lies
        return None
    data, tensors = memoryview(whole.numpy().data), whole[begin:]

    def check_whole() -> None:
        found = hashlib.sha256(data).hexdigest()
        if found != digest:
            raise damaged(path, found, digest)
        task_from_bytes(bytes(data), path)

    def check_values() -> None:
        if _digest(data, _header(data)) != opening:
            raise damaged(path, hashlib.sha256(data).hexdigest(), digest)

    values = _Values(tensors[layout.first :], layout.values, None if start is None else check_values)
    task = replace(task_of(about, heads), values=values, router=_Part(tensors, layout.router, small, check_whole))
    vars(task)["shape"] = layout.shape
    return task, Digests(opening, found)


class _Values(Mapping[str, tuple[Tensor, Tensor]]):
    """Values by module, checked before the first use of one of them. Views are made when they are asked for."""

    def __init__(self, data: Tensor, places: dict[str, tuple[Place, Place]], check: Callable[[], None] | None) -> None:
        self._data, self._places, self._check = data, places, check

    def __getitem__(self, module: str) -> tuple[Tensor, Tensor]:
        if self._check is not None:
            self._check()
            self._check = None
        lora_a, lora_b = self._places[module]
        return lora_a.of(self._data), lora_b.of(self._data)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class _Part(Mapping[str, Tensor]):
    """A task's part of the router: tensors that are held, and views that are made when they are asked for, of which
    those of `LATER` are checked before the first use of one of them."""

    def __init__(
        self, data: Tensor, places: Mapping[str, Place], held: Mapping[str, Tensor], check_whole: Callable[[], None]
    ) -> None:
        self._data, self._places, self._held = data, places, held
        self._check_whole, self._checked = check_whole, False

    def __getitem__(self, name: str) -> Tensor:
        if name in self._held:
            return self._held[name]
        place = self._places[name]
        if name in LATER and not self._checked:
            self._check_whole()
            self._checked = True
        return place.of(self._data)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
