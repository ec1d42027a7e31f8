"""ScalableLM: what users hold in their hands."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any

from slm_fast.backbone import Backbone, load_backbone
from slm_fast.data import Task, checked, rows_to_answer
from slm_fast.errors import InputError, WorkError, memory_for, some_of, warn
from slm_fast.evaluate import Evaluation, as_task, evaluate
from slm_fast.learn import check_task, learn_task
from slm_fast.model import AdaptedModel
from slm_fast.options import (
    LearnKeywords,
    LearnOptions,
    ModelConfig,
    ModelKeywords,
    PredictKeywords,
    PredictOptions,
    combine,
    shows,
)
from slm_fast.origin import is_same, origin
from slm_fast.predict import Prediction, predict, predict_stream
from slm_fast.predict_file import FileAnswered, Reading, predict_file
from slm_fast.schema import check_learned
from slm_fast.store import Store, check_same
from slm_fast.task_file import digest_of
from slm_fast.tasks import LearnedTask, in_name_order
from slm_fast.warm_start import check_start

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ScalableLM:
    """One frozen language model that learns task after task, and answers batches that mix them.

    Make one with `from_backbone`, or with `from_pretrained` from a store; each `learn` and `forget` of one opened from
    a store commits to it.
    """

    def __init__(self, backbone: Backbone, config: ModelConfig, store: Store | None = None) -> None:
        self.model = AdaptedModel(backbone, config)
        self.store = store
        self._committed: dict[str, str] = {}  # task -> SHA-256 of its file, of the store as this model last knew it

    def __repr__(self) -> str:
        backbone, config = self.model.backbone, self.model.config
        parts = [repr(backbone.name or type(backbone.model).__name__), f"query={config.query!r}"]
        parts += [f"router={config.router!r}", f"tasks=[{some_of(self.tasks)}]"]
        parts += [] if self.store is None else [f"store={str(self.store.path)!r}"]
        return f"ScalableLM({', '.join(parts)})"

    @classmethod
    @shows(ModelConfig)
    def from_backbone(
        cls,
        backbone: Any,
        config: ModelConfig | None = None,
        *,
        tokenizer: Any = None,
        dtype: str = "float32",
        device: str = "auto",
        **changes: Unpack[ModelKeywords],
    ) -> ScalableLM:
        """A model that knows no tasks yet.

        Args:
            backbone: a hub name, a local path (of a GGUF file, too), "minilm" or "smollm2" (packaged all-MiniLM-L6-v2
                and SmolLM2-135M-Instruct), or a transformers model (quantised ones too), which then needs its
                `tokenizer`. It is frozen and given adapted layers in place.
            dtype: "float32", "bfloat16", "float16" or "auto" (bfloat16 where fast). device: "auto", "cpu" or "cuda".
                Both only for a backbone that is loaded here.
            config: how the model is put together. changes: fields of it, such as query="trunk" | "sentence".

        Raises:
            InputError: the backbone cannot be found or is of no known family, or an option does not fit. WorkError: its
            files are damaged.
        """
        complete = combine(ModelConfig, config, changes)
        return cls(load_backbone(backbone, tokenizer, dtype, device), complete)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        backbone: Any = None,
        tokenizer: Any = None,
        dtype: str = "float32",
        device: str = "auto",
        skip_damaged: bool = False,
    ) -> ScalableLM:
        """Open a store. `backbone` says where its backbone is now, if not where the manifest says.

        Args:
            skip_damaged: leave out tasks whose files are damaged or do not fit, with a warning for each.

        Raises:
            InputError: no store, or the backbone is not the one it was made with. WorkError: damage, too little memory.
        """
        store = Store.open(path)
        config: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in store.about["config"].items()
        }
        moved = "" if backbone is not None else f"; say where the backbone of {path} is now with backbone= (--backbone)"
        loaded = load_backbone(
            store.about["backbone"] if backbone is None else backbone, tokenizer, dtype, device, hint=moved
        )
        expected = store.about["fingerprint"]
        if loaded.fingerprint != expected:
            raise InputError(
                f"backbone {loaded.name!r}: its fingerprint is {loaded.fingerprint}, store {path} has {expected}"
            )
        with memory_for(f"backbone {loaded.name!r}"):
            slm = cls(loaded, ModelConfig(**config))
        check_same(slm.model.about, store.about, f"backbone {slm.model.backbone.name!r}", f"store {path}")
        if "tokens" not in store.about:
            warn(f"store {path}: keeps no settings of its backbone and tokenizer, so changed ones cannot be told")
        store.about = {**slm.model.about, **store.about}  # what an earlier version did not say
        with slm.model.lock, memory_for(f"store {path}"):
            slm._set(store.load(skip_damaged=skip_damaged))
            try:
                slm.model.router.prepare()
            except WorkError as error:
                raise WorkError(next(iter(store.verify()), f"store {path}: {error}")) from None
        slm.store, slm._committed = store, dict(store.files)
        return slm

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks known, sorted."""
        return list(self.model.pool.names)

    @property
    def learned(self) -> Mapping[str, LearnedTask]:
        """What is kept of each task, by name."""
        return MappingProxyType({task.name: task for task in self.model.pool.tasks})

    @shows(LearnOptions)
    def learn(
        self,
        task: Task,
        options: LearnOptions | None = None,
        *,
        valid: Task | str | Path | None = None,
        progress: bool | None = None,
        **changes: Unpack[LearnKeywords],
    ) -> None:
        """Learn a task; the others, and their files, stay as they are.

        Args:
            valid: a validation task or file; the epoch that does best on it is kept.
            progress: show bars on standard error; None shows them on a terminal.
            options: how it is learned. changes: fields of them, such as epochs=5.

        Raises:
            InputError: the name is taken, or an option does not fit. WorkError: training or the commit failed; all that
            was learned before is still there.
        """
        chosen = combine(LearnOptions, options, changes)
        known = checked(task, "task").labels or ()
        if isinstance(valid, (str, Path)):
            valid = Task.from_file(task.name, valid, known=known, training=False)
        valid = None if valid is None else checked(valid, "valid").spelled_as(known)
        check_task(self.model, task, valid, chosen.max_length)
        if self.store is not None:
            self.store.check_writable()
            self.refresh()
        if self.knows(task, chosen, valid=valid):
            return warn(f"task {task.name!r}: already learned from the same rows and options; kept as it is")
        with memory_for(f"task {task.name!r}"):
            learned = learn_task(self.model, task, chosen, valid=valid, progress=progress)
        learned = replace(learned, origin=origin(self.model, task, learned.options, valid))
        check_learned(learned)
        self._know([learned])

    def knows(self, task: Task, options: LearnOptions | None = None, *, valid: Task | None = None) -> bool:
        """Whether this very task is learned already, from the same rows and options; `learn` then does nothing.

        Raises InputError when the name is another task's, or the task to start from is not learned.
        """
        known, options = self.learned.get(task.name), options or LearnOptions()
        if known is not None and is_same(known, self.model, task, options, valid):
            return True
        if known is not None or task.name in self._committed:
            raise InputError(f"task {task.name!r}: already learned; forget it first to learn it anew")
        check_start(self.model, task.name, options)
        return False

    def add(self, learned: LearnedTask | Sequence[LearnedTask]) -> None:
        """Take in tasks learned elsewhere: what `learned` holds of another model of the same kind.

        A model that belongs to a store commits them.

        Raises:
            InputError: a name is taken. WorkError: a task does not fit this model, or the commit failed.
        """
        tasks = [learned] if isinstance(learned, LearnedTask) else list(learned)
        for task in tasks:
            self.model.check_fits(task)
            check_learned(task)
        self.refresh()
        self._know(tasks)

    def _know(self, tasks: Sequence[LearnedTask]) -> None:
        """Know more tasks and commit them. Those whose commit fails are known all the same: they took long to learn."""
        failed: WorkError | None = None
        with self.model.changing(add=tasks):
            try:
                self._commit(add=tasks)
            except WorkError as error:
                failed = error
        if failed is not None:
            names = ", ".join(task.name for task in tasks)
            raise WorkError(f"{failed}; {names}: kept in memory, and `save_pretrained` commits it") from None

    def _commit(self, *, add: Sequence[LearnedTask] = (), remove: Sequence[str] = ()) -> None:
        if self.store is not None:
            self.store.commit(add=add, remove=remove)
            for name in remove:
                self._committed.pop(name, None)
            files = {task.name: digest_of(task) for task in add}
            self._committed |= {name: digest for name, digest in files.items() if self.store.files[name] == digest}

    def forget(self, name: str) -> None:
        """Remove a task exactly: what is left is as if it had never been learned.

        Raises InputError for a task that is not there.
        """
        self.refresh()
        known = name in self.learned
        if not known and name not in self._committed:
            raise InputError(f"task {name!r}: not learned; tasks: {some_of(self.tasks)}")
        with self.model.changing(remove=[name] if known else []):
            if name in self._committed:
                self._commit(remove=[name])

    def refresh(self) -> None:
        """Take over what others have done to this model's store: tasks learned there are known, tasks forgotten gone.

        `learn`, `add`, `forget` and `save_pretrained` begin with it. A new task that is damaged is left out, with a
        warning.

        Raises:
            InputError: the store is no longer there. WorkError: its manifest is damaged.
        """
        if self.store is None:
            return
        with self.model.lock:
            new = {task.name: task for task in self.store.load(known=self._committed, skip_damaged=True)}
            files, was, gone = dict(self.store.files), self._committed, []
            for name in self.learned:
                if name in new or (name in was and files.get(name) != was[name]):
                    gone.append(name)
                if name in new and name not in was:
                    warn(f"task {name!r}: {self.store.path} has another since; what was not committed here is dropped")
            with self.model.changing(add=list(new.values()), remove=gone):
                self._committed = files

    @shows(PredictOptions)
    def predict(
        self,
        rows: Iterable[Any],
        options: PredictOptions | None = None,
        *,
        task: str | Sequence[str] | None = None,
        progress: bool | None = False,
        **changes: Unpack[PredictKeywords],
    ) -> list[Prediction]:
        """Answer rows of any tasks, in any order, with no task-ID (`task` gives one all the same).

        Args:
            rows: strings, or {"instruction": ..., "input": ...}; a list, a DataFrame, a Dataset.
            options: how they are answered. changes: fields of them, such as max_new_tokens=20.

        Raises:
            InputError: an option does not fit, a task is not known, or none is learned yet. WorkError: a row cannot be
            read or answered; it is named by its number, from 1.
        """
        parsed = list(rows_to_answer(rows))
        return predict(self.model, parsed, combine(PredictOptions, options, changes), task=task, progress=progress)

    @shows(PredictOptions)
    def predict_stream(
        self,
        rows: Iterable[Any],
        options: PredictOptions | None = None,
        *,
        task: str | None = None,
        **changes: Unpack[PredictKeywords],
    ) -> Iterator[Prediction]:
        """As `predict`, for inputs of any size: answers come in order and memory stays bounded."""
        parsed = rows_to_answer(rows)
        return predict_stream(self.model, parsed, combine(PredictOptions, options, changes), task=task)

    @shows(PredictOptions)
    def predict_file(
        self,
        source: str | Path | IO[bytes],
        sink: str | Path | IO[str],
        options: PredictOptions | None = None,
        *,
        format: str | None = None,
        delimiter: str | None = None,
        encoding: str | None = None,
        text: str | None = None,
        task: str | None = None,
        strict: bool = False,
        overwrite: bool = False,
        progress: bool | None = None,
        **changes: Unpack[PredictKeywords],
    ) -> FileAnswered:
        """Answer a file of rows into one of JSON Lines, in order; memory stays bounded, bad rows become error rows.

        The same call again goes on where an interrupted one stopped, if this model belongs to a store.

        Args:
            source, format, delimiter, encoding: a file as for `Task.from_file`, a pipe, or a binary stream; rows may
                have an "id". text: the column of the input. sink: a file (.gz too), a pipe, or a text stream.
            task: take every row for this task. strict: stop at the first bad row. overwrite: replace an output.
            options: how rows are answered. changes: fields of them.

        Raises:
            InputError: a path, an option, or an output of another run. WorkError: the work failed; what was written is
            kept, and the same call goes on.
        """
        with self.model.pinned():
            return predict_file(
                self.model,
                Path(source) if isinstance(source, str) else source,
                Path(sink) if isinstance(sink, str) else sink,
                combine(PredictOptions, options, changes),
                reading=Reading(format, delimiter, encoding, text),
                files=None if self.store is None else {name: self._committed.get(name, "") for name in self.tasks},
                task=task,
                strict=strict,
                overwrite=overwrite,
                progress=progress,
            )

    @shows(PredictOptions)
    def evaluate(
        self,
        tasks: Mapping[str, Any],
        options: PredictOptions | None = None,
        *,
        with_task_id: bool = False,
        progress: bool | None = None,
        **changes: Unpack[PredictKeywords],
    ) -> Evaluation:
        """Accuracy and routing accuracy on {task name: file or rows with answers}, all answered as one mixed stream."""
        if not isinstance(tasks, Mapping):
            raise InputError(f"tasks: expected {{name: a file or rows}}, got a {type(tasks).__name__}")
        given = {name: as_task(self.learned.get(name), name, source) for name, source in tasks.items()}
        chosen = combine(PredictOptions, options, changes)
        return evaluate(self.model, given, chosen, with_task_id=with_task_id, progress=progress)

    def save_pretrained(self, path: str | Path) -> None:
        """Write all tasks to a store; from then on learn and forget commit to it.

        A store of the same kind of model that is there is joined: its tasks are known from then on.

        Raises InputError when the store there is of another model, or holds another task of a name.
        """
        with self.model.lock:
            if self.store is not None and Store.exists(path) and os.path.samefile(self.store.path, path):
                self.refresh()
                uncommitted = [task for task in self.learned.values() if task.name not in self._committed]
                self._committed |= self.store.save(uncommitted)
            else:
                store = Store.open(path) if Store.exists(path) else Store(path, self.model.about, {})
                check_same(store.about, self.model.about, str(path), "this model")
                self._committed = store.save(list(self.learned.values()))
                self.store = store
            self.refresh()

    def _set(self, tasks: Sequence[LearnedTask]) -> None:
        self.model.set_tasks(in_name_order(tasks))
