"""Server under load: each request gets its own answer, none is lost, and memory stays flat.

Takes about a minute with `make fuzz`; SLM_FAST_SOAK sets another duration in seconds.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from effort import EARNEST, times
from models import (
    mixed_texts,
    one_thread,  # noqa: F401
)
from served import Client, Process, serving, store_with, until

from slm_fast.predict import Prediction

SECONDS = float(os.environ.get("SLM_FAST_SOAK", times(4, 60)))
CLIENTS = 64
NAMES = ("auto", "auto", "sea", "farm")
WRITTEN = 6  # tokens of a text
CLASSIFY, ROUTE, COMPLETE, CHAT = "/v1/classify", "/v1/route", "/v1/completions", "/v1/chat/completions"


def resident(pid: int) -> int:
    """Resident memory of a process in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def streamed(said: str) -> list[dict[str, Any]]:
    """The choices of a stream, with the parts of each text joined."""
    choices: dict[int, dict[str, Any]] = {}
    *events, last = [line.removeprefix("data: ") for line in said.splitlines() if line]
    assert last == "[DONE]"
    for event in map(json.loads, events):
        (choice,) = event["choices"]
        before = choices.get(choice["index"], {})
        part = choice.get("text") or choice.get("delta", {}).get("content") or ""
        choices[choice["index"]] = {**before, **choice, "text": before.get("text", "") + part}
    return [choices[place] for place in sorted(choices)]


class Load:
    """Concurrent clients whose answers are computed in advance. writes: all endpoints, else those of an encoder."""

    def __init__(self, port: int, slm: Any, *, writes: bool) -> None:
        self.port = port
        self.paths = (CLASSIFY, ROUTE, COMPLETE, CHAT) if writes else (CLASSIFY, CLASSIFY, ROUTE)
        self.texts = mixed_texts(48, seed=2)
        self.expected: dict[str, list[Prediction]] = {
            name: slm.predict(self.texts, task=None if name == "auto" else name, max_new_tokens=WRITTEN)
            for name in set(NAMES)
        }
        self.asked = Counter[tuple[str, bool]]()
        self.replies = self.rows = self.refused = 0
        self.late: list[float] = []
        self.admitted: list[float] = []
        self.wrong: list[Any] = []
        self.lock = threading.Lock()

    def run(self, clients: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        with ThreadPoolExecutor(clients) as pool:
            for one in [pool.submit(self._client, seed, end) for seed in range(clients)]:
                one.result()

    def _client(self, seed: int, end: float) -> None:
        rng, client = random.Random(seed), Client(self.port)
        while time.monotonic() < end:
            path, name = rng.choice(self.paths), rng.choice(NAMES)
            stream = path in (COMPLETE, CHAT) and rng.random() < 0.5
            places = [rng.randrange(len(self.texts)) for _ in range(1 if path == CHAT else rng.randint(1, 8))]
            if path == ROUTE:
                name = "auto"
            began = time.monotonic()
            status, found, headers = client.call("POST", path, self._body(path, name, places, stream))
            took = time.monotonic() - began
            with self.lock:
                self.replies += 1
                if status == 429:
                    assert int(headers["retry-after"]) >= 1
                    self.refused += 1
                    self.late.append(took)
                    continue
                self.admitted.append(took)
                self.asked[path, stream] += 1
                if status != 200:
                    self.wrong.append(found)
                    continue
                rows = streamed(found) if stream else found.get("choices") or found["data"]
                self.rows += len(rows)
                if len(rows) != len(places):
                    self.wrong.append(found)
                for place, row in zip(places, rows, strict=False):
                    answer = self.expected[name][place]
                    if not (same_route(row, answer) if path == ROUTE else same(row, answer)):
                        self.wrong.append((path, stream, name, self.texts[place], row, answer))

    def _body(self, path: str, name: str, places: Sequence[int], stream: bool) -> dict[str, Any]:
        texts = [self.texts[i] for i in places]
        if path in (CLASSIFY, ROUTE):
            return {"model": name, "input": texts}
        body = {"model": name, "max_tokens": WRITTEN, "stream": stream}
        return body | ({"messages": [{"role": "user", "content": texts[0]}]} if path == CHAT else {"prompt": texts})


def same_route(row: Mapping[str, Any], answer: Prediction) -> bool:
    found = [(part["task"], part["slot"]) for part in row["route"]]
    route = answer.route
    if row["task"] != answer.task or found != list(zip(route.tasks, route.slots, strict=True)):
        return False
    return all(abs(part["weight"] - w) < 2e-4 for part, w in zip(row["route"], route.weights, strict=True))


def same(row: Mapping[str, Any], answer: Prediction) -> bool:
    text = row["message"]["content"] if "message" in row else row["text"]
    found = (text, row["label"], row["task"], row.get("finish_reason", answer.finish_reason))
    expected = (answer.text, answer.label, answer.task, answer.finish_reason)
    return found == expected and abs(row["score"] - answer.score) < 2e-4 and same_route(row, answer)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_sixty_four_clients_each_get_their_own_answers_and_memory_stays_flat(name: str, tmp_path: Path) -> None:
    slm = store_with(tmp_path / "store", name)
    # /v1/classify writes as many tokens as a request may.
    process = Process(tmp_path / "store", "--max-new-tokens", WRITTEN, seconds=int(SECONDS) + 300, fresh=EARNEST)
    process.client.until_ready()
    load = Load(process.client.port, slm, writes=name == "llama")
    load.run(CLIENTS, SECONDS / 4)
    before = resident(process.pid)
    load.run(CLIENTS, SECONDS / 4)
    grown = resident(process.pid) - before
    assert load.wrong == []
    assert load.refused == 0
    assert load.replies > 50
    kinds = {
        (path, stream) for path in load.paths for stream in (False, True) if path in (COMPLETE, CHAT) or not stream
    }
    assert load.asked.keys() == kinds
    assert grown < (0.02 * before if SECONDS >= 60 else 64 << 20)
    metrics = process.client.get("/metrics")
    assert re.findall(r"^slm_fast_queue_(?:rows|tokens) (\S+)$", metrics, re.MULTILINE) == ["0.0", "0.0"]
    process.kill(signal.SIGTERM)
    assert process.wait() == 0, process.said()
    assert "Traceback" not in process.said()


def test_beyond_what_it_can_take_requests_are_refused_and_what_was_admitted_is_answered(tmp_path: Path) -> None:
    slm = store_with(tmp_path / "store")
    deadline = 10.0
    with serving(slm, queue_rows=24, deadline=deadline) as (client, served):
        load = Load(client.port, slm, writes=False)
        load.run(48, SECONDS / 4)
        assert load.wrong == []
        assert load.refused > 0
        assert load.rows > 0
        assert max(load.admitted) < deadline
        if EARNEST:  # a loose bound on the 99th percentile: the clients run on this machine too
            assert sorted(load.late)[int(0.99 * len(load.late))] < 1.0
        assert (served.engine.room.rows, served.engine.room.tokens) == (0, 0)


def opened(client: Client, kind: int) -> socket.socket:
    """A connection that sends nothing, the beginning of a header, or half a body."""
    if kind == 2:
        raw = client.begun(CLASSIFY, 500)
        raw.sendall(b'{"input": "')
        return raw
    raw = client.raw()
    raw.sendall(b"POST / HTTP/1.1\r\nx-a: " if kind else b"")
    return raw


def test_thousands_of_clients_that_never_end_a_request_are_cut_off_and_the_others_answered(tmp_path: Path) -> None:
    slm, texts = store_with(tmp_path / "store"), mixed_texts(20, seed=7)
    expected = [(answer.task, answer.label) for answer in slm.predict(texts)]
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    process = Process(tmp_path / "store", "--patience", times(3, 20), seconds=300)
    client = process.client
    client.until_ready()
    files, before = Path(f"/proc/{process.pid}/fd"), resident(process.pid)
    idle = len(list(files.iterdir()))

    def answers() -> None:
        assert [(row["task"], row["label"]) for row in client.classify(texts)] == expected

    slow: list[socket.socket] = []
    for number in range(min(times(600, 10_000), most - 200)):
        slow.append(opened(client, number % 3))
        if number % 100 == 0:
            answers()
    for _ in range(3):
        for kind in (1, 2):  # a byte more, of a header or a body
            for raw in slow[kind::3]:
                with suppress(ConnectionError):  # cut off already
                    raw.sendall(b"a")
        answers()
    refused = Counter(raw.recv(4096)[:12] for raw in slow[2::3])
    assert refused.keys() <= {b"HTTP/1.1 408", b"HTTP/1.1 429"}
    for raw in (*slow[0::3], *slow[1::3]):
        with suppress(ConnectionResetError):
            assert raw.recv(1) == b""
    for raw in slow:
        raw.close()
    until(lambda: len(list(files.iterdir())) <= idle)
    assert resident(process.pid) - before < (32 << 20) + len(slow) * (16 << 10)
    answers()
    process.kill(signal.SIGTERM)
    assert process.wait() == 0, process.said()
