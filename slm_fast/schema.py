"""Complete validation of store manifests and task files when they are read.

Every error is a one-line WorkError that names the file and the field.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from slm_fast.covariance import is_scatter, unpack
from slm_fast.data import check_name
from slm_fast.errors import InputError, WorkError
from slm_fast.fields import (
    PLAIN,
    STRING,
    TEXT,
    Kind,
    Unfit,
    Unknown,
    check,
    fields,
    integer,
    is_plain,
    list_of,
    number,
    or_null,
    read_json,
    repeated,
    word,
)
from slm_fast.options import LARGEST, TEMPERATURES
from slm_fast.task_tensors import (
    ACTIVATIONS,
    NEWER,
    POOLINGS,
    ROUTERS,
    check_numbers,
    check_shape,
    check_tensors,
    modules_of,
)
from slm_fast.tasks import Adapter, LearnedTask

FORMAT = 1
DIGEST: Kind = (
    "64 hexadecimal digits",
    lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None,
)
# Fields of a complete model configuration (slm_fast.options.ModelConfig) in a manifest.
CONFIG: Mapping[str, Kind] = {
    "query": word("trunk", "sentence"),
    "router": word("gaussian", "dtkr"),
    "taps": or_null(list_of(integer(0, LARGEST["layer"]))),
    "encoder": or_null(TEXT),
    "targets": list_of(TEXT),
    "first_layer": integer(0, LARGEST["layer"]),
    "k": integer(1, LARGEST["k"]),
    "groups": integer(1, LARGEST["groups"]),
    "aggregate": word("mean", "vote"),
    "temperature": number(*TEMPERATURES),
    "features": integer(0, LARGEST["features"]),
    "route_on": word("input", "prompt"),
    "max_length": integer(1, LARGEST["max_length"]),
    "chat_template": TEXT,
}
# Fields present only if set, so that stores without them do not change.
WHEN_SET = ("chat_template",)
# Fields of an imported task's `adapter` (slm_fast.tasks.Adapter).
ADAPTER: Mapping[str, Kind] = {
    "pooling": or_null(word(*POOLINGS)),
    "prompt": word("plain", "separator"),
    "chat_template": or_null(TEXT),
    "ends": ("a list of token ids", lambda value: value == [] or list_of(integer(0))[1](value)),
    "activation": word(*ACTIVATIONS),  # may be missing
}
WIDTH = integer(1, 1 << 24)
SHAPES: Mapping[str, Kind] = {"hidden": or_null(WIDTH), "query": WIDTH}  # besides `layers`, in a manifest's `shapes`
# Fields of `model` that stores of earlier versions lack. They are compared if both sides have them.
WHEN_KNOWN = ("shapes", "tokens", "settings", "encoder_tokens", "encoder_settings")
SETTINGS: Kind = "plain JSON, at most 2 deep", lambda value: is_plain(value, 2)

# Configuration field -> its value in stores written before the field existed. New fields of `CONFIG` need one, so that
# older stores open and answer as before.
WHEN_ABSENT: Mapping[str, Any] = {"features": 0}


# The manifest


def check_manifest(data: bytes, file: Path | str) -> tuple[dict[str, Any], dict[str, str]]:
    """What the tasks of a store share, with the configuration completed from `WHEN_ABSENT`, and the SHA-256 of each
    task's file.

    Raises:
        WorkError: the manifest is damaged or of a newer version.
    """
    try:
        content = read_json(data)
        version = fields(content, "", "format", others=True)["format"]
        check(version, "format", integer(1))
        if version != FORMAT:
            raise WorkError(f"{file}: format {version}; this version of slm_fast reads format {FORMAT}")
        fields(content, "", "format", "model", "tasks")
        return _model(content["model"]), _files(content["tasks"])
    except Unknown as unknown:
        raise WorkError(f"{file}: {unknown}") from None
    except (Unfit, ValueError) as error:
        raise WorkError(f"{file}: damaged: {error}") from None


def _model(model: Any) -> dict[str, Any]:
    fields(model, "model", "backbone", "fingerprint", "config", optional=["encoder_fingerprint", *WHEN_KNOWN])
    for field, kind in (
        *(("backbone", STRING), ("fingerprint", TEXT), ("tokens", DIGEST), ("settings", SETTINGS)),
        *(("encoder_fingerprint", TEXT), ("encoder_tokens", DIGEST), ("encoder_settings", SETTINGS)),
    ):
        if field in model:
            check(model[field], f"model.{field}", kind)
    config = {**WHEN_ABSENT, **fields(model["config"], "model.config", others=True)}
    fields(config, "model.config", *(field for field in CONFIG if field not in WHEN_SET), optional=WHEN_SET)
    for field in [field for field in CONFIG if field in config]:
        check(config[field], f"model.config.{field}", CONFIG[field])
    for field in ("taps", "targets"):
        if repeated(config[field] or ()) is not None:
            raise Unfit(f"model.config.{field}", f"{repeated(config[field])!r} is listed twice")
    for field in ("settings", "encoder_settings"):
        fields(model.get(field, {}), f"model.{field}", others=True)
    if "shapes" in model:
        shapes = fields(model["shapes"], "model.shapes", "layers", *SHAPES)
        for field, kind in SHAPES.items():
            check(shapes[field], f"model.shapes.{field}", kind)
        for module, widths in fields(shapes["layers"], "model.shapes.layers", others=True).items():
            check(widths, f"model.shapes.layers.{module}", list_of(WIDTH, 2))
    sentence = config["query"] == "sentence"
    for field, there, wanted in (
        ("config.taps", config["taps"] is not None, not sentence),
        ("config.encoder", config["encoder"] is not None, sentence),
        ("encoder_fingerprint", "encoder_fingerprint" in model, sentence),
    ):
        if there != wanted:
            raise Unfit(f"model.{field}", f"{'missing' if wanted else 'does not go'} with query {config['query']!r}")
    return {**model, "config": config}


def _files(tasks: Any) -> dict[str, str]:
    files = {}
    for name, entry in fields(tasks, "tasks", others=True).items():
        try:
            check_name(name)  # it becomes a path
        except InputError as error:
            raise Unfit("tasks", str(error)) from None
        fields(entry, f"tasks.{name}", "file", "sha256")
        digest = entry["sha256"]
        check(digest, f"tasks.{name}.sha256", DIGEST)
        check(entry["file"], f"tasks.{name}.file", word(task_path(name, digest)))
        files[name] = digest
    return files


def task_path(name: str, digest: str) -> str:
    """Path of a task's file in its store."""
    return f"tasks/{name}/{digest}.safetensors"


def manifest_of(about: Mapping[str, Any], files: Mapping[str, str]) -> bytes:
    """The manifest of a store: JSON with sorted fields and an indent of one. Of the tasks, which may be many, only
    names and digests vary, which need no escapes."""
    start = json.dumps({"format": FORMAT, "model": about}, indent=1, sort_keys=True, allow_nan=False)
    entries = [
        f'  "{name}": {{\n   "file": "{task_path(name, digest)}",\n   "sha256": "{digest}"\n  }}'
        for name, digest in sorted(files.items())
    ]
    tasks = "{\n" + ",\n".join(entries) + "\n }" if entries else "{}"
    return f'{start[:-2]},\n "tasks": {tasks}\n}}\n'.encode()


def check_same(got: Mapping[str, Any], expected: Mapping[str, Any], got_from: str, expected_by: str) -> None:
    """Raise InputError unless two stores, or a store and a model, have the same backbone and configuration.

    Fields of `WHEN_KNOWN` are compared if both have them.
    """
    ours, theirs = expected.get("backbone"), got.get("backbone")
    if ours and theirs and ours != theirs and got.get("fingerprint") != expected.get("fingerprint"):
        raise InputError(f"{got_from}: its backbone is {theirs!r}, that of {expected_by} is {ours!r}")
    both = got.keys() & expected.keys()
    for name in sorted(both & {"tokens", "encoder_tokens"}):
        if got[name] != expected[name]:
            raise InputError(
                f"{got_from}: its {name.removesuffix('tokens')}tokenizer makes other tokens than that of {expected_by}"
            )
    inner = ("config", "settings", "encoder_settings", "shapes")  # shapes last: another configuration explains them
    parts = [name for name in inner if name in both]
    for part, theirs, ours in [("", got, expected), *((f"{name}.", got[name], expected[name]) for name in parts)]:
        for key in sorted(theirs.keys() | ours.keys()):
            if part + key in ("backbone", *inner):  # the backbone may have moved
                continue
            # Other library versions have other settings.
            if (part + key in WHEN_KNOWN or "settings" in part) and (key not in theirs or key not in ours):
                continue
            if theirs.get(key) != ours.get(key):
                raise InputError(f"{got_from}: {part}{key} is {theirs.get(key)!r}, {expected_by} has {ours.get(key)!r}")


# A task's file


def check_task(metadata: Any, tensors: Mapping[str, Tensor], file: Path) -> LearnedTask:
    """The task made of a file's metadata and tensors, if these are consistent. (`check_fits` checks that it fits a
    model.)

    Raises:
        WorkError: they are not consistent.
    """
    try:
        return task_of(check_contents(metadata, tensors), tensors)
    except Unknown as unknown:
        raise WorkError(f"{file}: {unknown}") from None
    except (Unfit, InputError, ValueError) as error:
        raise WorkError(f"{file}: not a task file: {error}") from None


def check_contents(metadata: Any, tensors: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """Check that the metadata and the tensors of a task's file are consistent, and return the metadata. Raises Unfit,
    Unknown, InputError or ValueError."""
    about = about_task(metadata)
    check(about["name"], "name", TEXT)
    check_name(about["name"])
    check(about["labels"], "labels", or_null(list_of(TEXT)))
    labels = about["labels"]
    if repeated(labels or ()) is not None:
        raise Unfit("labels", f"{repeated(labels)!r} is listed twice")
    for field, value in fields(about["options"], "options", others=True).items():
        check(value, f"options.{field}", PLAIN)
    if "warm_start" in about["options"]:
        _check_start(about["options"]["warm_start"])
    if "origin" in about:
        check(about["origin"], "origin", DIGEST)
    check_tensors(tensors, labels, adapter_of(about))
    return about


def about_task(metadata: Any) -> Mapping[str, Any]:
    """A task's metadata, checked only for which fields it has. Raises as `read_json` does, or Unfit."""
    check(metadata, "metadata", TEXT)
    return fields(read_json(metadata), "", "labels", "name", "options", optional=["origin", "adapter"])


def task_of(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LearnedTask:
    """The task made of metadata and tensors that have been checked before."""
    labels = about["labels"]
    return LearnedTask(
        name=about["name"],
        labels=None if labels is None else tuple(labels),
        values={
            module: (tensors[f"values.{module}.lora_a"], tensors[f"values.{module}.lora_b"])
            for module in modules_of(tensors)
        },
        router={name: tensor for name, tensor in tensors.items() if not name.startswith(("values.", "head."))},
        head=(tensors["head.weight"], tensors["head.bias"]) if "head.weight" in tensors else None,
        options=about["options"],
        origin=about.get("origin"),
        adapter=adapter_of(about),
        dense=(tensors["head.dense.weight"], tensors["head.dense.bias"]) if "head.dense.weight" in tensors else None,
    )


def adapter_of(task: Mapping[str, Any]) -> Adapter | None:
    """What an imported task's file says about how it answers."""
    if "adapter" not in task:
        return None
    about = task["adapter"]
    fields(about, "adapter", *(field for field in ADAPTER if field != "activation"), optional=["activation"])
    for field, value in about.items():
        check(value, f"adapter.{field}", ADAPTER[field])
    return Adapter(**{**about, "ends": tuple(about["ends"])})


def check_backbone(name: str, fingerprint: str, about: Mapping[str, Any], where: str) -> None:
    """Raise InputError unless a backbone is the one that the store at `where` was made with."""
    made_with, expected = about["backbone"], about["fingerprint"]
    if fingerprint == expected:
        return
    if made_with and name != made_with:
        says = f"store {where} was made with {made_with!r}; leave out backbone= (--backbone)"
    else:
        says = f"changed since store {where} was made: its fingerprint is {fingerprint[:12]}..., was {expected[:12]}..."
    raise InputError(f"backbone {name!r}: {says}")


def _check_start(start: Any) -> None:
    """Check a recorded warm start: a task and its file's SHA-256, or true if there was nothing to start from."""
    if start is not True:
        fields(start, "options.warm_start", "task", "sha256")
        check(start["task"], "options.warm_start.task", TEXT)
        check(start["sha256"], "options.warm_start.sha256", DIGEST)


def check_learned(task: LearnedTask) -> None:
    """Raise WorkError if a task that was just learned has numbers that a store refuses."""
    tensors = [(f"values.{name}", tensor) for name, pair in task.values.items() for tensor in pair]
    tensors += [("head.", tensor) for tensor in task.head or ()]
    try:
        for name, tensor in [*tensors, *task.router.items()]:
            check_numbers(name, tensor)
    except Unfit as error:
        raise WorkError(f"task {task.name!r}: {error}; lower learning_rate") from None


def check_scatter(task: LearnedTask, file: Path) -> None:
    """Raise WorkError unless a task's scatter is positive semi-definite. Takes time D^3."""
    scatter = task.router.get("scatter")
    if scatter is not None and not is_scatter(unpack(scatter)):
        raise WorkError(f"{file}: not a task file: scatter: expected a positive semi-definite matrix")


def check_fits(
    task: LearnedTask, shapes: Mapping[str, Any], config: Mapping[str, Any], *, file: Path | None = None
) -> None:
    """Raise WorkError unless a task fits the model that is to use it. (Only the model can check whether it has the
    additional modules of an imported task.)

    Args:
        shapes: `layers`, name -> (in_features I, out_features O) of each linear layer with increments; `hidden`, H of
            an encoder-only backbone, whose tasks have heads, or None if the backbone generates text; `query`, D.
        config: of the model; only `router` and `features` are used.
        file: where the task was read from, for the message.
    """
    modules, width = shapes["layers"], shapes["hidden"]
    router = "features" if config["features"] else config["router"]
    try:
        for module in sorted(task.values.keys() ^ modules.keys()) if task.adapter is None else ():
            raise Unfit(f"values.{module}", "missing" if module in modules else "the model has no such layer")
        for module, (features_in, features_out) in modules.items():
            if module in task.values:
                lora_a, lora_b = task.values[module]
                rank = None if task.adapter else task.rank
                check_shape(f"values.{module}.lora_a", lora_a, S=task.slots, r=rank, I=features_in)
                check_shape(f"values.{module}.lora_b", lora_b, S=task.slots, r=rank, O=features_out)
        expected = set(ROUTERS[router])
        if task.router.keys() - {NEWER.get(router)} != expected:
            raise Unfit("router", f"expected {', '.join(sorted(expected))}, got {', '.join(sorted(task.router))}")
        if router == "dtkr":
            check_shape("keys", task.router["keys"], S=task.slots, D=shapes["query"])
        else:
            check_shape("mean", task.router["mean"], M=None, D=shapes["query"])
            if router == "features" and task.router["sample"].shape[1] != shapes["query"] - config["features"]:
                raise Unfit("sample", f"expected queries of {shapes['query'] - config['features']} numbers")
        if (task.head is None) != (width is None) and not (task.adapter and task.head):
            raise Unfit("head", "missing" if task.head is None else "the model answers without one")
        if task.head is not None and width is not None:
            check_shape("head.weight", task.head[0], C=len(task.labels or ()), H=width)
    except Unfit as error:
        raise WorkError(f"{file or f'task {task.name!r}'}: does not fit the model: {error}") from None
