"""Running lm-evaluation-harness: finding its tasks, by name or in files, running them on a model, summing up."""

from __future__ import annotations

import json
import logging
import random
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import lm_eval
import numpy as np
import torch
from jinja2 import TemplateError
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from slm_fast.errors import InputError, SlmError, WorkError, one_line, some_of, warn

KEPT = ("results", "groups", "n-samples", "n-shot", "versions", "higher_is_better", "samples")
SEED = 1234  # lm-eval's default
ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of an object, in a message of Python's


class Score(NamedTuple):
    """One metric of one task. `filter`: how lm-eval extracted answers from texts, "none" if it did not."""

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None


def evaluate(
    model: LM,
    tasks: Sequence[str],
    *,
    folder: str | Path | None = None,
    metadata: Mapping[str, Any] | None = None,
    shots: int | None = None,
    limit: float | None = None,
    chat: bool = False,
    system: str | None = None,
    samples: bool = False,
) -> dict[str, Any]:
    """Run lm-eval's tasks on a model and return the results as JSON types.

    Args:
        tasks: names, name patterns, or paths of YAML files.
        folder: folder with task files of your own, which may reuse names of lm-eval's.
        metadata: passed to those files, such as where their data is.
        shots: few-shot examples per question. Default: as the task says.
        limit: use only this many of a task's rows, from the first; below 1, this fraction of them. Above 0.
        chat: put each question in the backbone's chat template.
        system: system message before each question.
        samples: also keep each request and its answer.

    Raises:
        InputError: a task is not known.
        WorkError: a task's file or data cannot be read, or does not go with these options.
    """
    with _quiet() as logged:
        for seed in (random.seed, np.random.seed, torch.manual_seed):  # some tasks sample
            seed(SEED)
        manager, names = _found(tasks, folder, dict(metadata or {}), logged)
        loaded = manager.load(names)
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if own is None or (shots is not None and own != 0):  # a zero-shot task stays one, as in lm-eval
                task.set_config(key="num_fewshot", value=shots or 0)
            task.set_fewshot_seed(seed=SEED)
        try:
            found: dict[str, Any] = lm_eval.evaluate(
                lm=model,
                task_dict=loaded,
                limit=None if limit is None else int(limit) if limit >= 1 else limit,
                log_samples=samples,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                system_instruction=system,
            )
        except SlmError:
            raise
        except (ValueError, TemplateError) as error:  # a row that a task's templates do not fit, too few rows, ...
            raise WorkError(f"{_named(names)} cannot be evaluated: {_reason(error, logged)}") from error
    for message in dict.fromkeys(logged):
        warn(f"lm-eval: {message}")
    kept = {name: found[name] for name in KEPT if name in found}
    if hasattr(model, "get_model_info"):
        kept["model"] = model.get_model_info()
    return json.loads(json.dumps(kept, default=handle_non_serializable))


def scores(found: Mapping[str, Any]) -> list[Score]:
    """The metrics in the results of `evaluate`, task by task."""
    rows = []
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, comma, name = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                spread = values.get(f"{metric}_stderr,{name}")
                rows.append(Score(task, metric, name, value, spread if isinstance(spread, (int, float)) else None))
    return rows


class _Tasks(TaskManager):
    """Reports what is wrong with a task in one line. logged: the errors that lm-eval has logged."""

    def __init__(self, logged: Sequence[str], **options: Any) -> None:
        super().__init__(**options)
        self._logged = logged

    def load(self, task_list: Any) -> Any:
        try:
            return super().load(task_list)
        except SlmError:
            raise
        except Exception as error:
            names = task_list if isinstance(task_list, list) else [task_list]
            for name in names if len(names) > 1 else ():
                self.load([name])  # raises for the one that cannot be loaded
            raise WorkError(f"{_named(names)} cannot be loaded: {_reason(error, self._logged)}") from error


def _named(tasks: Sequence[Any]) -> str:
    kinds = {"task file" if str(task).endswith((".yaml", ".yml")) else "task" for task in tasks}
    return f"{kinds.pop() if len(kinds) == 1 else 'task'} {some_of(map(repr, map(str, tasks)))}"


def _reason(error: Exception, logged: Sequence[str]) -> str:
    """What is wrong with a task, from an exception of lm-eval's or its libraries', and the errors logged before it."""
    if isinstance(error, StopIteration):
        return "its data has no rows"
    if not any(error.args) and logged:  # no reason in the exception itself
        return logged[-1]
    kind, said = type(error).__name__, ADDRESS.sub("", one_line(error))
    calls = [call.name for call in traceback.extract_tb(error.__traceback__) if call.name.startswith("doc_to_")]
    parts = [*calls[-1:], kind, *([said] if said != kind else [])]
    wrong_type = calls[-1:] == ["doc_to_choice"] and isinstance(error, (ValueError, SyntaxError, TypeError))
    return ": ".join(parts) + ("; expected a list such as ['yes', 'no']" if wrong_type else "")


def _found(
    tasks: Sequence[str], folder: str | Path | None, metadata: dict[str, Any], logged: Sequence[str]
) -> tuple[TaskManager, list[str]]:
    """The task manager, and the names or files that `tasks` match. lm-eval's own thousands of tasks are read only if
    something is not among the user's."""
    if folder is not None and not Path(folder).is_dir():
        wrong = "is a file, expected a folder" if Path(folder).exists() else "no such folder"
        raise InputError(f"task folder {str(folder)!r}: {wrong}")
    for defaults in (False, True):
        manager = _Tasks(logged, include_path=folder, include_defaults=defaults, metadata=metadata)
        names: list[str] = []
        missing: list[str] = []
        for task in tasks:
            is_file = task.endswith((".yaml", ".yml")) and Path(task).is_file()
            known = [task] if is_file else manager.match_tasks([task])
            names += known
            missing += [] if known else [task]
        if not missing:
            return manager, list(dict.fromkeys(names))
    raise InputError(f"task {missing[0]!r}: neither a task of lm-eval's, nor one in the task folder, nor a YAML file")


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(" ".join(record.getMessage().split()))


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Silence lm-eval's log and the progress bars of its data. Returns a list to which logged errors are added."""
    log, logged = logging.getLogger("lm_eval"), _Kept()
    before, bars = (log.level, log.propagate), datasets.are_progress_bars_disabled()
    log.setLevel(logging.ERROR)
    log.propagate = False
    log.addHandler(logged)
    datasets.disable_progress_bars()
    try:
        yield logged.messages
    finally:
        log.setLevel(before[0])
        log.propagate = before[1]
        log.removeHandler(logged)
        if not bars:
            datasets.enable_progress_bars()
