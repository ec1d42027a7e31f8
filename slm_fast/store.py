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

from slm_fast.data import check_name
from slm_fast.errors import InputError, WorkError
from slm_fast.tasks import LearnedTask

FORMAT = 1
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
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WorkError(f"{path}: cannot be read: {error.strerror}") from None
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise WorkError(f"{path}: damaged: SHA-256 is {found[:12]}..., the manifest says {digest[:12]}...")
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return _task_from(tensors, json.loads(header["__metadata__"]["slm_fast"]))
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise WorkError(f"{path}: not a task file: {error}") from None


def _task_from(tensors: Mapping[str, Any], about: Mapping[str, Any]) -> LearnedTask:
    modules = sorted({key[len("values.") :].rsplit(".", 1)[0] for key in tensors if key.startswith("values.")})
    return LearnedTask(
        name=about["name"],
        labels=None if about["labels"] is None else tuple(about["labels"]),
        values={m: (tensors[f"values.{m}.lora_a"], tensors[f"values.{m}.lora_b"]) for m in modules},
        router={key: tensor for key, tensor in tensors.items() if not key.startswith(("values.", "head."))},
        head=(tensors["head.weight"], tensors["head.bias"]) if "head.weight" in tensors else None,
        options=about["options"],
    )


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
        try:
            content = json.loads(data.decode())
            version = content["format"]
            if version != FORMAT:
                raise WorkError(f"{manifest}: format {version}; this version of slm_fast reads format {FORMAT}")
            files = {name: entry["sha256"] for name, entry in content["tasks"].items()}
            for name in files:
                check_name(name)  # it becomes a path
            return cls(path, content["model"], files)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WorkError(f"{manifest}: damaged: {error}") from None

    @classmethod
    def exists(cls, path: str | Path) -> bool:
        return os.path.exists(Path(path) / MANIFEST)

    def file(self, name: str) -> Path:
        return self.path / "tasks" / name / f"{self.files[name]}.safetensors"

    def load(self) -> list[LearnedTask]:
        """All tasks, by name. A reader whose task a writer takes away meanwhile starts again from the new manifest."""
        manifest = self.path / MANIFEST
        while True:
            before = manifest.stat()
            self.files = Store.open(self.path).files
            try:
                return [task_from_file(self.file(name), self.files[name]) for name in sorted(self.files)]
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
                        data = source.file(name).read_bytes() if source.file(name).is_file() else b""
                        if hashlib.sha256(data).hexdigest() != files[name]:
                            raise WorkError(f"{source.file(name)}: missing or damaged")
                        self._place(name, files[name], data)
            self._finish(files)

    def verify(self) -> list[str]:
        """Everything that is wrong with the store, a line each; an empty list when nothing is."""
        wrong = []
        for name in sorted(self.files):
            try:
                check_name(name)
                task = task_from_file(self.file(name), self.files[name])
                if task.name != name:
                    wrong.append(f"{self.file(name)}: holds task {task.name!r}, the manifest says {name!r}")
            except (InputError, WorkError) as error:
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
        folder = self.path / "tasks" / name
        if not folder.is_dir():
            folder.mkdir(parents=True)
            for made in (folder.parent, self.path):
                _flush_directory(made)
        _write(folder / f"{digest}.safetensors", data)
        _flush_directory(folder)

    def _finish(self, files: Mapping[str, str]) -> None:
        """Commit the manifest, then clear away what it no longer names."""
        tasks = {
            name: {"file": f"tasks/{name}/{digest}.safetensors", "sha256": digest}
            for name, digest in sorted(files.items())
        }
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
                named = folder / f"{self.files.get(folder.name)}.safetensors"
                ours = [file for file in files if TASK_FILE.fullmatch(file.name) and file != named]
                found += sorted(ours)
                if folder.name not in self.files and ours == files:
                    found.append(folder)
        return found


def check_same(got: Mapping[str, Any], expected: Mapping[str, Any], got_from: str, expected_by: str) -> None:
    """Raise InputError unless two stores, or a store and a model, are of one backbone and configuration."""
    for key, ours in expected.items():
        if key != "backbone" and got.get(key) != ours:  # where the backbone was loaded from may differ
            raise InputError(f"{got_from}: {key} is {got.get(key)!r}, {expected_by} has {ours!r}")


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
