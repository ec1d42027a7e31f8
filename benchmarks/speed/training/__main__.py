"""Learning one task: slm_fast against PEFT's LoRA on the same layers and the paper's procedure; rows/s and peak memory.

    python -m benchmarks.speed.training --data DIR --shape bert-base --layers 4 --rows 96
    python -m benchmarks.speed.training --data DIR --shape t5-large --layers 4 --rows 32 --batch-size 4
    python -m benchmarks.speed.training --data DIR --shape llama-2-7b --layers 2 --rows 16 --batch-size 2 --epochs 1

All learn the same rows (the paper's procedure a quarter of them) with the same epochs, optimiser and batch size, in
turns within one run. Times are of the whole task, including queries and keys. A run adds its shape's rows to
benchmarks/results/training.csv and redraws the .png. The same command with --memory then fills in the peak memory, each
method in a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.arguments import Parser, at_least, exit_status, output_file
from benchmarks.figures import plot_rates
from benchmarks.machine import peak_mib
from benchmarks.speed.backbones import FULL, SHAPES, Load, copies, finished, pretrained
from benchmarks.speed.texts import add_data, task
from benchmarks.speed.timing import Times, percentiles
from benchmarks.speed.training.lora import lora
from benchmarks.speed.training.ours import ours
from benchmarks.speed.training.paper import paper
from benchmarks.speed.training.rows import Learn
from benchmarks.tables import RESULTS, read_csv, table, write_csv
from slm_fast import Task
from slm_fast.options import LearnOptions

COMMAND = "slm-fast bench training"
OURS = "slm_fast"
SAME = ("shape", "layers", "rows", "epochs", "batch_size", "method")  # what identifies a measurement


class Method(NamedTuple):
    """rows: the share of the rows that it learns. The paper's procedure is slow and costs the same for each row."""

    title: str
    make: Callable[[Load, Task, LearnOptions], Learn]
    rows: float = 1.0


METHODS = {
    OURS: Method("slm_fast (trunk + gaussian)", ours),
    "slm_fast-bf16": Method(
        "slm_fast, bfloat16 autocast", lambda load, rows, options: ours(load, rows, replace(options, autocast=True))
    ),
    "peft": Method("PEFT LoRA, same layers", lambda load, rows, options: lora(load, rows, options, bucketed=False)),
    "peft-bucketed": Method(
        "PEFT LoRA, batches of like lengths", lambda load, rows, options: lora(load, rows, options, bucketed=True)
    ),
    "paper": Method("the paper's procedure", paper, 0.25),
}


def rows_for(name: str, arguments: argparse.Namespace) -> int:
    return int(arguments.rows * METHODS[name].rows)


def candidate(name: str, load: Load, arguments: argparse.Namespace) -> Learn:
    rows = task(arguments.data, "yahoo", rows_for(name, arguments))
    return METHODS[name].make(load, rows, LearnOptions(epochs=arguments.epochs, batch_size=arguments.batch_size))


def measure(load: Load, arguments: argparse.Namespace) -> dict[str, Times]:
    """Milliseconds that each method takes to learn the task, measured in turns."""
    learners = {name: finished(candidate(name, load, arguments)) for name in METHODS}
    took_ms: dict[str, list[float]] = {name: [] for name in learners}
    for _ in range(arguments.rounds):
        for name, learn in learners.items():
            start = time.perf_counter()
            learn()
            took_ms[name].append(1e3 * (time.perf_counter() - start))
    return {name: percentiles(took) for name, took in took_ms.items()}


def lines(
    times: Mapping[str, Times], layers: int, kept: list[dict[str, Any]], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """One line per method, with the peak memory found by an earlier run of the same setting."""
    peaks = {tuple(row[name] for name in SAME): row["peak_mib"] for row in kept}
    our_rate = 1e3 * rows_for(OURS, arguments) * arguments.epochs / times[OURS].p50
    done: list[dict[str, Any]] = []
    for name, took in times.items():
        passed = 1e3 * rows_for(name, arguments) * arguments.epochs
        row: dict[str, Any] = {
            "shape": arguments.shape,
            "layers": layers,
            "rows": rows_for(name, arguments),
            "epochs": arguments.epochs,
            "batch_size": arguments.batch_size,
            "method": name,
            "rows_per_second": round(passed / took.p50, 2),
            "p20": round(passed / took.p80, 2),
            "p80": round(passed / took.p20, 2),
            "slm_fast_times": round(our_rate * took.p50 / passed, 2),
        }
        done.append(row | {"peak_mib": peaks.get(tuple(str(row[name]) for name in SAME), "")})
    return done


def peak(name: str, arguments: argparse.Namespace) -> int:
    """Peak MiB of a process that learns the task once."""
    command = [sys.executable, "-m", "benchmarks.speed.training", *sys.argv[1:], "--only", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return round(float(done.stdout))


def fill_in_memory(
    kept: list[dict[str, Any]], layers: int, arguments: argparse.Namespace, parser: argparse.ArgumentParser
) -> None:
    """Measure the peak memory of this shape's lines, saving each when it is known."""
    own = [row for row in kept if row["shape"] == arguments.shape]
    if not own:
        parser.error(f"--memory: {arguments.output} has no rows of {arguments.shape}; time it first")
    for row in own:
        given = {"layers": layers, "rows": rows_for(row["method"], arguments), "batch_size": arguments.batch_size}
        for name, value in given.items():
            if row[name] != str(value):
                parser.error(f"--memory: {arguments.shape} was timed with {name} {row[name]}, got {value}")
    for row in own:
        row["peak_mib"] = peak(row["method"], arguments)
        write_csv(arguments.output, kept)
    print(table(own))


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    charts = {
        f"{shape}, {next(row['layers'] for row in rows if row['shape'] == shape)} layers": [
            (METHODS[row["method"]].title, float(row["rows_per_second"]), row["method"].startswith(OURS))
            for row in rows
            if row["shape"] == shape
        ]
        for shape in dict.fromkeys(row["shape"] for row in rows)
    }
    plot_rates(charts, "rows a second", path)


def main() -> int:
    parser = Parser(COMMAND, __doc__)
    add_data(parser)
    parser.add_argument("--shape", choices=["minilm", *SHAPES], default="minilm")
    parser.add_argument("--layers", type=at_least(1), help="default: all layers of the shape")
    parser.add_argument("--rows", type=at_least(1), default=96)
    parser.add_argument("--epochs", type=at_least(1), default=3)
    parser.add_argument("--batch-size", type=at_least(1), default=8)
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument("--memory", action="store_true", help="only fill in the peak memory of a timed shape")
    parser.add_argument("--output", type=output_file, default=RESULTS / "training.csv")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    layers = arguments.layers or FULL[arguments.shape]
    kept: list[dict[str, Any]] = list(read_csv(arguments.output)) if arguments.output.exists() else []
    if arguments.memory and not arguments.only:
        fill_in_memory(kept, layers, arguments, parser)
        return 0
    load = copies(*pretrained(arguments.shape, layers))
    if arguments.only:
        print(peak_mib(candidate(arguments.only, load, arguments))[1])
        return 0
    done = lines(measure(load, arguments), layers, kept, arguments)
    print(table(done))
    rows = [row for row in kept if row["shape"] != arguments.shape] + done
    write_csv(arguments.output, rows)
    plot(arguments.output.with_suffix(".png"), rows)
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(COMMAND, main))
