"""Plain ASGI middleware that every request passes before it is parsed; `guarded` in app.py stacks it."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from slm_fast.server.jobs import Refused
from slm_fast.server.options import ServeOptions

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN = ("/", "/health", "/ready")  # no key needed: they reveal nothing about the tasks
HELD = 256 << 20  # maximum bytes of all request bodies held at once
ADMITTED = "slm_fast.generation"  # scope key: the generation under which the request was admitted


def kind_of(status: int) -> str:
    """OpenAI's error type for a status."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    return kinds.get(status, "invalid_request_error" if status < 500 else "server_error")


def error_body(refused: Refused) -> dict[str, Any]:
    """An error in OpenAI's format."""
    kind = kind_of(refused.status)
    return {"error": {"message": refused.message, "type": kind, "param": refused.param, "code": refused.code}}


async def refuse(send: Send, refused: Refused, *, close: bool = False) -> None:
    body = json.dumps(error_body(refused)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refused.retry_after is not None:
        headers.append((b"retry-after", str(refused.retry_after).encode()))
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def header(scope: MutableMapping[str, Any], name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)


class Patience:
    """Ends responses that nobody reads: a client has `seconds` to read enough for the next part to fit the buffers."""

    def __init__(self, app: App, seconds: float) -> None:
        self.app, self.seconds = app, seconds

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        late = False

        def give_up() -> None:
            nonlocal late
            late = True
            task.cancel()

        async def patient(message: Message) -> None:
            timer = loop.call_later(self.seconds, give_up)
            try:
                await send(message)
            finally:
                timer.cancel()

        try:
            await self.app(scope, receive, patient)
        except asyncio.CancelledError:
            if not late:
                raise


class Key:
    """Requires an API key, as Authorization: Bearer KEY. /v1/tasks requires the `admin` key instead."""

    def __init__(self, app: App, key: str | None, admin: str | None) -> None:
        self.app = app
        self.key, self.admin = (None if one is None else _digest(one.encode()) for one in (key, admin))

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN:
            return await self.app(scope, receive, send)
        is_admin = scope["path"].rstrip("/").startswith("/v1/tasks")
        expected = self.admin if is_admin else self.key
        if is_admin and expected is None:
            return await refuse(send, Refused(404, "no such path: this server was started without an admin key"))
        if expected is not None:
            kind, _, given = (header(scope, b"authorization") or b"").partition(b" ")
            if kind.lower() != b"bearer" or not given:
                return await refuse(send, Refused(401, "no key: expected the header Authorization: Bearer KEY"))
            if not hmac.compare_digest(_digest(given.strip()), expected):
                return await refuse(send, Refused(401, "wrong key", code="invalid_api_key"))
        await self.app(scope, receive, send)


def _digest(text: bytes) -> bytes:
    """A hash of fixed length, so that comparing takes the same time for every key."""
    return hashlib.sha256(text).digest()


class Body:
    """Reads a request's body first, within the limits of size and time.

    Args:
        full: returns why no request can be taken now, if so. Called before a body is read.
    """

    def __init__(self, app: App, serve: ServeOptions, full: Callable[[], Refused | None]) -> None:
        self.app, self.serve, self.full = app, serve, full
        self.held = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "DELETE"):
            return await self.app(scope, receive, send)
        refused = self.full()
        if refused is not None:
            return await refuse(send, refused)
        held: list[int] = []
        try:
            try:
                body = await asyncio.wait_for(self._read(scope, receive, held), self.serve.patience)
            except Refused as error:
                return await refuse(send, error, close=True)
            except asyncio.TimeoutError:
                late = Refused(408, f"the body did not come in {self.serve.patience:g} s")
                return await refuse(send, late, close=True)
            if body is not None:  # None: the client has disconnected
                await self.app(scope, _replay(body, receive), send)
        finally:
            self.held -= sum(held)

    async def _read(self, scope: MutableMapping[str, Any], receive: Receive, held: list[int]) -> bytes | None:
        most = self.serve.body
        too_large = Refused(413, f"the body: expected at most {most:,} bytes")
        declared = header(scope, b"content-length") or b""
        if declared.isdigit() and int(declared) > most:
            raise too_large
        parts = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            parts.append(part)
            held.append(len(part))
            self.held += len(part)
            if sum(held) > most:
                raise too_large
            if self.held > HELD:
                raise Refused(429, "too many large requests at once", code="rate_limit_exceeded", retry_after=1)
            if not message.get("more_body", False):
                return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    told = False

    async def again() -> Message:
        nonlocal told
        if told:
            return await receive()  # returns when the client disconnects
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


class Concurrency:
    """Limits how many POST requests are served at once."""

    def __init__(self, app: App, most: int) -> None:
        self.app, self.most = app, most
        self.now = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        if self.now >= self.most:
            message = f"{self.most} requests are answered now, and no more at once; try again in 1 s"
            return await refuse(send, Refused(429, message, code="rate_limit_exceeded", retry_after=1))
        self.now += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.now -= 1


class Marks:
    """Adds the store's generation to each response, and closes connections while the server drains.

    Args:
        generation: the current one, for responses that say no other and belong to no admitted request.
        note: called with path, status and seconds of each request.
    """

    def __init__(
        self,
        app: App,
        generation: Callable[[], str],
        draining: Callable[[], bool],
        note: Callable[[str, int, float], None],
    ) -> None:
        self.app, self.generation, self.draining, self.note = app, generation, draining, note

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        loop = asyncio.get_running_loop()
        began, status = loop.time(), 499

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = list(message.get("headers", []))
                if all(name != b"x-store-generation" for name, _ in headers):
                    number = scope.get(ADMITTED) or self.generation()
                    headers.append((b"x-store-generation", number.encode()))
                if self.draining() and all(name != b"connection" for name, _ in headers):
                    headers.append((b"connection", b"close"))
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self.app(scope, receive, marked)
        finally:
            self.note(scope["path"], status, loop.time() - began)
