"""The two things that can go wrong, and what users are only warned of.

Each message is one line that names the culprit and says what was expected, or what was done.
"""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterable, Iterator


class SlmError(Exception):
    """Base of every error this package raises on purpose. `status` is the command line's exit status."""

    status = 1


def one_line(error: BaseException) -> str:
    """The first line of what an error of another library says, or its name when it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def some_of(names: Iterable[str], most: int = 10) -> str:
    """Names for one line of an error: the first few, each cut to 80 characters, and how many more there are."""
    listed = list(names)
    shown = [name if len(name) <= 80 else f"{name[:77]}..." for name in listed[:most]]
    more = f" ... and {len(listed) - most:,} more" if len(listed) > most else ""
    return ", ".join(shown) + more or "none"


# What libraries say when memory runs out, each in an exception of another type.
_MEMORY = (
    *("allocate memory", "out of memory", "not enough memory", "bad_alloc", "memory allocation"),
    *("can't start new thread", "failed to map segment", "ThreadPoolBuildError"),
)


def no_memory(error: BaseException) -> str | None:
    """What an error says of memory that ran out, in one line; None where it has another cause."""
    for cause in _causes(error):
        said = str(cause)
        if isinstance(cause, OSError) and cause.errno is not None and cause.errno != errno.ENOMEM:
            continue
        if (
            isinstance(cause, MemoryError)
            or type(cause).__name__ == "OutOfMemoryError"
            or any(w in said for w in _MEMORY)
        ):
            return f"not enough memory: {one_line(cause)}"
    return None


def interrupted(error: BaseException) -> bool:
    """Whether Ctrl-C is behind an error: a library whose import it broke off may call that an ImportError."""
    return any(isinstance(cause, KeyboardInterrupt) for cause in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


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
