"""`slm-fast report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from slm_fast.cli.arguments import Verbs


def add(verbs: Verbs) -> None:
    about = "make an HTML report of continual-learning benchmark runs"
    report = verbs.add("report", run, about, store=False)
    report.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run, finished or not")
    report.add_argument(
        "--output", metavar="FILE", type=Path, help="output file (default: report.html in the first RUN)"
    )
    report.add_argument(
        "--files",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also write figures (PNG) and numbers (CSV, JSON)",
    )


def run(arguments: argparse.Namespace) -> int:
    from slm_fast.report import check_output, run_report, save

    output = arguments.output or arguments.runs[0] / "report.html"
    if arguments.output is not None or output.parent.is_dir():
        check_output(output, files=arguments.files)
    save(run_report(arguments.runs, command=arguments.command), output, files=arguments.files)
    print(output)
    return 0
