"""Requests waiting for the engine, in the server's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.requests import Request

from slm_fast.server.engine import Engine
from slm_fast.server.jobs import Ask, Job, Refused
from slm_fast.server.limits import ADMITTED


class Ticket:
    """A submitted job and its changes. Leaving before its end cancels it."""

    def __init__(self, engine: Engine, ask: Ask, request: Request) -> None:
        self._engine, self._request = engine, request
        self._loop, self._changed = asyncio.get_running_loop(), asyncio.Event()
        self._until = self._loop.time() + engine.serve.deadline
        self._gone: asyncio.Task[None] | None = None
        self.job: Job = engine.submit(ask, self._tell)
        request.scope[ADMITTED] = self.job.generation.number  # of its errors, too

    def _tell(self) -> None:
        with suppress(RuntimeError):  # the loop is closed and nobody waits
            self._loop.call_soon_threadsafe(self._changed.set)

    async def change(self) -> None:
        """Wait for the next change. Raises Refused at the deadline, or when the client disconnects."""
        if self._gone is None:
            self._gone = asyncio.create_task(_disconnected(self._request))
        changed: asyncio.Task[Any] = asyncio.create_task(self._changed.wait())
        try:
            left = max(0.0, self._until - self._loop.time())
            await asyncio.wait({changed, self._gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if changed.done():
                self._changed.clear()
            elif self._gone.done():
                raise Refused(499, "the client has gone")
            else:
                raise Refused(504, f"not answered in {self._engine.serve.deadline:g} s", code="deadline_exceeded")
        finally:
            changed.cancel()

    def leave(self) -> None:
        if self._gone is not None:
            self._gone.cancel()
        if not self.job.done:
            self._engine.cancel(self.job)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def waiting(engine: Engine, ask: Ask, request: Request) -> AsyncIterator[Ticket]:
    ticket = Ticket(engine, ask, request)
    try:
        yield ticket
    finally:
        ticket.leave()


async def finished(engine: Engine, ask: Ask, request: Request) -> Job:
    """Wait until all rows of a job have results. Raises Refused, also for a row whose result is an error."""
    async with waiting(engine, ask, request) as ticket:
        while not ticket.job.done:
            await ticket.change()
    for place, piece in enumerate(ticket.job.pieces):
        if isinstance(piece.result, Refused):
            raise piece.result
        if isinstance(piece.result, Exception):
            raise Refused(422, f"{ask.field} {place}: {piece.result}", param=ask.field)
    return ticket.job
