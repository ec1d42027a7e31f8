"""The command line: `slm-fast VERB ...`, a module a verb or a few. Each has `add`, which says what the verb takes.

Exit status: 0 done; 2 the call as written cannot be right; 1 anything found wrong after. An error is one line.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from slm_fast.cli import bench, demo, doctor, evaluate, learn, predict, store
from slm_fast.cli.arguments import Parser, Verbs, complain
from slm_fast.errors import SlmError, SlmWarning

VERBS = (demo, learn, predict, evaluate, store, bench, doctor)  # in the order of --help


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        with _one_line_warnings():
            status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except SlmError as error:
        return complain(str(error), error.status)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads: say no more
        return 1
    except KeyboardInterrupt:
        return complain("interrupted", 130)
    except (OSError, MemoryError) as error:
        return complain(f"{type(error).__name__}: {error}", 1)


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
