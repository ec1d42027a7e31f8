"""`slm-fast predict`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_fast.cli.arguments import (
    STDIN,
    Once,
    Verbs,
    add_predict_options,
    add_reading_options,
    backbone_of,
    complain,
    fields_of,
    open_store,
    quiet_ray,
    tell_idle_options,
)
from slm_fast.errors import InputError
from slm_fast.options import PredictOptions
from slm_fast.streams import Kind, kind_of

if TYPE_CHECKING:
    from slm_fast.predict_file import FileAnswered, Sink, Source


def add(verbs: Verbs) -> None:
    predict = verbs.add("predict", run, "answer rows of any tasks, mixed in any order")
    predict.add_argument(
        "--input",
        action=Once,
        default="-",
        help='JSON Lines with {"text": ...} or {"instruction": ..., "input": ...}, or any file that `learn` reads; - '
        "reads standard input",
    )
    predict.add_argument(
        "--output",
        action=Once,
        default="-",
        help="JSON Lines (.gz is supported) in the order of the input; run the same command again to resume. A "
        ".parquet file is written at the end and cannot be resumed; - writes standard output",
    )
    predict.add_argument("--overwrite", action="store_true", help="replace an existing output instead of resuming")
    predict.add_argument("--strict", action="store_true", help="stop at the first bad row")
    predict.add_argument("--task", help="use this task for every row instead of routing (oracle task ID)")
    predict.add_argument(
        "--top-k",
        type=_count,
        default=1,
        metavar="N",
        help="report the probabilities of the N best labels, or of 'all'",
    )
    about = "answer part I of N of the input file, one process per part; join the outputs with `cat`"
    predict.add_argument("--shard", type=_shard, metavar="I/N", help=about)
    about = "distribute rows over a Ray cluster: HOST:PORT, auto (the running cluster) or local"
    predict.add_argument("--ray", metavar="ADDRESS", help=about)
    about = "Ray actors, one model each (default: one per GPU or, without GPUs, one per node)"
    predict.add_argument("--actors", type=int, metavar="N", help=about)
    add_reading_options(predict, label=False)
    add_predict_options(predict)


def _count(text: str) -> int | None:
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or all, got {text!r}") from None


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts):
        return int(part), int(parts)
    raise argparse.ArgumentTypeError(f"expected I/N such as 1/4, I from 1 to N, got {text!r}")


def run(arguments: argparse.Namespace) -> int:
    from slm_fast.predict_file import Reading, check_paths

    # All usage errors are found before the model is loaded.
    options = PredictOptions(**fields_of(arguments, PredictOptions))
    source = sys.stdin.buffer if arguments.input in STDIN else Path(arguments.input)
    sink = sys.stdout if arguments.output in ("-", "/dev/stdout") else Path(arguments.output)
    columns = {"delimiter": arguments.delimiter, "encoding": arguments.encoding, "text": arguments.text_column}
    check_paths(source, sink, overwrite=arguments.overwrite, reading=Reading(**columns), shard=arguments.shard)
    how = {name: getattr(arguments, name) for name in ("task", "shard", "strict", "overwrite")}
    if arguments.ray is not None:
        with quiet_ray():
            done = _on_ray(arguments, source, sink, options, reading=Reading(**columns), **how)
    elif arguments.actors is not None:
        raise InputError("--actors: goes with --ray")
    else:
        done = open_store(arguments).predict_file(source, sink, options, **columns, **how)
    if done.failed:
        rows = f"{done.failed} row{'s' * (done.failed > 1)}"
        return complain(f"{rows} failed; each is marked with its error in the output; first: {done.first_error}", 1)
    if isinstance(sink, Path) and kind_of(sink) is Kind.FILE:
        print(f"rows answered: {done.answered:,}; rows in {sink}: {done.before + done.answered:,}", file=sys.stderr)
    return 0


def _on_ray(
    arguments: argparse.Namespace, source: Source, sink: Sink, options: PredictOptions, **how: Any
) -> FileAnswered:
    """Answer on the actors of a Ray cluster, which open the same model as `open_store` would."""
    from slm_fast.hub import find_store
    from slm_fast.integrations.ray_pool import StorePool

    find_store(arguments.store)
    opening = {
        name: getattr(arguments, name)
        for name in ("actors", "threads", "dtype", "device", "skip_damaged", "device_memory")
    }
    with StorePool(arguments.store, address=arguments.ray, backbone=backbone_of(arguments), **opening) as pool:
        tell_idle_options(arguments, pool.kind, pool.has_heads)
        return pool.predict_file(source, sink, options, **how)
