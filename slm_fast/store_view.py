"""A store as it is read: beside writers, without a lock.

manifest.json                           what the store is, and the SHA-256 of each task's file
tasks/<name>/<digest>.safetensors       one task
.lock, .reserve                         held by who writes; room for a manifest on a disk that is full
.sum                                    what tasks add up to (`slm_fast.kept_sum`), where there are many
.keys                                   what routing computes of tasks (`slm_fast.kept_keys`), once it was opened
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
from slm_fast.covariance import NOTHING, ExactSum, Kept
from slm_fast.errors import InputError, WorkError, memory_for, warn
from slm_fast.files import locked, path_of
from slm_fast.kept_keys import KeysFile
from slm_fast.kept_sum import KeptSum, SumFile, SumProof
from slm_fast.mapped_task import Opening, map_task, opening_of, read_opening
from slm_fast.schema import check_fits, check_manifest, check_scatter, task_path
from slm_fast.task_file import read_file, task_from_bytes
from slm_fast.tasks import LearnedTask

if TYPE_CHECKING:
    from typing_extensions import Self

MANIFEST = "manifest.json"
LOCK, RESERVE, SUM, KEYS = ".lock", ".reserve", ".sum", ".keys"
PATIENT_READS, MOST_READS = 3, 100  # how often a reader begins again beside a busy writer before it asks for the lock
TASK_FILE = re.compile(r"[0-9a-f]{64}\.safetensors(\.part)?")


class StoreView:
    """A directory of tasks for one kind of model.

    `about` is what its tasks have in common: the backbone's id and fingerprint and the model's configuration.
    `files` maps each task's name to the SHA-256 of its file, as this object last saw it.
    """

    patience = 30.0  # seconds a writer waits for another one, whose commit takes far less
    poll = 0.5  # between two looks of who follows it, in seconds, unless told otherwise

    def __init__(self, path: str | Path, about: Mapping[str, Any], files: Mapping[str, str]) -> None:
        self.path, self.about, self.files = path_of(path), dict(about), dict(files)
        self.kept = NOTHING  # of the tasks together, as `load` found it
        self._seen = b""  # SHA-256 of the manifest that says what `files` does
        self._digests: dict[str, str] = {}  # `Opening.digest` of tasks, by the SHA-256 of their files
        self._openings: dict[str, Opening] = {}  # so too, of those that `load` found, until they are kept

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a store that exists.

        Raises:
            InputError: there is none. WorkError: its manifest is damaged or of a newer format.
        """
        store = cls(path, {}, {})
        store.about = store._look_anew()
        return store

    @classmethod
    def exists(cls, path: str | Path) -> bool:
        return os.path.exists(path_of(path) / MANIFEST)

    def again(self) -> Self:
        """The same store as this object knows it, for another thread."""
        return type(self)(self.path, self.about, self.files)

    @property
    def where(self) -> str:
        """As it is shown."""
        return str(self.path)

    def bring(self) -> None:
        """Have here what there is now; of a folder, it is."""

    def glance(self) -> object:
        """What is another one whenever the store has changed, or is gone."""
        try:
            now = (self.path / MANIFEST).stat()
        except OSError as error:
            return error.errno
        return now.st_ino, now.st_mtime_ns, now.st_size

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
        """One task and the bytes of its file. `thorough`: what takes long is checked too, that its scatter is one.

        Raises WorkError when they are not what the manifest says, or do not fit the store's model.
        """
        file = self.file(name)
        with memory_for(str(file)):
            data = self._bytes(name)
            task = task_from_bytes(data, file)
            if task.name != name:
                raise WorkError(f"{file}: holds task {task.name!r}, the manifest says {name!r}")
            if "shapes" in self.about:
                check_fits(task, self.about["shapes"], self.about["config"], file=file)
            if thorough:
                check_scatter(task, file)
        return task, data

    def _bytes(self, name: str) -> bytes:
        """Of a task's file. Raises WorkError where they are not what the manifest says."""
        return read_file(self.file(name), self.files[name])

    @staticmethod
    def damaged(file: Path) -> str:
        """Told of a file in which damage is found when a part of it is used; what to say of that besides."""
        return ""

    def let_go(self) -> None:
        """Forget what `load` found and only keeping needs, which is memory."""
        self._openings = {}

    def load(self, *, known: Mapping[str, str] | None = None, skip_damaged: bool = False) -> list[LearnedTask]:
        """All tasks, by name, of one version of the store, whatever others write meanwhile.

        Of tasks that are in what is kept of them together, which stands in `kept` then, files are read and checked when
        they are used first (`map_task`).

        Args:
            known: the SHA-256 of tasks that need not be read, by name.
            skip_damaged: leave out tasks that are damaged, with a warning, rather than raise WorkError for the first.
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
            task = None if opening is None else map_task(file, digest, opening, checked=checked, told=self.damaged)
            if opening is None or task is None or task.name != name:
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
                if fresh:  # of many, what was read would take more memory than there is
                    task = mapped(name, opening) or task
            found[name] = task

        with without_collection():
            wrong = self.look_at(look, known or {})
        for error in wrong.values():
            if not skip_damaged:
                raise error
            warn(f"{error}; left out")
        self.kept = Kept(
            None if later is None else partial(_summed, later, dict(self.files)),
            None if keys is None else self._keys.known(keys, self.files),
        )
        return [found[name] for name in sorted(self.files) if name in found]

    def verify(self) -> list[str]:
        """Everything that is wrong with the store, a line each; an empty list when nothing is."""

        proof, kept, own = SumProof(self._sum), self._keys.read(), dict[str, bool]()
        openings = {} if kept is None else kept.openings

        def look(name: str) -> None:
            (task, data), digest = self.read(name, thorough=True), self.files[name]
            opening = opening_of(data)
            proof.take(digest, opening.digest, task.router)
            if digest in openings:
                own[digest] = openings[digest] == opening

        wrong = [str(error) for error in self.look_at(look).values()]
        is_right = kept is not None and all(own.values())
        return wrong or [*proof.wrong(), *self._keys.wrong(self.files, is_right=is_right)]

    def look_at(self, look: Callable[[str], None], known: Mapping[str, str] | None = None) -> dict[str, WorkError]:
        """Call `look` for each task of the store as it is now but those `known`; the errors it raised, by name.

        A writer may take a file away meanwhile. Then the manifest is another one, and what was wrong or is new is
        looked at again. After a few times writers are asked to wait, so that this ends. `files` are those seen.
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
        """Read the manifest, and check it if it is another one than that which was read last: what it says of the
        model. Raises as `open`."""
        manifest = self.path / MANIFEST
        try:
            data = manifest.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            hint = f"`slm-fast learn {self.path} ...` makes one"
            raise InputError(f"{self.path}: not a store (no {MANIFEST}); {hint}") from None
        except OSError as error:
            raise WorkError(f"{manifest}: cannot be read: {error.strerror}") from None
        if (digest := hashlib.sha256(data).digest()) == self._seen:
            return self.about
        with memory_for(str(manifest)):
            about, self.files = check_manifest(data, manifest)
        self._seen = digest
        return about

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

    def leftovers(self, names: Iterable[str] | None = None) -> list[Path]:
        """What an interrupted commit left behind: it lies in the store and the manifest does not name it. names: of the
        tasks to look for, not all."""
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
    """Names of tasks whose sum was kept, and the sum; None where it is of others, too."""
    kept = later()
    if kept is None or not kept.opening.keys() <= set(files.values()):
        return None
    return frozenset(name for name, digest in files.items() if digest in kept.opening), kept.total
