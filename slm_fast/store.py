"""The store: all tasks in a directory, one file each, and a manifest that says which of them count.

    manifest.json                           what the store is, and the SHA-256 of each task's file
    tasks/<name>/<digest>.safetensors       one task

A commit writes the task's file, flushes it to disk and renames it into place, then does the same with the manifest.
The manifest is the last thing that changes, so after a kill at any point the store is the old one or the new one.
One process writes at a time (a file lock); any number read.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from slm_fast.errors import InputError, WorkError, one_line
from slm_fast.fields import read_json
from slm_fast.schema import FORMAT, check_manifest, check_task, task_path
from slm_fast.tasks import LearnedTask

MANIFEST = "manifest.json"
TASK_FILE = re.compile(r"[0-9a-f]{64}\.safetensors(\.part)?")


def task_to_bytes(task: LearnedTask) -> bytes:
    """A task as one safetensors file: the same task always gives the same bytes."""
    tensors = dict(task.router)
    for module, (lora_a, lora_b) in task.values.items():
        tensors[f"values.{module}.lora_a"] = lora_a
        tensors[f"values.{module}.lora_b"] = lora_b
    if task.head is not None:
        tensors["head.weight"], tensors["head.bias"] = task.head
    about = {"labels": task.labels and list(task.labels), "name": task.name, "options": dict(task.options)}
    # One entry: with several, safetensors writes them in an order that changes from run to run.
    metadata = {"slm_fast": json.dumps(about, sort_keys=True, ensure_ascii=False)}
    return safetensors.torch.save({key: t.cpu().contiguous() for key, t in sorted(tensors.items())}, metadata)


def task_from_file(path: Path, digest: str) -> LearnedTask:
    """Read a task back. Raises WorkError when the file is missing, cut short, or not what the manifest says."""
    return _task_from(_read(path, digest), path)


def _read(path: Path, digest: str) -> bytes:
    """The bytes of a task's file, if they are those that the manifest means."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WorkError(f"{path}: cannot be read: {error.strerror}") from None
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise WorkError(f"{path}: damaged: SHA-256 is {found[:12]}..., the manifest says {digest[:12]}...")
    return data


def _task_from(data: bytes, path: Path) -> LearnedTask:
    try:
        tensors = safetensors.torch.load(data)
        header = read_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise WorkError(f"{path}: not a task file: {one_line(error)}") from None
    return check_task((header.get("__metadata__") or {}).get("slm_fast"), tensors, path)


class Store:
    """A directory of tasks for one kind of model.

    `about` is what its tasks have in common: the backbone's id and fingerprint and the model's configuration.
    `files` maps each task's name to the SHA-256 of its file.
    """

    patience = 30.0  # seconds a writer waits for another one, whose commit takes far less

    def __init__(self, path: str | Path, about: Mapping[str, Any], files: Mapping[str, str]) -> None:
        self.path, self.about, self.files = Path(path), dict(about), dict(files)

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open a store that exists.

        Raises:
            InputError: there is none. WorkError: its manifest is damaged or of a newer format.
        """
        manifest = Path(path) / MANIFEST
        try:
            data = manifest.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{path}: not a store (no {MANIFEST}); `slm-fast learn {path} ...` makes one") from None
        except OSError as error:
            raise WorkError(f"{manifest}: cannot be read: {error.strerror}") from None
        return cls(path, *check_manifest(data, manifest))

    @classmethod
    def exists(cls, path: str | Path) -> bool:
        return os.path.exists(Path(path) / MANIFEST)

    def file(self, name: str) -> Path:
        return self.path / task_path(name, self.files[name])

    def read(self, name: str) -> tuple[LearnedTask, bytes]:
        """One task and the bytes of its file. Raises WorkError when they are not what the manifest says."""
        file = self.file(name)
        data = _read(file, self.files[name])
        task = _task_from(data, file)
        if task.name != name:
            raise WorkError(f"{file}: holds task {task.name!r}, the manifest says {name!r}")
        return task, data

    def load(self) -> list[LearnedTask]:
        """All tasks, by name. A reader whose task a writer takes away meanwhile starts again from the new manifest."""
        manifest = self.path / MANIFEST
        while True:
            before = manifest.stat()
            self.files = Store.open(self.path).files
            try:
                return [self.read(name)[0] for name in sorted(self.files)]
            except WorkError:
                # Every commit is another file in the manifest's place, also one that takes a change back.
                now = manifest.stat()
                if (now.st_ino, now.st_mtime_ns) == (before.st_ino, before.st_mtime_ns):
                    raise

    def commit(self, *, add: Sequence[LearnedTask] = (), remove: Sequence[str] = ()) -> None:
        """Make a new version of the store: on disk it is there whole, or not at all.

        Raises:
            InputError: a task to add is there already, or one to remove is not.
            WorkError: the disk is full, cannot be written, or another process keeps it; the store is as it was.
        """
        with self._writing():
            for task in add:
                if task.name in self.files:
                    raise InputError(f"task {task.name!r}: already in {self.path}; forget it first to learn it anew")
            for name in remove:
                if name not in self.files:
                    raise InputError(f"task {name!r}: not in {self.path}; tasks: {', '.join(self.files) or 'none'}")
            files = {name: digest for name, digest in self.files.items() if name not in remove}
            for task in add:
                data = task_to_bytes(task)
                files[task.name] = hashlib.sha256(data).hexdigest()
                self._place(task.name, files[task.name], data)
            self._finish(files)

    def save(self, tasks: Sequence[LearnedTask]) -> None:
        """Make the store hold exactly these tasks, of which it may already hold some.

        Raises:
            InputError: it holds a task that is not among them, or a different one of the same name.
            WorkError: the disk is full or cannot be written; the store is as it was.
        """
        written = {task.name: task_to_bytes(task) for task in tasks}
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in written.items()}
        with self._writing():
            for name, digest in self.files.items():
                if digests.get(name) != digest:
                    what = "another task of this name" if name in digests else "it, and this model does not"
                    raise InputError(
                        f"task {name!r}: {self.path} holds {what}; save elsewhere, or forget it there first"
                    )
            for name in sorted(digests.keys() - self.files.keys()):
                self._place(name, digests[name], written[name])
            self._finish(digests)

    def merge(self, sources: Sequence[Store]) -> None:
        """Copy the tasks of other stores into this one.

        Raises:
            InputError: a source is of another backbone or configuration, or holds another task of the same name.
            WorkError: a file is damaged, or cannot be written; the store is as it was.
        """
        with self._writing():
            files, origin = dict(self.files), dict.fromkeys(self.files, self.path)
            for source in sources:
                check_same(source.about, self.about, str(source.path), str(self.path))
                for name, digest in source.files.items():
                    if files.get(name, digest) != digest:
                        raise InputError(
                            f"task {name!r}: {origin[name]} and {source.path} hold different tasks of this name"
                        )
                    files[name], origin[name] = digest, source.path
            for source in sources:
                for name in sorted(source.files.keys() - self.files.keys()):
                    if origin[name] == source.path:
                        self._place(name, files[name], source.read(name)[1])
            self._finish(files)

    def verify(self) -> list[str]:
        """Everything that is wrong with the store, a line each; an empty list when nothing is."""
        wrong = []
        for name in sorted(self.files):
            try:
                self.read(name)
            except WorkError as error:
                wrong.append(str(error))
        return wrong

    # Writing

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the store's lock, with what is on disk read anew."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise WorkError(f"{self.path}: cannot be written: {error.strerror}") from None
        try:
            self._lock(lock)
            if Store.exists(self.path):
                now = Store.open(self.path)
                check_same(now.about, self.about, str(self.path), "this model")
                self.files = now.files
            yield
        except OSError as error:
            reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            raise WorkError(f"{self.path}: cannot be written: {reason}; the store is as it was") from None
        finally:
            os.close(lock)  # lets the lock go

    def _lock(self, lock: int) -> None:
        until = time.monotonic() + self.patience
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    raise WorkError(f"{self.path}: another process is writing to this store; try again later") from None
                time.sleep(0.05)

    def _place(self, name: str, digest: str, data: bytes) -> None:
        file = self.path / task_path(name, digest)
        folder = file.parent
        if not folder.is_dir():
            folder.mkdir(parents=True)
            for made in (folder.parent, self.path):
                _flush_directory(made)
        _write(file, data)
        _flush_directory(folder)

    def _finish(self, files: Mapping[str, str]) -> None:
        """Commit the manifest, then clear away what it no longer names."""
        tasks = {name: {"file": task_path(name, digest), "sha256": digest} for name, digest in files.items()}
        content = {"format": FORMAT, "model": self.about, "tasks": tasks}
        _write(self.path / MANIFEST, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
        self.files = dict(files)
        try:
            _flush_directory(self.path)
        except OSError as error:
            raise WorkError(f"{self.path}: the change is made, but a power cut may undo it: {error.strerror}") from None
        with suppress(OSError):  # the next commit tries again
            for path in self.leftovers():
                if path.is_dir():
                    path.rmdir()
                else:
                    path.unlink(missing_ok=True)

    def leftovers(self) -> list[Path]:
        """What an interrupted commit left behind: it lies in the store and the manifest does not name it."""
        tasks, part = self.path / "tasks", self.path / f"{MANIFEST}.part"
        found = [part] if part.exists() else []
        for folder in sorted(tasks.iterdir()) if tasks.is_dir() else []:
            if folder.is_dir():
                files = list(folder.iterdir())
                named = self.file(folder.name) if folder.name in self.files else None
                ours = [file for file in files if TASK_FILE.fullmatch(file.name) and file != named]
                found += sorted(ours)
                if folder.name not in self.files and ours == files:
                    found.append(folder)
        return found


def check_same(got: Mapping[str, Any], expected: Mapping[str, Any], got_from: str, expected_by: str) -> None:
    """Raise InputError unless two stores, or a store and a model, are of one backbone and configuration."""
    for part, theirs, ours in (("", got, expected), ("config.", got["config"], expected["config"])):
        for key in sorted(theirs.keys() | ours.keys()):
            field = part + key
            if field not in ("backbone", "config") and theirs.get(key) != ours.get(key):  # the backbone may have moved
                raise InputError(f"{got_from}: {field} is {theirs.get(key)!r}, {expected_by} has {ours.get(key)!r}")


def _write(path: Path, data: bytes) -> None:
    """Put `data` at `path`, all of it or none: write beside it, flush to disk, rename, flush the directory."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
