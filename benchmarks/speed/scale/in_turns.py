"""Rows/s with many tasks, relative to those with few: answered in turns by one process, because the machine's speed may
change.

    python -m benchmarks.speed.scale.in_turns [--tasks 5,10000] [--folder DIR] [--rounds 15]

The stores and texts are those of `benchmarks.speed.scale`. A store of 100 tasks or more has room for a tenth of its
tasks' values. One thread; CPU seconds. Every round answers 512 texts with each store. First, each task is given once
("first": that compares what is read of its file with a digest, once in a process). Then texts are routed among all
tasks, and then given tasks drawn by Zipf's law (exponent 1) or uniformly.

rows/s: median. ratio: median over rounds of rows/s relative to the first store's in the same round, and the 20th and
80th percentile.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks.arguments import Parser, at_least, counts, output_file
from benchmarks.speed.scale.stores import LEAST_PAGED, Maker, make, seconds, traffic
from benchmarks.tables import RESULTS, table, write_csv
from slm_fast import ScalableLM

ROWS = 512
WARM = 2  # rounds that do not count: keys are prepared, and tasks come to be on the device
FIRST = "first"
WAYS = {FIRST: 0.0, "routed": 0.0, "zipf": 1.0, "uniform": 0.0}  # exponents of the tasks' frequencies


def opened(folder: Path, count: int) -> ScalableLM:
    make(folder, count)
    values = Maker(ScalableLM.from_backbone("minilm")).like.values.values()
    room = count * sum(a.nbytes + b.nbytes for a, b in values) // 10 if count >= LEAST_PAGED else None
    return ScalableLM.from_pretrained(folder, device_memory=room)


def asked(tasks: Sequence[str], way: str, rows: int) -> tuple[list[str], list[str]]:
    """Texts, and the task of each."""
    texts, drawn = traffic(tasks, WAYS[way], rows)
    return texts, list(islice(cycle(tasks), rows)) if way == FIRST else drawn


def rates(models: Mapping[int, ScalableLM], way: str, rounds: int) -> dict[int, list[float]]:
    """Rows per CPU second of each round, by the number of tasks."""
    warm, rounds = (0, max(-(-max(models) // ROWS), 2)) if way == FIRST else (WARM, rounds)
    rows = {count: asked(slm.tasks, way, ROWS * (warm + rounds)) for count, slm in models.items()}
    found: dict[int, list[float]] = {count: [] for count in models}
    for turn in range(warm + rounds):
        part = slice(ROWS * turn, ROWS * (turn + 1))
        for count, slm in models.items():
            texts, tasks = (each[part] for each in rows[count])
            took, _ = seconds(partial(slm.predict, texts, task=None if way == "routed" else tasks))
            found[count].append(ROWS / took)
        print(way, turn + 1, *(f"{each[-1]:.0f}" for each in found.values()), file=sys.stderr)
    return {count: each[warm:] for count, each in found.items()}


def main() -> None:
    parser = Parser("python -m benchmarks.speed.scale.in_turns", __doc__)
    parser.add_argument("--tasks", type=counts, default="5,10000", help="sizes of the stores, comma-separated")
    parser.add_argument("--folder", type=Path, help="where to keep the stores; default: a temporary folder")
    parser.add_argument("--rounds", type=at_least(2), default=15)
    parser.add_argument("--output", type=output_file, default=RESULTS / "scale_in_turns.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.folder or Path(tempfile.mkdtemp())
    models = {count: opened(folder / str(count), count) for count in options.tasks}
    lines: list[dict[str, Any]] = []
    for way in WAYS:
        found = rates(models, way, options.rounds)
        first, *_ = found.values()
        for count, each in found.items():
            ratios = [many / few for many, few in zip(each, first, strict=True)]
            low, *_, high = quantiles(ratios, n=5, method="inclusive")
            line = {"way": way, "tasks": count, "rows/s": f"{median(each):.0f}", "ratio": f"{median(ratios):.3f}"}
            lines.append(line | {"p20": f"{low:.3f}", "p80": f"{high:.3f}"})
    if options.folder is None:
        shutil.rmtree(folder)
    print(table(lines))
    sizes = ",".join(map(str, options.tasks))
    command = f"python -m benchmarks.speed.scale.in_turns --tasks {sizes} --rounds {options.rounds}"
    write_csv(options.output, lines, {"command": command, "unit": "rows a processor second"})


if __name__ == "__main__":
    main()
