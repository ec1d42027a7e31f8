"""`slm-fast bench` and `repro`: run what the repository has beside the package."""

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
            "multi_lora and retrieve beside gather + bmm, PEFT, Arrow, a product and topk, FAISS",
        ),
        "inference": (
            "benchmarks.speed.inference",
            "mixed-task batches beside the bare backbone, PEFT and the paper's way",
        ),
        "training": ("benchmarks.speed.training", "learning a task beside the paper's procedure and PEFT"),
        "serving": ("benchmarks.speed.serving", "our server beside a pipeline a task and LitServe"),
        "streams": ("benchmarks.speed.serving.writing", "texts that our server streams, beside transformers' server"),
        "jobs": ("benchmarks.speed.jobs", "tasks learned one after another beside several at a time"),
        "ray": ("benchmarks.speed.ray", "a file answered by one process beside actors of Ray"),
        "generation": ("benchmarks.speed.generation", "writing texts beside the bare model and the paper's way"),
    }
)
REPRO = "benchmarks.continual.run"


def add(verbs: Verbs) -> None:
    bench = verbs.add("bench", _run, "run a benchmark of the repository; what follows its name goes to it", store=False)
    bench.add_argument("name", choices=list(BENCHMARKS), help="; ".join(f"{n}: {b[1]}" for n, b in BENCHMARKS.items()))
    bench.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="such as --help")
    about = "learn a stream of tasks with slm_fast and with its rivals, as the paper does, into a folder RUN"
    repro = verbs.add("repro", _repro, about, store=False)
    repro.add_argument("folder", metavar="RUN", help="where the results go; the same call again goes on with it")
    about = "--data DIR --stream order4 --methods slm finetune ...; `slm-fast repro RUN --help` says everything"
    repro.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help=about)


def _run(arguments: argparse.Namespace) -> int:
    return run(arguments.name, arguments.arguments)


def _repro(arguments: argparse.Namespace) -> int:
    return repro([arguments.folder, *arguments.arguments])


def repro(arguments: Sequence[str], root: Path | None = None) -> int:
    """Run the paper's experiments in a process of their own, in the current folder, and return its exit status.

    Raises InputError when there is no repository around the package (`root`), and says what to do.
    """
    root = root or Path(__file__).parents[2]
    _check(root, REPRO, "repro")
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return subprocess.run([sys.executable, "-m", REPRO, *arguments], env=os.environ | {"PYTHONPATH": path}).returncode


def run(name: str, arguments: Sequence[str], root: Path | None = None) -> int:
    """Run a benchmark of `BENCHMARKS` in a process of its own and return its exit status.

    Raises InputError when there is no repository around the package (`root`), and says what to do.
    """
    root = root or Path(__file__).parents[2]
    module = BENCHMARKS[name][0]
    _check(root, module, f"bench {name}")
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=root).returncode


def _check(root: Path, module: str, verb: str) -> None:
    path = Path(*module.split("."))
    if not any((root / file).is_file() for file in (path.with_suffix(".py"), path / "__main__.py")):
        raise InputError(
            f"{verb}: {root} has no {path}; benchmarks come with the repository: "
            "clone it, `pip install -e '.[demo,bench]'` there, and run this again"
        )
