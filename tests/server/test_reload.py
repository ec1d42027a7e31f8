"""Hot reload: the server adopts another process's changes between batches; each answer names its generation."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from models import knows, learned, mixed_texts, random_task, reopened, sentence
from peft_adapters import texts as sentences
from peft_adapters import write_adapter
from served import Client, serving, store_with, until

from slm_fast import ScalableLM
from slm_fast.options import PredictOptions
from slm_fast.server import generation, run
from slm_fast.server.app import Served
from slm_fast.server.generation import generation_number
from slm_fast.server.options import ServeOptions
from slm_fast.store import Store
from slm_fast.tasks import LearnedTask

SECONDS = 60.0 if os.environ.get("SLM_FAST_FUZZ") else 4.0


def served_files(served: Served) -> dict[str, str]:
    return dict(served.engine.generation.files)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_adapters_imported_elsewhere_are_served_as_predict_has_them(name: str, tmp_path: Path) -> None:
    write_adapter(tmp_path / "lora", name, r=9, labels=3 if name == "bert" else None)
    slm = store_with(tmp_path / "store", name)
    with serving(slm) as (client, served):
        first = served.engine.generation.number
        elsewhere = reopened(tmp_path / "store", name)
        elsewhere.import_adapter(tmp_path / "lora", "sky", sentences("sky"))
        until(lambda: served.engine.generation.number != first)
        texts = [*sentences("sky", 5, seed=2), *mixed_texts(6)]
        expected = elsewhere.predict(texts, max_new_tokens=24)
        assert {answer.task for answer in expected} > {"sky"}
        for row, answer in zip(client.classify(texts), expected, strict=True):
            assert (row["task"], row["label"], row["text"]) == (answer.task, answer.label, answer.text)


@pytest.mark.parametrize("streams", [False, True])
def test_stop_texts_hold_beside_an_imported_adapter(streams: bool, tmp_path: Path) -> None:
    write_adapter(tmp_path / "lora", "llama", r=9)
    slm = store_with(tmp_path / "store", "llama")
    slm.import_adapter(tmp_path / "lora", "sky", sentences("sky"))
    texts = [*sentences("sky", 5, seed=2), *mixed_texts(6)]
    answers = slm.predict(texts, max_new_tokens=12)
    whole = {answer.task: (text, answer.text) for text, answer in zip(texts, answers, strict=True)}
    assert whole.keys() >= {"sky", "farm"}
    with serving(slm) as (client, _):
        for text, answer in whole.values():
            stop = answer.split()[1]
            body = {"prompt": text, "max_tokens": 12, "stop": stop, "stream": streams}
            found = client.post("/v1/completions", body)
            lines = [line[6:] for line in found.split("\n\n")[:-2]] if streams else [json.dumps(found)]
            parts = [json.loads(line)["choices"][0] for line in lines]
            assert "".join(part["text"] for part in parts) == answer.partition(stop)[0].strip()
            assert parts[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize("imported", [False, True])
def test_a_text_that_a_stop_text_cuts_to_a_label_is_that_label(imported: bool, tmp_path: Path) -> None:
    write_adapter(tmp_path / "lora", "llama", r=9)
    slm = store_with(tmp_path / "store", "llama")
    texts = mixed_texts(12)
    words = [(answer.text or "").split() for answer in slm.predict(texts, task="farm", max_new_tokens=12)]
    text, (label, stop, *_) = next(each for each in zip(texts, words, strict=True) if len(set(each[1][:2])) == 2)
    slm.forget("farm")
    slm.add(random_task(slm, "farm", labels=(label, f"{label}{label}")))
    if imported:
        slm.import_adapter(tmp_path / "lora", "sky", sentences("sky"))
    with serving(slm) as (client, _):
        body = {"prompt": text, "model": "farm", "max_tokens": 12, "stop": [stop]}
        (found,) = client.post("/v1/completions", body)["choices"]
    assert (found["text"], found["label"], found["finish_reason"]) == (label, label, "stop")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_tasks_learned_forgotten_and_replaced_elsewhere_are_served(store: Path) -> None:
    slm = store_with(store)
    other = random_task(slm, "sky", labels=("blue", "grey"))
    with serving(slm) as (client, served):
        first = client.until_ready()["generation"]
        Store.open(store).commit(add=[other])
        until(lambda: served.engine.generation.number != first)
        expected = knows(slm, *(learned(slm, name) for name in ("farm", "sea")), other)
        texts = ["sky1 sky2 sky3", *mixed_texts(6)]
        _, body, headers = client.call("POST", "/v1/classify", {"input": texts})
        for row, answer in zip(body["data"], expected.predict(texts), strict=True):
            assert (row["task"], row["label"]) == (answer.task, answer.label)
            assert row["score"] == pytest.approx(answer.score, abs=2e-4)
        files = Store.open(store).files
        assert served_files(served) == files
        assert headers["x-store-generation"] == generation_number(files) == client.get("/ready")["generation"]
        Store.open(store).commit(remove=["sky"])
        until(lambda: served.engine.generation.number == first)  # equal stores have the same generation
        Store.open(store).commit(remove=["sea"])
        Store.open(store).commit(add=[replace(other, name="sea")])
        until(lambda: served_files(served) == Store.open(store).files)
        (row,) = client.classify(["sky1 sky2 sky3"], model="sea")
        assert row["label"] in ("blue", "grey")
        assert row["task_sha256"] == Store.open(store).files["sea"]
        assert client.call("POST", "/v1/classify", {"input": "a", "model": "sky"})[0] == 404


def test_the_thread_that_makes_a_generation_ends_with_it(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so do its OpenMP threads, which would slow down the engine's."""
    slm, plain, threads = store_with(store), generation.prepare, list[threading.Thread]()
    with serving(slm) as (_, served):
        first = served.engine.generation.number
        note = lambda *given, **more: threads.append(threading.current_thread()) or plain(*given, **more)  # noqa: E731
        monkeypatch.setattr(generation, "prepare", note)
        Store.open(store).commit(add=[random_task(slm, "sky")])
        until(lambda: served.engine.generation.number != first)
        [thread] = threads
        until(lambda: not thread.is_alive())


def test_a_text_that_is_being_written_keeps_its_generation(store: Path) -> None:
    slm = store_with(store, "llama")
    prompt, seed = "sea1 sea2 sea3", 4
    with serving(slm, max_new_tokens=100) as (client, served):
        drawn = {"temperature": 2.0, "seed": seed}
        (expected,) = slm.predict([prompt], task="sea", max_new_tokens=100, sample=True, **drawn)
        before = served.engine.generation
        body = {"prompt": prompt, "model": "sea", "max_tokens": 100, "stream": True, **drawn}
        with served.engine.model.lock:  # no text is generated before the store has changed
            raw = client.sent("/v1/completions", body)
            until(lambda: served.engine.room.rows == 1)
            Store.open(store).commit(remove=["sea"])
            until(lambda: served.engine.generation is not before)
        assert client.call("POST", "/v1/completions", {"prompt": prompt, "model": "sea"})[0] == 404
        (other,) = client.post("/v1/completions", {"prompt": prompt, "max_tokens": 3})["choices"]
        assert other["task"] == "farm"
        said = b""
        while part := raw.recv(65536):
            said += part
        assert f"x-store-generation: {before.number}".encode() in said
        events = [json.loads(line[6:]) for line in said.decode().splitlines() if line.startswith("data: {")]
        assert "".join(event["choices"][0]["text"] for event in events) == expected.text
        assert events[-1]["choices"][0]["task_sha256"] == before.files["sea"]
        until(lambda: served.engine._writers.rows == 0)


def test_the_buffers_of_texts_stay_while_idle_and_go_with_the_generation(store: Path) -> None:
    slm = store_with(store, "llama")
    with serving(slm) as (client, served):
        schedulers = served.engine._writers._schedulers
        (one,) = schedulers.values()  # of the warm-up
        first = served.engine.generation
        client.post("/v1/completions", {"prompt": "sea1 sea2", "max_tokens": 5})
        assert list(schedulers.items()) == [(first, one)]
        reopened(store, "llama").forget("farm")
        until(lambda: served.engine.generation is not first)
        until(lambda: not schedulers)
        answer = client.post("/v1/completions", {"prompt": "sea1 sea2", "max_tokens": 5})["choices"][0]
        assert answer["task"] == "sea"
        assert list(schedulers) == [served.engine.generation]


def test_a_task_named_auto_is_reached_by_routing_only_and_warned_of_once(store: Path, caplog) -> None:
    slm, said = store_with(store, "llama"), "task 'auto': requests cannot name it"
    with serving(slm) as (client, served):
        assert said not in caplog.text
        Store.open(store).commit(add=[random_task(slm, "auto", topic="sky", labels=None)])
        until(lambda: "auto" in served_files(served))
        Store.open(store).commit(remove=["farm"])
        until(lambda: "farm" not in served_files(served))
        assert caplog.text.count(said) == 1
        assert [model["id"] for model in client.get("/v1/models")["data"]] == ["auto", "base", "sea"]
        rows = client.classify(["sky1 sky2 sky3", "sea1 sea2 sea3"], model="auto")
        assert [row["task"] for row in rows] == ["auto", "sea"]
    caplog.clear()
    run.made(reopened(store, "llama"), PredictOptions(), ServeOptions())
    assert caplog.text.count(said) == 1


def damage_manifest(store: Path) -> None:
    (store / "manifest.json").write_text("{")


def damage_task(store: Path) -> None:
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["tasks"]["farm"] = {"file": f"tasks/farm/{'0' * 64}.safetensors", "sha256": "0" * 64}
    (store / "manifest.json").write_text(json.dumps(manifest))


def change_model(store: Path) -> None:
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["model"]["fingerprint"] = "another"
    (store / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("harm", [shutil.rmtree, damage_manifest, damage_task, change_model])
def test_a_store_that_vanishes_or_is_damaged_leaves_the_last_good_generation(harm, store: Path, caplog) -> None:
    slm = store_with(store)
    with serving(slm) as (client, served):
        before = client.until_ready()
        shutil.copytree(store, store.parent / "kept")
        harm(store)
        until(lambda: served.watcher.trouble is not None)
        status, now, _ = client.call("GET", "/ready")
        assert (status, now["status"], now["generation"]) == (200, "ready", before["generation"])
        assert str(store) in now["store"] or "manifest" in now["store"]
        said = f"{now['store']}; still serving generation {before['generation']}"
        assert caplog.messages.count(said) == 1, caplog.messages
        assert {row["task"] for row in client.classify(mixed_texts(9))} == {"farm", "sea"}
        shutil.rmtree(store, ignore_errors=True)
        shutil.copytree(store.parent / "kept", store)
        served.watcher.reload()
        until(lambda: served.watcher.trouble is None)
        assert client.get("/ready") == before


def test_the_server_ends_after_a_reload_that_is_under_way(store: Path, monkeypatch) -> None:
    began = threading.Event()

    def slow(*_: object, **__: object) -> None:
        began.set()
        time.sleep(1.0)

    with serving(store_with(store)) as (client, served):
        client.until_ready()
        monkeypatch.setattr("slm_fast.server.generation.prepare", slow)
        Store.open(store).commit(remove=["sea"])
        served.watcher.reload()
        assert began.wait(30.0)
    assert "watch" not in [thread.name for thread in threading.enumerate()]


def test_a_server_that_is_told_to_stop_changes_no_task_and_waits_for_no_change(store: Path) -> None:
    slm = store_with(store)
    with serving(slm, admin="admin") as (client, served):
        admin, before = Client(client.port, "admin"), Store.open(store).files
        served.draining = True
        for method, path, body in (("DELETE", "/v1/tasks/sea", None), ("POST", "/v1/tasks", {"name": "sea"})):
            status, found, _ = admin.call(method, path, body)
            assert (status, found["error"]["code"]) == (503, "shutting_down")
        assert Store.open(store).files == before
        asked: list[bool] = []
        assert not served.watcher.wait_for("sky", "ab" * 32, 60.0, lambda: not asked.append(True))
        assert asked == [True]


def test_tasks_are_taken_in_and_forgotten_over_http(store: Path) -> None:
    slm = store_with(store)
    source = Store(store.parent / "source", slm.store.about, {})
    source.commit(add=[random_task(slm, "sky"), random_task(slm, "auto")])
    with serving(slm, admin="admin", source=source) as (client, served):
        admin = Client(client.port, "admin")
        status, found, _ = admin.call("POST", "/v1/tasks", {"name": "sky"})
        assert (status, found["task_sha256"]) == (201, source.files["sky"])
        assert found["generation"] == served.engine.generation.number
        assert client.classify(["sky1 sky2"])[0]["task"] == "sky"
        assert admin.call("POST", "/v1/tasks", {"name": "sky"})[0] == 201  # already up to date
        assert admin.call("DELETE", "/v1/tasks/sky")[0] == 200
        assert "sky" not in Store.open(store).files
        assert client.classify(["sky1 sky2"])[0]["task"] != "sky"
        assert admin.call("DELETE", "/v1/tasks/sky")[0] == 404
        for name in ("../source", "a/b", "..", "", "x" * 65, ".hidden", "a\x00b", "tasks/../../etc"):
            assert admin.call("POST", "/v1/tasks", {"name": name})[0] == 400, name
        for name in ("..%2f..%2fsource", "%2e%2e", "a%00"):
            assert admin.call("DELETE", f"/v1/tasks/{name}")[0] in (400, 404, 405), name
        assert admin.call("POST", "/v1/tasks", {"name": "land"})[0] == 404
        status, found, _ = admin.call("POST", "/v1/tasks", {"name": "auto"})
        assert (status, found["error"]["param"]) == (400, "name")
        assert found["error"]["message"].startswith("name 'auto': reserved")
        assert sorted(Store.open(store).files) == ["farm", "sea"]


def changes(store: Path, tasks: list[LearnedTask], known: dict[str, dict[str, str]], stop: threading.Event) -> None:
    """Add and remove random tasks until `stop` is set. known: gets the files of each generation, by its number."""
    rng = random.Random(1)
    while not stop.wait(0.01):
        now = Store.open(store)
        task = rng.choice(tasks)
        after = dict(now.files)
        if task.name in now.files:
            del after[task.name]
            known[generation_number(after)] = after
            now.commit(remove=[task.name])
        else:
            now.commit(add=[task])
            known[generation_number(now.files)] = dict(now.files)


def test_clients_beside_a_writer_are_answered_by_one_generation_each(store: Path) -> None:
    slm = store_with(store)
    tasks = [random_task(slm, name, rank=rank) for name, rank in (("sky", 2), ("city", 4), ("sun", 6))]
    known = {generation_number(slm.store.files): dict(slm.store.files)}
    stop, wrong, replies = threading.Event(), [], [0]

    def ask(seed: int, port: int) -> None:
        rng, client = random.Random(seed), Client(port)
        while not stop.is_set():
            texts = [sentence(rng.choice(("sea", "farm", "sky", "city")), rng) for _ in range(rng.randint(1, 8))]
            status, body, headers = client.call("POST", "/v1/classify", {"input": texts})
            replies[0] += 1
            if status != 200 or len(body["data"]) != len(texts):
                wrong.append(body)
                continue
            number = headers["x-store-generation"]
            for row in body["data"]:
                if number not in known:  # an added task is recorded after its commit
                    time.sleep(0.05)
                if known[number].get(row["task"]) != row["task_sha256"]:
                    wrong.append((number, row))

    with serving(slm) as (client, served), ThreadPoolExecutor(9) as pool:
        done = [pool.submit(ask, seed, client.port) for seed in range(8)]
        done.append(pool.submit(changes, store, tasks, known, stop))
        time.sleep(SECONDS)
        stop.set()
        for one in done:
            one.result()
        assert wrong == []
        assert served.watcher.trouble is None
        assert len(known) > 2
        assert replies[0] > 20
        texts, last, answers = mixed_texts(8), generation_number(Store.open(store).files), list[str]()

        def answered_by_the_last() -> bool:  # the one before it may look the same, and another come in between
            _, body, headers = client.call("POST", "/v1/classify", {"input": texts})
            answers[:] = [row["label"] for row in body["data"]]
            return headers["x-store-generation"] == last

        until(answered_by_the_last)
        fresh = ScalableLM(slm.model.backbone, slm.model.config)
        knows(fresh, *Store.open(store).load())
        assert answers == [answer.label for answer in fresh.predict(texts)]


def test_a_generations_number_follows_from_the_files_alone() -> None:
    files = {"a": "1", "b": "2"}
    assert generation_number(files) == generation_number({"b": "2", "a": "1"})
    numbers = {generation_number(other) for other in ({}, {"a": "1"}, {"a": "2"}, {"b": "1"}, {"a1": ""}, files)}
    assert len(numbers) == 6
