"""Routing accuracy of slm_fast's router, of each part of it, and of the routers of EPI and Any-SSR.

    python -m benchmarks.continual.routers --data DIR --stream clinc
    python -m benchmarks.continual.routers --data DIR --stream clinc --test

No values are learned: routes depend only on frozen states, which all routers read from the same pass. Training rows are
answered by cross-validation; with --test, all training rows are learned and the test rows answered. Differences from
the first line are paired by row. Results: benchmarks/results/routers_<stream>.csv, or routers_<stream>_test.csv, with
bytes per task (what all tasks share is divided by their number), seconds to fit a task and, once for all tasks, to
prepare, and the time per row beyond its frozen states.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from benchmarks.arguments import Parser, at_least, output_file, work_folder
from benchmarks.continual.methods.any_ssr import AnySsr
from benchmarks.continual.methods.epi import Epi
from benchmarks.continual.methods.identifier import Identifier
from benchmarks.continual.methods.slm_router import SlmRouter
from benchmarks.continual.states import States, states
from benchmarks.continual.streams import STREAMS, Stream
from benchmarks.tables import RESULTS, table, write_csv
from slm_fast import SlmError, Task
from slm_fast.backbone import Backbone
from slm_fast.learn import label_numbers


@dataclass(frozen=True)
class Variant:
    """A router, and which of a row's frozen states it reads (`States.read`)."""

    name: str
    reads: str
    make: Callable[[], Identifier]


VARIANTS = (
    Variant("a mean a task", "means", partial(SlmRouter, 0, labels=False)),
    Variant("a mean a label", "means", partial(SlmRouter, 0)),
    Variant("and maxima", "query", partial(SlmRouter, 0)),
    Variant("and 2,048 random features", "means", partial(SlmRouter, 2048)),
    Variant("and maxima, 512 random features", "query", partial(SlmRouter, 512)),
    Variant("and maxima, 1,024 random features", "query", partial(SlmRouter, 1024)),
    Variant("and maxima, 2,048 random features", "query", partial(SlmRouter, 2048)),
    Variant("2,048, labels' means as they are", "query", partial(SlmRouter, 2048, drawn=False)),
    Variant("and maxima, 4,096 random features", "query", partial(SlmRouter, 4096)),
    Variant("2,048 random features, a mean a task", "query", partial(SlmRouter, 2048, labels=False)),
    Variant("EPI", "last", Epi),
    Variant("EPI of our mean states", "means", Epi),
    Variant("Any-SSR", "means", AnySsr),
)


@dataclass(frozen=True)
class Rows:
    """Rows of a task: their frozen states and label indices [N], None for free text."""

    states: States
    labels: Tensor | None

    def chosen(self, which: Tensor) -> Rows:
        """The rows selected by `which`, [N] bool."""
        query, means, last = self.states
        labels = None if self.labels is None else self.labels[which]
        return Rows(States(query[which], means, last[which]), labels)


Stage = tuple[Mapping[str, Rows], Mapping[str, Rows]]  # the tasks to learn and the tasks to answer, by name


def rows_of(task: Task, backbone: Backbone, work: Path | None) -> Rows:
    return Rows(states(backbone, task.rows, 128, work), label_numbers(task))


def folds_of(labels: Tensor | None, rows: int, folds: int) -> Tensor:
    """The fold of each row, [N], stratified by label if there are labels."""
    fold = torch.empty(rows, dtype=torch.int64)
    order = torch.arange(rows) if labels is None else labels.argsort(stable=True)
    fold[order] = torch.arange(rows) % folds
    return fold


def held_out(tasks: Mapping[str, Rows], folds: int) -> Iterator[Stage]:
    """Each fold answered once by what was learned from the others."""
    fold_of = {name: folds_of(rows.labels, len(rows.states.last), folds) for name, rows in tasks.items()}
    for fold in range(folds):
        learned = {name: rows.chosen(fold_of[name] != fold) for name, rows in tasks.items()}
        yield learned, {name: rows.chosen(fold_of[name] == fold) for name, rows in tasks.items()}


def measure(variant: Variant, stages: Sequence[Stage]) -> tuple[Tensor, dict[str, Any]]:
    """Whether each row's task is named correctly, [rows], and the variant's line without its gain."""
    right: dict[str, list[Tensor]] = {name: [] for name in stages[0][1]}
    kept, fit_s, prepare_s, route_s = 0, 0.0, 0.0, 0.0
    for learned, answered in stages:
        identifier = variant.make()
        started = time.perf_counter()
        for name, rows in learned.items():
            identifier.observe(name, rows.states.read(variant.reads), rows.labels)
        fitted = time.perf_counter()
        identifier.prepare()
        fit_s, prepare_s = fit_s + fitted - started, prepare_s + time.perf_counter() - fitted
        kept += identifier.nbytes
        for name, rows in answered.items():
            query, place = rows.states.read(variant.reads), identifier.names.index(name)
            started = time.perf_counter()
            right[name].append((identifier.identify(query) == place).float())
            route_s += time.perf_counter() - started
    by_task = [torch.cat(found) for found in right.values()]
    found = torch.cat(by_task)
    line = {
        "router": variant.name,
        "right_task": f"{100 * float(found.mean()):.2f}",
        "mean_over_tasks": f"{100 * mean(float(own.mean()) for own in by_task):.2f}",
        "bytes_a_task": round(kept / len(stages) / len(by_task)),
        "fit_s_a_task": f"{fit_s / len(stages) / len(by_task):.2f}",
        "prepare_s": f"{prepare_s / len(stages):.2f}",
        "route_us_a_row": f"{1e6 * route_s / len(found):.1f}",
    }
    return found, line


def comparison(variants: Sequence[Variant], stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """One line per variant: routing accuracy in percent, its gain over the first variant and its standard error."""
    first, lines = None, []
    for variant in variants:
        found, line = measure(variant, stages)
        first = found if first is None else first
        gain = (100 * (found - first)).tolist()
        line |= {"gain": f"{mean(gain):.2f}", "gain_se": f"{stdev(gain) / len(gain) ** 0.5:.2f}"}
        lines.append(line)
        print(f"{variant.name}: {line['right_task']}", file=sys.stderr)
    return lines


def stages_of(stream: Stream, options: argparse.Namespace) -> list[Stage]:
    backbone = Backbone.load("minilm")
    train = stream.load(options.data, "train", 0, options.train or stream.rows)
    learned = {name: rows_of(task, backbone, options.work) for name, task in train.items()}
    if not options.test:
        return list(held_out(learned, options.folds))
    test = stream.load(options.data, "test", 0, options.answer)
    return [(learned, {name: rows_of(task, backbone, options.work) for name, task in test.items()})]


def main(arguments: Sequence[str]) -> int:
    parser = Parser("python -m benchmarks.continual.routers", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the streams' folders")
    parser.add_argument("--stream", choices=list(STREAMS), required=True)
    parser.add_argument("--train", type=at_least(1), help="training rows per task, at most; default: the stream's")
    parser.add_argument("--folds", type=at_least(2), default=5)
    parser.add_argument("--test", action="store_true", help="learn all training rows and answer the test rows")
    parser.add_argument("--answer", type=at_least(1), help="test rows per task, at most; default: all")
    parser.add_argument("--routers", nargs="+", choices=[v.name for v in VARIANTS], help="default: all")
    parser.add_argument("--work", type=work_folder, help="folder that keeps frozen states for the next run")
    parser.add_argument("--output", type=output_file, help="default: benchmarks/results/routers_<stream>[_test].csv")
    options = parser.parse_args(arguments)
    stream, test = STREAMS[options.stream], "_test" if options.test else ""
    try:
        chosen = [v for v in VARIANTS if v.name in (options.routers or [v.name])]
        lines = comparison(chosen, stages_of(stream, options))
    except SlmError as error:
        print(f"routers: error: {error}", file=sys.stderr)
        return error.status
    most = f", at most {options.answer} a task" if options.answer else ""
    answered = f"test rows{most}" if options.test else f"training rows, {options.folds} folds"
    rows = options.train or stream.rows
    notes = {"setup": f"{answered}; at most {rows} training rows a task, at most 128 tokens"}
    write_csv(options.output or RESULTS / f"routers_{options.stream}{test}.csv", lines, notes)
    print(table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
