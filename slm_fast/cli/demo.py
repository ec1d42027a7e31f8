"""`slm-fast demo`."""

from __future__ import annotations

import argparse

from slm_fast.cli.arguments import Verbs


def add(verbs: Verbs) -> None:
    demo = verbs.add("demo", run, "learn a few small tasks and answer a mixed batch", store=False)
    about = "minilm: five classification tasks; smollm2, a chat model: three instruction tasks"
    demo.add_argument("--backbone", choices=("minilm", "smollm2"), default="minilm", help=about)
    demo.add_argument("--store", help="save the learned tasks to this directory")


def run(arguments: argparse.Namespace) -> int:
    if arguments.backbone == "smollm2":
        from slm_fast.demo import chat

        chat.run(arguments.store)
    else:
        from slm_fast import demo

        demo.run(arguments.store)
    return 0
