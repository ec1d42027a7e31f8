"""Running a server: its socket, its signals, its log."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import signal
import socket
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from types import FrameType
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from slm_fast.collection import settled
from slm_fast.errors import InputError, WorkError, one_line
from slm_fast.options import PredictOptions
from slm_fast.server.app import Served, create_app, guarded
from slm_fast.server.engine import Engine
from slm_fast.server.generation import Generation, Watcher
from slm_fast.server.jobs import Refused
from slm_fast.server.limits import error_body
from slm_fast.server.metrics import Metrics
from slm_fast.server.options import ServeOptions
from slm_fast.server.rows import AUTO
from slm_fast.slm import ScalableLM
from slm_fast.store import Store

log = logging.getLogger("slm_fast.server")
HEADERS = 1 << 16
KEEP_ALIVE = 75  # seconds that a connection may be idle: longer than clients keep theirs open
LAST_CALL = 2.0  # seconds to begin a request when listening ends, and to stop sending a refused one


def bound(host: str, port: int) -> socket.socket:
    """A socket bound to this address, before anything slow is done.

    Raises:
        InputError: the address is invalid.
        WorkError: the address cannot be listened on.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"--port {port}: expected 0 to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        own = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise InputError(f"--host {host!r} --port {port}: {error}") from None
    try:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind(address)
    except (OSError, OverflowError) as error:
        own.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise WorkError(f"--host {host} --port {port}: cannot be listened on: {reason}") from None
    return own


def serve(served: Served, sock: socket.socket) -> None:
    """Serve until a signal ends it.

    SIGTERM and SIGINT let admitted requests finish; a second signal does not wait for them. SIGHUP checks the store
    now.
    """
    server = Server(served)
    host, port = sock.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    log.info("serving %d tasks on http://%s:%d", len(served.engine.generation.files), host, port)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # a connection is a file
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    before = signal.signal(signal.SIGHUP, lambda *_: served.watcher.reload())
    try:
        with settled():
            server.run(sockets=[sock])
    finally:
        signal.signal(signal.SIGHUP, before)
    if served.engine.failed is not None:
        raise WorkError(f"the engine failed: {one_line(served.engine.failed)}")


def made(
    slm: ScalableLM,
    options: PredictOptions,
    limits: ServeOptions,
    *,
    key: str | None = None,
    admin: str | None = None,
    source: Store | None = None,
    skip_damaged: bool = False,
) -> Served:
    """Put a server together, without starting any thread.

    Raises:
        InputError: the model has no store, or there is an admin key for a store at a URL, which is read-only.
    """
    store = slm.store or slm.source
    if store is None:
        raise InputError("model: expected one that was opened from a store")
    if admin is not None and slm.store is None:
        raise InputError(f"{store.where}: a store at a URL is only read; expected no admin key")
    model, metrics = slm.model, Metrics()
    generation = Generation.of(model.known, store.files)
    engine = Engine(model, generation, options, limits, metrics.note_batch)
    warn_of_auto(generation.files)

    def publish(new: Generation) -> None:
        warn_of_auto(new.files, engine.generation.files)
        engine.publish(new)

    watcher = Watcher(
        model,
        store,
        generation,
        publish,
        poll=limits.poll or store.poll,
        distances=options.measures,
        skip_damaged=skip_damaged,
    )
    metrics.watch(engine, watcher)
    return Served(engine, watcher, model.backbone.name, metrics, key, admin, source)


def warn_of_auto(tasks: Collection[str], before: Collection[str] = ()) -> None:
    """Warn if there is a task, new since `before`, whose name is reserved in requests."""
    if AUTO in tasks and AUTO not in before:
        about = "requests cannot name it, since model auto routes by the text; it is reached by routing only"
        log.warning("task %r: %s; to name it, learn it under another name", AUTO, about)


class Lingering:
    """A transport that on close only ends its own side, and lets the peer end the other (RFC 9112, section 9.6).

    With bytes unread the system would reset the connection, and the client might not get to read its answer.

    Args:
        seconds: that the peer then has to read the rest, before the connection is cut.
    """

    def __init__(self, transport: asyncio.Transport, seconds: float) -> None:
        self._transport, self._seconds, self.lingers = transport, seconds, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self.lingers or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing() or not self._transport.can_write_eof():
            return self._close()
        self.lingers = True
        self._transport.write_eof()
        self._transport.resume_reading()
        asyncio.get_running_loop().call_later(LAST_CALL, self._close)

    def _close(self) -> None:
        rest = self._transport.get_write_buffer_size()
        self._transport.close()  # once the rest is sent, which would never be if nobody reads
        if rest:
            asyncio.get_running_loop().call_later(self._seconds, self._transport.abort)


def patient(seconds: float, generation: Callable[[], str]) -> type[HttpToolsProtocol]:
    """HTTP protocol whose requests must begin, and their headers end, within `seconds` and `HEADERS` bytes.

    Args:
        generation: the current one, for answers to what is not HTTP.
    """

    class Patient(HttpToolsProtocol):
        _timer: asyncio.TimerHandle | None = None
        read = 0  # bytes of the headers, so far

        def _expect(self) -> None:
            self._forget()
            self.read = 0
            self._timer = self.loop.call_later(seconds, self.transport.abort)

        def _forget(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(cast(asyncio.Transport, Lingering(transport, seconds)))
            self._expect()

        def data_received(self, data: bytes) -> None:
            if cast(Lingering, self.transport).lingers:
                return
            super().data_received(data)
            self.read += len(data)
            if self._timer is not None and self.read > HEADERS:
                self.transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def on_message_begin(self) -> None:
            self._expect()
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._forget()
            super().on_headers_complete()

        def send_400_response(self, msg: str) -> None:
            body = json.dumps(error_body(Refused(400, msg))).encode()
            headers = {"content-type": "application/json", "content-length": len(body), "connection": "close"}
            headers["x-store-generation"] = generation()
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\n" + lines.encode() + b"\r\n" + body)
            self.transport.close()

        def shutdown(self) -> None:
            if self._timer is None or not self.read:  # else a request has begun, and will be refused
                super().shutdown()

    return Patient


class Server(uvicorn.Server):
    """uvicorn plus the engine's threads. It drains before it stops listening, so that load balancers notice."""

    def __init__(self, served: Served) -> None:
        limits = served.engine.serve
        config = uvicorn.Config(
            guarded(create_app(served), served),
            http=patient(limits.patience, lambda: served.engine.generation.number),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=int(limits.deadline) + 5,
        )
        super().__init__(config)
        self.served, self._drain, self._until = served, limits.drain, 0.0

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        self.served.engine.start()
        self.served.watcher.start()
        try:
            super().run(sockets)
        finally:
            self.served.watcher.close()
            self.served.engine.close()
            self.served.watcher.join()  # last: it may have waited for the engine to take a generation

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.served.draining:
            self.should_exit = self.force_exit = True
        self.served.draining = True

    async def on_tick(self, counter: int) -> bool:
        if self.served.draining and not self.should_exit:
            now = asyncio.get_running_loop().time()
            if not self._until:
                log.info("draining: what was admitted is answered first")
                self._until = now + self._drain
            self.should_exit = now >= self._until and self.served.engine.room.rows == 0
        if self.served.engine.failed is not None:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening. Clients connected by then are not cut off; their requests are refused."""
        self.served.draining = True
        loop = asyncio.get_running_loop()
        waiting = [one for sock in sockets or [] for one in connected(sock)]
        for server in self.servers:
            server.close()
        for one in waiting:
            await loop.connect_accepted_socket(self._protocol, one)
        until = loop.time() + LAST_CALL
        await asyncio.sleep(0.01)  # for sockets already accepted to become connections
        while not self.force_exit and loop.time() < until and any(map(silent, self.server_state.connections)):
            await asyncio.sleep(0.01)
        await super().shutdown(sockets)

    def _protocol(self) -> asyncio.Protocol:
        kind = cast(type[HttpToolsProtocol], self.config.http_protocol_class)
        return kind(self.config, self.server_state, self.lifespan.state)


def connected(listening: socket.socket) -> Iterator[socket.socket]:
    """Connections that the system has made but nobody has accepted: closing the socket would reset them."""
    with suppress(OSError):  # BlockingIOError when there are no more
        while True:
            yield listening.accept()[0]


def silent(connection: Any) -> bool:
    """Whether no request has been sent on a connection yet."""
    return connection.cycle is None and not connection.read


def log_to(stream: Any, level: int = logging.INFO) -> None:
    """Log to `stream`, one line per event."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("slm_fast.server", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level if name == "slm_fast.server" else logging.WARNING)
