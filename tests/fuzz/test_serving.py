"""Server under load: each request gets its own answer, none is lost, and memory stays flat.

Takes about a minute with `make fuzz`; SLM_FAST_SOAK sets another duration in seconds.
"""

from __future__ import annotations

import os
import random
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from effort import EARNEST, times
from models import (
    mixed_texts,
    one_thread,  # noqa: F401
)
from served import Client, serving, store_with

from slm_fast.predict import Prediction

SECONDS = float(os.environ.get("SLM_FAST_SOAK", times(4, 60)))
CLIENTS = 64
NAMES = ("auto", "auto", "sea", "farm")


def resident() -> int:
    """Resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Load:
    """Concurrent clients whose answers are computed in advance. writes: generate text instead of classifying."""

    def __init__(self, port: int, slm: Any, *, writes: bool) -> None:
        self.port, self.writes = port, writes
        self.texts = mixed_texts(48, seed=2)
        options = {"max_new_tokens": 6} if writes else {}
        self.expected: dict[str, list[Prediction]] = {
            name: slm.predict(self.texts, task=None if name == "auto" else name, **options) for name in set(NAMES)
        }
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
            places = [rng.randrange(len(self.texts)) for _ in range(rng.randint(1, 8))]
            name = rng.choice(NAMES)
            body: dict[str, Any] = {"model": name}
            asked = [self.texts[i] for i in places]
            body |= {"prompt": asked, "max_tokens": 6} if self.writes else {"input": asked}
            path = "/v1/completions" if self.writes else "/v1/classify"
            began = time.monotonic()
            status, found, headers = client.call("POST", path, body)
            took = time.monotonic() - began
            with self.lock:
                self.replies += 1
                if status == 429:
                    assert int(headers["retry-after"]) >= 1
                    self.refused += 1
                    self.late.append(took)
                    continue
                self.admitted.append(took)
                rows = found.get("choices" if self.writes else "data", [])
                self.rows += len(rows)
                if status != 200 or len(rows) != len(places):
                    self.wrong.append(found)
                for place, row in zip(places, rows, strict=False):
                    answer = self.expected[name][place]
                    same = row["text"] == answer.text and row["label"] == answer.label and row["task"] == answer.task
                    if not same or abs(row["score"] - answer.score) > 2e-4:
                        self.wrong.append((name, self.texts[place], row, answer))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_sixty_four_clients_each_get_their_own_answers_and_memory_stays_flat(name: str, tmp_path: Path) -> None:
    slm = store_with(tmp_path / "store", name)
    with serving(slm, batch_rows=16) as (client, served):
        load = Load(client.port, slm, writes=served.engine.writes)
        load.run(CLIENTS, SECONDS / 4)
        before = resident()
        load.run(CLIENTS, SECONDS / 4)
        assert load.wrong == []
        assert load.refused == 0
        assert load.replies > 50
        assert resident() - before < 64 << 20
        assert (served.engine.room.rows, served.engine.room.tokens) == (0, 0)


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
