"""What a gaussian router computes of all tasks, kept in a file beside a store's manifest, so that opening reads it.

    .keys   SHA-256 of what follows [32 bytes]; SHA-256 of the tasks that it is of [32]; how many tasks N, means M and
            numbers of a query D there are [8 each]; zeros up to 128; N times SHA-256 of a task's file and of two parts
            of it (`slm_fast.task_file.Digests`) [32 each]; bias [M], centre [D] and keys [M, D] float32

It is made of the tasks' files and nothing else, and may be deleted at any time. One that is damaged, or of other tasks
than the manifest names, is not used; whoever changes the store removes it first.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slm_fast.covariance import Discriminant
from slm_fast.files import write
from slm_fast.kept_sum import model_digest
from slm_fast.task_file import Digests

MADE = 1  # to be raised where the same tasks come to other keys
HEAD = struct.Struct("<32s32sQQQ")
BEGIN, ENTRY = 128, 96


@dataclass(frozen=True)
class KeptKeys:
    """The keys of some tasks, as views of the file: the kernel reads it when they are used and may let go of it.

    digests: of parts of each task's file, by the SHA-256 of all of it.
    """

    tasks: bytes  # `tasks_digest`
    digests: Mapping[str, Digests]
    discriminant: Discriminant


@dataclass(frozen=True)
class KeysFile:
    """The file of a store's keys. Who changes it holds the store's lock.

    about: of the store, whose model the keys are of.
    """

    path: Path
    about: Mapping[str, Any]

    def tasks_digest(self, files: Mapping[str, str]) -> bytes:
        """Of the model, and the names and files of its tasks, whose keys stand in the order of the names."""
        digest = hashlib.sha256(f"{MADE}\n".encode() + model_digest(self.about))
        for name in sorted(files):
            digest.update(f"{name}\n{files[name]}\n".encode())
        return digest.digest()

    def write(self, files: Mapping[str, str], digests: Mapping[str, Digests], discriminant: Discriminant) -> None:
        """Put the keys of these tasks there, whole or not at all. digests: as of `KeptKeys`. Raises OSError."""
        centre, keys, bias = (part.cpu().contiguous() for part in discriminant)
        head = HEAD.pack(b"", self.tasks_digest(files), len(files), *keys.shape)[32:].ljust(BEGIN - 32, b"\0")
        table = sorted((digest, *digests[digest]) for digest in files.values())
        content = [head, b"".join(bytes.fromhex(part) for entry in table for part in entry)]
        content += [part.numpy().tobytes() for part in (bias, centre, keys)]
        digest = hashlib.sha256()
        for part in content:
            digest.update(part)
        write(self.path, b"".join([digest.digest(), *content]))

    def read(self) -> KeptKeys | None:
        """None where there is none, or it is damaged."""
        try:
            whole = torch.from_file(str(self.path), size=self.path.stat().st_size, dtype=torch.uint8)
            data = memoryview(whole.numpy().data)
            digest, tasks, count, means, width = HEAD.unpack_from(data)
            numbers = BEGIN + ENTRY * count
            if len(data) != numbers + 4 * (means + width + means * width) or width == 0:
                return None
            if digest != hashlib.sha256(data[32:]).digest():
                return None
        except (OSError, RuntimeError, ValueError, struct.error):
            return None
        bias, centre, keys = whole[numbers:].view(torch.float32).split([means, width, means * width])
        entries = (data[at : at + ENTRY].hex() for at in range(BEGIN, numbers, ENTRY))
        found = {entry[:64]: Digests(entry[64:128], entry[128:]) for entry in entries}
        return KeptKeys(tasks, found, (centre, keys.view(means, width), bias))

    def is_stale(self, files: Mapping[str, str]) -> bool:
        """Whether it is of other tasks than these, or nobody can tell."""
        try:
            with self.path.open("rb") as file:
                return file.read(64)[32:] != self.tasks_digest(files)
        except FileNotFoundError:
            return False
        except OSError:
            return True

    def wrong(self, files: Mapping[str, str]) -> list[str]:
        """What is wrong with it beside these tasks: a line or none."""
        if not self.path.exists():
            return []
        kept, says = self.read(), "not of the store's tasks; delete it, it is made again where it is needed"
        return [] if kept and kept.tasks == self.tasks_digest(files) else [f"{self.path}: {says}"]
