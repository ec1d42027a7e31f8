"""Progress on standard error: by default a bar on a terminal, and for commands elsewhere now and then a line."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Advance = Callable[..., None]  # advance(n, note="loss 0.3")
FIRST_LINE, LONGEST_PAUSE = 30.0, 300.0  # seconds until the first line where no bar is shown, and at most between lines


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else _speed(speed))


_in_lines = False


@contextmanager
def in_lines() -> Iterator[None]:
    """Inside the block, progress that is shown by default is lines where standard error is not a terminal."""
    global _in_lines
    before, _in_lines = _in_lines, True
    try:
        yield
    finally:
        _in_lines = before


def is_shown(show: bool | None) -> bool:
    """Whether progress is shown: None shows it on a terminal, and inside `in_lines` as lines elsewhere."""
    return _in_lines or sys.stderr.isatty() if show is None else show


@contextmanager
def bar(title: str, total: int | None, show: bool | None = None, *, done: int = 0) -> Iterator[Advance]:
    """A bar with a count, rows/s and the remaining time, or lines of the same.

    Args:
        show: None shows a bar on a terminal, and inside `in_lines` lines elsewhere.
        done: rows that are already done.
    """
    if show is None and is_shown(show) and not sys.stderr.isatty():
        yield _lines(title, total, done)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        _Speed(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not is_shown(show)) as progress:
        task = progress.add_task(title, total=total, completed=done, note="")

        def advance(n: int = 1, note: str | None = None) -> None:
            if note is None:
                progress.update(task, advance=n)
            else:
                progress.update(task, advance=n, note=note)

        yield advance


def _lines(title: str, total: int | None, before: int) -> Advance:
    """Prints a line after `FIRST_LINE` seconds and then at intervals that grow up to `LONGEST_PAUSE`."""
    began = time.monotonic()
    due, done, said = began + FIRST_LINE, before, ""

    def advance(n: int = 1, note: str | None = None) -> None:
        nonlocal due, done, said
        done, said = done + n, said if note is None else note
        now = time.monotonic()
        if now < due or done == total:
            return
        speed = (done - before) / (now - began)
        of = "" if total is None else f" of {total:,}"
        left = f", {_duration((total - done) / speed)} left" if total and speed else ""
        print(f"{title}: {done:,}{of} rows, {_speed(speed)}{left}{said and f', {said}'}", file=sys.stderr, flush=True)
        due = now + min(max(FIRST_LINE, (now - began) / 4), LONGEST_PAUSE)

    return advance


def _speed(speed: float) -> str:
    return f"{speed:,.0f} rows/s" if speed >= 10 else f"{speed:.1f} rows/s"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
