"""A user's own stream, from a YAML file:

    rows: 1500                     # training rows per task, at most; optional
    tasks:                         # in the order of learning
      tickets: {train: tickets.train.csv, test: tickets.test.csv}
      returns: {train: returns/train.jsonl.gz, test: returns/test.jsonl.gz, labels: returns/labels.json}
      news:    {dataset: fancyzhx/ag_news, train: train, test: test}

Paths are relative to the file's folder. `dataset` is the name of a Hugging Face data set (with `config` if it has
several); `train` and `test` are then its splits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.continual.streams import Stream
from slm_fast import InputError, Task, WorkError
from slm_fast.errors import one_line

KEYS = {"train", "test", "labels", "dataset", "config"}


@dataclass(frozen=True)
class FileStream(Stream):
    """A stream whose tasks are described one by one. described: task name -> its entry. path: the file."""

    described: Mapping[str, Mapping[str, str]] = None  # type: ignore[assignment]
    path: Path = Path()

    def load(self, data: Path, split: str, seed: int, rows: int | None = None) -> dict[str, Task]:
        return {name: self._task(name, split, rows) for name in self.tasks}

    def _task(self, name: str, split: str, rows: int | None) -> Task:
        about, training = self.described[name], split == "train"
        if "dataset" in about:
            task = _from_hub(name, about, split)
        else:
            source, labels = self.path.parent / about[split], about.get("labels")
            words = None if labels is None else self.path.parent / labels
            task = Task.from_file(name, source, labels=words, training=training)
        return Task(name, task.rows[:rows], free_text=task.labels is None, training=training)


def _from_hub(name: str, about: Mapping[str, str], split: str) -> Task:
    try:
        import datasets
    except ImportError:
        raise InputError(f"{name}: a data set by name needs `pip install datasets`") from None
    try:
        found: Any = datasets.load_dataset(about["dataset"], about.get("config"), split=about[split])
    except Exception as error:  # anything the library or the network raises
        raise WorkError(f"{name}: data set {about['dataset']!r} cannot be loaded: {one_line(error)}") from None
    return Task(name, found, training=split == "train")


def read_stream(path: Path) -> FileStream:
    """The stream that a YAML file describes.

    Raises InputError for a missing file, WorkError for invalid content; both name the file.
    """
    try:
        about = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise WorkError(f"{path}: not YAML: {one_line(error)}") from None
    tasks = about.get("tasks") if isinstance(about, dict) else None
    if not isinstance(tasks, dict) or not tasks:
        raise WorkError(
            f"{path}: 'tasks': expected names with their files, such as tickets: {{train: a.csv, test: b.csv}}"
        )
    if unknown := [key for key in about if key not in ("tasks", "rows")]:
        raise WorkError(f"{path}: {unknown[0]!r}: unknown; a stream has 'tasks' and 'rows'")
    rows = about.get("rows", 1500)
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise WorkError(f"{path}: 'rows': expected a whole number from 1 on, got {rows!r}")
    for name, own in tasks.items():
        if not isinstance(name, str):
            raise WorkError(f"{path}: task {name!r}: expected a text; put the name in quotes")
        if not isinstance(own, dict) or not {"train", "test"} <= set(own) or not set(own) <= KEYS:
            raise WorkError(
                f"{path}: task {name!r}: expected train and test, and of {', '.join(sorted(KEYS))} no other"
            )
        if bad := [key for key, value in own.items() if not isinstance(value, str)]:
            raise WorkError(f"{path}: task {name!r}: {bad[0]!r}: expected a word, got {own[bad[0]]!r}")
        files = [] if "dataset" in own else [own[key] for key in ("train", "test", "labels") if key in own]
        for file in files:
            if not (path.parent / file).is_file():
                raise InputError(f"{path}: task {name!r}: {path.parent / file}: no such file")
    if twice := _repeated(path):
        raise WorkError(f"{path}: task {twice!r} is there twice")
    return FileStream(str(path.parent), tuple(tasks), rows, described=tasks, path=path)


def _repeated(path: Path) -> str | None:
    """The first task that the file names twice; YAML would keep only the last."""
    node = yaml.compose(path.read_text(encoding="utf-8"))
    for key, value in node.value:
        if key.value == "tasks":
            names = [name.value for name, _ in value.value]
            return next((name for i, name in enumerate(names) if name in names[:i]), None)
    return None
