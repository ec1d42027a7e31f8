"""Runs of the continual-learning benchmark, read from their folders.

RUN/run.json                            the stream, the settings, the machine
RUN/zeroshot.csv                        scores on zero-shot benchmarks, if they were run (see zeroshot.py)
RUN/<method>/about.json                 its title, and whether it is given oracle task IDs
RUN/<method>/seed<k>/stages.jsonl       one line after each learned task
RUN/<method>/seed<k>/untrained.json     accuracy by task before the first one is learned, if requested
RUN/<method>/seed<k>/answers-<n>.csv.gz after the n-th task: task,row,right,named
RUN/<method>/seed<k>/store              the final store, for methods of slm_fast
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from slm_fast.errors import InputError, WorkError

FORMAT = 1
SECONDS = ("learn", "answer", "route")  # each as wall-clock time and as CPU time of the process
COSTS = (
    *(f"{what}{by}_seconds" for what in SECONDS for by in ("", "_cpu")),
    *("rows_answered", "peak_mib", "parameters", "kept_bytes"),
    *(f"{what}_peak{where}_mib" for what in ("learn", "answer") for where in ("", "_gpu")),
)
TIMED = ("rows", *(f"{what}{by}_seconds" for what in ("route", "answer") for by in ("", "_cpu")))


class Answered(NamedTuple):
    """A line of an answers file."""

    task: str
    row: str
    right: float
    named: str


@dataclass(frozen=True)
class Stage:
    """Measurements after a task was learned.

    rows, accuracy, routed, retrieved: by evaluated task; None if the method does not report it. also: other metrics of
    a task's answers, as fractions by name. costs: those of `COSTS`, None if unknown. routed_by: for each task, the
    share of its rows with instructions that is routed to it by the "input" alone and by the whole "prompt", if known.
    timed: for each task, the times of `TIMED` for some of its rows, if known.
    """

    after: str
    rows: Mapping[str, int]
    accuracy: Mapping[str, float]
    routed: Mapping[str, float | None]
    retrieved: Mapping[str, float | None]
    also: Mapping[str, Mapping[str, float]]
    costs: Mapping[str, float | None]
    routed_by: Mapping[str, Mapping[str, float | None]]
    timed: Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True)
class Seed:
    """One seed of a method: its folder, its finished stages, and accuracies before the first task, if known."""

    folder: Path
    stages: Sequence[Stage]
    untrained: Mapping[str, float]

    def answers(self) -> Counter[tuple[str, str]] | None:
        """Row counts of learned tasks after the last stage, by (task, predicted task); None if not saved or no task is
        predicted.

        Raises WorkError for a damaged file.
        """
        learned = {stage.after for stage in self.stages}
        rows = self._rows(len(self.stages))
        found = None if rows is None else Counter((row.task, row.named) for row in rows if row.task in learned)
        return found if found and any(named for _, named in found) else None

    def scores(self, done: int) -> dict[str, dict[str, float]] | None:
        """After `done` tasks, the score of each row from 0 to 1, by task and the row's number; None if not saved.

        Raises WorkError for a damaged file.
        """
        rows = self._rows(done)
        found: dict[str, dict[str, float]] = {}
        for row in rows or ():
            found.setdefault(row.task, {})[row.row] = row.right
        return None if rows is None else found

    def _rows(self, done: int) -> list[Answered] | None:
        path = self.folder / f"answers-{done}.csv.gz"
        if not path.exists():
            return None
        found: list[Answered] = []
        try:
            with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file, strict=True):
                    if None in row.values():
                        raise ValueError("a line has too few fields")
                    right = float(row["right"])
                    if not 0 <= right <= 1:
                        raise ValueError(f"right: expected a score of 0 to 1, got {row['right']}")
                    found.append(Answered(row["task"], row["row"], right, row["named"]))
        except (OSError, EOFError, csv.Error, KeyError, zlib.error, ValueError) as error:
            raise WorkError(f"{path}: damaged answers: {type(error).__name__}: {error}") from None
        if len({(row.task, row.row) for row in found}) < len(found):
            raise WorkError(f"{path}: damaged answers: a row is there twice")
        return found

    @property
    def store(self) -> Path | None:
        path = self.folder / "store"
        return path if (path / "manifest.json").exists() else None


@dataclass(frozen=True)
class Method:
    """A method and its seeds with at least one stage.

    Attributes:
        told: it is given oracle task IDs.
        retrains: it trains on all rows of earlier tasks again.
    """

    name: str
    title: str
    told: bool
    retrains: bool
    seeds: Sequence[Seed]

    @property
    def advantaged(self) -> bool:
        """Whether it has what continual learning goes without, so that others are compared with it, but not ranked."""
        return self.told or self.retrains

    @property
    def stages(self) -> int:
        """The number of tasks learned by the most advanced seed."""
        return max(len(seed.stages) for seed in self.seeds)

    @property
    def farthest(self) -> list[Seed]:
        """The seeds that have learned that many tasks; results are computed over these."""
        return [seed for seed in self.seeds if len(seed.stages) == self.stages]


@dataclass(frozen=True)
class Run:
    """path: its folder. about: its run.json. tasks: in learning order."""

    path: Path
    about: Mapping[str, Any]
    stream: str
    tasks: Sequence[str]
    methods: Sequence[Method]
    waiting: Sequence[str]  # titles of methods without a finished stage


def read_run(path: str | Path) -> Run:
    """Read a run, finished or not.

    Raises:
        InputError: the folder is no run. WorkError: a file of it is damaged or of another format, or no stage is done.
    """
    path = Path(path)
    file = path / "run.json"
    if not path.is_dir():
        wrong = "is a file, expected a folder" if path.exists() else "no such folder; expected one"
        raise InputError(f"{path}: {wrong} that a run of the benchmark made")
    if not file.is_file():
        raise InputError(f"{path}: not a run of the benchmark (no run.json)")
    about = _read_json(file)
    if about.get("format") != FORMAT:
        raise WorkError(f"{file}: expected format {FORMAT}, got {about.get('format')!r}")
    stream = about.get("stream")
    tasks = stream.get("tasks") if isinstance(stream, dict) else None
    if not isinstance(tasks, list) or not tasks or not all(isinstance(t, str) and t for t in tasks):
        raise WorkError(f"{file}: expected a stream with a list of tasks, got {_short(stream)}")
    if len(set(tasks)) < len(tasks):
        raise WorkError(f"{file}: a task is twice in the stream: {', '.join(tasks)}")
    methods, waiting = [], []
    for folder in sorted(path.iterdir()):
        seeds = [one for _, one in sorted((_number(one), one) for one in folder.glob("seed*") if _number(one) >= 0)]
        if not seeds:
            continue
        title, told, retrains = _about(folder)
        read = [Seed(one, _stages(one / "stages.jsonl", tasks), _untrained(one / "untrained.json")) for one in seeds]
        done = [seed for seed in read if seed.stages]
        if done:
            methods.append(Method(folder.name, title, told, retrains, done))
        else:
            waiting.append(title)
    if not methods:
        raise WorkError(f"{path}: no stage is done yet: no method has a line in seed<k>/stages.jsonl")
    assert isinstance(stream, dict)
    return Run(path, about, str(stream.get("name") or path.name), tasks, methods, waiting)


def _number(folder: Path) -> int:
    """The number of a seed's folder; -1 for other folders."""
    found = re.fullmatch(r"seed(\d+)", folder.name)
    return int(found[1]) if found and folder.is_dir() else -1


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except OSError as error:
        raise WorkError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise WorkError(f"{file}: damaged: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise WorkError(f"{file}: damaged: expected an object, got {_short(found)}")
    return found


def _about(folder: Path) -> tuple[str, bool, bool]:
    """A method's title (by default its folder's name), whether it is given oracle task IDs, whether it retrains."""
    file = folder / "about.json"
    about = _read_json(file) if file.exists() else {}
    title, told, retrains = about.get("title", folder.name), about.get("told", False), about.get("retrains", False)
    if not isinstance(title, str) or not isinstance(told, bool) or not isinstance(retrains, bool):
        raise WorkError(
            f"{file}: damaged: expected a title, and whether it is told the tasks and retrains, got {_short(about)}"
        )
    return title or folder.name, told, retrains


def _untrained(file: Path) -> dict[str, float]:
    found = _read_json(file) if file.exists() else {}
    try:
        return {name: value for name in found if (value := _share(found, name, "untrained")) is not None}
    except ValueError as error:
        raise WorkError(f"{file}: damaged: {error}") from None


def _stages(file: Path, tasks: Sequence[str]) -> list[Stage]:
    if not file.exists():
        return []
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise WorkError(f"{file}: cannot be read: {error.strerror}") from None
    found: list[Stage] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(_stage(json.loads(line), tasks, len(found)))
        except (ValueError, RecursionError) as error:
            raise WorkError(f"{file}: line {number} is damaged: {error}") from None
    return found


def _stage(line: Any, tasks: Sequence[str], done: int) -> Stage:
    """Parse a stage. Raises ValueError if it is damaged."""
    if not isinstance(line, dict) or not isinstance(line.get("tasks"), dict):
        raise ValueError(f"expected an object with tasks, got {_short(line)}")
    if done == len(tasks):
        raise ValueError(f"the stream has {len(tasks)} tasks, this is one more")
    if line.get("after") != tasks[done]:
        raise ValueError(f"expected what was measured after {tasks[done]!r}, got after {line.get('after')!r}")
    missing = [name for name in tasks[: done + 1] if name not in line["tasks"]]
    if missing:
        raise ValueError(f"says nothing of {missing[0]!r}, which is learned")
    strange = [name for name in line["tasks"] if name not in tasks]
    if strange:
        raise ValueError(f"task {strange[0]!r} is not in the stream")
    rows, accuracy, routed, retrieved, also, routed_by, timed = {}, {}, {}, {}, {}, {}, {}
    for name, own in line["tasks"].items():
        if not isinstance(own, dict):
            raise ValueError(f"{name}: expected an object, got {_short(own)}")
        share = _share(own, "accuracy", name)
        if share is None:
            raise ValueError(f"{name}: expected an accuracy, got none")
        count = own.get("rows")
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name}: expected a number of rows, got {_short(count)}")
        rows[name], accuracy[name] = count, share
        routed[name], retrieved[name] = _share(own, "routed", name), _share(own, "retrieved", name)
        more = _object(own, "also", name)
        also[name] = {what: value for what in more if (value := _share(more, what, name)) is not None}
        more = _object(own, "routed_by", name)
        routed_by[name] = {what: _share(more, what, name) for what in ("input", "prompt")}
        more = _object(_object(line, "timed", "stage"), name, "timed")
        timed[name] = {what: _cost(more, what) for what in TIMED}
    costs = {cost: _cost(line, cost) for cost in COSTS}
    return Stage(line["after"], rows, accuracy, routed, retrieved, also, costs, routed_by, timed)


def _object(own: Mapping[str, Any], what: str, name: str) -> Mapping[str, Any]:
    found = own.get(what)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{name}: {what}: expected an object, got {_short(found)}")
    return found


def _share(own: Mapping[str, Any], what: str, name: str) -> float | None:
    value = own.get(what)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name}: {what}: expected a share of 0 to 1, got {_short(value)}")
    return float(value)


def _cost(line: Mapping[str, Any], what: str) -> float | None:
    value = line.get(what)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None  # NaN is written if it could not be measured
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise ValueError(f"{what}: expected a number from 0 up, got {_short(value)}")
    return float(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
