"""A model's tasks, and the store to which they are committed, kept in sync."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from slm_fast.backbone import Backbone
from slm_fast.covariance import NOTHING, Kept
from slm_fast.errors import InputError, WorkError, some_of, warn
from slm_fast.evaluate import Evaluation
from slm_fast.files import path_of
from slm_fast.hub import check_repo, chosen, push, write_shared
from slm_fast.memory import ample, bytes_of
from slm_fast.model import AdaptedModel
from slm_fast.options import ModelConfig
from slm_fast.remote_store import RemoteStore
from slm_fast.router import GaussianRouter, Router
from slm_fast.schema import check_learned, check_same
from slm_fast.store import Store, Summed
from slm_fast.task_file import digest_of
from slm_fast.tasks import LearnedTask, in_name_order


class TaskKeeper:
    """A model whose tasks are those of its store, if it has one: tasks added or forgotten are committed."""

    def __init__(
        self,
        backbone: Backbone,
        config: ModelConfig,
        store: Store | None = None,
        *,
        device_memory: int | str | None = None,
    ) -> None:
        memory = ample(backbone.device) if device_memory is None else bytes_of(device_memory, "device_memory")
        self.model = AdaptedModel(backbone, config, memory)
        self.store = store
        self.source: RemoteStore | None = None  # store at a URL that it was opened from, until it gets another
        self._committed: dict[str, str] = {}  # task -> SHA-256 of its file in the store, as last seen
        self._left: dict[str, str] = {}  # likewise: tasks of the source that were forgotten here

    @property
    def tasks(self) -> list[str]:
        """Names of the known tasks, sorted."""
        return list(self.model.pool.names)

    @property
    def learned(self) -> Mapping[str, LearnedTask]:
        """Known tasks by name."""
        return MappingProxyType({task.name: task for task in self.model.pool.tasks})

    @property
    def classes_(self) -> list[str]:
        """Distinct labels of all tasks with heads, sorted: the columns of `predict_proba`."""
        heads = self.model.pool.heads
        return [] if heads is None else list(heads.words)

    def add(self, learned: LearnedTask | Sequence[LearnedTask]) -> None:
        """Add tasks learned by another model of the same kind (values of its `learned`). If this model has a store,
        they are committed.

        Raises:
            InputError: a name is taken, or `learned` is something else.
            WorkError: a task does not fit this model, or the commit failed.
        """
        tasks: list[Any] = list(learned) if isinstance(learned, Iterable) else [learned]
        for task in tasks:
            if not isinstance(task, LearnedTask):
                kind = type(learned if isinstance(learned, (str, Mapping)) else task).__name__
                raise InputError(f"learned: expected values of another model's `learned`, got a {kind}")
            self.model.check_fits(task)
            check_learned(task)
        before = set(self.tasks)
        if self.store is not None:
            self.refresh()
        came = {name: task.origin for name, task in self.learned.items() if name not in before}
        # Another process may have committed the same task in the meantime.
        self._know([task for task in tasks if task.origin is None or came.get(task.name) != task.origin])

    def _know(self, tasks: Sequence[LearnedTask]) -> None:
        """Add tasks and commit them. If the commit fails they stay in memory, since they took long to learn."""
        failed: WorkError | None = None
        with self.model.lock:
            files: dict[str, str] = {}
            with self.model.changing(add=tasks) as router:
                if self.store is not None:
                    try:
                        self.store.commit(add=tasks, summed=self._summed(router, {task.name for task in tasks}))
                        files = self.store.added
                    except WorkError as error:
                        failed = error
            # After the model: what an interrupt leaves undone here is made up for by the next `refresh`.
            self._committed = self._committed | files
        if failed is not None:
            names = ", ".join(task.name for task in tasks)
            raise WorkError(f"{failed}; {names}: kept in memory, and `save_pretrained` commits it") from None

    def _summed(self, router: Router, new: Collection[str] = ()) -> Summed | None:
        """The sum of a router's scatters, for `Store.commit`; None unless it is computed and all its tasks are
        committed or `new`."""
        if not isinstance(router, GaussianRouter) or not router.sketch.is_summed:
            return None
        names = router.sketch.parts
        if not all(name in new or name in self._committed for name in names):
            return None
        return {name: "" if name in new else self._committed[name] for name in names}, router.scatter

    def _keep_for_later(self) -> None:
        """Keep in this model's store what routing computes from its tasks, to speed up later openings."""
        store, router, files = self.store or self.source, self.model.router, self._committed
        if store is None or not isinstance(router, GaussianRouter) or files.keys() != set(router.names):
            return
        store.keep_sum({name: files[name] for name in router.sketch.parts}, lambda: router.scatter)
        if "discriminant" in vars(router) and not router.is_kept and (known := router.known_keys) is not None:
            store.keep_keys(files, known)

    def _belongs_to(self, store: Store) -> None:
        """Attach the store that this model was just opened from. A store at a URL is never written."""
        self.source, self.store = (store, None) if isinstance(store, RemoteStore) else (None, store)
        self._committed, self._left = dict(store.files), {}
        self._keep_for_later()
        store.let_go()

    @property
    def _files(self) -> dict[str, str] | None:
        """SHA-256 of the tasks' files, by name; None without a store, or if a store at a URL lacks some of them."""
        if self.store is None and not (self.source and self._committed.keys() >= set(self.tasks)):
            return None
        return {name: self._committed.get(name, "") for name in self.tasks}

    def forget(self, name: str) -> None:
        """Remove a task exactly: what remains is as if it had never been learned.

        Raises:
            InputError: the task is not known.
        """
        if not isinstance(name, str):
            raise InputError(f"name: expected a task's name, got {name!r}")
        if self.store is not None:
            self.refresh()
        known = name in self.learned
        if not known and name not in self._committed:
            raise InputError(f"task {name!r}: not learned; tasks: {some_of(self.tasks)}")
        with self.model.lock:
            committed, left = dict(self._committed), dict(self._left)
            with self.model.changing(remove=[name] if known else []) as router:
                if name in committed:
                    digest = committed.pop(name)
                    if self.store is None:
                        left[name] = digest
                    else:
                        self.store.commit(remove=[name], summed=self._summed(router))
            self._committed, self._left = committed, left  # after the model, as in `_know`

    def refresh(self) -> None:
        """Take over what others changed in this model's store: load tasks learned there, drop tasks forgotten there.

        `learn`, `add`, `forget` and `save_pretrained` do this first. New tasks that are damaged are left out, with a
        warning. A model opened from a URL takes over what is new there: a task learned here stays unless a task of its
        name is new there, and a task forgotten here stays forgotten until then.

        Raises:
            InputError: the store no longer exists.
            WorkError: its manifest is damaged, or the URL cannot be read.
        """
        store = self.store or self.source
        if store is None:
            return
        store.bring()
        with self.model.lock:
            new = {task.name: task for task in store.load(known=self._committed | self._left, skip_damaged=True)}
            files, was, gone = dict(store.files), self._committed, []
            left = {name: digest for name, digest in self._left.items() if files.get(name) == digest}
            for name in self.learned:
                if name in new or (name in was and files.get(name) != was[name]):
                    gone.append(name)
                if name in new and name not in was and digest_of(self.learned[name]) != files[name]:
                    warn(f"task {name!r}: {store.where} has another since; what was not committed here is dropped")
            with self.model.changing(add=list(new.values()), remove=gone):
                pass
            # After the model, as in `_know`.
            self._committed, self._left = {name: files[name] for name in files if name not in left}, left

    def save_pretrained(self, path: str | Path) -> None:
        """Write all tasks to a store, to which `learn` and `forget` commit from then on.

        An existing store of the same kind of model is joined: its tasks are known from then on.

        Raises:
            InputError: the store is of another model, or has another task of the same name.
        """
        with self.model.lock:
            if self.store is not None and Store.exists(path) and os.path.samefile(self.store.path, path):
                self.refresh()
                uncommitted = [task for task in self.learned.values() if task.name not in self._committed]
                self._committed = self._committed | self.store.save(uncommitted)
            else:
                store = Store.open(path) if Store.exists(path) else Store(path, self.model.about, {})
                check_same(store.about, self.model.about, str(path), "this model")
                files = store.save(list(self.learned.values()))
                self.store, self.source, self._committed, self._left = store, None, files, {}
            self.refresh()
            self._keep_for_later()

    def share(
        self,
        folder: str | Path,
        *,
        tasks: str | Collection[str] | None = None,
        evaluation: Evaluation | None = None,
        base_model: str | None = None,
    ) -> None:
        """Write a folder for sharing: a store of all or some tasks, and its model card, README.md. It is an ordinary
        store, for `from_pretrained` or `slm-fast merge`. This model keeps its own store.

        Args:
            folder: output folder. Must be empty or not exist.
            tasks: a name, or several. Default: all.
            evaluation: result of `evaluate`, for the accuracies on the card.
            base_model: the backbone's hub name, if it is a local folder.

        Raises:
            InputError: a task is not known, or the folder is not empty.
            WorkError: the folder cannot be written.
        """
        self._share(path_of(folder), tasks, evaluation, base_model)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        tasks: str | Collection[str] | None = None,
        evaluation: Evaluation | None = None,
        base_model: str | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Upload what `share` writes to the Hugging Face hub, and return the repository's URL.

        Args:
            repo_id: USER/NAME; created if needed.
            private: whether a new repository is private.
            tasks, evaluation, base_model: as for `share`.

        Raises:
            InputError: a task is not known, or `repo_id` is not a repository name.
            WorkError: the hub cannot be reached, or refuses.
        """
        check_repo(repo_id)
        with tempfile.TemporaryDirectory() as folder:
            self._share(Path(folder), tasks, evaluation, base_model, repo_id)
            return push(Path(folder), repo_id, private=private, message=commit_message)

    def _share(
        self,
        folder: Path,
        tasks: str | Collection[str] | None,
        evaluation: Evaluation | None,
        base_model: str | None,
        repo_id: str | None = None,
    ) -> None:
        found = chosen(list(self.learned.values()), tasks)
        if evaluation is not None and not isinstance(evaluation, Evaluation):
            raise InputError(f"evaluation: expected what evaluate() gives, got a {type(evaluation).__name__}")
        accuracy = None if evaluation is None else evaluation.accuracy
        write_shared(folder, self.model.about, found, accuracy=accuracy, base_model=base_model, repo_id=repo_id)

    def _set(self, tasks: Sequence[LearnedTask], kept: Kept = NOTHING) -> None:
        self.model.set_tasks(in_name_order(tasks), kept)
