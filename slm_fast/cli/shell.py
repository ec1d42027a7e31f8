"""What lies between the verbs and the shell: streams, exit status, and errors and warnings of one line."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TextIO

from slm_fast.cli import adapters, bench, demo, doctor, evaluate, learn, lm_eval, predict, report, serve, store
from slm_fast.cli.arguments import Parser, Verbs, complain, with_share
from slm_fast.errors import SlmError, SlmWarning, lacks_memory, one_line, warn

# In the order of --help.
VERBS = (demo, learn, predict, evaluate, serve, store, adapters, lm_eval, report, bench, doctor)


def run(argv: Sequence[str]) -> int:
    """The exit status of a call. What is wrong is said in one line of standard error; a bug of ours is a traceback."""
    _open_closed_streams()
    _speak_utf8()
    with _one_line_warnings():
        try:
            arguments = _parser().parse_args(with_share(argv))
            arguments.command = shlex.join(["slm-fast", *argv])
            status = _run(arguments)
        except SystemExit as stop:  # argparse has said what there is to say
            status = int(stop.code or 0)
        return _flush(status)


def _run(arguments: argparse.Namespace) -> int:
    try:
        return arguments.run(arguments)
    except SlmError as error:
        return complain(str(error), error.status)
    except BrokenPipeError:
        _discard_output()  # nobody reads: say no more
        return 1
    except BaseException as error:
        causes = list(_causes(error))
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes):  # of an import, it may end as ImportError
            return complain("interrupted", 130)
        for cause in causes:
            if lacks_memory(cause):
                return complain(f"not enough memory: {one_line(cause)}", 1)
        if isinstance(error, OSError):
            where = error.filename or "standard output"
            return _flush(0) or complain(f"{where}: {error.strerror or error}", 1)
        raise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _flush(status: int) -> int:
    """The exit status once all is written; one that is not 0 has had its line."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        return status or 1
    except OSError as error:
        _discard_output()
        return status or complain(f"standard output: cannot be written: {error.strerror or error}", 1)
    return status


def _discard_output() -> None:
    """What standard output has not taken is dropped: the interpreter would try again when it ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Streams


class _Closed(io.TextIOBase):
    """Standard output that was closed by the caller (`>&-`)."""

    told = False

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if not self.told:
            self.told = True
            warn("standard output is closed: what would stand there is lost")
        return len(text)


def _open_closed_streams() -> None:
    """Streams that the caller closed are empty, and their numbers are taken, so that no file of ours gets them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which is this one
        if name == "stdin":
            sys.stdin = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        elif name == "stdout":
            sys.stdout = _Closed()
        else:
            sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _speak_utf8() -> None:
    """Files and pipes get UTF-8 whatever the locale; a terminal knows its own encoding. No letter is an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            encoding = stream.encoding if stream.isatty() else "utf-8"
            stream.reconfigure(encoding=encoding, errors="backslashreplace")


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """This package's warnings are for whoever typed the command: one line each, every time."""

    others = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, SlmWarning):
            print(f"slm-fast: warning: {' '.join(str(message).split())}", file=sys.stderr)
        else:
            others(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.simplefilter("always", SlmWarning)
        warnings.showwarning = show
        yield


def _parser() -> argparse.ArgumentParser:
    from slm_fast import __version__

    parser = Parser(
        prog="slm-fast", description="One frozen language model that learns task after task and answers mixed batches."
    )
    parser.add_argument("--version", action="version", version=f"slm-fast {__version__}")
    verbs = Verbs(parser)
    for module in VERBS:
        module.add(verbs)
    return parser
