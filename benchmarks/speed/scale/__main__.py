"""The cost of a store with many tasks: opening it, answering, adding and removing a task, verify, merge.

    python -m benchmarks.speed.scale [--tasks N,N,...] [--folder DIR] [--no-merge] [--no-verify]

The packaged MiniLM. No task is trained: each has random values and a head, and its part of the router is made from the
means and the scatter of real queries (the demonstration's), randomly moved and turned. Times are CPU seconds of one
thread, because the machine may be shared, in a process of its own per group of steps. Columns:

first open: opening after removing what is kept of the tasks together. open: with all of it there. open changed: with
some tasks forgotten and learned again since.

answer: two rows. answer learned, answer forgotten: two rows after a task was added or removed, with routing updated.
Of more than 2,048 tasks, one in so many is sampled for the covariance, and all keys depend on it. `learn` and the rest
are of one that is not, `learn sampled` and the rest of one that is.

anon, mapped: MiB that the process holds after answering, its own and of files that the kernel may evict.

zipf, uniform: rows/s of the demonstration's texts with given tasks, drawn from all by Zipf's law (exponent 1) or
uniformly. routed: rows/s of texts routed among all tasks (these tasks are alike, so only a few of them are found). A
quarter of the texts is answered before any of these.

tenth: with room for a tenth of the tasks' values (`device_memory`), for stores of 100 tasks and more. Stores of more
than 2,000 tasks have no more room than that in any column.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count as numbers
from pathlib import Path
from typing import Any

import torch

from benchmarks.arguments import Parser, counts, output_file
from benchmarks.speed.scale.stores import LEAST_PAGED, TRAFFIC, Maker, make, seconds, traffic
from benchmarks.tables import RESULTS, not_in, table, write_csv
from slm_fast import ScalableLM
from slm_fast.data import Row
from slm_fast.sketch import ALL, sampled
from slm_fast.store import Store

MOST_RESIDENT = 2000  # tasks


def memory() -> dict[str, str]:
    """MiB of this process's own memory, and of mapped files."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {
        name: f"{int(lines[key].split()[0]) / 1024:.0f}" for name, key in (("anon", "RssAnon"), ("mapped", "RssFile"))
    }


def measure(folder: Path, steps: str) -> dict[str, str]:
    """The cost of each of these steps, in this process."""
    torch.set_num_threads(1)
    bare = ScalableLM.from_backbone("minilm")
    maker, rows = Maker(bare), ["The soup was cold.", "My laptop won't start."]
    bare.model.queries([Row(text) for text in rows])  # so that one-time work is done
    found: dict[str, float] = {}
    kept: dict[str, str] = {}
    count, one = len(Store.open(folder).files), 4 * sum(a.numel() + b.numel() for a, b in maker.like.values.values())
    room = None if count <= MOST_RESIDENT else count * one // 10
    if "first" in steps:
        for kept_together in (".keys", ".sum"):
            (folder / kept_together).unlink(missing_ok=True)
        found["first open"], _ = seconds(lambda: ScalableLM.from_pretrained(folder, device_memory=room))
    if "open" in steps:
        found["open"], slm = seconds(lambda: ScalableLM.from_pretrained(folder, device_memory=room))
        found["answer"] = seconds(lambda: slm.predict(rows))[0]
        found["again"] = seconds(lambda: slm.predict(rows))[0]
        kept = memory()
        for kind in ("", " sampled") if count > ALL else ("",):
            task = maker(one_more(slm.tasks, is_sampled=count <= ALL or bool(kind)))
            found[f"learn{kind}"] = seconds(partial(slm.add, task))[0]
            found[f"answer learned{kind}"] = seconds(partial(slm.predict, rows))[0]
            found[f"forget{kind}"] = seconds(partial(slm.forget, task.name))[0]
            found[f"answer forgotten{kind}"] = seconds(partial(slm.predict, rows))[0]
        some = slm.tasks[os.getpid() % len(slm.tasks)]  # not always one that was learned again after the sum was saved
        found["forget old"] = seconds(lambda: slm.forget(some))[0]
    if "traffic" in steps:
        found["open changed"], slm = seconds(lambda: ScalableLM.from_pretrained(folder, device_memory=room))
        texts, _ = traffic(slm.tasks, 0.0)
        slm.predict(texts[: TRAFFIC // 4])
        found["routed"] = rate(partial(slm.predict, texts))
        if room is None:
            found |= rates(slm, "all")
        if count >= LEAST_PAGED:
            del slm
            room = count * one // 10
            found["open tenth"], slm = seconds(lambda: ScalableLM.from_pretrained(folder, device_memory=room))
            found |= rates(slm, "tenth")
            kept = {f"{name} tenth": size for name, size in memory().items()}
    if "verify" in steps:
        found["verify"], wrong = seconds(lambda: Store.open(folder).verify())
        assert not wrong, wrong[0]
    return {name: f"{figure:.3f}" for name, figure in found.items()} | kept


def one_more(names: Sequence[str], *, is_sampled: bool) -> str:
    """The name of another task, that is or is not sampled."""
    found = (f"one-more-{number}" for number in numbers())
    return next(name for name in found if (name in sampled([*names, name])) == is_sampled)


def rates(slm: ScalableLM, room: str) -> dict[str, float]:
    """Rows per CPU second with given tasks, drawn by Zipf's law and uniformly."""
    found = {}
    for law, exponent in (("zipf", 1.0), ("uniform", 0.0)):
        texts, tasks = traffic(slm.tasks, exponent)
        slm.predict(texts[: TRAFFIC // 4], task=tasks[: TRAFFIC // 4])
        found[f"{law} {room}"] = rate(partial(slm.predict, texts, task=tasks))
    return found


def rate(predict: Callable[[], Any]) -> float:
    return TRAFFIC / seconds(predict)[0]


def merged(folder: Path, into: Path) -> str:
    source = Store.open(folder)
    took, _ = seconds(lambda: Store(into, source.about, {}).merge([source]))
    return f"{took:.2f}"


def main() -> None:
    parser = Parser("python -m benchmarks.speed.scale", __doc__)
    parser.add_argument("--tasks", type=counts, default="5,100", help="sizes of the store, comma-separated, ascending")
    parser.add_argument("--folder", type=Path, help="where to keep the store; default: a temporary folder")
    parser.add_argument("--no-merge", action="store_true", help="skip merge, which copies the store")
    parser.add_argument("--no-verify", action="store_true", help="skip verify")
    parser.add_argument("--output", type=output_file, default=RESULTS / "scale.csv")
    parser.add_argument("--measure", metavar="STEPS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.folder, options.measure)))
        return
    folder = options.folder or Path(tempfile.mkdtemp())
    lines = []
    for count in options.tasks:
        make(folder, count)
        line: dict[str, Any] = {"tasks": count}
        for steps in ["first", "open", "traffic", *([] if options.no_verify else ["verify"])]:
            command = [sys.executable, "-m", "benchmarks.speed.scale", "--folder", str(folder), "--measure", steps]
            run = subprocess.run(
                command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True
            )
            got = json.loads(run.stdout.splitlines()[-1])
            line |= got
            make(folder, count)  # restore what was forgotten
        if not options.no_merge:
            into = Path(tempfile.mkdtemp())
            line["merge"] = merged(folder, into)
            shutil.rmtree(into)
        lines.append(line)
        print(line, file=sys.stderr)
    if options.folder is None:
        shutil.rmtree(folder)
    notes = {"command": f"python -m benchmarks.speed.scale --tasks {','.join(map(str, options.tasks))}"}
    notes |= {"unit": "processor seconds, MiB, rows a processor second"}
    kept = not_in(lines, options.output, lambda line: str(line["tasks"]))
    notes |= {"kept from earlier runs": ", ".join(line["tasks"] for line in kept)} if kept else {}
    lines += kept
    lines.sort(key=lambda line: int(line["tasks"]))
    columns = list(dict.fromkeys(name for line in reversed(lines) for name in line))
    lines = [{name: line.get(name, "") for name in columns} for line in lines]
    print(table(lines))
    write_csv(options.output, lines, notes)


if __name__ == "__main__":
    main()
