"""A stream of text-classification tasks learned in sequence: accuracy, forgetting and routing, beside rivals.

    python -m benchmarks.continual.run --data DIR --order 4 --train 1500 --test 500

DIR holds a folder a task (ag_news, yelp, amazon, dbpedia, yahoo) with train.jsonl.gz, test.jsonl.gz and labels.json.
Each method runs in a process of its own, for its peak memory. Results: benchmarks/results/stream_order<N>.csv and .png.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.continual.methods import METHODS
from benchmarks.continual.methods.slm import Slm
from benchmarks.continual.report import plot, show
from benchmarks.continual.streams import ORDERS, load
from benchmarks.tables import RESULTS, read_csv, read_head, write_csv
from slm_fast import SlmError
from slm_fast.evaluate import forgetting
from slm_fast.options import LearnOptions


def run(method: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Learn the stream with one method: a record for each (task learned, task evaluated)."""
    names = ORDERS[arguments.order]
    train = {name: load(arguments.data, name, "train", arguments.train) for name in names}
    test = {name: load(arguments.data, name, "test", arguments.test) for name in names}
    learner = METHODS[method].make(
        train, arguments.max_length, LearnOptions(epochs=arguments.epochs, seed=arguments.seed)
    )
    history: list[dict[str, float]] = []
    records: list[dict[str, Any]] = []
    for number, name in enumerate(names, 1):
        started = time.perf_counter()
        learner.learn(train[name])
        seconds = time.perf_counter() - started
        evaluation = learner.evaluate({seen: test[seen] for seen in names[:number]})
        history.append(evaluation.accuracy)
        lost = forgetting(history)[-1]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{method}: learned {name} in {seconds:.0f} s, average {100 * evaluation.average:.2f} %", file=sys.stderr)
        for seen in names[:number]:
            records.append(
                {
                    "order": arguments.order,
                    "method": method,
                    "after": name,
                    "task": seen,
                    "accuracy": round(evaluation.accuracy[seen], 5),
                    "routing": round(evaluation.routing[seen], 5) if evaluation.routing else "",
                    "forgetting": round(lost, 5),
                    "seconds": round(seconds, 1),
                    "peak_mib": round(peak),
                    "sha256": learner.digest(seen) if isinstance(learner, Slm) else "",
                }
            )
    if isinstance(learner, Slm) and arguments.invariance:
        rerouted, change = learner.invariance(test, arguments.invariance)
        print(
            f"{method}: {arguments.invariance} mixed rows in another order and batch size: {rerouted} routes change, "
            f"outputs by at most {change:.1e}",
            file=sys.stderr,
        )
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description="Learn the five tasks in sequence, with slm_fast and with rivals.")
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder a task")
    parser.add_argument("--order", type=int, choices=sorted(ORDERS), default=4, help="the paper's task sequence")
    parser.add_argument("--train", type=int, default=1500, help="training rows a task")
    parser.add_argument("--test", type=int, default=500, help="test rows a task")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-length", type=int, default=128, help="tokens read of a text")
    parser.add_argument("--invariance", type=int, default=1000, help="rows answered twice to compare batches; 0: none")
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="the others' lines are kept"
    )
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/stream_order<N>.csv")
    parser.add_argument("--records", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name in ORDERS[arguments.order]:
        for split in ("train", "test"):
            if not (arguments.data / name / f"{split}.jsonl.gz").is_file():
                parser.error(f"{arguments.data / name / split}.jsonl.gz: no such file")
    if arguments.records:
        try:
            print(json.dumps(run(arguments.methods[0], arguments)))
        except SlmError as error:
            print(f"stream: error: {error}", file=sys.stderr)
            return error.status
        return 0

    output = arguments.output or RESULTS / f"stream_order{arguments.order}.csv"
    notes = {
        "setup": f"{arguments.train} training and {arguments.test} test rows a task, {arguments.epochs} epochs, seed "
        f"{arguments.seed}, at most {arguments.max_length} tokens"
    }
    records: list[dict[str, Any]] = []
    if output.exists():  # what was measured of other methods in the same setup stays, and the head says so
        head = read_head(output)
        records = [row for row in read_csv(output) if row["method"] not in arguments.methods]
        if records and head.get("setup") != notes["setup"]:
            parser.error(f"--output: {output} has other methods' results of {head.get('setup')}; name another file")
    if kept := ", ".join(dict.fromkeys(row["method"] for row in records)):
        notes["kept from an earlier run"] = kept
    for method in arguments.methods:
        command = [sys.executable, "-m", "benchmarks.continual.run", *sys.argv[1:], "--records", "--methods", method]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            return done.returncode  # it has said why
        records += json.loads(done.stdout)
        records.sort(key=lambda row: list(METHODS).index(row["method"]))
        write_csv(output, records, notes)
    show(records, Console())
    plot(records, output.with_suffix(".png"))
    print(f"saved to {output} and {output.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
