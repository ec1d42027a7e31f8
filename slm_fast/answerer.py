"""Answering rows with the known tasks: the part of `ScalableLM` that changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from slm_fast.data import rows_to_answer
from slm_fast.errors import InputError
from slm_fast.evaluate import Evaluation, as_task, evaluate
from slm_fast.idle import warn_of_idle_options
from slm_fast.keeper import TaskKeeper
from slm_fast.options import PredictKeywords, PredictOptions, combine, shows
from slm_fast.predict import Prediction, predict, predict_stream, probabilities
from slm_fast.predict_file import Answering, FileAnswered, Reading, predict_file

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Unpack


class TaskAnswerer(TaskKeeper):
    """A model that answers rows with its tasks."""

    @shows(PredictOptions)
    def predict(
        self,
        rows: Iterable[Any],
        options: PredictOptions | None = None,
        *,
        text: str | None = None,
        task: str | Sequence[str] | None = None,
        progress: bool | None = False,
        **changes: Unpack[PredictKeywords],
    ) -> list[Prediction]:
        """Answer rows of any tasks, in any order, without task IDs.

        Args:
            rows: strings or {"instruction": ..., "input": ...}, as a list, DataFrame or Dataset.
            options, **changes: prediction options; changes override their fields, such as max_new_tokens=20.
            text: name of the input column, if not one of the usual names.
            task: oracle task ID, one for all rows or one per row.

        Raises:
            InputError: an option is invalid, the first row lacks the column `text`, a task is not known, or none is
                learned yet.
            WorkError: a row cannot be read or answered. The message gives its number, counted from 1.
        """
        chosen = self._chosen(options, changes, self.predict, task=task is not None)
        return predict(self.model, list(rows_to_answer(rows, text=text)), chosen, task=task, progress=progress)

    @shows(PredictOptions)
    def predict_proba(
        self,
        rows: Iterable[Any],
        options: PredictOptions | None = None,
        *,
        text: str | None = None,
        task: str | Sequence[str] | None = None,
        progress: bool | None = False,
        **changes: Unpack[PredictKeywords],
    ) -> NDArray[np.float32]:
        """Label probabilities, [N, C] float32 with columns ordered as `classes_`. Each row sums to 1, or is all zeros
        if it is abstained from.

        Args:
            task: oracle task ID. If it is one for all rows, the columns are its labels, sorted
                (`slm.learned[task].labels`).
            rows, options, text, progress, **changes: as for `predict`; `top_k` has no effect.

        Raises:
            InputError: as for `predict`, or the backbone generates its answers and has no label probabilities.
        """
        with self.model.pinned():
            known = self.learned.get(task) if isinstance(task, str) else None
            if self.model.backbone.kind != "encoder" and (known is None or known.head is None):
                raise InputError(
                    "predict_proba: this backbone writes its answers and weighs no labels; predict has .score"
                )
            changes["top_k"] = None
            chosen = self._chosen(options, changes, self.predict_proba, task=task is not None)
            given = list(rows_to_answer(rows, text=text))
            answers = predict(self.model, given, chosen, task=task, progress=progress)
            return probabilities(answers, self.classes_ if known is None else known.labels or ())

    @shows(PredictOptions)
    def predict_stream(
        self,
        rows: Iterable[Any],
        options: PredictOptions | None = None,
        *,
        text: str | None = None,
        task: str | None = None,
        **changes: Unpack[PredictKeywords],
    ) -> Iterator[Prediction]:
        """Like `predict`, for any iterable of rows: yields answers in order, with bounded memory."""
        chosen = self._chosen(options, changes, self.predict_stream, task=task is not None)
        return predict_stream(self.model, rows_to_answer(rows, text=text), chosen, task=task)

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
        """Answer a file of rows, in order, as JSON Lines or Parquet. Memory is bounded; bad rows become error rows.

        Repeat an interrupted call to resume it, if the model belongs to a store and the output is not a .parquet file.

        Args:
            source: a file as for `Task.from_file`, a pipe, or a binary stream. Rows may have an "id".
            sink: a file (.gz, too), a pipe, or a text stream.
            options, **changes: as for `predict`.
            format, delimiter, encoding: as for `slm_fast.readers.read_records`. Default: detected.
            text: name of the input column.
            task: oracle task ID for all rows.
            shard: (i, n): answer the i-th of n parts of a file. The concatenated outputs are that of the whole file.
            strict: stop at the first bad row.
            overwrite: replace an existing output.

        Raises:
            InputError: a path or an option is invalid, or the output belongs to another run.
            WorkError: the run failed. What was written is kept, and the same call resumes.
        """
        chosen = self._chosen(options, changes, self.predict_file, task=task is not None)
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
        """Accuracy and routing accuracy on {task name: file or rows with answers}, answered as one mixed stream.
        `with_task_id` gives each row its oracle task ID."""
        if not isinstance(tasks, Mapping):
            raise InputError(f"tasks: expected {{name: a file or rows}}, got a {type(tasks).__name__}")
        given = {name: as_task(self.learned.get(name), name, source) for name, source in tasks.items()}
        chosen = self._chosen(options, changes, self.evaluate, with_task_id=with_task_id)
        return evaluate(self.model, given, chosen, with_task_id=with_task_id, progress=progress)

    def _chosen(
        self, options: PredictOptions | None, changes: Mapping[str, Any], by: Callable[..., Any], **told: bool
    ) -> PredictOptions:
        """The options of a call of the method `by`. told: arguments that tell rows their task, and whether given."""
        chosen = combine(PredictOptions, options, changes, by)
        given, kind = [name for name, is_given in told.items() if is_given], self.model.backbone.kind
        warn_of_idle_options(chosen, kind, has_heads=kind == "encoder" or bool(self.classes_), told=given)
        return chosen
