"""The store: all tasks in a directory, one file each, and a manifest that says which of them count.

    manifest.json                           what the store is, and the SHA-256 of each task's file
    tasks/<name>/<digest>.safetensors       one task
    .lock, .reserve                         held by who writes; room for a manifest on a disk that is full

A commit writes the task's file, flushes it to disk and renames it into place, then does the same with the manifest.
The manifest is the last thing that changes, so after a kill at any point the store is the old one or the new one.
One process writes at a time (a file lock); any number read, beside it too.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from slm_fast.errors import InputError, SlmError, WorkError, memory_for, some_of, warn
from slm_fast.files import Reserve, flush_directory, locked, path_of, write
from slm_fast.schema import FORMAT, WHEN_KNOWN, check_fits, check_manifest, check_scatter, task_path
from slm_fast.task_file import read_file, task_from_bytes, task_from_file, task_to_bytes
from slm_fast.tasks import LearnedTask

MANIFEST = "manifest.json"
LOCK, RESERVE = ".lock", ".reserve"
PATIENT_READS, MOST_READS = 3, 100  # how often a reader begins again beside a busy writer before it asks for the lock
TASK_FILE = re.compile(r"[0-9a-f]{64}\.safetensors(\.part)?")


class Store:
    """A directory of tasks for one kind of model.

    `about` is what its tasks have in common: the backbone's id and fingerprint and the model's configuration.
    `files` maps each task's name to the SHA-256 of its file, as this object last saw it.
    """

    patience = 30.0  # seconds a writer waits for another one, whose commit takes far less

    def __init__(self, path: str | Path, about: Mapping[str, Any], files: Mapping[str, str]) -> None:
        self.path, self.about, self.files = path_of(path), dict(about), dict(files)

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open a store that exists.

        Raises:
            InputError: there is none. WorkError: its manifest is damaged or of a newer format.
        """
        manifest = path_of(path) / MANIFEST
        try:
            data = manifest.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{path}: not a store (no {MANIFEST}); `slm-fast learn {path} ...` makes one") from None
        except OSError as error:
            raise WorkError(f"{manifest}: cannot be read: {error.strerror}") from None
        with memory_for(str(manifest)):
            return cls(path, *check_manifest(data, manifest))

    @classmethod
    def exists(cls, path: str | Path) -> bool:
        return os.path.exists(path_of(path) / MANIFEST)

    def file(self, name: str) -> Path:
        return self.path / task_path(name, self.files[name])

    # Reading

    def read(self, name: str, *, thorough: bool = False) -> tuple[LearnedTask, bytes]:
        """One task and the bytes of its file. `thorough`: what takes long is checked too, that its scatter is one.

        Raises WorkError when they are not what the manifest says, or do not fit the store's model.
        """
        file = self.file(name)
        with memory_for(str(file)):
            data = read_file(file, self.files[name])
            task = task_from_bytes(data, file)
            if task.name != name:
                raise WorkError(f"{file}: holds task {task.name!r}, the manifest says {name!r}")
            if "shapes" in self.about:
                check_fits(task, self.about["shapes"], self.about["config"], file=file)
            if thorough:
                check_scatter(task, file)
        return task, data

    def load(self, *, known: Mapping[str, str] | None = None, skip_damaged: bool = False) -> list[LearnedTask]:
        """All tasks, by name, of one version of the store, whatever others write meanwhile.

        Args:
            known: the SHA-256 of tasks that need not be read, by name.
            skip_damaged: leave out tasks that are damaged, with a warning, rather than raise WorkError for the first.
        """
        found: dict[str, LearnedTask] = {}

        def look(name: str) -> None:
            found[name] = self.read(name, thorough=skip_damaged)[0]

        for error in self.look_at(look, known or {}).values():
            if not skip_damaged:
                raise error
            warn(f"{error}; left out")
        return [found[name] for name in sorted(self.files) if name in found]

    def verify(self) -> list[str]:
        """Everything that is wrong with the store, a line each; an empty list when nothing is."""

        def look(name: str) -> None:
            self.read(name, thorough=True)

        return [str(error) for error in self.look_at(look).values()]

    def look_at(self, look: Callable[[str], None], known: Mapping[str, str] | None = None) -> dict[str, WorkError]:
        """Call `look` for each task of the store as it is now but those `known`; the errors it raised, by name.

        A writer may take a file away meanwhile. Then the manifest is another one, and what was wrong or is new is
        looked at again. After a few times writers are asked to wait, so that this ends. `files` are those seen.
        """
        seen, wrong = dict(known or {}), dict[str, WorkError]()
        for attempt in range(MOST_READS):
            with self._writers_waiting(wanted=attempt >= PATIENT_READS) as waiting:
                version, wrong = self._version(), {}
                self.files = Store.open(self.path).files
                for name in sorted(self.files):
                    if seen.get(name) != self.files[name]:
                        try:
                            look(name)
                            seen[name] = self.files[name]
                        except WorkError as error:
                            wrong[name] = error
                if not wrong or waiting or self._version() == version:
                    break
        return wrong

    def _version(self) -> tuple[int, int]:
        """Every commit puts another file in the manifest's place, also one that takes a change back."""
        try:
            now = (self.path / MANIFEST).stat()
        except OSError:
            return 0, 0
        return now.st_ino, now.st_mtime_ns

    @contextmanager
    def _writers_waiting(self, *, wanted: bool) -> Iterator[bool]:
        """Keep writers away while the block runs, if that is wanted and can be had: whether it is so."""
        with ExitStack() as stack:
            waiting = False
            if wanted:
                with suppress(OSError):  # there never was a lock, or it may not be read
                    waiting = stack.enter_context(locked(self.path / LOCK, self.patience, shared=True))
            yield waiting

    # Writing

    def commit(self, *, add: Sequence[LearnedTask] = (), remove: Sequence[str] = ()) -> None:
        """Make a new version of the store: on disk it is there whole, or not at all.

        A task that is there, made from the same rows and options on another processor, stays as it is.

        Raises:
            InputError: a task to add is there already, or one to remove is not.
            WorkError: the disk is full, cannot be written, or another process keeps it; the store is as it was.
        """
        with self._writing():
            add = [task for task in add if not self._has(task)]
            for task in add:
                if task.name in self.files:
                    raise InputError(f"task {task.name!r}: already in {self.path}; forget it first to learn it anew")
            for name in remove:
                if name not in self.files:
                    raise InputError(f"task {name!r}: not in {self.path}; tasks: {some_of(self.files)}")
            files = {name: digest for name, digest in self.files.items() if name not in remove}
            for task in add:
                data = task_to_bytes(task)
                files[task.name] = hashlib.sha256(data).hexdigest()
                self._place(task.name, files[task.name], data)
            self._finish(files)

    def _has(self, task: LearnedTask) -> bool:
        """Whether the store holds a task of this name that was made from the same."""
        return task.name in self.files and _one_origin(task, self.read(task.name)[0])

    def save(self, tasks: Sequence[LearnedTask]) -> dict[str, str]:
        """Add those of these tasks that are not in the store yet. One that was made from the same rows and options, and
        came out otherwise (on another processor), is one that is there. SHA-256 of those that are there bit for bit.

        Raises:
            InputError: the store holds a different task of the same name.
            WorkError: the disk is full or cannot be written; the store is as it was.
        """
        with self._writing():
            files, same = dict(self.files), {}
            for task in tasks:
                data = task_to_bytes(task)
                digest = hashlib.sha256(data).hexdigest()
                if files.get(task.name, digest) == digest:
                    same[task.name] = digest
                if task.name not in files:
                    self._place(task.name, digest, data)
                    files[task.name] = digest
                elif files[task.name] != digest and not self._has(task):
                    raise InputError(
                        f"task {task.name!r}: {self.path} holds another task of this name; "
                        "save elsewhere, or forget it there first"
                    )
            self._finish(files)
        return same

    def merge(
        self, sources: Sequence[Store], *, prefer: str | Path | None = None, tasks: Collection[str] | None = None
    ) -> None:
        """Copy the tasks of other stores into this one.

        Of two tasks of one name that were made from the same rows and options, and came out otherwise (on another
        processor), the one that is there stays.

        Args:
            prefer: the store (this one or a source) whose task is taken where two hold different ones of a name.
            tasks: the names of those to copy; None means all.

        Raises:
            InputError: a source is of another backbone or configuration, or holds another task of the same name; no
            source holds a task to copy.
            WorkError: a file is damaged, or cannot be written; the store is as it was.
        """
        preferred = None if prefer is None else Path(prefer).resolve()
        if preferred is not None and preferred not in [store.path.resolve() for store in (self, *sources)]:
            raise InputError(f"prefer: expected one of the stores that are merged, got {prefer}")
        there = sorted({name for source in sources for name in source.files})
        for name in sorted(tasks or ()):
            if name not in there:
                raise InputError(f"task {name!r}: in none of the stores to copy from; tasks: {some_of(there)}")
        with self._writing():
            files, holder = dict(self.files), dict.fromkeys(self.files, self)
            for source in sources:
                check_same(source.about, self.about, str(source.path), str(self.path))
                files, holder = self._merged(source, files, holder, preferred, tasks)
            self._finish(files)

    def _merged(
        self,
        source: Store,
        files: Mapping[str, str],
        holder: Mapping[str, Store],
        preferred: Path | None,
        wanted: Collection[str] | None,
    ) -> tuple[dict[str, str], dict[str, Store]]:
        """`files`, and the store that each of them was found in, with those of one source more, which are copied."""
        taken: dict[str, str] = {}

        def look(name: str) -> None:
            taken.pop(name, None)
            digest = source.files[name]
            if files.get(name) == digest or (wanted is not None and name not in wanted):
                return
            task, data = source.read(name, thorough=True)
            if name in files and preferred != source.path.resolve():
                there, other = holder[name], task_from_file(self.path / task_path(name, files[name]), files[name])
                if preferred == there.path.resolve() or _one_origin(task, other):
                    return
                raise InputError(
                    f"task {name!r}: {there.path} and {source.path} hold different tasks of this name; "
                    "--prefer STORE says whose to take"
                )
            self._place(name, digest, data)
            taken[name] = digest

        for error in source.look_at(look).values():
            raise error
        now = {name: digest for name, digest in taken.items() if source.files.get(name) == digest}
        return {**files, **now}, {**holder, **dict.fromkeys(now, source)}

    def check_writable(self) -> None:
        """Raise WorkError unless this process may commit to the store: what can be known before a task is learned."""
        with self._named_errors():
            self.path.mkdir(parents=True, exist_ok=True)
            with locked(self.path / LOCK, 0):
                pass
            for folder in (self.path, self.path / "tasks"):
                if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
            raise WorkError(f"{self.path}: cannot be written: {reason}; the store is as it was") from None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the store's lock, with what is on disk read anew."""
        with self._named_errors():
            self.path.mkdir(parents=True, exist_ok=True)
            with locked(self.path / LOCK, self.patience) as held:
                if not held:
                    raise WorkError(f"{self.path}: another process is writing to this store; try again later")
                if Store.exists(self.path):
                    now = Store.open(self.path)
                    check_same(now.about, self.about, str(self.path), "this model")
                    self.files, self.about = now.files, {**self.about, **now.about}
                try:
                    yield
                except BaseException:
                    with suppress(SlmError):  # an interrupt may come when the new manifest is in place already
                        self.files = Store.open(self.path).files if Store.exists(self.path) else {}
                        self._clear()
                    raise

    def _place(self, name: str, digest: str, data: bytes) -> None:
        file = self.path / task_path(name, digest)
        folder = file.parent
        if not folder.is_dir():
            folder.mkdir(parents=True)
            for made in (folder.parent, self.path):
                flush_directory(made)
        write(file, data)
        flush_directory(folder)

    def _finish(self, files: Mapping[str, str]) -> None:
        """Commit the manifest, then clear away what it no longer names."""
        tasks = {name: {"file": task_path(name, digest), "sha256": digest} for name, digest in files.items()}
        content = {"format": FORMAT, "model": self.about, "tasks": tasks}
        data = (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
        reserve = Reserve(self.path / RESERVE)
        try:
            write(self.path / MANIFEST, data)
        except OSError as error:
            if len(files) >= len(self.files) or not reserve.spend(error):  # it is for making room only
                raise
            write(self.path / MANIFEST, data)
        self.files = dict(files)
        try:
            flush_directory(self.path)
        except OSError as error:
            raise WorkError(f"{self.path}: the change is made, but a power cut may undo it: {error.strerror}") from None
        self._clear()
        reserve.keep(len(data))

    def _clear(self) -> None:
        """Remove what the manifest does not name. What cannot be removed now, the next commit removes."""
        with suppress(OSError):
            for path in self.leftovers():
                if path.is_dir():
                    path.rmdir()
                else:
                    path.unlink(missing_ok=True)

    def leftovers(self) -> list[Path]:
        """What an interrupted commit left behind: it lies in the store and the manifest does not name it."""
        tasks = self.path / "tasks"
        found = [part for part in (self.path / f"{name}.part" for name in (MANIFEST, RESERVE)) if part.exists()]
        for folder in sorted(tasks.iterdir()) if tasks.is_dir() else []:
            if folder.is_dir():
                files = list(folder.iterdir())
                named = self.file(folder.name) if folder.name in self.files else None
                ours = [file for file in files if TASK_FILE.fullmatch(file.name) and file != named]
                found += sorted(ours)
                if folder.name not in self.files and ours == files:
                    found.append(folder)
        return found


def _one_origin(one: LearnedTask, other: LearnedTask) -> bool:
    """Whether two tasks were made from the same rows, options and backbone, as far as they say."""
    return one.origin is not None and one.origin == other.origin


def check_same(got: Mapping[str, Any], expected: Mapping[str, Any], got_from: str, expected_by: str) -> None:
    """Raise InputError unless two stores, or a store and a model, are of one backbone and configuration.

    Fields of `WHEN_KNOWN` are compared where both have them.
    """
    both = got.keys() & expected.keys()
    for name in sorted(both & {"tokens", "encoder_tokens"}):
        if got[name] != expected[name]:
            raise InputError(
                f"{got_from}: its {name.removesuffix('tokens')}tokenizer makes other tokens than that of {expected_by}"
            )
    parts = [name for name in ("config", "settings", "encoder_settings") if name in both]
    for part, theirs, ours in [("", got, expected), *((f"{name}.", got[name], expected[name]) for name in parts)]:
        for key in sorted(theirs.keys() | ours.keys()):
            if part + key in ("backbone", "config", "settings", "encoder_settings"):  # the backbone may have moved
                continue
            # Libraries of other versions have other settings.
            if (part + key in WHEN_KNOWN or "settings" in part) and (key not in theirs or key not in ours):
                continue
            if theirs.get(key) != ours.get(key):
                raise InputError(f"{got_from}: {part}{key} is {theirs.get(key)!r}, {expected_by} has {ours.get(key)!r}")
