"""A server of a store at a URL polls it while serving, and keeps its last good generation if the URL fails."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
from models import mixed_texts, random_task, reopened
from served import serving, store_with, until
from shelf import URL, asked, whenever
from stores import tree

from slm_fast import InputError, ScalableLM
from slm_fast.options import PredictOptions
from slm_fast.server import run
from slm_fast.server.generation import generation_number
from slm_fast.server.options import ServeOptions
from slm_fast.store import Store


@pytest.fixture
def slm(shelf: Path) -> ScalableLM:
    """A model that writes to the store at `URL`."""
    return store_with(shelf)


def test_what_is_committed_at_the_url_is_served(slm: ScalableLM, shelf: Path, cache: Path) -> None:
    with serving(reopened(URL)) as (client, served):
        first = client.until_ready()
        assert first["generation"] == generation_number(slm.store.files)
        slm.forget("farm")
        slm.add(random_task(slm, "sky", labels=("blue", "grey")))
        until(lambda: served.engine.generation.files == slm.store.files)
        texts = ["sky1 sky2 sky3", *mixed_texts(6)]
        for row, answer in zip(client.classify(texts), slm.predict(texts), strict=True):
            assert (row["task"], row["label"]) == (answer.task, answer.label)
            assert row["task_sha256"] == slm.store.files[answer.task]
        assert client.get("/ready")["generation"] == generation_number(slm.store.files)
        assert tree(cache) == tree(shelf)
        files = [path for path in asked() if path != "manifest.json"]
        assert len(files) == len(set(files)) == 3  # each fetched once, despite frequent polls


def test_requests_are_answered_while_it_is_brought(slm: ScalableLM) -> None:
    with serving(reopened(URL)) as (client, served):
        first = client.until_ready()
        asks, goes_on = threading.Event(), threading.Event()

        def slow(path: str) -> None:
            if "tasks/sky" in path:
                asks.set()
                assert goes_on.wait(30)

        whenever(slow)
        slm.add(random_task(slm, "sky"))
        try:
            assert asks.wait(30)
            assert {row["task"] for row in client.classify(mixed_texts(9))} == {"farm", "sea"}
            assert client.get("/ready") == first
        finally:
            goes_on.set()
        until(lambda: served.engine.generation.files == slm.store.files)
        assert client.classify(["sky1 sky2 sky3"])[0]["task"] == "sky"


def gone(shelf: Path) -> None:
    shutil.rmtree(shelf)


def denied(shelf: Path) -> None:
    def refuse(path: str) -> None:
        raise PermissionError("Access Denied")

    whenever(refuse)


def damaged(shelf: Path) -> None:
    slm = reopened(shelf)
    slm.add(random_task(slm, "sky"))
    slm.store.file("sky").write_bytes(b"")


def another(shelf: Path) -> None:
    about = {**Store.open(shelf).about, "fingerprint": "another"}
    shutil.rmtree(shelf)
    Store(shelf, about, {}).save([])


@pytest.mark.parametrize("harm", [gone, denied, damaged, another])
def test_a_source_that_vanishes_or_is_damaged_leaves_the_last_good_generation(
    harm, slm: ScalableLM, shelf: Path, caplog
) -> None:
    with serving(reopened(URL)) as (client, served):
        before = client.until_ready()
        shutil.copytree(shelf, shelf.parent / "kept")
        harm(shelf)
        until(lambda: served.watcher.trouble is not None)
        status, now, _ = client.call("GET", "/ready")
        assert (status, now["status"], now["generation"]) == (200, "ready", before["generation"])
        assert now["store"].startswith("shelf://store")
        assert f"{now['store']}; still serving generation {before['generation']}" in caplog.messages
        assert {row["task"] for row in client.classify(mixed_texts(9))} == {"farm", "sea"}
        whenever(lambda path: None)
        shutil.rmtree(shelf, ignore_errors=True)
        shutil.copytree(shelf.parent / "kept", shelf)
        served.watcher.reload()
        until(lambda: served.watcher.trouble is None)
        assert client.get("/ready") == before


def test_a_url_is_looked_at_less_often_than_a_folder_and_takes_no_admin(slm: ScalableLM) -> None:
    def poll(slm: ScalableLM, **limits: float) -> float:
        return run.made(slm, PredictOptions(), ServeOptions(**limits)).watcher._poll

    found = reopened(URL)
    assert (poll(slm), poll(found), poll(found, poll=0.3)) == (0.5, 5.0, 0.3)
    with pytest.raises(InputError, match=r"^shelf://store: a store at a URL is only read; expected no admin key"):
        run.made(found, PredictOptions(), ServeOptions(), admin="admin")
