"""OpenAI's completions, chat and models endpoints. Each choice adds our own fields: task, route, task_sha256."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from slm_fast.data import Row
from slm_fast.predict import Prediction
from slm_fast.server import rows, schemas
from slm_fast.server.engine import Engine
from slm_fast.server.jobs import Ask, Job, Piece, Refused
from slm_fast.server.limits import error_body
from slm_fast.server.metrics import Metrics
from slm_fast.server.text import TextStream
from slm_fast.server.waiting import Ticket, finished

Part = Callable[[int, str | None, str | None, Mapping[str, Any]], dict[str, Any]]  # place, text, finish_reason, found


@dataclass(frozen=True)
class Shape:
    """An endpoint's response format. `name`, `chunk`: object types of a whole response and of a stream's parts."""

    name: str
    chunk: str
    prefix: str
    whole: Part
    part: Part


def _choice(place: int, text: str | None, reason: str | None, found: Mapping[str, Any]) -> dict[str, Any]:
    return {"index": place, "text": text or "", "logprobs": None, "finish_reason": reason, **found}


def _message(place: int, text: str | None, reason: str | None, found: Mapping[str, Any]) -> dict[str, Any]:
    message = {"role": "assistant", "content": text or "", "refusal": None}
    return {"index": place, "message": message, "logprobs": None, "finish_reason": reason, **found}


def _delta(place: int, text: str | None, reason: str | None, found: Mapping[str, Any]) -> dict[str, Any]:
    begins = bool(found) and reason is None  # task and route come first
    delta = ({"role": "assistant"} if begins else {}) | ({"content": text or ""} if text or begins else {})
    return {"index": place, "delta": delta, "logprobs": None, "finish_reason": reason, **found}


COMPLETION = Shape("text_completion", "text_completion", "cmpl", _choice, _choice)
CHAT = Shape("chat.completion", "chat.completion.chunk", "chatcmpl", _message, _delta)


def add(app: FastAPI, engine: Engine, backbone: str, metrics: Metrics, started: int) -> None:
    async def write(
        shape: Shape,
        body: schemas.Writing,
        parsed: Sequence[Row],
        request: Request,
        field: str,
        turns: Sequence[Mapping[str, str]] | None = None,
    ) -> Response:
        if not engine.writes:
            raise Refused(400, "an encoder-only backbone writes no text; POST /v1/classify answers with labels")
        task, bare = rows.model_of(body.model, backbone, engine.generation.files)
        writing = rows.writing_of(body, engine.serve)
        ask = Ask(parsed, "answer", task, bare, 1, writing, True, bool(body.stream), turns if bare else None, field)
        head = {"id": f"{shape.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": body.model}
        if not body.stream:
            job = await finished(engine, ask, request)
            metrics.note_rows(job)
            choices = [
                shape.whole(place, answer.text, answer.finish_reason, rows.found(answer, job.generation))
                for place, answer in enumerate(rows.predictions(job))
            ]
            whole = {**head, "object": shape.name, "choices": choices, "usage": rows.usage(job)}
            return JSONResponse(whole)
        began = time.perf_counter()
        ticket = Ticket(engine, ask, request)
        try:
            while not (ticket.job.done or any(piece.head for piece in ticket.job.pieces)):
                await ticket.change()
            refusal = next((p.result for p in ticket.job.pieces if isinstance(p.result, Refused)), None)
            if refusal is not None:  # while the response can still have an error status
                raise refusal
        except BaseException:
            ticket.leave()
            raise
        metrics.first.observe(time.perf_counter() - began)
        usage = body.stream_options is not None and body.stream_options.include_usage
        lines = _lines(ticket, shape, {**head, "object": shape.chunk}, _decoder(engine), usage, metrics)
        return _Events(ticket, lines)

    @app.post("/v1/completions", responses=schemas.ERRORS)
    async def completions(body: schemas.Completion, request: Request) -> Any:
        """OpenAI's completions. `model`: auto routes by the text, a task's name forces that task, base is the bare
        backbone."""
        parsed = rows.rows_of(body.prompt, engine.serve.inputs, "prompt")
        return await write(COMPLETION, body, parsed, request, "prompt")

    @app.post("/v1/chat/completions", responses=schemas.ERRORS)
    async def chat(body: schemas.Chat, request: Request) -> Any:
        """OpenAI's chat completions. The system message is the instruction; tasks read chats as they do in training."""
        return await write(CHAT, body, [rows.chat_row(body.messages)], request, "messages", rows.turns(body.messages))

    def models(files: Mapping[str, str]) -> list[dict[str, Any]]:
        model = {"object": "model", "created": started, "owned_by": "slm_fast"}
        base = rows.base_of(backbone, files) if engine.writes else None
        bare = [rows.AUTO] if base is None else [rows.AUTO, base]
        known = [{**model, "id": name, "root": backbone, "parent": None} for name in bare]
        own = [(name, sha) for name, sha in files.items() if name != rows.AUTO]
        return known + [{**model, "id": n, "root": n, "parent": base, "task_sha256": sha} for n, sha in own]

    @app.get("/v1/models", responses={401: schemas.ERRORS[401]})
    async def list_models() -> Any:
        """The values of `model`: auto, base if the backbone generates text, and each task with its file's SHA-256."""
        now = engine.generation
        whole = {"object": "list", "data": models(now.files), "generation": now.number}
        return JSONResponse(whole, headers={"x-store-generation": now.number})

    @app.get("/v1/models/{name:path}", responses={status: schemas.ERRORS[status] for status in (401, 404)})
    async def model(name: str) -> Any:
        """One of these values, or the backbone's own name."""
        now = engine.generation
        bare = engine.writes and rows.model_of(name, backbone, now.files)[1]
        wanted = rows.base_of(backbone, now.files) if bare else name
        found = next(({**model, "id": name} for model in models(now.files) if model["id"] == wanted), None)
        if found is None:
            raise Refused(404, f"model {name[:100]!r}: not here", code="model_not_found", param="model")
        return JSONResponse(found, headers={"x-store-generation": now.number})


def _decoder(engine: Engine) -> Callable[[Sequence[int]], str]:
    tokenizer = engine.model.backbone.tokenizer

    def decode(tokens: Sequence[int]) -> str:
        text: str = tokenizer.batch_decode([list(tokens)], skip_special_tokens=True)[0]
        return text.strip()

    return decode


class _Events(StreamingResponse):
    """Server-sent events. The job ends with them, however they end."""

    def __init__(self, ticket: Ticket, lines: AsyncIterator[str]) -> None:
        super().__init__(lines, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._ticket = ticket

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self.stream_response(send)  # the ticket notices when the client disconnects
        finally:
            self._ticket.leave()


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


async def _lines(
    ticket: Ticket,
    shape: Shape,
    head: Mapping[str, Any],
    decode: Callable[[Sequence[int]], str],
    with_usage: bool,
    metrics: Metrics,
) -> AsyncIterator[str]:
    """The events of a job: for each row first its route, then its text as it is generated, then its end."""
    job: Job = ticket.job
    assert job.ask.writing is not None
    streams = [TextStream(decode, job.ask.writing.stop) for _ in job.pieces]
    begun, ended = set[int](), set[int]()
    empty = {"usage": None} if with_usage else {}

    def chunk(place: int, text: str, reason: str | None, found: Mapping[str, Any]) -> str:
        return _event({**head, "choices": [shape.part(place, text, reason, found)], **empty})

    def news(piece: Piece) -> list[str]:
        place, lines = piece.place, []
        if place in ended:
            return []
        head_answer, result = piece.head, piece.result
        if place not in begun and isinstance(first := head_answer or result, Prediction):
            begun.add(place)
            lines.append(chunk(place, "", None, rows.found(first, job.generation)))
        if isinstance(result, Prediction):
            ended.add(place)
            rest = streams[place].end(result.text or "")
            lines += [chunk(place, rest, None, {})] if rest else []
            lines.append(chunk(place, "", result.finish_reason, rows.found(result, job.generation)))
        elif result is not None:
            ended.add(place)
            refused = result if isinstance(result, Refused) else Refused(422, f"{job.ask.field} {place}: {result}")
            lines.append(_event(error_body(refused)))
        elif piece.stopped is None:
            more = streams[place].so_far(piece.tokens[:])
            lines += [chunk(place, more, None, {})] if more else []
        return lines

    try:
        while True:
            done = job.done
            for piece in job.pieces:
                for line in news(piece):
                    yield line
            if done:
                break
            await ticket.change()
    except Refused as refused:
        yield _event(error_body(refused))
        return
    metrics.note_rows(job)
    if with_usage:
        yield _event({**head, "choices": [], "usage": rows.usage(job)})
    yield "data: [DONE]\n\n"
