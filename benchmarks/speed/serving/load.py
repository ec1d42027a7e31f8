"""Clients that send one request after another, each on its own persistent connection."""

from __future__ import annotations

import http.client
import itertools
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from benchmarks.processes import sigterm_as_exit

Request = tuple[str, Any, int]  # path, body, rows


def percentile(seconds: Sequence[float], share: float) -> float:
    """Milliseconds that this share of the times does not exceed; NaN for none."""
    ordered = sorted(seconds)
    return 1000 * ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


@dataclass
class Load:
    """What clients observed. seconds: per answer. refused: answers with status 429, not included in `seconds`.
    answers: the store's generation and the body of each, if they are kept."""

    elapsed: float = 0.0
    rows: int = 0
    refused: int = 0
    seconds: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)  # of refusals
    answered: list[float] = field(default_factory=list)  # when each answer came
    answers: list[tuple[str, bytes]] = field(default_factory=list)

    @staticmethod
    def of(rounds: Sequence[Load]) -> Load:
        """Several rounds as one, their answers one round after another."""
        whole = Load()
        for one in rounds:
            first = min(one.answered, default=0.0)
            whole.answered += [whole.elapsed + at - first for at in one.answered]
            whole.elapsed += one.elapsed
            whole.rows += one.rows
            whole.refused += one.refused
            whole.seconds += one.seconds
            whole.late += one.late
            whole.answers += one.answers
        return whole

    @property
    def rows_per_second(self) -> float:
        return self.rows / self.elapsed

    @property
    def gap(self) -> float:
        """The longest time in milliseconds without an answer to any client."""
        ordered = sorted(self.answered)
        return 1000 * max((b - a for a, b in itertools.pairwise(ordered)), default=math.nan)

    def percentile(self, share: float) -> float:
        """Milliseconds within which this share of the answers came."""
        return percentile(self.seconds, share)


def load(port: int, requests: Sequence[Request], clients: int, seconds: float, *, keep: bool = False) -> Load:
    """Let clients send the requests in turns for `seconds` seconds. Raises RuntimeError for a failed answer.

    Args:
        keep: keep the answers.
    """
    return _ask_all(port, requests, clients, lambda number, now: now if now < seconds else None, keep)


def arrive(port: int, requests: Sequence[Request], rate: float, seconds: float, clients: int = 64) -> Load:
    """Send `rate` requests per second for `seconds` seconds, however many are unanswered, at the random times of a
    Poisson process with exactly so many arrivals.

    An answer's time counts from when its request was due. Raises RuntimeError for a failed answer.
    """
    draw = random.Random(0)
    times = sorted(draw.uniform(0.0, seconds) for _ in range(round(rate * seconds)))
    return _ask_all(port, requests, clients, lambda number, now: times[number] if number < len(times) else None)


def _ask_all(
    port: int,
    requests: Sequence[Request],
    clients: int,
    due: Callable[[int, float], float | None],
    keep: bool = False,
) -> Load:
    """due: when the request of this number is to be sent, given the time, both in seconds from the start; None ends
    its client."""
    found, lock = Load(), threading.Lock()
    began = time.perf_counter()

    def ask(connection: http.client.HTTPConnection, number: int) -> bool:
        at = due(number, time.perf_counter() - began)
        if at is None:
            return False
        time.sleep(max(0.0, began + at - time.perf_counter()))
        _ask(connection, requests[number % len(requests)], began + at, found, lock, keep)
        return True

    found.elapsed = in_turns(port, clients, ask)
    return found


def in_turns(port: int, clients: int, ask: Callable[[http.client.HTTPConnection, int], bool]) -> float:
    """Let each of `clients` clients ask on its own connection, given the request's number, until none is left (False).

    Returns the seconds it took.
    """
    turn, began = itertools.count(), time.perf_counter()

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        while ask(connection, next(turn)):
            pass
        connection.close()

    with ThreadPoolExecutor(clients) as pool:
        for one in [pool.submit(client) for _ in range(clients)]:
            one.result()
    return time.perf_counter() - began


def _ask(
    connection: http.client.HTTPConnection,
    request: Request,
    start: float,
    found: Load,
    lock: threading.Lock,
    keep: bool,
) -> None:
    """Send a request and record the answer. start: from when its time counts."""
    path, body, rows = request
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    answer = response.read()
    took = time.perf_counter() - start
    if response.status not in (200, 429):
        raise RuntimeError(f"{path}: {response.status}: {answer[:200]!r}")
    with lock:
        if response.status == 429:
            found.refused += 1
            found.late.append(took)
        else:
            found.rows += rows
            found.seconds.append(took)
            found.answered.append(start + took)
            if keep:
                found.answers.append((response.headers["x-store-generation"], answer))


@dataclass
class Running:
    """A server's port, and its process group."""

    port: int
    group: int

    def pause(self) -> None:
        """Stop all its processes until `resume`: some servers use the CPU while they wait for requests."""
        os.killpg(self.group, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.group, signal.SIGCONT)


@contextmanager
def served(words: Sequence[str], ready: str) -> Iterator[Running]:
    """A server that is ready, started by `python -m` with these words, in which PORT stands for its port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", *(str(port) if word == "PORT" else word for word in words)]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        with sigterm_as_exit():
            _until_ready(port, ready, lambda: process.poll() is None)
            yield Running(port, process.pid)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGCONT)  # if it is paused
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):  # some servers' workers outlive them
            os.killpg(process.pid, signal.SIGKILL)


def _until_ready(port: int, path: str, alive: Callable[[], bool], seconds: float = 1800.0) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", path)
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        if time.monotonic() > end or not alive():
            raise RuntimeError(f"the server on port {port} did not become ready")
        time.sleep(0.1)
