"""The two things that can go wrong, and what users are only warned of.

Each message is one line that names the culprit and says what was expected, or what was done.
"""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

NO_MEMORY = (
    *("can't allocate memory", "cannot allocate memory", "out of memory", "outofmemory", "not enough memory"),
    *("bad_alloc", "can't start new thread", "threadpoolbuilderror"),
)


class SlmError(Exception):
    """Base of every error this package raises on purpose. `status` is the command line's exit status."""

    status = 1


def one_line(error: BaseException) -> str:
    """The first line of what an error of another library says, or its name when it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def some_of(names: Iterable[str], most: int = 10) -> str:
    """The first names and how many more there are, for a message of one line; "none" where there are none."""
    known = list(names)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return (", ".join(known[:most]) or "none") + more


class InputError(SlmError, ValueError):
    """The call as written cannot be right: a wrong shape, name, option or file."""

    status = 2


class WorkError(SlmError, RuntimeError):
    """The call was right and the work failed: damaged data, a full disk, a number that is not finite."""

    status = 1


class SlmWarning(UserWarning):
    """What was done is not certainly what was meant. The command line prints it as a line of standard error."""


def warn(message: str) -> None:
    """Warn the caller of this package: Python shows the line of theirs that led here."""
    warnings.warn(message, SlmWarning, stacklevel=3)


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Turn whatever too little memory raises inside the block into a WorkError that says what was not there.

    That is MemoryError, torch's RuntimeErrors, an OSError of the system, or a panic of a library written in Rust.
    """
    try:
        yield
    except SlmError:
        raise
    except BaseException as error:
        if not lacks_memory(error):
            raise
        raise WorkError(f"{what}: not enough memory: {one_line(error)}") from None


def lacks_memory(error: BaseException) -> bool:
    """Whether an error means that memory could not be had, whichever library raised it."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    said = f"{type(error).__name__}: {error}".lower()
    # Of Rust; the last where Python had no memory for an object that Rust asked it for.
    if type(error).__name__ == "PanicException" and any(w in said for w in ("alloc", "memory", "pointer is null")):
        return True
    return any(words in said for words in NO_MEMORY)
