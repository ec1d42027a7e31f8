"""What a learned task is made from, so that the same task is recognised when it is given again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slm_fast.data import Row, Task
from slm_fast.model import AdaptedModel
from slm_fast.options import LearnOptions
from slm_fast.schema import WHEN_KNOWN
from slm_fast.task_file import digest_of
from slm_fast.tasks import LearnedTask, origin_of
from slm_fast.warm_start import is_wanted, kept_options


def origin(model: AdaptedModel, task: Task, options: Mapping[str, Any], valid: Task | None) -> str:
    """SHA-256 of everything that determines a learned task. options: as in its file, with or without its `rows`."""
    options = {key: value for key, value in options.items() if key != "rows"}
    about = {key: value for key, value in model.about.items() if key not in ("backbone", *WHEN_KNOWN)}
    about |= {"options": options, "labels": task.labels, "dtype": str(model.backbone.dtype)}
    if options["joint"]:  # then the other tasks matter, too
        about["others"] = {known.name: digest_of(known) for known in model.pool.tasks if known.adapter is None}
    parts = [task.rows, [] if valid is None else valid.rows]
    about["rows"] = [len(rows) for rows in parts]
    return origin_of(task.name, about, (_read(row, model) for rows in parts for row in rows))


def _read(row: Row, model: AdaptedModel) -> list[Any]:
    """What the model reads of a row: turns only with a chat template, which formats them as such."""
    turns = [row.turns] if row.turns and model.config.chat_template else []
    return [row.text, row.target, row.instruction, *turns]


def is_same(
    known: LearnedTask,
    model: AdaptedModel,
    task: Task,
    options: LearnOptions,
    valid: Task | None,
    patience: int | None = None,
) -> bool:
    """Whether a learned task was made from these rows and options. If it was to start from the nearest task, it is the
    same whichever task that was."""
    asked = kept_options(options, None, patience)
    if "warm_start" in asked:
        asked["warm_start"] = known.options.get("warm_start")
    return is_wanted(options, known.options) and known.origin == origin(model, task, asked, valid)
