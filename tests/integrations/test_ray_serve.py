"""Ray Serve: replicas answer over HTTP as `slm-fast serve` does, with the same limits, API key and reload."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import openai
import pytest
from ray import serve

from slm_fast import InputError, ScalableLM
from slm_fast.remote_store import cache_of
from slm_fast.server.generation import generation_number
from slm_fast.server.options import ServeOptions
from slm_fast.server.ray_serve import application
from slm_fast.store import Store
from tests.models import one_thread  # noqa: F401
from tests.served import Client, store_with, until

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


@pytest.fixture(scope="module")
def writer(client: Client, tmp_path_factory: pytest.TempPathFactory) -> ScalableLM:
    """The model of a store with a generative backbone, which `client` asks from now on."""
    path = tmp_path_factory.mktemp("writer") / "store"
    slm = store_with(path, "llama")
    limits = ServeOptions(max_new_tokens=100, requests=1, batch_rows=2)
    serve.run(application(path, limits=limits, key=KEY, backbone=str(path.parent / "backbone"), dtype="float32"))
    return slm


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


def test_a_text_is_streamed_and_the_limits_are_each_replicas(client: Client, writer: ScalableLM) -> None:
    (expected,) = writer.predict(["sea1 sea2"], max_new_tokens=11)
    with openai.OpenAI(base_url=f"{client.url}/v1", api_key=KEY, max_retries=0) as asking:
        parts = list(asking.completions.create(model="auto", prompt="sea1 sea2", max_tokens=11, stream=True))
    assert "".join(part.choices[0].text for part in parts) == expected.text
    assert len(parts) > 3
    assert parts[0].choices[0].task == parts[-1].choices[0].task == expected.task
    body = {"prompt": ["sea1 sea2"] * 8, "max_tokens": 100, "temperature": 1.5, "seed": 1}
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda _: client.call("POST", "/v1/completions", body), range(12)))
    assert {status for status, _, _ in found} == {200, 429}
    for status, refused, headers in found:
        if status == 429:  # the estimate depends on how fast this machine is
            assert 1 <= int(headers["retry-after"]) <= 60
            assert refused["error"]["message"].endswith(f"try again in {headers['retry-after']} s")
    [text] = {json.dumps([one["text"] for one in body["choices"]]) for status, body, _ in found if status == 200}
    assert json.loads(text) != [expected.text] * 8


def test_a_client_that_goes_frees_its_place_behind_the_proxy(client: Client, writer: ScalableLM) -> None:
    def figures() -> dict[str, str]:
        lines = client.call("GET", "/metrics")[1].splitlines()
        return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))

    before = figures()
    body = {"prompt": ["sea1 sea2"] * 32, "max_tokens": 100, "temperature": 1.5, "seed": 1, "stream": True}
    with client.sent("/v1/completions", body) as raw:
        assert raw.recv(1)
    until(lambda: float(figures()["slm_fast_queue_rows"]) == 0)
    written = "slm_fast_generation_tokens_total"
    assert figures()[written] == before[written]  # tokens are counted when a text is finished: none was
    assert client.post("/v1/completions", {"prompt": "sea1", "max_tokens": 3})["choices"]


def test_a_store_that_is_not_there_is_told_of_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        application(tmp_path / "nowhere")
