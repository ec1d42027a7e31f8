"""Run the operators' benchmarks one after the other, or those named, with the same options.

    slm-fast bench ops [multi_lora] [retrieve] [--sweep] ...

`slm-fast bench ops multi_lora --help` and `... retrieve --help` list the options.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.speed.operators import bench_multi_lora, bench_retrieve

BENCHMARKS = {"multi_lora": bench_multi_lora.main, "retrieve": bench_retrieve.main}


def main(arguments: Sequence[str]) -> int:
    named = [name for name in BENCHMARKS if name in arguments]
    if not named and {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    names = named or list(BENCHMARKS)
    options = [argument for argument in arguments if argument not in BENCHMARKS]
    if len(names) > 1 and any(option.startswith("--output") for option in options):
        print(
            "slm-fast bench ops: error: --output: one file is for one benchmark; name multi_lora or retrieve",
            file=sys.stderr,
        )
        return 2
    return max(BENCHMARKS[name](options) for name in names)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
