"""Servers of tiny random models over real sockets: in a thread of this process, or in a forked process."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from models import knows, make_model, make_slm, make_tokenizer, random_task, two_tasks

from slm_fast import ScalableLM, cli
from slm_fast.options import PredictOptions
from slm_fast.server import run
from slm_fast.server.app import Served
from slm_fast.server.options import ServeOptions

LIMITS: dict[str, Any] = {"poll": 0.02, "drain": 0.0, "max_new_tokens": 24, "deadline": 30.0}


def store_with(path: Path, name: str = "bert", **config: Any) -> ScalableLM:
    """Save a store of two random tasks, and beside it its backbone, so that other processes can serve it."""
    backbone = path.parent / "backbone"
    make_model(name).save_pretrained(backbone)
    make_tokenizer(name).save_pretrained(backbone)
    slm = make_slm(name, **config)
    if slm.model.backbone.kind == "encoder":
        knows(slm, *two_tasks(slm))
    else:  # one task that generates labels, one that generates free text
        knows(slm, random_task(slm, "farm", labels=("no", "yes")), random_task(slm, "sea", labels=None))
    slm.save_pretrained(path)
    return slm


def until(true: Callable[[], Any], seconds: float = 30) -> None:
    """Wait until a condition holds; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


class Client:
    """An HTTP client that opens a new connection for each call."""

    def __init__(self, port: int, key: str | None = None) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self.headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, {**self.headers, **headers})
            response = connection.getresponse()
            text = response.read()
            is_json = response.headers.get_content_type() == "application/json"
            names = {name.lower(): value for name, value in response.getheaders()}
            return response.status, json.loads(text) if is_json else text.decode(), names
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        status, found, _ = self.call("GET", path)
        assert status == 200, found
        return found

    def post(self, path: str, body: Any) -> Any:
        status, found, _ = self.call("POST", path, body)
        assert status == 200, found
        return found

    def classify(self, texts: Sequence[Any], **more: Any) -> list[dict[str, Any]]:
        return self.post("/v1/classify", {"input": list(texts), **more})["data"]

    def until_ready(self, seconds: float = 60) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while True:
            try:
                status, found, _ = self.call("GET", "/ready")
                if status == 200 or time.monotonic() > until:
                    return found
            except OSError:
                assert time.monotonic() < until
            time.sleep(0.01)

    def raw(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def begun(self, path: str, size: int) -> socket.socket:
        """A connection on which only the headers of a request were sent."""
        raw = self.raw()
        headers = [f"{name}: {value}" for name, value in self.headers.items()]
        lines = [f"POST {path} HTTP/1.1", "host: a", *headers, f"content-length: {size}", "connection: close", "", ""]
        raw.sendall("\r\n".join(lines).encode())
        return raw

    def sent(self, path: str, body: Any) -> socket.socket:
        """A connection on which a whole request was sent; its response is not read yet."""
        data = json.dumps(body).encode()
        raw = self.begun(path, len(data))
        raw.sendall(data)
        return raw


@contextmanager
def serving(
    slm: ScalableLM, *, key: str | None = None, options: PredictOptions | None = None, warm: bool = True, **limits: Any
) -> Iterator[tuple[Client, Served]]:
    """Run a server in a thread of this process; yields a client and the server's `Served`."""
    admin, source = limits.pop("admin", None), limits.pop("source", None)
    chosen = ServeOptions(**{**LIMITS, **limits})
    served = run.made(slm, options or PredictOptions(), chosen, key=key, admin=admin, source=source)
    sock = run.bound("127.0.0.1", 0)
    server = run.Server(served)
    torch.set_num_threads(1)
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    client = Client(sock.getsockname()[1], key)
    try:
        if warm:
            client.until_ready()
        yield client, served
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


class Process:
    """`slm-fast serve` in a process forked from this one, or a fresh one; its output goes to a log file."""

    def __init__(self, store: Path, *arguments: object, seconds: int = 120, fresh: bool = False) -> None:
        probe = socket.create_server(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        self.log = store.parent / f"log{port}"
        backbone = ("--backbone", store.parent / "backbone", "--dtype", "float32", "--threads", 1)
        self.argv = ["serve", store, "--port", port, "--poll", 0.02, *backbone, *arguments]
        words = [str(word) for word in self.argv]
        self.pid = os.fork()
        if self.pid == 0:
            signal.alarm(seconds)
            log = os.open(self.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            import sys

            if fresh:
                os.execv(sys.executable, [sys.executable, "-m", "slm_fast.cli", *words])
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            status = 70
            try:
                status = cli.main(words)
            finally:
                sys.stderr.flush()
                os._exit(status)
        self.client = Client(port)

    def kill(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait for the process: its exit status, or minus the number of the signal that killed it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def said(self) -> str:
        return self.log.read_text()
