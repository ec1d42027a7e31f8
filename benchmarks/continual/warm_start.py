"""Whether a task should start from another's values: a stream learned from scratch and with warm_start=True, per seed.

    python -m benchmarks.continual.warm_start --data DIR --stream few --seeds 0 1 2 3 4 --work WORK

Both learn the same rows in the same order, drawn from the same seeds, and both answer the same rows, with the task
given and without, so differences are paired. Their standard errors are over rows (after averaging a row's differences
over the seeds that answered it) and over seeds. --held-out answers validation rows or, if a stream has none, the
training rows after those that are learned, so that decisions are not made on test rows.

WORK keeps a store and the answers for each seed, from which an interrupted run resumes. The first task has nothing to
start from and is learned once. Results: benchmarks/results/warm_start_<stream>.csv.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.arguments import Parser, at_least, output_file, work_folder
from benchmarks.continual.gaps import paired
from benchmarks.continual.streams import STREAMS, Stream
from benchmarks.tables import RESULTS, table, write_csv
from slm_fast import ScalableLM, SlmError, Task

WAYS = {"anew": False, "warm": True}  # the value of warm_start
Right = dict[str, dict[str, list[float]]]  # "told" or "routed" -> task -> whether each of its rows was answered right


def answered(stream: Stream, options: argparse.Namespace, seed: int) -> dict[str, Task]:
    """The rows to answer, by task."""
    if not options.held_out:
        return stream.load(options.data, "test", seed, options.rows)
    if stream.seeds:
        return stream.load(options.data, "valid", seed, options.rows)
    learned = options.train or stream.rows
    rows = stream.load(options.data, "train", seed, None if options.rows is None else learned + options.rows)
    return {name: Task(name, task.rows[learned:], free_text=False, training=False) for name, task in rows.items()}


def folder_of(options: argparse.Namespace, seed: int) -> Path:
    """The folder of a seed's results."""
    rows: int = options.train or STREAMS[options.stream].rows
    folder: Path = options.work / f"{options.stream}-{rows}-{options.max_length}-{seed}"
    return folder


def learn(stream: Stream, options: argparse.Namespace, seed: int, way: str) -> ScalableLM:
    """A model that has learned the stream's tasks; those in its store are not learned again."""
    store = folder_of(options, seed) / way
    if store.exists():
        slm = ScalableLM.from_pretrained(store)
    else:
        slm = ScalableLM.from_backbone("minilm", max_length=options.max_length)
        if WAYS[way]:
            slm.add(ScalableLM.from_pretrained(store.with_name("anew")).learned[stream.tasks[0]])
        slm.save_pretrained(store)
    for name, task in stream.load(options.data, "train", seed, options.train or stream.rows).items():
        if name not in slm.learned:
            slm.learn(task, progress=False, seed=seed, warm_start=WAYS[way])
            print(f"seed {seed}: {way}: learned {name}", file=sys.stderr)
    return slm


def answers_of(stream: Stream, options: argparse.Namespace, seed: int) -> tuple[dict[str, Right], dict[str, str]]:
    """What was answered right each way, and the task that each task started from, cached in the seed's folder."""
    kept = folder_of(options, seed) / f"{'held-out' if options.held_out else 'test'}-{options.rows or 'all'}.json"
    if not kept.exists():
        rows, found, starts = answered(stream, options, seed), dict[str, Right](), dict[str, str]()
        for way in WAYS:
            slm = learn(stream, options, seed, way)
            found[way] = answer(slm, rows)
            begun = {name: slm.learned[name].options.get("warm_start") for name in stream.tasks}
            starts |= {name: start["task"] for name, start in begun.items() if isinstance(start, dict)}
        unfinished = kept.with_suffix(".part")
        unfinished.write_text(json.dumps([found, starts]))
        unfinished.replace(kept)
    found, starts = json.loads(kept.read_text())
    return found, starts


def answer(slm: ScalableLM, tasks: dict[str, Task]) -> Right:
    """Answer every row twice, with its task given and without."""
    rows = [(name, row) for name, task in tasks.items() for row in task.rows]
    texts, names = [row.text for _, row in rows], [name for name, _ in rows]
    found: Right = {}
    for how, answers in (("told", slm.predict(texts, task=names)), ("routed", slm.predict(texts))):
        right: dict[str, list[float]] = defaultdict(list)
        for (name, row), given in zip(rows, answers, strict=True):
            right[name].append(float(given.label == row.target))
        found[how] = dict(right)
    return found


def summary(
    found: dict[str, list[Right]], starts: Sequence[dict[str, str]], drawing: Sequence[int], tasks: Sequence[str]
) -> list[dict[str, Any]]:
    """One line per task and one for all rows, in percent. found: by way, then seed. starts: by seed, then task."""
    lines = []
    for name, chosen in [*((task, [task]) for task in tasks), ("all rows", list(tasks))]:
        begun = Counter(seed[name] for seed in starts if name in seed)
        line: dict[str, Any] = {
            "task": name,
            "rows": 0,
            "started_from": ", ".join(f"{t} {n}x" for t, n in begun.items()),
        }
        for how in ("told", "routed"):
            anew, warm = ([[x for task in chosen for x in seed[how][task]] for seed in found[way]] for way in WAYS)
            total, over_rows, over_seeds = paired(anew, warm, drawing)
            line["rows"] = len(anew[0])
            line |= {
                f"{how}_anew": f"{100 * mean(map(mean, anew)):.2f}",
                f"{how}_warm": f"{100 * mean(map(mean, warm)):.2f}",
            }
            line |= {f"{how}_gain": f"{100 * total:.2f}", f"{how}_se_rows": f"{100 * over_rows:.2f}"}
            line[f"{how}_se_seeds"] = f"{100 * over_seeds:.2f}"
        lines.append(line)
    return lines


def main(arguments: Sequence[str]) -> int:
    parser = Parser("python -m benchmarks.continual.warm_start", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the streams' folders")
    parser.add_argument("--stream", choices=list(STREAMS), required=True)
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0])
    parser.add_argument("--work", type=work_folder, required=True, help="folder for stores and answers")
    parser.add_argument("--train", type=at_least(1), help="training rows per task, at most; default: the stream's")
    parser.add_argument("--rows", type=at_least(1), help="rows answered per task, at most; default: all")
    parser.add_argument("--max-length", type=at_least(1), default=128, help="tokens read per text")
    parser.add_argument("--held-out", action="store_true", help="answer validation or training rows, not test rows")
    parser.add_argument("--output", type=output_file, help="default: benchmarks/results/warm_start_<stream>.csv")
    options = parser.parse_args(arguments)
    stream = STREAMS[options.stream]
    try:
        for seed in options.seeds:
            folder_of(options, seed).mkdir(parents=True, exist_ok=True)
        answers = [answers_of(stream, options, seed) for seed in options.seeds]
    except SlmError as error:
        print(f"warm_start: error: {error}", file=sys.stderr)
        return error.status
    drawing = stream.drawings(options.seeds)
    found = {way: [right[way] for right, _ in answers] for way in WAYS}
    lines = summary(found, [starts for _, starts in answers], drawing, stream.tasks)
    kind = "held-out rows" if options.held_out else "test rows"
    held = "_heldout" if options.held_out else ""
    notes = {
        "setup": f"{kind}{f', {options.rows} a task at most' if options.rows else ''}; at most "
        f"{options.train or stream.rows} training rows a task, seeds {', '.join(map(str, options.seeds))}, at most "
        f"{options.max_length} tokens; gain: warm less anew, in points; its standard error over rows and over seeds"
    }
    write_csv(options.output or RESULTS / f"warm_start_{options.stream}{held}.csv", lines, notes)
    print(table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
