"""The command line: `slm-fast VERB ...`. Each module implements one or more verbs, and its `add` declares arguments.

Exit status: 0 for success, 2 for invalid usage, 1 for any other error. An error is one line.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

_command = False  # whether the process is there for this command alone


def main(argv: Sequence[str] | None = None) -> int:
    global _command
    _command = argv is None
    try:
        from slm_fast.cli.shell import run  # here, so that Ctrl-C prints one line from the first import on

        return run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        return interrupted()


def interrupted() -> int:
    """Say so, and return the exit status. Another Ctrl-C then ends a command at once, without a traceback."""
    if _command:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    print("slm-fast: error: interrupted", file=sys.stderr)
    return 130
