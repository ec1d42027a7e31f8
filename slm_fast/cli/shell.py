"""Between the verbs and the shell: streams, exit status, and one-line errors and warnings."""

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
from slm_fast.cli.interrupt import interrupted
from slm_fast.errors import SlmError, SlmWarning, lacks_memory, one_line, warn
from slm_fast.idle import IdleOption

# In the order of --help.
VERBS = (demo, learn, predict, evaluate, serve, store, adapters, lm_eval, report, bench, doctor)


def run(argv: Sequence[str]) -> int:
    """Run a command and return its exit status. An error is one line on standard error; a bug is a traceback."""
    _open_closed_streams()
    _speak_utf8()
    with one_line_warnings():
        try:
            arguments = _parser().parse_args(with_share(argv))
            arguments.command = shlex.join(["slm-fast", *argv])
            status = _run(arguments, argv)
        except SystemExit as stop:  # argparse has printed its message
            status = int(stop.code or 0)
        return _flush(status)


def _run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    from slm_fast.progress import in_lines  # rich takes a while

    try:
        with in_lines():
            return arguments.run(arguments)
    except SlmError as error:
        return complain(_as_typed(str(error), argv), error.status)
    except BrokenPipeError:
        _discard_output()  # the reader is gone
        return 1
    except BaseException as error:
        causes = list(_causes(error))
        # During an import, Ctrl-C may surface as an ImportError.
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
            return interrupted()
        for cause in causes:
            if lacks_memory(cause):
                return complain(f"not enough memory: {one_line(cause)}", 1)
        if isinstance(error, OSError):
            where = error.filename or "standard output"
            return _flush(0) or complain(f"{where}: {error.strerror or error}", 1)
        raise


def _as_typed(message: str, argv: Sequence[str]) -> str:
    """A message that begins with the Python name of an option, with the option as it was typed instead."""
    name, colon, rest = message.partition(":")
    flag = f"--{name.replace('_', '-')}"
    return f"{flag}{colon}{rest}" if any(word.partition("=")[0] == flag for word in argv) else message


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its chain of causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _flush(status: int) -> int:
    """Flush the output and return the exit status. If `status` is not 0, its error has already been printed."""
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
    """Discard unwritten standard output, which the interpreter would otherwise try to write at exit."""
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
            warn("standard output is closed: the output is lost")
        return len(text)


def _open_closed_streams() -> None:
    """Replace streams that the caller closed with empty ones, so that no other file gets their descriptors."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, which is this one
        if name == "stdin":
            sys.stdin = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        elif name == "stdout":
            sys.stdout = _Closed()
        else:
            sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _speak_utf8() -> None:
    """Write UTF-8 to files and pipes regardless of the locale, and never fail on characters that a terminal lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            encoding = stream.encoding if stream.isatty() else "utf-8"
            stream.reconfigure(encoding=encoding, errors="backslashreplace")


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Print each warning of this package as one line, every time."""

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
        warnings.simplefilter("ignore", IdleOption)  # `tell_idle_options` says it
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
