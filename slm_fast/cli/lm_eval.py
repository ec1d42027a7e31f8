"""`slm-fast lm-eval`."""

from __future__ import annotations

import argparse
import json
import math
from importlib.util import find_spec
from typing import Any

from slm_fast.cli.arguments import ABSTAIN, SHARE, Verbs, add_device_options, open_store
from slm_fast.errors import InputError


def add(verbs: Verbs) -> None:
    about = "run lm-evaluation-harness on a store with a decoder backbone; every request is routed"
    verb = verbs.add("lm-eval", run, about)
    group = verb.add_argument_group("benchmark")
    group.add_argument(
        "--tasks", required=True, metavar="T,T", help="task names, patterns such as 'arc_*', or your own YAML files"
    )
    group.add_argument("--task-folder", metavar="DIR", help="folder with more task files")
    group.add_argument(
        "--metadata",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="metadata for the task files, such as data=DIR",
    )
    group.add_argument("--shots", type=int, help="few-shot examples (default: set by the task)")
    group.add_argument("--limit", type=float, help="maximum rows per task, or a fraction below 1")
    group.add_argument("--chat", action="store_true", help="apply the backbone's chat template")
    group.add_argument("--system", metavar="TEXT", help="system message, with --chat")
    group = verb.add_argument_group("model")
    group.add_argument(
        "--batch-size", default="auto", metavar="ROWS", help="maximum rows per batch; does not change scores"
    )
    group.add_argument("--max-length", type=int, help="maximum tokens of a text (default: the backbone's limit)")
    group.add_argument(
        "--max-new-tokens", type=int, default=256, help="maximum generated tokens, unless the task sets them"
    )
    group.add_argument("--bare", action="store_true", help="answer with the bare backbone, without any task")
    group.add_argument(
        "--given-task", metavar="NAME", help="use this learned task for every request instead of routing"
    )
    about = "answer out-of-distribution requests with the bare backbone (SHARE as in `predict`)"
    group.add_argument(ABSTAIN, type=float, nargs="?", const=SHARE, default=False, metavar="SHARE", help=about)
    add_device_options(verb, "float32")
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb.add_argument("--samples", action="store_true", help="with --json: include each request and its answer")


def run(arguments: argparse.Namespace) -> int:
    if find_spec("lm_eval") is None:
        raise InputError("lm-eval: its package is not installed: pip install 'slm-fast[lm-eval]'")
    metadata = _pairs(arguments.metadata)
    tasks = [task for task in (part.strip() for part in arguments.tasks.split(",")) if task]
    batch_size = _rows(arguments.batch_size)
    if arguments.shots is not None and arguments.shots < 0:
        raise InputError(f"--shots: expected at least 0, got {arguments.shots}")
    if arguments.limit is not None and not 0 < arguments.limit < math.inf:
        raise InputError(f"--limit: expected a number above 0 (of rows, or a fraction), got {arguments.limit:g}")
    if arguments.samples and not arguments.json:
        raise InputError("--samples: goes with --json")
    if arguments.system is not None and not arguments.chat:
        raise InputError("--system: goes with --chat")
    if not tasks:
        raise InputError("--tasks: expected names or files, got none")

    from slm_fast.integrations.harness import evaluate, scores
    from slm_fast.integrations.lm_eval import StoreLM

    model = StoreLM(
        slm=open_store(arguments),
        batch_size=batch_size,
        max_length=arguments.max_length,
        max_gen_toks=arguments.max_new_tokens,
        bare=arguments.bare,
        task=arguments.given_task,
        abstain=arguments.abstain,
    )
    if arguments.chat:
        model.apply_chat_template([{"role": "user", "content": ""}])  # raises an error if there is none
    found = evaluate(
        model,
        tasks,
        folder=arguments.task_folder,
        metadata=metadata,
        shots=arguments.shots,
        limit=arguments.limit,
        chat=arguments.chat,
        system=arguments.system,
        samples=arguments.samples,
    )
    if arguments.json:
        print(json.dumps({"routed": model.shares(), **found}, allow_nan=False))
        return 0
    from rich.table import Table

    from slm_fast.tables import console, percent

    table, shares, told = Table(), model.shares(), set()
    for column, side in (
        ("task", "left"),
        ("metric", "left"),
        ("value", "right"),
        ("stderr", "right"),
        ("routed", "left"),
    ):
        table.add_column(column, justify="right" if side == "right" else "left", overflow="fold")
    for score in scores(found):
        routed = ", ".join(f"{name} {percent(share)} %" for name, share in shares.get(score.task, {}).items())
        metric = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
        spread = "" if score.stderr is None else f"{score.stderr:.4f}"
        table.add_row(score.task, metric, f"{score.value:.4f}", spread, "" if score.task in told else routed)
        told.add(score.task)
    console().print(table)
    return 0


def _rows(text: str) -> int | None:
    """The value of --batch-size; None for auto."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"--batch-size: expected auto, or a number from 1 on, got {text!r}")
    return int(text)


def _pairs(given: list[str]) -> dict[str, Any]:
    """Parse KEY=VALUE pairs with unique keys."""
    found: dict[str, Any] = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or not key or key in found:
            raise InputError(f"--metadata {item!r}: expected KEY=VALUE, each key once")
        found[key] = value
    return found
