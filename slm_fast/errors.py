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
    """The first names and how many more there are, for a message of one line; "none" where there are none."""
    known = list(names)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return (", ".join(known[:most]) or "none") + more


def interrupted(error: BaseException) -> bool:
    """Whether Ctrl-C is behind an error: a library whose import it broke off may call that an ImportError."""
    return any(isinstance(cause, KeyboardInterrupt) for cause in causes(error))


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
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
