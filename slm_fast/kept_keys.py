"""What a gaussian router computes of tasks, kept in a file beside a store's manifest, so that opening reads it.

    .keys   SHA-256 of what follows up to the biases [32 bytes]; SHA-256 of the tasks that are sampled [32]; how many
            tasks N, means M and numbers of a query D there are, and MADE [8 each]; zeros up to 128; N times SHA-256 of
            a task's file, of two parts of it (`mapped_task.Digests`), of its biases and keys [32 each], and how many
            means it has [8]; centre [D], bias [M] and keys [M, D] float32

It is made of the tasks' files and nothing else, and may be deleted at any time. It may lack tasks. One that is damaged,
of other sampled tasks than the manifest's (`slm_fast.sketch`), or of a task that the manifest does not name, is not
used; whoever changes the store so removes it first, or what is in it of a forgotten task.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slm_fast.covariance import Discriminant, KnownKeys
from slm_fast.files import flush_directory, write
from slm_fast.kept_sum import model_digest
from slm_fast.mapped_task import Digests
from slm_fast.sketch import sampled

MADE = 2  # to be raised where the same tasks come to other keys. Files of before it was written have 0 there
HEAD = struct.Struct("<32s32sQQQQ")
ENTRY = struct.Struct("<32s32s32s32sQ")
BEGIN = 128


class Entry(NamedTuple):
    """Of a task: SHA-256 of its file, parts of it, its biases and keys; where they lie."""

    file: str
    digests: Digests
    keys: str
    rows: slice


@dataclass(frozen=True)
class KeptKeys:
    """The keys of some tasks, as views of the file: the kernel reads it when they are used and may let go of it.

    sample: `sample_digest`. entries: in the order of the rows.
    """

    sample: bytes
    entries: list[Entry]
    discriminant: Discriminant

    @property
    def digests(self) -> dict[str, Digests]:
        """Of parts of each task's file, by the SHA-256 of all of it."""
        return {entry.file: entry.digests for entry in self.entries}

    @property
    def rows(self) -> dict[str, slice]:
        """Where each task's means lie, by the SHA-256 of its file."""
        return {entry.file: entry.rows for entry in self.entries}


@dataclass(frozen=True)
class KeysFile:
    """The file of a store's keys. Who changes it holds the store's lock.

    about: of the store, whose model the keys are of.
    """

    path: Path
    about: Mapping[str, Any]

    def sample_digest(self, files: Mapping[str, str]) -> bytes:
        """Of the model, the names and files of those of these tasks that are sampled, and whether there are others,
        without which keys are computed together."""
        own = sampled(files)
        digest = hashlib.sha256(model_digest(self.about) + bytes([len(files) > len(own)]))
        for name in own:
            digest.update(f"{name}\n{files[name]}\n".encode())
        return digest.digest()

    def write(self, files: Mapping[str, str], digests: Mapping[str, Digests], known: KnownKeys) -> None:
        """Put the keys of these tasks there, whole or not at all. digests: as of `KeptKeys`. Raises OSError."""
        centre, keys, bias = (part.cpu().contiguous() for part in known.discriminant)
        entries = []
        for name, rows in sorted(known.rows.items(), key=lambda item: item[1].start):
            own = digests[files[name]]
            entries.append(Entry(files[name], own, _digest(keys[rows], bias[rows]), rows))
        self._put(self.sample_digest(files), entries, (centre, keys, bias))

    def _put(self, sample: bytes, entries: list[Entry], discriminant: Discriminant) -> None:
        """Write what these entries say of the keys that lie there."""
        centre, keys, bias = discriminant
        count = [entry.rows.stop - entry.rows.start for entry in entries]
        head = HEAD.pack(b"", sample, len(entries), sum(count), len(centre), MADE)[32:].ljust(BEGIN - 32, b"\0")
        table = b"".join(
            ENTRY.pack(*map(bytes.fromhex, (entry.file, *entry.digests, entry.keys)), means)
            for entry, means in zip(entries, count, strict=True)
        )
        content = head + table + _bytes(centre)
        runs = _joined(entry.rows for entry in entries)
        rows = [_bytes(part[run]) for part in (bias, keys) for run in runs]
        write(self.path, hashlib.sha256(content).digest(), content, *rows)

    def read(self) -> KeptKeys | None:
        """None where there is none, or it is damaged or of another version."""
        kept = self._mapped()
        if kept is None:
            return None
        _, keys, bias = kept.discriminant
        whole = all(_digest(keys[entry.rows], bias[entry.rows]) == entry.keys for entry in kept.entries)
        return kept if whole else None

    def _mapped(self) -> KeptKeys | None:
        """As `read`, with keys and biases that nobody looked at."""
        try:
            whole = torch.from_file(str(self.path), size=self.path.stat().st_size, dtype=torch.uint8)
            data = memoryview(whole.numpy().data)
            digest, sample, count, means, width, made = HEAD.unpack_from(data)
            numbers = BEGIN + ENTRY.size * count
            end = numbers + 4 * width
            if made != MADE or width == 0 or len(data) != end + 4 * (means + means * width):
                return None
            if digest != hashlib.sha256(data[32:end]).digest():
                return None
        except (OSError, RuntimeError, ValueError, struct.error):
            return None
        entries = _entries(data[BEGIN:numbers])
        if sum(entry.rows.stop - entry.rows.start for entry in entries) != means:
            return None
        centre, bias, keys = whole[numbers:].view(torch.float32).split([width, means, means * width])
        return KeptKeys(sample, entries, (centre, keys.view(means, width), bias))

    def known(self, kept: KeptKeys, files: Mapping[str, str]) -> KnownKeys | None:
        """What is known of these tasks' keys; None where they are made with others, or there are others among them."""
        rows = kept.rows
        if kept.sample != self.sample_digest(files) or not rows.keys() <= set(files.values()):
            return None
        return KnownKeys({name: rows[digest] for name, digest in files.items() if digest in rows}, kept.discriminant)

    def take_out(self, files: Mapping[str, str]) -> None:
        """Leave nothing in it but of these tasks. Without what that takes the file is deleted. Raises OSError where
        that cannot be done."""
        if not self.is_stale(files):
            return
        kept, there = self._mapped(), set(files.values())
        left = [] if kept is None else [entry for entry in kept.entries if entry.file in there]
        if kept is not None and left and kept.sample == self.sample_digest(files):
            try:
                self._put(kept.sample, left, kept.discriminant)
            except OSError:  # a full disk
                self.path.unlink()
        else:
            self.path.unlink()
        flush_directory(self.path.parent)

    def is_stale(self, files: Mapping[str, str]) -> bool:
        """Whether it is of other tasks than these, made with others or by another version, or nobody can tell."""
        try:
            with self.path.open("rb") as file:
                _, sample, count, _, _, made = HEAD.unpack(file.read(HEAD.size))
                file.seek(BEGIN)
                table = file.read(min(ENTRY.size * count, self.path.stat().st_size))
        except FileNotFoundError:
            return False
        except (OSError, struct.error):
            return True
        if made != MADE or len(table) != ENTRY.size * count or sample != self.sample_digest(files):
            return True
        return not {entry.file for entry in _entries(memoryview(table))} <= set(files.values())

    def wrong(self, files: Mapping[str, str]) -> list[str]:
        """What is wrong with it beside these tasks: a line or none. One of another version is not used."""
        try:
            with self.path.open("rb") as file:
                made = HEAD.unpack(file.read(HEAD.size))[-1]
        except FileNotFoundError:
            return []
        except (OSError, struct.error):
            made = MADE
        if made != MADE or (self.read() is not None and not self.is_stale(files)):
            return []
        return [f"{self.path}: not of the store's tasks; delete it, it is made again where it is needed"]


def _entries(table: memoryview) -> list[Entry]:
    found, place = [], 0
    for file, opening, start, keys, means in ENTRY.iter_unpack(table):
        found.append(Entry(file.hex(), Digests(opening.hex(), start.hex()), keys.hex(), slice(place, place + means)))
        place += means
    return found


def _joined(rows: Iterable[slice]) -> list[slice]:
    """Rows that lie one after another as one."""
    found: list[slice] = []
    for own in rows:
        if found and found[-1].stop == own.start:
            found[-1] = slice(found[-1].start, own.stop)
        else:
            found.append(own)
    return found


def _digest(keys: Tensor, bias: Tensor) -> str:
    digest = hashlib.sha256(_bytes(bias))
    digest.update(_bytes(keys))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.flatten().numpy().data.cast("B")
