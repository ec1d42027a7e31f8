"""Validation of the fields of a JSON object: which must be present, and what each may contain."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

Repeated = TypeVar("Repeated", bound=Hashable)
MOST_PARTS = 1000  # maximum size of each list or object in plain JSON
Kind = tuple[str, Callable[[Any], bool]]  # a description of what is expected, and its test


class Unfit(Exception):
    """A field and what is wrong with it. Unprintable characters in its name, as from a damaged file, are escaped."""

    def __init__(self, field: str, wrong: str) -> None:
        shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in field)
        super().__init__(f"{shown}: {wrong}")


class Unknown(Unfit):
    """A field unknown to this version."""

    def __init__(self, field: str) -> None:
        super().__init__(field, "not known; written by a newer version of slm_fast")


def read_json(data: bytes | str) -> Any:
    """Parse standard JSON: no NaN, no duplicate fields. Raises ValueError for anything else, however deeply nested."""
    try:
        text = data.decode() if isinstance(data, bytes) else data
        return STRICT.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def refuse_constant(constant: str) -> None:
    """`parse_constant` for json: Python accepts NaN and Infinity, which are not in the standard."""
    raise ValueError(f"{constant} is not JSON")


def without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"field {repeated(name for name, _ in pairs)!a} occurs twice")
    return found


# Created once, because json.loads creates a decoder for each call with such options.
STRICT = json.JSONDecoder(parse_constant=refuse_constant, object_pairs_hook=without_repeats)


def repeated(items: Iterable[Repeated]) -> Repeated | None:
    """The first item that repeats an earlier one; None if there is none."""
    seen: set[Repeated] = set()
    for item in items:
        if item in seen:
            return item
        seen.add(item)
    return None


def fields(
    value: Any, where: str, *names: str, optional: Sequence[str] = (), others: bool = False
) -> Mapping[str, Any]:
    """Return `value` if it is an object with the fields `names`, and besides only `optional` ones (any with `others`).

    Raises:
        Unfit: it is not an object, or a field is missing.
        Unknown: it has another field.
    """
    prefix = f"{where}." if where else ""
    if not isinstance(value, Mapping):
        raise Unfit(where or "all of it", f"expected an object, got {reprlib.repr(value)}")
    for name in sorted(value) if not others else ():
        if name not in names and name not in optional:
            raise Unknown(f"{prefix}{name}")
    for name in names:
        if name not in value:
            raise Unfit(f"{prefix}{name}", "missing")
    return value


def check(value: Any, field: str, kind: Kind) -> None:
    """Raise Unfit unless the value of a field is of this kind."""
    expected, fits = kind
    if not fits(value):
        raise Unfit(field, f"expected {expected}, got {reprlib.repr(value)}")


# Kinds


def _is_string(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can contain a lone surrogate
        return False
    return True


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_plain(values: Sequence[Any], depth: int) -> bool:
    return all(is_plain(value, depth) for value in values)


def is_plain(value: Any, depth: int) -> bool:
    if isinstance(value, Mapping):
        parts = list(value.values())
        return depth > 0 and len(parts) <= MOST_PARTS and all(map(_is_string, value)) and _are_plain(parts, depth - 1)
    if isinstance(value, list):
        return depth > 0 and len(value) <= MOST_PARTS and _are_plain(value, depth - 1)
    return value is None or isinstance(value, bool) or _is_string(value) or _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


STRING: Kind = "a string", _is_string
TEXT: Kind = "a non-empty string", lambda value: _is_string(value) and value != ""
PLAIN: Kind = "plain JSON, at most 4 deep", lambda value: is_plain(value, 4)


def word(*choices: str) -> Kind:
    return " or ".join(map(repr, choices)), lambda value: isinstance(value, str) and value in choices


def integer(least: int, most: int = 2**31 - 1) -> Kind:
    expected = f"an integer from {least} on" if most == 2**31 - 1 else f"an integer from {least} to {most:,}"
    return expected, lambda value: _is_integer(value) and least <= value <= most


def number(least: float, most: float) -> Kind:
    """A number between inclusive bounds."""
    return f"a number from {least:g} to {most:g}", lambda value: _is_number(value) and least <= value <= most


def list_of(kind: Kind, length: int | None = None) -> Kind:
    """A list of `length` items or, without one, a non-empty list."""
    expected, fits = kind
    return (
        f"a list, each {expected}" if length is None else f"a list of {length}, each {expected}",
        lambda value: isinstance(value, list) and len(value) == (length or len(value) or 1) and all(map(fits, value)),
    )


def or_null(kind: Kind) -> Kind:
    expected, fits = kind
    return f"{expected}, or null", lambda value: value is None or fits(value)
