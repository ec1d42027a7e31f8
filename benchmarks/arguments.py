"""Shared by the benchmarks' commands: arguments that are checked before anything runs, and errors of one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from slm_fast import SlmError
from slm_fast.cli import arguments


class Parser(arguments.Parser):
    """Reports a usage error in one line.

    Args:
        command: what the user types, such as "slm-fast bench ops".
        about: the module's docstring.
    """

    def __init__(self, command: str, about: str | None) -> None:
        super().__init__(command, description=about, formatter_class=argparse.RawDescriptionHelpFormatter)


def exit_status(command: str, main: Callable[[], object]) -> int:
    """Run a command. Its return value, if it is an integer, is its exit status; an SlmError is printed in one line."""
    try:
        status = main()
    except SlmError as error:
        print(f"{command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.status
    return status if isinstance(status, int) else 0


# Types for argparse.


def at_least(least: int) -> Callable[[str], int]:
    """Whole numbers from `least` on."""

    def number(text: str) -> int:
        if not text.strip().lstrip("+-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, got {text!r}")
        return int(text)

    return number


def counts(text: str) -> list[int]:
    """Comma-separated whole numbers from 1 on, ascending."""
    found = [at_least(1)(part) for part in text.split(",")]
    if found != sorted(set(found)):
        raise argparse.ArgumentTypeError(f"expected ascending numbers, got {text!r}")
    return found


def duration(text: str) -> float:
    """A number that is not negative."""
    try:
        found = float(text)
    except ValueError:
        found = -1
    if not 0 <= found < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds, got {text!r}")
    return found


def output_file(text: str) -> Path:
    """A path that can be written; its folder is created."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        path.open("a").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: cannot be written: {error.strerror}") from None
    return path


def work_folder(text: str) -> Path:
    """A folder, created if it is missing."""
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: is no folder: {error.strerror}") from None
    return Path(text)
