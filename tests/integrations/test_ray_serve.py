"""Ray Serve: replicas answer over HTTP as `slm-fast serve` does, with its limits, keys and reload."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from ray import serve

from slm_fast import InputError, ScalableLM
from slm_fast.remote_store import cache_of
from slm_fast.server.generation import generation_number
from slm_fast.server.options import ServeOptions
from slm_fast.server.ray_serve import application
from slm_fast.store import Store
from tests.models import one_thread  # noqa: F401
from tests.served import Client, until

KEY, BODY = "open-sesame", 5000


@pytest.fixture(scope="module")
def client(cluster: str, store: Path) -> Iterator[Client]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    limits = ServeOptions(poll=0.05, body=BODY, inputs=4)
    serve.run(application(store, limits=limits, replicas=2, key=KEY, dtype="float32"))
    yield Client(port, KEY)
    serve.shutdown()


def test_it_answers_as_the_model_does(client: Client, store: Path) -> None:
    texts = ["sea1 sea2", "farm3 farm4"]
    found = client.classify(texts)
    expected = ScalableLM.from_pretrained(store).predict(texts)
    assert [(row["task"], row["label"]) for row in found] == [(one.task, one.label) for one in expected]
    for row, one in zip(found, expected, strict=True):
        assert row["score"] == pytest.approx(one.score, abs=1e-5)
    assert client.get("/ready")["tasks"] == 2


def test_the_limits_and_the_key_are_those_of_the_server(client: Client) -> None:
    status, _, headers = client.call("POST", "/v1/classify", {"input": "sea1"}, authorization="Bearer wrong")
    assert status == 401
    assert headers["www-authenticate"] == "Bearer"
    assert client.call("POST", "/v1/classify", {"input": "sea1 " * BODY})[0] == 413
    status, found, _ = client.call("POST", "/v1/classify", {"input": ["sea1"] * 5})
    assert (status, found["error"]["param"]) == (413, "input")
    assert client.call("POST", "/v1/classify", b"{")[0] == 400


def test_all_replicas_hear_of_a_change_of_the_store(client: Client, store: Path) -> None:
    before = client.get("/ready")["generation"]
    ScalableLM.from_pretrained(store).forget("farm")

    def changed() -> bool:
        found = [client.call("POST", "/v1/classify", {"input": "farm1"}) for _ in range(8)]
        generations = {headers["x-store-generation"] for _, _, headers in found}
        return before not in generations and {body["data"][0]["task"] for _, body, _ in found} == {"sea"}

    until(changed)


def test_replicas_follow_a_store_at_a_url(client: Client, store: Path) -> None:
    Store.open(store).commit(add=[replace(Store.open(store).read("sea")[0], name="sun")])
    url = f"file://{store}"
    serve.run(application(url, limits=ServeOptions(poll=0.05), key=KEY, dtype="float32"))
    until(lambda: client.get("/ready")["tasks"] == 2)
    assert client.get("/ready")["generation"] == generation_number(Store.open(store).files)
    Store.open(store).commit(remove=["sun"])
    until(lambda: client.get("/ready")["tasks"] == 1)
    assert client.get("/ready")["generation"] == generation_number(Store.open(cache_of(url)).files)
    with pytest.raises(InputError, match=rf"^{url}/nothing: not a store"):
        application(f"{url}/nothing")


def test_a_store_that_is_not_there_is_told_of_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        application(tmp_path / "nowhere")
