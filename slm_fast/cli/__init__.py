"""The command line: `slm-fast VERB ...`.

Exit status: 0 done; 2 the call as written cannot be right; 1 anything found wrong after. An error is one line.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from slm_fast.cli.bench import BENCHMARKS
from slm_fast.cli.bench import run as run_benchmark
from slm_fast.errors import InputError, SlmError, WorkError

if TYPE_CHECKING:
    from slm_fast.slm import ScalableLM


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except SlmError as error:
        return _complain(str(error), error.status)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads: say no more
        return 1
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except (OSError, MemoryError) as error:
        return _complain(f"{type(error).__name__}: {error}", 1)


def _complain(message: str, status: int) -> int:
    print(f"slm-fast: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="slm-fast", description="One frozen language model that learns task after task and answers mixed batches."
    )
    parser.add_argument("--version", action="version", version=_version())
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)

    def verb(name: str, run: Any, about: str, *, store: bool = True) -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name, help=about, description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.set_defaults(run=run)
        if store:
            sub.add_argument("store", metavar="STORE", help="the directory that holds the tasks")
        return sub

    demo = verb("demo", _demo, "learn five small tasks and answer a batch that mixes them", store=False)
    demo.add_argument("--store", help="keep the learned tasks in this directory")

    learn = verb("learn", _learn, "learn one or more tasks, one after another, into a store")
    _task_files(learn, "a training file: csv, jsonl, jsonl.gz or parquet with text,label or instruction,input,output")
    learn.add_argument("--valid", action="append", default=[], metavar="NAME=FILE", help="a task's validation file")
    _model_options(learn)
    _learn_options(learn)

    predict = verb("predict", _predict, "answer JSON Lines of any tasks in any order")
    predict.add_argument("--input", default="-", help='lines of {"text": ...} or {"instruction": ..., "input": ...}')
    predict.add_argument(
        "--output", default="-", help="where the answers go, in the order of the input; the same call again resumes"
    )
    predict.add_argument("--overwrite", action="store_true", help="replace an output that is there, do not resume")
    predict.add_argument("--strict", action="store_true", help="stop at the first bad row")
    predict.add_argument("--task", help="take every row for this task")
    _predict_options(predict)

    evaluate = verb(
        "evaluate", _evaluate, "accuracy and routing accuracy on labelled files, answered as one mixed stream"
    )
    _task_files(evaluate, "a labelled file")
    evaluate.add_argument("--with-task-id", action="store_true", help="tell the model each row's task")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    _predict_options(evaluate)

    tasks = verb("tasks", _tasks, "list the tasks of a store")
    tasks.add_argument("--json", action="store_true", help="print JSON")
    forget = verb("forget", _forget, "remove a task exactly")
    forget.add_argument("name", metavar="NAME")
    merge = verb("merge", _merge, "copy the tasks of other stores into one", store=False)
    merge.add_argument("store", metavar="DEST", help="the store that receives them; made if it is not there")
    merge.add_argument("sources", metavar="SRC", nargs="+")
    verb("verify", _verify, "check every file of a store against its manifest")
    bench = verb("bench", _bench, "run a benchmark of the repository; what follows its name goes to it", store=False)
    bench.add_argument("name", choices=list(BENCHMARKS), help="; ".join(f"{n}: {b[1]}" for n, b in BENCHMARKS.items()))
    bench.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="such as --help")
    verb("doctor", _doctor, "show what this installation can use, and why something is not there", store=False)
    return parser


def _version() -> str:
    from slm_fast import __version__

    return f"slm-fast {__version__}"


def _task_files(parser: argparse.ArgumentParser, about: str) -> None:
    parser.add_argument("--task", action="append", required=True, metavar="NAME=FILE", dest="tasks", help=about)


def _device_options(parser: argparse.ArgumentParser, dtype: str) -> None:
    parser.add_argument("--backbone", help="hub name, local path or 'minilm'; a store remembers its own")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--dtype",
        default=dtype,
        help="float32, bfloat16, float16, or auto: bfloat16 where the processor or GPU has it",
    )
    parser.add_argument("--threads", type=int, help="processor threads; default: as torch chooses")


def _model_options(parser: argparse.ArgumentParser) -> None:
    _device_options(parser, "float32")
    group = parser.add_argument_group("how a new store's model is put together")
    group.add_argument("--query", choices=("trunk", "sentence"), help="trunk (default) or sentence (a second model)")
    group.add_argument("--router", choices=("gaussian", "dtkr"), help="gaussian (default) or dtkr (the paper's)")
    group.add_argument("--encoder", help="the sentence query's model")
    group.add_argument("--taps", type=_numbers, metavar="L,L", help="layers the trunk query reads")
    group.add_argument("--targets", type=_words, metavar="W,W", help="linear layers that carry increments")
    group.add_argument("--first-layer", type=int, help="lowest layer that carries increments")
    group.add_argument("--k", type=int, help="slots retrieved for an input")
    group.add_argument("--groups", type=int, help="groups of the dtkr router")
    group.add_argument("--aggregate", choices=("mean", "vote"), help="how the dtkr router joins its groups")
    group.add_argument("--temperature", type=float, help="of the gaussian router's weights")
    group.add_argument("--route-on", choices=("input", "prompt"), help="whether an instruction helps routing")
    group.add_argument("--max-length", type=int, help="tokens read of an input")


def _learn_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how a task is learned")
    group.add_argument("--epochs", type=int, help="default: 3, more for a small task")
    group.add_argument("--batch-size", type=int, default=16)
    group.add_argument("--learning-rate", type=float, default=1e-3)
    group.add_argument("--rank", type=int, default=8)
    group.add_argument("--slots", type=int, help="slots a task; default 1 (gaussian) or 4 (dtkr)")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--accumulate", type=int, default=1, help="compute a step's gradients in this many parts")
    group.add_argument("--autocast", action="store_true", help="compute in bfloat16 though the weights are float32")
    group.add_argument("--joint", action="store_true", help="train on routes over all tasks' slots, as the paper does")


def _predict_options(parser: argparse.ArgumentParser) -> None:
    _device_options(parser, "auto")
    parser.add_argument(
        "--batch-tokens", type=int, help="tokens of a batch, padding included; default: what suits the device"
    )
    parser.add_argument("--batch-size", type=int, help="rows of a batch at most")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of a generated answer")
    parser.add_argument(
        "--head", choices=("mixed", "winner"), default="mixed", help="weigh all tasks' heads or take one"
    )
    parser.add_argument(
        "--abstain",
        type=float,
        nargs="?",
        const=0.99,
        default=False,
        metavar="SHARE",
        help="give no task to rows farther off than this share of the task's training rows (0.99)",
    )
    parser.add_argument("--bare", action="store_true", help="answer with the bare backbone")
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--sample", action="store_true", help="sample generated text")
    parser.add_argument("--sample-temperature", dest="temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)


def _fields(arguments: argparse.Namespace, options: type[Any]) -> dict[str, Any]:
    """The arguments that are fields of an options dataclass."""
    names = {field.name for field in dataclasses.fields(options)}
    return {name: value for name, value in vars(arguments).items() if name in names}


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,3, got {text!r}") from None


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _named_files(given: Sequence[str]) -> dict[str, str]:
    from slm_fast.data import check_name

    files: dict[str, str] = {}
    for item in given:
        name, equals, path = item.partition("=")
        if not equals or not path:
            raise InputError(f"{item!r}: expected NAME=FILE")
        check_name(name)
        if name in files:
            raise InputError(f"task {name!r}: given twice")
        files[name] = path
    return files


def _open(arguments: argparse.Namespace) -> ScalableLM:
    from slm_fast.slm import ScalableLM

    _set_threads(arguments.threads)
    return ScalableLM.from_pretrained(
        arguments.store, backbone=arguments.backbone, dtype=arguments.dtype, device=arguments.device
    )


def _set_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        if threads < 1:
            raise InputError(f"--threads: expected at least 1, got {threads}")
        torch.set_num_threads(threads)


# The verbs


def _demo(arguments: argparse.Namespace) -> int:
    from slm_fast import demo

    demo.run(arguments.store)
    return 0


def _learn(arguments: argparse.Namespace) -> int:
    from slm_fast.data import Task
    from slm_fast.learn import LearnOptions, check_task
    from slm_fast.model import Config
    from slm_fast.slm import ScalableLM
    from slm_fast.store import Store

    # Everything that can be wrong with the call is found before anything is learned.
    tasks = [Task.from_file(name, path) for name, path in _named_files(arguments.tasks).items()]
    valid = {name: Task.from_file(name, path, training=False) for name, path in _named_files(arguments.valid).items()}
    for name in valid:
        if name not in {task.name for task in tasks}:
            raise InputError(f"--valid {name!r}: no --task of that name")
    options = _fields(arguments, LearnOptions)
    LearnOptions(**options)
    given = {name: value for name, value in _fields(arguments, Config).items() if value is not None}
    if Store.exists(arguments.store):
        store = Store.open(arguments.store)
        for name, value in given.items():
            kept = store.about["config"].get(name)
            if (list(value) if isinstance(value, tuple) else value) != kept:
                raise InputError(f"--{name.replace('_', '-')}: {arguments.store} was made with {kept!r}")
        for task in tasks:
            if task.name in store.files:
                raise InputError(f"task {task.name!r}: already in {arguments.store}; forget it first to learn it anew")
        slm = _open(arguments)
    else:
        if arguments.backbone is None:
            raise InputError(f"{arguments.store}: a new store needs --backbone (a hub name, a local path, or minilm)")
        _set_threads(arguments.threads)
        slm = ScalableLM.from_backbone(arguments.backbone, dtype=arguments.dtype, device=arguments.device, **given)
    for task in tasks:
        check_task(slm.model, task, valid.get(task.name))
    if slm.store is None:
        slm.save_pretrained(arguments.store)
    for task in tasks:
        slm.learn(task, valid=valid.get(task.name), **options)
        held = f"{arguments.store} holds {len(slm.tasks)}"
        print(f"learned {task.name} from {len(task.rows)} rows; {held}", file=sys.stderr)
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from slm_fast.jsonlines import answer_lines
    from slm_fast.predict import PredictOptions
    from slm_fast.progress import bar
    from slm_fast.resume import Output, check_resumable, open_input, survey

    # The output is opened, and so emptied, only when nothing is wrong with the call.
    options = PredictOptions(**_fields(arguments, PredictOptions))
    source_path = None if arguments.input == "-" else Path(arguments.input)
    sink_path = None if arguments.output == "-" else Path(arguments.output)
    if source_path is not None and not source_path.is_file():
        raise InputError(f"{source_path}: no such file")
    if sink_path is not None:
        if not sink_path.parent.is_dir():
            raise InputError(f"{sink_path}: no such folder")
        if sink_path.exists():
            if source_path is not None and sink_path.samefile(source_path):
                raise InputError(f"{sink_path}: is the input")
            if not arguments.overwrite and sink_path.stat().st_size:
                if source_path is None:
                    raise InputError(f"{sink_path}: is there already; --overwrite replaces it")
                check_resumable(sink_path)
    slm = _open(arguments)
    if arguments.task is not None and arguments.task not in slm.tasks:
        raise InputError(f"task {arguments.task!r}: not learned; tasks: {', '.join(slm.tasks) or 'none'}")
    about, rows, failed = None, None, 0
    if source_path is not None:
        digest, rows = survey(source_path)
        about = {"input": digest, "task": arguments.task} | _run_of(slm, options)
    with ExitStack() as stack:
        source = sys.stdin.buffer if source_path is None else stack.enter_context(open_input(source_path))
        output: Output | None = None
        if sink_path is not None and (sink_path.is_file() or not sink_path.exists()):
            output = stack.enter_context(Output(sink_path, about, overwrite=arguments.overwrite))
        stream = sys.stdout if sink_path is None or output else stack.enter_context(sink_path.open("w"))
        done = output.rows if output else 0
        if output and output.bad:
            failed = output.failed
            _stop_if_strict(arguments, output.bad)
        advance = stack.enter_context(bar("predicting", rows, done=done))
        for records in answer_lines(slm, source, arguments.task, options, done=done, rows=rows, report=advance):
            bad = [i for i, record in enumerate(records) if "error" in record]
            failed += len(bad)
            if arguments.strict and bad:
                records = records[: bad[0] + 1]
            if output:
                output.write(records)
            else:
                stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            if bad:
                _stop_if_strict(arguments, records[bad[0]])
    if failed:
        return _complain(f"{failed} row{'s' * (failed > 1)} failed; each is marked with its error in the output", 1)
    return 0


def _stop_if_strict(arguments: argparse.Namespace, bad: dict[str, Any]) -> None:
    if arguments.strict:
        raise WorkError(f"{arguments.input}: row {bad['id']}: {bad['error']}")


def _run_of(slm: ScalableLM, options: Any) -> dict[str, Any]:
    """What, beside the input, decides every byte that `predict` writes: the store, the options and the precision."""
    from slm_fast import __version__
    from slm_fast.predict import batch_tokens

    assert slm.store is not None
    about = {key: value for key, value in slm.model.about.items() if key != "backbone"}  # where it lies does not count
    backbone = slm.model.backbone
    return {
        "store": hashlib.sha256(json.dumps([about, slm.store.files], sort_keys=True).encode()).hexdigest(),
        "version": __version__,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "device": backbone.device.type,
        **dataclasses.asdict(options),
        "batch_tokens": batch_tokens(slm.model, options),
    }


def _evaluate(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from slm_fast.data import Task
    from slm_fast.predict import PredictOptions
    from slm_fast.tables import evaluation_table

    tasks = {name: Task.from_file(name, path, training=False) for name, path in _named_files(arguments.tasks).items()}
    slm = _open(arguments)
    evaluation = slm.evaluate(tasks, with_task_id=arguments.with_task_id, **_fields(arguments, PredictOptions))
    if arguments.json:
        result = {"accuracy": evaluation.accuracy, "routing": evaluation.routing, "average": evaluation.average}
        print(json.dumps(result))
    else:
        Console().print(evaluation_table(evaluation))
    return 0


def _tasks(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from slm_fast.store import Store
    from slm_fast.tables import tasks_table

    tasks = Store.open(arguments.store).load()
    if arguments.json:
        labels = {task.name: {"labels": task.labels, "slots": task.slots, "options": task.options} for task in tasks}
        print(json.dumps(labels))
    else:
        Console().print(tasks_table(tasks))
    return 0


def _forget(arguments: argparse.Namespace) -> int:
    from slm_fast.store import Store

    Store.open(arguments.store).commit(remove=[arguments.name])
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    from slm_fast.store import Store

    sources = [Store.open(path) for path in arguments.sources]
    exists = Store.exists(arguments.store)
    store = Store.open(arguments.store) if exists else Store(arguments.store, sources[0].about, {})
    store.merge(sources)
    print(f"{arguments.store} holds {len(store.files)} tasks: {', '.join(sorted(store.files))}", file=sys.stderr)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
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


def _bench(arguments: argparse.Namespace) -> int:
    return run_benchmark(arguments.name, arguments.arguments)


def _doctor(_: argparse.Namespace) -> int:
    import platform
    from importlib import import_module, metadata

    import torch
    from rich.console import Console
    from rich.table import Table

    from slm_fast.backbone import PACKAGED, choose_device, choose_dtype, resolve
    from slm_fast.ops import backends
    from slm_fast.ops.dispatch import NATIVE_MISSING

    table = Table(show_header=False)
    table.add_row("slm_fast", metadata.version("slm-fast"))
    table.add_row("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in ("torch", "transformers", "sentence-transformers", "safetensors"):
        table.add_row(package, metadata.version(package))
    table.add_row("CPU", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    table.add_row("GPU", gpu)
    table.add_row("dtype auto", str(choose_dtype("auto", choose_device("auto"))).removeprefix("torch."))
    for backend in backends():
        table.add_row(f"backend {backend.name}", backend.why_not() or f"ready on {', '.join(backend.devices)}")
    if NATIVE_MISSING is None:
        info = import_module("slm_fast._C").build_info()
        sets = ", ".join(info["instruction_sets"])
        table.add_row("native kernels", f"{info['instruction_set']} of {sets}; {info['compiler']}")
        table.add_row("CUDA kernels", info["cuda"] or "not built")
    for name in PACKAGED:
        try:
            resolve(name)
            table.add_row(f"backbone {name}", "ready, weights are those expected")
        except SlmError as error:
            table.add_row(f"backbone {name}", str(error))
    Console().print(table)
    if NATIVE_MISSING is not None:
        return _complain(f"{NATIVE_MISSING}; until then a CPU runs the reference operators, which are slower", 1)
    return 0
