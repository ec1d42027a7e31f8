"""Mixed-task inference against its alternatives: rows/s and peak memory on the same rows and batches.

    python -m benchmarks.speed.inference --data DIR                                # one section, backbone and dtype
    python -m benchmarks.speed.inference --data DIR --section ways tasks --backbone minilm bert-base --dtype bfloat16
    python -m benchmarks.speed.inference --data DIR --section user                 # from texts to answers
    python -m benchmarks.speed.inference --plot

Each section, backbone and dtype runs in a process of its own, whose lines are saved to the CSV when it ends. All other
lines are kept; with --ways, so are those of other ways. Ways are called in turns, and a ratio is one of medians within
one run. Backbones other than MiniLM have random weights and the layer shapes of their names, with fewer layers if the
machine requires it. The texts are those of the five tasks in DIR/classification; without it, generated ones of the same
lengths.

ways:     one pass over tokenised batches of about 2,048 tokens. All ways run on the same base with the same linear
          layers, except "plain transformers", which is the unmodified model.
tasks:    5 and 200 tasks in the pool.
user:     from texts to labels: plain transformers in fixed batches in arrival order, and slm_fast; MiniLM.
profile:  where the time of a pass goes, as text next to the CSV.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.arguments import Parser, at_least, exit_status, output_file
from benchmarks.figures import panels
from benchmarks.speed.inference.sections import BACKBONES, SECTIONS, claims, profile
from benchmarks.speed.inference.ways import BARE, OURS
from benchmarks.speed.texts import add_data
from benchmarks.tables import RESULTS, not_in, read_csv, table, write_csv

COMMAND = "slm-fast bench inference"


Part = tuple[str, ...]  # section, backbone, dtype


def part_of(row: Mapping[str, Any]) -> Part:
    """The part (one process) that measures this row. The section `user` chooses its own dtypes."""
    return row["section"], row["backbone"], "" if row["section"] == "user" else row["dtype"]


def merge(path: Path, found: list[dict[str, Any]], *, ways: bool = False) -> list[dict[str, Any]]:
    """The lines of a CSV with those of the same part replaced; with `ways`, only those of the same ways in it."""

    def key(row: Mapping[str, Any]) -> Part:
        return (*part_of(row), row["way"]) if ways else part_of(row)

    return sorted([*not_in(found, path, key), *found], key=part_of)


def plot(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Rows/s of every way, relative to the bare backbone."""
    own = [row for row in rows if row["section"] == "ways" and row["way"] != BARE]
    if not own:
        return
    backbones = [name for name in BACKBONES if any(row["backbone"] == name for row in own)]
    names = list(dict.fromkeys(row["way"] for row in own))
    figure, found = panels(len(backbones), 3.2, 2.6)
    for panel, backbone in zip(found, backbones, strict=True):
        for row in own:
            if row["backbone"] == backbone:
                place = names.index(row["way"]) + (0.2 if row["dtype"] == "bfloat16" else -0.2)
                colour = "tab:blue" if row["way"] == OURS else "tab:gray"
                bars = panel.barh(place, float(row["to_first"]), 0.38, color=colour)
                bars.patches[0].set_alpha(0.55 if row["dtype"] == "bfloat16" else 1.0)
                panel.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
        layers = {row["layers"] for row in own if row["backbone"] == backbone}
        panel.set_title(f"{backbone}, {', '.join(sorted(layers))} layers", fontsize=10)
        panel.axvline(1.0, color="black", linewidth=0.8)
        panel.set_yticks(range(len(names)), names, fontsize=8)
        panel.set_xlim(0, 1.2)
    found[0].invert_yaxis()
    for panel in found[-2:]:
        panel.set_xlabel("rows/s, the bare backbone's being 1\n(dark: float32, light: bfloat16)", fontsize=9)
    figure.savefig(path)


def parts(options: argparse.Namespace) -> list[Part]:
    """The sections, backbones and dtypes to run. The section `user` has one backbone and its own dtypes."""
    chosen = itertools.product(options.section, options.backbone, options.dtype)
    return list(dict.fromkeys(("user", "minilm", "float32") if one[0] == "user" else one for one in chosen))


def run_part(options: argparse.Namespace) -> int:
    """Measure one part in this process and print a profile, or its lines as JSON."""
    (options.section,), (options.backbone,), (options.dtype,) = options.section, options.backbone, options.dtype
    torch.set_num_threads(options.threads)
    result = profile(options) if options.section == "profile" else json.dumps(SECTIONS[options.section](options))
    print(result)
    return 0


def main() -> int:
    parser = Parser(COMMAND, __doc__)
    add_data(parser)
    parser.add_argument("--section", choices=[*SECTIONS, "profile"], nargs="+", default=["ways"])
    parser.add_argument("--backbone", choices=list(BACKBONES), nargs="+", default=["minilm"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), nargs="+", default=["float32"])
    parser.add_argument("--layers", type=at_least(1), help="layers of a backbone with random weights")
    parser.add_argument(
        "--encoder-layers", type=at_least(1), help="layers of the second model, if it has random weights"
    )
    parser.add_argument("--batches", type=at_least(1), help="number of batches; default: by backbone")
    parser.add_argument(
        "--batch-tokens", type=at_least(1), help="tokens per batch, padding included; default: by backbone"
    )
    parser.add_argument("--ways", help="run only ways whose names contain this, and the bare backbone")
    parser.add_argument("--rows", type=at_least(1), default=200, help="rows of the section user")
    parser.add_argument("--rounds", type=at_least(1), default=5, help="calls of each way")
    parser.add_argument("--label", help="added to the file name of a profile")
    parser.add_argument("--threads", type=at_least(1), default=torch.get_num_threads())
    parser.add_argument("--output", type=output_file, default=RESULTS / "inference.csv")
    parser.add_argument("--plot", action="store_true", help="only plot the CSV")
    parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.part:
        return run_part(options)
    for part in [] if options.plot else parts(options):
        section, backbone, dtype = part
        own = ["--section", section, "--backbone", backbone, "--dtype", dtype, "--part"]
        command = [sys.executable, "-m", "benchmarks.speed.inference", *sys.argv[1:], *own]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            return done.returncode  # it has printed the error
        if section == "profile":
            print(done.stdout)
            label = f".{options.label}" if options.label else ""
            path = options.output.with_name(f"{options.output.stem}_profile_{backbone}_{dtype}{label}.txt")
            path.write_text(done.stdout)
            continue
        found = json.loads(done.stdout)
        print("\n".join([table(found), *claims(found)]))
        rows = merge(options.output, found, ways=options.ways is not None)
        kept = "; ".join(dict.fromkeys(" ".join(part_of(row)).strip() for row in rows if row not in found))
        write_csv(options.output, rows, {"kept from earlier runs": kept} if kept else None)
    if options.output.exists():
        plot(read_csv(options.output), options.output.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(COMMAND, main))
