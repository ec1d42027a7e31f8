"""Shared by the verbs: the parser, common options, and opening a store."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from importlib.util import find_spec
from itertools import takewhile
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

from slm_fast.collection import without_collection
from slm_fast.errors import InputError, warn
from slm_fast.idle import idle_options
from slm_fast.options import PredictOptions, nearest

if TYPE_CHECKING:
    from slm_fast.backbone import Backbone
    from slm_fast.data import Task
    from slm_fast.slm import ScalableLM

STDIN = ("-", "/dev/stdin")
ABSTAIN, SHARE = "--abstain", 0.99
Run = Callable[[argparse.Namespace], int]  # runs a verb and returns the exit status


class Once(argparse.Action):
    """An option that names data. It refuses to be given twice, since one of them would be dropped. (Of other options
    the last one counts, as scripts that add to a command expect.)"""

    _given_in: argparse.Namespace | None = None

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        if self._given_in is namespace:
            raise argparse.ArgumentError(self, "given twice")
        self._given_in = namespace
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """Reports a usage error in one line. Unknown options come first, since they often cause the other errors."""

    verbs: Mapping[str, Parser] = MappingProxyType({})
    _words: Sequence[str] = ()

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, others = self.parse_known_args(args, namespace)
        self._check_order()
        if others:
            verb = self.verbs.get(vars(found).get("verb", ""), self)
            verb._end(verb._about(others))
        return found

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self._check_order()
        self._end(self._about(self._unknown()) or message)

    def _check_order(self) -> None:
        """Refuse an option before the verb that this parser does not have."""
        first = next(iter(self._words), "")
        name = first.partition("=")[0]
        if (
            self.verbs
            and first.startswith("--")
            and not any(known.startswith(name) for known in self._option_string_actions)
        ):
            self._end(f"unrecognized argument before the verb: {first}; options come after it")

    def _end(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)

    def _about(self, words: Sequence[str]) -> str:
        """An error's message about words that this parser does not know; none without words."""
        options = [option.lstrip("-") for option in self._option_string_actions]
        first = next((word.partition("=")[0].lstrip("-") for word in words if word.startswith("-")), "")
        hint = nearest(first, options, "--") if first else ""
        return f"unrecognized arguments: {' '.join(words)}{hint}" if words else ""

    def _unknown(self) -> list[str]:
        """Options among the words that this parser does not have, unless it passes words on to others."""
        if any(action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in self._actions):
            return []
        given = [word for word in takewhile("--".__ne__, self._words) if word.startswith("--") and " " not in word]
        known = self._option_string_actions  # which may be abbreviated
        return [word for word in given if not any(name.startswith(word.partition("=")[0]) for name in known)]

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            said = f"invalid choice: {value!r} (choose from {', '.join(choices)}){nearest(str(value), choices)}"
            raise argparse.ArgumentError(action, said)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that are values, unless the help already mentions them."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_value = action.default is not None and action.default is not False and action.default != []
        return super()._get_help_string(action) if is_value and "default" not in (action.help or "") else action.help


class Verbs:
    """The subparsers, to which each verb adds its own."""

    def __init__(self, parser: Parser) -> None:
        self._verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
        parser.verbs = self._verbs.choices

    def add(self, name: str, run: Run, about: str, *, store: bool = True) -> argparse.ArgumentParser:
        """Add a verb and return its parser. With `store`, its first argument is the store's directory."""
        parser = self._verbs.add_parser(
            name, help=about, description=f"{about[0].upper()}{about[1:]}.", formatter_class=Help
        )
        parser.set_defaults(run=run)
        if store:
            parser.add_argument(
                "store", metavar="STORE", help="directory of the store; read-only verbs also take a URL"
            )
        return parser


def complain(message: str, status: int) -> int:
    print(f"slm-fast: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def add_task_files(parser: argparse.ArgumentParser, about: str) -> None:
    parser.add_argument("--task", action="append", required=True, metavar="NAME=FILE", dest="tasks", help=about)


def add_reading_options(parser: argparse.ArgumentParser, *, label: bool = True) -> None:
    """How files are read if it cannot be detected: the keywords of `Task.from_file`."""
    group = parser.add_argument_group("reading files (detected from the file by default)")
    group.add_argument("--text-column", metavar="NAME", help="column with the input text")
    if label:
        group.add_argument("--label-column", metavar="NAME", help="column with the label or answer")
    group.add_argument("--delimiter", metavar="CHAR", help="column separator, such as ';' or tab")
    group.add_argument("--encoding", help="file encoding, such as utf-8, utf-16 or cp1252")


def add_label_files(parser: argparse.ArgumentParser) -> None:
    about = "JSON list of label names, for a task whose labels are integers from 0"
    parser.add_argument("--labels", action="append", default=[], metavar="NAME=FILE", help=about)


def read_tasks(
    arguments: argparse.Namespace,
    files: Mapping[str, str],
    *,
    training: bool,
    known: Mapping[str, Collection[str]] | None = None,
) -> dict[str, Task]:
    """Read the tasks in these files, each once. "-" is standard input. known: labels of learned tasks."""
    from slm_fast.data import Task

    labels = named_files(arguments.labels)
    named = [name for name, _, _ in (item.partition("=") for item in arguments.tasks)]
    for name in labels:
        if name not in named:
            raise InputError(f"--labels {name!r}: no --task of that name")
    return {
        name: Task.from_file(
            name,
            sys.stdin.buffer if path in STDIN else path,
            text=arguments.text_column,
            label=arguments.label_column,
            delimiter=arguments.delimiter,
            encoding=arguments.encoding,
            labels=labels.get(name),
            known=(known or {}).get(name, ()),
            training=training,
        )
        for name, path in files.items()
    }


def check_stdin(*files: Mapping[str, str]) -> None:
    """Raise InputError if more than one file is standard input."""
    if sum(path in STDIN for group in files for path in group.values()) > 1:
        raise InputError("standard input (-): can be read once, and is given twice")


def add_device_options(parser: argparse.ArgumentParser, dtype: str) -> None:
    parser.add_argument("--backbone", help="hub name, local path, minilm or smollm2; a store knows its own")
    parser.add_argument("--gguf", metavar="FILE", help="load this GGUF file from the backbone's folder or repository")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--dtype",
        default=dtype,
        help="float32, bfloat16, float16, or auto (bfloat16 if the hardware supports it)",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: chosen by torch)")
    add_skip_damaged(parser)


def add_skip_damaged(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--skip-damaged", action="store_true", help="ignore damaged tasks in the store")


def backbone_of(arguments: argparse.Namespace) -> str | None:
    """The backbone's name from --backbone and --gguf."""
    backbone: str | None = arguments.backbone
    if arguments.gguf is None:
        return backbone
    if not backbone:
        raise InputError(f"--gguf {arguments.gguf!r}: needs --backbone, the folder or repository that it is in")
    if not arguments.gguf.endswith(".gguf"):
        raise InputError(f"--gguf {arguments.gguf!r}: expected a file whose name ends in .gguf")
    return os.path.join(backbone, arguments.gguf)


def add_routing_options(parser: argparse.ArgumentParser) -> None:
    """The fields of PredictOptions on heads and abstention."""
    parser.add_argument(
        "--head",
        choices=("mixed", "winner"),
        default="mixed",
        help="mix the heads of all retrieved tasks, or use the best task's",
    )
    parser.add_argument(
        ABSTAIN,
        type=_share,
        nargs="?",
        const=SHARE,
        default=False,
        metavar="SHARE",
        help="answer out-of-distribution rows with no task: those farther away than this share of training rows "
        "(0.99 if no SHARE is given)",
    )
    parser.add_argument(
        "--distance", action="store_true", help="report each row's distance from its task (--abstain does, too)"
    )


def _share(text: str) -> float:
    if _is_number(text) and 0 <= float(text) <= 1:
        return float(text)
    raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")


def add_memory_option(parser: argparse.ArgumentParser) -> None:
    about = (
        "device memory for the tasks' increments, such as 2GB; the rest are loaded on demand (default: half of what is"
    )
    parser.add_argument("--device-memory", metavar="SIZE", help=f"{about} free)")


def add_predict_options(parser: argparse.ArgumentParser) -> None:
    """The fields of PredictOptions."""
    add_device_options(parser, "auto")
    add_memory_option(parser)
    parser.add_argument(
        "--batch-tokens", type=int, help="tokens per batch, including padding (default: depends on the device)"
    )
    parser.add_argument("--batch-size", type=int, help="maximum rows per batch")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="maximum tokens of a generated answer")
    add_routing_options(parser)
    parser.add_argument("--bare", action="store_true", help="answer with the bare backbone, without any task")
    parser.add_argument("--beams", type=int, default=1, help="number of beams for beam search")
    parser.add_argument("--sample", action="store_true", help="sample instead of decoding greedily")
    parser.add_argument("--sample-temperature", dest="temperature", type=float, default=1.0, help="with --sample")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling, with --sample")
    parser.add_argument("--seed", type=int, default=0, help="random seed for sampling")


def with_share(argv: Sequence[str]) -> list[str]:
    """Add the default share to a bare `--abstain`: argparse would take the next argument as its value, even STORE."""
    return [
        f"{ABSTAIN}={SHARE}" if word == ABSTAIN and not _is_number(following) else word
        for word, following in zip(argv, [*argv[1:], ""], strict=False)
    ]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def fields_of(arguments: argparse.Namespace, options: type[Any]) -> dict[str, Any]:
    """The arguments that are fields of an options dataclass."""
    names = {field.name for field in dataclasses.fields(options)}
    return {name: value for name, value in vars(arguments).items() if name in names}


def named_files(given: Sequence[str]) -> dict[str, str]:
    """Parse NAME=FILE pairs with unique names."""
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


@without_collection()
def open_store(
    arguments: argparse.Namespace, backbone: Backbone | None = None, *, for_another_thread: bool = False
) -> ScalableLM:
    """Open the model of a store. backbone: an already loaded one, if any. for_another_thread: that will run it."""
    from slm_fast.slm import ScalableLM
    from slm_fast.surroundings import in_one_thread

    set_threads(arguments.threads)
    more: dict[str, Any] = {"skip_damaged": True} if arguments.skip_damaged else {}
    more |= {"device_memory": vars(arguments).get("device_memory")}
    with in_one_thread() if for_another_thread else nullcontext():
        slm = ScalableLM.from_pretrained(
            arguments.store,
            backbone=backbone or backbone_of(arguments),
            dtype=arguments.dtype,
            device=arguments.device,
            **more,
        )
    if "sample" in vars(arguments):
        tell_idle_options(arguments, slm.model.backbone.kind, bool(slm.classes_))
    return slm


def tell_idle_options(arguments: argparse.Namespace, kind: str, has_heads: bool) -> None:
    """Warn of given prediction options that have no effect on a backbone of this kind and its tasks."""
    told = [name for name in ("task", "with_task_id") if vars(arguments).get(name)]
    options = PredictOptions(**fields_of(arguments, PredictOptions))
    for line in idle_options(options, kind, has_heads=has_heads, told=told, flag=_flag):
        warn(line)


def _flag(name: str) -> str:
    return "--sample-temperature" if name == "temperature" else f"--{name.replace('_', '-')}"


@contextmanager
def quiet_ray() -> Iterator[None]:
    """Discard what Ray prints to standard output, which may carry answers.

    Raises InputError if Ray is not installed.
    """
    if find_spec("ray") is None:
        raise InputError("--ray: Ray is not installed: pip install 'slm-fast[ray]'")
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def set_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        if threads < 1:
            raise InputError(f"--threads: expected at least 1, got {threads}")
        torch.set_num_threads(threads)
