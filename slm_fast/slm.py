"""ScalableLM: the main class for users."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slm_fast.answerer import TaskAnswerer
from slm_fast.backbone import load_backbone
from slm_fast.configure import check_given, check_template
from slm_fast.covariance import NOTHING
from slm_fast.data import Task, checked, rows_of_file, rows_to_answer
from slm_fast.epochs import OnStep, checked_callback, checked_patience
from slm_fast.errors import InputError, WorkError, memory_for, some_of, warn
from slm_fast.files import shown
from slm_fast.hub import find_store, is_on_hub
from slm_fast.labels import read_words
from slm_fast.learn import check_task, learn_task
from slm_fast.options import LearnKeywords, LearnOptions, ModelConfig, ModelKeywords, combine, shows
from slm_fast.origin import is_same
from slm_fast.schema import check_backbone, check_same
from slm_fast.warm_start import check_start

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ScalableLM(TaskAnswerer):
    """A frozen language model that learns task after task and answers batches that mix them.

    Create one with `from_backbone`, or open a store with `from_pretrained`. A model opened from a local store commits
    each `learn` and `forget` to it.
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
        """Create a model without tasks.

        Args:
            backbone: a hub name, a local path (also of a GGUF file), "minilm" or "smollm2" (packaged all-MiniLM-L6-v2
                and SmolLM2-135M-Instruct), or a transformers model (also a quantised one) together with its
                `tokenizer`. It is frozen, and its linear layers are adapted in place.
            config, **changes: model configuration; changes override its fields, such as query="sentence".
            dtype: "float32", "bfloat16", "float16", a torch dtype, or "auto" (bfloat16 where fast).
            device: "auto", "cpu" or "cuda". A backbone given as a model keeps its own dtype and device.

        Raises:
            InputError: the backbone is not found or not of a known family, or an option is invalid.
            WorkError: its files are damaged.
        """
        complete = combine(ModelConfig, config, changes, cls.from_backbone)
        check_given(changes, complete.router)
        made = cls(load_backbone(backbone, tokenizer, dtype, device), complete)
        check_template(made.model.config, made.model.backbone)
        return made

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
        """Open a store.

        Args:
            path: a folder, a URL such as s3://bucket/store, or the USER/NAME of a store on the Hugging Face hub. Stores
                at a URL or on the hub are read-only: what the model learns stays in memory until `save_pretrained`. For
                a URL, `refresh` loads what is new there.
            backbone: where the backbone is now, if not where the manifest says.
            tokenizer, dtype, device: as for `from_backbone`.
            skip_damaged: leave out tasks whose files are damaged or do not fit, with a warning for each.
            revision: branch, tag or commit of a store on the hub.
            device_memory: memory for the tasks' LoRA values on the device, in bytes or as a size such as "2GB". Values
                that do not fit stay in their files until a row needs them. Default: half of the free memory.

        Raises:
            InputError: there is no store, or the backbone is not the one it was created with.
            WorkError: a file is damaged, or there is too little memory.
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
        check_backbone(loaded.name, loaded.fingerprint, store.about, where)
        with memory_for(f"backbone {loaded.name!r}"):
            slm = cls(loaded, ModelConfig(**config), device_memory=device_memory)
        check_same(slm.model.about, store.about, f"backbone {slm.model.backbone.name!r}", f"store {where}")
        if "tokens" not in store.about:
            warn(f"store {where}: keeps no settings of its backbone and tokenizer, so changed ones cannot be told")
        store.about = {**slm.model.about, **store.about}  # fields that stores of earlier versions lack
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
        """Learn a task. Other tasks and their files do not change.

        Args:
            options, **changes: learning options; changes override their fields, such as epochs=5.
            valid: validation task or file. The best epoch on it is kept.
            patience: early stopping: end after this many consecutive epochs without improvement on `valid`. The
                learning rate schedule still spans all epochs.
            on_step: called with a `LearnStep` after each step: loss, learning rate and, at the end of an epoch, the
                validation result. If it raises, learning stops and the exception propagates.
            progress: show progress bars on standard error. Default: only on a terminal.

        Raises:
            InputError: the name is taken, or an option is invalid.
            WorkError: training or the commit failed. Tasks learned before are unaffected.
        """
        chosen = combine(LearnOptions, options, changes, self.learn)
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
        text: str | None = None,
        labels: Sequence[str] | str | Path | None = None,
        check: bool = False,
    ) -> float | None:
        """Import a LoRA adapter that PEFT trained on this backbone, as a task. It answers its rows alone, as in PEFT.

        Args:
            adapter: folder or hub name of the adapter.
            name: name of the task.
            examples: about 50 texts of the task, or a file of them, for routing. Answers are ignored.
            text: name of the examples' input column, if not one of the usual names.
            labels: labels of the adapter's head, in its order, or a JSON file with a list of them.
            check: also load the adapter in PEFT and compare the outputs on the examples, even of a task that is there.

        Returns:
            With `check`, the largest difference of any logit from PEFT's.

        Raises:
            InputError: the name is taken, or the adapter cannot be imported.
            WorkError: its files are damaged, it differs from PEFT by more than 1e-4, or the commit failed.
        """
        from slm_fast.integrations import peft_check, peft_files, peft_import

        if isinstance(examples, (str, Path)):
            rows = rows_of_file(examples, text=text)
        else:
            rows = list(rows_to_answer(examples, text=text))
        found = peft_files.read_adapter(adapter)
        words = None if labels is None else read_words(labels)
        if self.store is not None:
            self.store.check_writable()
            self.refresh()
        with memory_for(f"task {name!r}"):
            task = peft_import.import_task(self.model, found, name, rows, labels=words)
            known = self.learned.get(name)
            if (known or name in self._committed) and (known is None or known.origin != task.origin):
                raise InputError(f"task {name!r}: already exists; forget it first, or import under another name")
            difference = peft_check.difference(self.model, known or task, found, rows) if check else None
            if known is None:
                self.add(task)
            else:
                warn(f"task {name!r}: already imported from the same adapter and examples; kept as it is")
        return difference

    def export_adapter(self, name: str, folder: str | Path, *, weights: Sequence[float] | None = None) -> None:
        """Export a task as a LoRA adapter for PEFT: see `slm_fast.integrations.peft_export.export_task`."""
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
        """Whether this task has been learned from the same rows and options, so that `learn` would do nothing.

        Raises:
            InputError: the name belongs to another task, or the `warm_start` task is not learned.
        """
        options = combine(LearnOptions, options, {})
        known = self.learned.get(checked(task, "task").name)
        if known is not None and is_same(known, self.model, task, options, valid, patience):
            return True
        if known is not None or task.name in self._committed:
            raise InputError(f"task {task.name!r}: already learned; forget it first to learn it anew")
        check_start(self.model, task.name, options)
        return False
