"""What each part of the router brings: the task named right on training rows held out, fold by fold.

    python -m benchmarks.continual.routers --data DIR --stream clinc

No values are learned: routes depend on frozen states alone. Every row is answered once, by a router that did not have
it, over all tasks of the stream; so what one part more brings is paired by row. Results:
benchmarks/results/routers_<stream>.csv, with what a task keeps for its router in bytes and what a row costs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from benchmarks.continual.streams import STREAMS, Stream
from benchmarks.tables import RESULTS, table, write_csv
from slm_fast import SlmError, Task
from slm_fast.backbone import Backbone
from slm_fast.learn import label_numbers
from slm_fast.model import AdaptedModel
from slm_fast.options import ModelConfig


@dataclass(frozen=True)
class Variant:
    """A router: how many random features (0: none, and no maxima), and whether labels have means of their own."""

    name: str
    features: int
    labels: bool = True


VARIANTS = (
    Variant("a mean a task", 0, labels=False),
    Variant("a mean a label", 0),
    Variant("and maxima, 512 random features", 512),
    Variant("and maxima, 1,024 random features", 1024),
    Variant("and maxima, 2,048 random features", 2048),
    Variant("and maxima, 4,096 random features", 4096),
    Variant("2,048 random features, a mean a task", 2048, labels=False),
)


def folds_of(task: Task, folds: int) -> Tensor:
    """The fold of each row [N]: each label's rows are dealt out."""
    numbers = label_numbers(task)
    assert numbers is not None
    fold = torch.empty(len(numbers), dtype=torch.int64)
    fold[numbers.argsort(stable=True)] = torch.arange(len(numbers)) % folds
    return fold


def measure(
    variant: Variant, tasks: dict[str, Task], queries: dict[bool, dict[str, Tensor]], folds: int
) -> tuple[Tensor, dict[str, Any]]:
    """Whether each row's task is named right [rows], and the variant's line without what it gains. `queries`, without
    maxima and with, are kept there for the next variant."""
    model = AdaptedModel(Backbone.load("minilm"), ModelConfig(max_length=128, features=variant.features))
    if (variant.features > 0) not in queries:
        queries[variant.features > 0] = {name: model.queries(task.rows) for name, task in tasks.items()}
    own_queries = queries[variant.features > 0]
    labels = {name: label_numbers(task) if variant.labels else None for name, task in tasks.items()}
    fold_of = {name: folds_of(task, folds) for name, task in tasks.items()}
    right = {name: torch.zeros(len(task.rows)) for name, task in tasks.items()}
    fit_s, route_s, kept = 0.0, 0.0, 0
    for fold in range(folds):
        parts, started = {}, time.perf_counter()
        for name, query in own_queries.items():
            own = fold_of[name] != fold
            numbers = labels[name]
            parts[name] = model.new_router().fit(query[own], 1, 0, None if numbers is None else numbers[own])
        fit_s += time.perf_counter() - started
        kept += sum(tensor.nbytes for part in parts.values() for tensor in part.values())
        router = model.new_router()
        router.load(parts, torch.device("cpu"))
        router.prepare()
        for place, name in enumerate(router.names):
            own = fold_of[name] == fold
            started = time.perf_counter()
            right[name][own] = (router.route(own_queries[name][own]).slot_ids[:, 0] == place).float()
            route_s += time.perf_counter() - started
    found = torch.cat(list(right.values()))
    line = {
        "router": variant.name,
        "right_task": f"{100 * float(found.mean()):.2f}",
        "bytes_a_task": round(kept / folds / len(tasks)),
        "fit_s_a_task": f"{fit_s / folds / len(tasks):.2f}",
        "route_us_a_row": f"{1e6 * route_s / len(found):.1f}",
    }
    return found, line


def ablation(stream: Stream, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A line a variant: the task named right in percent, what it gains over the first, and its standard error."""
    tasks = stream.load(options.data, "train", 0, options.train or stream.rows)
    queries: dict[bool, dict[str, Tensor]] = {}
    first, lines = None, []
    for variant in VARIANTS:
        found, line = measure(variant, tasks, queries, options.folds)
        first = found if first is None else first
        gain = (100 * (found - first)).tolist()
        line |= {"gain": f"{mean(gain):.2f}", "gain_se": f"{stdev(gain) / len(gain) ** 0.5:.2f}"}
        lines.append(line)
        print(f"{variant.name}: {line['right_task']}", file=sys.stderr)
    return lines


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the streams' folders")
    parser.add_argument("--stream", choices=list(STREAMS), required=True)
    parser.add_argument("--train", type=int, help="training rows a task at the most; default: the stream's")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/routers_<stream>.csv")
    options = parser.parse_args(arguments)
    try:
        lines = ablation(STREAMS[options.stream], options)
    except SlmError as error:
        print(f"routers: error: {error}", file=sys.stderr)
        return error.status
    rows = options.train or STREAMS[options.stream].rows
    notes = {"setup": f"training rows, {options.folds} folds, at most {rows} rows a task, at most 128 tokens"}
    write_csv(options.output or RESULTS / f"routers_{options.stream}.csv", lines, notes)
    print(table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
