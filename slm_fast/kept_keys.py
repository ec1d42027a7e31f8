"""What opening a store needs of its tasks, kept in a file beside the manifest: their openings, and the keys that a
gaussian router computes from them.

    .keys   SHA-256 of what follows, up to and including the centre [32 bytes]; SHA-256 of the sampled tasks [32];
            numbers of tasks N, of means M and of elements of a query D, and MADE [8 each]; zeros up to byte 128; N
            times SHA-256 of the task's file, of its opening (`Opening.digest`), of its keys and biases here and of its
            opening's bytes here [32 each], its number of means and the bytes of its opening [8 each]; centre [D], bias
            [M] and keys [M, D] float32; the openings (`mapped_task.Opening.start`)

It is derived from the tasks' files alone, and may be deleted at any time. It may lack tasks, and all keys (D = 0). It
is not used if it is damaged or of a task that the manifest does not name, nor are its keys if they are of other sampled
tasks than the manifest's (`slm_fast.sketch`). A commit that forgets a task first removes the task's part of it, and all
keys if the task was sampled: nothing of a forgotten task is left.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slm_fast.covariance import Discriminant, KnownKeys
from slm_fast.files import flush, write
from slm_fast.kept_sum import UNUSABLE, model_digest
from slm_fast.mapped_task import Opening
from slm_fast.sketch import sampled

MADE = 4  # to be raised when the same tasks yield other keys. Files written before this field have 0
HEAD = struct.Struct("<32s32sQQQQ")
ENTRY = struct.Struct("<32s32s32s32sQQ")
BEGIN = 128
DIGEST = 32  # bytes


class Entry(NamedTuple):
    """Entry of a task.

    Attributes:
        file: SHA-256 of its file.
        opening: its `Opening.digest`.
        own_keys: SHA-256 of its biases and keys.
        own_start: SHA-256 of `start`.
        means: rows of its means; none without keys.
        start: bytes of its opening in `KeptKeys.starts`.
    """

    file: str
    opening: str
    own_keys: str
    own_start: str
    means: slice
    start: slice


@dataclass(frozen=True)
class KeptKeys:
    """Keys and openings of some tasks, as views of the file: the kernel reads it on use and may evict it.

    Attributes:
        sample: see `KeysFile.sample_digest`; zeros without keys.
        entries: in the order of the rows.
        starts: the openings, concatenated.
    """

    sample: bytes
    entries: list[Entry]
    discriminant: Discriminant
    starts: memoryview

    @property
    def openings(self) -> dict[str, Opening]:
        """Openings, by the SHA-256 of the tasks' files."""
        return {entry.file: Opening(entry.opening, self.starts[entry.start]) for entry in self.entries}

    @property
    def rows(self) -> dict[str, slice]:
        """Rows of each task's means, by the SHA-256 of its file."""
        return {entry.file: entry.means for entry in self.entries}

    def digests(self, entry: Entry) -> tuple[str, str]:
        """What the entry's `own_keys` and `own_start` are to be."""
        _, keys, bias = self.discriminant
        return _digest([_bytes(bias[entry.means]), _bytes(keys[entry.means])]), _digest([self.starts[entry.start]])

    def without_keys(self) -> KeptKeys:
        """The openings alone."""
        none, nothing = _digest([]), slice(0, 0)
        entries = [entry._replace(own_keys=none, means=nothing) for entry in self.entries]
        return KeptKeys(bytes(32), entries, (torch.empty(0), torch.empty(0, 0), torch.empty(0)), self.starts)


@dataclass(frozen=True)
class KeysFile:
    """The file of a store's keys. Whoever changes it holds the store's lock.

    Attributes:
        about: the store's `about`, which says what model the keys are for.
    """

    path: Path
    about: Mapping[str, Any]

    def sample_digest(self, files: Mapping[str, str]) -> bytes:
        """SHA-256 of the model, of the names and files of those of these tasks that are sampled, and of whether there
        are others (if not, all keys are computed together)."""
        own = sampled(files)
        digest = hashlib.sha256(model_digest(self.about) + bytes([len(files) > len(own)]))
        for name in own:
            digest.update(f"{name}\n{files[name]}\n".encode())
        return digest.digest()

    def write(self, files: Mapping[str, str], openings: Mapping[str, Opening], known: KnownKeys) -> None:
        """Write the keys of these tasks atomically. openings: as `KeptKeys.openings`. Raises OSError."""
        centre, keys, bias = (part.cpu().contiguous() for part in known.discriminant)
        own = sorted((rows.start, rows.stop, files[name]) for name, rows in known.rows.items())
        entries, end = [], 0
        for first, last, file in own:
            size = len(openings[file].start)
            entries.append(Entry(file, openings[file].digest, "", "", slice(first, last), slice(end, end + size)))
            end += size
        starts = memoryview(b"".join(openings[file].start for _, _, file in own))
        kept = KeptKeys(self.sample_digest(files), entries, (centre, keys, bias), starts)
        digests = [(entry, *kept.digests(entry)) for entry in entries]
        self._put(replace(kept, entries=[entry._replace(own_keys=of, own_start=at) for entry, of, at in digests]))

    def _put(self, kept: KeptKeys) -> None:
        """Write those parts of `kept` that its entries name."""
        entries, (centre, keys, bias) = kept.entries, kept.discriminant
        means = sum(entry.means.stop - entry.means.start for entry in entries)
        head = HEAD.pack(b"", kept.sample, len(entries), means, len(centre), MADE)[32:].ljust(BEGIN - 32, b"\0")
        table = b"".join(
            ENTRY.pack(
                *map(bytes.fromhex, (entry.file, entry.opening, entry.own_keys, entry.own_start)),
                *(own.stop - own.start for own in (entry.means, entry.start)),
            )
            for entry in entries
        )
        content = head + table + _bytes(centre)
        runs = _joined(entry.means for entry in entries)
        rows = [_bytes(part[run]) for part in (bias, keys) for run in runs]
        starts = [kept.starts[run] for run in _joined(entry.start for entry in entries)]
        write(self.path, hashlib.sha256(content).digest(), content, *rows, *starts)

    def read(self) -> KeptKeys | None:
        """The file's content; None if it does not exist, is damaged, or is of another version."""
        kept = self._mapped()
        if kept is None:
            return None
        return kept if all(kept.digests(entry) == (entry.own_keys, entry.own_start) for entry in kept.entries) else None

    def _mapped(self) -> KeptKeys | None:
        """Like `read`, without checking the tasks' parts."""
        try:
            whole = torch.from_file(str(self.path), size=self.path.stat().st_size, dtype=torch.uint8)
            data = memoryview(whole.numpy().data)
            digest, sample, count, means, width, made = HEAD.unpack_from(data)
            numbers = BEGIN + ENTRY.size * count
            end = numbers + 4 * width
            if made != MADE or digest != hashlib.sha256(data[32:end]).digest():
                return None
            entries = _entries(data[BEGIN:numbers])
            starts = end + 4 * (means + means * width)
            last = entries[-1] if entries else Entry("", "", "", "", slice(0, 0), slice(0, 0))
            if last.means.stop != means or len(data) != starts + last.start.stop:
                return None
        except (OSError, RuntimeError, ValueError, struct.error):
            return None
        centre, bias, keys = whole[numbers:starts].view(torch.float32).split([width, means, means * width])
        return KeptKeys(sample, entries, (centre, keys.view(means, width), bias), data[starts:])

    def known(self, kept: KeptKeys, files: Mapping[str, str]) -> KnownKeys | None:
        """Known keys of these tasks; None if there are none, they were computed with another sample, or the file has
        other tasks, too."""
        rows = kept.rows
        if kept.sample != self.sample_digest(files) or not rows.keys() <= set(files.values()):
            return None
        return KnownKeys({name: rows[digest] for name, digest in files.items() if digest in rows}, kept.discriminant)

    def take_out(self, files: Mapping[str, str]) -> None:
        """Remove what is of other tasks than these, and the keys if they are of another sample. If that fails, the file
        is deleted. Raises OSError if that fails, too."""
        if not self.is_stale(files):
            return
        kept, there = self._mapped(), set(files.values())
        left = [] if kept is None else [entry for entry in kept.entries if entry.file in there]
        if kept is not None and left:
            kept = replace(kept, entries=left)
            try:
                self._put(kept if kept.sample == self.sample_digest(files) else kept.without_keys())
            except OSError:  # a full disk
                self.path.unlink()
        else:
            self.path.unlink()
        flush(self.path.parent)

    def is_stale(self, files: Mapping[str, str]) -> bool:
        """Whether it is of tasks other than these or of another version, or cannot be read."""
        try:
            with self.path.open("rb") as file:
                _, _, count, _, _, made = HEAD.unpack(file.read(HEAD.size))
                file.seek(BEGIN)
                table = file.read(min(ENTRY.size * count, self.path.stat().st_size))
        except FileNotFoundError:
            return False
        except (OSError, struct.error):
            return True
        if made != MADE or len(table) != ENTRY.size * count:
            return True
        there = {table[at : at + DIGEST].hex() for at in range(0, len(table), ENTRY.size)}
        return not there <= set(files.values())

    def wrong(self, files: Mapping[str, str], *, is_right: bool) -> list[str]:
        """Say what is wrong with it, given these tasks: at most one line. A file of another version is unused, thus not
        wrong.

        Args:
            is_right: whether it could be read and its openings are those of the tasks' files.
        """
        try:
            with self.path.open("rb") as file:
                made = HEAD.unpack(file.read(HEAD.size))[-1]
        except FileNotFoundError:
            return []
        except (OSError, struct.error):
            made = MADE
        if made != MADE or (is_right and not self.is_stale(files)):
            return []
        return [f"{self.path}: {UNUSABLE}"]


def _entries(table: memoryview) -> list[Entry]:
    found, mean, start = [], 0, 0
    for *digests, means, size in ENTRY.iter_unpack(table):
        file, opening, own_keys, own_start = (digest.hex() for digest in digests)
        own = slice(mean, mean + means), slice(start, start + size)
        found.append(Entry(file, opening, own_keys, own_start, *own))
        mean, start = mean + means, start + size
    return found


def _joined(parts: Iterable[slice]) -> list[slice]:
    """Merge adjacent slices."""
    found: list[slice] = []
    for own in parts:
        if found and found[-1].stop == own.start:
            found[-1] = slice(found[-1].start, own.stop)
        else:
            found.append(own)
    return found


def _digest(parts: Iterable[memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.flatten().numpy().data.cast("B") if tensor.numel() else memoryview(b"")
