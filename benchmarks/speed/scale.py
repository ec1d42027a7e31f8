"""What a store of many tasks costs: opening it, answering, one task more or less, verify, merge.

    python -m benchmarks.speed.scale [--tasks N,N,...] [--folder DIR] [--no-merge] [--no-verify]

The packaged MiniLM. No task is trained: each has random values and a head, and the router knows it by the means and the
scatter of real queries (the demonstration's), moved and turned at random. Figures are seconds of processor time of one
thread, as the machine may be shared, in a process of its own for each row; `anon` and `mapped` are MiB that the process
holds once it has answered, of its own and of files that the kernel may take back. Rows/s are of texts of the
demonstration with given tasks, drawn from all with frequencies as Zipf's law has them (exponent 1) or alike. `tenth`:
with room for a tenth of the tasks' values (`device_memory`), of stores of 100 tasks and more. `first open`: nothing is
kept of the tasks together. `open`: all is. `open changed`: some tasks were forgotten and learned anew since. `answer
learned`, `answer forgotten`: two rows, once a task more or less is there, and routing looks at that.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.tasks import LABELS, random_tasks
from benchmarks.tables import RESULTS, table, write_csv
from slm_fast import ScalableLM
from slm_fast.data import Row
from slm_fast.demo import load
from slm_fast.store import Store
from slm_fast.tasks import LearnedTask, name_seed

ROWS = 240  # of the demonstration, that the router's part is made of
AT_ONCE = 16  # tasks committed together
TRAFFIC = 2048  # rows answered, after a quarter as many
LEAST_PAGED = 100  # tasks


class Maker:
    """Tasks of a model, as many as are wanted, the same for the same name."""

    def __init__(self, slm: ScalableLM) -> None:
        rows = [row.text for task in load("train").values() for row in task.rows][:ROWS]
        [self.like] = random_tasks(slm, {"like": rows})

    def __call__(self, name: str) -> LearnedTask:
        draw = torch.Generator().manual_seed(name_seed(name, 0))
        values = {
            module: (lora_a[:, :, torch.randperm(lora_a.shape[2], generator=draw)], lora_b)
            for module, (lora_a, lora_b) in self.like.values.items()
        }
        assert self.like.head is not None
        weight, bias = self.like.head
        head = (0.05 * torch.randn(weight.shape, generator=draw), bias)
        return LearnedTask(name, LABELS, values, moved(self.like.router, draw), head, {"rank": 8})


def moved(part: Mapping[str, Tensor], draw: torch.Generator) -> dict[str, Tensor]:
    """A router's part of another task: three means, moved, and a scatter whose directions are turned."""
    mean = part["mean"] * (1 + 0.2 * torch.randn(3, part["mean"].shape[1], generator=draw))
    signs = torch.randint(0, 2, (part["factor"].shape[1],), generator=draw) * 2 - 1
    turns = torch.randint(-1, 2, part["exponent"].shape, generator=draw)
    rows = part["count"].sum() / 3
    sample = part["sample"] + 0.1 * torch.randn(part["sample"].shape, generator=draw)
    return dict(part) | {
        "count": rows.floor().expand(3).contiguous(),
        "mean": mean,
        "mean_slot": torch.zeros(3),
        "mean_label": torch.arange(3.0),
        "factor": (part["factor"] * signs).to(torch.int8),
        "exponent": (part["exponent"] + turns).clamp(-40, 12).to(torch.int8),
        "diagonal": part["diagonal"] * torch.rand(part["diagonal"].shape, generator=draw),
        "sample": sample,
        "sample_mean": torch.randint(0, 3, part["sample_mean"].shape, generator=draw).float(),
    }


def name_of(number: int) -> str:
    return f"task-{number:06d}"


def make(folder: Path, count: int) -> Store:
    """A store of so many tasks; those that it has are kept."""
    slm = ScalableLM.from_backbone("minilm")
    maker = Maker(slm)
    if not Store.exists(folder):
        slm.save_pretrained(folder)
    store = Store.open(folder)
    wanted = [name for name in map(name_of, range(count)) if name not in store.files]
    for start in range(0, len(wanted), AT_ONCE):
        store.commit(add=[maker(name) for name in wanted[start : start + AT_ONCE]])
    return store


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor time, and what `work` returned."""
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def memory() -> dict[str, str]:
    """MiB of this process's own, and of files mapped."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {
        name: f"{int(lines[key].split()[0]) / 1024:.0f}" for name, key in (("anon", "RssAnon"), ("mapped", "RssFile"))
    }


def measure(folder: Path, steps: str) -> dict[str, str]:
    """What each of these steps costs, in this process."""
    torch.set_num_threads(1)
    bare = ScalableLM.from_backbone("minilm")
    task, rows = Maker(bare)("one-more"), ["The soup was cold.", "My laptop won't start."]
    bare.model.queries([Row(text) for text in rows])  # what is computed once is computed
    found: dict[str, float] = {}
    kept: dict[str, str] = {}
    if "first" in steps:
        found["first open"], _ = seconds(lambda: ScalableLM.from_pretrained(folder))
    if "open" in steps:
        found["open"], slm = seconds(lambda: ScalableLM.from_pretrained(folder))
        found["answer"] = seconds(lambda: slm.predict(rows))[0]
        found["again"] = seconds(lambda: slm.predict(rows))[0]
        kept = memory()
        found["learn"] = seconds(lambda: slm.add(task))[0]
        found["answer learned"] = seconds(lambda: slm.predict(rows))[0]
        found["forget"] = seconds(lambda: slm.forget(task.name))[0]
        found["answer forgotten"] = seconds(lambda: slm.predict(rows))[0]
        some = slm.tasks[os.getpid() % len(slm.tasks)]  # not always one that was learned anew after the sum was kept
        found["forget old"] = seconds(lambda: slm.forget(some))[0]
    if "traffic" in steps:
        found["open changed"], slm = seconds(lambda: ScalableLM.from_pretrained(folder))
        found |= traffic(slm, "all")
        count, one = len(slm.tasks), slm.model.pool.row_bytes
        if count >= LEAST_PAGED:
            del slm
            room = count * one // 10
            found["open tenth"], slm = seconds(lambda: ScalableLM.from_pretrained(folder, device_memory=room))
            found |= traffic(slm, "tenth")
            kept = {f"{name} tenth": size for name, size in memory().items()}
    if "verify" in steps:
        found["verify"], wrong = seconds(lambda: Store.open(folder).verify())
        assert not wrong, wrong[0]
    return {name: f"{figure:.3f}" for name, figure in found.items()} | kept


def traffic(slm: ScalableLM, room: str) -> dict[str, float]:
    """Rows a second of texts of tasks that are drawn by Zipf's law, and of all alike."""
    draw, names = random.Random(0), list(slm.tasks)
    draw.shuffle(names)
    rows = [row.text for task in load("train").values() for row in task.rows]
    found = {}
    for law, weights in (("zipf", [1 / place for place in range(1, len(names) + 1)]), ("uniform", None)):
        texts, tasks = draw.choices(rows, k=TRAFFIC), draw.choices(names, weights, k=TRAFFIC)
        slm.predict(texts[: TRAFFIC // 4], task=tasks[: TRAFFIC // 4])
        took, _ = seconds(partial(slm.predict, texts, task=tasks))
        found[f"{law} {room}"] = TRAFFIC / took
    return found


def merged(folder: Path, into: Path) -> str:
    source = Store.open(folder)
    took, _ = seconds(lambda: Store(into, source.about, {}).merge([source]))
    return f"{took:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", default="5,100", help="sizes of the store, comma-separated, rising")
    parser.add_argument("--folder", type=Path, help="where to keep the store; a temporary one is removed")
    parser.add_argument("--no-merge", action="store_true", help="skip merge, which copies the store")
    parser.add_argument("--no-verify", action="store_true", help="skip verify")
    parser.add_argument("--output", type=Path, default=RESULTS / "scale.csv")
    parser.add_argument("--measure", metavar="STEPS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.folder, options.measure)))
        return
    folder = options.folder or Path(tempfile.mkdtemp())
    lines = []
    for count in map(int, options.tasks.split(",")):
        make(folder, count)
        line: dict[str, Any] = {"tasks": count}
        for steps in ["first", "open", "traffic", *([] if options.no_verify else ["verify"])]:
            command = [sys.executable, "-m", "benchmarks.speed.scale", "--folder", str(folder), "--measure", steps]
            run = subprocess.run(
                command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True
            )
            got = json.loads(run.stdout.splitlines()[-1])
            line |= got
            make(folder, count)  # what was forgotten
        if not options.no_merge:
            into = Path(tempfile.mkdtemp())
            line["merge"] = merged(folder, into)
            shutil.rmtree(into)
        lines.append(line)
        print(line, file=sys.stderr)
    if options.folder is None:
        shutil.rmtree(folder)
    notes = {"command": f"python -m benchmarks.speed.scale --tasks {options.tasks}"}
    notes |= {"unit": "processor seconds, MiB, rows a processor second"}
    columns = list(dict.fromkeys(name for line in lines for name in line))
    lines = [{name: line.get(name, "") for name in columns} for line in lines]
    print(table(lines))
    write_csv(options.output, lines, notes)


if __name__ == "__main__":
    main()
