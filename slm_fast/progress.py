"""Progress bars on standard error, shown only on a terminal by default."""

from __future__ import annotations

import sys
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


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} rows/s" if speed >= 10 else f"{speed:.1f} rows/s")


def is_shown(show: bool | None) -> bool:
    """Whether a bar is shown: None shows it on a terminal only."""
    return sys.stderr.isatty() if show is None else show


@contextmanager
def bar(title: str, total: int | None, show: bool | None = None, *, done: int = 0) -> Iterator[Advance]:
    """A bar with a count, rows/s and the remaining time. show: None shows it on a terminal only. done: rows that are
    already done."""
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
