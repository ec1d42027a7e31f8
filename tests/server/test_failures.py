"""If a batch, a row or generation fails, its client gets an error and the server goes on; a failed engine ends it.

/ready and /health say in which state a server is.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import uvicorn
from models import mixed_texts, random_task, reopened
from served import Client, serving, store_with, until
from stores import damage_values

from slm_fast.errors import NOT_FINITE, InputError, WorkError
from slm_fast.predict import answer_batch
from slm_fast.scheduler import Scheduler
from slm_fast.server import engine as engine_module
from slm_fast.server import run
from slm_fast.server.app import Served
from slm_fast.store import Store

TEXTS = mixed_texts(4)


def test_a_batch_that_fails_is_a_500_for_its_rows_alone(tmp_path: Path, monkeypatch) -> None:
    slm = store_with(tmp_path / "store")
    with serving(slm) as (client, served):

        def fails(model, rows, readings, *others):
            if any(len(reading.ids) == 4 for reading in readings):
                raise RuntimeError("no such kernel\nand more")
            return answer_batch(model, rows, readings, *others)

        monkeypatch.setattr(engine_module, "answer_batch", fails)
        status, found, _ = client.call("POST", "/v1/classify", {"input": "sea1 sea2"})
        assert (status, found["error"]["type"]) == (500, "server_error")
        assert found["error"]["message"] == "the batch failed: no such kernel"
        assert client.classify(["sea1"])[0]["task"] == "sea"
        assert served.engine.room.rows == 0
        assert client.get("/health") == {"status": "ok"}


def test_a_row_that_cannot_be_answered_is_named(tmp_path: Path, monkeypatch) -> None:
    with serving(store_with(tmp_path / "store")) as (client, _):

        def fails(model, rows, readings, *others):
            return [
                WorkError(NOT_FINITE) if i else row
                for i, row in enumerate(answer_batch(model, rows, readings, *others))
            ]

        monkeypatch.setattr(engine_module, "answer_batch", fails)
        status, found, _ = client.call("POST", "/v1/classify", {"input": ["sea1 sea2", "sea3 sea4"]})
        assert (status, found["error"]["message"]) == (422, f"input 1: {NOT_FINITE}")


def test_a_row_that_cannot_begin_lets_others_of_its_turn_begin(tmp_path: Path, monkeypatch) -> None:
    slm = store_with(tmp_path / "store", "llama")
    expected, add = [answer.text for answer in slm.predict(TEXTS, max_new_tokens=5)], Scheduler.add_request

    def fails(self, request):
        if request.max_new_tokens == 3:
            raise InputError("max_new_tokens: too few")
        return add(self, request)

    monkeypatch.setattr(Scheduler, "add_request", fails)
    with serving(slm) as (client, _), ThreadPoolExecutor(len(TEXTS) + 1) as pool:
        bodies = [{"prompt": text, "max_tokens": 5} for text in TEXTS]
        bodies.insert(2, {"prompt": TEXTS[0], "max_tokens": 3})
        replies = list(pool.map(lambda body: client.call("POST", "/v1/completions", body), bodies))
    status, found, _ = replies.pop(2)
    assert (status, found["error"]["message"]) == (422, "prompt 0: max_new_tokens: too few")
    assert [body["choices"][0]["text"] for _, body, _ in replies] == expected


def test_texts_that_cannot_be_written_on_are_a_500_and_the_next_are_written(tmp_path: Path, monkeypatch) -> None:
    slm = store_with(tmp_path / "store", "llama")
    expected = slm.predict(TEXTS, max_new_tokens=5)
    step, failed = Scheduler.step, []

    def fails(self):
        if not failed:
            failed.append(True)
            raise RuntimeError("out of kernels")
        return step(self)

    with serving(slm) as (client, served):
        monkeypatch.setattr(Scheduler, "step", fails)
        status, found, _ = client.call("POST", "/v1/completions", {"prompt": TEXTS, "max_tokens": 5})
        assert (status, found["error"]["message"]) == (500, "writing failed: out of kernels")
        body = client.post("/v1/completions", {"prompt": TEXTS, "max_tokens": 5})
        assert [choice["text"] for choice in body["choices"]] == [answer.text for answer in expected]
        assert (served.engine.room.rows, served.engine.room.tokens, served.engine._writers.rows) == (0, 0, 0)


def test_texts_of_a_task_that_cannot_be_read_are_refused_and_the_others_written(tmp_path: Path) -> None:
    slm = store_with(tmp_path / "store", "llama", k=1)
    slm.add([random_task(slm, "city", labels=None)])
    texts = mixed_texts(12, topics=("farm", "sea", "city"))
    expected = slm.predict(texts, max_new_tokens=5)
    assert {answer.task for answer in expected} == {"farm", "sea", "city"}
    size = sum(a.nbytes + b.nbytes for a, b in slm.learned["sea"].values.values())
    reopened(tmp_path / "store", "llama")  # from now on the store opens without reading values
    paged = reopened(tmp_path / "store", "llama", device_memory=2 * size)
    file = damage_values(slm, "sea")
    with serving(paged) as (client, served), ThreadPoolExecutor(len(texts)) as clients:
        bodies = [{"prompt": text, "max_tokens": 5} for text in texts]
        found = list(clients.map(lambda body: client.call("POST", "/v1/completions", body)[:2], bodies))
        assert served.engine._writers.rows == 0
    for (status, body), answer in zip(found, expected, strict=True):
        if answer.task == "sea":
            assert status == 422
            assert body["error"]["message"].startswith(f"prompt 0: task 'sea': {file}: damaged: SHA-256")
        else:
            assert (status, body["choices"][0]["text"]) == (200, answer.text)


def break_engine(client: Client, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(served.engine, "_turn", fails)
    client.call("POST", "/v1/classify", {"input": TEXTS})  # wakes the engine, whose next turn fails
    until(lambda: served.engine.failed is not None)


def test_an_engine_that_fails_refuses_what_waits_and_ends_the_server(tmp_path: Path, monkeypatch) -> None:
    with serving(store_with(tmp_path / "store")) as (client, served):
        break_engine(client, served, monkeypatch)
        assert str(served.engine.failed) == "a bug"
        assert not served.ready
        assert served.state()["status"] == "failed"
        with pytest.raises(OSError, match=r"refused|reset|closed"):
            until(lambda: client.call("POST", "/v1/classify", {"input": TEXTS})[0] != 503)


def test_a_server_is_not_ready_before_it_is_warm(tmp_path: Path, monkeypatch) -> None:
    goes_on, prepare = threading.Event(), engine_module.prepare

    def slow(*given: object, **options: object) -> None:
        assert goes_on.wait(60)
        prepare(*given, **options)

    monkeypatch.setattr(engine_module, "prepare", slow)
    with serving(store_with(tmp_path / "store"), warm=False) as (client, _):
        try:
            until(lambda: listens(client))
            status, found, headers = client.call("GET", "/ready")
            assert (status, found["status"], found["generation"]) == (503, "not warm", headers["x-store-generation"])
            assert client.get("/health") == {"status": "ok"}
            status, found, headers = client.call("POST", "/v1/classify", {"input": TEXTS})
            assert (status, found["error"]["message"]) == (503, "the server is not warm yet")
            assert headers["retry-after"] == "1"
        finally:
            goes_on.set()
        assert client.until_ready()["status"] == "ready"
        assert len(client.classify(TEXTS)) == len(TEXTS)


def listens(client: Client) -> bool:
    try:
        client.raw().close()
    except ConnectionRefusedError:
        return False
    return True


def test_a_file_of_a_served_task_that_is_lost_or_damaged_is_reported_and_the_answers_go_on(tmp_path: Path) -> None:
    slm = store_with(tmp_path / "store")
    with serving(slm) as (client, served):
        generation, before = client.get("/ready")["generation"], client.classify(TEXTS)
        watcher, sea, farm = served.watcher, slm.store.file("sea"), slm.store.file("farm")
        data = sea.read_bytes()

        def looks() -> str | None:
            with watcher.changed:
                watcher.reload()
                assert watcher.changed.wait(30)
            return watcher.trouble

        assert looks() is None
        sea.unlink()
        assert str(sea) in looks()
        state = client.get("/ready")
        assert (state["status"], state["generation"]) == ("ready", generation)
        assert str(sea) in state["store"]
        assert client.classify(TEXTS) == before
        sea.write_bytes(data)
        assert looks() is None
        damage_values(slm, "farm")
        assert f"{farm}: damaged" in looks()
        Store.open(slm.store.path).commit(remove=["farm"])  # by another process: then the file is no longer missed
        assert looks() is None
        assert client.get("/ready")["store"] == "ok"
        assert client.get("/ready")["tasks"] == 1


def test_an_encoder_without_a_task_is_not_ready_until_there_is_one(tmp_path: Path) -> None:
    slm = store_with(tmp_path / "store")
    tasks = list(slm.learned.values())
    Store.open(slm.store.path).commit(remove=[task.name for task in tasks])
    with serving(reopened(tmp_path / "store"), warm=False) as (client, served):
        until(lambda: served.engine.warm.is_set() and listens(client))
        status, found, _ = client.call("GET", "/ready")
        assert (status, found["status"], found["tasks"]) == (503, "no task is learned yet", 0)
        assert client.call("POST", "/v1/classify", {"input": TEXTS})[0] == 503
        Store.open(slm.store.path).commit(add=tasks)
        served.watcher.reload()
        assert client.until_ready()["tasks"] == 2
        assert len(client.classify(TEXTS)) == len(TEXTS)


def test_a_server_is_not_ready_while_it_drains_and_refuses_what_is_new(tmp_path: Path) -> None:
    with serving(store_with(tmp_path / "store"), drain=60.0) as (client, served):
        served.draining = True
        status, found, headers = client.call("GET", "/ready")
        assert (status, found["status"], headers["connection"]) == (503, "draining", "close")
        assert client.get("/health") == {"status": "ok"}  # to restart it would cut off what was admitted
        status, found, _ = client.call("POST", "/v1/classify", {"input": TEXTS})
        assert (status, found["error"]["code"]) == (503, "shutting_down")


def test_a_server_whose_engine_has_failed_is_neither_ready_nor_healthy(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(run.Server, "on_tick", uvicorn.Server.on_tick)  # so that it does not end by itself
    with serving(store_with(tmp_path / "store")) as (client, served):
        break_engine(client, served, monkeypatch)
        status, found, _ = client.call("POST", "/v1/classify", {"input": TEXTS})
        assert (status, found["error"]["code"]) == (503, "shutting_down")
        assert client.call("GET", "/health")[:2] == (503, {"status": "failed"})
        status, found, _ = client.call("GET", "/ready")
        assert (status, found["status"]) == (503, "failed")
