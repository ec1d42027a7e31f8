"""The store: all tasks in a directory, one file each, and a manifest that says which of them count (`store_view`).

A commit writes the task's file, flushes it to disk and renames it into place, then does the same with the manifest,
which changes last. So after a kill at any point the store is either the old one or the new one. One process writes at a
time (file lock); any number can read, even meanwhile.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from slm_fast.covariance import KnownKeys
from slm_fast.errors import InputError, SlmError, WorkError, some_of
from slm_fast.exact_sum import ExactSum
from slm_fast.files import Reserve, flush, locked, shown, write, write_beside
from slm_fast.kept_sum import KeptSum
from slm_fast.mapped_task import Opening, opening_of
from slm_fast.scatter import scatter_of
from slm_fast.schema import check_same, manifest_of, task_path
from slm_fast.sketch import sampled
from slm_fast.store_view import LOCK, MANIFEST, RESERVE, StoreView
from slm_fast.task_file import digest_of, task_from_file, task_to_bytes
from slm_fast.tasks import LearnedTask

Summed = tuple[Mapping[str, str], ExactSum]


class Store(StoreView):
    """A store for reading and writing: each change is a commit."""

    _clean = False  # whether there is nothing that the manifest does not name
    unsummed = 16  # tasks in which the kept sum, if any, must differ before a new one is written

    def __init__(self, path: str | Path, about: Mapping[str, Any], files: Mapping[str, str]) -> None:
        super().__init__(path, about, files)
        self._placed: list[tuple[Path, Path]] = []  # files written beside their place, and that place
        self.added: dict[str, str] = {}  # tasks that the last commit was to add, as far as they are there: SHA-256
        self._written: set[str] = set()  # tasks of which a file was written since the lock was taken

    # Writing

    def commit(
        self, *, add: Sequence[LearnedTask] = (), remove: Sequence[str] = (), summed: Summed | None = None
    ) -> None:
        """Make a new version of the store, which is on disk completely or not at all.

        An existing task made from the same rows and options on another processor is kept.

        Args:
            summed: the tasks sampled after the commit, with SHA-256 of their files ("" for those to add), and the sum
                of their scatters, if known elsewhere. It is kept if the sum in the store differs in many tasks.

        Raises:
            InputError: a task to add exists, or one to remove does not.
            WorkError: the disk is full or cannot be written, or another process holds the lock; the store is unchanged.
        """
        with self._writing():
            there = [task for task in add if self._has(task)]
            same = {task.name: self.files[task.name] for task in there if digest_of(task) == self.files[task.name]}
            add = [task for task in add if not self._has(task)]
            for task in add:
                if task.name in self.files:
                    raise InputError(f"task {task.name!r}: already in {self.path}; forget it first to learn it anew")
            for name in remove:
                if name not in self.files:
                    raise InputError(f"task {name!r}: not in {self.path}; tasks: {some_of(self.files)}")
            added: dict[str, str] = {}
            for task in add:
                data = task_to_bytes(task)
                added[task.name] = digest = hashlib.sha256(data).hexdigest()
                self._digests[digest] = opening_of(data).digest
                self._place(task.name, digest, data)
            files = {name: digest for name, digest in self.files.items() if name not in remove} | added
            if summed is not None:
                summed = {name: digest or added.get(name, "") for name, digest in summed[0].items()}, summed[1]
            self._take_out(files, summed)
            self._finish(files)
            self._keep(summed)
            self.added = added | same

    def _has(self, task: LearnedTask) -> bool:
        """Whether the store has a task of this name made from the same rows and options."""
        return task.name in self.files and _one_origin(task, self.read(task.name)[0])

    def save(self, tasks: Sequence[LearnedTask]) -> dict[str, str]:
        """Add those of these tasks that the store lacks. A task made from the same rows and options that differs (by
        processor) counts as present. Returns SHA-256 of those that are present bit for bit.

        Raises:
            InputError: the store has a different task of the same name.
            WorkError: the disk is full or cannot be written; the store is unchanged.
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

        Of two tasks with the same name, rows and options that differ (by processor), the one already here is kept.

        Args:
            prefer: the store (this one or a source) whose task is taken if two have different ones of the same name.
            tasks: names of the tasks to copy. Default: all.

        Raises:
            InputError: a source has another backbone or configuration, or a different task of the same name; or no
                source has a task to copy.
            WorkError: a file is damaged or cannot be written; the store is unchanged.
        """
        preferred = None if prefer is None else Path(prefer).resolve()
        if preferred is not None and preferred not in [store.path.resolve() for store in (self, *sources)]:
            raise InputError(f"prefer: expected one of the stores that are merged, got {shown(prefer)}")
        there = sorted({name for source in sources for name in source.files})
        for name in sorted(tasks or ()):
            if name not in there:
                raise InputError(f"task {name!r}: in none of the stores to copy from; tasks: {some_of(there)}")
        for source in sources:  # before a new store's folder is made
            check_same(source.about, self.about, source.where, self.where)
        with self._writing():
            files, holder = dict(self.files), dict.fromkeys(self.files, self)
            for source in sources:
                check_same(source.about, self.about, source.where, self.where)
                files, holder = self._merged(source, files, holder, preferred, tasks)
            self._take_out(files, None)
            self._finish(files)
            with suppress(OSError, WorkError):
                wanted = self._sampled().values()
                if self._sum.apart(wanted) >= self.unsummed:
                    self._sum.join([source._sum for source in sources], wanted)

    def _merged(
        self,
        source: Store,
        files: Mapping[str, str],
        holder: Mapping[str, Store],
        preferred: Path | None,
        wanted: Collection[str] | None,
    ) -> tuple[dict[str, str], dict[str, Store]]:
        """Copy one source's tasks, and return `files` and `holder` (the store where each file was found) with them
        added."""
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
                    f"task {name!r}: {there.where} and {source.where} hold different tasks of this name; "
                    "--prefer STORE says whose to take"
                )
            self._place(name, digest, data)
            taken[name] = digest

        for error in source.look_at(look).values():
            raise error
        self._flush_placed()  # the next source may hold a task of the same name, to compare
        now = {name: digest for name, digest in taken.items() if source.files.get(name) == digest}
        return {**files, **now}, {**holder, **dict.fromkeys(now, source)}

    def keep_sum(self, files: Mapping[str, str], total: Callable[[], ExactSum]) -> None:
        """Keep the sum of the scatters of these sampled tasks (name -> SHA-256 of its file) for later openings, if the
        one kept differs in many tasks, this process may write and no other one is writing. Failure is harmless."""
        with suppress(WorkError, InputError):
            if self._sum.apart(files.values()) >= self.unsummed:
                with self._writing(patience=0):
                    self._keep((files, total()))

    def keep_keys(self, files: Mapping[str, str], known: KnownKeys) -> None:
        """Keep these tasks' openings and what routing computed from them, if they are the store's tasks and this is not
        kept yet. Failure is harmless, as for `keep_sum`."""
        kept = self._keys.read()
        if kept is not None and kept.rows.keys() == set(files.values()) and self._keys.known(kept, files) is not None:
            return
        with suppress(WorkError, InputError), self._writing(patience=0):
            if self.files == files:
                with suppress(OSError, WorkError):
                    openings = {digest: self._opening(name) for name, digest in files.items()}
                    self._keys.write(files, openings, known)

    def _keep(self, summed: Summed | None) -> None:
        """Keep a sum if the committed manifest names its tasks, and the one kept differs in many tasks."""
        if summed is not None and summed[0].items() <= self.files.items():
            with suppress(OSError, WorkError):
                if self._sum.apart(summed[0].values()) >= self.unsummed:
                    self._sum.write(self._as_kept(summed))

    def _sampled(self) -> dict[str, str]:
        """Files of the tasks that covariance and centre are computed from."""
        return {name: self.files[name] for name in sampled(self.files)}

    def _as_kept(self, summed: Summed) -> KeptSum:
        for name, digest in summed[0].items():
            if digest not in self._digests:
                self._digests[digest] = self._opening(name).digest
        return KeptSum({digest: self._digests[digest] for digest in summed[0].values()}, summed[1])

    def _opening(self, name: str) -> Opening:
        """The opening of a task. Raises WorkError if its file is damaged."""
        return self._openings.get(self.files[name]) or opening_of(self.read(name)[1])

    def _take_out(self, files: Mapping[str, str], summed: Summed | None) -> None:
        """Remove tasks that will not be among `files` from the kept sum. This precedes the manifest's change, so that a
        sum never names a task that the manifest does not."""
        gone = {digest: name for name, digest in self.files.items() if files.get(name) != digest}
        if not gone:
            return
        left = summed if summed is not None and summed[0].items() <= self.files.items() else None
        self._sum.take_out(
            gone,
            lambda digest: scatter_of(self.read(gone[digest])[0].router),
            None if left is None else lambda: self._as_kept(left),
        )

    def check_writable(self) -> None:
        """Raise WorkError unless this process can commit to the store, as far as that is known before learning, or
        InputError as `exists` does."""
        with self._named_errors():
            self._exists()
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
    def _writing(self, patience: float | None = None) -> Iterator[None]:
        """Hold the store's lock, and read the store anew under it. Raises InputError as `exists` does."""
        with self._named_errors():
            self._exists()
            self.path.mkdir(parents=True, exist_ok=True)
            with locked(self.path / LOCK, self.patience if patience is None else patience) as held:
                if not held:
                    raise WorkError(f"{self.path}: another process is writing to this store; try again later")
                if self._exists():
                    self.about = self._joined(self._look_anew())
                self._clean, self._placed, self._written = self._mark(clean=False), [], set()
                try:
                    yield
                except BaseException:
                    with suppress(SlmError):  # an interrupt may come after the new manifest is in place
                        if self._exists():
                            self._look_anew()
                        else:
                            self._seen = {}, b""
                        self._clear()
                    raise
                with suppress(OSError):
                    self._mark(clean=self._clean)

    def _joined(self, about: dict[str, Any]) -> dict[str, Any]:
        """The store's description, completed from `about` on disk. Raises InputError if that is another model's."""
        check_same(about, self.about, str(self.path), "this model")
        return {**self.about, **about}

    def _mark(self, *, clean: bool) -> bool:
        """Record in the lock file whether there are no leftovers besides this manifest. Returns whether it said so
        before. Without a manifest, the lock file keeps what `_announce` wrote."""
        found = self._version()
        if not any(found):
            return False
        version = "{} {}".format(*found).encode()
        with (self.path / LOCK).open("r+b") as file:
            said = file.read(100) == version
            file.seek(0)
            file.truncate()
            file.write(version if clean else b"")
        if said and not clean:
            flush(self.path / LOCK)  # a power cut must not bring the mark back
        return said

    def _place(self, name: str, digest: str, data: bytes) -> None:
        """Write a task's file. It is on disk and in its place after `_flush_placed`."""
        file = self.path / task_path(name, digest)
        if not any(self._version()):
            self._announce(digest)
        file.parent.mkdir(parents=True, exist_ok=True)
        self._written.add(name)
        self._placed.append((write_beside(file, data), file))

    def _announce(self, digest: str) -> None:
        """Add a file of a first commit to the lock file. If the commit is interrupted, this tells the file from those
        of a store that has lost its manifest, which are not leftovers."""
        with (self.path / LOCK).open("ab") as file:
            file.write(f"\n{digest}\n".encode())  # a write before this one may have been cut short

    def _flush_placed(self) -> None:
        """Flush what `_place` has written and put it in its place, all files at once: between other writes, each would
        wait for the disk several times."""
        placed, self._placed = self._placed, []
        if not placed:
            return
        announced = [] if any(self._version()) else [self.path / LOCK]
        for path in (*announced, *(part for part, _ in placed)):
            flush(path)
        for part, file in placed:
            os.replace(part, file)
        for path in (*dict.fromkeys(file.parent for _, file in placed), self.path / "tasks", self.path):
            flush(path)

    def _finish(self, files: Mapping[str, str]) -> None:
        """Commit the manifest, then remove what it no longer names."""
        self._flush_placed()
        if files != self.files:
            self._keys.take_out(files)  # first, so that nothing of a task outlives it
        data = manifest_of(self.about, files)
        reserve = Reserve(self.path / RESERVE)
        try:
            write(self.path / MANIFEST, data)
        except OSError as error:
            if len(files) >= len(self.files) or not reserve.spend(error):  # only removals may use it
                raise
            write(self.path / MANIFEST, data)
        changed = self._written.union(name for name, _ in self.files.items() ^ files.items())
        self._seen = dict(files), hashlib.sha256(data).digest()
        try:
            flush(self.path)
        except OSError as error:
            raise WorkError(f"{self.path}: the change is made, but a power cut may undo it: {error.strerror}") from None
        self._clear(changed if self._clean else None)
        reserve.keep(len(data))

    def _clear(self, names: Iterable[str] | None = None) -> None:
        """Remove what the manifest does not name, of all tasks or of some. What cannot be removed now is left to the
        next commit."""
        try:
            for path in self.leftovers(names):
                if path.is_dir():
                    path.rmdir()
                else:
                    path.unlink(missing_ok=True)
            self._clean = self._clean or names is None
        except OSError:
            self._clean = False


def _one_origin(one: LearnedTask, other: LearnedTask) -> bool:
    """Whether two tasks are known to be made from the same rows, options and backbone."""
    return one.origin is not None and one.origin == other.origin
