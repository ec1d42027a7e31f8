"""`slm-fast learn`."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from slm_fast.cli.arguments import (
    Verbs,
    add_device_options,
    add_label_files,
    add_reading_options,
    add_task_files,
    backbone_of,
    check_stdin,
    fields_of,
    named_files,
    open_store,
    read_tasks,
    set_threads,
)
from slm_fast.errors import InputError, WorkError
from slm_fast.options import LearnOptions, ModelConfig

if TYPE_CHECKING:
    from slm_fast.data import Task
    from slm_fast.slm import ScalableLM

PATIENCE, PAUSE = 600.0, 5.0  # seconds in which a learned task must be committed, and between two tries


def add(verbs: Verbs) -> None:
    learn = verbs.add("learn", run, "learn one or more tasks, one after another, into a store")
    about = "training file: csv, tsv, jsonl, json or parquet with text,label; instruction,input,output; or messages"
    add_task_files(learn, f"{about}; - is standard input")
    learn.add_argument("--valid", action="append", default=[], metavar="NAME=FILE", help="a task's validation file")
    add_reading_options(learn)
    add_label_files(learn)
    add_device_options(learn, "float32")
    _add_model_options(learn)
    _add_learn_options(learn)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    """The fields of ModelConfig; one that is not given is not in the call."""
    group = parser.add_argument_group("how a new store's model is put together")
    group.add_argument("--query", choices=("trunk", "sentence"), help="trunk (default) or sentence (a second model)")
    group.add_argument("--router", choices=("gaussian", "dtkr"), help="gaussian (default) or dtkr (the paper's)")
    group.add_argument("--encoder", help="the sentence query's model")
    group.add_argument("--taps", type=_numbers, metavar="L,L", help="layers the trunk query reads")
    group.add_argument("--targets", type=_words, metavar="W,W", help="linear layers that carry LoRA increments")
    group.add_argument("--first-layer", type=int, help="lowest layer that carries increments")
    group.add_argument("--k", type=int, help="slots retrieved for an input")
    group.add_argument("--groups", type=int, help="groups of the dtkr router")
    group.add_argument("--aggregate", choices=("mean", "vote"), help="how the dtkr router joins its groups")
    group.add_argument("--temperature", type=float, help="of the gaussian router's weights")
    group.add_argument("--features", type=int, help="random features of the gaussian router; default up to 2,048")
    group.add_argument("--route-on", choices=("input", "prompt"), help="whether an instruction helps routing")
    about = "tokens read of an input: by a new store's model or, where the store is there, in learning these tasks"
    group.add_argument("--max-length", type=int, help=about)


def _add_learn_options(parser: argparse.ArgumentParser) -> None:
    """The fields of LearnOptions that a command line needs."""
    group = parser.add_argument_group("how a task is learned")
    group.add_argument("--epochs", type=int, help="default: 3, more for a small task")
    group.add_argument("--batch-size", type=int, default=16, help="rows of one optimiser step")
    group.add_argument("--learning-rate", type=float, default=1e-3, help="peak of warm-up and decay")
    group.add_argument("--rank", type=int, default=8, help="of the LoRA increments")
    group.add_argument("--slots", type=int, help="slots a task; default 1 (gaussian) or 4 (dtkr)")
    group.add_argument("--seed", type=int, default=0, help="of all that is random")
    group.add_argument("--accumulate", type=int, default=1, help="gradient accumulation: parts of a step")
    group.add_argument("--autocast", action="store_true", help="compute in bfloat16 though the weights are float32")
    about = "begin at the values of a learned task: TASK, or the one that most rows would be routed to"
    group.add_argument("--warm-start", nargs="?", const=True, default=False, metavar="TASK", help=about)
    group.add_argument("--joint", action="store_true", help="train on routes over all tasks' slots, as the paper does")


def run(arguments: argparse.Namespace) -> int:
    from slm_fast.learn import check_task
    from slm_fast.slm import ScalableLM
    from slm_fast.store import Store

    # Everything that can be wrong with the call is found before anything is learned.
    files, valid_files = named_files(arguments.tasks), named_files(arguments.valid)
    for name in valid_files:
        if name not in files:
            raise InputError(f"--valid {name!r}: no --task of that name")
    check_stdin(files, valid_files)
    tasks = list(read_tasks(arguments, files, training=True).values())
    known = {task.name: task.labels or () for task in tasks}
    valid = read_tasks(arguments, valid_files, training=False, known=known)
    valid = {name: task.spelled_as(known[name]) for name, task in valid.items()}
    options = fields_of(arguments, LearnOptions)
    LearnOptions(**options)
    given = {name: value for name, value in fields_of(arguments, ModelConfig).items() if value is not None}
    if Store.exists(arguments.store):
        store = Store.open(arguments.store)
        for name, value in given.items():
            kept = store.about["config"].get(name)
            if name != "max_length" and (list(value) if isinstance(value, tuple) else value) != kept:
                raise InputError(f"--{name.replace('_', '-')}: {arguments.store} was made with {kept!r}")
        store.check_writable()
        slm = open_store(arguments)
    else:
        backbone = backbone_of(arguments)
        if backbone is None:
            raise InputError(f"{arguments.store}: a new store needs --backbone (a hub name, a local path, or minilm)")
        set_threads(arguments.threads)
        slm = ScalableLM.from_backbone(backbone, dtype=arguments.dtype, device=arguments.device, **given)
    for task in tasks:
        check_task(slm.model, task, valid.get(task.name), options.get("max_length"))
        slm.knows(task, LearnOptions(**options), valid=valid.get(task.name))
    if slm.store is None:
        slm.save_pretrained(arguments.store)
    for task in tasks:
        done = "kept" if task.name in slm.learned else "learned"
        _learn(slm, task, LearnOptions(**options), valid.get(task.name))
        held = f"{arguments.store} holds {len(Store.open(arguments.store).files)}"
        print(f"{done} {task.name} from {len(task.rows)} rows; {held}", file=sys.stderr)
    return 0


def _learn(slm: ScalableLM, task: Task, options: LearnOptions, valid: Task | None) -> None:
    """Learn a task. One that is learned and cannot be committed is tried again: whoever made the disk full, or keeps
    the store, has some time to mend it."""
    assert slm.store is not None
    try:
        return slm.learn(task, options, valid=valid)
    except WorkError as error:
        if task.name not in slm.learned:
            raise
        last, until = error, time.monotonic() + PATIENCE
    while time.monotonic() < until:
        print(f"slm-fast: warning: {last.args[0].partition(';')[0]}; trying again (Ctrl-C gives up)", file=sys.stderr)
        time.sleep(PAUSE)
        try:
            return slm.save_pretrained(slm.store.path)
        except WorkError as error:
            last = error
    raise last


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,3, got {text!r}") from None


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))
