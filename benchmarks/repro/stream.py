"""The five text-classification tasks learned in sequence: accuracy matrix, forgetting and routing, beside baselines.

    python -m benchmarks.repro.stream --data DIR --order 4 --train 1500 --test 500

DIR holds a folder a task (ag_news, yelp, amazon, dbpedia, yahoo) with train.jsonl.gz, test.jsonl.gz and labels.json.
Each method runs in a process of its own, for its peak memory. Results: benchmarks/results/stream_order<N>.csv and .png.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rich.console import Console
from rich.table import Table

from benchmarks.timing import read_csv, read_head, write_csv
from slm_fast import ScalableLM, SlmError, Task
from slm_fast.baselines.finetune import Finetune
from slm_fast.baselines.separate import Separate
from slm_fast.evaluate import Evaluation, forgetting
from slm_fast.learn import LearnOptions
from slm_fast.store import task_to_bytes
from slm_fast.tables import accuracy_matrix

# The paper's task sequences (Table 7), less those of LLaMA.
ORDERS = {
    1: ("dbpedia", "amazon", "yahoo", "ag_news"),
    2: ("dbpedia", "amazon", "ag_news", "yahoo"),
    3: ("yahoo", "amazon", "ag_news", "dbpedia"),
    4: ("ag_news", "yelp", "amazon", "yahoo", "dbpedia"),
    5: ("yelp", "yahoo", "amazon", "dbpedia", "ag_news"),
    6: ("dbpedia", "yahoo", "ag_news", "amazon", "yelp"),
    7: ("yelp", "ag_news", "dbpedia", "amazon", "yahoo"),
}


class Method(Protocol):
    def learn(self, task: Task, progress: bool | None = None) -> None: ...
    def evaluate(self, tasks: Mapping[str, Task]) -> Evaluation: ...


class Slm:
    """slm_fast itself, behind the face the baselines have."""

    def __init__(self, options: LearnOptions, **config: Any) -> None:
        self.slm, self.options = ScalableLM.from_backbone("minilm", **config), options

    def learn(self, task: Task, progress: bool | None = None) -> None:
        self.slm.learn(task, progress=progress, epochs=self.options.epochs, seed=self.options.seed)

    def evaluate(self, tasks: Mapping[str, Task]) -> Evaluation:
        return self.slm.evaluate(tasks, progress=False)

    def digest(self, name: str) -> str:
        return hashlib.sha256(task_to_bytes(self.slm.learned[name])).hexdigest()

    def invariance(self, tasks: Mapping[str, Task], rows: int) -> tuple[int, float]:
        """Rows whose slots change, and the largest change of a weight or score, when a mixed batch is answered in
        another order and batch size."""
        texts = [row.text for task in tasks.values() for row in task.rows]
        random.Random(0).shuffle(texts)
        texts = texts[:rows]
        first = self.slm.predict(texts, batch_size=32)
        order = random.Random(1).sample(range(len(texts)), len(texts))
        second = dict(zip(order, self.slm.predict([texts[i] for i in order], batch_size=7), strict=True))
        rerouted = sum(a.route.slots != second[i].route.slots for i, a in enumerate(first))
        change = max(
            abs(x - y)
            for i, a in enumerate(first)
            for x, y in zip((*a.route.weights, a.score), (*second[i].route.weights, second[i].score), strict=True)
        )
        return rerouted, change


class Entry(NamedTuple):
    title: str
    make: Callable[[Mapping[str, Task], int, LearnOptions], Method]  # (training tasks, max_length, options)


METHODS = {
    "slm": Entry("SLM, trunk + gaussian (the default)", lambda _, length, options: Slm(options, max_length=length)),
    "slm-paper": Entry(
        "SLM, sentence + dtkr (as the paper)",
        lambda _, length, options: Slm(options, max_length=length, query="sentence", router="dtkr", encoder="minilm"),
    ),
    "separate": Entry("Separate LoRA, task-ID given", lambda _, length, options: Separate("minilm", length, options)),
    "finetune": Entry(
        "Finetune, one model in sequence", lambda train, length, options: Finetune("minilm", train, length, options)
    ),
}


def load(data: Path, name: str, split: str, rows: int) -> Task:
    training = split == "train"
    task = Task.from_file(name, data / name / f"{split}.jsonl.gz", training=training)
    return Task(name, task.rows[:rows], free_text=False, training=training)


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


def show(records: list[dict[str, Any]], console: Console) -> None:
    summary = Table(title="After the last task", title_justify="left")
    for column in ("method", "average %", "forgetting", "routing %", "seconds a task", "peak MiB"):
        summary.add_column(column, justify="left" if column == "method" else "right")
    for method in dict.fromkeys(record["method"] for record in records):
        own = [record for record in records if record["method"] == method]
        after = list(dict.fromkeys(record["after"] for record in own))
        history = [{r["task"]: float(r["accuracy"]) for r in own if r["after"] == name} for name in after]
        console.print(accuracy_matrix(history, METHODS[method].title))
        last = [record for record in own if record["after"] == after[-1]]
        routing = [float(record["routing"]) for record in last if record["routing"] != ""]
        seconds = {record["after"]: float(record["seconds"]) for record in own}
        summary.add_row(
            METHODS[method].title,
            f"{100 * sum(history[-1].values()) / len(history[-1]):.2f}",
            f"{100 * float(last[0]['forgetting']):.2f}",
            f"{100 * sum(routing) / len(routing):.2f}" if routing else "",
            f"{sum(seconds.values()) / len(seconds):.0f}",
            f"{max(float(record['peak_mib']) for record in own):.0f}",
        )
    console.print(summary)


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """What is left of the first task, and the average over all tasks seen, as more are learned."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    after = list(dict.fromkeys(record["after"] for record in records))
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for method in dict.fromkeys(record["method"] for record in records):
        rows = [[r for r in records if r["method"] == method and r["after"] == name] for name in after]
        first = [next(100 * float(r["accuracy"]) for r in row if r["task"] == after[0]) for row in rows]
        average = [100 * sum(float(r["accuracy"]) for r in row) / len(row) for row in rows]
        for panel, values in zip(panels, (first, average), strict=True):
            panel.plot(after, values, marker="o", label=METHODS[method].title)
    panels[0].set_title(f"accuracy on {after[0]}, the first task", fontsize=10)
    panels[1].set_title("average over the tasks seen so far", fontsize=10)
    panels[0].set_ylabel("%")
    panels[0].set_ylim(bottom=0)
    for panel in panels:
        panel.set_xlabel("after learning")
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=140)


def main() -> int:
    parser = argparse.ArgumentParser(description="Learn the five tasks in sequence, with slm_fast and with baselines.")
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

    output = arguments.output or Path(__file__).parents[1] / "results" / f"stream_order{arguments.order}.csv"
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
        command = [sys.executable, "-m", "benchmarks.repro.stream", *sys.argv[1:], "--records", "--methods", method]
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
