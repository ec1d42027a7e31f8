"""Progress bars on standard error, and nothing when it is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

Advance = Callable[..., None]  # advance(n, note="loss 0.3")


@contextmanager
def bar(title: str, total: int | None, show: bool | None = None) -> Iterator[Advance]:
    """A bar with a count and the time left. `show=None` shows it on a terminal only."""
    enabled = sys.stderr.isatty() if show is None else show
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not enabled) as progress:
        task = progress.add_task(title, total=total, note="")

        def advance(n: int = 1, note: str | None = None) -> None:
            if note is None:
                progress.update(task, advance=n)
            else:
                progress.update(task, advance=n, note=note)

        yield advance
