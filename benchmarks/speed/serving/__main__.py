"""Our server beside others, on the same rows and in one run: rows a second, and how long an answer takes.

    python -m benchmarks.speed.serving --data DIR                       # three servers, 1, 8 and 64 clients
    python -m benchmarks.speed.serving --rows 8 --seconds 30 --dtype bfloat16
    python -m benchmarks.speed.serving --section overload reload

Clients ask one after another, with `--rows` texts a request, all of one task, since whoever has a pipeline a task has
to name it; ours and LitServe's model are not told. Servers are started one at a time, each a process, on the same
processor as the clients. "predict" answers the same rows in one call.

serving:  rows a second and the 50th and 99th percentile of an answer's milliseconds.
overload: four times the clients that fill the queue: what is admitted, and how fast the rest is refused.
reload:   the longest time without an answer to any of 32 clients (gap_ms), while nothing changes and while another
          process learns and forgets, with `--tasks` tasks in the store.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.serving.load import Load, Request, load, served
from benchmarks.speed.tasks import random_tasks
from benchmarks.speed.texts import texts_of
from benchmarks.tables import RESULTS, table, write_csv
from slm_fast import ScalableLM
from slm_fast.store import Store

OURS, PIPELINES, LITSERVE, PREDICT = "slm_fast", "pipelines", "litserve", "predict"
READY = {OURS: "/ready", PIPELINES: "/health", LITSERVE: "/health"}


def server(name: str, store: Path, dtype: str, threads: int, *more: str) -> AbstractContextManager[int]:
    """A server that is ready; its port."""
    if name == OURS:
        words = ["slm_fast.cli", "serve", str(store), "--port", "PORT", "--dtype", dtype, "--threads", str(threads)]
        words += ["--queue-rows", "8192", *more]
    else:
        words = ["benchmarks.speed.serving.servers", name, str(store), "PORT", dtype, str(threads)]
    return served(words, READY[name])


def requests_of(name: str, texts: Mapping[str, Sequence[str]], rows: int) -> list[Request]:
    """The same texts for every server, so many a request, in a mixed order of tasks."""
    found: list[Request] = []
    for task, own in texts.items():
        path = {OURS: "/v1/classify", PIPELINES: f"/{task}", LITSERVE: "/predict"}[name]
        more = {"labels": 1} if name == OURS else {}
        parts = [list(own[i : i + rows]) for i in range(0, len(own), rows)]
        found += [(path, {"input": part, **more}, len(part)) for part in parts]
    random.Random(0).shuffle(found)
    return found


def figures(section: str, name: str, clients: int, found: Load, base: float) -> dict[str, Any]:
    return {
        "section": section,
        "server": name,
        "clients": clients,
        "rows_per_second": round(found.rows_per_second, 1),
        "to_predict": round(found.rows_per_second / base, 3),
        "p50_ms": round(found.percentile(0.5), 1),
        "p99_ms": round(found.percentile(0.99), 1),
        "gap_ms": round(found.gap, 1),
        "refused": found.refused,
        "refused_p99_ms": round(Load(seconds=found.late).percentile(0.99), 1) if found.late else "",
    }


def predicted(slm: ScalableLM, texts: Sequence[str], seconds: float) -> float:
    """Rows a second of `predict` on all rows at once."""
    slm.predict(texts[:64])
    rows, began = 0, time.perf_counter()
    while rows == 0 or time.perf_counter() - began < seconds:
        slm.predict(texts)
        rows += len(texts)
    return rows / (time.perf_counter() - began)


def changing(store: Path, stop: threading.Event) -> None:
    """Learn and forget one task again and again, as another process would."""
    task = replace(Store.open(store).read(next(iter(Store.open(store).files)))[0], name="passing-by")
    while not stop.wait(0.5):
        Store.open(store).commit(add=[task])
        if not stop.wait(0.5):
            Store.open(store).commit(remove=[task.name])


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--section", nargs="+", choices=("serving", "overload", "reload"), default=["serving"])
    parser.add_argument("--servers", nargs="+", choices=tuple(READY), default=list(READY))
    parser.add_argument("--backbone", default="minilm")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rows", type=int, default=16, help="texts of a request")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each number of clients")
    parser.add_argument("--texts", type=int, default=200, help="of each task")
    parser.add_argument("--tasks", type=int, default=1000, help="in the store, for reload")
    parser.add_argument("--output", type=Path, default=RESULTS / "serving.csv")
    chosen = parser.parse_args(argv)
    torch.set_num_threads(chosen.threads)
    train, texts = texts_of(chosen.data, "train", 64), texts_of(chosen.data, "test", chosen.texts)
    slm = ScalableLM.from_backbone(chosen.backbone, dtype=chosen.dtype)
    mixed = [text for own in texts.values() for text in own]
    random.Random(0).shuffle(mixed)
    found: list[dict[str, Any]] = []

    def measured(section: str, name: str, port: int, clients: int) -> None:
        requests = requests_of(name, texts, chosen.rows)
        load(port, requests, clients, min(2.0, chosen.seconds))  # warm
        found.append(figures(section, name, clients, load(port, requests, clients, chosen.seconds), base))
        print(table(found[-1:]), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        slm.add(random_tasks(slm, train))
        slm.save_pretrained(store)
        base = predicted(slm, mixed, chosen.seconds)
        found.append(figures("serving", PREDICT, 1, Load(1.0, round(base)), base))
        for name in chosen.servers if "serving" in chosen.section else ():
            with server(name, store, chosen.dtype, chosen.threads) as port:
                for clients in chosen.clients:
                    measured("serving", name, port, clients)
        if "overload" in chosen.section:  # a queue of eight batches, and four times the clients that fill it
            rows = 8 * max(1, 2048 // 64)
            few = max(1, rows // chosen.rows)
            with server(OURS, store, chosen.dtype, chosen.threads, "--queue-rows", str(rows)) as port:
                measured("overload", OURS, port, few)
                measured("overload", OURS, port, 4 * few)
        if "reload" in chosen.section:
            many = Path(folder) / "many"
            other = ScalableLM.from_backbone(chosen.backbone, dtype=chosen.dtype)
            other.add(random_tasks(other, train, max(1, chosen.tasks // len(train))))
            other.save_pretrained(many)
            with server(OURS, many, chosen.dtype, chosen.threads) as port:
                measured("reload, nothing changes", OURS, port, 32)
                stop = threading.Event()
                writer = threading.Thread(target=changing, args=(many, stop))
                writer.start()
                measured("reload, every half second", OURS, port, 32)
                stop.set()
                writer.join()
    notes = {"rows a request": str(chosen.rows), "dtype": chosen.dtype, "backbone": chosen.backbone}
    write_csv(chosen.output, found, notes)
    print(table(found))
    return found


if __name__ == "__main__":
    main()
