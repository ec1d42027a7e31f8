"""`slm-fast serve` as a process: signals, a port in use, keys, and messages on standard error."""

from __future__ import annotations

import http.client
import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from command import one_line, slm_fast
from models import mixed_texts, random_task
from served import Process, store_with, until

from slm_fast import ScalableLM
from slm_fast.errors import InputError
from slm_fast.scheduler import Scheduler
from slm_fast.server import run
from slm_fast.server.options import ServeOptions
from slm_fast.store import Store

EXAMPLES = Path(__file__).parents[2] / "examples" / "serving"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("process") / "store"
    store_with(path)
    return path


def test_the_store_is_opened_without_threads_that_the_engine_would_wait_for(store: Path, monkeypatch) -> None:
    found, plain = list[int](), ScalableLM.from_pretrained

    def opened(*given, **more):
        found.append(torch.get_num_threads())
        return plain(*given, **more)

    def stop(*_, **__):
        raise InputError(f"threads: {torch.get_num_threads()}")

    monkeypatch.setattr(ScalableLM, "from_pretrained", opened)
    monkeypatch.setattr(run, "made", stop)
    before = torch.get_num_threads()
    try:
        done = slm_fast("serve", store, "--port", 0, "--threads", 3, "--backbone", store.parent / "backbone")
    finally:
        torch.set_num_threads(before)
    assert done.stderr.splitlines()[-1] == "slm-fast: error: --threads: 3"
    assert found == [1]


def test_a_process_that_is_told_to_stop_answers_or_refuses_all_it_was_asked(store: Path, monkeypatch) -> None:
    monkeypatch.setenv("SLM_FAST_API_KEY", "secret")
    process = Process(store, "--drain", 0.2)
    process.client.until_ready()
    texts, statuses, cut = mixed_texts(16), list[int](), list[tuple[type, list[int]]]()
    headers = {"content-type": "application/json", "authorization": "Bearer secret"}
    body = json.dumps({"input": texts})

    def asked_until_closed(connection: http.client.HTTPConnection, own: list[int]) -> None:
        """Ask on one connection, again and again, until the server says that it closes it."""
        closes = False
        while not closes:
            connection.request("POST", "/v1/classify", body, headers)
            response = connection.getresponse()
            closes, found = response.headers["connection"] == "close", json.loads(response.read())
            own.append(response.status)
            statuses.append(response.status)
            if response.status == 200:
                assert len(found["data"]) == len(texts)
            else:
                assert (response.status, found["error"]["code"], closes) == (503, "shutting_down", True)

    def ask(_: int) -> None:
        while True:
            connection, own = http.client.HTTPConnection("127.0.0.1", process.client.port, timeout=60), list[int]()
            with closing(connection):
                try:
                    connection.connect()
                except ConnectionRefusedError:
                    return
                try:
                    asked_until_closed(connection, own)
                except OSError as error:
                    cut.append((type(error), own))
                    break
        with pytest.raises(ConnectionRefusedError):
            process.client.raw()

    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(ask, seed) for seed in range(8)]
        until(lambda: len(statuses) >= 20)
        process.kill(signal.SIGTERM)
        for one in done:
            one.result()
    assert process.wait() == 0, process.said()
    assert {200} <= set(statuses) <= {200, 503}
    # As the socket closes, the system resets connections that the server has not accepted, whose requests it never saw.
    assert all(kind in (ConnectionResetError, BrokenPipeError) and not own for kind, own in cut), cut
    lines = process.said().splitlines()
    assert "serving 2 tasks on http://127.0.0.1:" in lines[0]
    assert any("draining" in line for line in lines)
    assert "Traceback" not in process.said()


def test_a_process_that_is_told_to_stop_ends_the_texts_that_it_streams(tmp_path: Path, monkeypatch) -> None:
    slm = store_with(tmp_path / "store", "llama")
    texts, held = mixed_texts(8), tmp_path / "held"
    sampled = [{"temperature": 2.0, "seed": seed} for seed in range(len(texts))]
    expected = [
        slm.predict([text], max_new_tokens=60, sample=True, **drawn)[0]
        for text, drawn in zip(texts, sampled, strict=True)
    ]
    assert all(len((answer.text or "").split()) > 3 for answer in expected)
    step = Scheduler.step

    def slow(scheduler: Scheduler):
        """Waits until all texts are there, and again once each has begun; the process inherits it."""
        if held.exists() and scheduler.unfinished < len(texts):
            time.sleep(0.005)
            return {}
        found = step(scheduler)
        while held.exists() and all(generated.tokens for generated in scheduler.generated.values()):
            time.sleep(0.005)
        return found

    monkeypatch.setattr(Scheduler, "step", slow)
    process = Process(tmp_path / "store", "--drain", 0.2, "--max-new-tokens", 60)
    client, said = process.client, list[str]()
    client.until_ready()
    held.touch()
    streams = [
        client.sent("/v1/completions", {"prompt": text, "stream": True, **drawn}).makefile("rb")
        for text, drawn in zip(texts, sampled, strict=True)
    ]
    for stream in streams:
        said.append(next(line for line in map(bytes.decode, stream) if line.startswith("data: ")))
    process.kill(signal.SIGTERM)
    until(lambda: client.call("GET", "/ready")[0] == 503)
    status, refused, _ = client.call("POST", "/v1/completions", {"prompt": "sea1"})
    assert (status, refused["error"]["code"]) == (503, "shutting_down")
    held.unlink()
    for first, stream, answer in zip(said, streams, expected, strict=True):
        lines = [first, *map(bytes.decode, stream)]
        events = [line.removeprefix("data: ").strip() for line in lines if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        choices = [json.loads(event)["choices"][0] for event in events[:-1]]
        assert "".join(choice["text"] for choice in choices) == answer.text
        assert choices[-1]["finish_reason"] == answer.finish_reason
    assert process.wait() == 0, process.said()
    assert "Traceback" not in process.said()


def test_who_was_connected_when_listening_ended_is_refused_when_asking_and_not_waited_for_long(store: Path) -> None:
    process = Process(store, "--drain", 0)
    process.client.until_ready()
    early, begun, mute = (process.client.raw() for _ in range(3))
    begun.sendall(b"POST /v1/classify HTTP/1.1\r\nhost: a\r\n")
    process.kill(signal.SIGTERM)
    until(lambda: not listens(process.client.port))
    for raw, rest in ((early, "POST /v1/classify HTTP/1.1\r\nhost: a\r\n"), (begun, "")):
        raw.sendall(f"{rest}content-length: 2\r\n\r\n".encode())
        raw.sendall(b"{}")
        with raw, raw.makefile("rb") as answer:
            said = answer.read().decode()
        assert said.startswith("HTTP/1.1 503 ")
        assert "connection: close" in said
        assert "shutting_down" in said
    began = time.monotonic()
    assert process.wait() == 0, process.said()
    assert time.monotonic() - began < 10  # it did not wait for `patience`, 20 s
    with mute:
        assert mute.recv(1) == b""


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=60).close()
    except ConnectionRefusedError:
        return False
    return True


def test_a_hangup_makes_it_look_at_the_store_now(store: Path, tmp_path: Path) -> None:
    slm = store_with(tmp_path / "store")
    process = Process(tmp_path / "store", "--poll", 3600)
    before = process.client.until_ready()
    Store.open(tmp_path / "store").commit(add=[random_task(slm, "sky")])
    process.kill(signal.SIGHUP)
    until(lambda: process.client.get("/ready")["generation"] != before["generation"])
    assert process.client.get("/ready")["tasks"] == 3
    process.kill(signal.SIGTERM)
    assert process.wait() == 0, process.said()


def test_a_hangup_while_it_starts_does_not_end_it(store: Path, monkeypatch) -> None:
    found = []

    def bound(host: str, port: int) -> socket.socket:
        found.append(signal.getsignal(signal.SIGHUP))
        raise InputError("enough")

    monkeypatch.setattr("slm_fast.server.run.bound", bound)
    before = signal.getsignal(signal.SIGHUP)
    try:
        one_line(slm_fast("serve", store), 2, "enough")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert found == [signal.SIG_IGN]


def test_a_port_in_use_is_one_line(store: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        one_line(slm_fast("serve", store, "--port", taken.getsockname()[1]), 1, "--port", "in use")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--port", 70000), "--port 70000"),
        (("--host", "no.such.host.invalid"), "no.such.host.invalid"),
        (("--key-file", "missing"), "missing: cannot be read"),
        (("--inputs", 0), "error: --inputs: expected at least 1"),
        (("--queue-rows=0",), "error: --queue-rows: expected at least 1"),
        (("--deadline", 0), "error: --deadline: expected at least"),
        (("--tasks-from", "other"), "--admin-key-file"),
        (("--abstain", 2), "abstain"),
    ],
)
def test_a_call_that_cannot_be_right_is_one_line(store: Path, arguments: tuple[object, ...], said: str) -> None:
    one_line(slm_fast("serve", store, *arguments), 2, said)


def test_the_help_shows_the_default_of_each_limit() -> None:
    words = " ".join(slm_fast("serve", "--help").stdout.split())
    for field in fields(ServeOptions):
        said = words.rpartition(f"--{field.name.replace('_', '-')} N ")[2].partition(" --")[0]
        assert "(default: " in said, field.name
        assert field.default is None or f"(default: {field.default})" in said, field.name


def test_what_is_not_installed_is_named_with_what_to_do(store: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "slm_fast.server.run")
    monkeypatch.delattr("slm_fast.server.run")
    one_line(slm_fast("serve", store), 2, "uvicorn is missing", "slm-fast[serve]")


def test_no_store_is_one_line(tmp_path: Path) -> None:
    one_line(slm_fast("serve", tmp_path / "none"), 2, "not a store")


def test_keys_stand_in_files_or_in_the_environment(store: Path, tmp_path: Path, monkeypatch) -> None:
    empty = tmp_path / "key"
    empty.write_text("\n")
    one_line(slm_fast("serve", store, "--key-file", empty), 2, "expected a key in its first line")
    monkeypatch.setenv("SLM_FAST_API_KEY", " ")
    one_line(slm_fast("serve", store), 2, "$SLM_FAST_API_KEY: expected a key, got none")
    monkeypatch.setenv("SLM_FAST_API_KEY", "one\n")
    monkeypatch.setenv("SLM_FAST_ADMIN_KEY", "one")
    one_line(slm_fast("serve", store), 2, "$SLM_FAST_ADMIN_KEY: expected another key than $SLM_FAST_API_KEY")
    both = tmp_path / "both"
    both.write_text("one\n")
    said = f"--admin-key-file {both}: expected another key than"
    one_line(slm_fast("serve", store, "--admin-key-file", both), 2, f"{said} $SLM_FAST_API_KEY")
    given = ("--admin-key-file", both, "--key-file", both)
    one_line(slm_fast("serve", store, *given), 2, f"{said} --key-file {both}")


def test_the_examples_start_a_server_as_the_command_line_knows_it(tmp_path: Path) -> None:
    unit = (EXAMPLES / "slm-fast.service").read_text()
    (line,) = [line for line in unit.splitlines() if line.startswith("ExecStart=")]
    docker = (EXAMPLES / "Dockerfile").read_text()
    (entry,) = [line for line in docker.splitlines() if line.startswith("ENTRYPOINT ")]
    for words in (shlex.split(line)[1:], json.loads(entry.removeprefix("ENTRYPOINT "))[1:]):
        words = [str(tmp_path / "none") if word.endswith("store") else word for word in words]
        one_line(slm_fast(*words), 2, "not a store")  # the rest of the call is valid


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_systemd_finds_nothing_wrong_with_the_unit_but_that_it_is_not_installed_here() -> None:
    command = ["systemd-analyze", "verify", "--man=no", str(EXAMPLES / "slm-fast.service")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    wrong = [line for line in (done.stdout + done.stderr).splitlines() if "slm-fast" in line]
    assert all("/opt/slm-fast/bin/slm-fast" in line for line in wrong), wrong
