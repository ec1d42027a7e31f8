"""ScalableLM: what users hold in their hands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from slm_fast.backbone import Backbone
from slm_fast.data import Row, Task
from slm_fast.errors import InputError, WorkError
from slm_fast.evaluate import Evaluation, evaluate
from slm_fast.learn import LearnOptions, learn_task
from slm_fast.model import AdaptedModel, Config
from slm_fast.predict import Prediction, PredictOptions, predict, predict_stream
from slm_fast.store import Store, check_same
from slm_fast.tasks import LearnedTask, in_name_order


class ScalableLM:
    """One frozen language model that learns task after task, and answers batches that mix them.

    Make one with `from_backbone`, or with `from_pretrained` from a store; each `learn` and `forget` of one opened from
    a store commits to it.
    """

    def __init__(self, backbone: Backbone, config: Config, store: Store | None = None) -> None:
        self.model = AdaptedModel(backbone, config)
        self._learned: dict[str, LearnedTask] = {}
        self.store = store

    @classmethod
    def from_backbone(
        cls, backbone: Any, *, tokenizer: Any = None, dtype: str = "float32", device: str = "auto", **config: Any
    ) -> ScalableLM:
        """A model that knows no tasks yet.

        Args:
            backbone: a hub name, a local path, "minilm" (the packaged all-MiniLM-L6-v2), or a transformers model
                (quantised ones too), which then needs its `tokenizer`. It is frozen and given adapted layers in place.
            dtype: "float32" or "bfloat16". device: "auto", "cpu", "cuda". Both only for a backbone that is loaded here.
            config: fields of `Config`, such as query="trunk" | "sentence" and router="gaussian" | "dtkr".

        Raises:
            InputError: the backbone cannot be found or is of no known family, or an option does not fit.
        """
        unknown = set(config) - set(Config.__dataclass_fields__)
        if unknown:
            raise InputError(f"{sorted(unknown)[0]}: unknown option; options: {', '.join(Config.__dataclass_fields__)}")
        return cls(_load(backbone, tokenizer, dtype, device), Config(**config))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        backbone: Any = None,
        tokenizer: Any = None,
        dtype: str = "float32",
        device: str = "auto",
    ) -> ScalableLM:
        """Open a store. `backbone` says where its backbone is now, if not where the manifest says.

        Raises:
            InputError: there is no store, or the backbone is not the one it was made with. WorkError: it is damaged.
        """
        store = Store.open(path)
        config: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in store.about["config"].items()
        }
        loaded = _load(backbone or store.about["backbone"], tokenizer, dtype, device)
        expected = store.about["fingerprint"]
        if loaded.fingerprint != expected:
            raise InputError(
                f"backbone {loaded.name!r}: its fingerprint is {loaded.fingerprint}, store {path} has {expected}"
            )
        slm = cls(loaded, Config(**config))
        check_same(slm.model.about, store.about, f"backbone {slm.model.backbone.name!r}", f"store {path}")
        slm._set(store.load())
        slm.store = store
        return slm

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks known, sorted."""
        return sorted(self._learned)

    @property
    def learned(self) -> Mapping[str, LearnedTask]:
        """What is kept of each task, by name."""
        return MappingProxyType(self._learned)

    def learn(
        self, task: Task, *, valid: Task | str | Path | None = None, progress: bool | None = None, **options: Any
    ) -> None:
        """Learn a task; the others, and their files, stay as they are.

        Args:
            valid: a validation task or file; the epoch that does best on it is kept.
            progress: show bars on standard error; None shows them on a terminal.
            options: fields of `LearnOptions`: epochs, batch_size, learning_rate, rank, slots, seed, max_length,
                joint, ...

        Raises:
            InputError: the name is taken, or an option does not fit. WorkError: training or the commit failed; all that
            was learned before is still there.
        """
        kept = Store.open(self.store.path).files if self.store is not None else {}
        if task.name in self._learned or task.name in kept:
            raise InputError(f"task {task.name!r}: already learned; forget it first to learn it anew")
        unknown = set(options) - set(LearnOptions.__dataclass_fields__)
        if unknown:
            raise InputError(
                f"{sorted(unknown)[0]}: unknown option; options: {', '.join(LearnOptions.__dataclass_fields__)}"
            )
        if isinstance(valid, (str, Path)):
            valid = Task.from_file(task.name, valid, training=False)
        learned = learn_task(self.model, task, LearnOptions(**options), valid=valid, progress=progress)
        if self.store is not None:
            self.store.commit(add=[learned])
        self._set([*self._learned.values(), learned])

    def add(self, learned: LearnedTask | Sequence[LearnedTask]) -> None:
        """Take in tasks that were learned elsewhere, on the same backbone with the same configuration.

        Raises InputError when a name is taken.
        """
        given = [learned] if isinstance(learned, LearnedTask) else list(learned)
        names = [*self._learned, *(task.name for task in given)]
        for task in given:
            if names.count(task.name) > 1:
                raise InputError(f"task {task.name!r}: already learned; forget it first to add another of this name")
        if self.store is not None:
            self.store.commit(add=given)
        self._set([*self._learned.values(), *given])

    def forget(self, name: str) -> None:
        """Remove a task exactly: what is left is as if it had never been learned.

        Raises InputError for a task that is not there.
        """
        if name not in self._learned:
            raise InputError(f"task {name!r}: not learned; tasks: {', '.join(self.tasks) or 'none'}")
        if self.store is not None:
            self.store.commit(remove=[name])
        self._set([task for task in self._learned.values() if task.name != name])

    def predict(
        self,
        rows: Sequence[Any],
        *,
        task: str | Sequence[str] | None = None,
        progress: bool | None = False,
        **options: Any,
    ) -> list[Prediction]:
        """Answer rows of any tasks, in any order, with no task-ID (`task` gives one all the same).

        Args:
            rows: strings, or {"instruction": ..., "input": ...}.
            options: fields of `PredictOptions`: batch_size, max_new_tokens, head, abstain, sample, beams, ...
        """
        if isinstance(rows, (str, Mapping)):
            raise InputError("rows: expected a list of texts, got a single one")
        parsed = [_parse(number, row) for number, row in enumerate(rows, 1)]
        return predict(self.model, parsed, _options(options), task=task, progress=progress)

    def predict_stream(self, rows: Iterable[Any], *, task: str | None = None, **options: Any) -> Iterator[Prediction]:
        """As `predict`, for inputs of any size: answers come in order and memory stays bounded."""
        parsed = (_parse(number, row) for number, row in enumerate(rows, 1))
        return predict_stream(self.model, parsed, _options(options), task=task)

    def evaluate(
        self,
        tasks: Mapping[str, Any],
        *,
        with_task_id: bool = False,
        progress: bool | None = None,
        **options: Any,
    ) -> Evaluation:
        """Accuracy and routing accuracy on {task name: file or rows with answers}, all answered as one mixed stream."""
        given = {name: _as_task(self._learned.get(name), name, source) for name, source in tasks.items()}
        return evaluate(self.model, given, _options(options), with_task_id=with_task_id, progress=progress)

    def save_pretrained(self, path: str | Path) -> None:
        """Write all tasks to a store; from then on learn and forget commit to it.

        Raises InputError when the store there is of another model, or holds a task that this model does not.
        """
        store = Store.open(path) if Store.exists(path) else Store(path, self.model.about, {})
        check_same(store.about, self.model.about, str(path), "this model")
        store.save(list(self._learned.values()))
        self.store = store

    def _set(self, tasks: Sequence[LearnedTask]) -> None:
        self._learned = {task.name: task for task in in_name_order(tasks)}
        self.model.set_tasks(list(self._learned.values()))


def _load(backbone: Any, tokenizer: Any, dtype: str, device: str) -> Backbone:
    if isinstance(backbone, (str, Path)):
        if tokenizer is not None:
            raise InputError("tokenizer: goes with a backbone given as a model; a path or name brings its own")
        return Backbone.load(str(backbone), dtype=dtype, device=device)
    if tokenizer is None:
        raise InputError("tokenizer: needed beside a backbone that is given as a model")
    if dtype != "float32" or device != "auto":
        raise InputError("dtype, device: a backbone given as a model keeps its own")
    return Backbone(backbone, tokenizer, getattr(backbone, "name_or_path", ""))


def _options(options: Mapping[str, Any]) -> PredictOptions:
    unknown = set(options) - set(PredictOptions.__dataclass_fields__)
    if unknown:
        raise InputError(
            f"{sorted(unknown)[0]}: unknown option; options: {', '.join(PredictOptions.__dataclass_fields__)}"
        )
    return PredictOptions(**options)


def _parse(number: int, row: Any) -> Row:
    try:
        return Row.parse(row)
    except WorkError as error:
        raise WorkError(f"row {number}: {error}") from None


def _as_task(learned: LearnedTask | None, name: str, source: Any) -> Task:
    if isinstance(source, Task):
        return source
    if isinstance(source, (str, Path)):
        return Task.from_file(name, source, training=False)
    free_text = None if learned is None else learned.labels is None
    return Task(name, source, free_text=free_text, training=False)
