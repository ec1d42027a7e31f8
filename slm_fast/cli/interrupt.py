"""What a command says when Ctrl-C ends it."""

from __future__ import annotations

import signal
import sys


class Command:
    """Whether the process is there for one command alone, which its entry point sets."""

    alone = False


def interrupted() -> int:
    """Say so, and return the exit status. Another Ctrl-C then ends a command at once, without a traceback."""
    if Command.alone:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    print("slm-fast: error: interrupted", file=sys.stderr)
    return 130
