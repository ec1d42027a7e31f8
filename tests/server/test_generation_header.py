"""`x-store-generation` names the generation that admitted a request or, for all other responses, the current one."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from models import mixed_texts
from served import Client, serving, store_with, until

from slm_fast.errors import NOT_FINITE, WorkError
from slm_fast.scheduler import Scheduler
from slm_fast.server import engine as engine_module
from slm_fast.server.app import Served
from slm_fast.server.engine import Engine
from slm_fast.server.generation import Generation

CLASSIFY, WRITE, CHAT = "/v1/classify", "/v1/completions", "/v1/chat/completions"
TURNS = [{"role": "user", "content": "sea1"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    slm = store_with(tmp_path_factory.mktemp("header") / "store", "llama")
    with serving(slm, key="secret", admin="admin", body=1000, inputs=2, patience=0.5) as (client, served):
        yield client, served


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        *(("GET", path, None, 200) for path in ("/", "/health", "/ready", "/metrics", "/info", "/openapi.json")),
        *(("GET", path, None, 200) for path in ("/v1/models", "/v1/models/sea", "/v1/models/auto")),
        ("POST", CLASSIFY, {"input": "sea1"}, 200),
        ("POST", "/predict", {"inputs": "sea1"}, 200),
        ("POST", "/v1/route", {"input": "sea1"}, 200),
        ("POST", WRITE, {"prompt": "sea1", "max_tokens": 2}, 200),
        ("POST", WRITE, {"prompt": "sea1", "max_tokens": 2, "stream": True}, 200),
        ("POST", CHAT, {"messages": TURNS, "max_tokens": 2}, 200),
        ("POST", CHAT, {"messages": TURNS, "max_tokens": 2, "stream": True}, 200),
        ("POST", CLASSIFY, b"{", 400),
        ("POST", CLASSIFY, {"input": ""}, 400),
        ("POST", CLASSIFY, {"input": "a", "colour": 1}, 400),
        ("POST", WRITE, {"prompt": "a", "model": "land"}, 404),
        ("GET", "/v1/models/land", None, 404),
        ("GET", "/nothing", None, 404),
        ("GET", CLASSIFY, None, 405),
        ("POST", CLASSIFY, {"input": ["a"] * 3}, 413),
        ("POST", CLASSIFY, {"input": "a" * 1000}, 413),
        ("POST", CLASSIFY, {"input": " ".join(["sea1"] * 150), "truncate": False}, 413),
        ("DELETE", "/v1/tasks/sea", None, 401),
    ],
)
def test_answers_of_every_kind_name_the_generation(server, method: str, path: str, body: Any, status: int) -> None:
    client, served = server
    got, _, headers = client.call(method, path, body)
    assert (got, headers["x-store-generation"]) == (status, served.engine.generation.number)


@pytest.mark.parametrize("path", [CLASSIFY, "/metrics", "/v1/models"])
def test_who_has_no_key_is_told_the_generation(server, path: str) -> None:
    client, served = server
    status, _, headers = Client(client.port).call("GET", path)
    assert (status, headers["x-store-generation"]) == (401, served.engine.generation.number)


def test_a_body_that_does_not_come_is_answered_with_the_generation(server) -> None:
    client, served = server
    with client.raw() as raw:
        head = "POST /v1/classify HTTP/1.1\r\nhost: a\r\nauthorization: Bearer secret\r\ncontent-length: 9\r\n\r\n"
        raw.sendall(head.encode())
        said = raw.recv(4096)
    assert said.startswith(b"HTTP/1.1 408 ")
    assert f"x-store-generation: {served.engine.generation.number}\r\n".encode() in said


def test_a_request_that_is_refused_for_want_of_room_or_while_draining_is_told_the_generation(tmp_path: Path) -> None:
    with serving(store_with(tmp_path / "store"), queue_rows=1, requests=2, drain=60.0) as (client, served):
        number = served.engine.generation.number
        with ThreadPoolExecutor(1) as pool, served.engine.model.lock:
            pool.submit(client.classify, ["sea1"])
            until(lambda: served.engine.room.rows == 1)
            status, _, headers = client.call("POST", CLASSIFY, {"input": "sea1"})
            assert (status, headers["x-store-generation"]) == (429, number)
        served.draining = True
        status, _, headers = client.call("POST", CLASSIFY, {"input": "sea1"})
        assert (status, headers["x-store-generation"]) == (503, number)


def without(now: Generation, name: str) -> Generation:
    return Generation.of(now.known.changed(remove=[name]), now.files)


def fails(*_: object) -> Any:
    raise RuntimeError("no such kernel")


def cannot_answer(_: object, rows: list[Any], *__: object) -> list[WorkError]:
    return [WorkError(NOT_FINITE)] * len(rows)


@pytest.mark.parametrize(
    ("name", "body", "where", "what", "harm", "status"),
    [
        ("bert", {"input": "sea1"}, engine_module, "read", fails, 400),
        ("bert", {"input": "sea1"}, engine_module, "answer_batch", cannot_answer, 422),
        ("bert", {"input": "sea1"}, engine_module, "answer_batch", fails, 500),
        ("llama", {"prompt": "sea1"}, Scheduler, "step", fails, 500),
        ("llama", {"prompt": "sea1", "stream": True}, Scheduler, "step", fails, 500),
    ],
)
def test_an_error_names_the_generation_that_admitted_the_request_although_it_has_changed(
    name: str, body: Any, where: Any, what: str, harm: Callable[..., Any], status: int, tmp_path: Path, monkeypatch
) -> None:
    with serving(store_with(tmp_path / "store", name)) as (client, served):
        before = served.engine.generation
        after = without(before, "farm")

        def harmed(*given: Any) -> Any:
            served.engine.publish(after)
            return harm(*given)

        monkeypatch.setattr(where, what, harmed)
        got, _, headers = client.call("POST", CLASSIFY if name == "bert" else WRITE, body)
        assert served.engine.generation is after
        assert (got, headers["x-store-generation"]) == (status, before.number)


def test_a_request_given_up_at_its_deadline_names_the_generation_that_admitted_it(tmp_path: Path, monkeypatch) -> None:
    goes_on = threading.Event()
    with serving(store_with(tmp_path / "store"), deadline=0.3) as (client, served):
        before = served.engine.generation

        def waits(_: object, rows: list[Any], *__: object) -> list[WorkError]:
            served.engine.publish(without(before, "farm"))
            assert goes_on.wait(60)
            return cannot_answer(_, rows)

        monkeypatch.setattr(engine_module, "answer_batch", waits)
        status, _, headers = client.call("POST", CLASSIFY, {"input": mixed_texts(2)})
        goes_on.set()
        assert served.engine.generation is not before
        assert (status, headers["x-store-generation"]) == (504, before.number)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/sea", "/ready", "/info"])
def test_a_body_and_its_header_describe_one_generation_even_if_it_changes_meanwhile(
    path: str, tmp_path: Path, monkeypatch
) -> None:
    with serving(store_with(tmp_path / "store")) as (client, served):
        now = served.engine.generation
        then = without(now, "sea")
        both = itertools.cycle([now, then])
        monkeypatch.setattr(Engine, "generation", property(lambda _: next(both)))
        _, body, headers = client.call("GET", path)
        files = {one.number: one.files for one in (now, then)}[headers["x-store-generation"]]
        described(path, body, headers["x-store-generation"], dict(files))


def described(path: str, body: Any, number: str, files: dict[str, str]) -> None:
    if path == "/v1/models/sea":
        assert body["task_sha256"] == files["sea"]
        return
    assert body["generation"] == number
    if path == "/v1/models":
        assert {model["id"]: model["task_sha256"] for model in body["data"] if model["id"] != "auto"} == files
    else:
        assert body["tasks"] == len(files)


def test_a_server_names_its_generation_before_it_is_warm(tmp_path: Path, monkeypatch) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr(engine_module, "prepare", lambda *_, **__: goes_on.wait(60))
    with serving(store_with(tmp_path / "store"), warm=False) as (client, served):
        try:
            assert first_answer(client, served) == (503, served.engine.generation.number)
        finally:
            goes_on.set()


def first_answer(client: Client, served: Served) -> tuple[int, str]:
    found: list[tuple[int, str]] = []

    def asked() -> bool:
        try:
            status, _, headers = client.call("POST", CLASSIFY, {"input": "sea1"})
        except ConnectionRefusedError:
            return False
        found.append((status, headers["x-store-generation"]))
        return True

    until(asked)
    return found[0]
