"""A generation: the tasks of a store at one moment. The watcher makes the next one while requests are answered."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch

from slm_fast.errors import SlmError, WorkError, lacks_memory, one_line
from slm_fast.known import Known
from slm_fast.model import AdaptedModel
from slm_fast.schema import check_same
from slm_fast.store import Store
from slm_fast.tasks import LearnedTask

log = logging.getLogger("slm_fast.server")
NICE = 10  # niceness of the thread that makes the next generation
GIVEN_UP_AFTER = 0.2  # seconds until a wait that is given up ends
LOOK = 5.0  # seconds after which files are looked at, and an unreadable store is retried, though it looks the same


@dataclass(frozen=True, eq=False)
class Generation:
    """Tasks that answer together.

    Attributes:
        files: SHA-256 of each task's file, by name.
        number: the generation's name, from `generation_number`.
    """

    known: Known
    files: Mapping[str, str]
    number: str

    @classmethod
    def of(cls, known: Known, files: Mapping[str, str]) -> Generation:
        own = {name: files[name] for name in known.pool.names}
        return cls(known, own, generation_number(own))

    @property
    def tasks(self) -> list[LearnedTask]:
        return self.known.pool.tasks


def generation_number(files: Mapping[str, str]) -> str:
    """A hash of the tasks' names and files alone, so that servers of equal stores report the same."""
    lines = "".join(f"{name} {files[name]}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def prepare(model: AdaptedModel, known: Known, *, distances: bool) -> None:
    """Compute what all tasks share now, in this thread, instead of at the first row. Raises WorkError if that fails."""
    known.router.prepare(for_many=True)
    _ = known.pool.heads
    if not known.pool.slots:
        return
    query = torch.ones(1, model.query.width, device=model.backbone.device)
    with torch.no_grad():
        known.router.route(query)
        if distances:
            tasks = known.router.slot_task
            first_slot = tasks.diff(prepend=tasks.new_full((1,), -1)).nonzero()[:, 0]
            known.router.distance(query.expand(len(first_slot), -1), first_slot)


class Watcher:
    """Follows changes that others make to the store: a thread that polls the manifest.

    If the store is gone or damaged, or a file of a task that is served, the last good generation stays, and `trouble`
    says why.

    Args:
        publish: called with each new generation. May block until it can be used.
        skip_damaged: leave out damaged tasks instead of staying with the last generation.
    """

    def __init__(
        self,
        model: AdaptedModel,
        store: Store,
        first: Generation,
        publish: Callable[[Generation], None],
        *,
        poll: float,
        distances: bool = False,
        skip_damaged: bool = False,
    ) -> None:
        self.model, self.store, self.current = model, store.again(), first
        self.trouble: str | None = None
        self.changed = threading.Condition()  # notified after each check
        self._publish, self._poll, self._distances, self._skip = publish, poll, distances, skip_damaged
        self._wanted, self._closed = threading.Event(), False
        self._stamps: dict[str, object] = {}  # by SHA-256: the stamp of a file that was right
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop following changes."""
        self._closed = True
        self._wanted.set()

    def join(self) -> None:
        """Wait for a check of the store that is under way: a process that exits while it computes is aborted."""
        if self._thread.is_alive():
            self._thread.join(30.0)

    def reload(self) -> None:
        """Check the store now."""
        self._wanted.set()

    def wait_for(self, name: str, digest: str | None, seconds: float, given_up: Callable[[], bool]) -> bool:
        """Wait until the current generation has this file of a task, or with None, until it lacks the task; for at most
        this long, or until the wait is given up."""
        self.reload()
        end = time.monotonic() + seconds
        with self.changed:
            while self.current.files.get(name) != digest:
                left = end - time.monotonic()
                if left <= 0 or given_up():
                    return False
                self.changed.wait(min(left, GIVEN_UP_AFTER))
        return True

    def _watch(self) -> None:
        if sys.platform == "linux":  # for this thread alone: if cores are scarce, answers go first
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        seen: object = None
        last = 0.0
        while True:
            wanted = self._wanted.wait(self._poll)
            self._wanted.clear()
            if self._closed:
                return
            before, seen = seen, self.store.glance()
            is_due = time.monotonic() - last >= LOOK
            is_new = wanted or seen != before or (is_due and self.trouble is not None)
            if is_new or is_due:
                # In a thread that takes its OpenMP threads with it when it ends: see `in_one_thread`.
                look = threading.Thread(target=self._look, args=(seen, is_new), name="look", daemon=True)
                look.start()
                look.join()
                last = time.monotonic()
                with self.changed:
                    self.changed.notify_all()

    def _look(self, seen: object, is_new: bool) -> None:
        """Load the store if it is new, and look at the files of the tasks that are served.

        Args:
            seen: the store's glance.
        """
        try:
            new = self._next() if is_new else None
            if new is not None:
                self._publish(new)
                self.current = new
                log.info("generation %s: %d tasks", new.number, len(new.files))
            trouble = self._damage()
            if trouble is not None and seen != self.store.glance():
                return  # the file may be gone because its task is, as the next look tells
        except Exception as error:
            if not isinstance(error, SlmError) and not lacks_memory(error):
                log.exception("reload failed")
            trouble = one_line(error)
        if trouble is None and self.trouble is not None:
            log.info("%s: can be read again", self.store.where)
        elif trouble is not None and trouble != self.trouble:
            log.error("%s; still serving generation %s", trouble, self.current.number)
        self.trouble = trouble

    def _damage(self) -> str | None:
        """What is wrong with a file of a task that is served; None if nothing. Files are read only if the file system
        says that they have changed since they were right."""
        files = self.current.files
        for name, digest in files.items():
            stamp = self.store.stamp(name) if self.store.files.get(name) == digest else None
            if stamp is None or self._stamps.get(digest) == stamp:
                continue
            if digest in self._stamps or isinstance(stamp, int):
                try:
                    self.store.read(name)
                except SlmError as error:
                    return one_line(error)
            self._stamps[digest] = stamp
        if len(self._stamps) > len(files):
            self._stamps = {digest: self._stamps[digest] for digest in files.values() if digest in self._stamps}
        return None

    def _next(self) -> Generation | None:
        """The store as it is now; None if that is the current generation."""
        self.store.bring()
        now = Store.open(self.store.path)
        check_same(now.about, self.store.about, self.store.where, "the model that is served")
        known = self.current.files
        new = self.store.load(known=known, skip_damaged=self._skip)
        files, read = dict(self.store.files), {task.name for task in new}
        kept = {name for name, digest in files.items() if known.get(name) == digest}
        gone = [name for name in known if name not in kept]
        if not new and not gone:
            return None
        for task in new:
            self.model.check_fits(task)
        self.model.carry(new)
        after = self.current.known.changed(add=new, remove=gone)
        try:
            prepare(self.model, after, distances=self._distances)
        except WorkError as error:
            raise WorkError(f"store {self.store.where}: {error}") from None
        return Generation.of(after, {name: files[name] for name in kept | read})
