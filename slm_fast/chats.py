"""Conversion of chats (OpenAI messages, ShareGPT conversations) to a prompt and an answer."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from slm_fast.errors import WorkError
from slm_fast.labels import is_unseen, whole

SPEAKERS = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}


class Chat(NamedTuple):
    """A chat as a row.

    Attributes:
        instruction: the leading system turns.
        text: everything between these and the answer: a single user turn as it is, several turns as lines "User: ..."
            and "Assistant: ...".
        answer: the last turn if it is the assistant's, else None.
        turns: the speaker ("user" or "assistant") and text of each of several turns, the last one the user's; empty for
            a single turn.
    """

    instruction: str
    text: str
    answer: str | None
    turns: tuple[tuple[str, str], ...]


def read_chat(value: Any, column: str) -> Chat:
    """Read a list of turns, or a JSON string with one. An earlier answer of the assistant's may be empty.

    Raises:
        WorkError: it is not such a list, or has other roles, tool calls, images, an empty turn or no user turn.
    """
    given = _list(value, column)
    turns = [_turn(column, number, turn, last=number == len(given)) for number, turn in enumerate(given, 1)]
    answer = None
    if turns and turns[-1][0] == "assistant":
        answer = turns.pop()[1]
    system: list[str] = []
    while turns and turns[0][0] == "system":
        system.append(turns.pop(0)[1])
    if not turns or turns[-1][0] != "user":
        raise WorkError(f"{column!r}: expected a turn of the user's before the answer")
    if any(speaker == "system" for speaker, _ in turns):
        raise WorkError(f"{column!r}: a turn of the system's stands after others")
    instruction = "\n".join(system)
    if len(turns) == 1:
        return Chat(instruction, turns[0][1], answer, ())
    text = "\n".join(f"{speaker.capitalize()}: {said}" for speaker, said in turns)
    return Chat(instruction, text, answer, tuple(turns))


def _list(value: Any, column: str) -> list[Any]:
    if isinstance(value, str) and value.lstrip().startswith("["):  # from a CSV column
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise WorkError(f"{column!r}: not a JSON list of turns") from None
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise WorkError(f"{column!r}: expected a list of turns, got {reprlib.repr(value)}")
    return list(value)


def _turn(column: str, number: int, turn: Any, *, last: bool) -> tuple[str, str]:
    """The speaker and text of a turn."""
    where = f"{column!r}: turn {number}"
    if not isinstance(turn, Mapping):
        raise WorkError(f"{where}: expected an object with 'role' and 'content', got {reprlib.repr(turn)}")
    role, content = ("role", "content") if "role" in turn else ("from", "value")
    who = turn.get(role)
    speaker = SPEAKERS.get(who.strip().lower()) if isinstance(who, str) else None
    if speaker is None:
        raise WorkError(f"{where}: expected a role of {', '.join(SPEAKERS)}, got {reprlib.repr(who)}")
    for name in ("tool_calls", "function_call", "audio"):
        if turn.get(name) is not None and turn[name] != []:
            raise WorkError(f"{where}: {name!r} is not understood; texts alone are")
    return speaker, _said(turn.get(content), where, content, may_be_empty=speaker == "assistant" and not last)


def _said(value: Any, where: str, field: str, *, may_be_empty: bool) -> str:
    if isinstance(value, list):
        value = "\n".join(_part(part, where) for part in value)
    if not isinstance(value, str) or not (may_be_empty or not is_unseen(value)):
        raise WorkError(f"{where}: {field!r}: expected a text, got {reprlib.repr(value)}")
    try:
        return whole(value, field).strip()
    except WorkError as error:
        raise WorkError(f"{where}: {error}") from None


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else part
    if not isinstance(part, Mapping) or kind != "text" or not isinstance(part.get("text"), str):
        raise WorkError(f"{where}: expected parts that are texts, got {reprlib.repr(kind)}")
    return str(part["text"])
