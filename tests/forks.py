"""Processes forked from one that has done the slow imports: they start in milliseconds instead of seconds."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

# Imports few modules itself: each process imports this one.
SLOW_IMPORTS = (
    *("slm_fast.slm", "slm_fast.cli.shell", "slm_fast.resume", "slm_fast.demo", "benchmarks.continual.run"),
    *("transformers.models.auto.modeling_auto", "torch.distributed.fsdp"),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("bert", "t5", "llama")),
)
STREAMS = ("stdin", "stdout", "stderr")


def forked(target: Callable[..., object], *arguments: object) -> BaseProcess:
    """Start `target`, a function of a module, in a process forked from a server that all tests of this one share."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(SLOW_IMPORTS))
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def run_command(words: Sequence[str]) -> None:
    """Run the command line and exit with its status."""
    from slm_fast import cli

    sys.exit(cli.main(words))


def run_without(closed: str, folder: Path, words: Sequence[str]) -> None:
    """`run_command` with an empty standard input and its output in two files, one of the three streams being closed."""
    for number, name in enumerate(STREAMS):
        os.dup2(os.open(folder / name, os.O_RDWR | os.O_CREAT), number)
        setattr(sys, name, open(number, "r" if name == "stdin" else "w", closefd=False))  # noqa: SIM115
    os.close(STREAMS.index(closed))
    setattr(sys, closed, None)
    run_command(words)
