"""Our server against others, on the same rows and in one run: rows per second and response times.

    python -m benchmarks.speed.serving --data DIR                       # three servers, 1, 8 and 64 clients
    python -m benchmarks.speed.serving --rows 8 --seconds 30 --dtype bfloat16
    python -m benchmarks.speed.serving --section overload reload

Each client sends one request after another, with `--rows` texts of one task each, because with one pipeline per task
the client must name the task; our server and LitServe's model are not given it. Servers are processes on the same CPU
as the clients and take turns, `--rounds` times. "predict" answers the same rows in one call.

serving:  rows per second, and the 50th and 99th percentile of response times in milliseconds.
overload: clients that fill the queue; then requests that arrive at four times the rate at which those were answered,
          regardless of how many are waiting ("arriving"); then four times the clients, which ask again immediately when
          refused ("at once"): what is admitted, and how fast the rest is refused.
reload:   the longest time without an answer to any of 32 clients with one text per request (gap_ms), while nothing
          changes and while another process learns and forgets, with `--tasks` tasks in the store; and how many
          answers name a task's file that their generation does not have (wrong).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.arguments import Parser, at_least, duration, exit_status, output_file
from benchmarks.speed.serving.load import Load, Request, Running, arrive, load, served
from benchmarks.speed.tasks import random_tasks
from benchmarks.speed.texts import add_data, texts_of
from benchmarks.tables import RESULTS, not_in, table, write_csv
from slm_fast import ScalableLM
from slm_fast.server.generation import generation_number
from slm_fast.store import Store
from slm_fast.task_file import task_to_bytes

COMMAND = "slm-fast bench serving"
OURS, PIPELINES, LITSERVE, PREDICT = "slm_fast", "pipelines", "litserve", "predict"
READY = {OURS: "/ready", PIPELINES: "/health", LITSERVE: "/health"}
QUEUE = 256  # rows that may wait under overload: eight batches
CHANGING = 32  # clients while the store changes


def server(name: str, store: Path, dtype: str, threads: int, *more: str) -> AbstractContextManager[Running]:
    """A server that is ready."""
    if name == OURS:
        words = ["slm_fast.cli", "serve", str(store), "--port", "PORT", "--dtype", dtype, "--threads", str(threads)]
        words += ["--queue-rows", "8192", *more]
    else:
        words = ["benchmarks.speed.serving.servers", name, str(store), "PORT", dtype, str(threads)]
    return served(words, READY[name])


def requests_of(name: str, texts: Mapping[str, Sequence[str]], rows: int) -> list[Request]:
    """The same texts for every server, `rows` per request, with tasks in mixed order."""
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
    """Rows per second of `predict` on all rows at once."""
    slm.predict(texts[:64])
    rows, began = 0, time.perf_counter()
    while rows == 0 or time.perf_counter() - began < seconds:
        slm.predict(texts)
        rows += len(texts)
    return rows / (time.perf_counter() - began)


@contextmanager
def changed(store: Path) -> Iterator[dict[str, dict[str, str]]]:
    """Learn and forget one task again and again, as another process would. Gives the files of both generations."""
    now = Store.open(store)
    task = replace(now.read(next(iter(now.files)))[0], name="passing-by")
    files = {**now.files, task.name: hashlib.sha256(task_to_bytes(task)).hexdigest()}
    stop = threading.Event()

    def change() -> None:
        while not stop.wait(0.5):
            Store.open(store).commit(add=[task])
            stop.wait(0.5)
            Store.open(store).commit(remove=[task.name])

    writer = threading.Thread(target=change)
    writer.start()
    try:
        yield {generation_number(known): known for known in (now.files, files)}
    finally:
        stop.set()
        writer.join()


def wrong(found: Load, generations: Mapping[str, Mapping[str, str]]) -> int:
    """How many of the kept answers name a task's file that their generation does not have."""
    rows = [(generations.get(number, {}), row) for number, body in found.answers for row in json.loads(body)["data"]]
    return sum(row["task_sha256"] is None or files.get(row["task"]) != row["task_sha256"] for files, row in rows)


class Bench:
    """The sections; each adds its lines to `found`."""

    def __init__(self, chosen: argparse.Namespace, folder: Path) -> None:
        self.chosen, self.folder = chosen, folder
        self.found: list[dict[str, Any]] = []
        self.train = texts_of(chosen.data, "train", 64)
        self.texts = texts_of(chosen.data, "test", chosen.texts)
        self.slm = ScalableLM.from_backbone(chosen.backbone, dtype=chosen.dtype)
        self.store = self.stored(self.slm, "store", 1)
        self.mixed = [text for own in self.texts.values() for text in own]
        random.Random(0).shuffle(self.mixed)
        self.base = predicted(self.slm, self.mixed, chosen.seconds)

    def stored(self, slm: ScalableLM, name: str, times: int) -> Path:
        slm.add(random_tasks(slm, self.train, times))
        slm.save_pretrained(self.folder / name)
        return self.folder / name

    def server(self, name: str, store: Path, *more: str) -> AbstractContextManager[Running]:
        return server(name, store, self.chosen.dtype, self.chosen.threads, *more)

    def note(self, section: str, name: str, clients: int, load: Load, wrong: int | str = "") -> None:
        self.found.append({**figures(section, name, clients, load, self.base), "wrong": wrong})
        print(table(self.found[-1:]), flush=True)

    def loaded(self, section: str, name: str, port: int, clients: int, rows: int) -> Load:
        """Clients that send one request after another, after as many have warmed up the server."""
        requests = requests_of(name, self.texts, rows)
        load(port, requests, clients, min(2.0, self.chosen.seconds))
        found = load(port, requests, clients, self.chosen.seconds)
        self.note(section, name, clients, found)
        return found

    def serving(self) -> None:
        """Servers in turns, so that a slow minute of the machine affects all; one line for each server's rounds."""
        chosen = self.chosen
        with ExitStack() as stack:
            running: dict[str, Running] = {}
            for name in chosen.servers:
                running[name] = stack.enter_context(self.server(name, self.store))
                running[name].pause()
            for clients in chosen.clients:
                rounds: dict[str, list[Load]] = {name: [] for name in running}
                for _ in range(chosen.rounds):
                    for name, one in running.items():
                        requests = requests_of(name, self.texts, chosen.rows)
                        one.resume()
                        load(one.port, requests, clients, min(2.0, chosen.seconds))
                        rounds[name].append(load(one.port, requests, clients, chosen.seconds))
                        one.pause()
                    rate = predicted(self.slm, self.mixed, chosen.seconds)
                    rounds.setdefault(PREDICT, []).append(Load(chosen.seconds, round(rate * chosen.seconds)))
                self.base = Load.of(rounds[PREDICT]).rows_per_second
                for name, loads in rounds.items():
                    self.note("serving", name, clients, Load.of(loads))

    def overload(self) -> None:
        rows = self.chosen.rows
        few = max(1, QUEUE // rows)
        with self.server(OURS, self.store, "--queue-rows", str(QUEUE)) as one:
            full = self.loaded("overload, queue full", OURS, one.port, few, rows)
            rate = 4 * full.rows_per_second / rows
            requests = requests_of(OURS, self.texts, rows)
            self.note(
                "overload, arriving", OURS, 4 * few, arrive(one.port, requests, rate, self.chosen.seconds, 4 * few)
            )
            self.loaded("overload, at once", OURS, one.port, 4 * few, rows)

    def reload(self) -> None:
        other = ScalableLM.from_backbone(self.chosen.backbone, dtype=self.chosen.dtype)
        many = self.stored(other, "many", max(1, self.chosen.tasks // len(self.train)))
        with self.server(OURS, many) as one:
            self.loaded("reload, nothing changes", OURS, one.port, CHANGING, 1)
            with changed(many) as generations:
                requests = requests_of(OURS, self.texts, 1)
                found = load(one.port, requests, CHANGING, self.chosen.seconds, keep=True)
            self.note("reload, every half second", OURS, CHANGING, found, wrong(found, generations))


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = Parser(COMMAND, __doc__)
    add_data(parser)
    parser.add_argument("--section", nargs="+", choices=("serving", "overload", "reload"), default=["serving"])
    parser.add_argument("--servers", nargs="+", choices=tuple(READY), default=list(READY))
    parser.add_argument("--backbone", default="minilm")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=at_least(1), default=torch.get_num_threads())
    parser.add_argument("--clients", type=at_least(1), nargs="+", default=[1, 8, 64])
    parser.add_argument("--rows", type=at_least(1), default=16, help="texts per request")
    parser.add_argument("--seconds", type=duration, default=10.0, help="seconds per round and number of clients")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="turns of each server")
    parser.add_argument("--texts", type=at_least(1), default=200, help="texts per task")
    parser.add_argument("--tasks", type=at_least(1), default=1000, help="tasks in the store for reload")
    parser.add_argument("--output", type=output_file, default=RESULTS / "serving.csv")
    chosen = parser.parse_args(argv)
    torch.set_num_threads(chosen.threads)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(chosen, Path(folder))
        for section in chosen.section:
            getattr(bench, section)()
    notes = {"rows a request": f"{chosen.rows}, 1 for reload", "dtype": chosen.dtype, "backbone": chosen.backbone}
    kept = not_in(bench.found, chosen.output, lambda row: row["section"].partition(",")[0])
    write_csv(chosen.output, kept + bench.found, notes)
    print(table(bench.found))
    return bench.found


if __name__ == "__main__":
    sys.exit(exit_status(COMMAND, main))
