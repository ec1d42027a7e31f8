"""The paper's experiments: slm_fast and its rivals learn a stream of tasks in sequence, into a folder of results.

    slm-fast repro RUN --data DIR --stream order4 --methods slm separate finetune --seeds 0 1 2
    slm-fast report RUN

DIR holds the streams' folders, with one folder per task. Each method runs with each seed in a process of its own, so
that its peak memory can be measured, `--jobs` at a time. Run the same command again to resume; methods and seeds can be
added to a RUN later. `method:option=value` is an ablation, such as slm-paper:groups=3,k=2,rank=4.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.arguments import Parser, at_least
from benchmarks.continual.cell import run_cell, stages_of
from benchmarks.continual.methods import METHODS, method_of
from benchmarks.continual.methods.method import Setup
from benchmarks.continual.run_file import alone, described, digest_of, opened
from benchmarks.continual.stream_file import read_stream
from benchmarks.continual.streams import STREAMS, Stream
from benchmarks.continual.summary import show
from benchmarks.processes import sigterm_as_exit
from slm_fast import InputError, SlmError, Task
from slm_fast.backbone import Backbone
from slm_fast.cli.shell import one_line_warnings
from slm_fast.options import LearnOptions
from slm_fast.progress import in_lines
from slm_fast.tables import console


def stream_of(name: str) -> Stream:
    """A stream by its name, or from a YAML file. Raises InputError."""
    if name in STREAMS:
        return STREAMS[name]
    if name.endswith((".yaml", ".yml")):
        return read_stream(Path(name))
    raise InputError(f"--stream {name!r}: not known; streams: {', '.join(STREAMS)}, or a YAML file")


def method_folder(spec: str) -> str:
    """The name of a method's folder in a RUN."""
    return spec.replace(":", ",")


def cell_folder(run: Path, spec: str, seed: int) -> Path:
    """The folder of one method with one seed."""
    return run / method_folder(spec) / f"seed{seed}"


def title_of(spec: str) -> dict[str, object]:
    """The contents of a method's about.json."""
    entry, (_, _, options) = method_of(spec)[0], spec.partition(":")
    title = entry.title + (f" ({options})" if options else "")
    return {"title": title, "told": entry.told, "retrains": entry.retrains}


def check_methods(specs: Sequence[str], backbone: str) -> str:
    """The backbone's kind. Raises InputError for an unknown method or backbone, a method that the backbone cannot run,
    or a bad option."""
    found = {spec: method_of(spec) for spec in specs}
    kind = Backbone.load(backbone).kind
    for spec, (entry, make) in found.items():
        if kind not in entry.kinds:
            raise InputError(f"method {spec!r}: runs on {' and '.join(entry.kinds)} backbones, {backbone!r} is {kind}")
        if ":" in spec:
            try:
                make(Setup(backbone, ("a", "b"), 16, LearnOptions()))
            except SlmError as error:
                raise InputError(f"method {spec!r}: {error}") from None
    return kind


def tasks_of(options: argparse.Namespace, stream: Stream, seed: int) -> tuple[dict[str, Task], dict[str, Task]]:
    """Training and test rows by task. Raises InputError if there is no data."""
    if options.stream in STREAMS and not (options.data / stream.folder).is_dir():
        raise InputError(f"--data: {options.data / stream.folder}: no such folder; expected a folder a task in it")
    train = stream.load(options.data, "train", seed, options.train or stream.rows)
    return train, stream.load(options.data, "test", seed, options.test)


def work(options: argparse.Namespace, stream: Stream) -> int:
    """Run one method with one seed, in a process of its own."""
    (spec,), (seed,) = options.methods, options.seeds
    train, test = tasks_of(options, stream, seed)
    labels = tuple(sorted({label for task in train.values() for label in task.labels or ()}))
    setup = Setup(
        options.backbone,
        labels,
        options.max_length,
        LearnOptions(epochs=options.epochs, seed=seed, autocast=options.autocast, accumulate=options.accumulate),
        options.max_new_tokens,
    )
    folder = cell_folder(options.run, spec, seed)
    with alone(folder):
        run_cell(folder, spec, stream, setup, train, test, unseen=options.unseen, bertscore=options.bertscore)
    return 0


def rows_of(options: argparse.Namespace, stream: Stream, kind: str) -> dict[str, str]:
    """The SHA-256 of the rows of each drawing that the seeds use. Raises InputError or WorkError for unusable data, and
    for tasks that this kind of backbone cannot answer."""
    found = {}
    for drawing, seed in dict(zip(stream.drawings(options.seeds), options.seeds, strict=True)).items():
        train, test = tasks_of(options, stream, seed)
        free = [name for name, task in train.items() if task.labels is None]
        if free and kind == "encoder":
            raise InputError(
                f"--backbone {options.backbone!r}: answers with labels, and {free[0]!r} of this stream has free text; "
                "use one that writes, such as smollm2"
            )
        found[str(drawing)] = digest_of(train, test)
    return found


def all_cells(options: argparse.Namespace, stream: Stream, arguments: Sequence[str]) -> int:
    """Run each unfinished cell in its own process, `jobs` at a time; return the first failure's status at the end."""
    cells = [(spec, seed) for seed in options.seeds for spec in options.methods]
    waiting = [c for c in cells if len(stages_of(cell_folder(options.run, *c))) < len(stream.tasks)]
    done, status = len(cells) - len(waiting), 0
    running: dict[subprocess.Popen[bytes], tuple[str, int, float]] = {}
    if done:
        print(f"{done} of {len(cells)} already done", file=sys.stderr)
    try:
        with sigterm_as_exit():
            while waiting or running:
                while waiting and len(running) < options.jobs:
                    spec, seed = waiting.pop(0)
                    process = started([*arguments, "--methods", spec, "--seeds", str(seed), "--cell"])
                    running[process] = spec, seed, time.monotonic()
                time.sleep(0.2)
                for process in [each for each in running if each.poll() is not None]:
                    spec, seed, begun = running.pop(process)
                    done += 1
                    failed = process.returncode
                    ended = f"status {failed}" if failed else f"{time.monotonic() - begun:.0f} s"
                    print(f"[{done}/{len(cells)}] {spec}, seed {seed}: {ended}", file=sys.stderr)
                    status = status or failed
    finally:
        for process in running:
            process.terminate()
            process.wait()
    return status


def started(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """A process that runs one cell and ignores Ctrl-C, on which this one stops it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return subprocess.Popen([sys.executable, "-m", "benchmarks.continual.run", *arguments])
    finally:
        signal.signal(signal.SIGINT, before)


def parser() -> argparse.ArgumentParser:
    found = Parser("slm-fast repro", __doc__)
    found.add_argument("run", type=Path, metavar="RUN", help="folder of results, created if missing")
    found.add_argument("--data", type=Path, default=Path("data"), help="folder with the streams' folders")
    found.add_argument("--stream", default="order4", help=f"{', '.join(STREAMS)}, or a YAML file of your own")
    about = f"{', '.join(METHODS)}; options after a colon make an ablation"
    found.add_argument("--methods", nargs="+", default=["slm", "separate", "finetune"], help=about)
    found.add_argument("--seeds", type=at_least(0), nargs="+", default=[0])
    found.add_argument("--backbone", default="minilm", help="a name or a folder")
    found.add_argument("--train", type=at_least(1), help="training rows per task, at most; default: the stream's")
    found.add_argument("--test", type=at_least(1), help="test rows per task, at most; default: all")
    found.add_argument("--epochs", type=at_least(1), help="default: slm_fast's")
    found.add_argument("--max-length", type=at_least(1), default=128, help="tokens read per text")
    found.add_argument("--max-new-tokens", type=at_least(1), default=32, help="tokens generated per answer")
    found.add_argument(
        "--unseen",
        action="store_true",
        help="also answer tasks not learned yet, without oracle task IDs (forward transfer)",
    )
    found.add_argument("--bertscore", metavar="MODEL", help="also score free text by BERTScore with this encoder")
    about = "compute in bfloat16 with float32 weights; slm_fast's own methods only learn so"
    found.add_argument("--autocast", action="store_true", help=about)
    about = "parts in which a step's gradients are computed, to save memory; not of EWC, IDBR, LFPT5 and DTKR"
    found.add_argument("--accumulate", type=at_least(1), default=1, help=about)
    found.add_argument("--jobs", type=at_least(1), default=1, help="processes to run at a time")
    found.add_argument("--cell", action="store_true", help=argparse.SUPPRESS)
    return found


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    options.methods, options.seeds = list(dict.fromkeys(options.methods)), list(dict.fromkeys(options.seeds))
    try:
        with one_line_warnings(), in_lines():
            stream = stream_of(options.stream)
            if options.cell:
                return work(options, stream)
            kind = check_methods(options.methods, options.backbone)
            titles = {method_folder(spec): title_of(spec) for spec in options.methods}
            opened(options.run, described(options, stream, rows_of(options, stream, kind)), titles)
            status = all_cells(options, stream, arguments)
            show(options.run, console())
    except SlmError as error:
        print(f"repro: error: {error}", file=sys.stderr)
        return error.status
    except OSError as error:
        print(f"repro: error: {error.filename or options.run}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if options.cell:
            raise
        print("repro: interrupted; the same command resumes", file=sys.stderr)
        return 130
    if not status:
        print(f"done; `slm-fast report {options.run}` writes an HTML report")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
