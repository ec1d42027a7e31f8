"""Requests as work for the engine, and results as response bodies."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from math import isfinite
from typing import Any

from slm_fast.chats import SPEAKERS, read_chat
from slm_fast.data import Row
from slm_fast.errors import SlmError
from slm_fast.predict import Prediction, RouteTaken
from slm_fast.scheduler import Sampling
from slm_fast.server import schemas
from slm_fast.server.generation import Generation
from slm_fast.server.jobs import Job, Refused, Routed, Writing
from slm_fast.server.options import ServeOptions

AUTO, BASE = "auto", "base"
COLDEST = 1e-4  # temperatures below this mean greedy decoding
NEW_TOKENS = 64  # of a text generated for /v1/classify, as in `predict`


def model_of(name: str, backbone: str, tasks: Collection[str]) -> tuple[str | None, bool]:
    """The task that a request's `model` forces, if any, and whether it is the bare backbone.

    A task of this name goes before the names of the backbone. `AUTO` is reserved.
    """
    if name == AUTO:
        return None, False
    return (None, True) if name in (BASE, backbone) and name not in tasks else (name, False)


def base_of(backbone: str, tasks: Collection[str]) -> str | None:
    """The `model` that is the bare backbone; None if its names are names of tasks."""
    return next((name for name in (BASE, backbone) if name not in tasks), None)


def rows_of(given: Any, most: int, field: str) -> list[Row]:
    """The rows of a request. Raises Refused if there are too many, or one is empty."""
    texts = given if isinstance(given, list) else [given]
    if len(texts) > most:
        raise Refused(413, f"{field}: expected at most {most} texts, got {len(texts)}", param=field)
    rows = []
    for place, text in enumerate(texts):
        value = (
            {"instruction": text.instruction, "input": text.input} if isinstance(text, schemas.Instruction) else text
        )
        try:
            rows.append(Row.parse(value))
        except SlmError as error:
            raise Refused(400, f"{field} {place}: {error}", param=field) from None
    return rows


def chat_row(turns: Sequence[schemas.Turn]) -> Row:
    """A chat as a row, read as in training: the system message is the instruction."""
    given = [turn.model_dump(include={"role", "content"}) for turn in turns]
    try:
        chat = read_chat(given, "messages")
    except SlmError as error:
        raise Refused(400, str(error), param="messages") from None
    if chat.answer is not None:
        raise Refused(400, "messages: expected a turn of the user's at the end", param="messages")
    return Row(chat.text, None, chat.instruction, chat.turns)


def turns(given: Sequence[schemas.Turn]) -> list[dict[str, str]]:
    """A chat that `chat_row` accepts, as templates read it: with the usual roles, and each turn's parts joined."""
    return [
        {
            "role": SPEAKERS[turn.role.strip().lower()],
            "content": turn.content if isinstance(turn.content, str) else "\n".join(part.text for part in turn.content),
        }
        for turn in given
    ]


def writing_of(body: schemas.Writing, serve: ServeOptions) -> Writing:
    """How to generate a request's text. Without a temperature decoding is greedy, as in `predict`."""
    most, (field, asked) = serve.max_new_tokens, body.length
    if asked is not None and asked > most:
        raise Refused(400, f"{field}: expected at most {most}, got {asked}", param=field)
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if any(not one for one in stop):
        raise Refused(400, "stop: expected texts that are not empty", param="stop")
    sampling = None
    if body.temperature is not None and body.temperature >= COLDEST:
        seed = secrets.randbits(31) if body.seed is None else body.seed
        sampling = Sampling(body.temperature, 1.0 if body.top_p is None else body.top_p, seed)
    return Writing(asked or most, sampling, stop)


# Results


def weights(route: RouteTaken) -> list[dict[str, Any]]:
    slots = zip(route.tasks, route.slots, route.weights, strict=True)
    return [{"task": task, "slot": slot, "weight": weight} for task, slot, weight in slots]


def _said(distance: float | None) -> float | None:
    """None for an infinite distance, which JSON cannot express."""
    return None if distance is None or not isfinite(distance) else distance


def found(answer: Prediction, generation: Generation) -> dict[str, Any]:
    """The fields that say which task answered and how it was found."""
    digest = None if answer.task is None else generation.files[answer.task]
    about = {"task": answer.task, "task_sha256": digest, "label": answer.label, "score": answer.score}
    return {**about, "route": weights(answer.route), "distance": _said(answer.distance), "truncated": answer.truncated}


def predictions(job: Job) -> list[Prediction]:
    return [piece.result for piece in job.pieces if isinstance(piece.result, Prediction)]


def classes(answer: Prediction, generation: Generation) -> int:
    """How many labels the answer was chosen from: the distinct ones of the tasks in its route or, if it was generated,
    those of its task."""
    pool = generation.known.pool
    own = [answer.task] if answer.text is not None else answer.route.tasks
    tasks = [pool.tasks[pool.place[name]] for name in set(own) if name is not None]
    return len({label for task in tasks for label in task.labels or ()})


def classified(place: int, answer: Prediction, generation: Generation, most: int | None) -> dict[str, Any]:
    """A row in vLLM's classification format, plus our own fields."""
    known: Mapping[str, float] = answer.probabilities or {}
    probabilities = list(known.items())[:most]
    shape = {
        "index": place,
        "label": answer.label,
        "probs": [p for _, p in probabilities],
        "num_classes": classes(answer, generation),
        "labels": [label for label, _ in probabilities],
        "text": answer.text,
    }
    return {**shape, **found(answer, generation)}


def scored(answer: Prediction) -> list[dict[str, Any]]:
    """A row in Text Embeddings Inference's format: all labels, most probable first."""
    if answer.probabilities is None:  # the answer is generated
        return [{"label": answer.label or answer.text or "", "score": answer.score}]
    return [{"label": label, "score": p} for label, p in answer.probabilities.items()]


def routed(place: int, row: Routed, generation: Generation) -> dict[str, Any]:
    shares: dict[str, float] = {}
    for task, weight in zip(row.route.tasks, row.route.weights, strict=True):
        shares[task] = shares.get(task, 0.0) + weight
    best: str | None = max(sorted(shares), key=lambda name: shares[name], default=None)
    digest = None if best is None else generation.files[best]
    about = {"index": place, "task": best, "task_sha256": digest, "route": weights(row.route)}
    return {**about, "distance": _said(row.distance), "truncated": row.truncated}


def usage(job: Job) -> dict[str, int]:
    read = sum(piece.length for piece in job.pieces)
    written = sum(len(piece.tokens) for piece in job.pieces)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
