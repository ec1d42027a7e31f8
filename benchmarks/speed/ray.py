"""A file answered by one process against Ray actors on the same machine: rows per second, and whether the bytes agree.

    python -m benchmarks.speed.ray --data DIR [--rows N] [--actors N]
    python -m benchmarks.speed.ray --data DIR --kill --rows 100000 --words 8

MiniLM with random tasks. The single process and each actor have one thread, so with as many actors as cores, the best
possible speed-up is their number. Actors take windows of 1,024 rows, so a few thousand rows say little. Opening models
and starting Ray happen once and are timed separately.

--kill: `slm-fast predict --ray local`, of which an actor is killed when a third of the rows are written, and the
command itself when two thirds are; the command is then run again and resumes. Its seconds are those of both calls,
including two starts of Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import torch

from benchmarks.arguments import Parser, at_least, exit_status, output_file
from benchmarks.speed.tasks import random_tasks
from benchmarks.speed.texts import add_data, mixed, texts_of
from benchmarks.speed.timing import percentiles
from benchmarks.tables import RESULTS, table, write_csv
from slm_fast import ScalableLM
from slm_fast.integrations.ray_pool import StorePool

COMMAND = "slm-fast bench ray"
KNOWN = 200  # rows per task that the router is fitted on


def store_of(folder: Path, backbone: str, data: Path | None) -> Path:
    slm = ScalableLM.from_backbone(backbone)
    slm.save_pretrained(folder / "store")
    for task in random_tasks(slm, texts_of(data, "train", KNOWN)):
        slm.add(task)
    return folder / "store"


def rows_of(arguments: argparse.Namespace, source: Path) -> int:
    """Write the tasks' texts, mixed, to the file; return how many rows it has."""
    texts = [text for _, text in mixed(texts_of(arguments.data, "test", arguments.rows // 5 + 1))]
    if arguments.words:
        texts = [" ".join(text.split()[: arguments.words]) for text in texts]
    if arguments.kill:  # repeat texts if there are too few
        texts = [texts[i % len(texts)] for i in range(arguments.rows)]
    texts = texts[: arguments.rows]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return len(texts)


def measure_killed(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of a command with one process, and of one with actors that is killed and resumed, starts included."""
    source, store = folder / "in.jsonl", store_of(folder, arguments.backbone, arguments.data)
    rows, outputs = rows_of(arguments, source), [folder / "one.jsonl", folder / "actors.jsonl"]
    both = [
        [sys.executable, "-m", "slm_fast.cli", "predict", str(store), "--input", str(source), "--output", str(output)]
        for output in outputs
    ]
    both[0] += ["--threads", "1"]
    both[1] += ["--ray", "local", "--actors", str(arguments.actors), "--threads", str(arguments.actors)]
    start = time.perf_counter()
    subprocess.run(both[0], check=True)
    times = [time.perf_counter() - start]
    start = time.perf_counter()
    with subprocess.Popen(both[1]) as process:
        for third in (1, 2):
            while written(outputs[1]) < rows * third // 3:
                assert process.poll() is None, "the command ended before it was killed"
                time.sleep(0.2)
            os.kill(actors_of(process.pid)[0] if third == 1 else process.pid, signal.SIGKILL)
    subprocess.run(both[1], check=True)
    times.append(time.perf_counter() - start)
    same = len({output.read_bytes() for output in outputs}) == 1
    return [
        {"backbone": arguments.backbone, "rows": rows, "by": by, "s_p50": f"{took:.2f}", "rows_s": f"{rows / took:.1f}"}
        | {"speed_up": f"{times[0] / took:.2f}", "same_bytes": same}
        for by, took in zip(("one process", f"{arguments.actors} actors, killed"), times, strict=True)
    ]


def written(output: Path) -> int:
    """Rows written so far."""
    return output.read_bytes().count(b"\n") if output.exists() else 0


def actors_of(pid: int) -> list[int]:
    """Ray actor processes started by this process, directly or indirectly."""
    found, below = [], [pid]
    while below:
        for child in Path(f"/proc/{below.pop()}/task").glob("*/children"):
            below += map(int, child.read_text().split())
        found += [one for one in below if b"ray::StoreActor" in Path(f"/proc/{one}/cmdline").read_bytes()]
    return sorted(set(found))


def measure(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    source, store = folder / "in.jsonl", store_of(folder, arguments.backbone, arguments.data)
    rows = rows_of(arguments, source)
    outputs = {"one process": folder / "one.jsonl", f"{arguments.actors} actors": folder / "actors.jsonl"}
    start = time.perf_counter()
    slm = ScalableLM.from_pretrained(store)
    opened = [time.perf_counter() - start]
    pool = StorePool(store, actors=arguments.actors, threads=arguments.actors)
    both: tuple[ScalableLM | StorePool, ...] = (slm, pool)
    start = time.perf_counter()
    with pool:
        opened.append(time.perf_counter() - start)
        times: dict[str, list[float]] = {name: [] for name in outputs}
        for _ in range(arguments.rounds):  # in turns
            for by, (name, output) in zip(both, outputs.items(), strict=True):
                start = time.perf_counter()
                by.predict_file(source, output, overwrite=True)
                times[name].append(time.perf_counter() - start)
    same = len({output.read_bytes() for output in outputs.values()}) == 1
    one = percentiles(times["one process"])
    lines = []
    for name, took in zip(outputs, opened, strict=True):
        own = percentiles(times[name])
        line: dict[str, Any] = {"backbone": arguments.backbone, "rows": rows, "by": name}
        line |= {f"s_{q}": f"{getattr(own, q):.2f}" for q in ("p20", "p50", "p80")}
        line |= {"rows_s": f"{rows / own.p50:.1f}", "speed_up": f"{one.p50 / own.p50:.2f}"}
        lines.append(line | {"open_s": f"{took:.1f}", "same_bytes": same})
    return lines


def main() -> None:
    parser = Parser(COMMAND, __doc__)
    add_data(parser)
    parser.add_argument("--rows", type=at_least(1), default=20_000)
    parser.add_argument("--actors", type=at_least(1), default=2)
    parser.add_argument("--backbone", default="minilm")
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument("--kill", action="store_true", help="kill an actor, then the command, and run it again")
    parser.add_argument("--words", type=at_least(0), default=0, help="words per text, at most; default: all")
    parser.add_argument("--output", type=output_file, help="default: results/ray.csv, or ray_killed.csv with --kill")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        lines = (measure_killed if arguments.kill else measure)(Path(folder), arguments)
    command = f"slm-fast bench ray --rows {arguments.rows} --actors {arguments.actors} --rounds {arguments.rounds}"
    command += f" --kill --words {arguments.words}" if arguments.kill else ""
    print(table(lines))
    output = arguments.output or RESULTS / ("ray_killed.csv" if arguments.kill else "ray.csv")
    write_csv(output, lines, {"ray": ray.__version__, "command": command})


if __name__ == "__main__":
    sys.exit(exit_status(COMMAND, main))
