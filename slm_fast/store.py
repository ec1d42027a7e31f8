"""The store: all tasks in a directory, one file each, and a manifest that says which of them count (`store_view`).

A commit writes the task's file, flushes it to disk and renames it into place, then does the same with the manifest.
The manifest is the last thing that changes, so after a kill at any point the store is the old one or the new one.
One process writes at a time (a file lock); any number read, beside it too.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from slm_fast.covariance import ExactSum, KnownKeys
from slm_fast.errors import InputError, SlmError, WorkError, some_of
from slm_fast.files import Reserve, flush_directory, locked, shown, write
from slm_fast.kept_sum import KeptSum
from slm_fast.mapped_task import Opening, opening_of
from slm_fast.scatter import scatter_of
from slm_fast.schema import check_same, manifest_of, task_path
from slm_fast.sketch import sampled
from slm_fast.store_view import LOCK, MANIFEST, RESERVE, StoreView
from slm_fast.task_file import task_from_file, task_to_bytes
from slm_fast.tasks import LearnedTask

Summed = tuple[Mapping[str, str], ExactSum]


class Store(StoreView):
    """A store that is read and written: each change is a commit."""

    _clean = False  # whether nothing lies about that the manifest does not name
    unsummed = 16  # tasks in which the sum kept may be another, or that a store may have without one

    # Writing

    def commit(
        self, *, add: Sequence[LearnedTask] = (), remove: Sequence[str] = (), summed: Summed | None = None
    ) -> None:
        """Make a new version of the store: on disk it is there whole, or not at all.

        A task that is there, made from the same rows and options on another processor, stays as it is.

        summed: of the tasks that are sampled then, by the SHA-256 of their files, the sum of their scatters, from
            whoever has it. It is kept where the one that is there is of many others.

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
                self._digests[files[task.name]] = opening_of(data).digest
                self._place(task.name, files[task.name], data)
            self._take_out(files, summed)
            self._finish(files)
            self._keep(summed)

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
            raise InputError(f"prefer: expected one of the stores that are merged, got {shown(prefer)}")
        there = sorted({name for source in sources for name in source.files})
        for name in sorted(tasks or ()):
            if name not in there:
                raise InputError(f"task {name!r}: in none of the stores to copy from; tasks: {some_of(there)}")
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
                    f"task {name!r}: {there.where} and {source.where} hold different tasks of this name; "
                    "--prefer STORE says whose to take"
                )
            self._place(name, digest, data)
            taken[name] = digest

        for error in source.look_at(look).values():
            raise error
        now = {name: digest for name, digest in taken.items() if source.files.get(name) == digest}
        return {**files, **now}, {**holder, **dict.fromkeys(now, source)}

    def keep_sum(self, files: Mapping[str, str], total: Callable[[], ExactSum]) -> None:
        """Keep the sum of these tasks' scatters (name -> SHA-256 of its file), which are those sampled, if the one that
        is kept is of many others, and this process may write and nobody else does just now. It spares later ones the
        work, so failing is nothing."""
        with suppress(WorkError, InputError):
            if self._sum.apart(files.values()) >= self.unsummed:
                with self._writing(patience=0):
                    self._keep((files, total()))

    def keep_keys(self, files: Mapping[str, str], known: KnownKeys) -> None:
        """Keep openings of these tasks and what routing computes of them, if they are the store's and it is not kept;
        failing is nothing, as for `keep_sum`."""
        kept = self._keys.read()
        if kept is not None and kept.rows.keys() == set(files.values()) and not self._keys.is_stale(files):
            return
        with suppress(WorkError, InputError), self._writing(patience=0):
            if self.files == files:
                with suppress(OSError, WorkError):
                    openings = {digest: self._opening(name) for name, digest in files.items()}
                    self._keys.write(files, openings, known)

    def _keep(self, summed: Summed | None) -> None:
        """Keep a sum if it is of tasks that the manifest, which is committed, names, and the one kept is of many
        others."""
        if summed is not None and summed[0].items() <= self.files.items():
            with suppress(OSError, WorkError):
                if self._sum.apart(summed[0].values()) >= self.unsummed:
                    self._sum.write(self._as_kept(summed))

    def _sampled(self) -> dict[str, str]:
        """The files of the tasks that covariance and centre are of."""
        return {name: self.files[name] for name in sampled(self.files)}

    def _as_kept(self, summed: Summed) -> KeptSum:
        for name, digest in summed[0].items():
            if digest not in self._digests:
                self._digests[digest] = self._opening(name).digest
        return KeptSum({digest: self._digests[digest] for digest in summed[0].values()}, summed[1])

    def _opening(self, name: str) -> Opening:
        """Raises WorkError for a task whose file is damaged."""
        return self._openings.get(self.files[name]) or opening_of(self.read(name)[1])

    def _take_out(self, files: Mapping[str, str], summed: Summed | None) -> None:
        """Leave no trace in the sum kept of tasks that will not be among `files`. Before the manifest says so, so that
        a sum never names a task that the manifest does not."""
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
    def _writing(self, patience: float | None = None) -> Iterator[None]:
        """Hold the store's lock, with what is on disk read anew."""
        with self._named_errors():
            self.path.mkdir(parents=True, exist_ok=True)
            with locked(self.path / LOCK, self.patience if patience is None else patience) as held:
                if not held:
                    raise WorkError(f"{self.path}: another process is writing to this store; try again later")
                if Store.exists(self.path):
                    self.about = self._joined(self._look_anew())
                self._clean = self._mark(clean=False)
                try:
                    yield
                except BaseException:
                    with suppress(SlmError):  # an interrupt may come when the new manifest is in place already
                        self.files = Store.open(self.path).files if Store.exists(self.path) else {}
                        self._clear()
                    raise
                with suppress(OSError):
                    self._mark(clean=self._clean)

    def _joined(self, about: dict[str, Any]) -> dict[str, Any]:
        """What the store is, which says `about` of itself. Raises InputError where that is another model's."""
        check_same(about, self.about, str(self.path), "this model")
        return {**self.about, **about}

    def _mark(self, *, clean: bool) -> bool:
        """Say in the lock's file whether nothing lies about beside this manifest; whether it was said before."""
        version = "{} {}".format(*self._version()).encode()
        with (self.path / LOCK).open("r+b") as file:
            said = file.read(100) == version
            file.seek(0)
            file.truncate()
            file.write(version if clean else b"")
        return said

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
        if files != self.files:
            self._keys.take_out(files)  # now, so that nothing of a task outlives it
        data = manifest_of(self.about, files)
        reserve = Reserve(self.path / RESERVE)
        try:
            write(self.path / MANIFEST, data)
        except OSError as error:
            if len(files) >= len(self.files) or not reserve.spend(error):  # it is for making room only
                raise
            write(self.path / MANIFEST, data)
        changed = {name for name, _ in self.files.items() ^ files.items()}
        self.files, self._seen = dict(files), hashlib.sha256(data).digest()
        try:
            flush_directory(self.path)
        except OSError as error:
            raise WorkError(f"{self.path}: the change is made, but a power cut may undo it: {error.strerror}") from None
        self._clear(changed if self._clean else None)
        reserve.keep(len(data))

    def _clear(self, names: Iterable[str] | None = None) -> None:
        """Remove what the manifest does not name, of all tasks or of some. What cannot be removed now, the next
        commit removes."""
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
    """Whether two tasks were made from the same rows, options and backbone, as far as they say."""
    return one.origin is not None and one.origin == other.origin
