"""Roles of a row's columns, recognised by the usual names of texts, labels, instructions and chats."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from slm_fast.errors import InputError, WorkError

# Column names in public data sets, help desks and shops. The first is the usual one and wins; of the others a row may
# have only one, because which of two is meant would be unclear.
TEXT = (
    *("text", "sentence", "content", "body", "message", "review", "comment", "document", "utterance", "tweet"),
    *("query", "question", "prompt", "description", "title", "subject", "headline"),
    *("input_text", "review_text", "ticket_text"),
)
LABEL = (
    *("label", "labels", "category", "class", "target", "intent", "sentiment", "topic", "rating", "stars"),
    *("queue", "department", "label_text", "class_name"),
)
OUTPUT = ("output", "response", "completion", "answer")
PROMPT = ("prompt", "question", "query")  # together with one of OUTPUT
CHAT = ("messages", "conversations", "conversation")
OTHERS = ("instruction", "input", "context", "system")
# If one of these is not empty, the rest of an instruction row or a chat is only part of what was asked.
UNREAD = ("history", "choices", "options", "images", "image", "videos", "audios", "tools")
KNOWN = frozenset([*TEXT, *LABEL, *OUTPUT, *PROMPT, *CHAT, *OTHERS])

LABELLED, INSTRUCTED, CHATTED = "text and label", "instruction and output", "a chat"  # kinds of rows


class Unclear(WorkError):
    """No column, or more than one, can have the wanted role."""


@dataclass(frozen=True)
class Columns:
    """Roles of a row's columns.

    Attributes:
        kind: LABELLED, INSTRUCTED or CHATTED.
        text: input columns, joined by line breaks.
        answer: None if there is none, if it is unclear (`missing_answer` says why), or if it is a turn of a chat.
        instruction: columns that come before the text.
        unread: columns that must be empty.
        ready: column with a text composed of the others.
    """

    kind: str
    text: Sequence[str]
    answer: str | None = None
    instruction: Sequence[str] = ()
    unread: Sequence[str] = ()
    ready: str | None = None


def plain(name: str) -> str:
    """Normalise a column name: case, spaces, hyphens and byte order mark."""
    return re.sub(r"[\s-]+", "_", name.strip("\ufeff \t\r\n\v\f").casefold())


def check_columns(text: str | None, label: str | None) -> list[str]:
    """The columns that the user named. Raises InputError for what is no name, and for one column in both roles."""
    given = {role: name for role, name in (("text", text), ("label", label)) if name is not None}
    for role, name in given.items():
        if not isinstance(name, str):
            raise InputError(f"{role}: expected the name of a column, got {name!r}")
    if text is not None and text == label:
        raise InputError(f"label: expected another column than that of the text, got {label!r} for both")
    return list(given.values())


@functools.lru_cache(256)
def id_column(names: tuple[str, ...]) -> str | None:
    """The column with a row's id."""
    return _called(names, "id")


def known(names: Iterable[str], given: Collection[str] = ()) -> int:
    """The number of names that are usual ones or among those `given`."""
    usual = KNOWN | {plain(name) for name in given}
    return sum(plain(name) in usual for name in names)


def listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


@functools.lru_cache(256)
def find_columns(names: tuple[str, ...], text: str | None = None, label: str | None = None) -> Columns:
    """Find the roles of a row's columns.

    Args:
        names: all column names of the row.
        text, label: names of the input and answer columns, if the user gave them.

    Raises:
        Unclear: no column, or more than one, can be the input, or a given name does not exist.
    """
    if text is not None:
        found_text = named(names, text)
        return Columns(LABELLED, (found_text,), _label(tuple(name for name in names if name != found_text), label))
    instruction, entered, context = (_called(names, name) for name in ("instruction", "input", "context"))
    ready, own_label = _called(names, "text"), _called(names, "label")
    answered = any(_called(names, name) for name in OUTPUT) and (label is None or plain(label) in OUTPUT)
    # A text beside instruction and output is composed of these, unless it has its own label.
    instructed = not ready or (answered and not own_label)
    before = tuple(name for name in (_called(names, "system"), instruction) if name)
    unread = tuple(name for name in names if plain(name) in UNREAD)
    if (instruction or entered) and instructed:
        read = entered or context
        if entered and context:
            unread = (*unread, context)
        answer = named(names, label) if label is not None else _only(names, OUTPUT)
        return Columns(INSTRUCTED, (read,) if read else (), answer, before, unread, None if read else ready)
    chat = _only(names, CHAT)
    if chat and label is None and not own_label:
        return Columns(CHATTED, (chat,), None, before, unread)
    prompt = _only(names, PROMPT)
    asked = answered or ((context or before) and label is None and not any(plain(name) in LABEL for name in names))
    if prompt and asked and instructed:
        answer = named(names, label) if label is not None else _only(names, OUTPUT)
        return Columns(INSTRUCTED, (context, prompt) if context else (prompt,), answer, before, unread)
    others = names if label is None else tuple(name for name in names if plain(name) != plain(label))
    found = _usual(others, TEXT, "text")
    if found is None and label is not None:
        beside = f" beside the label's, {label!r}" if _candidates(names, TEXT) else ""
        raise Unclear(f"no column 'text'{beside}; columns: {listed(names)}")
    if found is None:
        raise Unclear(f"no 'text' (nor 'instruction' and 'input'); fields: {_advised(names, 'text')}")
    return Columns(LABELLED, (found,), _label(names, label))


def missing_answer(names: tuple[str, ...], kind: str, given: bool = False) -> str:
    """The reason why `find_columns` found no answer, as a message. given: whether the user named columns."""
    what, usual = ("label", LABEL) if kind == LABELLED else ("output", OUTPUT)
    try:
        found = _usual(names, usual, what)
        if found is not None:
            how = f" beside {found!r}, which is read as the text; label=NAME (--label-column) says which holds it"
            return f"no {what!r}{how if kind == LABELLED else ''}"
    except Unclear as error:
        return str(error)
    return f"no column {what!r}; columns: {listed(names)}" if given else f"no {what!r}; fields: {_advised(names, what)}"


def named(names: Sequence[str], wanted: str) -> str:
    """The column named `wanted`, exactly or except for case and spaces. Raises Unclear if there is not exactly one."""
    if wanted in names:
        return wanted
    alike = [name for name in names if plain(name) == plain(wanted)]
    if len(alike) != 1:
        raise Unclear(f"{'no' if not alike else 'more than one'} column {wanted!r}; columns: {listed(names)}")
    return alike[0]


def _called(names: Sequence[str], usual: str) -> str | None:
    """The column with this usual name."""
    return usual if usual in names else next((name for name in names if plain(name) == usual), None)


def _only(names: Sequence[str], usual: Sequence[str]) -> str | None:
    """The column that has one of these names; None if there is none or more than one."""
    found = _candidates(names, usual)
    return found[0] if len(found) == 1 else None


def _candidates(names: Sequence[str], usual: Sequence[str]) -> list[str]:
    """The column with the first of these names or, if there is none, all columns with the others."""
    if usual[0] in names:
        return [usual[0]]
    return [name for name in names if plain(name) == usual[0]] or [name for name in names if plain(name) in usual]


def _usual(names: Sequence[str], usual: Sequence[str], what: str) -> str | None:
    found = _candidates(names, usual)
    if len(found) > 1:
        option = "text" if what == "text" else "label"
        raise Unclear(f"columns {listed(found)} may each be the {what}; {option}=NAME (--{option}-column) says which")
    return found[0] if found else None


def _label(names: Sequence[str], label: str | None) -> str | None:
    return named(names, label) if label is not None else _only(names, LABEL)


def _advised(names: Sequence[str], what: str) -> str:
    """The existing names and the options that help, for a message."""
    option = "text" if what == "text" else "label"
    joined = what == "text" and len(names) == 1 and re.search(r"[^\w-]", names[0])  # perhaps several, not split
    split = ", delimiter=CHAR (--delimiter) what separates columns" if joined else ""
    return f"{listed(names)}; {option}=NAME (--{option}-column) says which holds it{split}"
