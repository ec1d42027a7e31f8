"""Synthetic run folders of the continual-learning benchmark, with numbers seeded by the method names."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

TASKS = ("ag_news", "yelp", "amazon", "yahoo", "dbpedia")
ROWS = 40
METHODS: dict[str, tuple[str, bool, float, float]] = {  # title, oracle task ID, accuracy, its loss per later task
    "slm": ("SLM (ours)", False, 0.93, 0.002),
    "slm_told": ("SLM-TI", True, 0.95, 0.0),
    "finetune": ("Sequential fine-tuning", False, 0.92, 0.3),
    "replay": ("Experience replay", False, 0.90, 0.06),
}


def stage_of(
    done: int, accuracy: Mapping[str, float], *, tasks: Sequence[str] = TASKS, named: bool = True
) -> dict[str, Any]:
    """The line of stages.jsonl after `done` tasks have been learned."""
    own = {
        name: {"rows": ROWS, "accuracy": share, "routed": 0.95 if named else None, "retrieved": 0.9 if named else None}
        for name, share in accuracy.items()
    }
    costs = {
        "learn_seconds": 30.0 + done,
        "answer_seconds": 2.0,
        "rows_answered": ROWS * len(own),
        "peak_mib": 900 + done,
    }
    return {
        "after": tasks[done - 1],
        "tasks": own,
        **costs,
        "parameters": 300_000 * done,
        "kept_bytes": 1_300_000 * done,
    }


def write_stages(seed: Path, stages: Sequence[Mapping[str, Any]]) -> None:
    seed.mkdir(parents=True, exist_ok=True)
    (seed / "stages.jsonl").write_text("".join(json.dumps(stage) + "\n" for stage in stages))


def write_answers(seed: Path, done: int, named: Sequence[tuple[str, str]]) -> None:
    lines = [f"{task},{i},1,{other}\n" for i, (task, other) in enumerate(named)]
    data = gzip.compress(("task,row,right,named\n" + "".join(lines)).encode(), mtime=0)
    (seed / f"answers-{done}.csv.gz").write_bytes(data)


def write_run(path: Path, *, tasks: Sequence[str] = TASKS, stream: str = "order4", **more: Any) -> Path:
    """Write the run.json of a run, which has no methods yet; `more` overrides its fields."""
    path.mkdir(parents=True, exist_ok=True)
    about = {
        "format": 1,
        "stream": {"name": stream, "tasks": list(tasks)},
        "backbone": "minilm",
        "settings": {"train": 1500, "test": None, "epochs": None, "max_length": 128},
        "machine": {"cpu": "a processor of two cores", "torch": "2.11.0"},
        "date": "2026-11-28",
    }
    (path / "run.json").write_text(json.dumps(about | more))
    return path


def write_method(path: Path, name: str, *, seeds: int = 1, stages: int = len(TASKS)) -> None:
    """Write the files of one of METHODS, with the first `stages` tasks learned."""
    title, told, accuracy, lost = METHODS[name]
    folder = path / name
    folder.mkdir(exist_ok=True)
    (folder / "about.json").write_text(json.dumps({"title": title, "told": told}))
    for k in range(seeds):
        rng = random.Random(f"{name} {k}")
        first = {task: accuracy + rng.uniform(-0.03, 0.03) for task in TASKS}
        lines = []
        for done in range(1, stages + 1):
            at = {task: max(0.0, first[task] - lost * (done - 1 - i)) for i, task in enumerate(TASKS[:done])}
            lines.append(stage_of(done, at, named=not told))
        write_stages(folder / f"seed{k}", lines)
        if not told:
            known = TASKS[:stages]
            named = [
                (task, task if rng.random() < accuracy else rng.choice(known)) for task in known for _ in range(ROWS)
            ]
            write_answers(folder / f"seed{k}", stages, named)


def make_run(path: Path, *, seeds: int = 2, methods: Iterable[str] = METHODS) -> Path:
    """Write a finished run of these methods."""
    write_run(path)
    for name in methods:
        write_method(path, name, seeds=seeds)
    return path
