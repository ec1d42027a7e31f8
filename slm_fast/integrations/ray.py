"""Ray Data: rows of a dataset answered by actors, with a model in each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.data import Dataset

from slm_fast import __version__
from slm_fast.data import identified
from slm_fast.errors import InputError, WorkError, warn
from slm_fast.files import shown
from slm_fast.hub import find_store, is_on_hub
from slm_fast.integrations.ray_cluster import Opening
from slm_fast.integrations.ray_pool import StorePool
from slm_fast.options import PredictKeywords, PredictOptions, combine, shows
from slm_fast.parquet_output import answer_columns, with_answers
from slm_fast.predict import answer
from slm_fast.predict_file import as_record
from slm_fast.readers import Record
from slm_fast.windows import WINDOW, windows_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["StorePool", "predict"]
ERROR = "error"


@shows(PredictOptions)
def predict(
    dataset: Dataset,
    store: str | Path,
    options: PredictOptions | None = None,
    *,
    text: str | None = None,
    task: str | None = None,
    prefix: str = "predicted_",
    concurrency: int | tuple[int, int] = 1,
    num_cpus: int = 1,
    num_gpus: float = 0,
    backbone: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    **changes: Unpack[PredictKeywords],
) -> Dataset:
    """Answer the rows of a dataset. Keeps all columns and adds those of an answer (`predicted_task`, `predicted_label`,
    ...) and `error`, which says why a row has no answer.

    Nothing is computed until the dataset is read. Rows are answered in blocks of 1,024. With Ray Data's
    `execution_options.preserve_order` these are the windows of `ScalableLM.predict_file`, with the same answers.
    Otherwise rows share blocks as they arrive, which may change the last bits of a score.

    Args:
        dataset: rows with the columns that `ScalableLM.predict` understands.
        store: a folder that all workers see under this path, a URL, or a hub name.
        options, **changes: prediction options; changes override their fields, such as top_k=3.
        text: name of the input column, if not one of the usual names.
        task: oracle task ID for all rows.
        prefix: prefix of the answers' columns.
        concurrency: number of actors, or (min, max) for Ray Data to choose from.
        num_cpus, num_gpus: of each actor.
        backbone, dtype, device: as for `ScalableLM.from_pretrained`.

    Raises:
        InputError: there is no store, the task is not learned, a column exists already, or `sample` is set, which needs
            a row's place in its input. While the dataset is read: Ray's error, caused by an InputError or a WorkError.
    """
    chosen = combine(PredictOptions, options, changes)
    if chosen.sample:
        raise InputError("sample: a row draws by its place in the input, which rows of a dataset do not have")
    opened = find_store(store)
    if task is not None and task not in opened.files:
        raise InputError(f"task {task!r}: not learned by {store}")
    schema = dataset.schema(fetch_if_missing=False)
    _check_free([] if schema is None else schema.names, prefix)
    return dataset.repartition(target_num_rows_per_block=WINDOW, strict=True).map_batches(
        _Answers,
        fn_constructor_kwargs={
            "opening": Opening.of(store, backbone=backbone, dtype=dtype, device=device, threads=num_cpus),
            "files": None if is_on_hub(store) else opened.files,
            "version": __version__,
            "how": {"options": chosen, "text": text, "task": task, "prefix": prefix},
        },
        batch_size=WINDOW,
        batch_format="pyarrow",
        concurrency=concurrency,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
    )


def _check_free(names: list[str], prefix: str) -> None:
    """Raise InputError if an answer's column exists already."""
    for name in _columns(prefix).values():
        if name in names:
            raise InputError(f"column {name!r}: already exists; rename it, or give another prefix=")


def _columns(prefix: str) -> dict[str, str]:
    """Fields of an answer -> their columns."""
    return {name: name if name == ERROR else prefix + name for name in answer_columns() if name != "id"}


class _Answers:
    """A model that answers blocks of rows.

    Args:
        files, version: SHA-256 of each task's file, and the version of this package, where `predict` was called.
    """

    def __init__(self, opening: Opening, files: dict[str, str] | None, version: str, how: dict[str, Any]) -> None:
        if version != __version__:
            raise WorkError(f"worker: is slm_fast {__version__}, {version} asks")
        self._slm, warned = opening.open()
        for message in warned:
            warn(message)
        found = self._slm.store or self._slm.source
        if files is not None and found is not None and found.files != files:
            raise WorkError(f"store {shown(opening.store)}: was changed since it was asked for answers")
        self._how = how

    def __call__(self, table: Any) -> Any:
        """Answer the rows of an Arrow table."""
        options, prefix = self._how["options"], self._how["prefix"]
        _check_free(table.column_names, prefix)
        given = [Record(place, fields) for place, fields in enumerate(table.to_pylist(), 1)]
        rows = [identified(record, text=self._how["text"])[1] for record in given]
        found = answer(self._slm.model, windows_of(rows, self._how["task"]), options)
        records = [{"id": ""} | as_record(one, options) for answers in found for one in answers]
        return with_answers(table, records, _columns(prefix))
