"""Many tasks learned one after another and several at a time, one process each: seconds, and whether bytes agree.

    python -m benchmarks.speed.jobs [--data DIR] [--tasks N] [--rows N] [--jobs N]

Times `slm-fast learn --jobs` of MiniLM from start to end. Each process has one thread, so with as many jobs as cores,
the best possible speed-up is their number. The tasks are those of DIR/intents or, without it, the demonstration's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.arguments import Parser, at_least, exit_status, output_file
from benchmarks.continual.streams import load
from benchmarks.speed.timing import percentiles
from benchmarks.tables import RESULTS, table, write_csv
from slm_fast import InputError, Task, demo

COMMAND = "slm-fast bench jobs"


def tasks_of(data: Path | None, count: int, rows: int) -> list[Task]:
    """The first tasks with labels in a folder's `intents`, or the demonstration's."""
    if data is None:
        return list(demo.load("train").values())[:count]
    names = sorted(file.parent.name for file in data.glob("intents/*/train.jsonl.gz"))
    if not names:
        raise InputError(f"--data: {data / 'intents'}: no folder of a task with train.jsonl.gz in it")
    found = (load(data / "intents", name, "train", rows) for name in names)
    return [task for task in found if task.labels][:count]


def learned(tasks: list[Task], folder: Path, jobs: int) -> tuple[float, dict[str, bytes]]:
    """Seconds to learn the tasks into a new store, and the contents of its files."""
    words = ["learn", str(folder / "store"), "--backbone", "minilm", "--jobs", str(jobs)]
    for task in tasks:
        file = folder / f"{task.name}.jsonl"
        file.write_text("".join(json.dumps({"text": row.text, "label": row.target}) + "\n" for row in task.rows))
        words += ["--task", f"{task.name}={file}"]
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "slm_fast.cli", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        stderr=subprocess.DEVNULL,
    )
    took = time.perf_counter() - start
    files = [*(folder / "store").glob("tasks/*/*"), folder / "store" / "manifest.json"]
    return took, {str(file.relative_to(folder)): file.read_bytes() for file in files}


def main() -> None:
    parser = Parser(COMMAND, __doc__)
    about = "folder that contains intents/; default: the demonstration's tasks"
    parser.add_argument("--data", type=Path, help=about)
    parser.add_argument("--tasks", type=at_least(1), default=10)
    parser.add_argument("--rows", type=at_least(1), default=600, help="rows per task, at most")
    parser.add_argument("--jobs", type=at_least(1), default=2)
    parser.add_argument("--rounds", type=at_least(1), default=1)
    parser.add_argument("--output", type=output_file, default=RESULTS / "jobs.csv")
    chosen = parser.parse_args()
    tasks = tasks_of(chosen.data, chosen.tasks, chosen.rows)
    times: dict[int, list[float]] = {1: [], chosen.jobs: []}
    stores = []
    for _ in range(chosen.rounds):  # in turns
        for jobs, took in times.items():
            with tempfile.TemporaryDirectory() as folder:
                seconds, store = learned(tasks, Path(folder), jobs)
            took.append(seconds)
            stores.append(store)
            print(f"{len(tasks)} tasks, {jobs} at a time: {seconds:.1f} s", file=sys.stderr)
    one, lines = percentiles(times[1]).p50, []
    for jobs, took in times.items():
        line: dict[str, Any] = {"tasks": len(tasks), "rows": sum(len(task.rows) for task in tasks), "jobs": jobs}
        line |= {"seconds": f"{percentiles(took).p50:.1f}", "speed_up": f"{one / percentiles(took).p50:.2f}"}
        lines.append(line | {"same_bytes": all(store == stores[0] for store in stores)})
    print(table(lines))
    command = f"slm-fast bench jobs --tasks {chosen.tasks} --rows {chosen.rows} --jobs {chosen.jobs}"
    write_csv(chosen.output, lines, {"command": command})


if __name__ == "__main__":
    sys.exit(exit_status(COMMAND, main))
