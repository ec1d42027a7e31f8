"""What the operators' benchmarks share: command-line options, and running case after case into a CSV."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.arguments import Parser, at_least, duration, output_file
from benchmarks.speed.timing import Times, time_together, undisturbed
from benchmarks.tables import RESULTS, not_in, read_csv, table, write_csv

Case = TypeVar("Case")
Ways = dict[str, Callable[[], object]]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def measure(ways: Ways, options: argparse.Namespace, apart: Collection[str] = ()) -> tuple[dict[str, Times], float]:
    """The times of all ways, called in turns, and the share of the machine that other processes used meanwhile."""
    return undisturbed(lambda: time_together(ways, seconds=options.seconds, apart=apart), patience=options.patience)


def times_of(times: Times, best: float, floor: float) -> dict[str, str]:
    """The columns common to all operators."""
    return {
        "p20_ms": f"{times.p20:.3f}",
        "p50_ms": f"{times.p50:.3f}",
        "p80_ms": f"{times.p80:.3f}",
        "to_best_alternative": f"{times.p50 / best:.2f}",
        "to_floor": f"{times.p50 / floor:.2f}",
    }


def case_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What was measured: the columns before the times, except the way."""
    names = list(row)
    return tuple(str(row[name]) for name in names[: names.index("p20_ms")] if name != "way")


def run(
    description: str | None,
    stem: str,
    targets: Sequence[Case],
    sweep: Sequence[Case],
    lines: Callable[[Case, argparse.Namespace], list[dict[str, Any]]],
    plot: Callable[[list[dict[str, str]], Path], None] | None,
    arguments: Sequence[str],
) -> int:
    """Run the whole command: measure the chosen cases, print and save what `lines` returns for each.

    A benchmark without `plot` has no sweep.
    """
    parser = Parser(f"python -m benchmarks.speed.operators.bench_{stem}", description)
    parser.set_defaults(sweep=False)
    if plot:
        parser.add_argument("--sweep", action="store_true", help="measure every axis around the targets, and plot")
    parser.add_argument("--compiled", action="store_true", help="also torch.compile the strongest alternative (slow)")
    parser.add_argument("--seconds", type=duration, default=0.5, help="seconds per way and case")
    about = "numbers of the cases to run, from 0; rows of the others stay in the file"
    parser.add_argument("--only", type=at_least(0), nargs="*", help=about)
    parser.add_argument("--patience", type=duration, default=0.0, help="seconds to wait for an idle machine, per case")
    parser.add_argument("--threads", type=at_least(1), default=torch.get_num_threads())
    parser.add_argument(
        "--output", type=output_file, help=f"default: benchmarks/results/{stem}.csv or {stem}_sweep.csv"
    )
    options = parser.parse_args(arguments)
    cases = sweep if options.sweep else targets
    chosen = range(len(cases)) if options.only is None else options.only
    if any(not 0 <= number < len(cases) for number in chosen):
        parser.error(f"--only: expected numbers in 0..{len(cases) - 1}, got {options.only}")
    torch.set_num_threads(options.threads)
    output = options.output or RESULTS / f"{stem}{'_sweep' if options.sweep else ''}.csv"
    rows: list[dict[str, Any]] = []
    for number in chosen:
        found = lines(cases[number], options)
        print(f"case {number} of {len(cases)}\n{table(found)}", flush=True)
        rows += found
        kept = [] if options.only is None else not_in(rows, output, case_of)
        write_csv(output, kept + rows, {"kept from earlier runs": f"{len(kept)} rows"} if kept else None)
    if plot and options.sweep:
        plot(read_csv(output), output.with_suffix(".png"))
    print(f"saved to {output}")
    return 0
