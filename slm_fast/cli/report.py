"""`slm-fast report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from slm_fast.cli.arguments import Verbs


def add(verbs: Verbs) -> None:
    about = "one HTML page of what runs of the continual-learning benchmark came to"
    report = verbs.add("report", run, about, store=False)
    report.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="the folder of a run, finished or not")
    report.add_argument("--output", metavar="FILE", type=Path, help="default: report.html in the first RUN")
    report.add_argument(
        "--files",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="beside the page, its figures as PNG and its numbers as CSV and JSON",
    )


def run(arguments: argparse.Namespace) -> int:
    from slm_fast.report import check_output, run_report, save

    output = arguments.output or arguments.runs[0] / "report.html"
    if arguments.output is not None or output.parent.is_dir():
        check_output(output, files=arguments.files)
    save(run_report(arguments.runs, command=arguments.command), output, files=arguments.files)
    print(output)
    return 0
