"""The HTTP routes: FastAPI on top of the engine."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

import slm_fast
from slm_fast.errors import one_line
from slm_fast.server import admin, openai, rows, schemas
from slm_fast.server.engine import Engine
from slm_fast.server.generation import Watcher
from slm_fast.server.jobs import Ask, Refused, Routed, Writing, stopping
from slm_fast.server.limits import App, Body, Concurrency, Key, Marks, Patience, error_body
from slm_fast.server.metrics import Metrics
from slm_fast.server.waiting import finished
from slm_fast.store import Store

LONGEST = 100  # characters of a field's name in a message
# The page loads nothing from elsewhere; this makes browsers enforce it.
CSP = "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


@dataclass
class Served:
    """What the routes need. `source` is the store that POST /v1/tasks takes tasks from."""

    engine: Engine
    watcher: Watcher
    backbone: str
    metrics: Metrics = field(default_factory=Metrics)
    key: str | None = field(default=None, repr=False)
    admin: str | None = field(default=None, repr=False)
    source: Store | None = None
    draining: bool = False
    started: int = field(default_factory=lambda: int(time.time()))

    @property
    def ready(self) -> bool:
        return self.engine.warm.is_set() and not self.draining and self.engine.failed is None and self.engine.answers

    def state(self) -> dict[str, Any]:
        """The content of /ready."""
        words = "no task is learned yet" if self.engine.warm.is_set() else "not warm"
        words = "draining" if self.draining else "ready" if self.ready else words
        words = words if self.engine.failed is None else "failed"
        generation, trouble = self.engine.generation, self.watcher.trouble
        return {
            "status": words,
            "generation": generation.number,
            "tasks": len(generation.files),
            "store": trouble or "ok",
        }


class JSON(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        # Non-ASCII characters are written as such, except lone surrogates, which have no UTF-8 encoding.
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def stated(content: Mapping[str, Any], status: int = 200) -> JSON:
    """A response about a generation, which its header names as well: the current one may be another by now."""
    return JSON(content, status, headers={"x-store-generation": content["generation"]})


def create_app(served: Served) -> FastAPI:
    """Create the application: routes and error handlers, without the limits, which `guarded` adds."""
    app = FastAPI(title="slm_fast", version=slm_fast.__version__, docs_url=None, redoc_url=None)
    engine, serve = served.engine, served.engine.serve
    _add_errors(app)
    _add_state(app, served)
    openai.add(app, served.engine, served.backbone, served.metrics, served.started)
    if served.admin is not None:
        admin.add(app, served.watcher, served.source, lambda: served.draining)

    def ask(given: Any, field: str, model: str, labels: int | None, truncate: bool) -> Ask:
        task, bare = rows.model_of(model, served.backbone, engine.generation.files)
        writing = Writing(min(rows.NEW_TOKENS, serve.max_new_tokens)) if engine.writes else None
        parsed = rows.rows_of(given, serve.inputs, field)
        return Ask(parsed, "answer", task, bare, labels, writing, truncate, field=field)

    @app.post("/v1/classify", responses=schemas.ERRORS, response_model=schemas.Classification)
    async def classify(body: schemas.Classify, request: Request) -> Any:
        job = await finished(engine, ask(body.input, "input", body.model, body.labels, body.truncate), request)
        data = [
            rows.classified(place, answer, job.generation, body.labels)
            for place, answer in enumerate(rows.predictions(job))
        ]
        served.metrics.note_rows(job)
        shape = {"id": f"classify-{secrets.token_hex(12)}", "object": "list", "created": int(time.time())}
        shape |= {"model": body.model, "data": data, "usage": rows.usage(job)}
        return JSON(shape)

    @app.post("/predict", responses=schemas.ERRORS)
    async def predict(body: schemas.Predict, request: Request) -> Any:
        """Text Embeddings Inference's format: [{label, score}] for a text, [[{label, score}], ...] for a batch."""
        given: Any = body.inputs
        several = isinstance(given, list) and isinstance(given[0], list)
        texts = [given] if isinstance(given, str) else given if several else [given]
        if not isinstance(given, str) and any(len(text) != 1 for text in texts):
            raise Refused(
                400, "inputs: expected a text, or a batch [[text], [text]]; pairs are not understood", param="inputs"
            )
        parsed = [text if isinstance(text, str) else text[0] for text in texts]
        job = await finished(engine, ask(parsed, "inputs", rows.AUTO, None, bool(body.truncate)), request)
        scores = [rows.scored(answer) for answer in rows.predictions(job)]
        served.metrics.note_rows(job)
        return JSON(scores if several else scores[0])

    @app.post("/v1/route", responses=schemas.ERRORS)
    async def route(body: schemas.Route, request: Request) -> Any:
        """The tasks that a text is routed to, with their weights, without an answer."""
        parsed = rows.rows_of(body.input, serve.inputs, "input")
        job = await finished(engine, Ask(parsed, "route", truncate=body.truncate), request)
        found = [piece.result for piece in job.pieces if isinstance(piece.result, Routed)]
        data = [rows.routed(place, row, job.generation) for place, row in enumerate(found)]
        return JSON({"object": "list", "data": data, "usage": rows.usage(job)})

    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSON:
        headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
        return JSON(error_body(error), error.status, headers=headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSON:  # its traceback is in the log
        return JSON(error_body(Refused(500, f"the server has a bug: {type(error).__name__}")), 500)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSON:
        return JSON(error_body(understood(error.errors(), error.body)), 400)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSON:
        said, cause = str(error.detail), error.__cause__
        # FastAPI names invalid JSON, but not a body that cannot be parsed for another reason.
        if error.status_code == 400 and cause is not None:
            said = f"the body: expected JSON in UTF-8: {one_line(cause)}"
        return JSON(error_body(Refused(error.status_code, said)), error.status_code, headers=error.headers)


def understood(errors: Any, body: Any) -> Refused:
    """The first problem with a body, as one line that names the field. Unknown fields come before all others."""
    first = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
    if first["type"] == "json_invalid":
        return Refused(400, f"the body: expected JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if len(first["loc"]) < 2 and isinstance(first["input"], bytes):  # left unparsed because of its content type
        return Refused(400, "the body: expected the header content-type: application/json")
    if len(first["loc"]) < 2 and first["type"] == "string_unicode":
        return Refused(400, f"the body: a field's name holds half a character: {_brief(first['input'])}")
    if len(first["loc"]) < 2:
        return Refused(400, "the body: expected a JSON object")
    field = _brief(str(first["loc"][1]))
    # A field that may have several types has errors for each: those count that are deepest in the body.
    alike = [(_path(error, body), error) for error in errors if error["loc"][1] == first["loc"][1]]
    tag = next(((path, e) for path, e in alike if e["type"] == "literal_error" and e["loc"][-1] == "type"), None)
    if tag is not None:  # other fields depend on it
        path, said = tag[0], tag[1]["msg"]
    elif first["type"] == "extra_forbidden":
        path, said = _path(first, body), "unknown field, or one that this server does not support"
    else:
        path, _ = max(alike, key=lambda one: one[0].count("."))
        said = ", or ".join(dict.fromkeys(error["msg"] for where, error in alike if where == path))
    return Refused(400, f"{path}: {said}", param=field)


def _path(error: Mapping[str, Any], body: Any) -> str:
    """Where in a body an error is, as "messages.0.content". Its location also names the types that were tried."""
    names, at, (*_, last) = list[str](), body, error["loc"]
    for part in error["loc"][1:]:
        if isinstance(at, list if isinstance(part, int) else dict) and (isinstance(part, int) or part in at):
            at = at[part]
        elif not (isinstance(at, dict) and error["type"] == "missing" and part == last):
            continue
        names.append(str(part))
    return _brief(".".join(names))


def _brief(name: str) -> str:
    """A name from a request, for a message: it may be of any length and have any characters."""
    name = name if len(name) <= LONGEST else f"{name[:LONGEST]}..."
    return name if name.isprintable() else ascii(name)


def _add_state(app: FastAPI, served: Served) -> None:
    engine = served.engine
    page = files("slm_fast.server").joinpath("page.html").read_bytes()

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers={"content-security-policy": CSP})

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Any:
        """Whether the engine works. A process whose engine has failed ends by itself."""
        return JSON({"status": "ok"}) if engine.failed is None else JSON({"status": "failed"}, 503)

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", responses={503: {"description": "not warm, draining, or without a task to answer with"}})
    async def ready() -> Any:
        return stated(served.state(), 200 if served.ready else 503)

    @app.get("/metrics", responses={401: schemas.ERRORS[401]})
    async def metrics() -> Response:
        return Response(served.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/info", responses={401: schemas.ERRORS[401]})
    async def info() -> Any:
        """The model and its limits, under Text Embeddings Inference's names where it has them."""
        model, serve = engine.model, engine.serve
        about: Mapping[str, Any] = {
            "model_id": served.backbone,
            "model_sha": model.backbone.fingerprint,
            "model_dtype": str(model.backbone.dtype).removeprefix("torch."),
            "model_type": {"classifier": {}} if not engine.writes else {"writer": {}},
            "max_concurrent_requests": serve.requests,
            "max_input_length": model.config.max_length,
            "max_batch_tokens": engine.batch_tokens,
            "max_client_batch_size": serve.inputs,
            "max_new_tokens": serve.max_new_tokens if engine.writes else None,
            "queue_rows": engine.room.most_rows,
            "queue_tokens": engine.room.most_tokens,
            "router": model.config.router,
            "version": slm_fast.__version__,
            **served.state(),
        }
        return stated(about)


def guarded(app: FastAPI, served: Served) -> App:
    """Wrap the application in the middleware that every request passes first."""
    serve, engine = served.engine.serve, served.engine
    paths = {path for route in app.routes if "{" not in (path := getattr(route, "path", "{"))}

    def full() -> Refused | None:
        if served.draining:
            return stopping()
        if not engine.warm.is_set():
            return Refused(503, "the server is not warm yet", retry_after=1)
        return engine.room.busy() if engine.room.full else None

    def note(path: str, status: int, seconds: float) -> None:
        served.metrics.note(path if path in paths else "other", status, seconds)

    inner = Body(Concurrency(app, serve.requests), serve, full)
    marked = Marks(
        Key(inner, served.key, served.admin), lambda: engine.generation.number, lambda: served.draining, note
    )
    return Patience(marked, serve.patience)
