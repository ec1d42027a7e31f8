"""The command line: `slm-fast VERB ...`, a module a verb or a few. Each has `add`, which says what the verb takes.

Exit status: 0 done; 2 the call as written cannot be right; 1 anything found wrong after. An error is one line.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    try:
        from slm_fast.cli.shell import run  # in here, so that Ctrl-C is one line from the first import on

        return run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print("slm-fast: error: interrupted", file=sys.stderr)
        return 130
