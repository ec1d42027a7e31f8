"""The cost of routing: every row answered twice, with its oracle task ID and without.

    python -m benchmarks.continual.gaps --data DIR --stream clinc --seeds 0 1 2 3 4 --work WORK

slm_fast learns the stream once per seed. Separate (one PEFT LoRA model per task, task given) learns it with the same
batches, epochs and learning rate. Both answer the same rows, so differences are paired. Their standard errors are over
rows (after averaging a row's differences over seeds) and over seeds. --held-out leaves the last tenth of the
training rows out of training and answers it instead of the test rows, for making decisions.

WORK keeps each method's answers with each seed, which are not computed again, and slm_fast's stores, from which an
interrupted run resumes. Results: benchmarks/results/gaps_<stream>.csv, and the confusions between tasks in
gaps_<stream>_confusions.csv.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import sys
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.arguments import Parser, at_least, output_file, work_folder
from benchmarks.continual.methods.method import Setup
from benchmarks.continual.methods.separate import Separate
from benchmarks.continual.streams import STREAMS, Stream
from benchmarks.tables import RESULTS, table, write_csv
from slm_fast import ScalableLM, SlmError, Task
from slm_fast.options import LearnOptions
from slm_fast.predict import Prediction

METHODS = ("slm", "separate")
NOWHERE = "(none)"  # the task of rows that belong to none, and of those abstained from
Answers = list[dict[str, str]]  # one per row: task, row, told, routed, named, kept, distance


def split(stream: Stream, options: argparse.Namespace, seed: int) -> tuple[dict[str, Task], dict[str, Task]]:
    """The tasks to learn and the tasks to answer, by name."""
    train = stream.load(options.data, "train", seed, options.train or stream.rows)
    if not options.held_out:
        return train, stream.load(options.data, "test", seed)
    learned, answered = {}, {}
    for name, task in train.items():
        cut = len(task.rows) - max(1, len(task.rows) // 10)
        learned[name] = Task(name, task.rows[:cut], free_text=False)
        known = set(learned[name].labels or ())
        held = [row for row in task.rows[cut:] if row.target in known]
        answered[name] = Task(name, held, free_text=False, training=False)
    return learned, answered


def slm_answers(stream: Stream, options: argparse.Namespace, seed: int, store: Path) -> Answers:
    """Learn the tasks that the store does not have yet, then answer."""
    train, test = split(stream, options, seed)
    if store.exists():
        slm = ScalableLM.from_pretrained(store)
    else:
        slm = ScalableLM.from_backbone("minilm", max_length=options.max_length)
        slm.save_pretrained(store)
    for name, task in train.items():
        if name not in slm.learned:
            slm.learn(task, progress=False, epochs=options.epochs, seed=seed)
            print(f"seed {seed}: learned {name}", file=sys.stderr)
    rows = [(name, i, row) for name, task in test.items() for i, row in enumerate(task.rows)]
    texts, names = [row.text for _, _, row in rows], [name for name, _, _ in rows]
    told, routed = slm.predict(texts, task=names), slm.predict(texts, distance=True)
    found = [
        {"task": name, "row": str(i), "told": str(int(own.label == row.target))}
        | {"routed": str(int(any_.label == row.target)), **_named(any_, options.abstain)}
        for (name, i, row), own, any_ in zip(rows, told, routed, strict=True)
    ]
    if stream.out_of_scope and not options.held_out:
        with gzip.open(
            options.data / stream.folder / stream.out_of_scope / "test.jsonl.gz", "rt", encoding="utf-8"
        ) as file:
            strangers = [json.loads(line)["text"] for line in file]
        found += [
            {"task": NOWHERE, "row": str(i), "told": "", "routed": "", **_named(any_, options.abstain)}
            for i, any_ in enumerate(slm.predict(strangers, distance=True))
        ]
    return found


def _named(found: Prediction, share: float) -> dict[str, str]:
    """The task that a row was routed to, its distance, and whether it would be kept rather than abstained from."""
    assert found.distance is not None
    kept = str(int(found.distance <= share))
    return {"named": found.task or NOWHERE, "kept": kept, "distance": f"{found.distance:.6f}"}


def separate_answers(stream: Stream, options: argparse.Namespace, seed: int) -> Answers:
    train, test = split(stream, options, seed)
    found: Answers = []
    for name, task in train.items():
        learning = LearnOptions(epochs=options.epochs, seed=seed)
        method = Separate(Setup("minilm", tuple(task.labels or ()), options.max_length, learning))
        method.learn(task, progress=False)
        rows = test[name].rows
        answers = [answer.text for answer in method.answers(rows, [name] * len(rows))]
        print(f"seed {seed}: separate learned {name}", file=sys.stderr)
        found += [
            {"task": name, "row": str(i), "told": str(int(a == row.target))}
            | dict.fromkeys(("routed", "named", "kept", "distance"), "")
            for i, (a, row) in enumerate(zip(answers, rows, strict=True))
        ]
    return found


def answers_of(method: str, stream: Stream, options: argparse.Namespace, seed: int, folder: Path) -> Answers:
    """The answers kept in the folder, or new ones, which are then kept there."""
    path = folder / f"{method}-seed{seed}.csv"
    if not path.exists():
        if method == "slm":
            found = slm_answers(stream, options, seed, folder / f"store-seed{seed}")
        else:
            found = separate_answers(stream, options, seed)
        unfinished = path.with_suffix(".part")
        with unfinished.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(found[0]))
            writer.writeheader()
            writer.writerows(found)
        unfinished.replace(path)
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---- evaluation ----


def paired(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], drawing: Sequence[int] | None = None
) -> tuple[float, float, float]:
    """Mean of second - first over seeds, and its standard error over rows and over seeds (NaN for one).

    Each sequence has one sequence of rows per seed. Seeds of the same `drawing` (None: all) have the same rows, and a
    row's differences are averaged over them.
    """
    apart = [[b - a for a, b in zip(*pair, strict=True)] for pair in zip(first, second, strict=True)]
    squared = 0.0
    for one in set(drawing or [0]):
        own = [rows for i, rows in enumerate(apart) if drawing is None or drawing[i] == one]
        by_row = [mean(column) for column in zip(*own, strict=True)]
        error = stdev(by_row) / len(by_row) ** 0.5 if len(by_row) > 1 else float("nan")
        squared += (len(own) / len(apart) * error) ** 2
    by_seed = [mean(rows) for rows in apart]
    over_seeds = stdev(by_seed) / len(by_seed) ** 0.5 if len(by_seed) > 1 else float("nan")
    return mean(by_seed), squared**0.5, over_seeds


def summary(
    answers: Mapping[str, Sequence[Answers]], tasks: Sequence[str], drawing: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """One line per task and one for all rows, in percent. answers: by method, then seed. drawing: as in `paired`."""

    def column(method: str, field: str, chosen: set[str]) -> list[list[float]]:
        return [
            [
                float(a["named"] == a["task"]) if field == "right task" else float(a[field])
                for a in seed
                if a["task"] in chosen
            ]
            for seed in answers[method]
        ]

    def percent(values: Sequence[Sequence[float]]) -> str:
        return f"{100 * mean(mean(seed) for seed in values):.2f}"

    found = []
    for name, chosen in [*((task, {task}) for task in tasks), ("all rows", set(tasks))]:
        told, routed = column("slm", "told", chosen), column("slm", "routed", chosen)
        gap, rows, seeds = paired(told, routed, drawing)
        line = {
            "task": name,
            "rows": len(told[0]),
            "told": percent(told),
            "routed": percent(routed),
            "gap": f"{100 * gap:.2f}",
            "gap_se_rows": f"{100 * rows:.2f}",
            "gap_se_seeds": f"{100 * seeds:.2f}",
            "right_task": percent(column("slm", "right task", chosen)),
            "kept": percent(column("slm", "kept", chosen)),
        }
        if "separate" in answers:
            separate = column("separate", "told", chosen)
            ahead, rows, seeds = paired(separate, routed, drawing)
            line |= {"separate": percent(separate), "routed_less_separate": f"{100 * ahead:.2f}"}
            line |= {"separate_se_rows": f"{100 * rows:.2f}", "separate_se_seeds": f"{100 * seeds:.2f}"}
        found.append(line)
    if any(a["task"] == NOWHERE for a in answers["slm"][0]):
        strangers = column("slm", "kept", {NOWHERE})
        apart = mean(_auroc(seed) for seed in answers["slm"])
        found = [line | {"auroc": ""} for line in found]
        empty = dict.fromkeys(found[0], "")
        line = {"task": "out of scope", "rows": len(strangers[0]), "kept": percent(strangers), "auroc": f"{apart:.4f}"}
        found.append(empty | line)
    return found


def _auroc(answers: Answers) -> float:
    """How often an out-of-scope row is farther away than a row of a task; ties count half."""
    inside = sorted(float(a["distance"]) for a in answers if a["task"] != NOWHERE)
    outside = [float(a["distance"]) for a in answers if a["task"] == NOWHERE]
    nearer = sum(bisect_left(inside, distance) + bisect_right(inside, distance) for distance in outside)
    return nearer / (2 * len(inside) * len(outside))


def confusions(answers: Sequence[Answers]) -> list[dict[str, Any]]:
    """Which tasks were mistaken for which, most frequent first, counted over all seeds."""
    pairs = Counter((a["task"], a["named"]) for seed in answers for a in seed if a["named"] != a["task"] != NOWHERE)
    return [{"task": task, "taken_for": other, "rows": many} for (task, other), many in pairs.most_common()]


def main(arguments: Sequence[str]) -> int:
    parser = Parser("python -m benchmarks.continual.gaps", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the streams' folders")
    parser.add_argument("--stream", choices=list(STREAMS), required=True)
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0])
    parser.add_argument("--work", type=work_folder, required=True, help="folder for stores and answers")
    parser.add_argument("--train", type=at_least(1), help="training rows per task, at most; default: the stream's")
    parser.add_argument("--epochs", type=at_least(1), help="default: slm_fast's")
    parser.add_argument("--max-length", type=at_least(1), default=128, help="tokens read per text")
    parser.add_argument("--abstain", type=float, default=0.95, help="threshold of `kept`, as in `predict`")
    parser.add_argument(
        "--held-out", action="store_true", help="answer a tenth of the training rows, not the test rows"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--output", type=output_file, help="default: benchmarks/results/gaps_<stream>.csv")
    options = parser.parse_args(arguments)
    stream = STREAMS[options.stream]
    rows = options.train or stream.rows
    held = "-heldout" if options.held_out else ""
    folder = options.work / f"{options.stream}-{rows}-{options.epochs or 'default'}-{options.max_length}{held}"
    folder.mkdir(parents=True, exist_ok=True)
    methods = [m for m in METHODS if m == "slm" or m in options.methods]
    try:
        answers = {m: [answers_of(m, stream, options, seed, folder) for seed in options.seeds] for m in methods}
    except SlmError as error:
        print(f"gaps: error: {error}", file=sys.stderr)
        return error.status
    found = summary(answers, stream.tasks, stream.drawings(options.seeds))
    epochs = f"{options.epochs} epochs" if options.epochs else "slm_fast's epochs"
    notes = {
        "setup": f"{'held-out training rows' if held else 'test rows'}; at most {rows} training rows a task, {epochs}, "
        f"seeds {', '.join(map(str, options.seeds))}, at most {options.max_length} tokens, abstain {options.abstain}"
    }
    output = options.output or RESULTS / f"gaps_{options.stream}{held.replace('-', '_')}.csv"
    write_csv(output, found, notes)
    if pairs := confusions(answers["slm"]):
        write_csv(output.with_name(f"{output.stem}_confusions.csv"), pairs, notes)
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
