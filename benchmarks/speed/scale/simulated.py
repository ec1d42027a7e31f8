"""Throughput and latency with any number of tasks, from the cost of a page, a batch and a route on this machine.

    python -m benchmarks.speed.scale.simulated [--folder DIR] [--tasks 200,1000] [--seconds 60]

First the parts are timed on one thread, and the predictions of simulator.py are compared with measurements at sizes
that fit here: rows per second of `predict`, with each row's task given or (with room for all values) routed; and
milliseconds until `slm-fast serve` answers a row whose task is given, with Poisson arrivals at shares of its full load.
The server's cost per row is derived from its rows per second with 32 clients and FEW tasks, because HTTP takes CPU
time, too. Then up to a million tasks are simulated. Results: results/scale_simulated.csv and its plot.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.arguments import Parser, counts, duration, output_file
from benchmarks.figures import pyplot
from benchmarks.speed.scale.simulator import Costs, Setting, rate, waits
from benchmarks.speed.scale.stores import TRAFFIC, make, traffic
from benchmarks.speed.serving.__main__ import OURS, server
from benchmarks.speed.serving.load import Request, Running, arrive, load
from benchmarks.tables import RESULTS, table, write_csv
from slm_fast import ScalableLM
from slm_fast.data import Row
from slm_fast.ops import Route
from slm_fast.store import Store

FEW, KEYS = 5, 3  # tasks of the reference store, keys per task
TOLD = 0  # keys that a row with a given task is compared with
LAWS = {"zipf": 1.0, "uniform": 0.0}
LOADS = (0.5, 0.8)
SIZES = (100, 300, 1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
EXPONENTS = (0.0, 0.8, 1.0, 1.2)
DEVICE, HOST = 1 << 30, 16 << 30  # bytes for values in the simulated replicas
Line = dict[str, Any]


def least(work: Callable[[], Any], times: int = 7) -> float:
    """Seconds of the fastest of several calls."""
    found = math.inf
    for _ in range(times):
        start = time.perf_counter()
        work()
        found = min(found, time.perf_counter() - start)
    return found


# ---- costs of the parts ----


def costs_of(few: Path, many: Path) -> tuple[Costs, int]:
    """The costs on this machine, and the rows of a full batch. few, many: stores of FEW and of many tasks."""
    slm = ScalableLM.from_pretrained(few)
    texts, tasks = traffic(slm.tasks, 0.0)
    rows = round(statistics.mean(batches(slm, texts, tasks)))
    whole = least(lambda: slm.predict(texts, task=tasks), 3) / TRAFFIC
    single = least(lambda: [slm.predict(texts[i : i + 1], task=tasks[i]) for i in range(16)], 5) / 16
    row = (whole * rows - single) / (rows - 1)
    batch = single - row
    above = 1 - (slm.model.config.first_layer or 0) / len(slm.model.backbone.layers)  # layers run by each further part
    page, disk = paging(many)
    return Costs(batch, row, batch * above, page, disk, *routing(few, many)), rows


def batches(slm: ScalableLM, texts: Sequence[str], tasks: Sequence[str]) -> list[int]:
    """The number of rows of each batch in which the texts are answered."""
    met: list[int] = []
    layer = slm.model.backbone.layers[0]
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: met.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    slm.predict(texts, task=tasks)
    hook.remove()
    return met


@torch.inference_mode()
def routing(few: Path, many: Path) -> tuple[float, float]:
    """Seconds to route a batch, per key, and per key and row."""
    models = [ScalableLM.from_pretrained(folder) for folder in (few, many)]
    keys = KEYS * (len(models[1].tasks) - len(models[0].tasks))
    found = []
    for rows in (1, 128):
        query = models[0].model.queries([Row(text) for text in traffic(["any"], 0.0, rows)[0]])
        took = [least(lambda slm=slm, query=query: slm.model.route(query), 30) for slm in models]  # type: ignore[misc]
        found.append(max(0.0, took[1] - took[0]) / keys)
    scores = max(0.0, found[1] - found[0]) / 127
    return max(0.0, found[0] - scores), scores


def paging(folder: Path, count: int = 64) -> tuple[float, float]:
    """Seconds to copy a task's values from memory to the device, and to read them from disk into memory."""
    size = ScalableLM.from_pretrained(folder).model.pool.row_bytes
    slm = ScalableLM.from_pretrained(folder, device_memory=size * count)
    turns = [Route(torch.arange(i, i + count)[:, None], torch.ones(count, 1)) for i in (0, count)]

    def ask() -> None:
        for turn in turns:
            slm.model.pool.rows(turn)

    ask()  # also checks the files
    page = least(ask) / (2 * count)
    assert slm.store is not None
    files = [slm.store.file(name) for name in slm.tasks[-32:]]
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as raw:
            raw.read(size)
    return page, (time.perf_counter() - start) / len(files)


# ---- comparison with measurements ----


def rates_held(folder: Path, costs: Costs, rows: int) -> list[Line]:
    """`predict` with room for all values, and with room for a tenth."""
    slm = ScalableLM.from_pretrained(folder)
    count, size = len(slm.tasks), slm.model.pool.row_bytes
    found = []

    def measured(setting: Setting, *, told: bool) -> None:
        texts, tasks = traffic(slm.tasks, setting.exponent, 2 * TRAFFIC)
        slm.predict(texts[:TRAFFIC], task=tasks[:TRAFFIC] if told else None)
        start = time.perf_counter()
        slm.predict(texts[TRAFFIC:], task=tasks[TRAFFIC:] if told else None)
        took = time.perf_counter() - start
        found.append(held("rows/s", setting, "", rate(costs, setting), TRAFFIC / took))

    measured(Setting(count, 0.0, rows=rows, keys=KEYS), told=False)
    for room in (count, count // 10):
        if room < count:
            slm = ScalableLM.from_pretrained(folder, device_memory=room * size)
        for exponent in LAWS.values():
            measured(Setting(count, exponent, room, rows=rows, keys=TOLD), told=True)
    return found


def served_costs(few: Path, costs: Costs) -> Costs:
    """The costs of the server for single rows over HTTP, from one client and from 32 clients that keep asking."""
    with serve(few) as running:
        requests = asked(few, 0.0)
        load(running.port, requests, 32, 2.0)
        alone, many = load(running.port, requests, 1, 5.0), load(running.port, requests, 32, 10.0)
    row = (32 / many.rows_per_second - costs.batch) / 32
    return replace(costs, row=row, request=max(0.0, 1 / alone.rows_per_second - costs.batch - row))


def serve(folder: Path, *more: str) -> AbstractContextManager[Running]:
    return server(OURS, folder, "float32", 1, *more)


def asked(folder: Path, exponent: float, rows: int = TRAFFIC) -> list[Request]:
    texts, tasks = traffic(list(Store.open(folder).files), exponent, rows)
    return [
        ("/v1/classify", {"input": text, "model": task, "labels": 1}, 1)
        for text, task in zip(texts, tasks, strict=True)
    ]


def waits_held(folder: Path, count: int, size: int, costs: Costs, rows: int, seconds: float) -> list[Line]:
    """The server with room for a tenth of the values, at shares of its full load, after it has read every task once."""
    found = []
    room = count // 10
    setting = Setting(count, LAWS["zipf"], room, rows=rows, keys=TOLD)
    with serve(folder, "--device-memory", str(room * size)) as running:
        requests = asked(folder, LAWS["zipf"], 1 << 16)
        names = zip(requests[:count], Store.open(folder).files, strict=True)
        once = [(path, body | {"model": name}, 1) for (path, body, _), name in names]
        arrive(running.port, once, rate(costs, setting), count / rate(costs, setting), 32)
        load(running.port, requests, 32, min(10.0, seconds))
        for share in LOADS:
            met = arrive(running.port, requests, share * rate(costs, setting), seconds)
            simulated = 1000 * waits(costs, setting, share)
            for place in (0.5, 0.99):
                name = f"p{100 * place:g} ms"
                found.append(
                    held(name, setting, f"{share:g}", float(np.quantile(simulated, place)), met.percentile(place))
                )
    return found


def held(what: str, setting: Setting, share: str, simulated: float, measured: float | None = None) -> Line:
    line = {"what": what, "tasks": setting.tasks, "task": "found" if setting.keys else "given"}
    line |= {"exponent": f"{setting.exponent:g}"}
    line |= {"on device": min(setting.tasks, setting.device), "in memory": min(setting.tasks, setting.host)}
    line |= {"load": share, "simulated": f"{simulated:.1f}"}
    if measured is None:
        return line | {"measured": "", "simulated/measured": ""}
    return line | {"measured": f"{measured:.1f}", "simulated/measured": f"{simulated / measured:.2f}"}


# ---- simulation beyond them ----


def beyond(costs: Costs, rows: int, size: int) -> list[Line]:
    """Rows per second, and the 99th percentile at LOADS[0], with DEVICE and HOST bytes for values of `size` bytes."""
    found = []
    for keys in (KEYS, TOLD):
        for exponent in EXPONENTS:
            for tasks in SIZES:
                setting = Setting(tasks, exponent, DEVICE // size, HOST // size, rows, keys)
                found.append(held("rows/s", setting, "", rate(costs, setting)))
                late = float(np.quantile(waits(costs, setting, LOADS[0]), 0.99))
                found.append(held("p99 ms", setting, f"{LOADS[0]:g}", 1000 * late))
    return found


def draw(lines: Sequence[Line], path: Path) -> None:
    """Plot the simulation: rows/s with tasks routed, rows/s with tasks given, and waits."""
    figure, panels = pyplot().subplots(1, 3, figsize=(13, 4), dpi=130, layout="constrained")
    simulated = [line for line in lines if not line["measured"]]
    shown = (("rows/s", "found"), ("rows/s", "given"), ("p99 ms", "given"))
    for panel, (what, task) in zip(panels, shown, strict=True):
        chosen = [line for line in simulated if (line["what"], line["task"]) == (what, task)]
        scale = max(float(line["simulated"]) for line in chosen) if what == "rows/s" else 1.0
        for exponent in EXPONENTS:
            own = [line for line in chosen if line["exponent"] == f"{exponent:g}"]
            points = [(int(line["tasks"]), float(line["simulated"]) / scale) for line in own]
            name = "all tasks alike" if exponent == 0 else f"Zipf, exponent {exponent:g}"
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        panel.set(xscale="log", xlabel="tasks in the store")
        panel.grid(True, which="both", alpha=0.25)
        if what == "rows/s":
            panel.set(ylabel="rows/s, relative to 100 tasks", ylim=(0, 1.08), title=f"each row's task is {task}")
    panels[2].set(ylabel=f"99th percentile of waits, ms, at {LOADS[0]:.0%} load", ylim=(0, None))
    panels[2].set_title("each row's task is given")
    panels[0].legend(fontsize=8)
    room = f"{DEVICE >> 30} GiB of values on the device and {HOST >> 30} GiB in memory"
    figure.suptitle(f"One replica of one thread, {room}, simulated", fontsize=10)
    figure.savefig(path)
    pyplot().close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("python -m benchmarks.speed.scale.simulated", __doc__)
    parser.add_argument("--tasks", type=counts, default="200,1000", help="sizes to measure, comma-separated, ascending")
    parser.add_argument("--folder", type=Path, help="where to keep the stores; default: a temporary folder")
    parser.add_argument("--seconds", type=duration, default=60.0, help="seconds of arrivals, per load")
    parser.add_argument("--output", type=output_file, default=RESULTS / "scale_simulated.csv")
    chosen = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        where = chosen.folder or Path(temporary)
        folders = {count: where / str(count) for count in (FEW, *chosen.tasks)}
        for count, folder in folders.items():
            make(folder, count)
            ScalableLM.from_pretrained(folder)  # saves its keys
        costs, rows = costs_of(folders[FEW], folders[chosen.tasks[-1]])
        size = ScalableLM.from_pretrained(folders[FEW]).model.pool.row_bytes
        lines = [line for count in chosen.tasks for line in rates_held(folders[count], costs, rows)]
        print(table(lines), flush=True)
        served = served_costs(folders[FEW], costs)
        lines += waits_held(folders[chosen.tasks[-1]], chosen.tasks[-1], size, served, rows, chosen.seconds)
        print(table(lines), flush=True)
    lines += beyond(costs, rows, size)
    micro = {name: f"{1e6 * value:.4g}" for name, value in asdict(costs).items()}
    notes = {"microseconds": " ".join(f"{name} {value}" for name, value in micro.items())}
    notes |= {"rows of a batch": str(rows), "bytes of a task's values": str(size)}
    write_csv(chosen.output, lines, notes)
    draw(lines, chosen.output.with_suffix(".png"))
    print(table(lines))


if __name__ == "__main__":
    main()
