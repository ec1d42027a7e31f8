"""`slm-fast bench` and `slm-fast repro`: run the benchmarks in the repository."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

from slm_fast.cli.arguments import Verbs
from slm_fast.errors import InputError

BENCHMARKS = MappingProxyType(
    {
        "ops": (
            "benchmarks.speed.operators",
            "multi_lora and retrieve against gather + bmm, PEFT, Arrow, matmul + topk, FAISS",
        ),
        "inference": (
            "benchmarks.speed.inference",
            "mixed-task batches against the bare backbone, PEFT and the paper's method",
        ),
        "training": ("benchmarks.speed.training", "training a task against the paper's procedure and PEFT"),
        "serving": ("benchmarks.speed.serving", "our server against one pipeline per task and LitServe"),
        "streams": ("benchmarks.speed.serving.writing", "streaming text generation against transformers' server"),
        "jobs": ("benchmarks.speed.jobs", "learning tasks in parallel against one after another"),
        "ray": ("benchmarks.speed.ray", "predicting a file on Ray actors against one process"),
        "generation": ("benchmarks.speed.generation", "generating text against the bare model and the paper's method"),
    }
)
REPRO = "benchmarks.continual.run"
PATIENCE = 60  # seconds that an interrupted benchmark has to stop its own processes


def add(verbs: Verbs) -> None:
    bench = verbs.add(
        "bench", _run, "run a benchmark from the repository; further arguments are passed to it", store=False
    )
    bench.add_argument("name", choices=list(BENCHMARKS), help="; ".join(f"{n}: {b[1]}" for n, b in BENCHMARKS.items()))
    bench.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the benchmark, such as --help"
    )
    about = "learn a stream of tasks with slm_fast and its rivals, as in the paper"
    repro = verbs.add("repro", _repro, about, store=False)
    repro.add_argument("folder", metavar="RUN", help="results folder; run the same command again to resume")
    about = "--data DIR --stream order4 --methods slm finetune ...; see `slm-fast repro RUN --help`"
    repro.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help=about)


def _run(arguments: argparse.Namespace) -> int:
    return run(arguments.name, arguments.arguments)


def _repro(arguments: argparse.Namespace) -> int:
    return repro([arguments.folder, *arguments.arguments])


def repro(arguments: Sequence[str], root: Path | None = None) -> int:
    """Run the paper's experiments in a separate process, in the current folder, and return its exit status.

    Raises InputError if the package is not inside its repository (`root`).
    """
    root = root or Path(__file__).parents[2]
    _check(root, REPRO, "repro")
    return _wait_for(root, [REPRO, *arguments])


def run(name: str, arguments: Sequence[str], root: Path | None = None) -> int:
    """Run a benchmark of `BENCHMARKS` in a separate process, in the current folder, and return its exit status.

    Raises InputError if the package is not inside its repository (`root`).
    """
    root = root or Path(__file__).parents[2]
    module = BENCHMARKS[name][0]
    _check(root, module, f"bench {name}")
    return _wait_for(root, [module, *arguments])


def _wait_for(root: Path, words: Sequence[str]) -> int:
    """Run a module of the repository in a process of its own and return its exit status. On Ctrl-C, which stops the
    process as well, wait until it has stopped its own processes."""
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    with subprocess.Popen([sys.executable, "-m", *words], env=os.environ | {"PYTHONPATH": path}) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
            raise


def _check(root: Path, module: str, verb: str) -> None:
    path = Path(*module.split("."))
    if not any((root / file).is_file() for file in (path.with_suffix(".py"), path / "__main__.py")):
        raise InputError(
            f"{verb}: {root} has no {path}; benchmarks come with the repository: "
            "clone it, `pip install -e '.[demo,bench]'` there, and run this again"
        )
