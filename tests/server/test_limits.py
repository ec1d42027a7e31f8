"""API keys, size and queue limits, and clients that are slow, disconnect or overload the server."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from models import mixed_texts
from served import Client, serving, store_with, until

from slm_fast.data import Row
from slm_fast.predict import answer_batch
from slm_fast.server import engine as engine_module
from slm_fast.server import run, writing
from slm_fast.server.app import Served

CLASSIFY = "/v1/classify"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory):
    return store_with(tmp_path_factory.mktemp("limits") / "store")


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory):
    return store_with(tmp_path_factory.mktemp("limits") / "store", "llama")


def test_all_but_the_page_and_the_state_asks_for_the_key(store) -> None:
    with serving(store, key="secret", admin="other") as (client, _):
        for name in ("", "secre", "secret2", "other", "Secret"):
            stranger = Client(client.port, name)
            for path in (CLASSIFY, "/predict", "/v1/route", "/v1/completions", "/v1/chat/completions"):
                status, found, headers = stranger.call("POST", path, {"input": "a"})
                assert (status, found["error"]["type"]) == (401, "authentication_error")
                assert headers["www-authenticate"] == "Bearer"
            for path in ("/metrics", "/info", "/v1/models", "/openapi.json", "/nothing"):
                assert stranger.call("GET", path)[0] == 401
            for path in ("/", "/health", "/ready"):
                assert stranger.call("GET", path)[0] == 200
            if name != "other":
                assert stranger.call("POST", "/v1/tasks", {"name": "a"})[0] == 401
                assert stranger.call("DELETE", "/v1/tasks/sea")[0] == 401
        assert client.call("DELETE", "/v1/tasks/sea")[0] == 401  # the API key is not an admin key
        assert client.call("POST", CLASSIFY, {"input": "a"}, authorization="bearer secret")[0] == 200
        assert client.call("POST", CLASSIFY, {"input": "a"}, authorization="Basic secret")[0] == 401


def test_without_an_admin_key_there_are_no_admin_paths(store) -> None:
    with serving(store) as (client, _):
        assert client.call("DELETE", "/v1/tasks/sea")[0] == 404
        assert client.call("POST", "/v1/tasks", {"name": "a"})[0] == 404
        assert store.tasks == ["farm", "sea"]


def test_a_body_that_is_too_large_is_refused_however_it_is_sent(store) -> None:
    with serving(store, body=1000) as (client, _):
        assert client.call("POST", CLASSIFY, b"x" * 1001)[0] == 413
        with client.raw() as raw:  # chunked, without a content-length
            raw.sendall(b"POST /v1/classify HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
            raw.sendall((b"1f4\r\n" + b"x" * 500 + b"\r\n") * 3)
            assert raw.recv(4096).startswith(b"HTTP/1.1 413")
        assert client.classify(["sea1"])


def test_who_is_refused_before_a_large_body_was_sent_gets_to_read_why(store) -> None:
    body = b" " * 1_900_000
    with serving(store, key="secret", body=2_000_000, drain=60.0) as (client, served):
        served.draining = True
        for _ in range(5):
            status, found, _ = client.call("POST", CLASSIFY, body)
            assert (status, found["error"]["code"]) == (503, "shutting_down")


def test_clients_that_send_half_a_request_or_a_byte_at_a_time_hold_up_nobody(store) -> None:
    with serving(store, patience=1.0, requests=4) as (client, served):
        halves = [client.begun(CLASSIFY, 500) for _ in range(20)]
        for half in halves:
            half.sendall(b'{"input": "')
        mute = [client.raw() for _ in range(20)]
        headers = [client.raw() for _ in range(20)]
        for one in headers:
            one.sendall(b"POST / HTTP/1.1\r\nx-a: ")
        began = time.monotonic()
        for _ in range(5):
            assert client.classify(["sea1", "farm1"])
            for half in (*halves, *headers):
                half.sendall(b"a")
        for half in halves:
            assert half.recv(4096).startswith(b"HTTP/1.1 408")
            half.close()
        for one in (*mute, *headers):
            assert is_closed(one)
            one.close()
        assert time.monotonic() - began < 20
        assert served.engine.room.rows == 0


def is_closed(raw: socket.socket) -> bool:
    try:
        return raw.recv(1) == b""
    except ConnectionResetError:
        return True


def test_by_default_as_many_texts_are_written_at_once_as_memory_holds(writer, monkeypatch) -> None:
    texts = mixed_texts(4)
    expected = [answer.text for answer in writer.predict(texts, max_new_tokens=5)]
    for free, rows in ((None, 64), (1 << 40, 64), (1, 1)):
        monkeypatch.setattr(writing, "ample", lambda device, free=free: free)
        with serving(writer) as (client, served):
            assert served.engine._writers.max_rows == rows
            found = client.post("/v1/completions", {"prompt": texts, "max_tokens": 5})
            assert [choice["text"] for choice in found["choices"]] == expected


def test_a_client_that_goes_frees_its_place_whether_its_rows_wait_or_are_written(writer) -> None:
    with serving(writer, batch_rows=2, max_new_tokens=100, queue_rows=64) as (client, served):
        gone = []
        with Held(served):
            for place in range(12):
                body = {"prompt": mixed_texts(3, seed=place), "stream": place % 2 == 0, "temperature": 1.0, "seed": 1}
                gone.append(client.sent("/v1/completions", body))
            until(lambda: served.engine.room.rows == 36)
            for raw in gone[:4]:
                raw.close()
            until(lambda: served.engine.room.rows == 24)
        until(lambda: served.engine.unanswered()[1])
        for raw in gone[4:]:
            raw.close()
        until(lambda: served.engine.room.rows == 0)
        assert served.engine.room.tokens == 0
        until(lambda: served.engine._writers.rows == 0)
        (expected,) = writer.predict(["sea1 sea2"], max_new_tokens=5)
        found = client.post("/v1/completions", {"prompt": "sea1 sea2", "max_tokens": 5})
        assert found["choices"][0]["text"] == expected.text


def test_a_client_of_an_encoder_that_goes_frees_its_place_whether_its_rows_wait_or_are_in_a_batch(
    store, monkeypatch
) -> None:
    batches, goes_on = list[int](), threading.Semaphore(0)

    def held(model, rows, *others):
        batches.append(len(rows))
        assert goes_on.acquire(timeout=60)
        return answer_batch(model, rows, *others)

    with serving(store) as (client, served), ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(engine_module, "answer_batch", held)
        engine, texts = served.engine, mixed_texts(2, seed=7)
        first = pool.submit(client.classify, ["sea1"])
        until(lambda: batches == [1])
        gone = client.sent(CLASSIFY, {"input": mixed_texts(3)})
        stays = pool.submit(client.classify, texts)
        until(lambda: engine._waiting.rows == 5)
        goes_on.release()
        until(lambda: batches == [1, 5])
        waits = client.sent(CLASSIFY, {"input": mixed_texts(4)})
        until(lambda: engine._waiting.rows == 4)
        for raw in (gone, waits):
            raw.close()
        until(lambda: engine.room.rows == 2)
        assert engine.room.tokens == sum(len(read.ids) for read in store.model.tokenize([Row(text) for text in texts]))
        assert (engine._waiting.rows, len(engine.unanswered()[1])) == (0, 2)
        goes_on.release()
        assert [row["label"] for row in stays.result()] == [answer.label for answer in store.predict(texts)]
        assert len(first.result()) == 1
        assert (engine.room.rows, engine.room.tokens) == (0, 0)
        goes_on.release()
        assert client.classify(["sea1"])
        assert batches == [1, 5, 1]  # the rows that waited were never answered


class Held:
    """Blocks the engine by holding the model's lock, as a long batch would."""

    def __init__(self, served: Served) -> None:
        self.lock = served.engine.model.lock

    def __enter__(self) -> None:
        self.lock.__enter__()

    def __exit__(self, *_: object) -> None:
        self.lock.__exit__(None, None, None)


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again(store) -> None:
    with serving(store, queue_rows=8) as (client, served), ThreadPoolExecutor(8) as pool:
        with Held(served):
            texts = [mixed_texts(4, seed=i) for i in range(2)]
            waiting = [pool.submit(Client(client.port).classify, some) for some in texts]
            until(lambda: served.engine.room.rows == 8)
            for _ in range(50):  # the engine is held meanwhile: a refusal does not wait for it
                status, found, headers = client.call("POST", CLASSIFY, {"input": "sea1"})
                assert (status, found["error"]["code"]) == (429, "rate_limit_exceeded")
                assert 1 <= int(headers["retry-after"]) <= 60
            assert served.engine.room.rows == 8
        for some, answered in zip(texts, waiting, strict=True):
            expected = store.predict(some)
            assert [row["label"] for row in answered.result()] == [answer.label for answer in expected]
        assert client.classify(["sea1"])
        assert client.call("POST", CLASSIFY, {"input": ["a"] * 9})[0] == 413  # larger than the queue


def test_so_many_requests_at_once_and_no_more(store) -> None:
    with serving(store, requests=3) as (client, served), ThreadPoolExecutor(8) as pool:
        with Held(served):
            waiting = [pool.submit(Client(client.port).classify, ["sea1"]) for _ in range(3)]
            until(lambda: served.engine.room.rows == 3)
            assert client.call("POST", CLASSIFY, {"input": "sea1"})[0] == 429
            assert client.call("GET", "/ready")[0] == 200
        assert all(len(answered.result()) == 1 for answered in waiting)


def test_a_request_that_is_not_answered_by_its_deadline_is_given_up(store) -> None:
    with serving(store, deadline=0.3) as (client, served):
        with Held(served):
            status, found, _ = client.call("POST", CLASSIFY, {"input": ["sea1", "sea2"]})
            assert (status, found["error"]["code"]) == (504, "deadline_exceeded")
            assert served.engine.room.rows == 0
        assert client.classify(["sea1"])


def test_who_does_not_read_an_answer_larger_than_the_buffers_is_cut_off(writer, monkeypatch) -> None:
    servers, bound = list[run.Server](), run.bound

    class Seen(run.Server):
        def __init__(self, served: Served) -> None:
            super().__init__(served)
            servers.append(self)

    def small(host: str, port: int) -> socket.socket:
        sock = bound(host, port)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return sock

    monkeypatch.setattr(run, "LAST_CALL", 0.1)
    monkeypatch.setattr(run, "Server", Seen)
    monkeypatch.setattr(run, "bound", small)
    body = {"prompt": mixed_texts(20), "stream": True, "temperature": 2.0, "seed": 1}
    with serving(writer, max_new_tokens=100, patience=0.5) as (client, served):
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # before it connects, else without effect
        client.raw = lambda: raw
        raw.connect(("127.0.0.1", client.port))
        client.sent("/v1/completions", body)
        until(lambda: served.engine.room.rows > 0)
        assert Client(client.port).post("/v1/completions", {"prompt": "sea1", "max_tokens": 3})["choices"]
        until(lambda: not servers[0].server_state.connections)
        assert served.engine.room.rows == 0
        said = read_all(raw)
        assert said.startswith(b"HTTP/1.1 200 ")
        assert b"[DONE]" not in said


def read_all(raw: socket.socket) -> bytes:
    """What a connection still has, until its end."""
    parts = []
    with raw, suppress(ConnectionResetError):
        while part := raw.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_a_row_longer_than_the_token_budget_is_refused_with_its_request(store) -> None:
    with serving(store, batch_tokens=8) as (client, served):
        fits, too_long = "sea1 sea2", " ".join(["sea1"] * 9)
        tokens = len(store.model.tokenize([Row(too_long)])[0].ids)
        status, found, _ = client.call("POST", CLASSIFY, {"input": [fits, too_long]})
        assert (status, found["error"]["code"]) == (413, "context_length_exceeded")
        assert found["error"]["message"] == f"input 1: {tokens} tokens, a batch has 8"
        assert (served.engine.room.rows, served.engine.room.tokens) == (0, 0)
        assert client.classify([fits])[0]["task"] == "sea"


def test_stopping_threads_leaves_none_behind(store) -> None:
    before = threading.active_count()
    with serving(store) as (client, _):
        assert client.classify(["sea1"])
    until(lambda: threading.active_count() <= before)
