"""The sum of tasks' scatters, kept in a file beside a store's manifest, so that opening the store adds only newer
tasks.

It is of sampled tasks (`slm_fast.sketch`) and names them, so an outdated sum can be brought up to date.

    .sum    SHA-256 of what follows [32 bytes]; SHA-256 that identifies the model [32]; numbers of tasks N and of
            elements of a scatter [8 each]; N times SHA-256 of the task's file and of what a store reads of it on
            opening [32 each]; the two planes of the sum

It is derived from the tasks' files alone, and may be deleted at any time. It is not used if it is damaged, or of a task
that the manifest does not name.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slm_fast.errors import WorkError
from slm_fast.exact_sum import COMPACT_AT_ONCE, ExactSum, Term
from slm_fast.files import flush, write
from slm_fast.scatter import scatter_of

NUMBERS = 8192  # elements of a plane that share a unit and a width
HEAD = struct.Struct("<32s32sQQ")
UNUSABLE = "a cache that is damaged or not of the store's tasks; delete it, it is made again where it is needed"


@dataclass(frozen=True)
class KeptSum:
    """The exact sum of some tasks' scatters.

    Attributes:
        opening: SHA-256 of each task's file -> that of what is read of it when a store is opened
            (`slm_fast.mapped_task.Opening`), so that the rest can be read when it is needed.
    """

    opening: Mapping[str, str]
    total: ExactSum

    def joined(self, other: KeptSum) -> KeptSum:
        """Add the sum of other tasks."""
        coarse, fine = (one + more for one, more in zip(self._planes, other._planes, strict=True))
        return KeptSum({**self.opening, **other.opening}, ExactSum(coarse, fine))

    def without(self, digest: str, term: Term) -> KeptSum:
        """Subtract a task: `digest` is the SHA-256 of its file, `term` its scatter."""
        opening = {task: own for task, own in self.opening.items() if task != digest}
        return replace(self, opening=opening, total=self.total.minus(term))

    @property
    def _planes(self) -> tuple[Tensor, Tensor]:
        return self.total.coarse, self.total.fine


@dataclass(frozen=True)
class SumFile:
    """The file of a store's sum. Whoever changes it holds the store's lock.

    Attributes:
        about: the store's `about`, which says what model the sum is for.
    """

    path: Path
    about: Mapping[str, Any]

    def write(self, kept: KeptSum) -> None:
        """Write a sum atomically. Raises OSError."""
        table = b"".join(bytes.fromhex(digest) for pair in sorted(kept.opening.items()) for digest in pair)
        planes = (kept.total.coarse, kept.total.fine)
        content = [table, *(part for plane in planes for part in _packed(plane.numpy()))]
        head = HEAD.pack(b"", model_digest(self.about), len(kept.opening), len(kept.total.coarse))[32:]
        digest = hashlib.sha256(head)
        for part in content:
            digest.update(part)
        write(self.path, b"".join([digest.digest(), head, *content]))

    def read(self) -> KeptSum | None:
        """The sum; None if the file does not exist, is damaged, or is of another model."""
        try:
            return self._parsed(memoryview(self.path.read_bytes()))
        except OSError:
            return None

    def later(self) -> Callable[[], KeptSum | None]:
        """The current content, to be read on demand even if the file is replaced or removed in the meantime."""
        try:
            with self.path.open("rb") as file:
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError):
            return lambda: None
        return lambda: self._parsed(data)

    def _parsed(self, data: memoryview) -> KeptSum | None:
        try:
            digest, model, count, numbers = HEAD.unpack_from(data)
            if model != model_digest(self.about) or digest != hashlib.sha256(data[32:]).digest():
                return None
            at = HEAD.size + 64 * count
            opening = dict(_pairs(data[HEAD.size : at]))
            coarse, at = _unpacked(data, at, numbers)
            fine, _ = _unpacked(data, at, numbers)
            return KeptSum(opening, ExactSum(torch.from_numpy(coarse), torch.from_numpy(fine)))
        except (ValueError, IndexError, struct.error):
            return None

    def tasks(self) -> set[str] | None:
        """SHA-256 of the files of the tasks in the sum, without reading the rest; None if the file exists but cannot be
        read."""
        try:
            with self.path.open("rb") as file:
                _, _, count, _ = HEAD.unpack(file.read(HEAD.size))
                table = file.read(min(64 * count, self.path.stat().st_size))
        except FileNotFoundError:
            return set()
        except (OSError, struct.error):
            return None
        return {task for task, _ in _pairs(memoryview(table))} if len(table) == 64 * count else None

    def apart(self, digests: Iterable[str]) -> int:
        """How many tasks are only in the sum or only among these."""
        return len((self.tasks() or set()) ^ set(digests))

    def is_stale(self, digests: Iterable[str]) -> bool:
        """Whether it is of a task that is not among these, or cannot be read."""
        there = self.tasks()
        return there is None or not there <= set(digests)

    def take_out(
        self, gone: Iterable[str], term: Callable[[str], Term], left: Callable[[], KeptSum] | None = None
    ) -> None:
        """Leave no trace of some tasks, given by the SHA-256 of their files. If that fails, the file is deleted.

        Args:
            term: returns a task's scatter.
            left: returns the sum of tasks that stay, if it is known elsewhere.

        Raises:
            OSError: the file cannot be deleted.
        """
        there = self.tasks()
        found = [digest for digest in gone if there is None or digest in there]
        if not found:
            return
        try:
            kept = left() if left is not None else self.read()
            for digest in found if left is None else ():
                kept = kept and kept.without(digest, term(digest))
            if kept is None or not kept.opening:
                self.path.unlink()
            else:
                self.write(kept)
        except (OSError, WorkError):  # a full disk, or a damaged task
            self.path.unlink()
        flush(self.path.parent)

    def join(self, others: Sequence[SumFile], digests: Iterable[str]) -> None:
        """Add those of the other sums that are of these tasks only, and of none already added. Raises OSError."""
        wanted, joined, changed = set(digests), self.read(), False
        for other in others:
            kept = other.read()
            if kept is not None and kept.opening.keys() <= wanted:
                if joined is None:
                    joined, changed = kept, True
                elif not kept.opening.keys() & joined.opening.keys():
                    joined, changed = joined.joined(kept), True
        if joined is not None and changed:
            self.write(joined)


class SumProof:
    """Check of a sum against its tasks, which are given one by one."""

    def __init__(self, file: SumFile) -> None:
        self._file, self._kept = file, file.read()
        self._left = dict(self._kept.opening) if self._kept else {}
        self._waiting: list[Term] = []  # to be subtracted together
        self._fits = True

    def take(self, digest: str, opening: str, part: Mapping[str, Tensor]) -> None:
        """Give a task of the store: SHA-256 of its file, its `Opening.digest`, and its part of the router."""
        if self._kept is not None and self._left.get(digest) == opening:
            del self._left[digest]
            self._waiting.append(scatter_of(part))
            if len(self._waiting) == COMPACT_AT_ONCE:
                self._take_waiting()

    def wrong(self) -> list[str]:
        """Say what is wrong with the sum after all tasks were given: at most one line."""
        kept = self._kept
        if kept is None:
            right = self._file.tasks() == set()
        else:
            self._take_waiting()
            right = self._fits and not self._left and not kept.total.coarse.any() and not kept.total.fine.any()
        return [] if right else [f"{self._file.path}: {UNUSABLE}"]

    def _take_waiting(self) -> None:
        assert self._kept is not None
        try:
            self._kept.total.take(self._waiting)
        except WorkError:  # of another width
            self._fits = False
        self._waiting.clear()


def model_digest(about: Mapping[str, Any]) -> bytes:
    """SHA-256 that tells stores of different kinds of models apart."""
    same = json.dumps([about["fingerprint"], about["config"]], sort_keys=True)
    return hashlib.sha256(same.encode()).digest()


def _pairs(table: memoryview) -> Iterator[tuple[str, str]]:
    for at in range(0, len(table), 64):
        yield table[at : at + 32].hex(), table[at + 32 : at + 64].hex()


# A compact form of a plane. Products of 8-bit factors are multiples of a unit far above 2^-56, so most elements of a
# plane end in zero bits, and few are large. The diagonal, whose elements are arbitrary, is stored separately.


def _diagonal(numbers: int) -> np.ndarray:
    """Indices of the diagonal in an upper triangle, row by row, of this many numbers."""
    width = (math.isqrt(8 * numbers + 1) - 1) // 2
    place = np.arange(width)
    return place * width - place * (place - 1) // 2


def _packed(plane: np.ndarray) -> Iterable[bytes]:
    """The diagonal unchanged; for each chunk, its numbers of trailing zero bits and of bytes per element; their
    bytes."""
    diagonal, plane = _diagonal(len(plane)), plane.astype("<i8")
    own = plane[diagonal].tobytes()
    plane[diagonal] = 0
    sizes, parts = bytearray(), []
    for at in range(0, len(plane), NUMBERS):
        chunk = plane[at : at + NUMBERS]
        bits = int(np.bitwise_or.reduce(chunk))
        zeros = (bits & -bits).bit_length() - 1 if bits else 0
        least, most = int(chunk.min()) >> zeros, int(chunk.max()) >> zeros
        width = (max(most, ~least).bit_length() + 8) // 8 if bits else 0
        sizes += bytes((zeros, width))
        parts.append((chunk >> zeros).view(np.uint8).reshape(-1, 8)[:, :width].tobytes())
    return [own, bytes(sizes), *parts]


def _unpacked(data: memoryview, at: int, numbers: int) -> tuple[np.ndarray, int]:
    """The plane that starts at `at`, and where it ends."""
    diagonal, plane = _diagonal(numbers), np.empty(numbers, "<i8")
    own = np.frombuffer(data, "<i8", len(diagonal), at)
    at += own.nbytes
    chunks = -(-numbers // NUMBERS)
    sizes = np.frombuffer(data, np.uint8, 2 * chunks, at).reshape(-1, 2).tolist()
    at += 2 * chunks
    for i, (zeros, width) in enumerate(sizes):
        chunk = plane[i * NUMBERS : (i + 1) * NUMBERS]
        if not width:
            chunk[:] = 0
            continue
        spread = np.zeros((len(chunk), 8), np.uint8)  # the bytes are on top, so that shifting back keeps the sign
        spread[:, 8 - width :] = np.frombuffer(data, np.uint8, len(chunk) * width, at).reshape(-1, width)
        np.left_shift(spread.view("<i8")[:, 0] >> 8 * (8 - width), zeros, out=chunk)
        at += len(chunk) * width
    plane[diagonal] = own
    return plane.astype(np.int64, copy=False), at
