"""/metrics describes the moment of the scrape: what waits, what runs, and the tasks of both."""

from __future__ import annotations

import re
import socket
import threading
from pathlib import Path

from models import mixed_texts, random_task
from served import Client, serving, store_with, until

from slm_fast.scheduler import Scheduler
from slm_fast.server import engine as engine_module
from slm_fast.store import Store


def figure(client: Client, name: str) -> float:
    (found,) = re.findall(rf"^{re.escape(name)} (\S+)$", client.get("/metrics"), re.MULTILINE)
    return float(found)


def adapters(client: Client) -> dict[str, str]:
    """The labels of vllm:lora_requests_info, of which there is one series."""
    (labels,) = re.findall(r"^vllm:lora_requests_info\{(.*)\} \S+$", client.get("/metrics"), re.MULTILINE)
    return dict(re.findall(r'(\w+)="([^"]*)"', labels))


def all_answered(raws: list[socket.socket]) -> None:
    for raw in raws:
        with raw:
            assert raw.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_the_number_of_tasks_is_that_after_a_reload(tmp_path: Path) -> None:
    slm = store_with(tmp_path / "store")
    with serving(slm) as (client, served):
        nothing = {"running_lora_adapters": "", "waiting_lora_adapters": ""}
        assert adapters(client) == {"max_lora": "2", **nothing}
        Store.open(tmp_path / "store").commit(add=[random_task(slm, "sky")])
        until(lambda: len(served.engine.generation.files) == 3)
        assert adapters(client) == {"max_lora": "3", **nothing}
        assert figure(client, "slm_fast_tasks") == 3


def test_rows_of_the_batch_that_runs_do_not_count_as_waiting(tmp_path: Path, monkeypatch) -> None:
    began, goes_on = threading.Event(), threading.Event()
    answer_batch = engine_module.answer_batch

    def held(*given):
        began.set()
        assert goes_on.wait(60)
        return answer_batch(*given)

    with serving(store_with(tmp_path / "store")) as (client, served):
        monkeypatch.setattr(engine_module, "answer_batch", held)
        try:
            raws = [client.sent("/v1/classify", {"input": mixed_texts(2), "model": "sea"})]
            assert began.wait(60)
            raws.append(client.sent("/v1/classify", {"input": mixed_texts(3), "model": "farm"}))
            raws.append(client.sent("/v1/classify", {"input": mixed_texts(4)}))
            until(lambda: served.engine.room.rows == 9)
            assert figure(client, "vllm:num_requests_running") == figure(client, "slm_fast_running_rows") == 2
            assert figure(client, "vllm:num_requests_waiting") == 7
            assert figure(client, "slm_fast_queue_rows") == 9
            about = {"max_lora": "2", "running_lora_adapters": "sea", "waiting_lora_adapters": "farm"}
            assert adapters(client) == about
        finally:
            goes_on.set()
        all_answered(raws)
        assert figure(client, "vllm:num_requests_running") == figure(client, "vllm:num_requests_waiting") == 0
        assert adapters(client)["running_lora_adapters"] == ""


def test_texts_that_are_being_written_run_with_the_tasks_of_their_routes(tmp_path: Path, monkeypatch) -> None:
    began, goes_on, step = threading.Event(), threading.Event(), Scheduler.step

    def held(scheduler: Scheduler):
        found = step(scheduler)
        began.set()
        assert goes_on.wait(60)
        return found

    slm = store_with(tmp_path / "store", "llama")
    text = "sea1 sea2 sea3"
    (expected,) = slm.predict([text], max_new_tokens=1)
    with serving(slm, batch_rows=1) as (client, served):
        monkeypatch.setattr(Scheduler, "step", held)
        try:
            raws = [client.sent("/v1/completions", {"prompt": text, "max_tokens": 9})]
            assert began.wait(60)
            raws.append(client.sent("/v1/completions", {"prompt": text, "max_tokens": 9, "model": "farm"}))
            until(lambda: served.engine.room.rows == 2)
            assert figure(client, "vllm:num_requests_running") == figure(client, "vllm:num_requests_waiting") == 1
            running = ",".join(sorted(set(expected.route.tasks)))
            about = {"max_lora": "2", "running_lora_adapters": running, "waiting_lora_adapters": "farm"}
            assert adapters(client) == about
        finally:
            goes_on.set()
        all_answered(raws)
