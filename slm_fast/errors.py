"""Errors and warnings of this package.

Each message is one line that names the cause and says what was expected or done.
"""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

NO_MEMORY = (
    *("can't allocate memory", "cannot allocate memory", "out of memory", "outofmemory", "not enough memory"),
    *("bad_alloc", "can't start new thread", "threadpoolbuilderror"),
    "aoti_torch_empty_strided(",  # of the C++ operators: torch's stable ABI says no more
)
NOT_FINITE = "its query holds a number that is not finite"


class SlmError(Exception):
    """Base class of all errors that this package raises on purpose. `status` is the command line's exit status."""

    status = 1


def one_line(error: BaseException) -> str:
    """The first line of another library's error message, with those that it announces by a colon, or the name of its
    type if the message is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    found = lines[0]
    for line in lines[1:4]:
        if not found.endswith(":"):
            break
        found += f" {line}"
    return found


def some_of(names: Iterable[str], most: int = 10) -> str:
    """The first `most` names and the number of others, for a one-line message; "none" if there are no names."""
    known = list(names)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return (", ".join(known[:most]) or "none") + more


class InputError(SlmError, ValueError):
    """The call itself is wrong: an invalid shape, name, option or file."""

    status = 2


class WorkError(SlmError, RuntimeError):
    """The call is valid but could not be carried out: damaged data, a full disk, a number that is not finite."""

    status = 1


class RowsFailed(WorkError):
    """Some rows of a pass cannot be answered; the others can, in a pass without them.

    Args:
        rows: indices of these rows, among the `of` rows of the pass.
        reason: why each of them has no answer. Default: the message.
    """

    def __init__(self, message: str, rows: Sequence[int], of: int, reason: str | None = None) -> None:
        super().__init__(message)
        self.rows, self.of, self.reason = rows, of, reason or message

    def among(self, count: int) -> list[int]:
        """Ascending indices of the failed rows among `count` rows, each of which the pass may repeat for its beams."""
        return sorted({row * count // self.of for row in self.rows})


class NotFinite(RowsFailed):
    """The queries of some rows are not finite."""

    def __init__(self, rows: Sequence[int], of: int) -> None:
        super().__init__(f"query: row {rows[0]} holds a number that is not finite", rows, of, NOT_FINITE)


class SlmWarning(UserWarning):
    """Something may not be as the user meant it. The command line prints it as one line on standard error."""


def warn(message: str) -> None:
    """Emit an SlmWarning, attributed to the caller of the function that calls this."""
    warnings.warn(message, SlmWarning, stacklevel=3)


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Convert any error caused by lack of memory inside the block to a WorkError about `what`.

    This may be a MemoryError, a RuntimeError of torch, an OSError or a panic of a Rust library.
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
    """Whether an error, from any library, means that memory could not be allocated."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    said = f"{type(error).__name__}: {error}".lower()
    # Rust's; "pointer is null" if Python had no memory for an object that Rust requested.
    if type(error).__name__ == "PanicException" and any(w in said for w in ("alloc", "memory", "pointer is null")):
        return True
    return any(words in said for words in NO_MEMORY)
