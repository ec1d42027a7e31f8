"""Reading a store, without a lock, even while others write.

manifest.json                           description of the store, and the SHA-256 of each task's file
tasks/<name>/<digest>.safetensors       one task
.lock                                   held by writers; says whether one was interrupted (`Store._mark`, `_announce`)
.reserve                                space for a manifest on a full disk
.sum                                    sum over tasks (`slm_fast.kept_sum`), if there are many
.keys                                   what routing computes from tasks (`slm_fast.kept_keys`), once opened
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_fast.collection import without_collection
from slm_fast.covariance import NOTHING, Kept
from slm_fast.errors import InputError, WorkError, memory_for, warn
from slm_fast.exact_sum import ExactSum
from slm_fast.files import locked, path_of
from slm_fast.kept_keys import KeysFile
from slm_fast.kept_sum import KeptSum, SumFile, SumProof
from slm_fast.mapped_task import Opening, map_task, opening_of, read_opening
from slm_fast.schema import check_fits, check_manifest, check_scatter, task_path
from slm_fast.task_file import DamagedFile, read_file, task_from_bytes
from slm_fast.tasks import LearnedTask

if TYPE_CHECKING:
    from typing_extensions import Self

MANIFEST = "manifest.json"
LOCK, RESERVE, SUM, KEYS = ".lock", ".reserve", ".sum", ".keys"
PATIENT_READS, MOST_READS = 3, 100  # attempts of a reader beside a busy writer before it takes the lock, and in all
CACHES = (SUM, KEYS)
LEAVE_OUT = "; --skip-damaged (skip_damaged=True) opens the store without it"
TASK_FILE = re.compile(r"[0-9a-f]{64}\.safetensors(\.part)?")


class StoreView:
    """A directory of tasks for one kind of model.

    Attributes:
        about: what its tasks share: the backbone's id and fingerprint and the model's configuration.
    """

    patience = 30.0  # seconds that a writer waits for another one; a commit takes far less
    poll = 0.5  # default interval, in seconds, for watching it for changes

    def __init__(self, path: str | Path, about: Mapping[str, Any], files: Mapping[str, str]) -> None:
        self.path, self.about = path_of(path), dict(about)
        # `files`, and SHA-256 of the manifest that they come from. An interrupt must not part them.
        self._seen: tuple[dict[str, str], bytes] = dict(files), b""
        self.kept = NOTHING  # results for the tasks together, found by `load`
        self._elsewhere: set[str] = set()  # SHA-256 of files that are damaged here; their bytes came from elsewhere
        self._digests: dict[str, str] = {}  # SHA-256 of a task's file -> its `Opening.digest`
        self._openings: dict[str, Opening] = {}  # likewise, of tasks found by `load`, until they are kept

    @property
    def files(self) -> dict[str, str]:
        """Task name -> SHA-256 of its file, as last seen by this object."""
        return self._seen[0]

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open an existing store.

        Raises:
            InputError: there is none.
            WorkError: its manifest is damaged or of a newer format.
        """
        store = cls(path, {}, {})
        store.about = store._look_anew()
        return store

    @classmethod
    def exists(cls, path: str | Path) -> bool:
        """Whether there is a store. If not, one can be made there: raises InputError for a file, and for a folder that
        has task files but no manifest."""
        return cls(path, {}, {})._exists()

    def _exists(self) -> bool:
        if not os.path.exists(self.path / MANIFEST):
            self._check_free()
        return os.path.exists(self.path / MANIFEST)

    def _check_free(self) -> None:
        """Raise InputError if the path is a file, or has task files that no manifest names (an incomplete copy of a
        store), except those of an interrupted first commit."""
        there = next((path for path in (self.path, *self.path.parents) if os.path.exists(path)), Path())
        if not there.is_dir():
            says = "is a file, expected a folder"
            raise InputError(f"{self.path}: {says if there == self.path else f'{there} {says}'}")
        if not os.path.isdir(self.path / "tasks"):
            return
        try:
            found = {file.stem for file in self.path.glob("tasks/*/*.safetensors") if TASK_FILE.fullmatch(file.name)}
            lock = self.path / LOCK
            begun = lock.read_bytes().decode(errors="replace").split() if found and lock.exists() else []
        except OSError as error:
            raise WorkError(f"{self.path}: cannot be read: {error.strerror}") from None
        if found - set(begun) and not os.path.exists(self.path / MANIFEST):  # no other process has made it meanwhile
            says = f"restore {MANIFEST}, or name another folder"
            raise InputError(f"{self.path}: has task files but no {MANIFEST}; {says}")

    def again(self) -> Self:
        """The same store, as this object knows it, for another thread."""
        return type(self)(self.path, self.about, self.files)

    @property
    def where(self) -> str:
        """Its location for messages."""
        return str(self.path)

    def bring(self) -> None:
        """Fetch the current state; a folder has it already."""

    def glance(self) -> object:
        """A value that differs whenever the store has changed, or is gone."""
        return _stamp(self.path / MANIFEST)

    def stamp(self, name: str) -> object:
        """A value that differs whenever a task's file has changed; the error's number if it is gone. None: what happens
        to it is harmless."""
        return _stamp(self.file(name))

    def file(self, name: str) -> Path:
        return self.path / task_path(name, self.files[name])

    @property
    def _sum(self) -> SumFile:
        return SumFile(self.path / SUM, self.about)

    @property
    def _keys(self) -> KeysFile:
        return KeysFile(self.path / KEYS, self.about)

    # Reading

    def read(self, name: str, *, thorough: bool = False) -> tuple[LearnedTask, bytes]:
        """A task and the bytes of its file. thorough: also check what takes long, that its scatter is valid.

        Raises:
            WorkError: the file is not what the manifest says, or does not fit the store's model.
        """
        file = self.file(name)
        with memory_for(str(file)):
            data = self._bytes(name)
            try:
                task = task_from_bytes(data, file)
                if task.name != name:
                    raise WorkError(f"{file}: holds task {task.name!r}, the manifest says {name!r}")
                if "shapes" in self.about:
                    check_fits(task, self.about["shapes"], self.about["config"], file=file)
                if thorough:
                    check_scatter(task, file)
            except WorkError as error:
                raise DamagedFile(str(error)) from None
        return task, data

    def _bytes(self, name: str) -> bytes:
        """Bytes of a task's file. Raises WorkError if they are not what the manifest says."""
        return read_file(self.file(name), self.files[name])

    @staticmethod
    def remedy(file: Path) -> str:
        """What to do about the damaged file of a task: an addition to the error message."""
        return f"{LEAVE_OUT}, `slm-fast forget {file.parents[2]} {file.parent.name}` removes it"

    @classmethod
    def on_damage(cls, file: Path) -> str:
        """Called with a file that proves damaged when a part of it is used; returns an addition to the error
        message."""
        return cls.remedy(file)

    def _with_remedy(self, name: str, error: WorkError) -> WorkError:
        """A task's error that, if its file is damaged, says what to do."""
        return WorkError(f"{error}{self.remedy(self.file(name))}") if isinstance(error, DamagedFile) else error

    def let_go(self) -> None:
        """Free the results of `load` that are needed only for keeping them."""
        self._openings = {}

    def load(self, *, known: Mapping[str, str] | None = None, skip_damaged: bool = False) -> list[LearnedTask]:
        """All tasks, by name, of one version of the store, whatever others write meanwhile.

        Results kept for the tasks together are put into `kept`. Files of tasks that these cover are read and checked on
        first use (`map_task`).

        Args:
            known: task name -> SHA-256 of tasks that need not be read.
            skip_damaged: leave out damaged tasks, with a warning for each, rather than raise WorkError for the first.
                Every file is then read whole.
        """
        found: dict[str, LearnedTask] = {}
        keys, later, summed = None, None, dict[str, str]()
        fresh = known is None and not skip_damaged
        self._openings = {}
        if fresh:
            keys, later = self._keys.read(), self._sum.later()
            if keys is None:
                kept = later()
                later = lambda: kept  # noqa: E731
                summed = dict(kept.opening) if kept else {}
            else:
                self._openings = keys.openings

        def mapped(name: str, opening: Opening | None, *, checked: bool = False) -> LearnedTask | None:
            file, digest = self.file(name), self.files[name]
            if opening is None or digest in self._elsewhere:
                return None
            task = map_task(file, digest, opening, checked=checked, on_damage=self.on_damage)
            if task is None or task.name != name:
                return None
            self._openings[digest], self._digests[digest] = opening, opening.digest
            return task

        def look(name: str) -> None:
            digest = self.files[name]
            task = mapped(name, self._openings.get(digest)) if fresh else None
            if task is None and digest in summed:
                opening = read_opening(self.file(name))
                if opening is not None and opening.digest == summed[digest]:
                    task = mapped(name, opening, checked=True)
            if task is None:
                task, data = self.read(name, thorough=skip_damaged)
                opening = opening_of(data)
                self._digests[digest] = opening.digest
                if fresh:  # the bytes read of many tasks may exceed memory
                    task = mapped(name, opening) or task
            found[name] = task

        with without_collection():
            wrong = self.look_at(look, known or {})
        for name, error in wrong.items():
            if not skip_damaged:
                raise self._with_remedy(name, error)
            warn(f"{error}; left out")
        self.kept = Kept(
            None if later is None else partial(_summed, later, dict(self.files)),
            None if keys is None else self._keys.known(keys, self.files),
        )
        return [found[name] for name in sorted(self.files) if name in found]

    def verify(self) -> list[str]:
        """Everything that is wrong with the store, one line each; empty if nothing is."""

        proof, kept, own = SumProof(self._sum), self._keys.read(), dict[str, bool]()
        openings = {} if kept is None else kept.openings

        def look(name: str) -> None:
            (task, data), digest = self.read(name, thorough=True), self.files[name]
            opening = opening_of(data)
            proof.take(digest, opening.digest, task.router)
            if digest in openings:
                own[digest] = openings[digest] == opening

        wrong = [str(self._with_remedy(name, error)) for name, error in self.look_at(look).items()]
        is_right = kept is not None and all(own.values())
        return wrong or [*proof.wrong(), *self._keys.wrong(self.files, is_right=is_right)]

    def look_at(self, look: Callable[[str], None], known: Mapping[str, str] | None = None) -> dict[str, WorkError]:
        """Call `look` for each task of the current store except those `known`. Returns the errors that it raised, by
        name.

        A writer may remove a file meanwhile. The manifest has then changed, and what was wrong or is new is looked at
        again. After a few attempts writers are made to wait, so that this ends. Afterwards, `files` are those seen.
        """
        seen, wrong = dict(known or {}), dict[str, WorkError]()
        for attempt in range(MOST_READS):
            with self._writers_waiting(wanted=attempt >= PATIENT_READS) as waiting:
                version, wrong = self._version(), {}
                self._look_anew()
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

    def _look_anew(self) -> dict[str, Any]:
        """Read the manifest, check it if it has changed since it was last read, and return what it says about the
        model. Raises as `open` does."""
        manifest = self.path / MANIFEST
        try:
            data = manifest.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            self._check_free()
            hint = f"`slm-fast learn {self.path} ...` makes one"
            raise InputError(f"{self.path}: not a store (no {MANIFEST}); {hint}") from None
        except OSError as error:
            raise WorkError(f"{manifest}: cannot be read: {error.strerror}") from None
        if (digest := hashlib.sha256(data).digest()) == self._seen[1]:
            return self.about
        with memory_for(str(manifest)):
            about, files = check_manifest(data, manifest)
        self._seen = files, digest
        return about

    def _version(self) -> tuple[int, int]:
        """Identifies the manifest's file: every commit replaces it, even one that undoes a change."""
        try:
            now = (self.path / MANIFEST).stat()
        except OSError:
            return 0, 0
        return now.st_ino, now.st_mtime_ns

    @contextmanager
    def _writers_waiting(self, *, wanted: bool) -> Iterator[bool]:
        """Keep writers away inside the block, if `wanted` and possible. Yields whether that is so."""
        with ExitStack() as stack:
            waiting = False
            if wanted:
                with suppress(OSError):  # there is no lock file, or it cannot be read
                    waiting = stack.enter_context(locked(self.path / LOCK, self.patience, shared=True))
            yield waiting

    def leftovers(self, names: Iterable[str] | None = None) -> list[Path]:
        """What is to be removed: what an interrupted commit left in the store, which the manifest does not name, and
        caches that are damaged or not of its tasks. names: tasks to look at. Default: all."""
        tasks = self.path / "tasks"
        parts = (self.path / f"{name}.part" for name in (MANIFEST, RESERVE, SUM, KEYS))
        found = [part for part in parts if part.exists()]
        found += [self._sum.path] if self._sum.is_stale(self.files.values()) else []
        found += [self._keys.path] if self._keys.is_stale(self.files) else []
        if names is None:
            names = [folder.name for folder in tasks.iterdir()] if tasks.is_dir() else []
        for folder in [tasks / name for name in sorted(names)]:
            if folder.is_dir():
                files = list(folder.iterdir())
                named = self.file(folder.name) if folder.name in self.files else None
                ours = [file for file in files if TASK_FILE.fullmatch(file.name) and file != named]
                found += sorted(ours)
                if folder.name not in self.files and ours == files:
                    found.append(folder)
        return found


def _summed(later: Callable[[], KeptSum | None], files: Mapping[str, str]) -> tuple[frozenset[str], ExactSum] | None:
    """Names of the tasks in the kept sum, and the sum; None if it is also of other tasks."""
    kept = later()
    if kept is None or not kept.opening.keys() <= set(files.values()):
        return None
    return frozenset(name for name, digest in files.items() if digest in kept.opening), kept.total


def _stamp(file: Path) -> object:
    try:
        now = file.stat()
    except OSError as error:
        return error.errno
    return now.st_ino, now.st_mtime_ns, now.st_size
