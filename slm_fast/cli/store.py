"""Verbs that need no backbone: `slm-fast tasks`, `forget`, `merge`, `share`, `push` and `verify`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from slm_fast.cli.arguments import Verbs, add_skip_damaged
from slm_fast.errors import InputError, WorkError, one_line, some_of


def add(verbs: Verbs) -> None:
    tasks = verbs.add("tasks", run_tasks, "list the tasks of a store")
    tasks.add_argument("--json", action="store_true", help="print JSON")
    add_skip_damaged(tasks)
    forget = verbs.add("forget", run_forget, "remove a task, as if it had never been learned")
    forget.add_argument("name", metavar="NAME")
    merge = verbs.add("merge", run_merge, "copy tasks from other stores into one", store=False)
    merge.add_argument("store", metavar="DEST", help="destination store; created if it does not exist")
    merge.add_argument(
        "sources", metavar="SRC", nargs="+", help="source store: a directory, a URL, or USER/NAME on the hub"
    )
    _add_names(merge, "copy only this task (may be repeated)")
    merge.add_argument(
        "--prefer", metavar="STORE", help="if stores have different tasks of the same name, use this store's"
    )
    share = verbs.add("share", run_share, "copy tasks to a new store with a model card, ready to share")
    share.add_argument("folder", metavar="DIR", help="output folder; must be empty or not exist")
    pushed = verbs.add("push", run_push, "upload tasks and a model card to the Hugging Face hub")
    pushed.add_argument("repo_id", metavar="USER/NAME", help="hub repository; created if it does not exist")
    pushed.add_argument("--private", action="store_true", default=None, help="create the repository as private")
    for parser in (share, pushed):
        _add_names(parser, "share only this task (may be repeated)")
        add_skip_damaged(parser)
        about = "hub name of the backbone, if it is a local folder"
        parser.add_argument("--base-model", metavar="USER/NAME", help=about)
        about = "output of `slm-fast evaluate --json`, for the accuracies on the card"
        parser.add_argument("--evaluation", metavar="FILE", help=about)
    verbs.add("verify", run_verify, "check every file of a store against its manifest")


def _add_names(parser: argparse.ArgumentParser, about: str) -> None:
    parser.add_argument("--task", action="append", metavar="NAME", dest="names", help=about)


def run_tasks(arguments: argparse.Namespace) -> int:
    from slm_fast.hub import find_store
    from slm_fast.tables import console, tasks_table

    tasks = find_store(arguments.store).load(skip_damaged=arguments.skip_damaged)
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
    from slm_fast.hub import find_store
    from slm_fast.store import Store

    sources = [find_store(path) for path in arguments.sources]
    exists = Store.exists(arguments.store)
    store = Store.open(arguments.store) if exists else Store(arguments.store, sources[0].about, {})
    here = {given: source.path for given, source in zip(arguments.sources, sources, strict=True)}
    store.merge(sources, prefer=here.get(arguments.prefer, arguments.prefer), tasks=arguments.names)
    print(f"{arguments.store} holds {len(store.files):,} tasks: {some_of(sorted(store.files))}", file=sys.stderr)
    return 0


def run_share(arguments: argparse.Namespace) -> int:
    from slm_fast.files import path_of

    found = _write_shared(arguments, path_of(arguments.folder))
    print(f"{arguments.folder}: {some_of(found)}, and a model card (README.md)", file=sys.stderr)
    return 0


def run_push(arguments: argparse.Namespace) -> int:
    from slm_fast.hub import check_repo, push

    check_repo(arguments.repo_id)
    with tempfile.TemporaryDirectory() as folder:
        _write_shared(arguments, Path(folder), arguments.repo_id)
        print(push(Path(folder), arguments.repo_id, private=arguments.private))
    return 0


def _write_shared(arguments: argparse.Namespace, folder: Path, repo_id: str | None = None) -> list[str]:
    """Write the shared tasks to a folder and return their names."""
    from slm_fast.hub import chosen, find_store, write_shared

    accuracy = None if arguments.evaluation is None else _accuracy(Path(arguments.evaluation))
    store = find_store(arguments.store)
    tasks = chosen(store.load(skip_damaged=arguments.skip_damaged), arguments.names)
    write_shared(folder, store.about, tasks, accuracy=accuracy, base_model=arguments.base_model, repo_id=repo_id)
    return [task.name for task in tasks]


def _accuracy(file: Path) -> dict[str, float]:
    """Accuracies by task, as `slm-fast evaluate --json` prints them."""
    from slm_fast.fields import Unfit, check, fields, number, read_json

    try:
        found = fields(
            fields(read_json(file.read_bytes()), "", "accuracy", others=True)["accuracy"], "accuracy", others=True
        )
        for name, value in found.items():
            check(value, f"accuracy.{name}", number(0, 1))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (OSError, ValueError, Unfit) as error:
        raise WorkError(f"{file}: not what `slm-fast evaluate --json` prints: {one_line(error)}") from None
    return {name: float(value) for name, value in found.items()}


def run_verify(arguments: argparse.Namespace) -> int:
    from slm_fast.hub import find_store
    from slm_fast.store_view import CACHES

    store = find_store(arguments.store)
    wrong = store.verify()
    for path in store.leftovers():
        if path.name not in CACHES:
            print(f"{path}: left over from an interrupted commit; the next commit removes it", file=sys.stderr)
        elif not any(line.startswith(f"{path}: ") for line in wrong):
            print(f"{path}: a cache that is not used here; it is made again where it is needed", file=sys.stderr)
    for line in wrong:
        print(f"slm-fast: error: {line}", file=sys.stderr)
    if not wrong:
        print(f"{arguments.store}: {len(store.files)} tasks, all match the manifest")
    return 1 if wrong else 0
