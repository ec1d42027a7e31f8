"""What is done with a store alone: `slm-fast tasks`, `forget`, `merge` and `verify`."""

from __future__ import annotations

import argparse
import json
import sys

from slm_fast.cli.arguments import Verbs
from slm_fast.errors import some_of


def add(verbs: Verbs) -> None:
    tasks = verbs.add("tasks", run_tasks, "list the tasks of a store")
    tasks.add_argument("--json", action="store_true", help="print JSON")
    forget = verbs.add("forget", run_forget, "remove a task exactly")
    forget.add_argument("name", metavar="NAME")
    merge = verbs.add("merge", run_merge, "copy the tasks of other stores into one", store=False)
    merge.add_argument("store", metavar="DEST", help="the store that receives them; made if it is not there")
    merge.add_argument("sources", metavar="SRC", nargs="+")
    merge.add_argument(
        "--prefer", metavar="STORE", help="where stores hold different tasks of one name, take this store's"
    )
    verbs.add("verify", run_verify, "check every file of a store against its manifest")


def run_tasks(arguments: argparse.Namespace) -> int:
    from slm_fast.store import Store
    from slm_fast.tables import console, tasks_table

    tasks = Store.open(arguments.store).load()
    if arguments.json:
        labels = {task.name: {"labels": task.labels, "slots": task.slots, "options": task.options} for task in tasks}
        print(json.dumps(labels, allow_nan=False))
    else:
        console().print(tasks_table(tasks))
    return 0


def run_forget(arguments: argparse.Namespace) -> int:
    from slm_fast.store import Store

    Store.open(arguments.store).commit(remove=[arguments.name])
    return 0


def run_merge(arguments: argparse.Namespace) -> int:
    from slm_fast.store import Store

    sources = [Store.open(path) for path in arguments.sources]
    exists = Store.exists(arguments.store)
    store = Store.open(arguments.store) if exists else Store(arguments.store, sources[0].about, {})
    store.merge(sources, prefer=arguments.prefer)
    print(f"{arguments.store} holds {len(store.files):,} tasks: {some_of(sorted(store.files))}", file=sys.stderr)
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    from slm_fast.store import Store

    store = Store.open(arguments.store)
    for path in store.leftovers():
        print(f"{path}: left over from an interrupted commit; the next one removes it", file=sys.stderr)
    wrong = store.verify()
    for line in wrong:
        print(f"slm-fast: error: {line}", file=sys.stderr)
    if not wrong:
        print(f"{arguments.store}: {len(store.files)} tasks, all as the manifest says")
    return 1 if wrong else 0
