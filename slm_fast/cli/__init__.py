"""The command line: `slm-fast VERB ...`. Each module implements one or more verbs, and its `add` declares arguments.

Exit status: 0 for success, 2 for invalid usage, 1 for any other error. An error is one line.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from slm_fast.cli.interrupt import Command, interrupted


def main(argv: Sequence[str] | None = None) -> int:
    Command.alone = argv is None
    try:
        from slm_fast.cli.shell import run  # here, so that Ctrl-C prints one line from the first import on

        return run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        return interrupted()
