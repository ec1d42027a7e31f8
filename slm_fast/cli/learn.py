"""`slm-fast learn`."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from slm_fast.cli.arguments import (
    STDIN,
    Verbs,
    add_device_options,
    add_label_files,
    add_reading_options,
    add_task_files,
    backbone_of,
    check_stdin,
    complain,
    fields_of,
    named_files,
    open_store,
    quiet_ray,
    read_tasks,
    set_threads,
)
from slm_fast.collection import without_collection
from slm_fast.errors import InputError, SlmError, SlmWarning, WorkError
from slm_fast.options import LearnOptions, ModelConfig

if TYPE_CHECKING:
    from slm_fast.backbone import Backbone
    from slm_fast.distributed import ProcessGroup
    from slm_fast.jobs import Job, Workers
    from slm_fast.slm import ScalableLM

PATIENCE, PAUSE = 600.0, 5.0  # seconds before giving up on committing a learned task, and between attempts


def add(verbs: Verbs) -> None:
    learn = verbs.add("learn", run, "learn one or more tasks and add them to a store")
    about = "training file (csv, tsv, jsonl, json, parquet) with text,label; instruction,input,output; or messages"
    add_task_files(learn, f"{about}; - reads standard input")
    learn.add_argument("--valid", action="append", default=[], metavar="NAME=FILE", help="validation file of a task")
    about = "early stopping: stop after N epochs without improvement on the validation file"
    learn.add_argument("--patience", type=int, metavar="N", help=about)
    about = "learn N tasks in parallel, one process per task"
    learn.add_argument("--jobs", type=int, default=1, metavar="N", help=about)
    about = "run the jobs on a Ray cluster: HOST:PORT, auto (the running cluster) or local"
    learn.add_argument("--ray", metavar="ADDRESS", help=about)
    about = "shard the frozen backbone across processes (with `torchrun` or `accelerate launch`)"
    learn.add_argument("--fsdp", action="store_true", help=about)
    add_reading_options(learn)
    add_label_files(learn)
    add_device_options(learn, "float32")
    add_model_options(learn)
    _add_learn_options(learn)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The fields of ModelConfig. Fields not given are None."""
    group = parser.add_argument_group("model of a new store")
    group.add_argument(
        "--query",
        choices=("trunk", "sentence"),
        help="query from the backbone's own layers (trunk, default) or from a second model (sentence)",
    )
    group.add_argument("--router", choices=("gaussian", "dtkr"), help="gaussian (default) or dtkr (from the paper)")
    group.add_argument("--encoder", help="model of the sentence query")
    group.add_argument("--taps", type=_numbers, metavar="L,L", help="layers that the trunk query reads")
    group.add_argument(
        "--targets",
        type=_words,
        metavar="W,W",
        help="linear layers that get LoRA increments, by the names in docs/families.md",
    )
    group.add_argument("--first-layer", type=int, help="lowest layer that gets increments")
    group.add_argument("--k", type=int, help="slots retrieved per input (top-K)")
    group.add_argument("--groups", type=int, help="number of groups of the dtkr router")
    group.add_argument("--aggregate", choices=("mean", "vote"), help="how the dtkr router combines its groups")
    group.add_argument("--temperature", type=float, help="softmax temperature of the gaussian router's weights")
    group.add_argument("--features", type=int, help="random features of the gaussian router (default: up to 2,048)")
    about = "format rows with the tokenizer's chat template (causal chat models)"
    group.add_argument("--chat-template", action="store_true", default=None, help=about)
    group.add_argument(
        "--route-on", choices=("input", "prompt"), help="route on the input alone, or on instruction and input"
    )
    about = (
        "truncate inputs to this many tokens: for a new store always, for an existing one while learning these tasks"
    )
    group.add_argument("--max-length", type=int, help=about)


def _add_learn_options(parser: argparse.ArgumentParser) -> None:
    """The fields of LearnOptions that the command line offers."""
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=int, help="training epochs (default: 3, more for a small task)")
    group.add_argument("--batch-size", type=int, default=16, help="rows per optimiser step")
    group.add_argument("--learning-rate", type=float, default=1e-3, help="peak learning rate")
    group.add_argument("--rank", type=int, default=8, help="LoRA rank")
    group.add_argument("--slots", type=int, help="slots per task (default: 1 for gaussian, 4 for dtkr)")
    group.add_argument("--seed", type=int, default=0, help="random seed")
    group.add_argument("--accumulate", type=int, default=1, help="gradient accumulation steps")
    group.add_argument("--autocast", action="store_true", help="bfloat16 autocast with float32 weights")
    about = "initialise from a learned task: TASK, or the one that most rows are routed to"
    group.add_argument("--warm-start", nargs="?", const=True, default=False, metavar="TASK", help=about)
    group.add_argument(
        "--joint", action="store_true", help="route over the slots of all tasks during training, as in the paper"
    )


def run(arguments: argparse.Namespace) -> int:
    from slm_fast.distributed import is_launched

    if is_launched():
        return _learn_together(arguments)
    if arguments.fsdp:
        raise InputError("--fsdp: needs several processes, as `torchrun` or `accelerate launch` starts them")
    # All usage errors are found before anything is learned.
    jobs, given = _read(arguments), _given(arguments)
    count = _count(arguments, jobs)
    _check_store(arguments, given)
    with ExitStack() as stack:
        workers = _workers(arguments, count, given, stack) if count > 1 or arguments.ray is not None else None
        slm = _open(arguments, given)
        _check(slm, jobs)
        if slm.store is None:
            slm.save_pretrained(arguments.store)
        if workers is not None:
            return _learn_side_by_side(slm, workers, jobs)
        for job in jobs:
            _learn(slm, job)
    return 0


def _learn_together(arguments: argparse.Namespace) -> int:
    """Learn in all processes of a launcher. Each takes its share of every batch, and the first one commits."""
    from slm_fast.backbone import load_backbone
    from slm_fast.distributed import asks_for_shards, process_group, shard
    from slm_fast.store import Store

    set_threads(arguments.threads)
    with process_group(arguments.device) as group:
        is_main, backbone = group.rank == 0, None
        if not is_main:
            warnings.simplefilter("ignore", SlmWarning)  # the main process shows them
        with group.agreeing():
            jobs, given = _read(arguments, launched=True), _given(arguments)
            _check_store(arguments, given)
            if arguments.fsdp or asks_for_shards():
                store = Store.open(arguments.store) if Store.exists(arguments.store) else None
                name = backbone_of(arguments) or (store.about["backbone"] if store else None)
                backbone = load_backbone(name, None, arguments.dtype, "cpu")
        if backbone is not None:
            shard(backbone, group)
        with group.agreeing():
            slm = _open(arguments, given, backbone)
            _check(slm, jobs)
        if not is_main:
            slm.store = None
        elif slm.store is None:
            slm.save_pretrained(arguments.store)
        for job in jobs:
            _learn_one_together(slm, job, group)
    return 0


def _learn_one_together(slm: ScalableLM, job: Job, group: ProcessGroup) -> None:
    from slm_fast import __version__
    from slm_fast.learn import learn_task
    from slm_fast.origin import origin
    from slm_fast.warm_start import kept_options

    kept = False
    with group.agreeing():
        if slm.store is not None:
            slm.store.check_writable()
            slm.refresh()
        kept = slm.knows(*job[:2], **job.validation)
    made_from = origin(slm.model, job.task, kept_options(job.options, None, job.patience), job.valid)
    said = group.gather([kept, made_from, __version__])
    with group.agreeing():
        for rank, (_, *theirs) in enumerate(said):
            if theirs != said[0][1:]:
                raise WorkError(
                    f"task {job.task.name!r}: process {rank} has other rows, options, tasks, backbone or another "
                    "version of slm_fast than process 0"
                )
    learned = None
    if not said[0][0]:
        shown = False if slm.store is None else None
        learned = learn_task(slm.model, *job[:2], **job.validation, progress=shown, processes=group)
    with group.agreeing():
        if slm.store is not None and learned is None:
            _learn(slm, job)  # which reports that it is kept
        elif slm.store is not None and learned is not None:
            _commit(slm, job, partial(slm.add, learned), "learned")
        elif learned is not None:
            slm.add(learned)


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of ModelConfig that were given."""
    return {name: value for name, value in fields_of(arguments, ModelConfig).items() if value is not None}


def _check(slm: ScalableLM, jobs: Sequence[Job]) -> None:
    """Raise InputError for a task that this model cannot learn, as far as that is known in advance."""
    from slm_fast.learn import check_task

    for job in jobs:
        check_task(slm.model, job.task, job.valid, job.options.max_length)
        slm.knows(*job[:2], **job.validation)


def _read(arguments: argparse.Namespace, *, launched: bool = False) -> list[Job]:
    """The tasks to learn, from the files and options given."""
    from slm_fast.epochs import checked_patience
    from slm_fast.jobs import Job

    files, valid_files = named_files(arguments.tasks), named_files(arguments.valid)
    for name in valid_files:
        if name not in files:
            raise InputError(f"--valid {name!r}: no --task of that name")
    check_stdin(files, valid_files)
    if launched and arguments.ray is not None:
        raise InputError("--ray: does not go with the processes of a launcher")
    if launched and (arguments.jobs != 1 or any(path in STDIN for path in (*files.values(), *valid_files.values()))):
        what = "--jobs" if arguments.jobs != 1 else "standard input (-)"
        raise InputError(f"{what}: does not go with the processes of a launcher, which all read the same files")
    if arguments.fsdp and arguments.autocast:
        raise InputError("--autocast: does not go with --fsdp; --dtype bfloat16 does")
    tasks = list(read_tasks(arguments, files, training=True).values())
    known = {task.name: task.labels or () for task in tasks}
    valid = read_tasks(arguments, valid_files, training=False, known=known)
    valid = {name: task.spelled_as(known[name]) for name, task in valid.items()}
    options = LearnOptions(**fields_of(arguments, LearnOptions))
    patience = checked_patience(arguments.patience, has_valid=bool(valid))
    return [Job(task, options, valid.get(task.name), patience if task.name in valid else None) for task in tasks]


def open_or_new(arguments: argparse.Namespace) -> ScalableLM:
    """Open the store's model or, if there is no store, create one without tasks from the options of
    `add_model_options`. Raises InputError if these differ from the store's."""
    given = _given(arguments)
    _check_store(arguments, given)
    return _open(arguments, given)


def _check_store(arguments: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Raise InputError unless the store exists and matches the given options, or can be created."""
    from slm_fast.store import Store

    if Store.exists(arguments.store):
        store = Store.open(arguments.store)
        for name, value in given.items():
            kept = store.about["config"].get(name)
            kept = kept is not None if name == "chat_template" else kept
            if name != "max_length" and (list(value) if isinstance(value, tuple) else value) != kept:
                raise InputError(f"--{name.replace('_', '-')}: {arguments.store} was made with {kept!r}")
        store.check_writable()
    elif backbone_of(arguments) is None:
        raise InputError(f"{arguments.store}: a new store needs --backbone (a hub name, a local path, or minilm)")


@without_collection()
def _open(arguments: argparse.Namespace, given: Mapping[str, Any], backbone: Backbone | None = None) -> ScalableLM:
    """Open the store's model or, if the store does not exist yet, create one without saving it. backbone: an already
    loaded one, if any."""
    from slm_fast.slm import ScalableLM
    from slm_fast.store import Store

    if Store.exists(arguments.store):
        return open_store(arguments, backbone)
    set_threads(arguments.threads)
    found = backbone or backbone_of(arguments)
    return ScalableLM.from_backbone(found, dtype=arguments.dtype, device=arguments.device, **given)


def _count(arguments: argparse.Namespace, jobs: Sequence[Job]) -> int:
    """The number of workers."""
    if arguments.jobs < 1:
        raise InputError(f"--jobs: expected at least 1, got {arguments.jobs}")
    several = "--jobs" if arguments.jobs > 1 else "--ray" if arguments.ray is not None else ""
    if several and (arguments.joint or arguments.warm_start is True):
        flag = "--joint" if arguments.joint else "--warm-start without a TASK"
        raise InputError(f"{several}: does not go with {flag}, where a task depends on those learned before it")
    return min(arguments.jobs, len(jobs))


def _workers(arguments: argparse.Namespace, count: int, given: Mapping[str, Any], stack: ExitStack) -> Workers:
    """Start worker processes with the store's model or, if there is no store yet, that of the given options. The stack
    ends them."""
    from slm_fast.jobs import Workers
    from slm_fast.store import Store

    set_threads(arguments.threads)
    how = {"dtype": arguments.dtype, "device": arguments.device, "threads": arguments.threads}
    if arguments.ray is not None:
        stack.enter_context(quiet_ray())
        from slm_fast.integrations import ray_cluster, ray_learn

        stack.enter_context(ray_cluster.connected(arguments.ray))
        how["make"] = ray_learn.maker(count, arguments.threads, arguments.device)
    if not Store.exists(arguments.store):
        return stack.enter_context(Workers(count, backbone_of(arguments) or "", given, **how))
    store = Store.open(arguments.store)
    start = arguments.warm_start  # a task that does not exist is reported when the model opens
    how["start"] = store.read(start)[1] if start in store.files else b""
    backbone = backbone_of(arguments) or store.about["backbone"]
    return stack.enter_context(Workers(count, backbone, store.about["config"], **how))


def _learn(slm: ScalableLM, job: Job) -> None:
    """Learn a task in this process and commit it."""
    done = "kept" if job.task.name in slm.learned else "learned"
    _commit(slm, job, lambda: slm.learn(*job[:2], **job.validation), done)


def _learn_side_by_side(slm: ScalableLM, workers: Workers, jobs: Sequence[Job]) -> int:
    """Learn tasks on workers, commit each when it is done, and return the exit status. A failed task does not stop the
    others."""
    from slm_fast.progress import bar

    status, new = 0, []
    for job in jobs:
        if slm.knows(*job[:2], **job.validation):
            _learn(slm, job)  # which reports it
        else:
            new.append(job)
    with bar("learning", sum(len(job.task.rows) for job in new)) as advance:
        for job, learned in workers.learn(slm, new):
            try:
                if isinstance(learned, SlmError):
                    raise learned
                slm.refresh()
                if slm.knows(*job[:2], **job.validation):  # learned by another process in the meantime
                    _learn(slm, job)
                else:
                    _commit(slm, job, partial(slm.add, learned), "learned")
            except SlmError as error:
                if job.task.name in slm.learned:  # other commits would fail, too
                    raise
                status = complain(str(error), error.status)
            advance(len(job.task.rows))
    return status


def _commit(slm: ScalableLM, job: Job, act: Callable[[], None], done: str) -> None:
    """Commit a task and report it. If a learned task cannot be committed, retry for a while, so that a full disk or a
    locked store can be fixed."""
    assert slm.store is not None
    last: WorkError | None = None
    try:
        act()
    except WorkError as error:
        if job.task.name not in slm.learned:
            raise
        last = error
    until = time.monotonic() + PATIENCE
    while last is not None and time.monotonic() < until:
        print(f"slm-fast: warning: {last.args[0].partition(';')[0]}; trying again (Ctrl-C gives up)", file=sys.stderr)
        time.sleep(PAUSE)
        try:
            slm.save_pretrained(slm.store.path)
            last = None
        except WorkError as error:
            last = error
    if last is not None:
        raise last
    held = f"tasks in {slm.store.path}: {len(type(slm.store).open(slm.store.path).files)}"
    print(f"{done} {job.task.name} from {len(job.task.rows)} rows; {held}", file=sys.stderr)


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,3, got {text!r}") from None


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))
