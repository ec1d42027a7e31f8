"""Windows: consecutive rows that are sorted into batches together, from a list, a file, or a live stream."""

from __future__ import annotations

import io
import os
import select
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from slm_fast.data import Row
from slm_fast.errors import WorkError

WINDOW = 1024  # maximum rows of a window; a stream holds two windows in memory
WINDOW_TEXT = 8 << 20  # characters in a window: it ends with the row that reaches this
CHUNK = 1 << 18  # bytes read from a live stream at once: more than its own buffer holds
PAUSE = 30  # milliseconds without input after which the rows read are answered

TaskID = str | Sequence[str] | None
Rows = Iterable[Row | WorkError]


@dataclass(frozen=True)
class Window:
    """Consecutive rows of an input.

    Attributes:
        first: index in the input of the first one.
        rows: the rows; for one that could not be read, the error.
        task: oracle task ID, one for all rows or one per row. It masks the pool.
    """

    first: int
    rows: Sequence[Row | WorkError]
    task: TaskID = None


class _Gathered:
    """Rows that will form a window."""

    def __init__(self, task: TaskID) -> None:
        self.task, self.first = task, 0
        self.rows: list[Row | WorkError] = []
        self.characters = 0

    def add(self, row: Row | WorkError) -> None:
        self.rows.append(row)
        if isinstance(row, Row):
            self.characters += len(row.text) + len(row.instruction)

    @property
    def full(self) -> bool:
        return len(self.rows) >= WINDOW or self.characters >= WINDOW_TEXT

    def take(self) -> Window:
        rows, first, end = self.rows, self.first, self.first + len(self.rows)
        self.first, self.rows, self.characters = end, [], 0
        return Window(
            first, rows, self.task if self.task is None or isinstance(self.task, str) else self.task[first:end]
        )


def windows_of(rows: Rows, task: TaskID) -> Iterator[Window]:
    """Split rows into windows, which depend on the rows alone. If reading fails, rows read before are still yielded.

    Args:
        task: oracle task ID, one for all rows or one per row. It masks the pool.
    """
    gathered, failed = _Gathered(task), None
    rows = iter(rows)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            break
        except Exception as error:
            failed = error
            break
        gathered.add(row)
        if gathered.full:
            yield gathered.take()
    if gathered.rows:
        yield gathered.take()
    if failed is not None:
        raise failed


def is_live(stream: IO[bytes]) -> bool:
    """Whether a program may be behind a stream and wait for answers: it is a pipe, a socket or a terminal."""
    try:
        kind = os.fstat(stream.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return False
    return not stat.S_ISREG(kind)


class Feed:
    """Rows of a live stream, read by a thread while others are answered.

    The stream is left open, and not read any more once the feed is closed.

    Args:
        stream: see `is_live`.
        read: returns the rows of a stream.
    """

    def __init__(self, stream: IO[bytes], read: Callable[[IO[bytes]], Rows]) -> None:
        self._changed = threading.Condition()
        self._gathered = _Gathered(None)
        self._idle = self._ended = self._closed = False
        self._failed: Exception | None = None
        self._arriving = _Arriving(stream, self._note)
        # A daemon, so that waiting for a row cannot keep the interpreter from exiting.
        self._thread = threading.Thread(target=self._read, args=(read,), name="read", daemon=True)

    def __enter__(self) -> Feed:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._arriving.stop()
        self._thread.join(1.0)
        if not self._thread.is_alive():
            self._arriving.release()

    def windows(self, task: str | None) -> Iterator[Window | None]:
        """Full windows, or what there is when the input pauses or ends; None when there is nothing more to answer
        yet."""
        gathered, told = self._gathered, False
        gathered.task = task
        while True:
            with self._changed:
                while not (gathered.full or self._ended or (self._idle and (gathered.rows or not told))):
                    self._changed.wait()
                window = gathered.take() if gathered.rows else None
                self._changed.notify_all()
                ended = self._ended
            told = window is None
            if window is not None or not ended:
                yield window
            else:
                break
        if self._failed is not None:
            raise self._failed

    def _read(self, read: Callable[[IO[bytes]], Rows]) -> None:
        try:
            for row in read(io.BufferedReader(self._arriving, 1 << 16)):
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or not self._gathered.full)
                    if self._closed:
                        return
                    self._gathered.add(row)
                    if self._gathered.full:
                        self._changed.notify_all()
        except Exception as error:
            self._failed = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _note(self, idle: bool) -> None:
        with self._changed:
            self._idle = idle
            self._changed.notify_all()


class _Arriving(io.RawIOBase):
    """The bytes of a live stream as they arrive. `note` is called when none came for a moment, and when they continue.

    It waits without holding the stream's own lock, on which the interpreter's exit would block.
    """

    def __init__(self, stream: Any, note: Callable[[bool], None]) -> None:
        self._note = note
        self._take = getattr(stream, "read1", stream.read)
        self._held = _at_once(stream.fileno(), self._take)
        self._stopping, self._stop = os.pipe()
        self._poll = select.poll()
        self._poll.register(stream.fileno(), select.POLLIN)
        self._poll.register(self._stopping, select.POLLIN)

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        data: bytes | None = self._held or None
        while data is None:  # as non-blocking streams may return
            found = self._poll.poll(PAUSE)
            if not found:
                self._note(True)
                found = self._poll.poll()
                self._note(False)
            if any(descriptor == self._stopping for descriptor, _ in found):
                return 0
            data = self._take(CHUNK)
        count = min(len(data), len(into))
        into[:count], self._held = data[:count], data[count:]
        return count

    def stop(self) -> None:
        """Let readers see the end of the stream."""
        os.write(self._stop, b".")

    def release(self) -> None:
        os.close(self._stop)
        os.close(self._stopping)


def _at_once(descriptor: int, take: Callable[[int], bytes | None]) -> bytes:
    """What a stream has without waiting: its own buffer may hold lines that poll does not know of."""
    blocking = os.get_blocking(descriptor)
    os.set_blocking(descriptor, False)
    try:
        return take(CHUNK) or b""
    finally:
        os.set_blocking(descriptor, blocking)
