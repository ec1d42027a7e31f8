"""ScalableLM: what users hold in their hands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch

from slm_fast.backbone import load_backbone
from slm_fast.covariance import NOTHING
from slm_fast.data import Task, checked, rows_of_file, rows_to_answer
from slm_fast.epochs import OnStep, checked_callback, checked_patience
from slm_fast.errors import InputError, WorkError, memory_for, some_of, warn
from slm_fast.evaluate import Evaluation, as_task, evaluate
from slm_fast.files import shown
from slm_fast.hub import find_store, is_on_hub
from slm_fast.keeper import TaskKeeper
from slm_fast.labels import read_words
from slm_fast.learn import check_task, learn_task
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
from slm_fast.origin import is_same
from slm_fast.predict import Prediction, predict, predict_stream, probabilities
from slm_fast.predict_file import Answering, FileAnswered, Reading, predict_file
from slm_fast.schema import check_same
from slm_fast.warm_start import check_start

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Unpack


class ScalableLM(TaskKeeper):
    """One frozen language model that learns task after task, and answers batches that mix them.

    Make one with `from_backbone`, or with `from_pretrained` from a store; each `learn` and `forget` of one opened from
    a store commits to it.
    """

    def __repr__(self) -> str:
        backbone, config = self.model.backbone, self.model.config
        parts = [repr(backbone.name or type(backbone.model).__name__), f"query={config.query!r}"]
        parts += [f"router={config.router!r}", f"tasks=[{some_of(self.tasks)}]"]
        store = self.store or self.source
        parts += [] if store is None else [f"store={store.where!r}"]
        return f"ScalableLM({', '.join(parts)})"

    @classmethod
    @shows(ModelConfig)
    def from_backbone(
        cls,
        backbone: Any,
        config: ModelConfig | None = None,
        *,
        tokenizer: Any = None,
        dtype: str | torch.dtype = "float32",
        device: str = "auto",
        **changes: Unpack[ModelKeywords],
    ) -> ScalableLM:
        """A model that knows no tasks yet.

        Args:
            backbone: a hub name, a local path (of a GGUF file, too), "minilm" or "smollm2" (packaged all-MiniLM-L6-v2
                and SmolLM2-135M-Instruct), or a transformers model (quantised ones too), which then needs its
                `tokenizer`. It is frozen and given adapted layers in place.
            dtype: "float32", "bfloat16", "float16" (or torch's own, such as torch.bfloat16) or "auto" (bfloat16 where
                fast). device: "auto", "cpu" or "cuda". Both only for a backbone that is loaded here.
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
        dtype: str | torch.dtype = "float32",
        device: str = "auto",
        skip_damaged: bool = False,
        revision: str | None = None,
        device_memory: int | str | None = None,
    ) -> ScalableLM:
        """Open a store. `backbone` says where its backbone is now, if not where the manifest says.

        Args:
            path: a folder, a URL such as s3://bucket/store, or USER/NAME of one on the Hugging Face hub (`revision`: a
                branch, tag or commit of it). The model of one at a URL or on the hub belongs to no store: what it
                learns is in memory until `save_pretrained`. `refresh` takes over what is new at the URL.
            skip_damaged: leave out tasks whose files are damaged or do not fit, with a warning for each.
            device_memory: bytes, or a size such as "2GB", that tasks' values may take on the device; those that do not
                fit stay in their files until a row needs them. None: half of what is free.

        Raises:
            InputError: no store, or the backbone is not the one it was made with. WorkError: damage, too little memory.
        """
        store = find_store(path, revision)
        config: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in store.about["config"].items()
        }
        where = shown(path)
        moved = (
            "" if backbone is not None else f"; say where the backbone of {where} is now with backbone= (--backbone)"
        )
        loaded = load_backbone(
            store.about["backbone"] if backbone is None else backbone, tokenizer, dtype, device, hint=moved
        )
        expected = store.about["fingerprint"]
        if loaded.fingerprint != expected:
            raise InputError(
                f"backbone {loaded.name!r}: its fingerprint is {loaded.fingerprint}, store {where} has {expected}"
            )
        with memory_for(f"backbone {loaded.name!r}"):
            slm = cls(loaded, ModelConfig(**config), device_memory=device_memory)
        check_same(slm.model.about, store.about, f"backbone {slm.model.backbone.name!r}", f"store {where}")
        if "tokens" not in store.about:
            warn(f"store {where}: keeps no settings of its backbone and tokenizer, so changed ones cannot be told")
        store.about = {**slm.model.about, **store.about}  # what an earlier version did not say
        with slm.model.lock, memory_for(f"store {where}"):
            slm._set(store.load(skip_damaged=skip_damaged), store.kept)
            store.kept = NOTHING
            try:
                slm.model.router.prepare()
            except WorkError as error:
                raise WorkError(next(iter(store.verify()), f"store {where}: {error}")) from None
        if not is_on_hub(path):
            slm._belongs_to(store)
        return slm

    @shows(LearnOptions)
    def learn(
        self,
        task: Task,
        options: LearnOptions | None = None,
        *,
        valid: Task | str | Path | None = None,
        patience: int | None = None,
        on_step: OnStep | None = None,
        progress: bool | None = None,
        **changes: Unpack[LearnKeywords],
    ) -> None:
        """Learn a task; the others, and their files, stay as they are.

        Args:
            valid: a validation task or file; the epoch that does best on it is kept.
            patience: early stopping: learning ends where so many epochs in a row were no better on `valid` than the
                best. Epochs are what they are without: the learning rate falls as over all of them.
            on_step: called after each step with a `LearnStep`: loss, learning rate and, at the end of an epoch, how
                `valid` was answered. What it raises ends learning, and comes out of here.
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
        how: dict[str, Any] = {"valid": valid, "patience": checked_patience(patience, has_valid=valid is not None)}
        checked_callback(on_step)
        if self.store is not None:
            self.store.check_writable()
            self.refresh()
        if self.knows(task, chosen, **how):
            return warn(f"task {task.name!r}: already learned from the same rows and options; kept as it is")
        self._know([learn_task(self.model, task, chosen, **how, on_step=on_step, progress=progress)])

    def import_adapter(
        self,
        adapter: str | Path,
        name: str,
        examples: Iterable[Any] | str | Path,
        *,
        labels: Sequence[str] | str | Path | None = None,
        check: bool = False,
    ) -> float | None:
        """Make a LoRA adapter that PEFT trained on this backbone a task. It answers alone the rows that are routed to
        it, and gives what PEFT gives.

        Args:
            adapter: its folder, or its name on the hub. name: of the task.
            examples: about 50 texts of the task, or a file of them, for routing; their answers are not looked at.
            labels: of its head, in its order, or a JSON file with a list of them.
            check: load the adapter in PEFT, too, and compare the outputs on the examples.

        Returns:
            The largest difference of any logit from PEFT's, if it was to be checked.

        Raises:
            InputError: the name is taken, or the adapter is not one that can be imported. WorkError: its files are
            damaged, it differs from PEFT by more than 1e-4, or the commit failed.
        """
        from slm_fast.integrations import peft_check, peft_files, peft_import

        rows = rows_of_file(examples) if isinstance(examples, (str, Path)) else list(rows_to_answer(examples))
        found = peft_files.read_adapter(adapter)
        words = None if labels is None else read_words(labels)
        if self.store is not None:
            self.store.check_writable()
            self.refresh()
        with memory_for(f"task {name!r}"):
            task = peft_import.import_task(self.model, found, name, rows, labels=words)
            known = self.learned.get(name)
            if known is None and name not in self._committed:
                difference = peft_check.difference(self.model, task, found, rows) if check else None
                self.add(task)
                return difference
        if known is None or known.origin != task.origin:
            raise InputError(f"task {name!r}: is there already; forget it first, or import under another name")
        warn(f"task {name!r}: already imported from the same adapter and examples; kept as it is")
        return None

    def export_adapter(self, name: str, folder: str | Path, *, weights: Sequence[float] | None = None) -> None:
        """Write a task as a LoRA adapter that PEFT loads: `slm_fast.integrations.peft_export.export_task`."""
        from slm_fast.integrations import peft_export

        peft_export.export_task(self.model, name, folder, weights=weights)

    def knows(
        self,
        task: Task,
        options: LearnOptions | None = None,
        *,
        valid: Task | None = None,
        patience: int | None = None,
    ) -> bool:
        """Whether this very task is learned already, from the same rows and options; `learn` then does nothing.

        Raises InputError when the name is another task's, or the task to start from is not learned.
        """
        known, options = self.learned.get(task.name), options or LearnOptions()
        if known is not None and is_same(known, self.model, task, options, valid, patience):
            return True
        if known is not None or task.name in self._committed:
            raise InputError(f"task {task.name!r}: already learned; forget it first to learn it anew")
        check_start(self.model, task.name, options)
        return False

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
    def predict_proba(
        self,
        rows: Iterable[Any],
        options: PredictOptions | None = None,
        *,
        task: str | None = None,
        progress: bool | None = False,
        **changes: Unpack[PredictKeywords],
    ) -> NDArray[np.float32]:
        """The probability of each label for each row: [N, C] float32, C in the order of `classes_`. A row sums to 1,
        and holds zeros where it is abstained from.

        Args:
            task: take every row for this task. C is then in the order of its own labels, which are sorted
                (`slm.learned[task].labels`).
            rows, options, changes, errors: those of `predict`; `top_k` does not matter.

        Raises InputError for a backbone that writes its answers, too: it weighs no labels.
        """
        known = None if task is None else self.learned.get(task)
        if self.model.backbone.kind != "encoder" and (known is None or known.head is None):
            raise InputError("predict_proba: this backbone writes its answers and weighs no labels; predict has .score")
        changes["top_k"] = None
        answers = self.predict(rows, options, task=task, progress=progress, **changes)
        return probabilities(answers, self.classes_ if known is None else known.labels or ())

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
        shard: tuple[int, int] | None = None,
        strict: bool = False,
        overwrite: bool = False,
        progress: bool | None = None,
        **changes: Unpack[PredictKeywords],
    ) -> FileAnswered:
        """Answer a file of rows into one of JSON Lines or Parquet, in order; memory stays bounded, bad rows become
        error rows.

        The same call again goes on where an interrupted one stopped, if this model belongs to a store and the output is
        not a .parquet file.

        Args:
            source, format, delimiter, encoding: a file as for `Task.from_file`, a pipe, or a binary stream; rows may
                have an "id". text: the column of the input. sink: a file (.gz too), a pipe, or a text stream.
            task: take every row for this task. strict: stop at the first bad row. overwrite: replace an output.
            shard: (i, n): answer the i-th of n parts of a file; the parts' outputs make up that of the whole.
            options: how rows are answered. changes: fields of them.

        Raises:
            InputError: a path, an option, or an output of another run. WorkError: the work failed; what was written is
            kept, and the same call goes on.
        """
        chosen = combine(PredictOptions, options, changes)
        with self.model.pinned():
            return predict_file(
                Answering.of(self.model, chosen, self._files),
                Path(source) if isinstance(source, str) else source,
                Path(sink) if isinstance(sink, str) else sink,
                chosen,
                reading=Reading(format, delimiter, encoding, text),
                task=task,
                shard=shard,
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
