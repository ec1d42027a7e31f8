"""Labels as words: one normalisation for all sources, and lists that give words to label numbers."""

from __future__ import annotations

import math
import operator
import re
import reprlib
import unicodedata
from collections.abc import Collection, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from slm_fast.errors import InputError, SlmError, WorkError, one_line, some_of, warn
from slm_fast.fields import TEXT, Unfit, check, list_of, read_json, repeated
from slm_fast.streams import kind_of

LONGEST = 1000  # maximum characters of a label
SHORT = 40  # characters of a label in a list of them
NUMBER = re.compile(r"(-?(?:0|[1-9][0-9]*))(\.0+)?\Z")
INDEX = re.compile(r"[0-9]{1,9}\Z")
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # but tabs and line ends
UNSEEN = ("Cc", "Cf", "Zs", "Zl", "Zp")  # categories of invisible characters


def as_text(value: Any, key: str) -> str | None:
    """An answer as text. It may be a word, an integer (also as a float such as 1.0) or a truth value (giving "True" or
    "False"), of Python, numpy, pandas or JSON. None if there is no answer: None, NaN, NaT or empty text.

    Raises:
        WorkError: it is anything else.
    """
    value = plain_value(value)
    if isinstance(value, Decimal):
        value = float(value)
    if value is None:
        return None
    if isinstance(value, str):
        text = str.__str__(value)
    elif isinstance(value, bool):
        text = str(value)
    elif isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        text = str(int(value))
    else:
        try:
            text = str(operator.index(value))
        except (TypeError, ValueError):
            raise WorkError(f"{key!r}: expected a word or an integer, got {shown(value)}") from None
    return whole(text, key).strip() or None


def plain_value(value: Any) -> Any:
    """Convert a scalar of numpy, pandas or torch to Python; None if it is a missing value."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    missing = type(value).__name__ in ("NAType", "NaTType")
    if missing or (isinstance(value, float) and math.isnan(value)) or (isinstance(value, Decimal) and value.is_nan()):
        return None
    return value


def whole(text: str, key: str) -> str:
    """The text, if it can be encoded. Raises WorkError."""
    if text.isascii():  # costs nothing, however long
        return text
    try:
        text.encode("utf-16-le")  # the fastest encoding that refuses what UTF-8 cannot encode
    except UnicodeEncodeError:  # a lone surrogate, valid in JSON but not in files or tokenizers
        raise WorkError(f"{key!r}: holds half a character, got {text[:60]!a}") from None
    return text


def shown(value: Any) -> str:
    """A value, shortened, on one line."""
    try:
        return " ".join(reprlib.repr(value).split())
    except ValueError:  # an integer with too many digits
        return f"a {type(value).__name__}"


def is_unseen(text: str) -> bool:
    """Whether a text has no visible character."""
    return not text[:1].isalnum() and all(unicodedata.category(letter) in UNSEEN for letter in text)


def check_label(label: str) -> str:
    """A label in Unicode's composed form (NFC). Raises WorkError if it cannot be a word."""
    if len(label) > LONGEST:
        raise WorkError(f"'label': expected at most {LONGEST:,} characters, got {len(label):,}; is it free text?")
    if CONTROL.search(label):
        raise WorkError(f"'label': holds a control character, got {label[:60]!a}")
    if label.isascii():
        return label
    if is_unseen(label):
        raise WorkError(f"'label': holds no visible character, got {label[:60]!a}")
    return unicodedata.normalize("NFC", label)


def same_words(labels: Sequence[str]) -> list[str]:
    """Spell the labels of a whole column consistently: numbers without ".0" if all are whole numbers, and "True" and
    "False" if all are truth values in several spellings. Raises WorkError if 1 may stand for True."""
    different = set(labels)
    numbers = {label: NUMBER.match(label) for label in different}
    words: dict[str, str] = {}
    if all(numbers.values()) and any("." in label for label in different):
        words = {label: str(int(label.partition(".")[0])) for label in different}
    elif {label.lower() for label in different} <= {"true", "false"}:
        spellings = (str.lower, str.capitalize, str.upper)
        if not any(all(label == spell(label) for label in different) for spell in spellings):
            words = {label: label.capitalize() for label in different}
    values = {_value(label): label for label in different}
    truths, digits = (sorted(values.keys() & pair) for pair in ({"True", "False"}, {"0", "1"}))
    if truths and digits and len(truths) + len(digits) == len(values):
        first, second = values[truths[-1]], values[digits[-1]]
        raise WorkError(f"labels {first!r} and {second!r} may mean one thing; write truth values in one way")
    return [words.get(label, label) for label in labels] if words else list(labels)


def spellings(labels: Collection[str], words: Collection[str]) -> dict[str, str]:
    """For each label that is not a word of a learned task, the one word that means the same: 1 and 1.0, true and True.
    The labels of a few rows may look like whole numbers, or like one spelling, although those of all rows did not."""
    alike: dict[str, list[str]] = {}
    for word in words:
        alike.setdefault(_value(word), []).append(word)
    meant = {label: alike.get(_value(label), []) for label in set(labels) - set(words)}
    return {label: found[0] for label, found in meant.items() if len(found) == 1}


def _value(label: str) -> str:
    """A label, independent of how whole numbers and truth values are spelled."""
    number = NUMBER.match(label)
    if number:
        return str(int(number[1]))
    return label.capitalize() if label.lower() in ("true", "false") else label


def foreign_label(label: str, labels: Collection[str]) -> str:
    """What to say of a label that is not one of the task's."""
    listed = some_of((word if len(word) <= SHORT else f"{word[:SHORT]}..." for word in sorted(labels)), 5)
    return f"label {label[:60]!r} is not one of {listed}"


def warn_of_alike(name: str, labels: Collection[str]) -> None:
    """Warn of labels that a reader would take for the same."""
    alike: dict[str, list[str]] = {}
    for label in labels:
        alike.setdefault(_likeness(label), []).append(label)
    pairs = [each for each in alike.values() if len(each) > 1]
    if pairs:
        more = f", and {len(pairs) - 1} more such pairs" if len(pairs) > 1 else ""
        first, second = sorted(pairs[0])[:2]
        warn(f"{name}: labels {first!r} and {second!r} are learned as two, though they look alike{more}")


def _likeness(label: str) -> str:
    """A label without case, spacing, width, invisible letters and differences in how a number is written."""
    folded = unicodedata.normalize("NFKC", label).casefold()
    visible = "".join(letter for letter in folded if unicodedata.category(letter) != "Cf")
    number = NUMBER.match(visible.strip())
    return str(int(number[1])) if number else " ".join(visible.split())


# Lists of words, of which integer labels are indices


def read_words(labels: str | Path | Sequence[str]) -> list[str]:
    """A list of label words, given as such or as a JSON file, normalised like the labels of rows.

    Raises:
        InputError: there is no such file, or what is given is no list of words, or a word is no label or occurs twice.
        WorkError: the same of what the file holds.
    """
    words: Any = labels
    where = "labels"
    wrong: type[SlmError] = InputError
    if isinstance(labels, (str, Path)):
        where, wrong = str(labels), WorkError
        kind_of(Path(labels), missing="no such file")
    try:
        if isinstance(labels, (str, Path)):
            words = read_json(Path(labels).read_bytes().removeprefix(b"\xef\xbb\xbf"))
        if isinstance(words, (list, tuple)):
            words = [word.strip() if isinstance(word, str) else word for word in words]
        check(words, "labels", list_of(TEXT))
    except (OSError, ValueError, Unfit) as error:
        if wrong is InputError:
            raise InputError(f"labels: expected a list of words or a file with one, got {shown(labels)}") from None
        raise WorkError(f"{where}: not a JSON list of words: {one_line(error)}") from None
    try:
        words = [check_label(str(word)) for word in words]
        twice = repeated(same_words(words))
    except WorkError as error:
        raise wrong(f"{where}: {error}") from None
    if twice is not None:
        raise wrong(f"{where}: {twice[:60]!r} occurs twice; each label number needs a word of its own")
    return words


def name_label(label: str, words: Sequence[str]) -> str:
    """The word that a label is the index of. Raises WorkError if it is not an index."""
    if not INDEX.match(label):
        raise WorkError(f"label {label!r}: expected the number of a label word, from 0, or one of the words")
    if int(label) >= len(words):
        counted = "is only 1 label word" if len(words) == 1 else f"are only {len(words)} label words"
        raise WorkError(f"label {label}: there {counted}, numbered from 0")
    return words[int(label)]


def are_words(labels: Collection[str], words: Collection[str]) -> bool:
    """Whether the labels are words of the list themselves, rather than indices."""
    return set(labels) <= set(words) and not all(INDEX.match(label) for label in labels)


def words_beside(path: Path, labels: Sequence[str], known: Collection[str] = ()) -> list[str] | None:
    """The words of `labels.json` in the file's folder, if they clearly belong to its labels: the labels are exactly 0
    to n - 1 and there are n words, or the words include the task's `known` ones, so it was learned with the same list.
    In the first case, or if they are not used, a warning says so."""
    beside = path.parent / "labels.json"
    numbers = {label for label in labels if INDEX.match(label)}
    if len(numbers) < len(set(labels)) or not labels or not beside.is_file():
        return None
    use = "labels=FILE (--labels NAME=FILE) uses it"
    try:
        words = read_words(beside)
    except WorkError as error:
        warn(f"{path}: labels are not named: {error}")
        return None
    every = {str(i) for i in range(len(words))}
    if known and set(known) <= set(words) and not numbers <= set(known) and numbers <= every:
        return words
    if numbers != every:
        found = ", ".join(sorted(numbers, key=int)[:8]) + ", ..." * (len(numbers) > 8)
        warn(f"{path}: labels are not named by labels.json, which has {len(words)} words for labels {found}; {use}")
        return None
    first = ", ".join(f"{i} = {word}" for i, word in enumerate(words[:3])) + ", ..." * (len(words) > 3)
    warn(f"{path}: labels are named by labels.json ({first})")
    return words
