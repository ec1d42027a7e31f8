"""A file answered by one process beside actors of Ray on the same machine: rows a second, and whether the bytes agree.

    python -m benchmarks.speed.ray --data DIR [--rows N] [--actors N]

MiniLM with random tasks. One process has one thread, and so has each actor, so that with as many actors as cores the
best there can be is a speed-up of their number. Actors take windows of 1,024 rows, so that a few thousand rows say
little. Opening models, and starting Ray, is timed by itself: it is done once.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import torch

from benchmarks.speed.tasks import random_tasks
from benchmarks.speed.texts import mixed, texts_of
from benchmarks.speed.timing import percentiles
from benchmarks.tables import RESULTS, table, write_csv
from slm_fast import ScalableLM
from slm_fast.integrations.ray_pool import StorePool

KNOWN = 200  # rows of each task that the router knows it by


def store_of(folder: Path, backbone: str, data: Path | None) -> Path:
    slm = ScalableLM.from_backbone(backbone)
    slm.save_pretrained(folder / "store")
    for task in random_tasks(slm, texts_of(data, "train", KNOWN)):
        slm.add(task)
    return folder / "store"


def measure(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    texts = [text for _, text in mixed(texts_of(arguments.data, "test", arguments.rows // 5 + 1))][: arguments.rows]
    source, store = folder / "in.jsonl", store_of(folder, arguments.backbone, arguments.data)
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
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
        line: dict[str, Any] = {"backbone": arguments.backbone, "rows": len(texts), "by": name}
        line |= {f"s_{q}": f"{getattr(own, q):.2f}" for q in ("p20", "p50", "p80")}
        line |= {"rows_s": f"{len(texts) / own.p50:.1f}", "speed_up": f"{one.p50 / own.p50:.2f}"}
        lines.append(line | {"open_s": f"{took:.1f}", "same_bytes": same})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of the classification tasks; without it texts are made up")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--backbone", default="minilm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "ray.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        lines = measure(Path(folder), arguments)
    command = f"slm-fast bench ray --rows {arguments.rows} --actors {arguments.actors} --rounds {arguments.rounds}"
    print(table(lines))
    write_csv(arguments.output, lines, {"ray": ray.__version__, "command": command})


if __name__ == "__main__":
    main()
