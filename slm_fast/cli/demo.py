"""`slm-fast demo`."""

from __future__ import annotations

import argparse

from slm_fast.cli.arguments import Verbs


def add(verbs: Verbs) -> None:
    demo = verbs.add("demo", run, "learn five small tasks and answer a batch that mixes them", store=False)
    demo.add_argument("--store", help="keep the learned tasks in this directory")


def run(arguments: argparse.Namespace) -> int:
    from slm_fast import demo

    demo.run(arguments.store)
    return 0
