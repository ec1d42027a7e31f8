"""Adding and forgetting tasks over HTTP. Disabled unless the server is started with an admin key."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from starlette.responses import JSONResponse

from slm_fast.data import check_name
from slm_fast.errors import InputError, SlmError
from slm_fast.schema import check_same
from slm_fast.server.generation import Watcher
from slm_fast.server.jobs import Refused
from slm_fast.server.rows import AUTO
from slm_fast.server.schemas import ERRORS, AddTask
from slm_fast.store import Store

SECONDS = 120.0  # to wait until the server has taken over a change


def add(app: FastAPI, watcher: Watcher, source: Store | None, draining: Callable[[], bool]) -> None:
    path = watcher.store.path

    def changed(name: str, digest: str | None, status: int = 200) -> JSONResponse:
        if not watcher.wait_for(name, digest, SECONDS, draining):
            raise Refused(503, f"task {name!r}: the store has the change, the server not yet: {watcher.trouble}")
        number = watcher.current.number
        content = {"id": name, "task_sha256": digest, "generation": number}
        return JSONResponse(content, status, headers={"x-store-generation": number})

    def take(name: str) -> JSONResponse:
        if name == AUTO:
            message = f"name {name!r}: reserved, since model auto routes by the text; learn the task under another name"
            raise Refused(400, message, param="name")
        if source is None:
            raise Refused(404, "this server was started without --tasks-from")
        there = Store.open(source.path)
        if name not in there.files:
            raise Refused(404, f"task {name!r}: not in {source.path}", param="name")
        store = Store.open(path)
        check_same(there.about, store.about, str(there.path), str(path))
        if store.files.get(name) != there.files[name]:
            store.commit(add=[there.read(name, thorough=True)[0]])
        return changed(name, store.files[name], 201)

    def forget(name: str) -> JSONResponse:
        store = Store.open(path)
        if name not in store.files:
            raise Refused(404, f"task {name!r}: not learned")
        store.commit(remove=[name])
        return changed(name, None)

    async def run(work: Any, name: str) -> Any:
        try:
            check_name(name)
            return await asyncio.to_thread(work, name)
        except SlmError as error:
            raise Refused(400 if isinstance(error, InputError) else 503, str(error), param="name") from None

    @app.post("/v1/tasks", status_code=201, responses=ERRORS)
    async def add_task(body: AddTask) -> Any:
        """Add a task from the store given by --tasks-from."""
        return await run(take, body.name)

    @app.delete("/v1/tasks/{name}", responses=ERRORS)
    async def forget_task(name: str) -> Any:
        """Forget a task exactly."""
        return await run(forget, name)
